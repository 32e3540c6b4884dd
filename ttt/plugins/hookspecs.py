"""The hooks of pluggy that a plugin may implement, all in the project `ttt`.

A distribution may bring any of them, with or without a backbone. For each kind that it brings, it declares its module
as an entry point in the group of that kind:

    [project.entry-points."ttt.rules"]
    house = "lab_rules.plugin"

An implementation takes the parameters of its hook that it needs, by name and without a default. `ttt.plugins.registry`
calls it. An error or a wrong answer is reported in one sentence, and the other plugins go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from ttt.config.schema import RunConfig
    from ttt.plugins.backbone import Backbone
    from ttt.plugins.eval_tasks import AnyEvalTask
    from ttt.plugins.imported import ImportedConfig
    from ttt.plugins.loggers import Logger
    from ttt.plugins.rules import Rule

hookspec = pluggy.HookspecMarker("ttt")
hookimpl = pluggy.HookimplMarker("ttt")
"""Marks an implementation: `from ttt.plugins import hookimpl`."""


@dataclass(frozen=True)
class Kind:
    """One kind of thing that a plugin brings."""

    hook: str
    """The hook that gives it."""
    group: str
    """The group of entry points that declares it."""
    words: str
    """What it is, for `ttt plugins`."""
    first: bool = False
    """Whether only the first answer that is not None is wanted, not those of all plugins."""


BACKBONES = Kind("ttt_backbone", "ttt.backbones", "backbone", first=True)
RULES = Kind("ttt_rules", "ttt.rules", "rules")
CONFIG_IMPORTS = Kind("ttt_import_config", "ttt.config_imports", "import of configs", first=True)
LOGGERS = Kind("ttt_loggers", "ttt.loggers", "logger")
EVAL_TASKS = Kind("ttt_eval_tasks", "ttt.eval_tasks", "evaluation tasks")
KINDS = (BACKBONES, RULES, CONFIG_IMPORTS, LOGGERS, EVAL_TASKS)


@hookspec(firstresult=BACKBONES.first)
def ttt_backbone(name: str) -> Backbone:  # type: ignore[empty-body]
    """Return the backbone of that name, one instance for the process.

    Args:
        name: the name of the entry point. A module that brings only one backbone does not need it.
    """


@hookspec
def ttt_rules(backbone: str | None) -> Sequence[Rule[RunConfig]]:  # type: ignore[empty-body]
    """Return rules for `ttt check`, made by `ttt.plugins.rule`. Must work without torch.

    Args:
        backbone: whose config is checked; None asks for all rules, to explain their codes.
    """


@hookspec(firstresult=CONFIG_IMPORTS.first)
def ttt_import_config(text: str, file: str) -> ImportedConfig | None:
    """Translate a config of another program to this project's keys; return None if you do not know its format.

    Args:
        text: the other program's config.
        file: its name; the ending may tell the format.

    Raises:
        ttt.errors.UsageError: you know the format, but the file is damaged; the message says where.
    """


@hookspec
def ttt_loggers(config: RunConfig, run_dir: Path, first_step: int) -> Logger | None:
    """Return a logger that keeps the metrics of this run; None if this run needs none.

    It is called once, before the first step.

    Args:
        config: resolved, of the run.
        run_dir: its folder.
        first_step: the next step, 1 in a new run. If a logger already has lines of this step or later ones, they are
            from a run that was interrupted, and those steps come again.
    """


@hookspec
def ttt_eval_tasks() -> Sequence[AnyEvalTask]:  # type: ignore[empty-body]
    """Return evaluation tasks, which a config names under `eval.tasks`. Must work without torch."""
