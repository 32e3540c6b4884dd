"""One token of each stream by whole layers in place: another revision beside the working tree, in one process.

    python benchmarks/decode.py 3a18ee0
    python benchmarks/decode.py 3a18ee0 --tokens 640 --widths 1024 --layers 12

The revision's package `ttt` is imported under another name, so that its layers run with their own checks, projections
and inner learning. All have the same weights, in memory of their own, and read the same tokens in turn; their answers
are compared. Printed are medians of a layer's time for a token, and of the ratios. Less than 1 is faster. On one core
its own processor time is taken; with `--threads 2` and more the clock's, which what else runs on the machine disturbs.

Layers are read as `ttt sample` reads them: held for inference, in float32 (`TTTLayer.hold_for_inference`; layers of a
revision without it as they are). `not held` are the working tree's as they are in training, which derive anew what
depends on parameters.

A token goes through several layers, as in a model: when a layer reads its next token, the others' parameters have gone
through the caches, so that its own are read from memory, while the code is in the caches. At width 1024 six layers have
100 MB of projections. At width 64 everything fits into the caches.

The floor is how long these cores take to read from memory what a token cannot do without: the layer's parameters and
the streams' fast weights, once each. How fast it reads is measured by a sum of other memory, between the tokens.
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ttt

HEADS = {1024: (8, 16), 64: (4,)}


def package_of(revision: str, folder: Path) -> ModuleType:
    """The package `ttt` of a revision, under a name and with operations of its own."""
    name = f"ttt_of_{re.sub(r'[^0-9A-Za-z]', '_', revision)}"
    archive = subprocess.run(["git", "archive", revision, "ttt"], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    (folder / "ttt").rename(folder / name)
    for file in (folder / name).rglob("*.py"):
        text = re.sub(r"\b(from|import) ttt\b", rf"\1 {name}", file.read_text(encoding="utf-8"))
        text = re.sub(r"([\"'])ttt(::|\.(?=\w+(?:\.\w+)*[\"']))", rf"\1{name}\2", text)
        file.write_text(text.replace("ops.ttt.", f"ops.{name}."), encoding="utf-8")
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


class Reader:
    """Layers that read tokens one by one.

    Args:
        package: whose layers.
        settings: of their config.
        dim: D.
        heads: H.
        batch: streams, B.
        count: how many layers.
        hold: whether they are held for inference.
    """

    def __init__(
        self,
        package: ModuleType,
        settings: dict[str, object],
        dim: int,
        heads: int,
        batch: int,
        count: int,
        *,
        hold: bool = True,
    ) -> None:
        self.layers, self.states = [], []
        for number in range(count):
            layer = package.TTTLayer(dim, heads, package.TTTConfig(**settings))
            layer.reset_parameters(torch.Generator().manual_seed(number))
            if hold and hasattr(layer, "hold_for_inference"):
                layer.hold_for_inference(torch.float32)
            self.layers.append(layer)
            self.states.append(_state(layer, batch))
        self.times: list[float] = []

    def numbers(self) -> int:
        """How many numbers a layer has to read for a token: parameters and fast weights."""
        return sum(x.numel() for x in (*self.layers[0].parameters(), *self.states[0].weights))

    def read(self, x: Tensor) -> Tensor:
        """Each layer's answers to a token of each stream, `[B,L,D]`; keeps how long it took for a layer."""
        start = now()
        answers = [layer.step_(x, state) for layer, state in zip(self.layers, self.states, strict=True)]
        self.times.append((now() - start) / len(answers))
        return torch.cat(answers, 1)


def now() -> float:
    """Seconds: of this thread's processor time if it computes alone, else of the clock."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _state(layer: Any, batch: int) -> Any:
    """A state for `step_`."""
    if hasattr(layer, "streaming_state"):
        return layer.streaming_state(batch)
    opened = layer.initial_state(batch).opened()  # an earlier revision writes to a copy of any state
    own = {name: x.clone(memory_format=torch.contiguous_format) for name, x in opened.tensors().items()}
    return type(opened).from_tensors(own)


class Times(NamedTuple):
    """Medians: of seconds for a token before, now and as not held, the floor, and of both ratios to before."""

    before: float
    now: float
    not_held: float
    floor: float
    ratio: float
    ratio_not_held: float


@torch.no_grad()
def measure(readers: Sequence[Reader], x: Tensor) -> Times:
    """Read all tokens by each in turn: the revision's layers, those held for inference, those that are not."""
    elsewhere = torch.ones(8 * 2**20)
    reading = []
    for t, token in enumerate(x.split(1, dim=1)):
        order = [(t + place) % len(readers) for place in range(len(readers))]
        answers = {which: readers[which].read(token) for which in order}
        for which in order:
            torch.testing.assert_close(answers[which], answers[0], rtol=1e-3, atol=1e-3)
        start = now()
        elsewhere.sum()
        reading.append(now() - start)
    before, held, not_held = (reader.times[x.shape[1] // 10 :] for reader in readers)
    ratio, ratio_not_held = (
        statistics.median(b / a for a, b in zip(before, times, strict=True)) for times in (held, not_held)
    )
    floor = 4 * readers[1].numbers() * statistics.median(reading) / elsewhere.nbytes
    medians = map(statistics.median, (before, held, not_held))
    return Times(*medians, floor, ratio, ratio_not_held)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--layers", type=int, default=6, help="which a token goes through; 1 keeps more in the caches")
    parser.add_argument("--widths", type=int, nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--threads", type=int, default=1, help="cores that compute")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        before = package_of(options.revision, Path(folder))
        print("| D | H | B | inner model | before, ms | now, ms | not held, ms | floor, ms | now / before | not held |")
        print("| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for dim, kind, batch in itertools.product(options.widths, ("mlp", "linear"), (1, 4)):
            for heads in HEADS[dim]:
                settings: dict[str, object] = {"layer_type": kind, "mini_batch_size": 16}
                readers = [
                    Reader(package, settings, dim, heads, batch, options.layers, hold=hold)
                    for package, hold in ((before, True), (ttt, True), (ttt, False))
                ]
                x = torch.randn(batch, options.tokens, dim, generator=torch.Generator().manual_seed(1))
                found = measure(readers, x)
                times = " | ".join(f"{1e3 * value:.2f}" for value in found[:4])
                ratios = f"{found.ratio:.2f} | {found.ratio_not_held:.2f}"
                print(f"| {dim} | {heads} | {batch} | {kind} | {times} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
