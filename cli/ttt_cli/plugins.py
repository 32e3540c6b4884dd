"""`ttt plugins`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttt.printable import json_text
from ttt_cli.terminal import show

if TYPE_CHECKING:
    from ttt.plugins import PluginInfo


def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="As a JSON list.")] = False,
) -> None:
    """List installed backbones, working or broken: their presets, facts and rules are tried, without torch.

    Of one that works it says what it can do beside being trained, as `sample` or `stream`.

    Exit codes: 0 all work, 1 one is broken.
    """
    from ttt.check.examined import examined
    from ttt.plugins import discover

    found = tuple(map(examined, discover()))
    if as_json:
        print(json_text([facts_of_plugin(plugin) for plugin in found]))
    elif not found:
        show("No backbone is installed. Install one, as `pip install ttt-moshi`.")
    else:
        _print_table(found)
    if any(plugin.backbone is None for plugin in found):
        raise typer.Exit(1)


def facts_of_plugin(plugin: PluginInfo) -> dict[str, Any]:
    """What JSON says of a plugin."""
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "module": plugin.module,
        "works": plugin.backbone is not None,
        "error": plugin.error,
        "capabilities": _abilities(plugin),
    }


def _abilities(plugin: PluginInfo) -> list[str]:
    """What a working backbone can do beside being trained."""
    from ttt.plugins.capabilities import CAPABILITIES, has_capability

    return [words.verb for kind, words in CAPABILITIES.items() if has_capability(plugin.backbone, kind)]


def _print_table(found: tuple[PluginInfo, ...]) -> None:
    rows = [("NAME", "VERSION", "FROM"), *((plugin.name, plugin.version, _origin(plugin)) for plugin in found)]
    name_width, version_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    for (name, version, origin), plugin in zip(rows, (None, *found), strict=True):
        show(f"{name:{name_width}}  {version:{version_width}}  {origin}{_state(plugin)}")
        if plugin is not None and plugin.error:
            show(f"  {plugin.error}")


def _state(plugin: PluginInfo | None) -> str:
    """What stands behind a row."""
    if plugin is None:
        return ""
    able = ", ".join(_abilities(plugin))
    return "  BROKEN" if plugin.error else f"  can {able}" if able else ""


def _origin(plugin: PluginInfo) -> str:
    return f"{plugin.distribution} ({plugin.module})"
