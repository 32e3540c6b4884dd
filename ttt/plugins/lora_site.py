"""The linear layers of a model that LoRA can go into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, eq=False)
class LoraSite:
    """A linear layer that LoRA can go into.

    It gets `lora_A` and `lora_B` as children, and its class becomes one whose `forward` adds them. So its parameters
    keep their names. A module that reads `linear.weight` itself, and does not call the layer, would not see LoRA: such
    a module is the `host` of its linear layers, and gets a class that calls them.
    """

    path: str
    """Dotted path of the linear layer in the model. Files name its LoRA by it."""
    linear: nn.Linear
    host: nn.Module | None = None
    """The module that reads the weight itself."""
    host_class: type[nn.Module] | None = None
    """What the host becomes: a subclass of its class that calls its linear layers unless their LoRA is off."""
