"""Installed plugins, each tried out as far as that needs no torch and no run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ttt.check.catalogue import explanations_of, explanations_of_rules
from ttt.check.load import check_config
from ttt.config.findings import Blame, Severity
from ttt.errors import PluginError, TTTError
from ttt.plugins import Backbone
from ttt.plugins.discovery import PluginInfo, find
from ttt.plugins.hookspecs import BACKBONES, EVAL_TASKS, RULES
from ttt.plugins.installed_tasks import installed_tasks
from ttt.plugins.listing import InstalledPlugin, installed_plugins
from ttt.plugins.registry import ask


def examined_plugins() -> tuple[InstalledPlugin, ...]:
    """Every installed plugin; `error` is set if anything that it brings fails. Needs no torch and no run."""
    return tuple(plugin if plugin.error else replace(plugin, error=_wrong_in(plugin)) for plugin in installed_plugins())


def _wrong_in(plugin: InstalledPlugin) -> str | None:
    """The first thing that fails of what a plugin brings; None if nothing does."""
    found = find(plugin.name) if BACKBONES in plugin.brings else None
    if found is not None and examined(found).error:
        return examined(found).error
    for kind, point in zip(plugin.brings, plugin.points, strict=True):
        if kind in (RULES, EVAL_TASKS):
            arguments: dict[str, Any] = {"backbone": None} if kind is RULES else {}
            answers = ask(kind, only=[point], **arguments)
            for failure in answers.failures:
                return failure.told
            for answer in answers.given if kind is RULES else ():
                try:
                    explanations_of_rules(answer.plugin, answer.value)
                except PluginError as error:
                    return error.told
    if EVAL_TASKS in plugin.brings:
        return next((told.told for told in installed_tasks().failures if plugin.distribution in told.claimed_by), None)
    return None


def examined(plugin: PluginInfo) -> PluginInfo:
    """The plugin; `error` is set if its presets, explanations, facts or rules fail. Needs no torch."""
    if plugin.backbone is None:
        return plugin
    try:
        _try_out(plugin.backbone)
    except TTTError as error:
        return replace(plugin, backbone=None, error=str(error))
    return plugin


def _try_out(backbone: Backbone) -> None:
    """Ask a backbone for its explanations and presets, and check each preset as a config.

    Raises:
        TTTError: what is wrong.
    """
    explanations_of(backbone)
    for name, text in backbone.presets().items():
        checked = check_config(f"preset {name}", text=text, backbone=backbone, training=False)
        for finding in checked.findings:
            wrong_demo = name == "demo" and finding.severity is Severity.ERROR and finding.blames is Blame.CONFIG
            if finding.blames is Blame.PLUGIN or wrong_demo:
                raise PluginError(f"{finding.place}: {finding.message}")
