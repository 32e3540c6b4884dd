"""Does any changed byte load as something else? One byte at a time, over every kind of file that is read again.

    python benchmarks/byte_flips.py                      # 1,000 flips; a Markdown table on standard output
    python benchmarks/byte_flips.py --flips 200 --seed 7

A run of Moshi's demo with trained backbone and carried states, latents that Video-DiT's demo precomputes, a saved
state and what the demos ship are read as `--resume`, `ttt info`, `load_adapter`, `ttt sample` and datasets read them,
each time with one byte changed. A flip counts as

- caught: an error, a warning or a note, with the file's name in it;
- harmless: what was read is the same to the last bit, as after a change of white space;
- SILENT: something else was read, and nobody was told; ERROR: anything else, a traceback above all.

Half of the flips of a safetensors file go into its header, which is small beside its tensors. The exit code is 1 if a
flip is silent or an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ttt.adapter_file import BACKBONE, MODEL, read_info
from ttt.check import load_config
from ttt.errors import DamagedFileWarning, TTTError
from ttt.files import read_header, read_tensors, require_digests
from ttt.plugins import Backbone, Precomputing, capability, get_backbone
from ttt.state import TTTState
from ttt.train import train
from ttt.train.claim import METRICS, SUMMARY
from ttt.train.metrics import MetricsFile
from ttt.train.result import finished
from ttt.train.rundir import RunDir
from ttt.train.stored_config import CONFIG
from ttt.train.verification import verify_files

Read = Callable[[], Any]


class ToldError(Exception):
    """What a reader told the user and went on with."""


@dataclass(frozen=True)
class Subject:
    """A file to damage, and the ways in which it is read."""

    kind: str
    file: Path
    reads: tuple[Read, ...]
    """Each tells of damage by an error or a `DamagedFileWarning`. The first returns all that the file says; where that
    is told of damage, so must be the others."""


# --- a run ---


def run_subjects(folder: Path, backbone: Backbone) -> list[Subject]:
    """Every file that is read again of a run that has ended."""
    checkpoint, _ = RunDir(folder).latest()
    assert checkpoint is not None

    def resume() -> Any:
        return _resumed(folder, backbone)

    def info() -> Any:
        return verify_files(read_info(folder), folder)

    def adapter() -> Any:
        return read_info(checkpoint.path, verify=True)

    subjects = [
        Subject(name, checkpoint.path / name, (resume, info, *([adapter] if name in (MODEL, BACKBONE) else [])))
        for name in sorted(file.name for file in checkpoint.path.iterdir())
    ]
    return subjects + [Subject(name, folder / name, (resume, info)) for name in (CONFIG, METRICS, SUMMARY)]


def _resumed(folder: Path, backbone: Backbone) -> Any:
    """What `ttt train RUN --resume` takes over, as it takes it over."""
    run = RunDir(folder)
    loaded = load_config(folder / CONFIG, backbone=backbone, resuming=True)
    config = loaded.config.model_copy(update={"run_dir": str(folder)})
    checkpoint, notes = run.reopen(config, backbone)
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copy(folder / METRICS, place))
        metrics = MetricsFile(copy, last_step=checkpoint.step)
        metrics.close()
        lines = copy.read_bytes()
    if notes or metrics.dropped:
        raise ToldError("; ".join([*notes, *metrics.dropped]))
    ended = finished(run, checkpoint, config)
    info = dataclasses.asdict(read_info(folder))
    tensors = [read_tensors(file, verify=False) for file in sorted(checkpoint.path.glob("*.safetensors"))]
    return config.model_dump(mode="json"), checkpoint.state, lines, repr(ended), info, tensors


def make_run(folder: Path) -> list[Subject]:
    """Train two steps of Moshi's demo, everything learning, states carried."""
    overrides = [
        *("train.max_steps=2", "train.trainable=all", "train.batch_size=1", "train.device=cpu", "data.shuffle=false"),
        *("ttt.persistent_states=true", "data.duration_sec=2", f"run_dir={folder}"),
    ]
    backbone = get_backbone("moshi")
    loaded = load_config("moshi demo", text=backbone.presets()["demo"], backbone=backbone, overrides=overrides)
    train(loaded.config, backbone, console=_silent())
    return run_subjects(folder, backbone)


# --- latents, states, what is shipped ---


def make_latents(folder: Path) -> list[Subject]:
    """Precompute the first 3 s of Video-DiT's clip."""
    from ttt_videodit import demo
    from ttt_videodit.data import latent_windows

    backbone = get_backbone("videodit")
    shutil.copy(demo.CLIP, folder / "clip.mp4")
    (folder / "videos.jsonl").write_text('{"path": "clip.mp4", "captions": ["towers at night"]}\n')
    overrides = [f"data.videos={folder / 'videos.jsonl'}", f"data.train_data={folder / 'index.jsonl'}"]
    config = load_config(
        "videodit demo", text=backbone.presets()["demo"], backbone=backbone, overrides=overrides, training=False
    ).config
    capability(backbone, Precomputing).precompute(config, console=_silent())

    def dataset() -> Any:
        options: Any = config.backbone
        data: Any = config.data
        windows = latent_windows(options, data, split="train", device="cpu")
        return [(windows[index], windows.describe(index), windows.captions(index)) for index in range(len(windows))]

    files = sorted((folder / "latents").glob("*.safetensors"))
    kinds = ["text of a segment" if file.name.startswith("text-") else "latents" for file in files]
    subjects = [Subject(kind, file, (dataset,)) for kind, file in zip(kinds, files, strict=True)]
    return [*subjects, Subject("index of latents", folder / "index.jsonl", (dataset,))]


def make_state(folder: Path) -> list[Subject]:
    """A saved TTT state."""
    file = folder / "state.safetensors"
    TTTState((torch.randn(2, 4, 8, 8), torch.zeros(2, 4, 1, 8))).save(file)
    return [Subject("saved state", file, (lambda: TTTState.load(file).tensors(),))]


def make_shipped(folder: Path) -> list[Subject]:
    """Copies of what the demos ship."""
    import ttt_moshi.codec
    import ttt_moshi.demo
    import ttt_videodit.codec
    import ttt_videodit.demo

    subjects = []
    for package, codec in ((ttt_moshi, ttt_moshi.codec.DemoCodec), (ttt_videodit, ttt_videodit.codec.DemoCodec)):
        place = Path(shutil.copytree(package.demo.FOLDER, folder / package.__name__))
        subjects.append(Subject(f"codec of {package.__name__}", place / "codec.safetensors", (_codec(place, codec),)))
        for name in package.demo.SHA256:
            subjects.append(Subject("demo's data", place / name, (_shipped(place, package.demo.SHA256),)))
    return subjects


def _codec(place: Path, codec: Any) -> Read:
    def read() -> Any:
        made = codec.load(place / "codec.safetensors")
        return list(made.buffers()), repr(getattr(made, "settings", None))

    return read


def _shipped(place: Path, digests: Mapping[str, str]) -> Read:
    def read() -> Any:
        require_digests(place, digests, way_out="reinstall it")
        return {name: (place / name).read_bytes() for name in digests}

    return read


# --- flips ---


def flips(subjects: Sequence[Subject], count: int, *, seed: int) -> Iterator[tuple[Subject, str, str]]:
    """Change one byte at a time, each kind of file as often as the others; the file is put back after each.

    Yields:
        The subject, `caught`, `harmless`, `SILENT` or `ERROR`, and where and how.
    """
    draw = random.Random(seed)
    expected = {id(subject): _plain(subject.reads[0]()) for subject in subjects}
    kinds = list(dict.fromkeys(subject.kind for subject in subjects))
    for number in range(count):
        subject = draw.choice([each for each in subjects if each.kind == kinds[number % len(kinds)]])
        whole = subject.file.read_bytes()
        at = _place(draw, subject.file, len(whole))
        mask = draw.choice([1 << draw.randrange(8), draw.randrange(1, 256)])
        subject.file.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
        try:
            outcome, what = _outcome(subject, expected[id(subject)])
        finally:
            subject.file.write_bytes(whole)
        yield subject, outcome, f"{subject.file.name}, byte {at}: {whole[at]:#04x} to {whole[at] ^ mask:#04x}: {what}"


def _place(draw: random.Random, file: Path, size: int) -> int:
    if file.suffix == ".safetensors" and draw.random() < 0.5:
        return draw.randrange(min(first for first, _ in read_header(file).spans.values()))
    return draw.randrange(size)


def _outcome(subject: Subject, expected: Any) -> tuple[str, str]:
    first, *others = subject.reads
    try:
        told, read = _read(first, subject.file)
        if told is None:
            same = _plain(read) == expected
            return ("harmless", "the same was read") if same else ("SILENT", "something else was read")
        for other in others:
            if _read(other, subject.file)[0] is None:
                return "SILENT", f"{other.__name__} does not tell, though {first.__name__} does: {told}"
        return "caught", told
    except Exception as error:  # whatever it is, it is not a sentence
        return "ERROR", f"{type(error).__name__}: {error}"


def _read(read: Read, file: Path) -> tuple[str | None, Any]:
    """What a reader told of a file, or what it read.

    Raises:
        RuntimeError: it told something that does not name the file.
    """
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        try:
            content, told = read(), []
        except (TTTError, ToldError) as error:
            content, told = None, [str(error)]
    told += [str(warning.message) for warning in shown if issubclass(warning.category, DamagedFileWarning)]
    if told and not any(file.name in sentence for sentence in told):
        raise RuntimeError(f"the file is not named: {'; '.join(told)}")
    return ("; ".join(told) if told else None), content


def _plain(content: Any) -> Any:
    """The same, with tensors as their types, shapes and bytes, so that it can be compared exactly."""
    if isinstance(content, torch.Tensor):
        flat = content.detach().contiguous().reshape(-1)
        return str(content.dtype), tuple(content.shape), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return content if isinstance(content, bytes) else repr(content)


def _silent() -> Console:
    return Console(quiet=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Flip, and print the table; 1 if something was silent or an error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        subjects = []
        for make in (make_run, make_latents, make_state, make_shipped):
            folder = Path(place) / make.__name__
            folder.mkdir()
            subjects += make(folder)
        return report(flips(subjects, asked.flips, seed=asked.seed))


def report(outcomes: Iterator[tuple[Subject, str, str]]) -> int:
    """Print a table by kind of file, and every flip that is neither caught nor harmless; returns the exit code."""
    counts: dict[str, Counter[str]] = {}
    wrong = []
    for subject, outcome, what in outcomes:
        counts.setdefault(subject.kind, Counter())[outcome] += 1
        if outcome in ("SILENT", "ERROR"):
            wrong.append(f"{outcome} {what}")
    columns = ("caught", "harmless", "SILENT", "ERROR")
    print("| file | flips | " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * 5)
    for kind, found in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        print(f"| {kind} | {found.total()} | " + " | ".join(str(found[column]) for column in columns) + " |")
    print(*wrong, sep="\n", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
