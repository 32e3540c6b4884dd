"""One training step of Moshi 7B with and without TTT, and its scoring: frames a second and peak memory on a CUDA GPU.

    python benchmarks/moshi_7b.py                        # random weights, bfloat16, TTT-MLP in layers 29-31, 15 s
    python benchmarks/moshi_7b.py --preset demo --device cpu     # the same program on the demo model, anywhere

Without TTT the backbone's last three layers are trained instead, so that backward reaches as deep. `score` reads clips
side by side; `score_stream` reads one stream in pieces, again and again once its attention's cache is full. Results go
to `benchmarks/results/moshi_7b-<device>.json` with the hardware named; ratios are within one run, times are medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttt import inject
from ttt.config import RunConfig, TTTConfig
from ttt.plugins import get_backbone
from ttt_moshi.options import MoshiOptions

MOSHI = get_backbone("moshi")
FRAME_RATE = 12.5


def measure(arguments: argparse.Namespace, *, layers: str, checkpointing: bool) -> dict[str, Any]:
    """Median time of a step (forward, backward, AdamW) and peak memory, with TTT in these layers."""
    device = torch.device(arguments.device)
    options = MoshiOptions(preset=arguments.preset, random_weights=arguments.preset == "7b")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = MOSHI.build(options, device=device, dtype=dtype).train()
    settings = TTTConfig.model_validate(
        {**MOSHI.ttt_defaults, "layers": layers, "mini_batch_size": arguments.mini_batch_size}
    )
    injection = inject.apply(model, MOSHI.sites(model), settings)
    MOSHI.set_gradient_checkpointing(model, checkpointing)
    learning = _learning_parameters(model, injection, arguments)
    optimizer = torch.optim.AdamW(learning, lr=1e-5)
    tokens = round(arguments.seconds * FRAME_RATE + 0.5)
    codes = MOSHI.example_batch(model, batch_size=arguments.batch_size, tokens=tokens, seed=0)
    config = RunConfig(backbone=options, ttt=settings)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(arguments.warmup + arguments.repeats):
        _wait(device)
        start = time.perf_counter()
        output = MOSHI.loss(model, codes, config)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(device)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[arguments.warmup :])
    return {
        "ttt_layers": layers,
        "gradient_checkpointing": checkpointing,
        "trained_parameters": sum(p.numel() for p in learning),
        "loss": output.loss.item(),
        "step_seconds": seconds,
        "tokens_per_second": codes.shape[0] * tokens / seconds,
        "peak_bytes": _peak(device),
    }


def measure_scores(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Frames a second of `score` for batches of clips, and of `score_stream` once the attention's cache is full."""
    device = torch.device(arguments.device)
    options = MoshiOptions(preset=arguments.preset, random_weights=arguments.preset == "7b")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = MOSHI.build(options, device=device, dtype=dtype)
    settings = {**MOSHI.ttt_defaults, "layers": arguments.layers, "mini_batch_size": arguments.mini_batch_size}
    inject.apply(model, MOSHI.sites(model), TTTConfig.model_validate(settings))
    rows = []
    for batch_size in arguments.score_batch_sizes:
        clips = MOSHI.example_batch(model, batch_size=batch_size, tokens=arguments.clip_frames, seed=0)
        rows.append(_speed("score", lambda clips=clips: MOSHI.score(model, clips), clips, arguments))
    span = MOSHI.score_facts(RunConfig(backbone=options)).attention_span
    assert span is not None
    for frames in arguments.pieces:
        piece = MOSHI.example_batch(model, batch_size=1, tokens=frames, seed=0)
        with MOSHI.score_stream(model, batch_size=1) as stream:
            for _ in range(-(-span // frames)):
                stream.read(piece)
            rows.append(_speed("score_stream", lambda stream=stream, piece=piece: stream.read(piece), piece, arguments))
    return rows


def _speed(what: str, read: Callable[[], Any], codes: Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    device = codes.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(arguments.warmup + arguments.repeats):
        _wait(device)
        start = time.perf_counter()
        read()
        _wait(device)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[arguments.warmup :])
    rows, frames = codes.shape[0], codes.shape[2]
    return {
        "method": what,
        "batch_size": rows,
        "frames": frames,
        "seconds": seconds,
        "frames_per_second": rows * frames / seconds,
        "peak_bytes": _peak(device),
    }


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process so far


def _learning_parameters(
    model: nn.Module, injection: inject.Injection, arguments: argparse.Namespace
) -> list[nn.Parameter]:
    """TTT's parameters, or those of the layers where it would be."""
    adapters = {id(p) for adapter in injection.adapters.values() for p in adapter.parameters()}
    layers = [f"transformer.layers.{number.strip()}." for number in arguments.layers.split(",")]
    learning = []
    for name, parameter in model.named_parameters():
        chosen = id(parameter) in adapters if adapters else any(name.startswith(layer) for layer in layers)
        parameter.requires_grad_(chosen)
        if chosen:
            learning.append(parameter)
    return learning


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="7b", choices=["7b", "demo"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", default=None, help="layers with TTT; 29,30,31 of 7b, 1,2 of the demo")
    parser.add_argument("--mini-batch-size", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--score-batch-sizes", type=int, nargs="*", default=[1, 8, 32], help="clips side by side")
    parser.add_argument("--clip-frames", type=int, default=100, help="length of a clip: 8 s")
    parser.add_argument("--pieces", type=int, nargs="*", default=[64, 256], help="frames that a stream reads at once")
    parser.add_argument("--no-training", action="store_true", help="measure scoring alone")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    arguments.layers = arguments.layers or ("29,30,31" if arguments.preset == "7b" else "1,2")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA GPU is at hand; --preset demo --device cpu runs anywhere")

    rows = []
    for checkpointing in () if arguments.no_training else (False, True):
        for layers in ("none", arguments.layers):
            rows.append(measure(arguments, layers=layers, checkpointing=checkpointing))
            gc.collect()
            torch.cuda.empty_cache()
            row = rows[-1]
            speed, memory = f"{row['tokens_per_second']:9.0f} tokens/s", f"{row['peak_bytes'] / 2**30:6.2f} GiB"
            print(f"TTT {layers:>9}  checkpointing {checkpointing!s:5}  {speed}  {memory}  loss {row['loss']:.3f}")
    for without, with_ttt in zip(rows[::2], rows[1::2], strict=True):
        ratio = with_ttt["tokens_per_second"] / without["tokens_per_second"]
        print(f"checkpointing {without['gradient_checkpointing']!s:5}  throughput with TTT over without: {ratio:.2f}")
    scores = measure_scores(arguments)
    for row in scores:
        shape = f"{row['batch_size']:3} x {row['frames']:4} frames"
        speed, memory = f"{row['frames_per_second']:9.0f} frames/s", f"{row['peak_bytes'] / 2**30:6.2f} GiB"
        print(f"{row['method']:>12}  {shape}  {speed}  {memory}")
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.processor() or "cpu"
    out = arguments.out or Path(__file__).parent / "results" / f"moshi_{arguments.preset}-{_slug(name)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    out.write_text(
        json.dumps({"hardware": name, "torch": torch.__version__, **settings, "rows": rows, "scores": scores}, indent=1)
        + "\n"
    )
    print(f"kept in {out}")


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


if __name__ == "__main__":
    main()
