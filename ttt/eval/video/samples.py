"""The task `samples`: what the model makes of prompts under each arm, from the same seeds.

    eval:
      tasks: [{name: samples, prompts: prompts.json, seconds: 9}]

Each prompt set gives `samples_made/000.ttt.mp4`, `000.closed.mp4` and so on, each with what the backbone writes beside
it; `samples_made/000.png` has the contact sheets of all arms above one another. `raters-…/` is a folder for people who
compare the arms without knowing which is which; `raters-….key.csv` beside it is the key, and `ttt eval --ratings` reads
what they fill in. Sampling has no number of its own: how good samples are, people say. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ttt.checksums import file_digest
from ttt.config.paths import LocalPath
from ttt.config.schema import MOST_STEPS
from ttt.config.tasks import TaskOptions
from ttt.errors import EnvironmentProblem, UsageError
from ttt.eval.items import Item, Measured, Row, key_of, made_by
from ttt.eval.ratings import Comparison, write_sheet
from ttt.eval.tasks import ItemTask, Setup
from ttt.files import read_json, write_bytes, write_json, writing
from ttt.plugins.capabilities import Sampling
from ttt.plugins.capability_base import Capability
from ttt.plugins.capable import capability
from ttt.plugins.sampling import SampleRequest
from ttt.prompts import Prompts, for_segments, read_prompts

if TYPE_CHECKING:
    from ttt.eval.bench import Bench

_PROMPT_FILES = (".json", ".jsonl")
_SHEET = ".png"


class SamplesOptions(TaskOptions):
    """Options of the task."""

    prompts: Annotated[str | None, LocalPath()] = None
    """A file of prompts as `ttt sample --prompts` reads it, or a folder of such files."""
    seconds: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Length of each sample."""
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 50
    """Steps of the sampler."""
    guidance_scale: Annotated[float, Field(ge=0, le=1e6)] = 6.0
    """How strictly samples follow their prompts; 1 is without guidance."""
    seed: Annotated[int, Field(ge=0, lt=1 << 62)] = 0
    """Of the first sample; the second has the next one, and so on. Also of the order in which raters see them."""
    limit: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    """How many prompt sets, drawn by `seed`; null is all."""


class Samples(ItemTask):
    """Samples of prompts, from the same seeds under each arm, for side-by-side viewing and rating."""

    name = "samples"
    options: ClassVar[type[TaskOptions]] = SamplesOptions
    requires: ClassVar[tuple[type[Capability], ...]] = (Sampling,)
    batched: ClassVar[bool] = False
    writes_files: ClassVar[bool] = True

    def is_ready(self, setup: Setup) -> bool:
        """Whether it has prompts and a length."""
        return setup.options.prompts is not None and setup.options.seconds is not None

    def items(self, setup: Setup) -> Sequence[Item]:
        """An item for each prompt set, `000`, `001`, …, in the order of files and of their lines."""
        return [
            Item(name, name, " / ".join(request.prompts), files=(file,))
            for name, (request, file) in self.requests(setup).items()
        ]

    def requests(self, setup: Setup) -> dict[str, tuple[SampleRequest, Path]]:
        """The request of each item, without a place for it, and the file of its prompts.

        Raises:
            UsageError: prompts or a length are missing, or the backbone cannot make such samples.
            EnvironmentProblem: a file of prompts is missing or cannot be read.
        """
        options, sampler = setup.options, capability(setup.backbone, Sampling)
        if not self.is_ready(setup):
            raise UsageError(
                f"the task {self.name} needs prompts and a length; write "
                f"{{name: {self.name}, prompts: FILE.json, seconds: 3}} in eval.tasks"
            )
        found: dict[str, tuple[SampleRequest, Path]] = {}
        given = [(each, file) for file in _prompt_files(Path(options.prompts)) for each in read_prompts(str(file))]
        for number, (prompts, file) in enumerate(given):
            request = self._request(setup, sampler, prompts, number)
            sampler.check_sample(setup.config, request)
            found[f"{number:03d}"] = (request, file)
        return found

    def _request(self, setup: Setup, sampler: Sampling, prompts: Prompts, number: int) -> SampleRequest:
        options = setup.options
        out = Path(f"{number:03d}{sampler.sample_suffix}")
        wanted = sampler.plan_sample(setup.config, seconds=options.seconds, out=out).prompts
        chosen, _ = for_segments(prompts, count=wanted, seconds=options.seconds)
        return SampleRequest(
            prompts=chosen.prompts,
            negative_prompts=chosen.negative,
            seconds=options.seconds,
            out=out,
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            seed=options.seed + number,
            new_scenes=chosen.new_scenes,
        )

    def measure(self, bench: Bench, items: Sequence[Item]) -> Sequence[Measured]:
        """Make the samples that are not there yet."""
        return [Measured(self.numbers_of(bench, item, self.made(bench, item))) for item in items]

    def numbers_of(self, bench: Bench, item: Item, files: Sequence[Path]) -> Mapping[str, float]:
        """What is measured of a sample: nothing."""
        return {}

    def values(self, setup: Setup, item: Item, numbers: Mapping[str, float]) -> Mapping[str, float]:
        """What was measured of a sample."""
        return numbers

    def made(self, bench: Bench, item: Item) -> Sequence[Path]:
        """The files of a sample under the bench's arm, the sample first; made only if they are not there.

        Raises:
            TTTError: as `ttt.plugins.Sampling.sample`.
        """
        request, _ = self.requests(_setup(bench))[item.id]
        files = self.files_of(_setup(bench), request, bench.folder / _name(request, item, bench.arm))
        record, made_from = files[0].with_name(f"{files[0].name}.json"), _as_json(request)
        if not _is_there(record, made_from, files):
            record.unlink(missing_ok=True)
            self._make(bench, item, request, files)
            write_json(record, {"made_from": made_from, "files": {file.name: file_digest(file) for file in files}})
        return files

    def files_of(self, setup: Setup, request: SampleRequest, out: Path) -> tuple[Path, ...]:
        """The files of a sample that goes to `out`, the sample first."""
        sampler = capability(setup.backbone, Sampling)
        return sampler.plan_sample(setup.config, seconds=request.seconds, out=out).files

    def _make(self, bench: Bench, item: Item, request: SampleRequest, files: Sequence[Path]) -> None:
        """Make a sample in a folder of its own, under a name that does not tell the arm, and move it to its files."""
        with _staging(bench.folder / f"{bench.arm}.part") as staging:
            moved = replace(request, out=staging / request.out.name, imported_from=bench.context.imported_from)
            sampler = self._sampler(bench, item, staging)
            try:
                sampler.make(moved)
            finally:
                sampler.write_log(bench.folder / "sampler.log")
            with writing(bench.folder):
                for made, file in zip(self.files_of(_setup(bench), moved, moved.out), files, strict=True):
                    made.replace(file)

    def _sampler(self, bench: Bench, item: Item, folder: Path) -> _Sampler:
        """What makes the sample of an item, prepared once for this one and those after it, for each arm by itself."""
        kept: _Sampler | None = bench.kept.get(bench.arm)
        if kept is None or kept.waiting[:1] != [item.id]:
            left = [each.id for each in bench.items_left]
            waiting = left[left.index(item.id) :] if item.id in left else [item.id]
            requests, origin = self.requests(_setup(bench)), bench.context.imported_from
            ahead = [requests[each][0] for each in waiting]
            ahead = [replace(each, out=folder / each.out, imported_from=origin) for each in ahead]
            kept = bench.kept[bench.arm] = _Sampler(bench, ahead, waiting)
        kept.waiting.pop(0)
        return kept

    def files(self, setup: Setup, rows: Sequence[Row], folder: Path) -> Sequence[Path]:
        """The contact sheets of all arms in one picture for each item; a folder for raters, and its key."""
        made, requests = made_by(folder, self.name), self.requests(setup)
        written: list[Path] = []
        comparisons: list[Comparison] = []
        for row in rows:
            request, _ = requests[row.item.id]
            by_arm = {arm: self.files_of(setup, request, made / _name(request, row.item, arm)) for arm in row.arms}
            _require_there(file for files in by_arm.values() for file in files)
            sheets = {arm: file for arm, files in by_arm.items() for file in files[1:] if file.suffix == _SHEET}
            if sheets:
                written.append(_picture(made / f"{row.item.id}{_SHEET}", sheets))
            for pair in itertools.combinations(by_arm, 2):
                comparisons.append(Comparison(row.item.cluster, {arm: by_arm[arm][0] for arm in pair}))
        return [*written, *(_for_raters(folder, self.name, comparisons, setup.options.seed) if comparisons else ())]


class _Sampler:
    """What makes samples in an order.

    Args:
        bench: the model under its arm.
        requests: all that may be asked for.
        waiting: their items.
    """

    def __init__(self, bench: Bench, requests: Sequence[SampleRequest], waiting: list[str]) -> None:
        from rich.console import Console

        self.waiting = waiting
        self._log = io.StringIO()  # while the progress of the task is shown, nothing else can be
        console = Console(file=self._log, width=200)
        sampler = capability(bench.backbone, Sampling)
        self._make = sampler.prepare_samples(bench.model, requests, bench.config, console=console)

    def make(self, request: SampleRequest) -> None:
        """Make the sample that `ttt sample` would make of the request."""
        from ttt.seeds import seed_pass

        seed_pass(request.seed, "sample", 0)
        self._make(request)

    def write_log(self, file: Path) -> None:
        """Append what was reported since the last call."""
        told = self._log.getvalue()
        self._log.seek(0)
        self._log.truncate()
        with writing(file), file.open("a", encoding="utf-8") as out:
            out.write(told)


def _setup(bench: Bench) -> Setup:
    return Setup(bench.config, bench.backbone, bench.options)


def _name(request: SampleRequest, item: Item, arm: str) -> str:
    """The name of a sample, as `000.closed.mp4`."""
    return f"{item.id}.{arm}{request.out.suffix}"


def _prompt_files(place: Path) -> list[Path]:
    """The files of prompts in a folder, by name; or the one file.

    Raises:
        EnvironmentProblem: the folder has none.
    """
    if not place.is_dir():
        return [place]
    found = sorted(file for file in place.iterdir() if file.suffix.lower() in _PROMPT_FILES)
    if not found:
        raise EnvironmentProblem(f"{place}: holds no prompts; they are files that end in {' or '.join(_PROMPT_FILES)}")
    return found


def _as_json(request: SampleRequest) -> dict[str, Any]:
    told = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(request).items()}
    return {key: value for key, value in told.items() if key not in ("out", "imported_from")}


def _is_there(record: Path, made_from: Mapping[str, Any], files: Sequence[Path]) -> bool:
    """Whether a sample was made of the same request, and is whole. The folder holds what one model made."""
    try:
        said = read_json(record, sealed=True)
        found = {file.name: file_digest(file) for file in files}
    except (EnvironmentProblem, OSError):
        return False
    return said.get("made_from") == made_from and said.get("files") == found


def _require_there(files: Iterable[Path]) -> None:
    """Refuse to go on without a sample that was made.

    Raises:
        EnvironmentProblem: one is gone.
    """
    for file in files:
        if not file.is_file():
            raise EnvironmentProblem(f"{file}: is gone; make the samples anew with --overwrite")


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A context with an empty folder, which is gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    with writing(folder):
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _picture(file: Path, sheets: Mapping[str, Path]) -> Path:
    from ttt.eval.video.pictures import sheets_above_one_another

    content = io.BytesIO()
    sheets_above_one_another(sheets).savefig(content, format="png")
    write_bytes(file, content.getvalue())
    return file


def _for_raters(folder: Path, task: str, comparisons: Sequence[Comparison], seed: int) -> list[Path]:
    """A folder for raters and its key, by the content of the clips: what raters fill in is never written over."""
    content = hashlib.sha256()
    for comparison in comparisons:
        for arm, file in sorted(comparison.files.items()):
            content.update(f"{arm} {file_digest(file)}\n".encode())
    place = folder / f"raters-{task}-{content.hexdigest()[:8]}"
    key = key_of(place)
    if not (place.exists() and key.exists()):
        part = folder / f"{place.name}.part"
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        write_sheet(part, key, comparisons, seed=seed)
        if place.exists():  # only the key was gone
            shutil.rmtree(part)
        else:
            with writing(place):
                part.rename(place)
    return [place, key]
