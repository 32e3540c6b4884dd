"""Plugins tried out: all that can be, without torch."""

from __future__ import annotations

from dataclasses import replace

from ttt.check.catalogue import explanations_of
from ttt.check.load import check_config
from ttt.config.findings import Blame, Severity
from ttt.errors import PluginError, TTTError
from ttt.plugins import Backbone
from ttt.plugins.discovery import PluginInfo


def examined(plugin: PluginInfo) -> PluginInfo:
    """The plugin, broken where its presets, explanations, facts or rules are: all that can be tried without torch."""
    if plugin.backbone is None:
        return plugin
    try:
        _try_out(plugin.backbone)
    except TTTError as error:
        return replace(plugin, backbone=None, error=str(error))
    return plugin


def _try_out(backbone: Backbone) -> None:
    """Ask a backbone for what it has beside a model, and check its demo config.

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
