"""The table of `first_gpu.py`, from whatever results came; needs Python alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def table(found: Mapping[str, Any]) -> str:
    """All results, in Markdown: the card, how each stage ended, and a table for each that has something to show."""
    card = found.get("environment", {}).get("results", {}).get("card", "unknown")
    ends = [[name, one["ended"], f"{one['seconds']:.0f}"] for name, one in found.items()]
    parts = [f"# First figures of a GPU: {card}", _rows(("stage", "ended", "seconds"), ends)]
    for name, one in found.items():
        if name in _SHOWN and one["results"]:
            parts += [f"## {name}", _SHOWN[name](one["results"])]
    return "\n\n".join(parts) + "\n"


def _rows(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def _number(value: Any, form: str = ".3g") -> str:
    return "–" if value is None else format(value, form)


def _environment(results: Mapping[str, Any]) -> str:
    told = results.get("versions", {})
    versions = ", ".join(f"{name} {told[name]}" for name in ("python", "torch", "triton", "moshi") if told.get(name))
    problems = [f"- {problem}" for problem in results.get("problems", [])]
    return "\n".join([f"{versions}; `ttt doctor` healthy: {results.get('healthy')}", *problems])


def _oracle(results: Mapping[str, Any]) -> str:
    rows = results["rows"]
    wrong = [row for row in rows if not row["agrees"]]
    return f"{len(rows)} settings, {len(wrong)} too far; worst {results['worst']:.1e}, bound {results['bound']:.0e}"


def _waits(results: Mapping[str, Any]) -> str:
    rows = [[row["what"], row["waits"] or ("no" if row["watched"] else "not watched")] for row in results["rows"]]
    return _rows(("call", "waits for the GPU"), rows)


def _graphs(results: Mapping[str, Any]) -> str:
    rows = [
        [
            *(row["what"], row.get("error") or ("yes" if row["captured"] else "no: it needs CUDA")),
            *(_number(row.get(name)) for name in ("difference", "called_ms", "replayed_ms")),
            *(_launched(row.get(name)) for name in ("called_launches", "replayed_launches")),
        ]
        for row in results["rows"]
    ]
    head = ("what", "captured", "difference", "ms called", "ms replayed", "launches called", "launches replayed")
    return _rows(head, rows)


def _launched(counts: Sequence[int | None] | None) -> str:
    """Of forward and of backward, from those of forward and of both."""
    forward, both = counts or (None, None)
    return "–" if forward is None or both is None else f"{forward} / {both - forward}"


def _ceilings(results: Mapping[str, Any]) -> str:
    copy, launch = results.get("copy_gigabytes_per_second"), results.get("microseconds_per_launch")
    rows = [
        [row["shape"], row["precision"], _number(row["milliseconds"]), _number(row["teraflops"])]
        for row in results.get("products", [])
    ]
    head = f"copy {_number(copy)} GB/s, {_number(launch)} µs a launch"
    return f"{head}\n\n" + _rows(("product", "precision", "ms", "TFLOP/s"), rows)


def _layer(results: Mapping[str, Any]) -> str:
    head = ("B", "implementation", "precision", "launches", "ms inference", "ms forward", "ms backward", "MB held")
    rows = []
    for row in results["rows"]:
        start = [row["batch"], row["implementation"], row["precision"]]
        if "error" in row:
            rows.append([*start, row["error"], *"––––"])
            continue
        launched = f"{row['forward_launches']} / {row['backward_launches']}"
        times = (_number(row[name]) for name in ("inference_ms", "forward_ms", "backward_ms"))
        rows.append([*start, launched, *times, _number(row["held_bytes"] / 1e6 if "held_bytes" in row else None)])
    before = "; ".join(f"B {batch}: {a} / {b}" for batch, (a, b) in results["before"].items())
    return f"{results['shape']}; launches before the kernels, forward / backward: {before}\n\n{_rows(head, rows)}"


def _kernels(results: Mapping[str, Any]) -> str:
    head = ("case", "difference", "of", "agrees", "ms fused", "ms Triton")
    rows = []
    for row in results["rows"]:
        times = row.get("milliseconds", {})
        both = [_number(one.get("forward and backward")) for one in (times.get("fused", {}), times.get("triton", {}))]
        far = row.get("error") or _number(row.get("difference"), ".1e")
        rows.append([row["case"], far, row.get("of", "–"), "yes" if row["agrees"] else "NO", *both])
    return f"{len(rows)} of {results['of']} cases, {results['disagree']} disagree\n\n{_rows(head, rows)}"


def _laws(results: Mapping[str, Any]) -> str:
    rows = [[f"{row['law']}, {row['name']}", row["kind"], row["broken"] or "holds"] for row in results["rows"]]
    return _rows(("law", "inner model", "on this device"), rows)


def _scan(results: Mapping[str, Any]) -> str:
    head = ("shape", "part", "contender", "ms forward", "ms both", "× published", "of fla's time")
    rows = [
        [
            *(shape["shape"], row["part"], row["contender"]),
            *(_number(1e3 * row[name]) for name in ("forward_seconds", "seconds")),
            *(_number(row[name]) for name in ("speedup", "over_fla")),
        ]
        for shape in results["shapes"]
        for row in shape["rows"]
    ]
    return _rows(head, rows)


def _moshi_7b(results: Mapping[str, Any]) -> str:
    rows = [
        [
            *(row["ttt_layers"], row["gradient_checkpointing"], _number(row["tokens_per_second"], ".0f")),
            *(_number(row["over_plain"]), _number(row["peak_bytes"] / 2**30)),
        ]
        for row in results["rows"]
    ]
    return _rows(("layers with TTT", "checkpointing", "tokens/s", "of plain", "GiB"), rows)


_SHOWN: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "environment": _environment,
    "oracle": _oracle,
    "waits": _waits,
    "graphs": _graphs,
    "ceilings": _ceilings,
    "layer": _layer,
    "kernels": _kernels,
    "laws": _laws,
    "scan": _scan,
    "moshi_7b": _moshi_7b,
}
