"""What a run costs, in closed form: mini-batches, recomputation, bytes in memory and on disk. Imports no torch.

Symbols as in the docs: B streams, T tokens, D width, H heads, F = D/H, C tokens of a mini-batch, g mini-batches of a
checkpoint group, S bytes of fast weights, A bytes that backward needs of a mini-batch, R bytes that it needs only
while it runs. The counts of A and R are those of the operations in `ttt.ops`, and are held against measurements in the
tests.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ttt.config.schema import RunConfig, TTTConfig, inner_widths, select_layers

if TYPE_CHECKING:
    from ttt.plugins.backbone import BackboneFacts

_WIDE = 4
"""Bytes of a number in float32: fast weights, TTT parameters, moments."""
_BYTES = {"float32": 4, "bfloat16": 2}
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("KMGTP", 1)
    for ending, base in (("B", 1000), ("iB", 1024), ("", 1024))
}


def bytes_of(dtype: str) -> int:
    """Bytes of a number in a `train.param_dtype`."""
    return _BYTES[dtype]


def parse_bytes(text: str) -> int:
    """`80GiB`, `24 GB`, `512M` as bytes; a prefix alone is binary, as is `GiB`.

    Raises:
        ValueError: it is no positive amount of bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    units = {unit.casefold(): factor for unit, factor in _UNITS.items()}
    factor = units.get(match[2].casefold()) if match else None
    if match is None or factor is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is no amount of memory; write one such as 80GiB, 24GB or 512MiB")
    return int(float(match[1]) * factor)


def show_bytes(count: float) -> str:
    """An amount for people, in binary units and three digits: `14.3 GiB`."""
    if abs(count) > 1 << 80:  # beyond what a float divides, in a config that nobody means
        return "more than 10^12 TiB"
    if abs(count) < 1000:
        return f"{count:.0f} bytes"
    power = 1
    while abs(count) / 1024**power >= 999.5 and power < 4:
        power += 1
    return f"{count / 1024**power:.3g} {'KMGT'[power - 1]}iB"


# --- the scan ---

SMALL = 1 << 17
"""`ttt.ops.select.SMALL`, below which a mini-batch beside the scan runs by autograd on a CPU."""
COUNTED = 1 << 20
"""Mini-batches up to which the best group is searched for among all; beyond, around where it must be."""
BLOCK = 16
"""`ttt.ops.fused.BLOCK`: mini-batches that run at a time where no group says how many."""


@dataclass(frozen=True)
class ScanCost:
    """What the scan of one TTT layer runs and keeps for one batch."""

    steps: int
    """Mini-batches that go through the scan."""
    group_size: int
    """g, as the config has it; what `auto` comes to."""
    carry_bytes: int
    """S: fast weights of the batch's streams in one layer."""
    activation_bytes: int
    """A: what backward needs of one mini-batch, beside its inputs and the carry that opens it."""
    running_bytes: int
    """What one mini-batch needs only while its group runs: its tokens once more, laid out for the products, and room
    for what these give. A group has it for all of its mini-batches at once on a GPU, for as many as fit on a CPU."""
    outside_bytes: int
    """What it keeps of mini-batches that a window leaves or finds open, beside the scan, and the carries they need."""

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing is recomputed: g is 0, or no smaller than the scan."""
        return self.group_size == 0 or self.group_size >= self.steps

    @property
    def groups(self) -> int:
        """`ceil(N / g)` checkpoints; 0 where everything is kept."""
        return 0 if self.keeps_everything else -(-self.steps // self.group_size)

    def forwards(self, *, enclosing: int = 0) -> int:
        """How often every inner step of the scan runs forward in a training step, under so many checkpoints around."""
        return 1 + enclosing + (not self.keeps_everything)

    @property
    def kept_carries(self) -> int:
        """Carries kept between forward and backward; the first is the layer's own parameter."""
        return max((self.steps if self.keeps_everything else self.groups) - 1, 0)

    @property
    def carries_kept_bytes(self) -> int:
        """Their bytes."""
        return self.kept_carries * self.carry_bytes

    @property
    def kept_bytes(self) -> int:
        """What waits between forward and backward: carries, and where everything is kept all activations."""
        everything = 0
        if self.keeps_everything and self.steps:  # the layer's own weights too, copied for every stream
            everything = self.steps * self.activation_bytes + self.carry_bytes
        return self.carries_kept_bytes + everything + self.outside_bytes

    @property
    def passing_bytes(self) -> int:
        """What backward makes room for, once for all groups: what a group keeps while it runs again, and what it needs
        to run. Where everything was kept, the latter alone.
        """
        if self.keeps_everything:
            return min(self.steps, BLOCK) * self.running_bytes
        return self.group_size * (self.activation_bytes + self.running_bytes + self.carry_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most that there is at once: `(N/g) S + g (S + A + R)`, R what a mini-batch needs to run; or all of it."""
        return self.kept_bytes + self.passing_bytes

    def with_group_size(self, group_size: int) -> ScanCost:
        """The same scan in other groups."""
        return replace(self, group_size=group_size)

    def best_group_size(self) -> int:
        """The g of least memory, about `√(N S / (S + A + R))`; the smallest of those, 0 where keeping everything is."""
        return best_group_size(
            self.steps, carry=self.carry_bytes, activation=self.activation_bytes, running=self.running_bytes
        )


def best_group_size(steps: int, *, carry: int, activation: int, running: int) -> int:
    """The group of least peak memory for N mini-batches; see `ScanCost`.

    In plain numbers and one short loop, which `torch.compile` can follow where a layer asks while it runs. The loop is
    short for any N: of more than `COUNTED` mini-batches, which nothing runs, it tries the sizes around the formula's.
    """
    best, least = 0, steps * (carry + activation) + min(steps, BLOCK) * running
    root = 1
    while root * root < min(steps, COUNTED):
        root += 1
    first = 0
    if steps > COUNTED:
        first = max(math.isqrt(steps * carry // max(carry + activation + running, 1)) - root, 0)
    for index in range(1, 2 * root + 1):  # the sizes up to √N, then those of √N groups and fewer
        if steps > COUNTED:
            size = -(-steps // -(-steps // (first + index)))  # the smallest that gives as many groups
        else:
            size = index if index <= root else -(-steps // (2 * root + 1 - index))
        if size < steps:
            peak = (-(-steps // size) - 1) * carry + size * (carry + activation + running)
            if peak < least:
                best, least = size, peak
    return best


def scan_cost(config: TTTConfig, *, dim: int, num_heads: int, tokens: int, batch_size: int) -> ScanCost:
    """What the scan of one layer costs in training.

    Args:
        config: the `ttt` section.
        dim: D.
        num_heads: of the backbone.
        tokens: T, of a window.
        batch_size: B.
    """
    heads = config.num_heads or num_heads
    size = config.mini_batch_size
    open_tokens: tuple[int, ...]
    if config.causal and config.persistent_states and tokens % size:
        # A window may begin anywhere in a mini-batch: what it finds open, and what it leaves open, run beside the scan.
        steps, open_tokens = (tokens - 1) // size, (min(tokens, size),) * 2
    else:
        steps, open_tokens = tokens // size, (tokens % size,)
    widths = inner_widths(dim // heads, config)
    pairs = heads * batch_size
    state = _state_numbers(widths) * pairs

    def beside(count: int) -> int:
        if pairs * count * max(widths) >= SMALL:
            return pairs * _fused_numbers(widths, count) + state
        return _generic_numbers(widths, count, batch_size, heads, learned=config.learnable_token_idx)

    wanted = config.scan_checkpoint_group_size
    cost = ScanCost(
        steps=steps,
        group_size=0 if wanted == "auto" else wanted,
        carry_bytes=_WIDE * state,
        activation_bytes=_WIDE * pairs * _fused_numbers(widths, size),
        running_bytes=_WIDE * pairs * _running_numbers(widths, size),
        outside_bytes=_WIDE * sum(beside(count) + (state if steps else 0) for count in open_tokens if count),
    )
    return cost.with_group_size(cost.best_group_size()) if wanted == "auto" else cost


def _state_numbers(widths: tuple[int, ...]) -> int:
    """Fast weights of one head."""
    return sum((fan_in + 1) * fan_out for fan_in, fan_out in itertools.pairwise(widths))


def _fused_numbers(widths: tuple[int, ...], count: int) -> int:
    """What the fused scan keeps of one head of a mini-batch of `count` tokens, in numbers.

    Of each hidden width: 2 that keys and queries give the next layer, 3 derivatives of GELU, 1 error. Of width F: the
    outputs of keys and queries and 1 error; 4 moments. `C²` for each matrix.
    """
    hidden = widths[1:-1]
    return count * (6 * sum(hidden) + 2 * len(hidden) + 3 * widths[-1] + 4 + (len(widths) - 1) * count)


def _running_numbers(widths: tuple[int, ...], count: int) -> int:
    """What the fused scan has of one head of a mini-batch only while it runs it, in numbers.

    Laid out, of width F: keys and queries, keys once more, target and its anchor; rates, and what each token is to each
    other one. Room, of the first layer's output: 2. Of each hidden width: 3 that GELU and its derivatives share; of
    those after the first 1 more. Of each output after the first: 3 gradients. Of width F: 13 of what goes back through
    the norm.
    """
    laid_out = 5 * widths[0] + 5 + count
    forward = 2 * widths[1] + 3 * sum(widths[1:-1]) + sum(widths[2:-1])
    backward = 3 * sum(widths[2:]) + 13 * widths[0] + 3
    return count * (laid_out + forward + backward)


def _generic_numbers(widths: tuple[int, ...], count: int, batch_size: int, heads: int, *, learned: bool) -> int:
    """What autograd keeps of a mini-batch of `count` tokens beside the scan, where it is small, in numbers.

    Of width F: 5 in the inner gradient, 1 error, 1 taught, 2 in the layer norm of the answer. Of each hidden width: 2
    of the keys, 7 in the derivative of GELU, 2 in its product, 1 error, 1 taught, 2 of the queries. Both one more where
    the rates' layout makes the products copy what is taught, and where step sizes are learned. `C²` for each matrix.
    """
    more = (batch_size > 1 and heads > 1) + learned
    head = (9 + more) * widths[-1] + 3 + (len(widths) - 1) * count + (15 + more) * sum(widths[1:-1])
    return batch_size * heads * count * head


# --- the layer ---


def layer_parameters(config: TTTConfig, *, dim: int, num_heads: int) -> int:
    """Parameters of one TTT layer with its gate."""
    heads = config.num_heads or num_heads
    projections = 4 * dim * dim + (4 * dim if config.qkvo_bias else 0)
    inner = heads * _state_numbers(inner_widths(dim // heads, config))
    norms = 4 * dim
    rates = heads * (dim + 1) + (config.mini_batch_size if config.learnable_token_idx else 0)
    return projections + inner + norms + rates + dim


def layer_activation_bytes(config: TTTConfig, *, dim: int, num_heads: int, tokens: int, batch_size: int) -> int:
    """What autograd keeps of a layer and its gate around the scan, the scan's inputs included.

    Of width D for each token: the input, q, k and the target, what goes into and comes out of the output's norm, and
    the answer; 2 more where q and k are normalised, 3 where the target is, 1 where the input is.
    """
    widths = 7 + 2 * config.normalize_qk + 3 * config.normalize_target + (config.input_norm == "rms")
    heads = config.num_heads or num_heads
    narrow = heads * (3 + 4 * config.normalize_qk + 2 * config.normalize_target)
    return _WIDE * batch_size * tokens * (widths * dim + narrow)


# --- arithmetic ---


@dataclass(frozen=True)
class LayerFlops:
    """Operations of one TTT layer in one forward pass, a multiplication with its addition counted as two.

    Matrix products alone: what else there is, norms and GELU, is less than a tenth at any width that is worth a GPU.
    """

    projections: int
    """Of the projections to q, k, v, the rates and the output."""
    scan: int
    """Of the full mini-batches."""
    beside: int
    """Of the mini-batch that a window leaves open, which no group runs again."""

    @property
    def forward(self) -> int:
        """All of it."""
        return self.projections + self.scan + self.beside

    def training(self, scan_forwards: int, *, enclosing: int = 0) -> int:
        """With backward, twice a forward, and with every forward that is run again.

        Args:
            scan_forwards: how often the scan runs forward, `ScanCost.forwards`.
            enclosing: activation checkpoints around the layer.
        """
        return (3 + enclosing) * (self.projections + self.beside) + (2 + scan_forwards) * self.scan


def layer_flops(config: TTTConfig, *, dim: int, num_heads: int, tokens: int, batch_size: int) -> LayerFlops:
    """What one layer multiplies in one forward pass over windows that begin a mini-batch.

    A token and head of a mini-batch of C multiplies, for each matrix of the inner model, `in × out`: its key, its query
    and its gradient with the matrix, `6 in·out`, and `2 in·out` more for every matrix after the first, to carry the
    gradient back; and `2 C (in + out)` for what it has in common with the other tokens. Linear: `6F² + 4CF`; the MLP of
    two layers: `56F² + 20CF`. Biases ride along.

    Args:
        config: the `ttt` section.
        dim: D.
        num_heads: of the backbone.
        tokens: T, of a window.
        batch_size: B.
    """
    heads, size = config.num_heads or num_heads, config.mini_batch_size
    matrices = list(itertools.pairwise(inner_widths(dim // heads, config)))
    of_matrices = 8 * sum(fan_in * fan_out for fan_in, fan_out in matrices) - 2 * matrices[0][0] * matrices[0][1]

    def learning(count: int, among: int) -> int:
        return batch_size * heads * count * (of_matrices + 2 * among * sum(map(sum, matrices)))

    rest = tokens % size
    return LayerFlops(
        projections=batch_size * tokens * (8 * dim * dim + 2 * dim * heads),
        scan=learning(tokens - rest, size),
        beside=learning(rest, rest),
    )


def show_flops(count: float) -> str:
    """Operations for people, in three digits: `1.23 TFLOP`."""
    if count > 1e24:  # in a config that nobody means
        return "more than 10^24 FLOP"
    power = 0
    while count / 1000**power >= 999.5 and power < 6:
        power += 1
    return f"{count / 1000**power:.3g} {'kMGTPE'[power - 1] if power else ''}FLOP"


# --- the run ---


@dataclass(frozen=True)
class Estimate:
    """What a run needs."""

    scan: ScanCost | None
    """Of one TTT layer; None where windows have no known length, or there are no layers."""
    scans: tuple[int, ...]
    """Activation checkpoints around each scan of one layer, as `enclosing_checkpoints` gives them."""
    parts: Mapping[str, int]
    """Peak bytes by part, best guess; without `complete`, TTT's alone."""
    low: int
    """Bytes of device memory below which it will not run."""
    high: int
    """Bytes with which it will."""
    complete: bool
    """Whether the backbone said what it needs, so that `low` and `high` are about the whole run."""
    adapter_bytes: int
    """On disk."""
    checkpoint_bytes: int
    """One checkpoint on disk: the adapter, trained parameters of the backbone, the optimiser."""
    forward_flops: int
    """Of all TTT layers, in one forward pass over a batch; of one mini-batch where windows have no known length."""
    training_flops: int
    """The same with backward and all that runs again."""

    def breakdown(self, count: int = 4) -> str:
        """The largest parts, for a sentence."""
        largest = sorted(self.parts.items(), key=lambda part: -part[1])[:count]
        return ", ".join(f"{name} {show_bytes(size)}" for name, size in largest if size)


def enclosing_checkpoints(config: RunConfig, facts: BackboneFacts) -> tuple[int, ...]:
    """For each scan of a layer in a forward pass, how many activation checkpoints around it recompute it."""
    return (int(config.train.gradient_checkpointing),) if facts.scans is None else facts.scans


def estimate(config: RunConfig, facts: BackboneFacts) -> Estimate:
    """What a run needs, from its config and its backbone's facts.

    The range: parameters, moments and the scan are counted, and in both ends. Of the backbone's activations, which hang
    on kernels and on what is frozen, there is half in one end and one and a half in the other. Gradients and
    activations need not be there at once, and what runs again does so when other things are gone; the upper end has it
    all, and what backward and the optimiser hold for a moment.
    """
    ttt, train = config.ttt, config.train
    layers = select_layers(ttt.layers, facts.num_layers)
    tokens, batch, size = facts.tokens_per_window, train.batch_size, _BYTES[train.param_dtype]
    shape = {"dim": facts.dim, "num_heads": facts.num_heads, "tokens": tokens or 0, "batch_size": batch}
    scan = scan_cost(ttt, **shape) if layers and tokens else None
    around = layer_activation_bytes(ttt, **shape) if scan else 0
    scans = enclosing_checkpoints(config, facts)
    flops = layer_flops(ttt, **{**shape, "tokens": tokens or ttt.mini_batch_size})

    gates = len(layers) * facts.dim * facts.gates
    own = len(layers) * (layer_parameters(ttt, dim=facts.dim, num_heads=facts.num_heads) - facts.dim) + gates
    learning = (own - gates if train.weight_lr_multiplier else 0) + (gates if train.alpha_lr_multiplier else 0)
    trained = _trained_in_backbone(config, facts)
    optimizer = 2 * _WIDE * (learning + (trained or 0)) + (_WIDE * (trained or 0) if size < _WIDE else 0)
    gradients = _WIDE * (learning + (trained or 0))

    # Scans whose insides wait for backward: all of those that nothing recomputes, and of the others one checkpoint's.
    lasting = len(layers) * scans.count(0)
    together = facts.layers_per_checkpoint if train.gradient_checkpointing else 1
    at_once = lasting + min(len(layers), together) * (len(scans) - scans.count(0))
    carries = scan.carries_kept_bytes * at_once if scan else 0
    inside = scan.kept_bytes - scan.carries_kept_bytes + around if scan else 0
    waiting = inside * at_once
    passing_scan = scan.passing_bytes if scan else 0
    model = _backbone_activation_bytes(config, facts, layers)
    state = scan.carry_bytes * len(layers) * 2 if scan and ttt.persistent_states else 0
    parameters = (facts.parameters or 0) * size + own * _WIDE

    # Gradients of the scan's inputs and of one layer, the projections in the tokens' type, halves of the gradients
    # before they are summed in float32, and what AdamW takes for all parameters at once.
    passing = (around + scan.activation_bytes + scan.carry_bytes) if scan else 0
    passing += 4 * facts.dim * facts.dim * size + gradients + (trained or 0) * size
    always = parameters + optimizer + state
    return Estimate(
        scan=scan,
        scans=scans,
        parts={
            "parameters": parameters,
            "gradients": gradients,
            "optimizer": optimizer,
            "carries": carries,
            "TTT activations": waiting + passing_scan,
            "backbone activations": model or 0,
            "state": state,
        },
        low=always + max(gradients, (scan.carries_kept_bytes + inside if scan else 0) * lasting + (model or 0) // 2),
        high=always + gradients + carries + waiting + passing_scan + (model or 0) * 3 // 2 + passing,
        complete=None not in (facts.parameters, trained, model),
        adapter_bytes=own * _WIDE,
        checkpoint_bytes=own * _WIDE + (trained or 0) * size + optimizer,
        forward_flops=len(layers) * len(scans) * flops.forward,
        training_flops=len(layers)
        * sum(flops.training(scan.forwards(enclosing=level) if scan else 1, enclosing=level) for level in scans),
    )


def _trained_in_backbone(config: RunConfig, facts: BackboneFacts) -> int | None:
    """Parameters of the backbone that learn; None where that is not known."""
    if config.train.trainable == "ttt" or not config.train.backbone_lr_multiplier:
        return 0
    return facts.parameters if config.train.trainable == "all" else facts.attention_parameters


def _backbone_activation_bytes(config: RunConfig, facts: BackboneFacts, layers: tuple[int, ...]) -> int | None:
    """What autograd keeps of the backbone; None where that is not known."""
    train, tokens = config.train, facts.tokens_per_window
    if tokens is None or facts.layer_activation_bytes is None or facts.head_activation_bytes is None:
        return None
    # Below the first layer that learns there is nothing to go back to.
    first = 0 if train.trainable != "ttt" and train.backbone_lr_multiplier else min(layers, default=0)
    reached = facts.num_layers - first
    if train.gradient_checkpointing:
        together = min(facts.layers_per_checkpoint, reached)
        inputs = -(-reached // max(together, 1)) * facts.dim * _BYTES[train.param_dtype]
        per_token = inputs + together * facts.layer_activation_bytes
    else:
        per_token = reached * facts.layer_activation_bytes
    casts = 0
    if train.autocast not in ("none", train.param_dtype):
        # Backward keeps the weights as they were cast: of all layers that it reaches, or of one at a time.
        held = min(facts.layers_per_checkpoint, reached) if train.gradient_checkpointing else reached
        share = held / max(facts.num_layers, 1)
        casts = _BYTES[train.autocast] * round(share * (facts.parameters or 0))
    return (per_token + facts.head_activation_bytes) * tokens * train.batch_size + casts
