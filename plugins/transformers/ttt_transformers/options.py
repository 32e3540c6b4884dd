"""The section `backbone` of a config; imports no torch."""

from __future__ import annotations

from typing import Literal

from ttt.hf import CausalLMOptions


class TransformersOptions(CausalLMOptions):
    """The `backbone` section for any causal language model of `transformers`."""

    name: Literal["transformers"] = "transformers"
    """The backbone's name."""
