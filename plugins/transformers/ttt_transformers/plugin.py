"""The plugin: any causal language model of `transformers`. All that it does is in `ttt.hf.CausalLMBackbone`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ttt.config import BackboneOptions
from ttt.hf import CausalLMBackbone, TextData
from ttt.packaged import packaged_presets
from ttt.plugins import Backbone, hookimpl
from ttt_transformers.options import TransformersOptions


class TransformersBackbone(CausalLMBackbone[TransformersOptions, TextData]):
    """Any causal language model of `transformers` whose structure is understood."""

    name: ClassVar[str] = "transformers"
    model_type: ClassVar[str] = "llama"
    options: ClassVar[type[BackboneOptions]] = TransformersOptions

    def presets(self) -> Mapping[str, str]:
        """The commented configs that ship."""
        return packaged_presets("ttt_transformers", ("demo", "smollm2-135m", "llama-3.2-1b", "qwen3-0.6b"))


@hookimpl
def ttt_backbone() -> Backbone:
    """The hook: this plugin's backbone."""
    return TransformersBackbone()
