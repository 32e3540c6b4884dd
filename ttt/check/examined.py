"""Installed plugins, each tried out as far as that needs no torch and no run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ttt.check.catalogue import explanations_of, explanations_of_rules
from ttt.check.load import check_config
from ttt.check.rules.of_plugins import require_keys
from ttt.config.findings import Blame, Severity
from ttt.errors import PluginError, TTTError
from ttt.plugins import Backbone
from ttt.plugins.discovery import PluginInfo, find
from ttt.plugins.hookspecs import BACKBONES, EVAL_TASKS, RULES
from ttt.plugins.installed_tasks import installed_tasks
from ttt.plugins.listing import InstalledPlugin, installed_plugins
from ttt.plugins.registry import Answer, ask


def examined_plugins() -> tuple[InstalledPlugin, ...]:
    """Every installed plugin; `error` is set if anything that it brings fails. Needs no torch and no run."""
    return tuple(plugin if plugin.error else replace(plugin, error=_wrong_in(plugin)) for plugin in installed_plugins())


def _wrong_in(plugin: InstalledPlugin) -> str | None:
    """The first thing that fails of what a plugin brings; None if nothing does."""
    return next(_problems_of(plugin), None)


def _problems_of(plugin: InstalledPlugin) -> Iterator[str]:
    """What fails of what a plugin brings, each tried when it is asked for."""
    points = dict(zip(plugin.brings, plugin.points, strict=True))
    backbone = find(plugin.name) if BACKBONES in points else None
    error = None if backbone is None else examined(backbone).error
    if error is not None:
        yield error
    if RULES in points:
        answers = ask(RULES, only=[points[RULES]], backbone=None)
        yield from (failure.told for failure in answers.failures)
        yield from filter(None, map(_wrong_in_rules, answers.given))
    if EVAL_TASKS in points:
        yield from (failure.told for failure in ask(EVAL_TASKS, only=[points[EVAL_TASKS]]).failures)
        yield from (failure.told for failure in installed_tasks().failures if plugin.distribution in failure.claimed_by)


def _wrong_in_rules(answer: Answer) -> str | None:
    """What is wrong with the rules of a plugin: a key that no config has, or a code that nothing explains."""
    try:
        for rule in answer.value:
            require_keys(rule, answer.plugin)
        explanations_of_rules(answer.plugin, answer.value)
    except PluginError as error:
        return error.told
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
