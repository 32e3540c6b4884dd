"""Runs of `ttt train` to be disturbed: how one is started, what it is compared with, and many of them side by side.

The runs are of the toy backbone of `tests/toy.py`, installed as a plugin, on data in a file: the same library, the same
command, on a model that takes milliseconds for a step. They carry states, keep two checkpoints and draw pictures.

Importing torch takes longer than such a run does. So a run either is a process of its own (`started`), or is forked
from one that has imported everything (`forked`); whichever it is, every system call of it can be seen and altered.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tracing

ROOT = Path(__file__).resolve().parent.parent
TEMPORARY = ".writing-"
RUN, CONFIG, DATA = "run", "c.yaml", "tokens.txt"
COMMAND = ["train", CONFIG, "--resume"]
"""The one command of a run: it starts it, and it goes on with it."""
MOMENTS = ("imports", "data", "step", "evaluation", "checkpoint", "pictures")
"""The moments of a run, in order."""

TEXT = f"""\
backbone: {{name: toy, num_layers: 2, dim: 8, num_heads: 2}}
ttt: {{layers: [1], persistent_states: true, scan_checkpoint_group_size: 0}}
data: {{train_data: {DATA}, eval_data: {DATA}, window: 8, shuffle: false}}
train: {{max_steps: 5, batch_size: 2, trainable: all, ckpt_freq: 1, ckpt_keep: 2, cpu_threads: 1, log_freq: 1}}
eval: {{eval_freq: 3, max_batches: 2}}
run_dir: {RUN}
"""
_OWN = {"tokens_per_second", "peak_memory_bytes", "seconds", "backbone_trained", "crc32", "sha256"}
"""Keys of what each run has of its own: times, the names that pair files, and checksums over those."""

HUNG = 1000
"""Stands for the exit code of a process that did not end."""
_LIMIT_SECONDS = 600.0

PLUGIN = '''\
"""The toy, which says where it is by asking for a file that nobody has; who watches its system calls sees it."""

import os

from toy import ToyBackbone, ToyDataset
from ttt.plugins.hookspecs import hookimpl


def tell(moment):
    try:
        os.stat(f"/moment/{moment}")
    except OSError:
        pass


class Telling(ToyDataset):
    def __getitem__(self, index):
        tell("reading")
        return super().__getitem__(index)


class Disturbed(ToyBackbone):
    def dataset(self, config, *, split, device):
        tell("data")
        made = super().dataset(config, split=split, device=device)
        made.__class__ = Telling
        tell("data")
        return made

    def build(self, options, *, device, dtype):
        tell("data")
        return super().build(options, device=device, dtype=dtype)

    def loss(self, model, batch, config):
        moment = "step" if model.training else "evaluation"
        tell(moment)
        output = super().loss(model, batch, config)
        tell(moment)
        return output


@hookimpl
def ttt_backbone():
    return Disturbed()
'''


def make_plugins(folder: Path) -> str:
    """Install the plugin in a folder; returns the `PYTHONPATH` by which programs find it."""
    module, name = "disturbed_toy", "toy"
    (folder / f"{module}.py").write_text(PLUGIN, encoding="utf-8")
    metadata = folder / "ttt_toy-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ttt-toy\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[ttt.backbones]\n{name} = {module}\n", encoding="utf-8")
    return os.pathsep.join([str(folder), str(ROOT / "tests")])


def prepare(folder: Path) -> Path:
    """A folder with a config and data, nothing trained yet."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(TEXT, encoding="utf-8")
    drawn = random.Random(0)
    lines = (" ".join(str(drawn.randrange(16)) for _ in range(8 * windows + 1)) for windows in (5, 2, 3))
    (folder / DATA).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    """Its exit code; the negative number of the signal that ended it."""
    out: str
    err: str

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.err + self.out


OnCall = Callable[[tracing.Tracer, tracing.Call], "int | None"]


def forked(
    folder: Path, words: Sequence[str], on_call: OnCall | None = None, *, names: Collection[str] | None = None
) -> Ended:
    """Run `ttt` in a process forked from this one, in which everything is imported already."""

    def start() -> None:
        _stand_in(folder)
        from ttt_cli.main import main

        sys.argv = ["ttt", *words]
        code = main()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    return _run(folder, start, on_call, names)


def started(
    folder: Path, words: Sequence[str], on_call: OnCall | None = None, *, names: Collection[str] | None = None
) -> Ended:
    """Run `ttt` as a program of its own."""

    def start() -> None:
        _stand_in(folder)
        os.execv(sys.executable, [sys.executable, "-m", "ttt_cli", *words])

    return _run(folder, start, on_call, names)


def _stand_in(folder: Path) -> None:
    """Be a process that works in the folder, its output in files beside it."""
    os.chdir(folder)
    for number in (1, 2):
        os.dup2(os.open(_output(folder, number), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)


def _output(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}.{number}")


def _run(folder: Path, start: Callable[[], None], on_call: OnCall | None, names: Collection[str] | None) -> Ended:
    def asked(call: tracing.Call) -> int | None:
        return on_call(tracer, call) if on_call else None

    tracer = tracing.Tracer(asked, names=names if on_call else ())
    try:
        with _limited(_LIMIT_SECONDS):
            code = tracer.run(_guarded(start))
    except TimeoutError:
        code = HUNG
    out, err = (_output(folder, number).read_text(encoding="utf-8", errors="replace") for number in (1, 2))
    return Ended(code, out, err)


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside when it takes too long."""

    def end(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _guarded(start: Callable[[], None]) -> Callable[[], None]:
    """The same, with the traceback of a bug on standard error, as an interpreter's own end would have it."""

    def guarded() -> None:
        try:
            start()
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    return guarded


# --- what a run has left ---


def whole(folder: Path) -> dict[str, Any]:
    """What a run leaves, apart from what the clock decides: metrics, summary, every byte of every checkpoint's tensors.

    TensorBoard's files are left out: each start of a run adds one.
    """
    run = folder / RUN
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if name.split("/")[0] == "tensorboard" or path.is_dir():
            continue
        if path.suffix == ".safetensors":
            found[name] = _tensors(path.read_bytes())
        elif path.name == "config.yaml":
            text = path.read_bytes().rpartition(b"# sha256")[0]
            found[name] = text.replace(os.fsencode(folder.resolve()), b".")  # its paths are absolute
        elif path.name == "adapter_config.json":
            found[name] = _timeless(json.loads(path.read_text("utf-8")))
        elif path.name == "metrics.jsonl":
            found[name] = [_timeless(json.loads(line)) for line in path.read_text("utf-8").splitlines()]
        elif path.name == "summary.json":
            found[name] = _timeless(json.loads(path.read_text("utf-8")))
        else:
            found[name] = path.stat().st_size > 0
    return found


def _timeless(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    return {key: _timeless(value) for key, value in content.items() if key not in _OWN}


def _tensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """What a safetensors file says of its tensors, and every byte of them."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header.pop("__metadata__", None)
    return header, content[end:]


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """In what two runs differ, as sentences."""
    told = [f"{name} is missing" for name in expected.keys() - found.keys()]
    told += [f"{name} is left over" for name in found.keys() - expected.keys()]
    told += [f"{name} differs" for name in expected.keys() & found.keys() if expected[name] != found[name]]
    return sorted(told)


def newest_checkpoint(folder: Path) -> str | None:
    """What is wrong with the newest checkpoint of a run; None if it is whole, or there is none yet."""
    from ttt.errors import TTTError
    from ttt.train.rundir import RunDir

    run = RunDir(folder / RUN)
    try:
        _, passed_over = run.latest()
    except TTTError as error:
        return str(error)
    return "; ".join(passed_over) or None


# --- many tries ---


@dataclass
class Outcome:
    """What came of one try."""

    kind: str
    """Row of the table."""
    result: str
    """Column of the table."""
    problems: list[str]
    place: str = ""


class Counts:
    """The system calls of a run: all, those that mark its moments, and changes of its files."""

    def __init__(self, run: Path) -> None:
        self._run = str(run)
        self.all = 0
        self.first: dict[str, int] = {}
        """Number of the first call that marks a moment."""
        self.moments: Counter[str] = Counter()
        """Calls that mark each."""
        self.changed: list[str] = []

    def __call__(self, tracer: tracing.Tracer, call: tracing.Call) -> None:
        """Count a call."""
        self.all += 1
        path = call.path
        if path is None or not ("/moment/" in path or "ttt_cli" in path or path.startswith(self._run)):
            return
        for moment in (*MOMENTS[1:], "handled", "metrics"):
            if marks(call, self._run, moment):
                self.first.setdefault(moment, self.all)
                self.moments[moment] += 1
        if changes(call, self._run):
            self.changed.append(call.name)


def marks(call: tracing.Call, run: str, moment: str) -> bool:
    """Whether a call is of a moment of a run."""
    path = call.path or ""
    if moment == "handled":  # what the program imports when it has installed its handlers
        return "ttt_cli" in path and "outcome" in path
    if moment == "metrics":
        return path.endswith("metrics.jsonl") and changes(call, run)
    if moment == "checkpoint":
        return changes(call, f"{run}/checkpoints/")
    if moment == "pictures":
        return path.endswith(".png") and changes(call, run)
    return path == f"/moment/{moment}"


def changes(call: tracing.Call, run: str) -> bool:
    """Whether a call may change a file of the run."""
    return call.name in tracing.CHANGING and call.changes and (call.path or "").startswith(run)


class World:
    """What every try of a process needs: everything imported, what an undisturbed run leaves, and what it calls."""

    def __init__(self, folder: Path, first: dict[str, int]) -> None:
        self.folder = folder
        self.first = first
        """Number of the first call of each moment, of a program of its own."""
        self.reference = prepare(Path(tempfile.mkdtemp(prefix="undisturbed-", dir=folder)) / "work")
        self.counts = Counts(self.reference / RUN)
        """The calls of a forked run."""
        ended = forked(self.reference, COMMAND, self.counts)
        if ended.code:
            raise RuntimeError(f"the undisturbed run ended with {ended.code}:\n{ended.out}{ended.err}")
        self.expected = whole(self.reference)

    def last(self, moment: str) -> int:
        """How many calls mark a moment; imports are counted from where the program handles signals."""
        if moment == "imports":
            return self.first["data"] - self.first["handled"] - 1
        return self.counts.moments[moment]


_world: World | None = None


def world() -> World:
    """This process's."""
    assert _world is not None
    return _world


def _enter(folder: str, first: dict[str, int], whole_run: dict[str, Any] | None) -> None:
    """Import everything, so that a fork of this process need not."""
    global _world
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ttt.plugins import discover
    from ttt.train.pictures import draw_run

    for module in (
        "torch._dynamo",
        "torch.utils.tensorboard",
        *(f"ttt_cli.{name}" for name in ("main", "app", "train")),
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    importlib.import_module("ttt.train.start")
    discover()
    _optimize_once()
    figure = Figure()
    figure.add_subplot().set_title("finds the fonts")
    FigureCanvasAgg(figure).draw()
    _world = World(Path(folder), first)
    draw_run(_world.reference / RUN)  # finds what no other figure needs: the letters of formulas, say
    told = differences(whole_run, _world.expected) if whole_run is not None else []
    if told:
        raise RuntimeError(f"a forked run is not the same as a program of its own: {'; '.join(told)}")


def _optimize_once() -> None:
    """What the first step imports and registers; no backward, whose threads a fork would not have."""
    import torch

    import ttt

    layer = ttt.TTTLayer(8, 2, ttt.TTTConfig(mini_batch_size=4))
    layer(torch.zeros(1, 8, 8))
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(layer.parameters()).step()


def _program(folder: str) -> tuple[dict[str, int], dict[str, Any]]:
    """For a program of its own: the numbers of the first calls of its moments, and what it leaves."""
    path = prepare(Path(folder) / "program")
    counts = Counts(path / RUN)
    ended = started(path, COMMAND, counts)
    if ended.code:
        raise SystemExit(f"the undisturbed run ended with {ended.code}:\n{ended.out}{ended.err}")
    return counts.first, whole(path)


@contextlib.contextmanager
def tries(
    jobs: int, *, small: bool = False
) -> Iterator[Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]]:
    """Processes that work side by side, in a folder that is gone afterwards: a `map` over them.

    With `small` no program is started to count its calls: it is taken to import for so many at least.
    """
    problem = tracing.obstacle()
    if problem is not None:
        print(f"skipped: {problem}")
        raise SystemExit(77)
    with tempfile.TemporaryDirectory(prefix="disturbed-") as folder:
        plugins = Path(folder, "plugins")
        plugins.mkdir()
        paths = make_plugins(plugins)
        os.environ["PYTHONPATH"] = paths
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ.setdefault("NO_TORCH_COMPILE", "1")
        os.environ["MPLBACKEND"] = "agg"
        sys.path[:0] = paths.split(os.pathsep)
        known = ({"handled": 0, "data": 2_000, "metrics": 2_000}, None) if small else _program(folder)
        with concurrent.futures.ProcessPoolExecutor(
            jobs, multiprocessing.get_context("fork"), initializer=_enter, initargs=(folder, *known)
        ) as pool:
            yield lambda one, arguments: pool.map(one, arguments)


def fresh() -> Path:
    """A prepared folder for a try."""
    return prepare(Path(tempfile.mkdtemp(prefix="try-", dir=world().folder)) / "work")


def forget(folder: Path) -> None:
    """Remove a try's folder."""
    shutil.rmtree(folder.parent, ignore_errors=True)


def arguments(description: str, *, runs: int) -> argparse.ArgumentParser:
    """The options that the drivers share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=int, default=runs, metavar="N", help=f"how many tries [{runs}]")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="how many side by side [2]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, other places [0]")
    parser.add_argument("--json", metavar="FILE", help="write every outcome to a file")
    return parser


def report(outcomes: Iterator[Outcome], *, total: int, first: str, file: str | None) -> int:
    """Print what comes, then a table; returns the exit code, 1 if anything went wrong."""
    done: list[Outcome] = []
    began = time.monotonic()
    for outcome in outcomes:
        done.append(outcome)
        for problem in outcome.problems:
            print(f"FAILED {outcome.kind}, {outcome.place}: {problem}", flush=True)
        if len(done) % 20 == 0:
            print(f"{len(done)}/{total} tries, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(table(done, first))
    failed = sum(bool(outcome.problems) for outcome in done)
    print(f"\n{len(done)} tries in {time.monotonic() - began:.0f} s, {failed} failed")
    if file is not None:
        Path(file).write_text(json.dumps([vars(outcome) for outcome in done], indent=1) + "\n", encoding="utf-8")
    return int(failed > 0 or len(done) < total)


def table(outcomes: Sequence[Outcome], first: str) -> str:
    """A Markdown table: kinds by results, how many tries of each, and how many of them went wrong."""
    results = list(dict.fromkeys(outcome.result for outcome in outcomes))
    counts = Counter((outcome.kind, outcome.result) for outcome in outcomes)
    failed = Counter(outcome.kind for outcome in outcomes if outcome.problems)
    rows = [[first, *results, "failed"], ["---", *["---:"] * (len(results) + 1)]]
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        rows.append([kind, *(str(counts[kind, result] or "") for result in results), str(failed[kind])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
