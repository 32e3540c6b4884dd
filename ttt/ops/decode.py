"""One token of each stream at a time, in place: the open mini-batch as factors instead of summed gradients.

The gradient of a layer's weights that a mini-batch has summed is `Xᵀ U`: the inputs `x_j` of its tokens and what they
teach, `u_j = η_j E_j`. Kept as these rows it has `C (in + out)` numbers instead of `in · out`, and a token writes two
rows instead of the whole. A query at the layer's input `x` answers with

    x W + b − s_i (x Xᵀ U + Σ_{j≤i} u_j)

and the closed mini-batch moves the weights once in C tokens, `W −= s_C Xᵀ U`. The bias's gradient `Σ_j u_j` is a single
row, and stays summed.

What a stream brings along from elsewhere is known as a sum only. So beside the factors there is a base `G`, in the
shape of W: the summed gradients of those tokens of the open mini-batch that the factors do not hold. It is all zeros,
and is not read, unless the stream began inside a mini-batch or C is larger than 16, the most that is kept as factors.

Shape letters: `K` slots for tokens, `R` rows × heads, `I` and `O` a layer's inputs and outputs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ttt.ops.factors import Factors
from ttt.ops.minibatch import Inner, Stream, Weights
from ttt.ops.mlp import gelu
from ttt.ops.precision import multiplying
from ttt.ops.rows import Tokens
from ttt.ops.select import forced_implementation, implementation

_gelu_backward = torch.ops.aten.gelu_backward.default
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


def learn_one_(
    tokens: Tokens,
    stream: Stream,
    inner: Inner,
    rows_B: Tensor | None = None,
    factors: Factors | None = None,
    *,
    wait: bool,
) -> Tensor:
    """`learn` for one token of each row, in place: it writes the new state into `stream` and `factors`.

    No gradient flows through it. Products are exact in every `Inner.precision`, and whatever PyTorch is set to: reading
    the weights is what takes time.

    Args:
        tokens: `[B,H,1,F]` and rates `[B,H,1,1]`.
        stream: every tensor has memory of its own; if C is 1, gradients and count may be None. With factors, the
            gradients of its matrices are the base.
        inner: norms, step sizes, kind of update.
        rows_B: rows that read their token; the others keep their state bit for bit. None means all.
        factors: of the open mini-batches; None if `stream.gradients` holds all that they have summed, and shall.
        wait: whether to read the rows' places on the host, as is cheap on the CPU, and to leave out what none needs.

    Returns:
        `z [B,H,1,F]`; rows that read no token hold no meaningful numbers.

    Raises:
        ValueError: `TTT_OPS` is `triton`, and the kernels cannot run here or have no form for these widths.
    """
    if torch.is_grad_enabled():
        with torch.no_grad():
            return learn_one_(tokens, stream, inner, rows_B, factors, wait=wait)
    if factors is not None and forced_implementation() == "triton":
        # It raises an error if the kernels cannot run here.
        implementation(device_type=tokens.q.device.type, dtypes={x.dtype for x in (*tokens, *stream.weights)})
        from ttt.ops.triton.decode import triton_learn_one_  # imports Triton

        return triton_learn_one_(tokens, stream, inner, rows_B, factors)
    if wait and rows_B is not None and all(rows_B.tolist()):
        rows_B = None
    with multiplying(tokens.q, "ieee"):
        if stream.gradients is None or stream.count_B is None:
            return _learn_last_(tokens, stream.weights, inner, rows_B)
        return _learn_in_minibatch_(tokens, stream, inner, rows_B, factors, wait=wait)


def _learn_in_minibatch_(
    tokens: Tokens, stream: Stream, inner: Inner, rows_B: Tensor | None, factors: Factors | None, *, wait: bool
) -> Tensor:
    """`learn_one_` if mini-batches have several tokens."""
    assert stream.gradients is not None
    assert stream.count_B is not None
    count_B, heads = stream.count_B, tokens.q.shape[1]
    at = (_known_places if wait else _unknown_places)(count_B, inner, rows_B, factors, heads)
    weights, sums = _flat(stream.weights), _flat(stream.gradients)
    both_R2F = torch.cat((tokens.k, tokens.q), 2).flatten(0, 1)
    first_R2O = torch.bmm(both_R2F, weights[0]).add_(weights[1])  # of two rows much faster on the CPU than `baddbmm`
    (k_R1F, q_R1F), (of_k_R1O, of_q_R1O) = both_R2F.split(1, 1), first_R2O.split(1, 1)
    inputs, taught = _keys(weights, k_R1F, of_k_R1O, tokens, inner, rows_B)
    for layer, (x, u) in enumerate(zip(inputs, taught, strict=True)):
        sums[2 * layer + 1].add_(u)
        if factors is None:
            sums[2 * layer].baddbmm_(x.mT, u)
    if factors is not None:
        inputs = [_written(held, x, at) for held, x in zip(factors.inputs, inputs, strict=True)]
        taught = [_written(held, u, at) for held, u in zip(factors.taught, taught, strict=True)]
    held = None if factors is None else (inputs, taught)
    z_R1F = _answered(q_R1F, of_q_R1O, weights, sums, held, at)
    count_B.add_(1 if rows_B is None else rows_B)
    if at.ends is None:
        _end_where_(weights, sums, count_B, factors, inner, rows_B)
    for rows, closes in at.ends or ():
        _end_(stream, factors, rows, inner if closes else None)
    return _normed_answer(z_R1F, tokens, inner)


class _Places(NamedTuple):
    """Where rows stand in their mini-batches before a token."""

    slot: int | Tensor
    """The token's slot: one for all rows, or `[R,1,1]`."""
    filled: int
    """No row has a token in this slot or a later one, with this token either."""
    scale: float | Tensor
    """`s_i`: one for all rows, or `[R,1,1]`."""
    based: bool
    """Whether the base may hold something."""
    ends: list[tuple[slice | None, bool]] | None
    """Rows whose factors are full with this token, None for all, and whether that closes their mini-batch; None if it
    is not known."""


def _known_places(count_B: Tensor, inner: Inner, rows_B: Tensor | None, factors: Factors | None, heads: int) -> _Places:
    counts, size = count_B.tolist(), inner.mini_batch_size
    slots = 1 if factors is None else factors.slots
    based = factors is None or any(factors.based_B.tolist())
    read = None if rows_B is None else rows_B.tolist()
    together = read is None and min(counts) == max(counts)
    ends = [
        (None if together else slice(row, row + 1), count + 1 == size)
        for row, count in enumerate(counts[:1] if together else counts)
        if (read is None or read[row]) and (count + 1 == size or (factors is not None and (count + 1) % slots == 0))
    ]
    if together:
        slot = counts[0] % slots
        return _Places(slot, slot + 1, inner.scale_C.tolist()[counts[0]], based, ends)
    filled = 1 + max(count % slots for count in counts)
    return _Places(_each(count_B % slots, heads), filled, _each(inner.scale_C[count_B], heads), based, ends)


def _unknown_places(
    count_B: Tensor, inner: Inner, rows_B: Tensor | None, factors: Factors | None, heads: int
) -> _Places:
    slots = 1 if factors is None else factors.slots
    return _Places(_each(count_B % slots, heads), slots, _each(inner.scale_C[count_B], heads), True, None)


def _each(x_B: Tensor, heads: int) -> Tensor:
    """Values of rows as values of their heads, `[R,1,1]`."""
    return x_B[:, None].expand(-1, heads).reshape(-1, 1, 1)


def _flat(tensors: Weights, rows: slice | None = None) -> list[Tensor]:
    """Views of rows with their heads as one dimension, `[R,…]`; None means all rows; contiguous tensors only."""
    return [(x if rows is None else x[rows]).view(-1, *x.shape[2:]) for x in tensors]


def _keys(
    weights: list[Tensor], k_R1F: Tensor, first_R1O: Tensor, tokens: Tokens, inner: Inner, rows_B: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """What the tokens teach: of each layer its input `x [R,1,in]` and `u = η E [R,1,out]`; zeros in rows that pause.

    Args:
        weights: `W [R,in,out]`, `b [R,1,out]`, ….
        k_R1F: keys.
        first_R1O: what the first layer makes of them.
        tokens: targets and rates.
        inner: norms.
        rows_B: rows that read.
    """
    inputs, outputs = [k_R1F], [first_R1O]
    for layer in range(1, len(weights) // 2):
        inputs.append(gelu(outputs[-1]))
        outputs.append(torch.baddbmm(weights[2 * layer + 1], inputs[-1], weights[2 * layer]))
    taught = [tokens.rate.flatten(0, 1) * _error(outputs[-1], tokens.target, inner)]
    for layer in range(len(weights) // 2 - 1, 0, -1):
        back = torch.bmm(weights[2 * layer], taught[0].mT).mT  # rows of W in the order of memory
        taught.insert(0, _gelu_backward(back, outputs[layer - 1], approximate="tanh"))
    if rows_B is not None:  # both factors: a row that pauses may hold NaN or infinity
        read = _each(rows_B, tokens.k.shape[1])
        inputs, taught = ([torch.where(read, x, 0) for x in group] for group in (inputs, taught))
    return inputs, taught


def _error(z_R1F: Tensor, target_BH1F: Tensor, inner: Inner) -> Tensor:
    """`ttt.ops.norm.inner_loss_gradient` in few operations: the norm's own backward, of `∂ℓ/∂x̂`."""
    width = [z_R1F.shape[-1]]
    normed, mean, inverse_deviation = torch.native_layer_norm(z_R1F, width, None, None, inner.eps)
    gamma, beta = inner.gamma_H1F, inner.beta_H1F
    wrong = torch.addcmul(beta - target_BH1F, normed.view_as(target_BH1F), gamma) * gamma
    mask = [True, False, False]
    backward = _layer_norm_backward(wrong.view_as(z_R1F), z_R1F, width, mean, inverse_deviation, None, None, mask)
    return backward[0]


def _normed_answer(z_R1F: Tensor, tokens: Tokens, inner: Inner) -> Tensor:
    """`q + LN(z)`, `[B,H,1,F]`."""
    normed = torch.native_layer_norm(z_R1F, z_R1F.shape[-1:], None, None, inner.eps)[0].view_as(tokens.q)
    return torch.addcmul(tokens.q + inner.beta_H1F, normed, inner.gamma_H1F)


def _answered(
    x_R1F: Tensor,
    first_R1O: Tensor,
    weights: list[Tensor],
    sums: list[Tensor],
    factors: tuple[list[Tensor], list[Tensor]] | None,
    at: _Places,
) -> Tensor:
    """The inner model of queries at the weights that answer them, `[R,1,F]`; `first_R1O` is its first layer's at W."""
    x, z = x_R1F, first_R1O
    for layer in range(len(weights) // 2):
        if layer:
            x = gelu(z)
            z = torch.baddbmm(weights[2 * layer + 1], x, weights[2 * layer])
        if factors is not None and not at.based and not isinstance(at.scale, Tensor):
            # The bias's gradient is `Σ_j u_j`, so it is that of an input that is always 1.
            with_one = torch.baddbmm(_one(x.dtype, x.device), x, factors[0][layer].mT)
            z = torch.baddbmm(z, with_one, factors[1][layer], alpha=-at.scale)
            continue
        step = sums[2 * layer + 1]
        if at.based:
            step = torch.baddbmm(step, x, sums[2 * layer])
        if factors is not None:
            step = torch.baddbmm(step, torch.bmm(x, factors[0][layer].mT), factors[1][layer])
        if isinstance(at.scale, Tensor):
            z = torch.addcmul(z, step, at.scale, value=-1)
        else:
            z = torch.sub(z, step, alpha=at.scale)
    return z


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    """`1`, as `[1,1,1]`; not to be written to."""
    return torch.ones(1, 1, 1, dtype=dtype, device=device)


def _written(held: Tensor, new_R1O: Tensor, at: _Places) -> Tensor:
    """Write a token's row into its slot; the slots `[R,K',…]` that may hold tokens."""
    slots = held.view(-1, *held.shape[2:])
    if isinstance(at.slot, int):
        slots.narrow(1, at.slot, 1).copy_(new_R1O)
    else:  # of a row that pauses, zeros go into a slot without a token
        slots.scatter_(1, at.slot.expand_as(new_R1O), new_R1O)
    return slots.narrow(1, 0, at.filled)


def _end_(stream: Stream, factors: Factors | None, rows: slice | None, inner: Inner | None) -> None:
    """Empty the factors of rows that are known: into the weights if their mini-batch closes, else into the base.

    Args:
        stream: see `learn_one_`.
        factors: see `learn_one_`.
        rows: which of the B; None means all.
        inner: step sizes; None if the mini-batch does not close.
    """
    assert stream.gradients is not None
    assert stream.count_B is not None
    weights, sums = _flat(stream.weights, rows), _flat(stream.gradients, rows)
    these = slice(None) if rows is None else rows
    scale = 0.0 if inner is None else inner.scale_C.tolist()[-1]
    based = True
    if factors is not None:
        based = any(factors.based_B[these].tolist())
        for layer, pair in enumerate(zip(factors.inputs, factors.taught, strict=True)):
            x, u = (part[these].flatten(0, 1) for part in pair)
            if inner is None:
                sums[2 * layer].baddbmm_(x.mT, u)
            else:
                weights[2 * layer].baddbmm_(x.mT, u, alpha=-scale)
            u.zero_()
        factors.based_B[these] = inner is None
    if inner is not None:
        stream.count_B[these] = 0
        for index, (w, g) in enumerate(zip(weights, sums, strict=True)):
            if based or index % 2:  # biases are summed always
                w.sub_(g, alpha=scale)
                g.zero_()


def _end_where_(
    weights: list[Tensor],
    sums: list[Tensor],
    count_B: Tensor,
    factors: Factors | None,
    inner: Inner,
    rows_B: Tensor | None,
) -> None:
    """`_end_` in the rows for which it is time, without knowing which: factors go into the base first."""
    closed_B = count_B == inner.mini_batch_size
    heads = weights[0].shape[0] // len(count_B)
    closed = _each(closed_B, heads)
    if factors is not None:
        full_B = count_B % factors.slots == 0
        ended_B = closed_B | (full_B if rows_B is None else full_B & rows_B)
        ended = _each(ended_B, heads)
        for g, x, u in zip(sums[::2], _flat(factors.inputs), _flat(factors.taught), strict=True):
            g.baddbmm_(torch.where(ended, x, 0).mT, torch.where(ended, u, 0))
            u.masked_fill_(ended, 0)
        factors.based_B.logical_or_(ended_B).logical_and_(~closed_B)
    taken = torch.where(closed, inner.scale_C[-1], 0)
    for w, g in zip(weights, sums, strict=True):
        # Sums may hold a NaN that has just been read, which a factor of zero would not stop.
        w.addcmul_(torch.where(closed, g, 0), taken, value=-1)
        g.masked_fill_(closed, 0)
    count_B.masked_fill_(closed_B, 0)


def _learn_last_(tokens: Tokens, weights: Weights, inner: Inner, rows_B: Tensor | None) -> Tensor:
    """`learn_one_` if every token closes its mini-batch: the query's answer is that of the moved weights."""
    moved, scale = _flat(weights), inner.scale_C[-1]
    k_R1F = tokens.k.flatten(0, 1)
    inputs, taught = _keys(moved, k_R1F, torch.baddbmm(moved[1], k_R1F, moved[0]), tokens, inner, rows_B)
    for layer, (x, u) in enumerate(zip(inputs, taught, strict=True)):
        step = u * scale
        moved[2 * layer].addcmul_(x.mT, step, value=-1)
        moved[2 * layer + 1].sub_(step)
    z = tokens.q.flatten(0, 1)
    for layer in range(len(moved) // 2):
        z = torch.baddbmm(moved[2 * layer + 1], gelu(z) if layer else z, moved[2 * layer])
    return _normed_answer(z, tokens, inner)
