"""Whether a run fits in memory and on disk (TTT4xx; and TTT205, if rematerialisation would make it fit)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ttt.amounts import show_bytes, show_flops
from ttt.check.estimate import Estimate, estimate, parameters_to_match, written_layout
from ttt.check.rules.rule import NEEDS, Context, rule
from ttt.config.findings import Blame, Code, Family, Finding, Severity
from ttt.config.group_size import times_in_words
from ttt.config.schema import select_layers
from ttt.costs import bytes_of
from ttt.errors import EnvironmentProblem
from ttt.machine import device_memory

_code = partial(Code, family=Family.MEMORY, of_training=True, home=__name__)
TTT401 = _code("TTT401", "a run that does not fit in memory", Severity.ERROR, blames=Blame.EITHER)
TTT402 = _code("TTT402", "a run that may not fit in memory", Severity.WARNING, blames=Blame.EITHER)
TTT403 = _code("TTT403", "a checkpoint larger than the disk's free space", Severity.ERROR, blames=Blame.MACHINE)
TTT404 = _code("TTT404", "checkpoints larger than the disk's free space", Severity.WARNING, blames=Blame.EITHER)
TTT405 = _code("TTT405", "what a run costs", Severity.NOTE)
TTT205 = _code("TTT205", "no rematerialisation where memory will not do", Severity.WARNING, family=Family.CHECKPOINTING)


def memory_of(context: Context) -> int | None:
    """Bytes of memory of the run's device; None if nobody knows."""
    return context.memory_bytes or device_memory(context.config.train.device)


def _with_groups(context: Context) -> tuple[int, Estimate] | None:
    """The best group size and what the run needs with it; None if the config does not keep everything."""
    scan = context.needs.scan
    if scan is None or not scan.keeps_everything:
        return None
    best = min(
        (size for size in {scan.best_group_size(), *range(1, min(scan.steps, 256))} if 0 < size < scan.steps),
        key=lambda size: scan.with_group_size(size).peak_bytes,
        default=0,
    )
    if not best:
        return None
    ttt = context.config.ttt.model_copy(update={"scan_checkpoint_group_size": best})
    config = context.config.model_copy(update={"ttt": ttt})
    return best, estimate(config, context.facts, context.lora_shapes, written_layout(config.train))


@rule(TTT205, TTT401, TTT402, reads=NEEDS)
def fits_in_memory(context: Context) -> Iterator[Finding]:
    """The device has the memory that the run needs at its peak."""
    needs, memory = context.needs, memory_of(context)
    if context.devices is not None or memory is None or memory >= (needs.high if needs.complete else needs.low):
        return
    grouped = _with_groups(context)
    if needs.complete and grouped is not None and grouped[1].high <= memory:
        yield _rematerialise(needs, memory, *grouped)
    elif memory < needs.low:
        about = "the run" if needs.complete else "TTT alone"
        yield TTT401.at(
            context.first_written("train.batch_size", "train"),
            message=(
                f"{about} does not fit: it needs at least {show_bytes(needs.low)} of device memory, and there are "
                f"{show_bytes(memory)} ({needs.breakdown()})"
            ),
            fix=_way_out(context, memory),
            value=needs.low,
        )
    else:
        yield TTT402.at(
            context.first_written("train.batch_size", "train"),
            message=(
                f"the run may not fit: it needs {show_bytes(needs.low)} to {show_bytes(needs.high)} of device memory, "
                f"and there are {show_bytes(memory)} ({needs.breakdown()})"
            ),
            fix=_way_out(context, memory),
            value=needs.high,
        )


def _rematerialise(needs: Estimate, memory: int, group: int, grouped: Estimate) -> Finding:
    return TTT205.at(
        "ttt.scan_checkpoint_group_size",
        message=(
            f"without rematerialisation the scan keeps everything, and the run needs {show_bytes(needs.low)} to "
            f"{show_bytes(needs.high)} of device memory, of which there are {show_bytes(memory)}"
        ),
        fix=(
            f"write scan_checkpoint_group_size: {group}, which needs {show_bytes(grouped.low)} to "
            f"{show_bytes(grouped.high)} and runs every inner step forward once more"
        ),
        value=needs.high,
        severity=Severity.ERROR if memory < needs.low else None,
    )


def _way_out(context: Context, memory: int) -> str:
    """The fix for a run that is too large: settings that take less memory."""
    train, needs = context.config.train, context.needs
    always = needs.parts["parameters"] + needs.parts["optimizer"]
    ways = []
    if train.trainable == "all":
        ways.append("trainable: ttt")
    if train.param_dtype == "float32":
        ways.append("param_dtype: bfloat16")
    if always < memory:
        if train.batch_size > 1:
            smaller = f"batch_size: {train.batch_size // 2} with num_microbatches: {train.num_microbatches * 2}"
            ways.insert(0, smaller)
        if not train.gradient_checkpointing:
            ways.insert(0, "gradient_checkpointing: true")
        ways.append("fewer ttt.layers, or shorter windows")
    if not ways:
        return f"take a device of {show_bytes(needs.high)}: parameters and moments alone are {show_bytes(always)}"
    return f"write {', or '.join(ways[:3])}"


@rule(TTT403, TTT404, reads=(*NEEDS, "run_dir", "backbone.name"))
def checkpoints_fit_on_the_disk(context: Context) -> Iterator[Finding]:
    """The disk has room for the checkpoints that are kept."""
    needs, train, free = context.needs, context.config.train, _free(context.config.run_dir)
    checkpoint = needs.checkpoint_bytes + _inherited_bytes(context)
    # If the backbone is trained too and does not say how large it is, there is nothing to compare.
    if free is None or (train.trainable != "ttt" and not needs.complete):
        return
    made = 1 + (-(-train.max_steps // train.ckpt_freq) - 1 if train.ckpt_freq else 0)
    kept = made if train.ckpt_keep is None else min(made, train.ckpt_keep + 1)  # a new one comes before one goes
    all_of_them = checkpoint * kept
    if all_of_them <= free:
        return
    one = checkpoint > free
    number = "one checkpoint takes" if one else f"{kept} checkpoints take"
    code, keys = (TTT403, ("run_dir", "train.trainable")) if one else (TTT404, ("train.ckpt_keep", "train.ckpt_freq"))
    yield code.at(
        context.first_written(*keys),
        message=(
            f"{number} {show_bytes(checkpoint if one else all_of_them)} on disk (the adapter alone "
            f"{show_bytes(needs.adapter_bytes)}), and {show_bytes(free)} are free where run_dir is: the run will stop "
            f"when it saves"
        ),
        fix=(
            "write a run_dir on a larger disk" + ("" if train.trainable == "ttt" else ", or trainable: ttt")
            if one
            else f"write ckpt_keep: {max(free // max(checkpoint, 1) - 1, 1)}, or a run_dir on a larger disk"
        ),
        value=checkpoint if one else all_of_them,
    )


def _inherited_bytes(context: Context) -> int:
    """Bytes of backbone parameters that an earlier run trained and this one freezes: its checkpoints hold them too."""
    start, train = context.start, context.config.train
    if start is None or isinstance(start, EnvironmentProblem):
        return 0
    from ttt.adapter_file import trained_backbone

    def learns(name: str) -> bool:
        if not train.backbone_lr_multiplier:
            return False
        return train.trainable == "all" or (train.trainable != "ttt" and context.backbone.is_attention(name))

    frozen = [facts.shape for name, facts in trained_backbone(start).items() if not learns(name)]
    return sum(map(math.prod, frozen)) * bytes_of(train.param_dtype)


def _free(run_dir: str | None) -> int | None:
    from ttt.files import free_bytes

    try:
        return free_bytes(Path(run_dir or "runs"))
    except (OSError, ValueError, StopIteration):  # a name that no folder can have, such as one with a NUL
        return None


@rule(TTT405, reads=NEEDS)
def what_it_costs(context: Context) -> Iterator[Finding]:
    """Arithmetic, memory and disk, if the caller asks for them."""
    if not context.tells_cost:
        return
    needs, facts, train = context.needs, context.facts, context.config.train
    layers = len(select_layers(context.config.injected.layers, facts.num_layers))
    tokens = train.batch_size * (facts.tokens_per_window or context.config.ttt.mini_batch_size)
    forward, training = needs.forward_flops / tokens, needs.training_flops / tokens
    arithmetic = f"TTT in {layers} layer{'s' * (layers != 1)} multiplies {show_flops(forward)} for a token"
    if context.config.has_lora:
        arithmetic = f"{_lora_in_words(context)}; {arithmetic}" if layers else _lora_in_words(context)
    if needs.scan is not None:
        again = times_in_words([needs.scan.forwards(enclosing=level) for level in needs.scans])
        arithmetic += (
            f", and {show_flops(training)} in training, where every inner step runs forward {again}: "
            f"{show_flops(needs.training_flops * train.num_microbatches)} in a step of "
            f"{tokens * train.num_microbatches} tokens"
        )
        if context.config.ttt.scan_checkpoint_group_size == "auto":
            arithmetic += f"; scan_checkpoint_group_size: auto is {needs.scan.group_size} here"
    alone = "LoRA" if not layers else "TTT with LoRA" if context.config.has_lora else "TTT"
    about = "the run needs" if needs.complete else f"{alone} alone needs at least"
    memory = f"{show_bytes(needs.low)}" + (f" to {show_bytes(needs.high)}" if needs.complete else "")
    yield TTT405.at(
        context.first_written("ttt.layers", "ttt"),
        message=(
            f"{arithmetic}; {about} {memory} of device memory ({needs.breakdown()}); an adapter takes "
            f"{show_bytes(needs.adapter_bytes)} on disk, and a checkpoint {show_bytes(needs.checkpoint_bytes)}"
        ),
        value={
            "tokens_per_step": tokens * train.num_microbatches,
            "ttt_forward_flops_per_token": forward,
            "ttt_training_flops_per_token": training,
            "scan_checkpoint_group_size": needs.scan.group_size if needs.scan is not None else None,
            "memory_bytes": {"low": needs.low, "high": needs.high, "whole_run": needs.complete, **needs.parts},
            "adapter_bytes": needs.adapter_bytes,
            "checkpoint_bytes": needs.checkpoint_bytes,
            "lora": {"rank": needs.lora_rank, "parameters": needs.lora_parameters},
        },
    )


def _lora_in_words(context: Context) -> str:
    """The rank of LoRA, its linear layers and parameters, and what they match."""
    shapes, needs, lora = context.lora_shapes, context.needs, context.config.lora
    if shapes is None:
        return f"LoRA of rank {lora.rank}, in linear layers that only the built model tells"
    matched = ""
    if lora.rank == "match":
        matched = f" (matched to TTT's {parameters_to_match(context.config, context.facts):,})"
    return (
        f"LoRA of rank {needs.lora_rank} in {sum(shapes.values())} linears: {needs.lora_parameters:,} "
        f"parameters{matched}"
    )
