"""`ttt sample --audio` on a small model of Moshi's structure: against `LMGen` driven by hand, and for an hour.

    python benchmarks/moshi_sample.py                            # 60 s by hand, then an hour, on one thread
    python benchmarks/moshi_sample.py --minutes 2 --marks 1,2    # the same program, shorter

60 s of the demo's dialogue are answered by the demo's model by the command's own loop and by one written here as kyutai
write theirs: codes and sound shall be equal bit for bit, beyond the 512 frames that its attention sees.

The recording of an hour is the dialogue again and again, 44,100 samples a second, so that it is resampled too; the
model is smaller, with one layer each in the main and the depth transformer. Resident memory is looked at every half
second and told at the marks, as the answer grows. The real-time factor says nothing about Moshi 7B on a GPU.
Results go to `benchmarks/results/moshi_sample-cpu.json`, at each mark anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # read when moshi is imported; compiling its norm saves no time on a CPU

import torch
from moshi.models import LMGen
from rich.console import Console

from ttt.check import load_config
from ttt.files import TEMPORARY
from ttt.plugins import AnswerRequest, get_backbone
from ttt.sample import answer
from ttt.train.setup import build
from ttt_moshi import demo
from ttt_moshi.audio import inspect_audio, read_audio, resample
from ttt_moshi.codec import DemoCodec
from ttt_moshi.model import DEMO_KWARGS
from ttt_moshi.speaking import spoken
from ttt_moshi.user_audio import UserAudio
from ttt_moshi.wav import WavWriter

RATE = 44_100
CONFIG = """\
backbone: {name: moshi, preset: demo, dim: 16, num_heads: 1, num_layers: 1}
ttt: {layers: all, layer_type: mlp, mini_batch_size: 16}
train: {device: cpu, cpu_threads: 1}
"""
SMALL_DEPTH = {
    **{"depformer_num_layers": 1, "depformer_dim": 16, "depformer_num_heads": 1},
    "depformer_dim_feedforward": 32,
}
"""Of the depth transformer, with which most of the time goes."""


def write_recording(path: Path, *, minutes: float) -> None:
    """The user of the demo's dialogue, again and again."""
    dialogue = Path(demo.__file__).parent / "dialogue.flac"
    info = inspect_audio(dialogue)
    sound = resample(read_audio(dialogue, info, 0, info.samples)[1:], info.sample_rate, RATE).numpy()
    left = round(minutes * 60 * RATE)
    with WavWriter(path, sample_rate=RATE, channels=1) as file:
        while left > 0:
            file.write(sound[:, :left])
            left -= sound.shape[1]


def by_hand(seconds: float) -> dict[str, Any]:
    """Whether the demo says the same by the command's loop as by one that is written out here."""
    moshi = get_backbone("moshi")
    loaded = load_config("benchmark", text="backbone: {name: moshi}", training=False)
    model, _ = build(loaded.config, moshi, torch.device("cpu"))
    codec = DemoCodec.load()
    dialogue = Path(demo.__file__).parent / "dialogue.flac"
    heard = UserAudio(dialogue, inspect_audio(dialogue), "right", codec.sample_rate, codec.frame_size)
    frames = list(itertools.islice(heard.frames(), round(seconds * codec.frame_rate)))
    torch.manual_seed(0)
    generator, tokens, sounds = LMGen(model), [], []
    with torch.no_grad(), generator.streaming(1), codec.streaming(1):
        for number, frame in enumerate(frames):
            codes = codec.encode(frame)
            if number == 0:
                generator.step(codes)
            out = generator.step(codes)
            tokens.append(out[0, :, 0])
            sounds.append(codec.decode(out[:, 1:])[0, 0])
    torch.manual_seed(0)
    found = list(spoken(model, codec, frames))
    same_codes = all(
        [frame.text, *frame.codes.tolist()] == wanted.tolist() for frame, wanted in zip(found, tokens, strict=True)
    )
    same_sound = all(torch.equal(frame.sound, wanted) for frame, wanted in zip(found, sounds, strict=True))
    return {"seconds": len(frames) / codec.frame_rate, "codes_equal": same_codes, "sound_equal": same_sound}


class Watch:
    """Looks at the process's memory while an answer grows in a folder."""

    def __init__(self, folder: Path, *, marks: list[float], tell: Callable[[], None]) -> None:
        self.by_minute: dict[str, dict[str, float]] = {}
        self._folder = folder
        self._tell = tell
        self._marks = list(marks)
        self._bytes_a_minute = DemoCodec.load().sample_rate * 2 * 60
        self._started = time.monotonic()
        self._done = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which it looks."""
        thread = threading.Thread(target=self._look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _look(self) -> None:
        while self._marks and not self._done.wait(0.5):
            sizes = [file.stat().st_size for file in self._folder.glob(f"{TEMPORARY}*/*.wav")]
            minutes = max(sizes, default=0) / self._bytes_a_minute
            if minutes >= self._marks[0] - 0.02:
                self.by_minute[f"{self._marks.pop(0):g}"] = {
                    "resident_mib": round(resident_mib(), 1),
                    "seconds": round(time.monotonic() - self._started, 1),
                }
                self._tell()


def resident_mib() -> float:
    """Memory of this process that is in use now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--marks", default="1,5,30,60", help="minutes of sound at which memory is told")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "moshi_sample-cpu.json")
    parser.add_argument("--only", choices=["hand", "hour"], help="one of the two parts; the other's figures stay")
    arguments = parser.parse_args()
    if arguments.only != "hour":
        write(arguments.out, {"against_lmgen_by_hand": by_hand(min(60.0, arguments.minutes * 60))})
    if arguments.only != "hand":
        answer_long(arguments)
    print(arguments.out.read_text())


def answer_long(arguments: argparse.Namespace) -> None:
    """The long recording; results are written at each mark and at the end."""
    DEMO_KWARGS.update(SMALL_DEPTH)
    loaded = load_config("benchmark", text=CONFIG, training=False)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_recording(folder / "in.wav", minutes=arguments.minutes)
        marks = [float(mark) for mark in arguments.marks.split(",")]
        watch = Watch(folder, marks=marks, tell=lambda: write(arguments.out, _growth(watch)))
        request = AnswerRequest(audio=folder / "in.wav", out=folder / "out.wav")
        started, used = time.monotonic(), time.process_time()
        with watch.running():
            answer(loaded.config, loaded.backbone, [request], console=Console())
        took, used = time.monotonic() - started, time.process_time() - used
        said: dict[str, Any] = json.loads((folder / "out.json").read_text())
    found = {
        "recording": f"{arguments.minutes:g} min at {RATE} Hz, mono",
        "model": "demo, width 16, 1 layer with TTT-MLP, 1 layer of depth transformer, random weights",
        **_growth(watch),
        "seconds_of_sound": said["seconds"],
        "real_time_factor": round(took / said["seconds"], 3),
        "real_time_factor_of_processor_time": round(used / said["seconds"], 3),
        "warning": said["warning"],
    }
    write(arguments.out, found)


def write(out: Path, found: dict[str, Any]) -> None:
    """Put figures into the results, beside those that are there."""
    out.parent.mkdir(exist_ok=True)
    before = json.loads(out.read_text()) if out.exists() else {}
    machine = {"hardware": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread used", "torch": torch.__version__}
    out.write_text(json.dumps({**before, **machine, **found}, indent=2) + "\n")


def _growth(watch: Watch) -> dict[str, Any]:
    """Memory by minute, and by how much it grew since the first mark."""
    marks = [each["resident_mib"] for each in watch.by_minute.values()]
    return {
        "memory_by_minute": watch.by_minute,
        "growth_mib_since_first_mark": round(marks[-1] - marks[0], 1) if marks else None,
    }


if __name__ == "__main__":
    main()
