"""The laws for any causal language model of `transformers`, on a tiny Llama; some on other architectures."""

from __future__ import annotations

from ttt.testing import laws

TestTransformers = laws("transformers")
