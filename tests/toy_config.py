"""A backbone whose torch-free half alone is real: what the tests of configs and commands check against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field, model_validator

from ttt.config import BackboneOptions, DataOptions, Misfit, RunConfig
from ttt.plugins import Backbone, BackboneFacts, hookimpl

DEMO = """\
# A toy, to be trained in a moment.
backbone:
  name: toy
ttt:
  layers: [1, 2]
train:
  max_steps: 3
"""


class ToyOptions(BackboneOptions):
    dim: Annotated[int, Field(ge=1)] = 32
    """Model width."""
    heads: Annotated[int, Field(ge=1)] = 4
    """Attention heads."""
    depth: int = 4
    """Layers."""
    flavour: Literal["sweet", "sour"] = "sweet"
    """Taste."""
    weights: str | None = None
    """A file of weights."""

    @model_validator(mode="after")
    def _fits(self) -> ToyOptions:
        if self.flavour == "sour" and self.weights is None:
            raise Misfit(
                "flavour: sour has no weights of its own", keys=("flavour", "weights"), fix="write weights: FILE"
            )
        return self


class ToyData(DataOptions):
    window_tokens: Annotated[int, Field(ge=1)] = 64
    """Tokens of a window."""


class ToyBackbone(Backbone):
    name = "toy"
    causal = True
    options = ToyOptions
    data_options = ToyData
    ttt_defaults: Mapping[str, Any] = {"preset": "lm", "layer_type": "mlp", "base_lr": 0.1, "qkvo_bias": True}

    def presets(self) -> Mapping[str, str]:
        return {"demo": DEMO, "big": DEMO.replace("[1, 2]", "all")}

    def facts(self, config: RunConfig) -> BackboneFacts:
        assert isinstance(config.backbone, ToyOptions)
        assert isinstance(config.data, ToyData)
        return BackboneFacts(
            dim=config.backbone.dim,
            num_heads=config.backbone.heads,
            num_layers=config.backbone.depth,
            tokens_per_window=config.data.window_tokens,
            window=f"a window of {config.data.window_tokens} tokens",
        )

    def _has_no_model(self, *_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a config was checked by building the model")

    build = sites = dataset = loss = example_batch = outputs = perturb = _has_no_model

    def tiny(self) -> ToyOptions:
        return ToyOptions(name="toy")


@hookimpl
def ttt_backbone() -> Backbone:
    return ToyBackbone()
