"""The stages of `first_gpu.py`, each a command of its own that writes one JSON, again and again as results come.

    python benchmarks/first_gpu_stages.py layer --out layer.json                      # on a GPU
    python benchmarks/first_gpu_stages.py layer --out layer.json --device cpu --tiny

Every function takes the device, whether sizes are tiny, and a function that keeps what there is so far.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from first_gpu_graphs import graphs
from first_gpu_layer import ceilings, layer

from ttt.check.doctor import examine
from ttt.config import TTTConfig
from ttt.layer import TTTLayer
from ttt.plugins import get_backbone

Keep = Callable[[dict[str, Any]], None]
ROOT = Path(__file__).resolve().parent.parent


def environment(device: str, tiny: bool, keep: Keep) -> None:
    """Versions, the card, and what `ttt doctor` says."""
    found: dict[str, Any] = {"card": "none"}
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {
            "card": about.name,
            "capability": f"{about.major}.{about.minor}",
            "memory_bytes": about.total_memory,
            "multiprocessors": about.multi_processor_count,
        }
    keep(found)
    report = examine()
    found |= {"versions": dict(report.versions), "healthy": report.healthy}
    found["problems"] = [f"{one.severity.value}: {one.message}" for one in report.problems]
    found["trials"] = [
        {"device": one.device, "implementation": one.implementation, "error": one.error, "cause": one.cause}
        for one in report.trials
    ]
    keep(found)


def oracle(device: str, tiny: bool, keep: Keep) -> None:
    """The layer against the definition in float64."""
    from cuda_oracle import BOUND, SETTINGS, difference

    rows: list[dict[str, Any]] = []
    for kind, causal, tokens, size in SETTINGS[::7] if tiny else SETTINGS:
        far, name = difference(kind, causal, tokens, size, device=device)
        setting = {"kind": kind, "causal": causal, "tokens": tokens, "mini_batch_size": size}
        rows.append({**setting, "difference": far, "of": name, "agrees": far <= BOUND})
        keep({"bound": BOUND, "worst": max(row["difference"] for row in rows), "rows": rows})


def waits(device: str, tiny: bool, keep: Keep) -> None:
    """Whether anything waits for the GPU in a layer's forward, backward or `step_`."""
    rows: list[dict[str, Any]] = []
    for kind, dtype in (("linear", torch.float32), ("mlp", torch.float32), ("mlp", torch.bfloat16)):
        config = TTTConfig(layer_type=kind, mini_batch_size=4)  # type: ignore[arg-type]
        module = TTTLayer(64, 2, config, dtype=torch.float32).to(device)
        x = torch.randn(2, 11, 64, device=device, dtype=dtype)
        state = module.streaming_state(2)

        def forward(module: TTTLayer = module, x: torch.Tensor = x) -> None:
            with torch.no_grad():
                module(x)

        def training(module: TTTLayer = module, x: torch.Tensor = x) -> None:
            module(x)[0].sum().backward()

        def step(module: TTTLayer = module, x: torch.Tensor = x, state: Any = state) -> None:
            with torch.no_grad():
                module.step_(x[:, :1], state)

        for name, function in (("forward", forward), ("forward and backward", training), ("step_", step)):
            function()  # what a first call waits for is not asked
            row = {"what": f"{kind}, {str(dtype).removeprefix('torch.')}: {name}", "watched": device == "cuda"}
            try:
                with _no_wait(device):
                    function()
                row["waits"] = None
            except RuntimeError as error:
                row["waits"] = _place(error)
            rows.append(row)
            keep({"rows": rows})


@contextlib.contextmanager
def _no_wait(device: str) -> Iterator[None]:
    """An error where the CPU would wait for the GPU."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _place(error: BaseException) -> str:
    """An error in a line, with the last line of `ttt` that it went through."""
    where, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/ttt/" in file:
            where = f" ({file.rsplit('/ttt/', 1)[1]}:{trace.tb_lineno})"
        trace = trace.tb_next
    return " ".join(f"{type(error).__name__}: {error}".split())[:300] + where


def kernels(device: str, tiny: bool, keep: Keep) -> None:
    """Every form of the kernels against the definition, then timed, the most telling first.

    On a GPU what they are held against is the fused scan in float64 on that GPU, whose distance from the definition the
    stage `oracle` has measured: the definition would take seconds for each.
    """
    from kernels_compared import Case, first_cases, row_of

    rows: list[dict[str, Any]] = []
    cases = [Case("linear", 16, 4, 6, 1, True), Case("mlp", 16, 4, 6, 1, False)] if tiny else list(first_cases())
    for case in cases:
        rows.append(row_of(case, "triton", device, against="reference" if tiny else "fused"))
        keep({"of": len(cases), "disagree": sum(not row["agrees"] for row in rows), "rows": rows})


def laws(device: str, tiny: bool, keep: Keep) -> None:
    """The laws on Moshi, narrowed."""
    from ttt.laws import LAWS, Bench

    rows: list[dict[str, Any]] = []
    for law in (1, 5) if tiny else LAWS:
        for kind in ("linear",) if tiny else ("linear", "mlp"):
            bench = Bench(get_backbone("moshi"), ttt={"layer_type": kind}, device=device)
            row: dict[str, Any] = {"law": law, "name": LAWS[law].__name__, "kind": kind, "broken": None}
            try:
                LAWS[law](bench)
            except Exception as error:  # a law that is broken says so; what else fails is told too
                row["broken"] = _place(error)
            rows.append(row)
            keep({"rows": rows})


def scan(device: str, tiny: bool, keep: Keep) -> None:
    """The layer and the scan beside the published formulation, attention, and fla's TTT-Linear if it is installed."""
    from contenders import FLA, Shape
    from scan import Clock, measure

    sizes = ((32, 2, 4, 10),) if tiny else ((1024, 8, 16, 2048), (4096, 32, 16, 2048))
    clock, found = Clock(torch.device(device), 3 if tiny else 10, budget=5.0), []
    for kind in ("linear",) if tiny else ("linear", "mlp"):
        for dim, heads, size, tokens in sizes:
            shape = Shape(f"{kind}, D {dim}", kind, dim, heads, size, tokens)  # type: ignore[arg-type]
            result = measure(shape, clock, sizes=[16], compiled=False)
            rows = [row.model_dump(mode="json") for row in result.rows]
            theirs = next((row["seconds"] for row in rows if row["contender"] == FLA), None)
            for row in rows:
                row["over_fla"] = row["seconds"] / theirs if theirs and row["part"] == "scan" else None
            found.append({"shape": shape.name, "tokens": tokens, "mini_batch_size": size, "rows": rows})
            keep({"shapes": found})


def moshi_7b(device: str, tiny: bool, keep: Keep) -> None:
    """Moshi 7B with random weights, with and without TTT: tokens a second of a training step."""
    out = ROOT / ".first_gpu_moshi.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "moshi_7b.py"), "--device", device, "--out", str(out)]
    if tiny:
        command += ["--preset", "demo", "--seconds", "1", "--warmup", "0", "--repeats", "1", "--pieces"]
        command += ["--score-batch-sizes", "1", "--clip-frames", "8"]
    else:
        command += ["--repeats", "3", "--warmup", "1", "--score-batch-sizes", "1", "8", "--pieces", "64"]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        sys.exit(f"moshi_7b.py ended with {code}; moshi_7b.log says why")
    found = json.loads(out.read_text(encoding="utf-8"))
    out.unlink()
    plain = {row["gradient_checkpointing"]: row["tokens_per_second"] for row in found["rows"][::2]}
    for row in found["rows"]:
        row["over_plain"] = row["tokens_per_second"] / plain[row["gradient_checkpointing"]]
    keep(found)


STAGES: dict[str, Callable[[str, bool, Keep], None]] = {
    each.__name__: each for each in (environment, oracle, waits, graphs, ceilings, layer, kernels, laws, scan, moshi_7b)
}


def main(arguments: list[str] | None = None) -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA GPU is at hand; --device cpu --tiny runs anywhere")
    begun = time.perf_counter()

    def keep(found: dict[str, Any]) -> None:
        beside = chosen.out.with_suffix(".part")
        beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        beside.replace(chosen.out)

    STAGES[chosen.stage](chosen.device, chosen.tiny, keep)
    print(f"{time.perf_counter() - begun:.1f} s after imports")


if __name__ == "__main__":
    main()
