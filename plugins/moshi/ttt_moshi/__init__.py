"""The Moshi backbone for ttt: TTT layers in kyutai's speech language model."""

__version__ = "0.1.0"
