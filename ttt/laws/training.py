"""Laws 1 and 2: what a training step may not change, and what may not change a training step.

Both run in training mode, because most models recompute activations and apply dropout only there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ttt.check.estimate import enclosing_checkpoints
from ttt.errors import PluginError
from ttt.inject import Injection
from ttt.laws.bench import Bench, LawBrokenError, Wrapper, non_reentrant, reentrant
from ttt.laws.parts import tensors_of, worst_of
from ttt.plugins import Batch
from ttt.words import first_line

GROUP_SIZES = (0, 1, 2, 16)
NESTINGS: dict[str, tuple[Wrapper, ...]] = {
    "no checkpoint": (),
    "reentrant": (reentrant,),
    "non-reentrant": (non_reentrant,),
    "reentrant in non-reentrant": (non_reentrant, reentrant),
    "non-reentrant twice": (non_reentrant, non_reentrant),
}


def purity(bench: Bench) -> Mapping[str, float]:
    """Law 1: a forward and backward pass writes to no parameter or buffer, and a second one gives the same."""
    injection = bench.injected()
    model = injection.model
    batch = bench.batch(model)
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    versions = {name: tensor._version for name, tensor in tensors_of(model).items()}
    runs = [bench.gradients(model, batch)]
    try:
        runs.append(bench.gradients(model, batch))
    except (RuntimeError, PluginError) as error:
        # Fast weights were kept with their graph: the second backward reaches the first one's graph, which is freed.
        first = first_line(error)
        raise LawBrokenError(1, f"a second pass over the same tokens fails where the first did not: {first}") from error
    bench.outputs(model, batch)
    written = [
        name
        for name, tensor in tensors_of(model).items()
        if not torch.equal(tensor, before[name]) or tensor._version != versions[name]
    ]
    allowed = _written_without_ttt(bench) if written else frozenset()
    for name in written:
        if name not in allowed:
            raise LawBrokenError(1, f"a forward pass wrote to {name}")
    worst = worst_of(runs[1], runs[0])
    if worst[1] > 0:
        raise LawBrokenError(
            1, f"a second pass over the same tokens gives another {worst[0]} ({worst[1]:.1e} away)", worst[1]
        )
    return {"difference of two passes": worst[1]}


def _written_without_ttt(bench: Bench) -> frozenset[str]:
    """Buffers that the plain backbone writes in training, such as batch norm's running means."""
    model = bench.model()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    bench.gradients(model, bench.batch(model))
    return frozenset(
        f"buffer {name}" for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])
    )


def remat_invariance(
    bench: Bench,
    *,
    group_sizes: Iterable[int] = GROUP_SIZES,
    nestings: Mapping[str, Sequence[Wrapper]] = NESTINGS,
    inside_own: Iterable[bool] = (False, True),
) -> Mapping[str, float]:
    """Law 2: outputs and gradients are the same for every group size and every nesting of checkpoints.

    It also counts what the backbone's own checkpointing recomputes, which must agree with `Backbone.facts`: if nothing
    were recomputed, the comparison would prove nothing.

    Args:
        bench: the bench.
        group_sizes: group sizes to compare with keeping everything.
        nestings: checkpoints to wrap around each adapter, by name.
        inside_own: whether the backbone's own activation checkpointing is on around them; nestings take these in turns.
    """
    plain = replace(bench, options=bench.bare or bench.options).injected(scan_checkpoint_group_size=0)
    bench.checkpointed(plain.model, False)
    batch = bench.batch(plain.model)
    expected = bench.gradients(plain.model, batch)
    measured = {}
    for number, group_size in enumerate(group_sizes):
        injections = _injections(bench, group_size, inside_own)
        for around, nesting in _in_turns(injections, nestings, number):
            injection, wrappers = injections[around], nestings[nesting]
            where = f"group size {group_size}, {nesting}" + " inside the backbone's own" * around
            with bench.counted(injection) as counts:
                found = _gradients(bench, injection, wrappers, batch, where)
            name, away = worst_of(found, expected)
            if away > bench.tolerance:
                raise LawBrokenError(2, f"at {where}, {name} is {away:.1e} away from what no checkpoint gives", away)
            if not wrappers:
                _require_recomputation(bench, injection, counts, around)
            measured[where] = away
    return measured


def _injections(bench: Bench, group_size: int, inside_own: Iterable[bool]) -> dict[bool, Injection]:
    """A model for all nestings, without the backbone's own checkpointing and with it, as far as there is any.

    A pass that changed the model for the next would break law 1 too.
    """
    made = {around: bench.injected(scan_checkpoint_group_size=group_size) for around in inside_own}
    # PyTorch's reentrant checkpoint loses gradients inside another checkpoint only if its inputs need none; ours always
    # need one.
    return {around: injection for around, injection in made.items() if bench.checkpointed(injection.model, around)}


def _in_turns(
    own: Iterable[bool], nestings: Mapping[str, Sequence[Wrapper]], number: int
) -> Iterator[tuple[bool, str]]:
    """Each nesting inside the backbone's own checkpointing or not, in turns; no nesting in both.

    So each nesting meets each group size, and both of them meet the backbone's own checkpointing.
    """
    ways = list(own)
    for place, (nesting, wrappers) in enumerate(nestings.items()):
        turn = (number + place) % max(len(ways), 1)  # none if a plugin refuses to switch its own off too
        for around in ways[turn : turn + 1] if wrappers else ways:
            yield around, nesting


def _gradients(
    bench: Bench, injection: Injection, wrappers: Sequence[Wrapper], batch: Batch, where: str
) -> dict[str, Tensor]:
    try:
        with bench.wrapped(injection, wrappers):
            return bench.gradients(injection.model, batch)
    except torch.utils.checkpoint.CheckpointError as error:
        first = first_line(error)
        raise LawBrokenError(2, f"at {where} recomputation differs from the forward pass: {first}") from error


def _require_recomputation(bench: Bench, injection: Injection, counts: Mapping[str, int], around: bool) -> None:
    """Require that every TTT layer runs forward as often as `facts` says, with own checkpointing on or off."""
    levels = _levels(bench, around)
    if levels is None:
        return
    for name in injection.adapters:
        ran, expected = counts.get(name, 0), len(levels) + sum(levels)
        if ran in (0, expected):  # a layer that is never reached is law 10's
            continue
        if around and ran <= len(levels):
            told = f"set_gradient_checkpointing(True) makes no further forward of {name} in training mode, though"
        else:
            told = f"with gradient checkpointing {'on' if around else 'off'}, {name} runs forward {ran} times, and"
        raise LawBrokenError(
            2,
            f"{told} the backbone's facts say that {len(levels)} {'scans' if len(levels) > 1 else 'scan'} of it and "
            f"{sum(levels)} checkpoints around make it {expected} times in a training step "
            f"(facts.checkpoints_around_scans)",
            float(ran),
        )


def _levels(bench: Bench, around: bool) -> tuple[int, ...] | None:
    """How many checkpoints are around each scan of a layer, by the facts; None if the facts cannot be read.

    `ttt.laws.plugin.facts_agree` reports that.
    """
    try:
        config = bench.run_config(gradient_checkpointing=around)
        return enclosing_checkpoints(config, bench.backbone.facts(config))
    except Exception:  # a third party's facts may raise anything
        return None
