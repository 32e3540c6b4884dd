"""Evaluates a config's model with what it has learned: measures tasks under each arm and writes what they amount to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ttt.adapter_file import AdapterInfo, weights_fingerprint
from ttt.config.schema import RunConfig
from ttt.config.tasks import TaskOptions
from ttt.errors import EnvironmentProblem, PluginError, UsageError
from ttt.eval.bench import Bench
from ttt.eval.engine import MOST_FAILED, batches, measured
from ttt.eval.folder import EvalFolder
from ttt.eval.items import Item, Row
from ttt.eval.listing import Listing, chosen_items
from ttt.eval.results import TaskSummary, summed_up
from ttt.eval.tasks import ItemTask, Setup
from ttt.eval.unchanged import changed_weight, weight_versions
from ttt.eval.writing import MeasuredTask, write_results
from ttt.inject import Injection
from ttt.interrupt import stop_if_asked
from ttt.learned import fitting, imported_from, learned_model
from ttt.plugins import Backbone, EvalContext, Scoring, has_capability
from ttt.plugins.asking import asked, owner
from ttt.plugins.installed_tasks import ChosenTask
from ttt.printable import say
from ttt.progress import Steps
from ttt.samples import shared_origin
from ttt.train.evaluation import eval_mode
from ttt.train.passes import mixed_precision, seed_pass
from ttt.train.setup import choose_device, device_in_words

_FAILED_AT_FIRST = 20
"""If so many items fail and none succeeds, the fault is not that of an item."""


@dataclass(frozen=True)
class EvalOutcome:
    """What an evaluation gave."""

    path: Path
    """Its folder."""
    summaries: Mapping[str, TaskSummary]
    """By task."""
    files: tuple[Path, ...]
    """The results, the summary and the pictures."""
    failed: tuple[str, ...]
    """A sentence for each task of which more items failed than may."""


def evaluate(
    config: RunConfig,
    backbone: Backbone,
    tasks: Sequence[ChosenTask],
    *,
    out: Path,
    adapter: str | Path | None = None,
    arms: Sequence[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    verify: bool = True,
) -> EvalOutcome:
    """Measure tasks with a config's model.

    Args:
        config: the model's config; for a run, its resolved config.
        backbone: the plugin that `config.backbone` names.
        tasks: each with its options.
        out: folder for the results; see `ttt.eval.folder`.
        adapter: an adapter's file or folder, or a run's folder. None evaluates the model as training would start it.
        arms: which arms to measure; None is those of each task.
        resume: go on with what an interrupted evaluation left in the folder.
        overwrite: forget what is in the folder.
        console: the console for reports; standard output by default.
        verify: compare the adapter with its checksums.

    Raises:
        UsageError: the backbone does not fit a task, or the folder holds something else.
        AdapterMismatchError: the adapter belongs to another model; the message names each difference.
        EnvironmentProblem: data, weights, a device, memory, disk space or a writable folder is missing.
    """
    console = console or Console()
    config, info = fitting(config, backbone, adapter=adapter, verify=verify)
    plans = [_plan(config, backbone, chosen, arms) for chosen in tasks]
    _announce(plans, console)
    as_start = adapter is None
    folder = EvalFolder(out, _made_from(config, backbone, info, as_start=as_start))
    ways = ["a smaller eval.eval_batch_size"] + ["train.param_dtype: bfloat16"] * (
        config.train.param_dtype == "float32"
    )
    with folder.held():
        folder.claim(overwrite=overwrite)
        for plan in plans:
            folder.require_same(plan.task.name, plan.made_from, overwrite=overwrite)
        with (
            learned_model(config, backbone, info, as_start=as_start, ways=ways) as (model, injection),
            eval_mode(model),
        ):
            context = _context(config, backbone, info, model, injection, folder)
            machine = _Machine(context, injection, folder, console, resume=resume, overwrite=overwrite)
            found = [machine.measure(plan) for plan in plans]
            described = {**_described(config, info, machine), "notices": _notices(plans)}
        files = write_results(folder, found, described=described)
        others = sorted(set(folder.tasks) - {each.task.name for each in found})
        if others:
            say(console, f"note: {_left_out(others, found)}")
    summaries = {each.task.name: each.summary for each in found}
    return EvalOutcome(out, summaries, tuple(files), tuple(_complaints(summaries)))


def _context(
    config: RunConfig,
    backbone: Backbone,
    info: AdapterInfo | None,
    model: nn.Module,
    injection: Injection,
    folder: EvalFolder,
) -> EvalContext:
    """What tasks measure with."""
    device = next(model.parameters()).device
    return EvalContext(
        model,
        backbone,
        config,
        _Windows(config, backbone, device),
        device,
        step=_step(info),
        stop=lambda: False,
        adapters=injection.adapters,
        folder=folder.path,
        imported_from=imported_from(info),
    )


def _announce(plans: Sequence[Plan], console: Console) -> None:
    """Say what will be measured, and what a user must know of the data."""
    for plan in plans:
        say(console, f"{plan.task.name}: {plan.listing.in_words()}; arms {', '.join(plan.arms)}")
    for notice, names in _notices(plans).items():
        say(console, f"note: the data of {', '.join(names)}: {notice}")


def _notices(plans: Sequence[Plan]) -> dict[str, list[str]]:
    """What a user must know of data that backbones bring, each with the tasks that read them."""
    found: dict[str, list[str]] = {}
    for plan in plans:
        if plan.setup.notice is not None:
            found.setdefault(plan.setup.notice, []).append(plan.task.name)
    return found


def _described(config: RunConfig, info: AdapterInfo | None, machine: _Machine) -> dict[str, Any]:
    """What results are of, for `results.json` and `summary.md`."""
    return {
        "config": config.model_dump(mode="json"),
        "adapter": None if info is None else {"path": str(info.path), "checksum": info.checksum},
        "made_from": machine.made_from,
        "device": device_in_words(machine.device),
    }


@dataclass(frozen=True)
class Plan:
    """A task, its options, its items and the arms that it is measured under."""

    task: ItemTask
    plugin: object
    setup: Setup
    listing: Listing
    arms: tuple[str, ...]

    @property
    def items(self) -> tuple[Item, ...]:
        """Its items."""
        return self.listing.items

    @property
    def made_from(self) -> dict[str, Any]:
        """What its rows are of."""
        options: TaskOptions = self.setup.options
        told = {key: value for key, value in options.model_dump(mode="json").items() if key != "data"}
        return {"options": told, "version": self.task.version, "arms": list(self.arms)}


def _plan(config: RunConfig, backbone: Backbone, chosen: ChosenTask, arms: Sequence[str] | None) -> Plan:
    task = chosen.task
    if not isinstance(task, ItemTask):
        raise UsageError(
            f"the task {task.name} measures a model while it is trained (eval.tasks) and has no items to evaluate; "
            f"leave it out"
        )
    setup = Setup(config, backbone, chosen.options, task.folder)
    with asked(chosen.plugin, f"the items of its task {task.name}", type(task)):
        listing = chosen_items(task, setup)
    found = task.arms_among(arms)
    if arms is None and setup.has_no_ttt:  # nobody asked for an arm that is not there
        found = tuple(arm for arm in found if arm != "reset")
    for arm in found:
        refused = task.refuses(setup, arm)
        if refused is not None:
            raise UsageError(f"the task {task.name} under the arm {arm}: the backbone {backbone.name} {refused}")
    return Plan(task, chosen.plugin, setup, listing, found)


def _made_from(config: RunConfig, backbone: Backbone, info: AdapterInfo | None, *, as_start: bool) -> dict[str, Any]:
    """What every number is of, as far as it is known before a model is built."""
    evaluation = config.eval.model_dump(mode="json")
    kept = {key: evaluation[key] for key in ("score", "eval_batch_size", "reset_sec", "reset_tokens")}
    return {
        **shared_origin(config, info, as_start=as_start),
        **{f"eval.{key}": value for key, value in kept.items()},
        "train.autocast": config.train.autocast,
        "train.ttt_precision": config.train.ttt_precision,
        "torch": torch.__version__.partition("+")[0],
        "device": choose_device(config.train.device).type,
    }


def _step(info: AdapterInfo | None) -> int:
    step = None if info is None else info.training.get("step")
    return step if isinstance(step, int) else 0


class _Windows:
    """The run's evaluation data, built when a task first asks for it."""

    def __init__(self, config: RunConfig, backbone: Backbone, device: torch.device) -> None:
        self._made: Any = None
        split = "eval" if backbone.has_eval_data(config) else "train"
        self._make = lambda: backbone.dataset(config, split=split, device=device)

    def _dataset(self) -> Any:
        if self._made is None:
            self._made = self._make()
        return self._made

    def __len__(self) -> int:
        return len(self._dataset())

    def __getitem__(self, index: int) -> Any:
        return self._dataset()[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset(), name)


class _Machine:
    """Measures one task after another with one model, into one folder."""

    def __init__(
        self,
        context: EvalContext,
        injection: Injection,
        folder: EvalFolder,
        console: Console,
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        self._context = context
        self._folder = folder
        self._console = console
        self._resume, self._overwrite = resume, overwrite
        self._versions = weight_versions(context.model)
        self.made_from: dict[str, Any] = {"backbone_weights": weights_fingerprint(injection)}
        """What the numbers are of, as it shows once the model is built."""

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self._context.device

    def measure(self, plan: Plan) -> MeasuredTask:
        """Measure the items of a task that have no row yet, and sum up all."""
        bench = Bench(self._context, plan.setup.options)
        found = self._rows(plan, bench)
        rows = [found[item.id] for item in plan.items]
        good = [row for row in rows if row.error is None]
        with asked(plan.plugin, f"the outcomes of its task {plan.task.name}", type(plan.task)):
            references = plan.task.references(bench, good)
            summary = summed_up(plan.task, plan.setup, rows, plan.arms, references)
        return MeasuredTask(plan.task, plan.setup, plan.arms, tuple(good), summary)

    def _rows(self, plan: Plan, bench: Bench) -> dict[str, Row]:
        task, config = plan.task, self._context.config
        made_from = {**plan.made_from, **self._identity(plan, bench)}
        there = self._folder.open_task(task.name, made_from, overwrite=self._overwrite)
        rows = self._folder.rows(task.name, plan.items) if there else {}
        parts = batches(task, plan.items, size=config.eval.eval_batch_size)
        whole = [part for part in parts if all(item.id in rows for item in part)]
        kept = [rows[item.id] for part in whole for item in part]
        if rows and len(whole) < len(parts) and not self._resume:
            raise UsageError(
                f"{self._folder.path}: has {len(kept)} of {len(plan.items)} items of {task.name}; go on with --resume, "
                f"or start anew with --overwrite"
            )
        rows = {row.item.id: row for row in kept}
        self._folder.begin(task.name, kept)
        if kept:
            say(self._console, f"{task.name}: {len(kept)} of {len(plan.items)} items are there already")
        there_already = {part[0].id for part in whole}
        missing = [part for part in parts if part[0].id not in there_already]
        bench.items_left = [item for part in missing for item in part]
        with Steps(self._console, task.name, total=len(plan.items), done=len(kept), tenths=True, rated="item") as steps:
            bench.tell = steps.within
            for part in missing:
                stop_if_asked()
                for row in self._batch(plan, bench, part):
                    rows[row.item.id] = row
                _require_something(task, rows)
                steps.advance(len(part))
        return rows

    def _batch(self, plan: Plan, bench: Bench, part: Sequence[Item]) -> Sequence[Row]:
        config = self._context.config.train
        seed_pass(config.seed, f"task {plan.task.name} {part[0].id}", 0)
        with mixed_precision(config, self._context.device):
            batch = measured(plan.task, bench, part, plan.arms)
        changed = changed_weight(bench.model, self._versions)
        if changed is not None:  # before its rows are written: those of other items would be of another model
            raise PluginError(
                f"the task {plan.task.name} of {owner(plan.plugin)} changed the weight {changed}; leave the task out"
            )
        self._folder.add(plan.task.name, batch.rows, batch.arrays)
        return batch.rows

    def _identity(self, plan: Plan, bench: Bench) -> dict[str, Any]:
        """What else the rows are of: the model's weights, and what turns files into clips."""
        if Scoring not in plan.task.requires or not has_capability(self._context.backbone, Scoring):
            return {name: value for name, value in self.made_from.items() if name != "reader"}  # of other tasks
        notice = bench.reader.notice
        if notice is not None and "reader" not in self.made_from:
            say(self._console, f"note: {notice}")
        self.made_from["reader"] = dict(bench.reader.identity)
        return dict(self.made_from)


def _require_something(task: ItemTask, rows: Mapping[str, Row]) -> None:
    """Refuse to go on if nothing but errors came so far. A few that fail first are no reason: they are counted.

    Raises:
        EnvironmentProblem: so it is; the message has the first error.
    """
    if len(rows) >= _FAILED_AT_FIRST and all(row.error is not None for row in rows.values()):
        first = next(iter(rows.values()))
        raise EnvironmentProblem(
            f"the task {task.name}: none of the first {len(rows)} items could be measured; {first.item.id}: "
            f"{first.error}"
        )


def _left_out(others: Sequence[str], found: Sequence[MeasuredTask]) -> str:
    """What the results leave out of what the folder has rows of, and how to have it in them."""
    measured_now = [each.task.name for each in found]
    return (
        f"the results are of {', '.join(measured_now)} alone; rows of {', '.join(others)} are kept: name all of them "
        f"for results of all"
    )


def _complaints(summaries: Mapping[str, TaskSummary]) -> list[str]:
    return [
        f"{name}: {summary.failed} of {summary.items} items failed, more than {MOST_FAILED:.0%}: its numbers are not "
        f"those of the task. The first, {summary.first_error}; mend it, and --resume tries again what failed"
        for name, summary in summaries.items()
        if summary.failed > MOST_FAILED * summary.items
    ]
