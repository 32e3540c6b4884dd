"""Which entry point brought a backbone, so that a sentence about it can name its distribution."""

from __future__ import annotations

from importlib.metadata import EntryPoint

_BROUGHT: dict[int, tuple[object, EntryPoint]] = {}
"""By the `id` of a backbone. The backbone is kept, so that no other object gets its `id`."""


def brought(backbone: object, point: EntryPoint) -> None:
    """Record the entry point that brought a backbone."""
    _BROUGHT[id(backbone)] = backbone, point


def origin_of(backbone: object) -> EntryPoint | None:
    """The entry point that brought a backbone; None if it was made in another way."""
    found = _BROUGHT.get(id(backbone))
    return None if found is None else found[1]


def distribution_of(point: EntryPoint) -> str:
    """The name of the distribution that declares an entry point."""
    return (point.dist.name if point.dist else None) or "?"  # None where its metadata are gone


def version_of(point: EntryPoint) -> str:
    """The version of that distribution."""
    return (point.dist.version if point.dist else None) or "?"
