"""What a model with TTT remembers of itself, and how it becomes an instance of another class and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from ttt.errors import UsageError
from ttt.inject import Injection

_KEY = "_ttt_attached"

_MADE: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


@dataclass(eq=False)
class Attached:
    """TTT in a model, and what is needed to take it out again."""

    injection: Injection
    model: nn.Module
    """The model in which the sites are; inside PEFT's wrapper, if there is one."""
    backbone: Mapping[str, Any]
    """What adapter files say of the model."""
    flags: list[tuple[nn.Parameter, bool]]
    """The backbone's parameters with the `requires_grad` that they had."""
    before: dict[str, Tensor] = field(default_factory=dict)
    """Values of backbone parameters that a file of trained ones has replaced, by name."""
    training: dict[str, Any] = field(default_factory=dict)
    """What the file that was loaded says of its training."""
    wrapper: nn.Module | None = None
    """PEFT's wrapper, if it is a model with TTT too."""

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapters' parameters by name in the model."""
        adapters = tuple(f"{name}." for name in self.injection.adapters)
        return {name: value for name, value in self.model.named_parameters() if name.startswith(adapters)}


def attached_to(model: nn.Module) -> Attached:
    """What a model remembers of its TTT.

    Raises:
        UsageError: there is none: it was unloaded, or made in another way.
    """
    found = vars(model).get(_KEY)
    if found is None:
        raise UsageError(f"this {type(model).__name__} has no TTT in it; ttt.get_ttt_model(model) puts it in")
    return cast("Attached", found)


def is_attached(model: nn.Module) -> bool:
    """Whether a model has TTT by this module."""
    return _KEY in vars(model)


def attach(model: nn.Module, attached: Attached, mixin: type[nn.Module]) -> None:
    """Make a model an instance of a subclass of its own class that is a `mixin` too."""
    model.__class__ = _with(type(model), mixin)
    vars(model)[_KEY] = attached


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    del vars(model)[_KEY]
    model.__class__ = type(model).__mro__[2]


def _with(kind: type[nn.Module], mixin: type[nn.Module]) -> type[nn.Module]:
    """Made once, and called like the class itself: transformers looks models up by the names of their classes."""
    if (kind, mixin) not in _MADE:
        body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        _MADE[kind, mixin] = cast("type[nn.Module]", type(kind.__name__, (mixin, kind), body))
    return _MADE[kind, mixin]
