"""The tasks of an evaluation, and what is measured with (TTT5xx)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ttt.check.rules.rule import FACTS, Context, rule
from ttt.config.findings import Code, Family, Finding, Severity
from ttt.config.tasks import AnyTask
from ttt.errors import EnvironmentProblem, TTTError, UsageError

if TYPE_CHECKING:
    from ttt.config.evaluation import EvalConfig
    from ttt.eval.listing import Listing
    from ttt.eval.tasks import ItemTask, Setup
    from ttt.plugins.registry import Plugin

# Elsewhere only the tasks that a command measures matter, and it says the same of them.
_code = partial(Code, family=Family.DATA, of_training=True, home=__name__)
TTT512 = _code("TTT512", "a task that the backbone cannot do", Severity.ERROR)
TTT513 = _code("TTT513", "a task whose data cannot be used", Severity.ERROR)
TTT514 = _code("TTT514", "a limit that limits nothing", Severity.WARNING)
TTT515 = _code("TTT515", "an option of the evaluation that nothing reads", Severity.ERROR, of_training=False)
TTT516 = _code("TTT516", "what an evaluation measures", Severity.NOTE)

_READS = ("eval", "backbone", "data", FACTS)


@dataclass(frozen=True)
class _Asked:
    """A task of the config, and who brings it."""

    number: int
    task: ItemTask
    plugin: Plugin
    setup: Setup

    def key(self, name: str) -> str:
        """A key of its entry, dotted."""
        return f"eval.tasks.{self.number}.{name}"


@rule(TTT512, TTT513, TTT514, TTT516, reads=_READS)
def tasks_can_be_measured(context: Context) -> Iterator[Finding]:
    """The backbone can do each task of the config, and the task's data are there and whole."""
    counted: dict[str, Listing] = {}
    for each in _item_tasks(context):
        try:
            lacking, listing = _tried(each)
        except TTTError as error:
            found = TTT513.at(_place(each, error), error.told, error.fix, value=each.task.name)
            yield replace(found, of_environment=isinstance(error, EnvironmentProblem))
            continue
        if lacking is not None:
            fix = "leave the task out, or name a backbone that can; `ttt plugins` lists what each can do"
            yield TTT512.at(each.key("name"), lacking, fix, value=each.task.name)
        if listing is not None:
            counted[each.task.name] = listing
            yield from _limits_nothing(each, listing)
    if counted and context.tells_cost:
        yield TTT516.at(
            "eval.tasks",
            "; ".join(f"{name}: {listing.in_words()}" for name, listing in counted.items()),
            "write a `limit` to measure fewer",
            value={name: {"items": len(each.items), "units": each.drawn} for name, each in counted.items()},
        )


def _item_tasks(context: Context) -> Iterator[_Asked]:
    """The tasks that consist of items, if they were looked up."""
    entries = context.config.eval.tasks
    if not entries or not context.training or any(isinstance(entry, AnyTask) for entry in entries):
        return
    from ttt.eval.tasks import ItemTask, Setup
    from ttt.plugins.installed_tasks import installed_tasks

    found = installed_tasks().by_name
    for number, entry in enumerate(entries):
        installed = found.get(entry.name)
        if installed is not None and isinstance(installed.task, ItemTask):
            setup = Setup(context.config, context.backbone, entry, installed.task.folder)
            yield _Asked(number, installed.task, installed.plugin, setup)


def _tried(each: _Asked) -> tuple[str | None, Listing | None]:
    """What the backbone lacks for a task, and the task's items; None if nobody can list them here.

    Raises:
        TTTError: the task's data cannot be used.
    """
    from ttt.eval.listing import lacking, listed
    from ttt.plugins.asking import asked

    with asked(each.plugin, f"the items of its task {each.task.name}", type(each.task)):
        told = lacking(each.task, each.setup)
        if told is not None or each.task.lists_without_torch:
            return told, listed(each.task, each.setup) if told is None else None
        if not each.task.is_ready(each.setup):
            raise UsageError(f"the task {each.task.name} has no data in this config", fix="name some, or leave it out")
        return None, None


def _place(each: _Asked, error: TTTError) -> str:
    """The key that an error is about: the option that it names, or the one that says where the data are."""
    options = each.setup.options
    named = error.key if error.key in type(options).model_fields else "data"
    return each.key(str(named) if getattr(options, str(named), None) is not None else "name")


def _limits_nothing(each: _Asked, listing: Listing) -> Iterator[Finding]:
    limit = getattr(each.setup.options, "limit", None)
    if limit is not None and limit > listing.units:
        yield TTT514.at(
            each.key("limit"),
            f"the task {each.task.name} has {listing.units:,} units, fewer than its limit of {limit:,}",
            f"leave `limit` out to measure all, or write at most {listing.units:,}",
            value=limit,
        )


@rule(TTT515, reads=_READS)
def options_are_read(context: Context) -> Iterator[Finding]:
    """What a config says about scores and restarts is about something that its backbone does."""
    from ttt.plugins import Scoring, has_capability

    config: EvalConfig = context.config.eval
    backbone, name = context.backbone, context.backbone.name
    written = [key for key in _OF_SCORES if _differs_from_default(config, key)]
    if not written:
        return
    if has_capability(backbone, Scoring):
        facts = backbone.score_facts(context.config)
        if config.reset_sec is not None and facts.positions_per_second is None:
            told = f"the backbone {name} reads no sound: its positions have no seconds"
            yield TTT515.at("eval.reset_sec", told, "write reset_tokens instead", value=config.reset_sec)
        return
    told = f"the backbone {name} has no scoring, so nothing reads it"
    for key in written:
        yield TTT515.at(f"eval.{key}", told, "take it out")


_OF_SCORES = ("score", "reset_sec", "reset_tokens")


def _differs_from_default(config: EvalConfig, key: str) -> bool:
    """Whether a key is not its default. The config that a run stores has all of them written."""
    return bool(getattr(config, key) != type(config).model_fields[key].get_default(call_default_factory=True))
