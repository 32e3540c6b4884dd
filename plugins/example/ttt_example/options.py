"""The sections `backbone` and `data` of a config; imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ttt.config import BackboneOptions, DataOptions


class ExampleOptions(BackboneOptions):
    """The `backbone` section."""

    name: Literal["example"] = "example"
    """The backbone's name."""
    # CHANGE 1: what your model is built from
    dim: Annotated[int, Field(ge=1, le=4096)] = 64
    """Model width, a multiple of num_heads."""
    num_heads: Annotated[int, Field(ge=1, le=64)] = 4
    """Attention heads."""
    num_layers: Annotated[int, Field(ge=1, le=64)] = 4
    """Layers."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Of the random weights."""


class ExampleData(DataOptions):
    """The `data` section: `train_data` and `eval_data` are text files."""

    window_bytes: Annotated[int, Field(ge=1, le=1 << 20)] = 64
    """Length of a window of text."""
