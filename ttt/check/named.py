"""Which backbone a config is for: the one that it names, or who calls, as an installed plugin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttt import plugins
from ttt.check.codes import REINSTALL, TTT102, TTT104, TTT106, TTT801, TTT802
from ttt.config.findings import Finding, Place
from ttt.config.source import Source
from ttt.config.spelling import nearest
from ttt.plugins import Backbone
from ttt.plugins.registry import unreadable_metadata


def named_backbone(
    data: dict[str, Any], asked: Backbone | str | None, source: Source, findings: list[Finding]
) -> Backbone | None:
    """The plugin that the config or the caller names; None, with a finding, if there is none that works.

    Args:
        data: of the config. If only the caller names the backbone, the name is added.
        asked: what the caller names.
        source: of the data.
        findings: is given what is wrong.
    """
    asked_name = asked.name if isinstance(asked, Backbone) else asked
    section = data.get("backbone", {})
    if not isinstance(section, Mapping):
        fix = f"write `backbone: {{name: {section}}}`" if isinstance(section, str) else "write its keys below it"
        findings.append(TTT102.at("backbone", "`backbone` must be a section of `key: value`", fix))
        data["backbone"] = {}
        return None
    name = section.get("name", asked_name)
    if name is None:
        path = "backbone" if "backbone" in data else ""
        told = "the config names no backbone" if asked_name is None else "`backbone.name` is null"
        findings.append(TTT104.at(path, told, f"write `backbone: {{name: …}}`; installed: {_installed()}"))
        return None
    if not isinstance(name, str):
        findings.append(TTT102.at("backbone.name", "`backbone.name` must be text", f"write one of {_installed()}"))
        return None
    if asked_name is not None and name != asked_name:
        told = f"the config is for {name}, but {asked_name} was asked for"
        findings.append(TTT106.at("backbone.name", told, "leave one of the two out", value=name))
    data["backbone"] = {**section, "name": name}
    return asked if isinstance(asked, Backbone) and asked.name == name else _looked_up(name, source, findings)


def _looked_up(name: str, source: Source, findings: list[Finding]) -> Backbone | None:
    """The installed plugin of that name. If there is none, or it is broken, add a finding and return None."""
    plugin = plugins.find(name)
    if plugin is None:
        close = nearest(name, plugins.names())
        other = f"install its plugin, or write one of those installed: {_installed()}"
        findings.append(
            TTT801.at(
                "backbone.name",
                "; ".join((f"no backbone {name!r} is installed", *unreadable_metadata())),
                f"write `{close}`" if close else other,
                value=name,
                place=None if source.written(("backbone", "name")) else Place(f"--backbone {name}"),
                replacement=close,
            )
        )
        return None
    if plugin.backbone is None:
        told = f"the backbone {name!r} of {plugin.distribution} {plugin.version} is broken: {plugin.error}"
        findings.append(TTT802.at("backbone.name", told, REINSTALL, value=name))
    return plugin.backbone


def _installed() -> str:
    names = [plugin.name for plugin in plugins.discover() if plugin.backbone is not None]
    return ", ".join(f"`{name}`" for name in names) or "none; install one, as `pip install ttt-moshi`"
