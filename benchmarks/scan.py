"""TTT's scan and layer beside the published formulation, the matrix products alone, and attention.

    python benchmarks/scan.py                    # on the CPU; about an hour on two cores
    python benchmarks/scan.py --quick            # a minute: smaller shapes, nothing is kept
    python benchmarks/scan.py --device cuda

Everything runs in one process. Contenders take turns, round after round, so that what else the machine does hits all
of them; times are medians, ratios are medians of the ratios within a round. Memory is counted by the allocator
(`benchmarks/allocations.py` says what that counts). Results go to `benchmarks/results/scan_<device>.json` and `.png`;
until all is done, what there is lies beside them as `.partial.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from allocations import allocations  # before torch: it quietens the profiler

import torch  # isort: skip
from contenders import (
    ATTENTION,
    NOTES,
    OURS,
    PRODUCTS,
    PUBLISHED,
    TRITON,
    Contender,
    Groups,
    Shape,
    layer_contenders,
    scan_contenders,
)
from products import products_of_minibatch
from published import PublishedDecoder
from scan_results import Decoding, GrowthPoint, Machine, Results, Row, ShapeResult, tables
from torch import Tensor
from torch.nn import functional as F

from ttt.check.doctor import forced
from ttt.devices import cores, devices, versions
from ttt.layer import TTTLayer

RESULTS = Path(__file__).parent / "results"
SHAPES = (
    Shape("linear", "linear", 512, 8, 16, tokens=2048),
    Shape("MLP", "mlp", 512, 8, 16, tokens=2048),
    Shape("Moshi-like, C 1", "mlp", 1024, 8, 1, tokens=188),
    Shape("Moshi-like, C 16", "mlp", 1024, 8, 16, tokens=188),
    Shape("Video-like", "mlp", 512, 8, 64, tokens=8192, causal=False),
)
QUICK_SHAPES = (
    Shape("linear", "linear", 256, 4, 16, tokens=320),
    Shape("MLP", "mlp", 256, 4, 16, tokens=320),
    Shape("Moshi-like, C 1", "mlp", 256, 2, 1, tokens=24),
    Shape("Moshi-like, C 16", "mlp", 256, 2, 16, tokens=94),
    Shape("Video-like", "mlp", 128, 2, 64, tokens=1152, causal=False),
)
GROWTH = tuple(512 << power for power in range(7))
QUICK_GROWTH = (128, 256, 512)
GROUPS = (0, 1, 16)
LEAST_ROUNDS = 3
LONGEST_ATTENTION = 16_384
"""Tokens beyond which attention's growth is not timed: its time is as their square."""
MEMORY = {
    "cpu": "blocks of PyTorch's CPU allocator beyond the inputs, C++ temporaries included, MKL's own buffers not.",
    "cuda": "PyTorch's caching allocator beyond the inputs.",
}


class Clock:
    """Times things on a device, in rounds.

    Args:
        device: where they run.
        repeats: rounds at most.
        budget: seconds after which no round begins, once there are `LEAST_ROUNDS`.
    """

    def __init__(self, device: torch.device, repeats: int, *, budget: float = 45.0) -> None:
        self.device, self.repeats, self.budget = device, repeats, budget

    def seconds(self, function: Callable[[], object]) -> float:
        """Of one call."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rounds(self, functions: Sequence[Callable[[], object]]) -> list[list[float]]:
        """Seconds of each function in every round; a round starts with another one each time.

        Each has run before: what a first call costs is not measured.
        """
        found: list[list[float]] = [[] for _ in functions]
        start = time.perf_counter()
        for turn in range(self.repeats):
            if turn >= LEAST_ROUNDS and time.perf_counter() - start > self.budget:
                break
            for place in range(len(functions)):
                index = (place + turn) % len(functions)
                found[index].append(self.seconds(functions[index]))
        return found


def ratio(these: Sequence[float], others: Sequence[float]) -> float:
    """Of times taken in the same rounds."""
    return statistics.median(a / b for a, b in zip(these, others, strict=True))


def groups_of(shape: Shape, sizes: Sequence[int]) -> Groups:
    """The group sizes to run, and the one of least memory."""
    auto = shape.cost("auto").group_size
    return [(size, size == auto) for size in dict.fromkeys((*sizes, auto))]


def rows_of(part: str, contenders: Sequence[Contender], clock: Clock) -> Iterator[Row]:
    """Time and weigh contenders on one shape."""
    held = [None if one.kept is None else allocations(one.kept, clock.device).held for one in contenders]
    weighed = [None if one.kept is None else allocations(one.both, clock.device) for one in contenders]
    forwards = clock.rounds([one.forward for one in contenders])
    boths = clock.rounds([one.both for one in contenders])
    found = {(one.name, one.group_size, one.auto): both for one, both in zip(contenders, boths, strict=True)}
    for index, one in enumerate(contenders):
        forward, both, bytes_of = forwards[index], boths[index], weighed[index]
        group = one.group_size, one.auto
        published = found.get((PUBLISHED, *group))
        products = found.get((PRODUCTS, *group))
        keeping = found.get((one.name, 0, False))
        yield Row.model_validate(
            {
                "part": part,
                "contender": one.name,
                "group_size": one.group_size,
                "auto": one.auto,
                "forward_seconds": statistics.median(forward),
                "seconds": statistics.median(both),
                "speedup": ratio(published, both) if published and one.name in (*OURS, TRITON) else None,
                "over_products": ratio(both, products) if products and one.name != PRODUCTS else None,
                "over_keeping": ratio(both, keeping) if keeping and one.group_size and one.kept else None,
                "peak_bytes": None if bytes_of is None else bytes_of.peak,
                "held_bytes": held[index],
                "blocks": None if bytes_of is None else bytes_of.blocks,
                "note": NOTES.get(one.name),
            }
        )


def measure(shape: Shape, clock: Clock, *, sizes: Sequence[int], compiled: bool) -> ShapeResult:
    """Every contender on a shape, whole layers and scans alone, in groups of these sizes and of `auto`'s."""
    device, groups, rows = clock.device, groups_of(shape, sizes), []
    for part, contenders in (("layer", layer_contenders), ("scan", scan_contenders)):
        rows += list(rows_of(part, list(contenders(shape, groups, device, compiled=compiled)), clock))
        gc.collect()
    cost = shape.cost()
    return ShapeResult(
        name=shape.name,
        layer_type=shape.layer_type,
        causal=shape.causal,
        batch=shape.batch,
        tokens=shape.tokens,
        dim=shape.dim,
        heads=shape.heads,
        head_width=shape.head_width,
        mini_batch_size=shape.mini_batch_size,
        carry_bytes=cost.carry_bytes,
        forward_flops=cost_of_products(shape),
        rows=tuple(rows),
    )


def cost_of_products(shape: Shape) -> int:
    """FLOPs of the scan's matrix products, forward."""
    pairs = shape.batch * shape.heads
    return sum(
        count * pairs * product.flops
        for size, count in shape.minibatches.items()
        for product in products_of_minibatch(shape.widths, size, dual=shape.causal)
    )


def grow(shape: Shape, lengths: Sequence[int], clock: Clock) -> Iterator[GrowthPoint]:
    """Whole layers at several lengths, groups of 16."""
    for tokens in lengths:
        longer = dataclasses.replace(shape, tokens=tokens)
        contenders = list(layer_contenders(longer, [(16, False)], clock.device, compiled=False))
        if tokens > LONGEST_ATTENTION:
            contenders = [one for one in contenders if one.name != ATTENTION]
        peaks = [allocations(one.both, clock.device).peak for one in contenders]
        times = clock.rounds([one.both for one in contenders])
        for one, peak, seconds in zip(contenders, peaks, times, strict=True):
            yield GrowthPoint(
                contender=one.name,
                group_size=one.group_size,
                tokens=tokens,
                seconds=statistics.median(seconds),
                peak_bytes=peak,
            )
        del contenders
        gc.collect()


# --- one token at a time ---


class CachedAttention:
    """Attention that reads one token at a time and keeps keys and values of all, in room that is there for them.

    Args:
        layer: whose projections it has.
        batch: streams.
        tokens: the most that they can have.
    """

    def __init__(self, layer: TTTLayer, batch: int, tokens: int) -> None:
        self.layer = layer
        shape = batch, layer.num_heads, tokens, layer.head_width
        like = layer.q_proj.weight
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.read = 0

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The next token of each stream, `[B,1,D]` to `[B,1,D]`."""
        layer = self.layer
        q, k, v = (
            projection(x).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        self.keys[:, :, self.read] = k[:, :, 0]
        self.values[:, :, self.read] = v[:, :, 0]
        self.read += 1
        z = F.scaled_dot_product_attention(q, self.keys[:, :, : self.read], self.values[:, :, : self.read])
        y: Tensor = layer.o_proj(z.transpose(1, 2).flatten(2))
        return y


Reader = Callable[[Tensor], Tensor]


def readers(layer: TTTLayer, batch: int, tokens: int) -> dict[str, Reader]:
    """Who reads streams one token at a time."""

    def pure(implementation: str) -> Reader:
        state = layer.initial_state(batch)

        @torch.no_grad()
        def read(x: Tensor) -> Tensor:
            nonlocal state
            with forced(implementation):
                y, state = layer(x, state)
            return y

        return read

    state = layer.streaming_state(batch)

    @torch.no_grad()
    def in_place(x: Tensor) -> Tensor:
        return layer.step_(x, state)

    return {
        PUBLISHED: PublishedDecoder(layer, batch),
        **{name: pure(name) for name in OURS},
        "in place": in_place,
        ATTENTION: CachedAttention(layer, batch, tokens),
    }


def decode(shape: Shape, tokens: int, clock: Clock) -> Iterator[Decoding]:
    """Streams of so many tokens, every reader in turn at each token."""
    layer = shape.layer(16, clock.device)
    x = torch.randn(shape.batch, 64, shape.dim, generator=torch.Generator().manual_seed(1)).to(clock.device)
    counted = 2 * shape.mini_batch_size  # whole mini-batches, so that what closing one allocates is in both counts
    room = tokens + 4 * counted
    everyone = readers(layer, shape.batch, room)

    def run(read: Reader) -> Callable[[], None]:
        def some() -> None:
            for token in range(counted):
                read(x[:, token % 64 : token % 64 + 1])

        return some

    for read in everyone.values():  # what a layer makes for its first token and then holds is no growth
        run(read)()
    first = {name: allocations(run(read), clock.device) for name, read in everyone.items()}
    times: dict[str, list[float]] = {name: [] for name in everyone}
    for token in range(tokens):
        here = x[:, token % 64 : token % 64 + 1]
        for name, read in everyone.items():
            times[name].append(clock.seconds(lambda read=read, here=here: read(here)))  # type: ignore[misc]
    for name, read in everyone.items():
        # Twice: a state from before the first count, whose release that does not see, would look like growth.
        _, last = (allocations(run(read), clock.device) for _ in range(2))
        tenths = [statistics.median(times[name][tokens * i // 10 : tokens * (i + 1) // 10]) for i in range(10)]
        rise, start = statistics.linear_regression(range(10), tenths)
        yield Decoding(
            contender=name,
            tokens=tokens,
            seconds=statistics.median(times[name]),
            tenths=tuple(tenths),
            slope=9 * rise / start,
            first_blocks=round(first[name].blocks / counted),
            last_blocks=round(last.blocks / counted),
            grown_bytes=round(last.held / counted),
        )


# --- all of it ---


def machine(device: torch.device) -> Machine:
    """This one, without its name and places."""
    name = "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"
    found = next(one for one in devices() if one.name == name)
    return Machine(
        device=found.model,
        kind="cpu" if device.type == "cpu" else "cuda",
        memory_bytes=found.memory_bytes,
        threads=torch.get_num_threads(),
        cores=cores(),
        versions=versions(),
    )


def run(
    device: torch.device,
    *,
    shapes: Sequence[Shape],
    sizes: Sequence[int],
    lengths: Sequence[int],
    tokens: int,
    repeats: int,
    quick: bool,
    compiled: bool,
    tell: Callable[[str], None],
    keep: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Measure everything.

    Args:
        device: where.
        shapes: for the tables; the growth is the second one's, decoding the last causal one's.
        sizes: of groups; the picture shows those of 16.
        lengths: T of the growth.
        tokens: to decode.
        repeats: rounds.
        quick: whether the shapes are cut down.
        compiled: whether the published steps run through `torch.compile`, too.
        tell: is told what comes next.
        keep: is given what there is so far, after each part.
    """
    clock = Clock(device, repeats)
    growing = shapes[min(1, len(shapes) - 1)]
    streaming = next((shape for shape in reversed(shapes) if shape.causal), None)
    results = Results(
        quick=quick,
        repeats=repeats,
        machine=machine(device),
        memory=MEMORY[device.type],
        shapes=(),
        growth_shape=f"{growing.name}, D {growing.dim}, H {growing.heads}, C {growing.mini_batch_size}",
        growth=(),
        decode_shape=f"{streaming.name}, D {streaming.dim}, H {streaming.heads}" if streaming else "",
        decoding=(),
    )
    for shape in shapes:
        tell(f"{shape.name}: T {shape.tokens}, D {shape.dim}, H {shape.heads}, C {shape.mini_batch_size}")
        found = measure(shape, clock, sizes=sizes, compiled=compiled)
        results = results.model_copy(update={"shapes": (*results.shapes, found)})
        keep(results)
    tell(f"growth of {growing.name} to T {max(lengths)}")
    for point in grow(growing, lengths, clock):
        results = results.model_copy(update={"growth": (*results.growth, point)})
        keep(results)
    if streaming is not None:
        tell(f"decoding {tokens} tokens, {streaming.name}")
        results = results.model_copy(update={"decoding": tuple(decode(streaming, tokens, clock))})
    return results


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="a minute's work, which is printed and not kept")
    parser.add_argument("--repeats", type=int, help="rounds at most; 9, or 3 with --quick")
    parser.add_argument("--compile", action="store_true", help="the published steps through torch.compile as well")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="some of the shapes, as tables name them")
    parser.add_argument("--groups", nargs="+", type=int, metavar="N", help="group sizes; auto is always among them")
    parser.add_argument("--growth", type=int, metavar="T", help="longest sequence of the growth")
    parser.add_argument("--tokens", type=int, metavar="T", help="tokens to decode")
    parser.add_argument("--out", type=Path, help="where to write the JSON; the picture goes beside it")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU is at hand; `ttt doctor` says why")
    if arguments.repeats is not None and arguments.repeats < 1:
        parser.error("--repeats: at least one round")
    shapes = QUICK_SHAPES if arguments.quick else SHAPES
    if unknown := set(arguments.shapes or ()) - {shape.name for shape in shapes}:
        parser.error(f"--shapes: {min(unknown)} is none of {', '.join(shape.name for shape in shapes)}")
    lengths = QUICK_GROWTH if arguments.quick else GROWTH
    out = arguments.out or (None if arguments.quick else RESULTS / f"scan_{arguments.device}.json")

    def write(path: Path, results: Results) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(results.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def keep(results: Results) -> None:
        if out is not None:
            write(out.with_suffix(".partial.json"), results)

    results = run(
        torch.device(arguments.device),
        shapes=[shape for shape in shapes if shape.name in (arguments.shapes or (shape.name,))],
        sizes=arguments.groups or ((0, 16) if arguments.quick else GROUPS),
        lengths=[length for length in lengths if length <= (arguments.growth or length)] or lengths[:1],
        tokens=arguments.tokens or (100 if arguments.quick else 10_000),
        repeats=arguments.repeats or (3 if arguments.quick else 9),
        quick=arguments.quick,
        compiled=arguments.compile,
        tell=lambda what: print(what, file=sys.stderr, flush=True),
        keep=keep,
    )
    print(tables(results))
    if out is not None:
        from scan_pictures import draw

        write(out, results)
        draw(results, out.with_suffix(".png"))
        out.with_suffix(".partial.json").unlink(missing_ok=True)
        print(f"\nWrote {out.name} and {out.with_suffix('.png').name} to {out.parent.name}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
