"""The hooks of pluggy that a plugin may implement, all in the project `ttt`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from ttt.plugins.backbone import Backbone

hookspec = pluggy.HookspecMarker("ttt")
hookimpl = pluggy.HookimplMarker("ttt")
"""Marks an implementation: `from ttt.plugins.hookspecs import hookimpl`."""


@hookspec
def ttt_backbone() -> Backbone:  # type: ignore[empty-body]
    """Return the backbone that this plugin brings, one instance for the process."""
