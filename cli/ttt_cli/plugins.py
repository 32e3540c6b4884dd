"""`ttt plugins`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttt.printable import json_text
from ttt_cli.terminal import show, show_warning

if TYPE_CHECKING:
    from ttt.plugins.listing import InstalledPlugin


def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="As a JSON list.")] = False,
) -> None:
    """List installed plugins and what they bring, working or broken.

    Presets, facts, rules and tasks are tried, without torch.

    Of one that works it says what it can do beside being trained, as `sample` or `stream`.

    Exit codes: 0 all work, 1 one is broken.
    """
    from ttt.check.examined import examined_plugins
    from ttt.plugins.registry import unreadable_metadata

    found = examined_plugins()
    if as_json:
        print(json_text([facts_of_plugin(plugin) for plugin in found]))
    elif not found:
        show("No plugin is installed. Install a backbone, as `pip install ttt-moshi`.")
    else:
        _print_table(found)
    damaged = unreadable_metadata()
    for problem in damaged:
        show_warning(f"{problem}, so that none of its plugins is found; install it again")
    if damaged or any(plugin.error for plugin in found):
        raise typer.Exit(1)


def facts_of_plugin(plugin: InstalledPlugin) -> dict[str, Any]:
    """The JSON entry of a plugin."""
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "module": plugin.module,
        "brings": [kind.group for kind in plugin.brings],
        "works": plugin.error is None,
        "error": plugin.error,
        "capabilities": _abilities(plugin),
        "tasks": list(plugin.tasks),
    }


def _abilities(plugin: InstalledPlugin) -> list[str]:
    """What a working backbone can do besides training."""
    from ttt.plugins.capabilities import CAPABILITIES
    from ttt.plugins.capability_base import has_capability

    backbone = plugin.backbone
    return [words.verb for kind, words in CAPABILITIES.items() if has_capability(backbone, kind)]


def _print_table(found: tuple[InstalledPlugin, ...]) -> None:
    head = ("NAME", "VERSION", "FROM", "BRINGS")
    rows = [head, *((plugin.name, plugin.version, _origin(plugin), _brings(plugin)) for plugin in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    errors = ["", *(plugin.error or "" for plugin in found)]
    for row, error in zip(rows, errors, strict=True):
        aligned = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)]
        show("  ".join([*aligned, row[-1]]) + ("  BROKEN" if error else ""))
        if error:
            show(f"  {error}")


def _brings(plugin: InstalledPlugin) -> str:
    """`backbone (can sample, stream), evaluation tasks (stories)`."""
    from ttt.plugins.hookspecs import BACKBONES, EVAL_TASKS

    able, tasks = ", ".join(_abilities(plugin)), ", ".join(plugin.tasks)
    more = {BACKBONES: f" (can {able})" if able else "", EVAL_TASKS: f" ({tasks})" if tasks else ""}
    return ", ".join(kind.words + ("" if plugin.error else more.get(kind, "")) for kind in plugin.brings)


def _origin(plugin: InstalledPlugin) -> str:
    return f"{plugin.distribution} ({plugin.module})"
