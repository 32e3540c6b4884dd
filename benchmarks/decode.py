"""One token of each stream in place: another revision's `learn_one_` beside that of the working tree, in one process.

    python benchmarks/decode.py 265967d
    python benchmarks/decode.py 265967d --tokens 640 --widths 1024

The revision is one whose `ttt/ops/minibatch.py` has `learn_one_`, over summed gradients. Both take turns token by
token; printed are medians of a token's time on one core: of the whole layer, before and now, and of the layer without
its inner learning, which both have in common. Less than 1 is faster.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

import ttt.layer
from ttt import TTTConfig, TTTLayer, TTTState

HEADS = {1024: (8, 16), 64: (4,)}


def module_of(revision: str) -> ModuleType:
    """`ttt.ops.minibatch` of a revision."""
    path = "ttt/ops/minibatch.py"
    text = subprocess.run(["git", "show", f"{revision}:{path}"], check=True, capture_output=True, text=True).stdout
    module = ModuleType("minibatch_of_revision")
    sys.modules[module.__name__] = module  # where its classes look themselves up
    exec(compile(text, path, "exec"), module.__dict__)
    return module


def readers(layer: TTTLayer, batch: int, revision: ModuleType) -> dict[str, Callable[[Tensor], Tensor]]:
    """Who reads: the layer as it was, as it is, and without its inner learning."""
    opened = layer.initial_state(batch).opened().tensors()
    before = TTTState.from_tensors({name: x.clone(memory_format=torch.contiguous_format) for name, x in opened.items()})
    now, idle = layer.streaming_state(batch), layer.streaming_state(batch)

    def summed(tokens: Tensor, stream: Tensor, inner: object, rows: None, *_: object, **__: object) -> Tensor:
        z: Tensor = revision.learn_one_(tokens, stream, inner, rows)
        return z

    def patched(state: TTTState, function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def read(x: Tensor) -> Tensor:
            with mock.patch.object(ttt.layer, "learn_one_", function):
                return layer.step_(x, state)

        return read

    return {
        "before": patched(before, summed),
        "now": patched(now, ttt.layer.learn_one_),
        "rest": patched(idle, lambda tokens, *_, **__: tokens.q),
    }


@torch.no_grad()
def measure(layer: TTTLayer, batch: int, tokens: int, revision: ModuleType) -> dict[str, float]:
    """Seconds of each reader for a token, medians."""
    x = torch.randn(batch, 64, layer.dim, generator=torch.Generator().manual_seed(1))
    everyone = readers(layer, batch, revision)
    times: dict[str, list[float]] = {name: [] for name in everyone}
    for t in range(tokens):
        answers = {}
        for name, read in everyone.items():
            start = time.thread_time()
            answers[name] = read(x[:, t % 64 : t % 64 + 1])
            times[name].append(time.thread_time() - start)
        torch.testing.assert_close(answers["now"], answers["before"], rtol=1e-3, atol=1e-3)
    return {name: statistics.median(found[tokens // 10 :]) for name, found in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("--tokens", type=int, default=320)
    parser.add_argument("--widths", type=int, nargs="+", default=list(HEADS), choices=list(HEADS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    revision = module_of(options.revision)
    print("| D | H | B | inner model | before, ms | now, ms | of it not learn_one_ | now / before |")
    print("| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for dim, kind, batch in itertools.product(options.widths, ("mlp", "linear"), (1, 4)):
        for heads in HEADS[dim]:
            torch.manual_seed(0)
            layer = TTTLayer(dim, heads, TTTConfig(layer_type=kind, mini_batch_size=16))
            found = measure(layer, batch, options.tokens, revision)
            cells = " | ".join(f"{1e3 * found[name]:.2f}" for name in ("before", "now", "rest"))
            print(
                f"| {dim} | {heads} | {batch} | {kind} | {cells} | {found['now'] / found['before']:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
