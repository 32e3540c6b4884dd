"""What a capability is, and whether a backbone has it. The capabilities are in `ttt.plugins.capabilities`."""

from __future__ import annotations

from abc import ABC
from typing import Any, TypeGuard, TypeVar

from ttt.plugins.guarding import guard


class Capability(ABC):  # noqa: B024 - each capability has abstract methods of its own
    """Base of every capability. A capability is a direct subclass of this class."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        for kind in kinds_of(cls):
            guard(cls, kind)


def kinds_of(cls: type) -> list[type[Capability]]:
    """The capabilities that a class inherits, in the order of its bases (MRO)."""
    return [kind for kind in cls.__mro__ if Capability in kind.__bases__]


CapabilityT = TypeVar("CapabilityT", bound=Capability)


def members_of(kind: type[Capability]) -> list[str]:
    """The public names that a capability brings."""
    return [name for name in vars(kind) if not name.startswith("_")]


def has_capability(backbone: object, kind: type[CapabilityT]) -> TypeGuard[CapabilityT]:
    """Whether a backbone can do something."""
    return isinstance(backbone, kind)
