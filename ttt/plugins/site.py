"""The places in a model where TTT can be attached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, eq=False)
class Site:
    """A place where TTT can be attached. Subclass it if that needs more than a new class and a child."""

    layer: int
    """Its number, as `ttt.layers` names it."""
    path: str
    """Dotted path of `module` in the model: what `model.named_modules()` calls it. Adapter files name tensors by it."""
    module: nn.Module
    """What gets the adapter as a child."""
    dim: int
    """Width D of the tokens there."""
    num_heads: int
    """The backbone's heads there."""
    subclass: type[nn.Module]
    """What `module` becomes: a subclass of its class, with no parameters of its own, that calls `self.ttt`."""
    adapter: type[nn.Module] | None = None
    """Called as `adapter(dim, num_heads, config, device=…, dtype=…)`; None is `ttt.TTTAdapter`."""
    attribute: str = "ttt"
    """Name of the adapter as a child of `module`."""
    without_effect: frozenset[str] = frozenset()
    """Parameters of the adapter on which the backbone's output cannot depend there, and so get no gradient."""
    known_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the backbone that can be read off the built model, by name, as `Backbone.identity` gives them: an
    adapter file that says otherwise is refused even if its loader knows the model alone. The same at each site."""

    @property
    def name(self) -> str:
        """Dotted path of the adapter in the model."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute

    @property
    def layer_path(self) -> str:
        """Dotted path of the layer that the site is in: its own, up to the layer's number if it has that."""
        parts = self.path.split(".")
        number = str(self.layer)
        return ".".join(parts[: parts.index(number) + 1]) if number in parts else self.path

    def prepare(self) -> Callable[[], None] | None:
        """Give `module` what the config gives a layer with TTT beside its adapter, as another span of attention.

        Most sites have nothing of that kind. If one has, its `attach` prepares it too, and its `detach` undoes that.
        The plain model to which an adapted one with closed gates is equal has prepared sites.

        Returns:
            What undoes it; None if it changed nothing. Files with LoRA alone say which layers it changed.
        """
        return None

    def attach(self, adapter: nn.Module) -> None:
        """Make `module` call the adapter."""
        self.module.add_module(self.attribute, adapter)
        self.module.__class__ = self.subclass

    def detach(self, original: type[nn.Module]) -> None:
        """Undo `attach`."""
        self.module.__class__ = original
        if self.attribute in self.module._modules:
            delattr(self.module, self.attribute)
