"""Hours of audio through a model as one stream, under each arm: how fast, and whether memory stays flat.

    python plugins/moshi/scripts/make_speech_benchmark.py /tmp/long --only librilight --hours 3 --books 1
    python benchmarks/long_stream.py RUN /tmp/long/librilight --hours 3

RUN is a run's folder. Each arm reads each book anew, encoding included, as the task `librilight` does. The process's
memory is noted every minute of audio; what counts is its growth after the first minute.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ttt.amounts import show_bytes
from ttt.check import load_config
from ttt.checkpoint_folder import newest_checkpoint
from ttt.eval.bench import Bench
from ttt.eval.long_streams import PositionLosses, pieces
from ttt.eval.sources import Source, books
from ttt.eval.speech.librilight import LibriLight
from ttt.eval.tasks import ARMS
from ttt.learned import fitting, learned_model
from ttt.plugins import EvalContext
from ttt.train.setup import device_in_words


def resident_bytes() -> int:
    """Bytes of memory that this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def read(bench: Bench, book: Source, *, most: int, rate: float) -> dict[str, Any]:
    """Read a book under the bench's arm; returns the measurement."""
    found = PositionLosses(bench.facts.streams, late_from=bench.facts.attention_span)
    memory, minute = [], round(60 * rate)
    wall, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with bench.stream() as stream:
        for piece in pieces(bench, book.files, most):
            before = found.positions
            found.add(stream.read(piece[None].to(bench.device)))
            if found.positions // minute > before // minute:
                memory.append(resident_bytes())
        found.add(stream.finish())
    hours = found.positions / rate / 3600
    return {
        "book": book.key,
        "arm": bench.arm,
        "positions": found.positions,
        "hours": hours,
        "seconds_per_hour": (time.perf_counter() - wall) / hours,
        "cpu_seconds_per_hour": (resource.getrusage(resource.RUSAGE_SELF).ru_utime - cpu) / hours,
        "memory_after_a_minute": memory[0] if memory else None,
        "memory_at_most_after": max(memory) if memory else None,
        "loss": found.weighted(bench.facts.weights[bench.facts.chosen]),
        "loss_beyond_attention": found.weighted(bench.facts.weights[bench.facts.chosen], late=True),
    }


def measure(run: Path, data: Path, *, hours: float, arms: list[str]) -> dict[str, Any]:
    """Read every book of a folder under every arm with a run's last checkpoint."""
    newest = newest_checkpoint(run).checkpoint
    if newest is None:
        raise SystemExit(f"{run}: has no complete checkpoint")
    loaded = load_config(run / "config.yaml", training=False)
    config, info = fitting(loaded.config, loaded.backbone, adapter=newest.path, verify=True)
    with learned_model(config, loaded.backbone, info, as_start=False, ways=()) as (model, injection):
        device = next(model.parameters()).device
        context = EvalContext(
            model,
            loaded.backbone,
            config,
            None,
            device,
            step=0,
            stop=lambda: False,
            adapters=injection.adapters,  # type: ignore[arg-type]
        )
        bench = Bench(context, LibriLight.options(name=LibriLight.name, data=str(data)))
        rate = bench.facts.positions_per_second
        assert rate is not None
        rows = []
        for book in books(data):
            for arm in arms:
                with bench.under(arm):
                    rows.append(read(bench, book, most=round(hours * 3600 * rate), rate=rate))
                show(rows[-1:])
    return {"device": device_in_words(device), "threads": torch.get_num_threads(), "rows": rows}


def show(rows: list[dict[str, Any]]) -> None:
    """Print measurements."""
    table = Table(box=None)
    for name in ("book", "arm", "positions", "s an hour", "CPU s an hour", "memory", "at most", "loss", "beyond"):
        table.add_column(name, justify="left" if name in ("book", "arm") else "right")
    for row in rows:
        noted = [row[key] for key in ("memory_after_a_minute", "memory_at_most_after")]
        memory = ["–" if one is None else show_bytes(one) for one in noted]
        losses = [f"{row[key]:.4f}" if row[key] is not None else "–" for key in ("loss", "loss_beyond_attention")]
        speeds = [f"{row[key]:.0f}" for key in ("seconds_per_hour", "cpu_seconds_per_hour")]
        table.add_row(row["book"], row["arm"], f"{row['positions']:,}", *speeds, *memory, *losses)
    Console(width=140).print(table)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("data", type=Path, help="books in Libri-Light's layout")
    parser.add_argument("--hours", type=float, default=3.0, help="of each book")
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--out", type=Path, help="a JSON file for the measurements")
    given = parser.parse_args(arguments)
    found = measure(given.run, given.data, hours=given.hours, arms=given.arms)
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
