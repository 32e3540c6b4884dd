"""What TTT layers cost, in closed form: mini-batches, recomputation, bytes, FLOPs. Imports no torch.

Symbols as in the docs: B streams, T tokens, D width, H heads, F = D/H, C tokens of a mini-batch, g mini-batches of a
checkpoint group, S bytes of fast weights, A bytes that backward needs of a mini-batch, R bytes that it needs only
while it runs. The counts of A and R are those of the operations in `ttt.ops`, and are held against measurements in the
tests.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from ttt.config.schema import TTTConfig, inner_widths
from ttt.ops.constants import BLOCK, SMALL

WIDE = 4
"""Bytes of a number in float32: fast weights, TTT parameters, moments."""
_BYTES = {"float32": 4, "bfloat16": 2}


def bytes_of(dtype: str) -> int:
    """Bytes of a number in a `train.param_dtype`."""
    return _BYTES[dtype]


COUNTED = 1 << 20
"""Mini-batches up to which the best group is searched for among all; beyond, around where it must be."""


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
        """`ceil(N / g)` checkpoints; 0 if everything is kept."""
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
        """The g of least memory, about `√(N S / (S + A + R))`; the smallest of those, 0 if keeping everything is."""
        return best_group_size(
            self.steps, carry=self.carry_bytes, activation=self.activation_bytes, running=self.running_bytes
        )


def best_group_size(steps: int, *, carry: int, activation: int, running: int) -> int:
    """The group of least peak memory for N mini-batches; see `ScanCost`.

    In plain numbers and one short loop, which `torch.compile` can follow if a layer asks while it runs. The loop is
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
        carry_bytes=WIDE * state,
        activation_bytes=WIDE * pairs * _fused_numbers(widths, size),
        running_bytes=WIDE * pairs * _running_numbers(widths, size),
        outside_bytes=WIDE * sum(beside(count) + (state if steps else 0) for count in open_tokens if count),
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
    """What autograd keeps of a mini-batch of `count` tokens beside the scan, if it is small, in numbers.

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
    the answer; 2 more if q and k are normalised, 3 if the target is, 1 if the input is.
    """
    widths = 7 + 2 * config.normalize_qk + 3 * config.normalize_target + (config.input_norm == "rms")
    heads = config.num_heads or num_heads
    per_head = heads * (3 + 4 * config.normalize_qk + 2 * config.normalize_target)
    return WIDE * batch_size * tokens * (widths * dim + per_head)


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
