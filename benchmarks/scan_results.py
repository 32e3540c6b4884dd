"""What `benchmarks/scan.py` writes down, and how it shows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ttt.amounts import show_bytes


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Machine(_Record):
    """Where it ran."""

    device: str
    """As its maker names it."""
    kind: Literal["cpu", "cuda"]
    memory_bytes: int | None
    threads: int
    """Of PyTorch on the CPU."""
    cores: int
    versions: dict[str, str | None]


class Row(_Record):
    """One contender on one shape."""

    part: Literal["layer", "scan"]
    contender: str
    group_size: int | None
    """Mini-batches that backward recomputes at a time, 0 for none; None if there are no groups."""
    auto: bool
    """Whether the group size is `auto`'s."""
    forward_seconds: float = Field(gt=0)
    """Without gradients; medians, like all seconds."""
    seconds: float = Field(gt=0)
    """Forward and backward."""
    speedup: float | None
    """How many times as fast as the published formulation of the same group size, forward and backward."""
    over_products: float | None
    """How many times the seconds of its matrix products alone, of a scan."""
    over_keeping: float | None
    """How many times its own seconds with everything kept."""
    peak_bytes: int | None
    """The most that forward and backward allocate at once, gradients included, inputs and parameters not; None for
    products alone, whose memory is there."""
    held_bytes: int | None
    """What forward leaves allocated for backward, its answers included."""
    blocks: int | None
    """How often forward and backward ask the allocator for memory."""
    note: str | None


class ShapeResult(_Record):
    """Every contender on one shape."""

    name: str
    layer_type: Literal["linear", "mlp"]
    causal: bool
    batch: int
    tokens: int
    dim: int
    heads: int
    head_width: int
    mini_batch_size: int
    carry_bytes: int
    """S, the fast weights of one layer."""
    forward_flops: int
    """Of the scan's matrix products."""
    rows: tuple[Row, ...]


class GrowthPoint(_Record):
    """A whole layer at one length, forward and backward."""

    contender: str
    group_size: int | None
    tokens: int
    seconds: float = Field(gt=0)
    peak_bytes: int


class Decoding(_Record):
    """Streams read one token at a time."""

    contender: str
    tokens: int
    seconds: float = Field(gt=0)
    """Median of a token."""
    tenths: tuple[float, ...]
    """Median of each tenth of the stream, in order."""
    slope: float
    """How much a token takes longer at the end than at the start, as a share: a line through the tenths."""
    first_blocks: int
    """How often a token asks for memory, early on."""
    last_blocks: int
    """The same at the end."""
    grown_bytes: int
    """What each token at the end adds to what is allocated."""


class Results(_Record):
    """One run of the benchmark."""

    format: Literal[1] = 1
    quick: bool
    """Whether the shapes are cut down to a minute's work: not to be quoted."""
    repeats: int
    machine: Machine
    memory: str
    """What the bytes count."""
    shapes: tuple[ShapeResult, ...]
    growth_shape: str
    growth: tuple[GrowthPoint, ...]
    decode_shape: str
    decoding: tuple[Decoding, ...]


def read(path: Path) -> Results:
    """Results as they were written.

    Raises:
        pydantic.ValidationError: the file holds something else.
    """
    return Results.model_validate_json(path.read_bytes())


def _group(row: Row) -> str:
    if row.group_size is None:
        return "–"
    return f"auto ({row.group_size})" if row.auto else str(row.group_size)


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _bytes(count: int | None) -> str:
    return "–" if count is None else show_bytes(count)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 10 else f"{1000 * seconds:.0f}"


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for index, row in enumerate(rows):
        first, *others = zip(row, widths, strict=True)
        yield "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"
        if index == 0:
            yield "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"


def tables(results: Results) -> str:
    """Everything as Markdown tables."""
    lines = [f"{results.machine.device}, {results.machine.threads} threads, torch {results.machine.versions['torch']}"]
    if results.quick:
        lines.append("Quick: cut down shapes, few repeats, not to be quoted.")
    for shape in results.shapes:
        update = "causal" if shape.causal else "non-causal"
        lines += [
            "",
            f"### {shape.name}: {shape.layer_type}, T {shape.tokens}, D {shape.dim}, H {shape.heads}, "
            f"F {shape.head_width}, C {shape.mini_batch_size}, {update}",
        ]
        for part in ("layer", "scan"):
            head = ("whole layer" if part == "layer" else "scan alone", "group", "forward ms", "both ms")
            rows = [(*head, "faster", "over products", "over group 0", "peak", "held")]
            rows += [
                (
                    *(row.contender, _group(row), _milliseconds(row.forward_seconds), _milliseconds(row.seconds)),
                    *map(_times, (row.speedup, row.over_products, row.over_keeping)),
                    *map(_bytes, (row.peak_bytes, row.held_bytes)),
                )
                for row in shape.rows
                if row.part == part
            ]
            lines += ["", *_table(rows)]
    notes = {row.contender: row.note for shape in results.shapes for row in shape.rows if row.note}
    lines += ["", *(f"{name}: {note}." for name, note in notes.items())]
    lines += [
        "",
        f"### Growth: {results.growth_shape}, whole layer, forward and backward",
        "",
        *_table(_growth(results)),
    ]
    if results.decoding:
        lines += ["", f"### Decode: {results.decode_shape}, {results.decoding[0].tokens} tokens one at a time", ""]
        rows = [("", "ms a token", "first tenth", "last tenth", "slower by", "blocks a token", "grows a token")]
        rows += [
            (
                *(one.contender, _milliseconds(one.seconds)),
                *map(_milliseconds, (one.tenths[0], one.tenths[-1])),
                f"{100 * one.slope:.1f} %",
                f"{one.first_blocks} → {one.last_blocks}",
                show_bytes(one.grown_bytes),
            )
            for one in results.decoding
        ]
        lines += _table(rows)
    lines += ["", f"Bytes: {results.memory}"]
    return "\n".join(lines)


def _growth(results: Results) -> list[tuple[str, ...]]:
    lengths = sorted({point.tokens for point in results.growth})
    names = list(dict.fromkeys((point.contender, point.group_size) for point in results.growth))
    found = {(point.contender, point.group_size, point.tokens): point for point in results.growth}
    rows = [("tokens", *(name for name, _ in names))]
    for tokens in lengths:
        cells = []
        for name, group_size in names:
            point = found.get((name, group_size, tokens))
            cells.append("–" if point is None else f"{_milliseconds(point.seconds)} ms, {show_bytes(point.peak_bytes)}")
        rows.append((str(tokens), *cells))
    return rows
