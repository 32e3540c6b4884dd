"""The version of this distribution, which the files that it writes name."""

__version__ = "0.1.0"
