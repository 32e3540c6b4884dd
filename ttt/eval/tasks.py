"""The base of evaluation tasks that consist of items. Imports no torch.

Such a task says what its items are and measures them. Arms, batches, resumption, failed items, standard errors, tables
and files are the same for every task, and are not its own matter.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ttt.config.paths import LocalPath
from ttt.config.schema import MOST_STEPS, RunConfig
from ttt.config.tasks import TaskOptions
from ttt.errors import UsageError
from ttt.eval.items import Item, Measured, Row
from ttt.plugins.backbone import Backbone
from ttt.plugins.capabilities import CAPABILITIES, Scoring, SegmentReset
from ttt.plugins.capability_base import Capability, has_capability
from ttt.plugins.eval_tasks import AnyEvalTask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ttt.eval.bench import Bench

ARMS = ("ttt", "closed", "reset")
"""As trained; with gates closed, which is the plain backbone; with fast weights started anew every now and then."""

SUBMISSION = "submission"
"""The folder, beside the results, of files that are made to be sent to a benchmark's judges."""


class ItemOptions(TaskOptions):
    """Options of a task that consists of items."""

    data: Annotated[str | None, LocalPath()] = None
    """Folder with the task's data; null is what the backbone brings."""
    limit: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    """How many units of it, as pairs or stories, drawn by `seed`; null is all."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Which ones `limit` draws."""


@dataclass(frozen=True)
class Setup:
    """What a task knows before a model is built."""

    config: RunConfig
    """Resolved."""
    backbone: Backbone
    options: Any
    """Those of the task."""
    folder: str | None = None
    """The folder of the task's data among what a backbone brings; None is its name."""

    @property
    def has_no_ttt(self) -> bool:
        """Whether the model has no TTT layer: LoRA alone, or the plain backbone."""
        return self.config.injected.layers in ("none", ())

    @property
    def notice(self) -> str | None:
        """What a user must know of the task's data, if it is what the backbone brings; None if it is not."""
        own = hasattr(self.options, "data") and self.options.data is None
        if not own or not has_capability(self.backbone, Scoring):
            return None
        return self.backbone.own_tasks_notice or None

    @property
    def data(self) -> Path:
        """The task's data, from its option `data` or from what the backbone brings.

        Raises:
            UsageError: there is neither.
        """
        name, written = self.options.name, getattr(self.options, "data", None)
        folder = self.folder or name
        if written is not None:
            return Path(written)
        backbone = self.backbone
        own = backbone.own_tasks_data(self.config) if has_capability(backbone, Scoring) else None
        if own is None or not (own / folder).exists():
            raise UsageError(
                f"the task {name} has no data, and the backbone {backbone.name} brings none for it here",
                key="eval.tasks",
                fix=f"write {{name: {name}, data: FOLDER}}",
            )
        return own / folder


class ItemTask(AnyEvalTask):
    """A task that consists of items. The class attributes and `lacks` must work without torch."""

    options: ClassVar[type[TaskOptions]] = ItemOptions
    version: ClassVar[int] = 1
    """Raised if its numbers change their meaning; results of different versions are not compared."""
    requires: ClassVar[tuple[type[Capability], ...]] = (Scoring,)
    """What a backbone must be able to do."""
    medium: ClassVar[str | None] = None
    """What its clips are read from, as in `ttt.plugins.ScoreFacts`; None if that does not matter."""
    arms: ClassVar[tuple[str, ...]] = ("ttt", "closed")
    """The arms that it is measured under if nobody names others."""
    arms_without: ClassVar[tuple[str, ...]] = ()
    """The arms under which there is nothing to measure, because its TTT layers are not called, for example."""
    lists_without_torch: ClassVar[bool] = True
    """Whether `items` works without torch. If so, `ttt check` lists them; if not, only a command that measures does."""
    batched: ClassVar[bool] = True
    """Whether `eval.eval_batch_size` items are measured together; if not, one at a time."""
    chance: ClassVar[float | None] = None
    """The outcome of guessing, for tables and pictures."""
    folder: ClassVar[str | None] = None
    """The folder of its data among what a backbone brings; None is its name."""
    higher_is_better: ClassVar[bool] = True
    """Whether a larger outcome is the better one; a loss has False."""
    needs_ttt: ClassVar[bool] = False
    """Whether it measures TTT layers themselves, so that there is nothing to measure of a model without."""
    writes_files: ClassVar[bool] = False
    """Whether it makes files in the evaluation's folder. Then `ttt eval` measures it, and training leaves it out."""

    def lacks(self, setup: Setup) -> str | None:
        """What the backbone lacks for this task, completing "the backbone NAME …"; None if it lacks nothing."""
        for kind in self.requires:
            if not has_capability(setup.backbone, kind):
                words = CAPABILITIES.get(kind)
                return f"has no {kind.__name__ if words is None else words.lacking}"
        if self.needs_ttt and setup.has_no_ttt:
            return "has no TTT layer in this config"
        if self.medium is not None and has_capability(setup.backbone, Scoring):
            medium = setup.backbone.score_facts(setup.config).medium
            if medium != self.medium:
                return f"reads {medium}, and the task is on {self.medium}"
        return None

    def refuses(self, setup: Setup, arm: str) -> str | None:
        """Why the backbone cannot be measured under an arm, completing "the backbone NAME …"; None if it can be.

        By default `reset` needs TTT layers, and streams of clips, which the core cuts, or a backbone that resets by
        itself.
        """
        if arm == "reset" and setup.has_no_ttt:
            return "has no TTT layer in this config whose fast weights could start anew"
        if arm != "reset" or Scoring in self.requires:
            return None
        if not has_capability(setup.backbone, SegmentReset):
            return f"has no {CAPABILITIES[SegmentReset].lacking}"
        evaluation = setup.config.eval
        written = [key for key in ("reset_sec", "reset_tokens") if getattr(evaluation, key) is not None]
        if written:
            return f"starts fast weights anew at each segment of a window, so leave out eval.{written[0]}"
        return None

    def is_ready(self, setup: Setup) -> bool:
        """Whether it can be measured without being told where data is. By default: whether `setup.data` is there."""
        try:
            return setup.data.exists()
        except UsageError:
            return False

    def arms_among(self, named: Sequence[str] | None) -> tuple[str, ...]:
        """The arms to measure of those that are named; None are the task's own.

        Raises:
            UsageError: there is nothing to measure under any of them.
        """
        found = tuple(arm for arm in named or self.arms if arm not in self.arms_without)
        if not found:
            others = " or ".join(arm for arm in ARMS if arm not in self.arms_without)
            raise UsageError(
                f"the task {self.name} has nothing to measure under the arm {' or '.join(named or self.arms)}; name "
                f"{others}, or leave the task out"
            )
        return found

    @abstractmethod
    def items(self, setup: Setup) -> Sequence[Item]:
        """Every item, in an order that does not depend on the order of files or rows.

        Raises:
            ttt.errors.EnvironmentProblem: files are missing or broken; the message names them.
            ttt.errors.UsageError: the options do not fit the data.
        """

    @abstractmethod
    def measure(self, bench: Bench, items: Sequence[Item]) -> Sequence[Measured]:
        """Measure items under the bench's arm. Fast weights start fresh for each clip or stream that the bench reads.

        Args:
            bench: the model, and what it is measured by.
            items: `eval.eval_batch_size` items or fewer; one if not `batched`.

        Returns:
            One for each item. Every arm gives the same names.

        Raises:
            Exception: anything. The items are measured one by one then, and those that fail again count as failed.
        """

    @abstractmethod
    def values(self, setup: Setup, item: Item, numbers: Mapping[str, float]) -> Mapping[str, float]:
        """An item's outcomes by metric, from what an arm gave: `{"acc": 1.0}`.

        The first metric is the task's own. A name with a `/`, as `acc/semantic.sum`, is a variant of it.
        """

    def references(self, bench: Bench, rows: Sequence[Row]) -> Mapping[str, Sequence[float]]:
        """What the first metric is without a model, by a name such as `length`; none by default.

        Args:
            bench: for its reader.
            rows: of the items that did not fail.

        Returns:
            For each name, an outcome for each row.
        """
        return {}

    def texts(self, setup: Setup, rows: Sequence[Row]) -> Mapping[str, str]:
        """Files to write beside the results, as text by name; none by default."""
        return {}

    def files(self, setup: Setup, rows: Sequence[Row], folder: Path) -> Sequence[Path]:
        """Write other files into the evaluation's folder; returns them. By default there are none.

        It is called whenever results are written, also of an evaluation that went on; what people may have changed by
        then it leaves as it is.

        Raises:
            ttt.errors.EnvironmentProblem: the folder cannot be written.
        """
        return []

    def figures(self, setup: Setup, rows: Sequence[Row], arrays: Arrays) -> Mapping[str, Figure]:
        """Pictures by file name; none by default.

        Args:
            setup: as for `items`.
            rows: of the items that did not fail.
            arrays: what `measure` returned as arrays.
        """
        return {}


def with_chosen(numbers: Mapping[str, float], chosen: str) -> dict[str, float]:
    """Outcomes of numbers `metric.weights`: each `metric` by the chosen weights, and `metric/weights` by each."""
    found: dict[str, float] = {}
    for name, number in numbers.items():
        metric, _, weights = name.partition(".")
        if weights == chosen:
            found[metric] = number
    return {**found, **{name.replace(".", "/", 1): number for name, number in numbers.items()}}


class Arrays:
    """The arrays of a task: a function from item and arm to arrays by name.

    Args:
        read: reads them; empty if there are none.
    """

    def __init__(self, read: Any) -> None:
        self._read = read

    def of(self, item: str, arm: str) -> Mapping[str, Any]:
        """The arrays of an item under an arm."""
        found: Mapping[str, Any] = self._read(item, arm)
        return found
