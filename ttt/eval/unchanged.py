"""Whether a task has written to a weight: it measures a model, and must leave it as it is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def weight_versions(model: nn.Module) -> dict[str, int]:
    """How often each weight was written to, as PyTorch counts it."""
    return {name: parameter._version for name, parameter in model.named_parameters()}


def changed_weight(model: nn.Module, before: Mapping[str, int]) -> str | None:
    """The first weight that was written to since `before`; None if none was.

    Args:
        model: the model.
        before: its `weight_versions` then.
    """
    return next((name for name, version in weight_versions(model).items() if before.get(name) != version), None)
