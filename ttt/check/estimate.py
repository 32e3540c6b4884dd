"""What a run needs in memory and on disk: the closed forms of `ttt.costs`, applied to a backbone's facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ttt.amounts import show_bytes
from ttt.config.schema import RunConfig, TrainConfig, select_layers
from ttt.costs import (
    WIDE,
    ScanCost,
    Tensors,
    bytes_of,
    layer_activation_bytes,
    layer_flops,
    layer_parameters,
    layer_tensors,
    lora_parameters,
    matched_rank,
    moment_bytes,
    recorded_bytes,
    scan_cost,
)
from ttt.parallel.layout import Layout

if TYPE_CHECKING:
    from ttt.plugins import BackboneFacts

ALONE = Layout()
"""One device, which does everything."""

# --- the run ---


@dataclass(frozen=True)
class Estimate:
    """What a run needs; of several devices, what each of them needs."""

    scan: ScanCost | None
    """The cost of one TTT layer's scan; None if the length of windows is unknown, or there are no layers."""
    scans: tuple[int, ...]
    """For each scan of one layer, the number of activation checkpoints around it (`enclosing_checkpoints`)."""
    parts: Mapping[str, int]
    """Peak bytes by part, best guess. If not `complete`, of TTT alone."""
    low: int
    """Bytes of device memory. With less, the run fails."""
    high: int
    """Bytes of device memory. With as much, the run fits."""
    complete: bool
    """Whether the backbone states its own needs, so that `low` and `high` are of the whole run."""
    numbers: Numbers
    """How many numbers learn, and how many do not, in the whole run."""
    adapter_bytes: int
    """Bytes of the adapter on disk."""
    checkpoint_bytes: int
    """Bytes of one checkpoint on disk: the adapter, trained parameters of the backbone, the optimiser's state."""
    lora_parameters: int
    """Parameters of LoRA; 0 if there is none, or its linear layers are not known."""
    lora_rank: int | None
    """The rank of it, `match` worked out; None if it is not known."""
    forward_flops: int
    """FLOPs of all TTT layers in one forward pass over a batch; over one mini-batch if windows have no known length."""
    training_flops: int
    """The same with the backward pass and everything that is recomputed."""

    def breakdown(self, count: int = 4) -> str:
        """The largest parts with their sizes, for a sentence."""
        largest = sorted(self.parts.items(), key=lambda part: -part[1])[:count]
        return ", ".join(f"{name} {show_bytes(size)}" for name, size in largest if size)


@dataclass(frozen=True)
class Numbers:
    """Numbers that the parameters of a run have, by what is done with them; of one device of a layout, its part."""

    frozen: int
    """Of the backbone and LoRA, in the backbone's type, that do not learn."""
    learns: int
    """Of the backbone and LoRA, in the backbone's type, that learn."""
    adapter: int
    """Of the TTT layers and their gates, in float32."""
    adapter_learns: int
    """Of these, those that learn."""

    @property
    def learning(self) -> int:
        """All that learn."""
        return self.learns + self.adapter_learns


@dataclass(frozen=True)
class _Held:
    """Bytes of parameters and what belongs to them on one device."""

    parameters: int
    gradients: int
    summed: int
    """Of what gradients are summed in: of copies, buckets of them; if parameters are split, the whole gradients of
    several passes, which are summed after the last of these."""
    optimizer: int
    averages: int
    """Of averaged weights."""
    gathered: int
    """Of the parameters that are whole for a moment: those outside all layers and those of one layer; 0 if none is
    split."""
    next_gathered: int
    """Of those of the next layer, which are fetched meanwhile, and of what they come through; and of one layer's
    gradients before they are split."""


@dataclass(frozen=True)
class _KeptByScans:
    """Bytes that the scans of TTT layers need on one device."""

    lasting: int
    """Kept from forward to backward by scans under no checkpoint, carries included."""
    carries: int
    """Carries that are kept at the same time."""
    activations: int
    """Of everything else that is kept at the same time, and of the group that runs."""
    passing: int
    """Gradients for a moment."""


def written_layout(train: TrainConfig) -> Layout:
    """The layout that `train.parallel` writes; what it leaves to the number of processes counts as 1."""
    sizes = train.parallel.replicate, train.parallel.shard, train.parallel.tensor
    return Layout(*(1 if size == "auto" else size for size in sizes))


def enclosing_checkpoints(config: RunConfig, facts: BackboneFacts) -> tuple[int, ...]:
    """The number of activation checkpoints that recompute a scan, for each scan of a layer in one forward pass."""
    stated = facts.checkpoints_around_scans
    return (int(config.train.gradient_checkpointing),) if stated is None else stated


def estimate(config: RunConfig, facts: BackboneFacts, lora: Shapes | None = None, layout: Layout = ALONE) -> Estimate:
    """Estimate what a run needs from its config and its backbone's facts.

    With LoRA, `lora` has its linear layers by input and output width; without them the estimate is not complete.
    In a layout of several devices the bytes of memory are those of one device; files and operations are of the run.

    Both ends of the range count parameters, moments and the scan. The backbone's activations depend on kernels and on
    what is frozen: the lower end counts half of them, the upper end one and a half times. Gradients and activations
    need not exist at the same time, and recomputation runs after other memory is free; the upper end counts all of it,
    and what backward and the optimiser hold for a moment.
    """
    ttt, train = config.ttt, config.train
    layers = select_layers(config.injected.layers, facts.num_layers)
    tokens, size = facts.tokens_per_window, bytes_of(train.param_dtype)
    rows = -(-train.batch_size // layout.data_size)
    shape = {"dim": facts.dim, "num_heads": facts.num_heads, "tokens": tokens or 0, "batch_size": rows}
    scan = scan_cost(ttt, **shape, tensor=layout.tensor) if layers and tokens else None
    around = layer_activation_bytes(ttt, **shape, tensor=layout.tensor) if scan else 0
    scans = enclosing_checkpoints(config, facts)
    whole = {**shape, "tokens": tokens or ttt.mini_batch_size, "batch_size": train.batch_size}
    flops = layer_flops(ttt, **whole)

    rank = rank_of(config, facts, lora) if config.has_lora and lora else None
    of_lora = lora_parameters(lora, rank) if lora and rank else 0
    moments = moment_bytes(train.optimizer, learning_tensors(config, facts, lora, rank))
    numbers, held = _numbers(config, facts, of_lora), _held(config, facts, of_lora, moments, layout)

    kept = _kept_by_scans(config, facts, len(layers), scans, scan, around)
    model = _backbone_activation_bytes(config, facts, layers, rows)
    if model is not None and lora and rank and tokens:  # A x, for the gradient of B
        model += sum(lora.values()) * rank * size * tokens * rows
    state = scan.carry_bytes * len(layers) * 2 if scan and ttt.persistent_states else 0

    # Temporaries: gradients of the scan's inputs and of one layer, the projections in the tokens' dtype, gradients in
    # half precision before they are summed in float32, and AdamW's for all parameters at once.
    passing = kept.passing + 4 * facts.dim * facts.dim * size // layout.tensor
    graphs = 0  # on a GPU, which `auto` may be
    if scan and tokens and train.cuda_graphs == "auto" and train.device != "cpu":
        graphs = recorded_bytes(scan, WIDE * rows * tokens * facts.dim // layout.tensor)
    passing += graphs + held.gradients + numbers.learns * size // layout.shard + held.next_gathered
    always = held.parameters + held.optimizer + held.averages + held.gathered + held.summed + state
    return Estimate(
        scan=scan,
        scans=scans,
        parts=_parts(held, kept, model or 0, state, layout) | ({"CUDA graphs": graphs} if graphs else {}),
        low=always + max(held.gradients, kept.lasting + (model or 0) // 2),
        high=always + held.gradients + kept.carries + kept.activations + (model or 0) * 3 // 2 + passing,
        complete=None not in (facts.parameters, _trained_in_backbone(config, facts), model)
        and (lora is not None or not config.has_lora),
        numbers=numbers,
        adapter_bytes=numbers.adapter * WIDE + of_lora * size,
        checkpoint_bytes=_checkpoint_bytes(config, facts, numbers, of_lora, moments),
        lora_parameters=of_lora,
        lora_rank=rank,
        forward_flops=len(layers) * len(scans) * flops.forward,
        training_flops=len(layers)
        * sum(flops.training(scan.forwards(enclosing=level) if scan else 1, enclosing=level) for level in scans),
    )


def _parts(held: _Held, kept: _KeptByScans, model: int, state: int, layout: Layout) -> dict[str, int]:
    """Bytes by part; those that a run of this kind does not have are left out."""
    return {
        "parameters": held.parameters,
        "gradients": held.gradients,
        **({"gradients being summed": held.summed} if held.summed else {}),
        "optimizer": held.optimizer,
        **({"averages": held.averages} if held.averages else {}),
        **({"gathered parameters": held.gathered} if layout.shard > 1 else {}),
        "carries": kept.carries,
        "TTT activations": kept.activations,
        "backbone activations": model,
        "state": state,
    }


def learning_tensors(config: RunConfig, facts: BackboneFacts, lora: Shapes | None, rank: int | None) -> list[Tensors]:
    """The tensors that learn; those of the backbone as one in its layers and one outside, as if all were matrices."""
    train, layers = config.train, len(select_layers(config.injected.layers, facts.num_layers))
    found: list[Tensors] = []
    if train.weight_lr_multiplier:
        of_layer = layer_tensors(config.ttt, dim=facts.dim, num_heads=facts.num_heads)
        found += [each._replace(tensors=each.tensors * layers) for each in of_layer]
    if train.alpha_lr_multiplier:
        found.append(Tensors(layers * facts.gates, facts.dim))
    if train.lora_lr_multiplier and lora and rank:
        found += [Tensors(count, rank * width, rank > 1) for widths, count in lora.items() for width in widths]
    learns = _trained_in_backbone(config, facts) or 0
    outside = outside_layers(facts) if train.trainable == "all" and learns else 0
    return [*found, Tensors(1, learns - outside, is_matrix=True), Tensors(1, outside)]


Shapes = Mapping[tuple[int, int], int]
"""How many linear layers there are, by input and output width."""


def rank_of(config: RunConfig, facts: BackboneFacts, lora: Shapes) -> int:
    """The rank of LoRA in these linear layers; for `match`, the one that comes nearest to TTT's parameters."""
    rank = config.lora.rank
    return matched_rank(lora, parameters_to_match(config, facts)) if rank == "match" else rank


def parameters_to_match(config: RunConfig, facts: BackboneFacts) -> int:
    """Parameters of the TTT layers that the `ttt` section describes, whether the run has them or not."""
    return _adapter_parameters(config, facts, len(select_layers(config.ttt.layers, facts.num_layers)))[0]


def _adapter_parameters(config: RunConfig, facts: BackboneFacts, layers: int, tensor: int = 1) -> tuple[int, int]:
    """Parameters of the adapters in so many layers, on one of `tensor` devices; and how many of them learn."""
    gates = layers * facts.dim * facts.gates
    shape = {"dim": facts.dim, "num_heads": facts.num_heads, "tensor": tensor}
    own = layers * (layer_parameters(config.ttt, **shape) - facts.dim) + gates
    train = config.train
    return own, (own - gates if train.weight_lr_multiplier else 0) + (gates if train.alpha_lr_multiplier else 0)


def _numbers(config: RunConfig, facts: BackboneFacts, of_lora: int, layout: Layout = ALONE) -> Numbers:
    """The numbers of a run's parameters; those of one device of a layout."""
    layers = len(select_layers(config.injected.layers, facts.num_layers))
    own, learning = _adapter_parameters(config, facts, layers, layout.tensor)
    learns = (_trained_in_backbone(config, facts) or 0) + (of_lora if config.train.lora_lr_multiplier else 0)
    return Numbers(
        *(-(-count // layout.shard) for count in ((facts.parameters or 0) + of_lora - learns, learns, own, learning))
    )


def _held(config: RunConfig, facts: BackboneFacts, of_lora: int, moments: int, layout: Layout) -> _Held:
    """Bytes of parameters, gradients and optimiser on one device; `moments` are those of a whole copy.

    Only AdamW's are split (`ttt.parallel.layout.needs_whole_matrices`).
    In half precision the optimiser keeps a float32 master of what learns; parameters that are split and learn are
    float32 themselves, and are gathered in half precision.
    """
    size, here = bytes_of(config.train.param_dtype), _numbers(config, facts, of_lora, layout)
    split = layout.shard > 1
    masters = WIDE * here.learns if size < WIDE and not split else 0
    kept = here.frozen * size + here.learns * (WIDE if split else size) + here.adapter * WIDE
    outside, layer, learns = _units(config, facts, of_lora, layout) if split else (0, 0, 0)
    summed = 0
    if split and config.train.num_microbatches > 1:
        summed = WIDE * _numbers(config, facts, of_lora, replace(layout, shard=1)).learning
    elif not split and layout.data_size > 1:
        summed = here.learns * size + here.adapter_learns * WIDE
    return _Held(
        parameters=kept,
        gradients=WIDE * here.learning,
        summed=summed,
        optimizer=(2 * WIDE * here.learning if split or layout.tensor > 1 else moments) + masters,
        averages=0 if config.train.ema_decay is None else WIDE * here.learning,
        gathered=outside + layer,
        next_gathered=2 * layer + 2 * learns,
    )


def outside_layers(facts: BackboneFacts) -> int:
    """How many of the backbone's parameters are in none of its layers; 0 if it is not known."""
    if facts.layer_parameters is None or facts.parameters is None:
        return 0
    return max(facts.parameters - facts.layer_parameters * facts.num_layers, 0)


def _units(config: RunConfig, facts: BackboneFacts, of_lora: int, layout: Layout) -> tuple[int, int, int]:
    """Bytes of what is gathered at once: all that is outside the layers, one layer with its adapter; and of the
    float32 gradients of that layer.
    """
    size, numbers = bytes_of(config.train.param_dtype), _numbers(config, facts, of_lora)
    layers = len(select_layers(config.injected.layers, facts.num_layers))
    outside = outside_layers(facts)
    one = ((facts.parameters or 0) + of_lora - outside) // max(facts.num_layers, 1)
    adapter, learning = (
        -(-count // max(layers, 1)) for count in _adapter_parameters(config, facts, layers, layout.tensor)
    )
    learns = one if config.train.trainable == "all" else min(one, -(-numbers.learns // max(facts.num_layers, 1)))
    return outside * size, one * size + adapter * WIDE, WIDE * (learning + learns)


def _checkpoint_bytes(config: RunConfig, facts: BackboneFacts, numbers: Numbers, of_lora: int, moments: int) -> int:
    """Bytes of one checkpoint on disk; of a run that averages its weights: the averages, and the adapter twice."""
    size, averages = bytes_of(config.train.param_dtype), config.train.ema_decay is not None
    state = moments + averages * WIDE * numbers.learning + (WIDE * numbers.learns if size < WIDE else 0)
    adapter = numbers.adapter * WIDE + (of_lora + (_trained_in_backbone(config, facts) or 0)) * size
    return (1 + averages) * adapter + state


def _kept_by_scans(
    config: RunConfig, facts: BackboneFacts, layers: int, scans: tuple[int, ...], scan: ScanCost | None, around: int
) -> _KeptByScans:
    """What the scans need; `around` is what is kept around each of them."""
    if scan is None:
        return _KeptByScans(0, 0, 0, 0)
    lasting, at_once = _waiting_scans(config, facts, layers, scans)
    inside = scan.kept_bytes - scan.carries_kept_bytes + around
    return _KeptByScans(
        lasting=(scan.carries_kept_bytes + inside) * lasting,
        carries=scan.carries_kept_bytes * at_once,
        activations=inside * at_once + scan.passing_bytes,
        passing=around + scan.activation_bytes + scan.carry_bytes,
    )


def _waiting_scans(config: RunConfig, facts: BackboneFacts, layers: int, scans: tuple[int, ...]) -> tuple[int, int]:
    """How many scans keep their activations from forward to backward; and how many keep them at the same time.

    A scan under no checkpoint keeps them until backward. The others keep them while their innermost checkpoint is
    recomputed. That is the one around several layers, or inside it one around a layer's scans, or inside that one
    around a single scan.
    """
    lasting = layers * scans.count(0)
    outer = int(config.train.gradient_checkpointing)
    together = min(layers, facts.layers_per_checkpoint if outer else 1)
    inner = [level - outer for level in scans if level]
    at_once = together * inner.count(0) + min(layers, 1) * (inner.count(1) + any(level > 1 for level in inner))
    return lasting, lasting + at_once


def _trained_in_backbone(config: RunConfig, facts: BackboneFacts) -> int | None:
    """The number of the backbone's parameters that are trained; None if unknown."""
    if config.train.trainable == "ttt" or not config.train.backbone_lr_multiplier:
        return 0
    if config.train.trainable == "all" or facts.attention_parameters is None:
        return facts.parameters if config.train.trainable == "all" else None
    if config.train.trainable == "ttt+attention":
        return facts.attention_parameters
    return facts.attention_parameters * len(select_layers(config.injected.layers, facts.num_layers)) // facts.num_layers


def backward_reaches(config: RunConfig, facts: BackboneFacts, layers: tuple[int, ...]) -> int:
    """How many of the backbone's layers the backward pass goes through: it ends at the first that is trained."""
    unfrozen = config.train.trainable in ("ttt+attention", "all") and config.train.backbone_lr_multiplier
    first = 0 if unfrozen or config.has_lora else min(layers, default=0)
    return facts.num_layers - first


def _backbone_activation_bytes(
    config: RunConfig, facts: BackboneFacts, layers: tuple[int, ...], rows: int
) -> int | None:
    """Bytes that autograd keeps for the backbone on one device; None if unknown."""
    train, tokens = config.train, facts.tokens_per_window
    if tokens is None or facts.layer_activation_bytes is None or facts.head_activation_bytes is None:
        return None
    reached = backward_reaches(config, facts, layers)
    if train.gradient_checkpointing:
        together = min(facts.layers_per_checkpoint, reached)
        inputs = -(-reached // max(together, 1)) * facts.dim * bytes_of(train.param_dtype)
        per_token = inputs + together * facts.layer_activation_bytes
    else:
        per_token = reached * facts.layer_activation_bytes
    casts = 0
    if train.autocast not in ("none", train.param_dtype):
        # Backward keeps cast copies of the weights: of all layers that it reaches, or of one checkpoint at a time.
        held = min(facts.layers_per_checkpoint, reached) if train.gradient_checkpointing else reached
        share = held / max(facts.num_layers, 1)
        casts = bytes_of(train.autocast) * round(share * (facts.parameters or 0))
    return (per_token + facts.head_activation_bytes) * tokens * rows + casts
