"""One training step of CogVideoX 5B with and without TTT: tokens a second and peak memory on a CUDA GPU.

    python benchmarks/videodit_5b.py                             # random weights, bfloat16, 3 s and 9 s at 480 × 720
    python benchmarks/videodit_5b.py --preset demo --device cpu  # the same program on the demo's size, anywhere

The blocks are CogVideoX 5B's, as many as fit: all 42 are tried first, then ever fewer. TTT-MLP and attention's q, k, v
and o are trained (`qkvo`); without TTT, attention alone. Each block is checkpointed. Results go to
`benchmarks/results/videodit_<preset>-<device>.json` with the hardware named; times are medians, ratios within one run.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ttt import inject
from ttt.config import RunConfig, TTTConfig
from ttt.plugins import get_backbone
from ttt_videodit.attention import Remat
from ttt_videodit.building import COGVIDEOX_5B_CONFIG, build
from ttt_videodit.geometry import LATENT_CHANNELS, SPATIAL_COMPRESSION, segments_in
from ttt_videodit.model import VideoDiT
from ttt_videodit.options import PIXELS, TEXT_LENGTH, VideoDiTOptions

VIDEODIT = get_backbone("videodit")


def make(arguments: argparse.Namespace, blocks: int) -> VideoDiT:
    """The transformer with random weights, in train mode, its blocks checkpointed."""
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if arguments.preset == "demo":
        model = build(VideoDiTOptions(num_layers=blocks), device=device, dtype=dtype)
    else:
        torch.set_default_dtype(dtype)
        with device:
            model = VideoDiT(**{**COGVIDEOX_5B_CONFIG, "num_layers": blocks})
        torch.set_default_dtype(torch.float32)
    model.arrange(VideoDiTOptions().segments, Remat())
    VIDEODIT.set_gradient_checkpointing(model, True)
    return model.train()


def measure(arguments: argparse.Namespace, *, seconds: int, blocks: int, with_ttt: bool) -> dict[str, Any]:
    """Median time of a step (forward, backward, AdamW) and peak memory."""
    device = torch.device(arguments.device)
    model = make(arguments, blocks)
    settings = TTTConfig.model_validate(
        {**VIDEODIT.ttt_defaults, "layers": "all" if with_ttt else "none", "base_lr": 0.1}
    )
    injection = inject.apply(model, VIDEODIT.sites(model), settings, causal=False)
    adapters = {id(p) for adapter in injection.adapters.values() for p in adapter.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in adapters or VIDEODIT.is_attention(name))
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5)
    options = VideoDiTOptions(preset=arguments.preset)
    batch = example(model, options, seconds)
    config = RunConfig(backbone=options, ttt=settings)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(arguments.warmup + arguments.repeats):
        wait(device)
        start = time.perf_counter()
        output = VIDEODIT.loss(model, batch, config)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(device)
        times.append(time.perf_counter() - start)
    median = statistics.median(times[arguments.warmup :])
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process so far
    return {
        "seconds_of_video": seconds,
        "blocks": blocks,
        "ttt": with_ttt,
        "tokens": output.tokens,
        "trained_parameters": sum(p.numel() for p in learning),
        "loss": output.loss.item(),
        "step_seconds": median,
        "tokens_per_second": output.tokens / median,
        "peak_bytes": peak,
    }


def example(model: VideoDiT, options: VideoDiTOptions, seconds: int) -> dict[str, torch.Tensor]:
    """Random latents and texts of the preset's own size."""
    count = segments_in(seconds)
    height, width = (side // SPATIAL_COMPRESSION for side in PIXELS[options.preset])
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1, options.segments.frames(count), LATENT_CHANNELS, height, width, generator=generator)
    text = torch.randn(1, count, TEXT_LENGTH[options.preset], model.config.text_embed_dim, generator=generator)
    batch = {"mean": mean, "std": torch.zeros_like(mean), "text": text}
    return {name: value.to(model.device, model.dtype) for name, value in batch.items()}


def measure_what_fits(arguments: argparse.Namespace, seconds: int) -> list[dict[str, Any]]:
    """With and without TTT, on as many blocks as fit with TTT."""
    blocks = arguments.blocks
    while True:
        try:
            rows = []
            for with_ttt in (True, False):
                rows.append(measure(arguments, seconds=seconds, blocks=blocks, with_ttt=with_ttt))
                free()
            return rows
        except torch.OutOfMemoryError:
            if blocks == 1:
                raise
        free()
        print(f"{seconds:3d} s: {blocks} blocks do not fit")
        blocks = max(1, blocks * 3 // 4)


def free() -> None:
    """Give memory back between measurements."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="5b", choices=["5b", "demo"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=int, nargs="+", default=[3, 9])
    parser.add_argument("--blocks", type=int, default=None, help="to begin with; 42 of 5b, 4 of the demo")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    arguments.blocks = arguments.blocks or (42 if arguments.preset == "5b" else 4)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA GPU is at hand; --preset demo --device cpu runs anywhere")

    rows = []
    for seconds in arguments.seconds:
        pair = measure_what_fits(arguments, seconds)
        rows += pair
        for row in pair:
            speed, memory = f"{row['tokens_per_second']:9.0f} tokens/s", f"{row['peak_bytes'] / 2**30:6.2f} GiB"
            ttt = "with TTT" if row["ttt"] else "without"
            print(f"{seconds:3d} s  {row['blocks']} blocks  {ttt:8}  {speed}  {memory}  loss {row['loss']:.3f}")
        print(f"     throughput with TTT over without: {pair[1]['step_seconds'] / pair[0]['step_seconds']:.2f}")
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.processor() or "cpu"
    slug = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
    out = arguments.out or Path(__file__).parent / "results" / f"videodit_{arguments.preset}-{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    kept = {"hardware": name, "torch": torch.__version__, **settings, "rows": rows}
    out.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"kept in {out}")


if __name__ == "__main__":
    main()
