"""What TTT layers cost, in closed form: mini-batches, recomputation, bytes, FLOPs. Imports no torch.

Symbols: B streams, T tokens, D width, H heads, F = D/H, C tokens in a mini-batch, N mini-batches, g mini-batches in a
checkpoint group. In bytes: S the fast weights, A what backward needs of a mini-batch, R what a mini-batch needs only
while it runs. A and R count the operations of `ttt.ops`; tests compare them with measurements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from ttt.config.schema import TTTConfig, inner_widths
from ttt.ops.constants import ALIGNED, BLOCK, MOST_BYTES_OF_ONE, MOST_BYTES_RECORDED, SMALL

WIDE = 4
"""Bytes of a float32 number: fast weights, TTT parameters and the optimizer's moments are float32."""
_BYTES = {"float32": 4, "bfloat16": 2}


def bytes_of(dtype: str) -> int:
    """Bytes of one number of a `train.param_dtype`."""
    return _BYTES[dtype]


COUNTED = 1 << 20
"""Up to this many mini-batches, the search for the best group tries every size that can be best; beyond, it tries the
sizes around the formula's."""


@dataclass(frozen=True)
class ScanCost:
    """What the scan of one TTT layer runs and keeps for one batch."""

    steps: int
    """N: mini-batches that go through the scan."""
    group_size: int
    """g of the config; for `auto`, the size it chooses."""
    carry_bytes: int
    """S: fast weights of the batch's streams in one layer."""
    activation_bytes: int
    """A: what backward needs of one mini-batch besides its inputs and the carry that opens it."""
    running_bytes: int
    """R: what one mini-batch needs only while its group runs: a copy of its tokens, laid out for the matrix products,
    and room for the results. A group on a GPU needs it for all its mini-batches at once, on a CPU for as many as fit.
    """
    following_bytes: int
    """The fast weights after the last mini-batch of a group, which non-causal queries read; 0 if causal."""
    outside_bytes: int
    """What is kept outside the scan for mini-batches that a window finds or leaves open, with the carries they need."""

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing is recomputed: g is 0, or at least the number of mini-batches."""
        return self.group_size == 0 or self.group_size >= self.steps

    @property
    def groups(self) -> int:
        """The number of checkpoint groups, `ceil(N / g)`; 0 if everything is kept."""
        return 0 if self.keeps_everything else -(-self.steps // self.group_size)

    def forwards(self, *, enclosing: int = 0) -> int:
        """How often each inner step runs forward in one training step.

        Args:
            enclosing: activation checkpoints around the layer.
        """
        return 1 + enclosing + (not self.keeps_everything)

    @property
    def kept_carries(self) -> int:
        """Carries kept between forward and backward; the first is the layer's own parameter."""
        return max((self.steps if self.keeps_everything else self.groups) - 1, 0)

    @property
    def carries_kept_bytes(self) -> int:
        """Bytes of the carries kept between forward and backward."""
        return self.kept_carries * self.carry_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes held between forward and backward: carries, and all activations if everything is kept."""
        everything = 0
        if self.keeps_everything and self.steps:  # and the layer's own weights, copied for every stream
            everything = self.steps * self.activation_bytes + self.carry_bytes + self.following_bytes
        return self.carries_kept_bytes + everything + self.outside_bytes

    @property
    def passing_bytes(self) -> int:
        """Bytes that backward allocates once for all groups: what a group keeps while it is recomputed, and what it
        needs to run. If everything was kept, only what it needs to run.
        """
        if self.keeps_everything:
            return min(self.steps, BLOCK) * self.running_bytes
        of_group = self.group_size * (self.activation_bytes + self.running_bytes + self.carry_bytes)
        return of_group + self.following_bytes

    @property
    def peak_bytes(self) -> int:
        """The peak: about `(N/g) S + g (S + A + R)`, or everything if everything is kept."""
        return self.kept_bytes + self.passing_bytes

    def with_group_size(self, group_size: int) -> ScanCost:
        """The same scan with another group size."""
        return replace(self, group_size=group_size)

    def best_group_size(self) -> int:
        """The g of least peak memory, about `√(N S / (S + A + R))`; on a tie the smallest, or 0 to keep everything."""
        return best_group_size(
            self.steps, carry=self.carry_bytes, activation=self.activation_bytes, running=self.running_bytes
        )


def recorded_bytes(scan: ScanCost, tokens: int) -> int:
    """About what recordings of a scan's two passes take (`ttt.ops.replay`); `tokens` are the bytes of all queries."""
    state, kept = scan.carry_bytes, scan.kept_bytes
    of_passes = (3 * tokens + state, tokens + state + kept), (4 * tokens + 2 * state + kept, 3 * tokens + state)
    recorded = [
        sum(arguments_results) for arguments_results in of_passes if sum(arguments_results) <= MOST_BYTES_OF_ONE
    ]
    return min(sum(recorded), MOST_BYTES_RECORDED) + (scan.passing_bytes if recorded else 0)


def best_group_size(steps: int, *, carry: int, activation: int, running: int) -> int:
    """The group size of least peak memory for N mini-batches; see `ScanCost`.

    It uses plain numbers and one short loop, so that `torch.compile` can trace a layer that calls it. The loop is short
    for any N: above `COUNTED` mini-batches, which no run reaches, it tries only sizes around the formula's.
    """
    best, least = 0, steps * (carry + activation) + min(steps, BLOCK) * running
    root = 1
    while root * root < min(steps, COUNTED):
        root += 1
    first = 0
    if steps > COUNTED:
        first = max(math.isqrt(steps * carry // max(carry + activation + running, 1)) - root, 0)
    for index in range(1, 2 * root + 1):  # sizes up to √N, then sizes that give √N groups or fewer
        if steps > COUNTED:
            size = -(-steps // -(-steps // (first + index)))  # the smallest size with the same number of groups
        else:
            size = index if index <= root else -(-steps // (2 * root + 1 - index))
        if size < steps:
            peak = (-(-steps // size) - 1) * carry + size * (carry + activation + running)
            if peak < least:
                best, least = size, peak
    return best


def scan_cost(
    config: TTTConfig, *, dim: int, num_heads: int, tokens: int, batch_size: int, tensor: int = 1
) -> ScanCost:
    """What the scan of one layer costs in training.

    Args:
        config: the `ttt` section.
        dim: D.
        num_heads: heads of the backbone.
        tokens: T, tokens of a window.
        batch_size: B.
        tensor: devices that share the heads; the cost is that of one of them.
    """
    width = dim // (config.num_heads or num_heads)
    heads = (config.num_heads or num_heads) // tensor
    size = config.mini_batch_size
    open_tokens: tuple[int, ...]
    if config.causal and config.persistent_states and tokens % size:
        # A window may begin inside a mini-batch: the one it finds open and the one it leaves open run outside the scan.
        steps, open_tokens = (tokens - 1) // size, (min(tokens, size),) * 2
    else:
        steps, open_tokens = tokens // size, (tokens % size,)
    widths = inner_widths(width, config)
    pairs = heads * batch_size
    state = _state_numbers(widths) * pairs

    def beside(count: int) -> int:
        if pairs * count * max(widths) >= SMALL:
            return pairs * _fused_numbers(widths, count, dual=True) + state
        return _generic_numbers(widths, count, batch_size, heads, learned=config.learnable_token_idx)

    wanted = config.scan_checkpoint_group_size
    cost = ScanCost(
        steps=steps,
        group_size=0 if wanted == "auto" else wanted,
        carry_bytes=WIDE * state,
        activation_bytes=WIDE * pairs * _fused_numbers(widths, size, dual=config.causal),
        running_bytes=WIDE * pairs * _running_numbers(widths, size, dual=config.causal),
        following_bytes=0 if config.causal else WIDE * (state + pairs * _zeros_below(widths)),
        outside_bytes=WIDE * sum(beside(count) + (state if steps else 0) for count in open_tokens if count),
    )
    return cost.with_group_size(cost.best_group_size()) if wanted == "auto" else cost


def _state_numbers(widths: tuple[int, ...]) -> int:
    """How many fast weights one head has."""
    return sum((fan_in + 1) * fan_out for fan_in, fan_out in itertools.pairwise(widths))


def _joined(width: int) -> int:
    """A width with its column of ones and the zeros that align it on a GPU; on a CPU there are none."""
    return -(-(width + 1) // ALIGNED) * ALIGNED


def _zeros_below(widths: tuple[int, ...]) -> int:
    """How many zeros stand below the biases of one head where the fused scan lays its weights out, on a GPU."""
    return sum((_joined(fan_in) - fan_in - 1) * fan_out for fan_in, fan_out in itertools.pairwise(widths))


def _fused_numbers(widths: tuple[int, ...], count: int, *, dual: bool) -> int:
    """How many numbers the fused scan keeps for one head of a mini-batch of `count` tokens.

    For each token and hidden layer, of its width: 2 outputs to the next layer (keys and queries), with ones and zeros,
    3 derivatives of GELU, 1 error. For each token, of width F: 2 outputs (keys and queries) and 1 error; and 4 moments.
    For each matrix: zeros below its bias, and `C²` if the queries answer in dual form.
    """
    of_hidden = sum(2 * _joined(width) + 4 * width for width in widths[1:-1])
    among = (len(widths) - 1) * count if dual else 0
    return count * (of_hidden + 3 * widths[-1] + 4 + among) + _zeros_below(widths)


def _running_numbers(widths: tuple[int, ...], count: int, *, dual: bool) -> int:
    """How many numbers the fused scan holds for one head of a mini-batch only while it runs.

    Laid out for each token, of width F: key, query, the key once more, target and its anchor; the rates; and, in dual
    form, a coefficient for each other token. Scratch for each token: 2 outputs of the first layer, or the output and
    the gradient of the answer; for each hidden layer 3 that GELU and its derivatives share, and 1 more if it is not the
    first; 3 gradients of each output after the first; and of width F what the way back through the norm takes.
    """
    laid_out = 3 * _joined(widths[0]) + 2 * widths[0] + 2 + (count if dual else 0)
    forward = 2 * widths[1] + 3 * sum(widths[1:-1]) + sum(widths[2:-1])
    backward = 3 * sum(widths[2:]) + (12 if dual else 11) * widths[0] + _joined(widths[0]) + 2
    return count * (laid_out + forward + backward)


def _generic_numbers(widths: tuple[int, ...], count: int, batch_size: int, heads: int, *, learned: bool) -> int:
    """How many numbers autograd keeps for a small mini-batch of `count` tokens outside the scan.

    For each token, of width F: 5 in the inner gradient, 1 error, 1 update, 2 in the layer norm of the answer. For each
    token and hidden layer, of its width: 2 for the keys, 7 in the derivative of GELU, 2 in its product, 1 error, 1
    update, 2 for the queries. Each sum is one more if the layout of the rates makes the products copy the update, and
    one more if step sizes are learned. For each matrix: `C²`.
    """
    more = (batch_size > 1 and heads > 1) + learned
    head = (9 + more) * widths[-1] + 3 + (len(widths) - 1) * count + (15 + more) * sum(widths[1:-1])
    return batch_size * heads * count * head


# --- the layer ---


class Tensors(NamedTuple):
    """So many tensors of a kind among the parameters."""

    tensors: int
    numbers: int
    """Of each."""
    is_matrix: bool = False
    """Whether each is a matrix, or a stack of matrices, that Muon updates."""


def layer_tensors(config: TTTConfig, *, dim: int, num_heads: int, tensor: int = 1) -> list[Tensors]:
    """The parameters of one TTT layer without its gate; of `tensor` devices that share its heads, one of them."""
    width = dim // (config.num_heads or num_heads)
    heads = (config.num_heads or num_heads) // tensor
    own = dim // tensor
    tensors = [Tensors(4, dim * own, is_matrix=True)]
    if config.qkvo_bias:
        tensors += [Tensors(3, own), Tensors(1, dim)]
    for fan_in, fan_out in itertools.pairwise(inner_widths(width, config)):
        tensors += [Tensors(1, heads * fan_in * fan_out, is_matrix=True), Tensors(1, heads * fan_out)]
    tensors += [Tensors(2, own), Tensors(2, dim)]  # the inner norm, and the one after the layer
    tensors += [Tensors(1, heads * dim), Tensors(1, heads)]  # the learned rates
    return [*tensors, *([Tensors(1, config.mini_batch_size)] if config.learnable_token_idx else [])]


def layer_parameters(config: TTTConfig, *, dim: int, num_heads: int, tensor: int = 1) -> int:
    """How many parameters one TTT layer and its gate have; of `tensor` devices that share its heads, one of them."""
    tensors = layer_tensors(config, dim=dim, num_heads=num_heads, tensor=tensor)
    return sum(each.tensors * each.numbers for each in tensors) + dim


SMALL_8BIT = 4096
"""bitsandbytes keeps float32 moments of parameters with fewer numbers (`min_8bit_size`)."""
BLOCK_8BIT = 256
"""Numbers of an 8-bit moment that share a scale."""


def moment_bytes(optimizer: str, tensors: Iterable[Tensors]) -> int:
    """Bytes of what a `train.optimizer` keeps of these parameters beside them, without its counts of steps."""
    return sum(each.tensors * _moment_bytes(optimizer, each) for each in tensors)


def _moment_bytes(optimizer: str, tensor: Tensors) -> int:
    if optimizer == "muon" and tensor.is_matrix:
        return WIDE * tensor.numbers
    if optimizer == "adamw_8bit" and tensor.numbers >= SMALL_8BIT:
        return 2 * (tensor.numbers + WIDE * -(-tensor.numbers // BLOCK_8BIT))
    return 2 * WIDE * tensor.numbers


def layer_activation_bytes(
    config: TTTConfig, *, dim: int, num_heads: int, tokens: int, batch_size: int, tensor: int = 1
) -> int:
    """Bytes that autograd keeps for a layer and its gate around the scan, the scan's inputs included.

    For each token, of width D: the input, q, k, the target, the input and the output of the output norm, and the
    answer; 2 more if q and k are normalised, 3 more if the target is, 1 more if the input is. Of `tensor` devices that
    share the heads, each has the input and the answer, and its part of the rest.
    """
    whole = 2 + (config.input_norm == "rms")
    by_head = 5 + 2 * config.normalize_qk + 3 * config.normalize_target
    heads = (config.num_heads or num_heads) // tensor
    per_head = heads * (3 + 4 * config.normalize_qk + 2 * config.normalize_target)
    return WIDE * batch_size * tokens * (whole * dim + by_head * dim // tensor + per_head)


# --- LoRA ---


def lora_parameters(shapes: Mapping[tuple[int, int], int], rank: int) -> int:
    """How many parameters LoRA of a rank has, in so many linear layers by input and output width."""
    return rank * sum(count * (fan_in + fan_out) for (fan_in, fan_out), count in shapes.items())


def matched_rank(shapes: Mapping[tuple[int, int], int], parameters: int) -> int:
    """The rank, at least 1, with which LoRA in these linear layers comes nearest to so many parameters."""
    of_one = lora_parameters(shapes, 1)
    below = max(1, parameters // of_one)
    return min((below, below + 1), key=lambda rank: abs(rank * of_one - parameters))


# --- arithmetic ---


@dataclass(frozen=True)
class LayerFlops:
    """Operations of one TTT layer in one forward pass; a multiplication with its addition counts as two.

    Only matrix products count: norms and GELU are less than a tenth at any width that is worth a GPU.
    """

    projections: int
    """Operations of the projections to q, k, v, the rates and the output."""
    scan: int
    """Operations of the full mini-batches."""
    beside: int
    """Operations of the mini-batch that a window leaves open; it is not recomputed."""

    @property
    def forward(self) -> int:
        """Operations of one forward pass."""
        return self.projections + self.scan + self.beside

    def training(self, scan_forwards: int, *, enclosing: int = 0) -> int:
        """Operations of one training step: the forward passes, recomputed ones included, and backward as two more.

        Args:
            scan_forwards: how often the scan runs forward; see `ScanCost.forwards`.
            enclosing: activation checkpoints around the layer.
        """
        return (3 + enclosing) * (self.projections + self.beside) + (2 + scan_forwards) * self.scan


def layer_flops(config: TTTConfig, *, dim: int, num_heads: int, tokens: int, batch_size: int) -> LayerFlops:
    """Operations of one layer in one forward pass over windows that begin a mini-batch.

    For each token, each head and each `in × out` matrix of the inner model: `6 in·out` for the products of key, query
    and gradient with the matrix, `2 in·out` more for every matrix after the first, to pass the gradient back, and
    `2 C (in + out)` for the products with the other tokens of the mini-batch, if the update is causal or leaves a
    mini-batch open; in others the queries go through the weights after it. Linear: `6F² + 4CF`; the MLP of two layers:
    `56F² + 20CF`. Biases are part of the same products.

    Args:
        config: the `ttt` section.
        dim: D.
        num_heads: heads of the backbone.
        tokens: T, tokens of a window.
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
        scan=learning(tokens - rest, size if config.causal else 0),
        beside=learning(rest, rest),
    )
