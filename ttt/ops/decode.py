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
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ttt.ops.decode_rows import InnerRows, Memory, Token
from ttt.ops.factors import Factors
from ttt.ops.minibatch import Inner, Stream
from ttt.ops.mlp import gelu
from ttt.ops.precision import global_precision, multiplying
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
    with torch.no_grad():
        counts = stream.count_B.tolist() if wait and stream.count_B is not None else None
        rows = InnerRows(inner, tokens.q.shape[0])
        z_R1F = learn_token_(Token.of(tokens), Memory(stream, factors), rows, rows_B, counts, wait=wait)
        return z_R1F.view(tokens.q.shape)


def learn_token_(
    token: Token, memory: Memory, inner: InnerRows, rows_B: Tensor | None, counts: Sequence[int] | None, *, wait: bool
) -> Tensor:
    """`learn_one_` by whoever keeps what it derives of the streams and the layer. Called without gradients.

    Args:
        token: of each stream.
        memory: the streams', which it writes to.
        inner: norms, step sizes, kind of update.
        rows_B: as in `learn_one_`.
        counts: how many tokens the streams have read of their open mini-batches; None if that is not known here, or
            if mini-batches have one token.
        wait: as in `learn_one_`.

    Returns:
        `z [R,1,F]`.

    Raises:
        ValueError: as in `learn_one_`.
    """
    if memory.factors is not None and forced_implementation() == "triton":
        # It raises an error if the kernels cannot run here.
        types = {x.dtype for x in (*token, *memory.weights)}
        implementation(device_type=token.both_R2F.device.type, dtypes=types)
        from ttt.ops.triton.decode import triton_learn_one_  # imports Triton

        tokens = token.tokens(memory.batch)
        return triton_learn_one_(tokens, memory.stream, inner.inner, rows_B, memory.factors).flatten(0, 1)
    if wait and rows_B is not None and all(rows_B.tolist()):
        rows_B = None
    learn = _learn_in_minibatch_ if memory.sums else _learn_last_
    if global_precision(token.both_R2F) == "ieee":
        return learn(token, memory, inner, rows_B, counts)
    with multiplying(token.both_R2F, "ieee"):
        return learn(token, memory, inner, rows_B, counts)


def _learn_in_minibatch_(
    token: Token, memory: Memory, inner: InnerRows, rows_B: Tensor | None, counts: Sequence[int] | None
) -> Tensor:
    """`learn_token_` if mini-batches have several tokens."""
    count_B = memory.stream.count_B
    assert count_B is not None
    if counts is None:
        at = _unknown_places(memory, count_B, inner, rows_B)
    else:
        at = _known_places(memory, count_B, counts, inner, rows_B)
    weights, sums = memory.weights, memory.sums
    first_R2O = torch.baddbmm(weights[1], token.both_R2F, weights[0])
    (k_R1F, q_R1F), (of_k_R1O, of_q_R1O) = token.both_R2F.chunk(2, 1), first_R2O.chunk(2, 1)
    inputs, taught = _keys(memory, k_R1F, of_k_R1O, token, inner, rows_B)
    for layer, (x, u) in enumerate(zip(inputs, taught, strict=True)):
        sums[2 * layer + 1].add_(u)
        if memory.factors is None:
            sums[2 * layer].baddbmm_(x.mT, u)
    held = _written(memory, inputs, taught, at)
    z_R1F = _answered(q_R1F, of_q_R1O, memory, held, at)
    count_B.add_(_one(torch.int64, count_B.device, 1) if rows_B is None else rows_B)
    if at.ends is None:
        _end_where_(memory, count_B, inner, rows_B)
    for rows, closes in at.ends or ():
        _end_(memory, rows, inner if closes else None)
    return _normed_answer(z_R1F, q_R1F, inner)


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


def _known_places(
    memory: Memory, count_B: Tensor, counts: Sequence[int], inner: InnerRows, rows_B: Tensor | None
) -> _Places:
    size, slots, factors = inner.inner.mini_batch_size, memory.slots, memory.factors
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
        return _Places(slot, slot + 1, inner.steps[counts[0]], based, ends)
    filled = 1 + max(count % slots for count in counts)
    scale_B = inner.inner.scale_C[count_B]
    return _Places(_each(count_B % slots, memory.heads), filled, _each(scale_B, memory.heads), based, ends)


def _unknown_places(memory: Memory, count_B: Tensor, inner: InnerRows, rows_B: Tensor | None) -> _Places:
    slot_B, scale_B = count_B % memory.slots, inner.inner.scale_C[count_B]
    return _Places(_each(slot_B, memory.heads), memory.slots, _each(scale_B, memory.heads), True, None)


def _each(x_B: Tensor, heads: int) -> Tensor:
    """Values of rows as values of their heads, `[R,1,1]`."""
    return x_B[:, None].expand(-1, heads).reshape(-1, 1, 1)


def _keys(
    memory: Memory, k_R1F: Tensor, first_R1O: Tensor, token: Token, inner: InnerRows, rows_B: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """What the tokens teach: of each layer its input `x [R,1,in]` and `u = η E [R,1,out]`; zeros in rows that pause.

    Args:
        memory: of the streams.
        k_R1F: keys.
        first_R1O: what the first layer makes of them.
        token: targets and rates.
        inner: norms.
        rows_B: rows that read.
    """
    weights, inputs, outputs = memory.weights, [k_R1F], [first_R1O]
    for layer in range(1, len(weights) // 2):
        inputs.append(gelu(outputs[-1]))
        outputs.append(torch.baddbmm(weights[2 * layer + 1], inputs[-1], weights[2 * layer]))
    taught = [token.rate_R11 * _error(outputs[-1], token.target_R1F, inner)]
    for layer in range(len(weights) // 2 - 1, 0, -1):
        back = torch.bmm(weights[2 * layer], taught[0].mT).mT  # rows of W in the order of memory
        taught.insert(0, _gelu_backward(back, outputs[layer - 1], approximate="tanh"))
    if rows_B is not None:  # both factors: a row that pauses may hold NaN or infinity
        read = _each(rows_B, memory.heads)
        inputs, taught = ([torch.where(read, x, 0) for x in group] for group in (inputs, taught))
    return inputs, taught


def _error(z_R1F: Tensor, target_R1F: Tensor, inner: InnerRows) -> Tensor:
    """`ttt.ops.norm.inner_loss_gradient` in few operations: the norm's own backward, of `∂ℓ/∂x̂ = γ² x̂ + γ β − γ t`."""
    width = [z_R1F.shape[-1]]
    normed, mean, inverse_deviation = torch.native_layer_norm(z_R1F, width, None, None, inner.inner.eps)
    wrong = torch.addcmul(inner.product, inner.gamma, target_R1F, value=-1)
    wrong = torch.addcmul(wrong, inner.square, normed)
    mask = [True, False, False]
    backward = _layer_norm_backward(wrong, z_R1F, width, mean, inverse_deviation, None, None, mask)
    return backward[0]


def _normed_answer(z_R1F: Tensor, q_R1F: Tensor, inner: InnerRows) -> Tensor:
    """`q + LN(z)`, `[R,1,F]`."""
    normed = torch.native_layer_norm(z_R1F, z_R1F.shape[-1:], None, None, inner.inner.eps)[0]
    return torch.addcmul(q_R1F + inner.beta, normed, inner.gamma)


def _answered(
    x_R1F: Tensor, first_R1O: Tensor, memory: Memory, factors: list[tuple[Tensor, Tensor]] | None, at: _Places
) -> Tensor:
    """The inner model of queries at the weights that answer them, `[R,1,F]`; `first_R1O` is its first layer's at W.

    Factors are `Xᵀ` and `U` of each layer.
    """
    x, z, weights, sums = x_R1F, first_R1O, memory.weights, memory.sums
    for layer in range(len(weights) // 2):
        if layer:
            x = gelu(z)
            z = torch.baddbmm(weights[2 * layer + 1], x, weights[2 * layer])
        if factors is not None and not at.based and not isinstance(at.scale, Tensor):
            # The bias's gradient is `Σ_j u_j`, so it is that of an input that is always 1.
            with_one = torch.baddbmm(_one(x.dtype, x.device, 3), x, factors[layer][0])
            z = torch.baddbmm(z, with_one, factors[layer][1], alpha=-at.scale)
            continue
        step = sums[2 * layer + 1]
        if at.based:
            step = torch.baddbmm(step, x, sums[2 * layer])
        if factors is not None:
            step = torch.baddbmm(step, torch.bmm(x, factors[layer][0]), factors[layer][1])
        if isinstance(at.scale, Tensor):
            z = torch.addcmul(z, step, at.scale, value=-1)
        else:
            z = torch.sub(z, step, alpha=at.scale)
    return z


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _one(dtype: torch.dtype, device: torch.device, dimensions: int) -> Tensor:
    """`1`, as `[1]` or `[1,1,…]`; not to be written to."""
    return torch.ones([1] * dimensions, dtype=dtype, device=device)


def _written(
    memory: Memory, inputs: list[Tensor], taught: list[Tensor], at: _Places
) -> list[tuple[Tensor, Tensor]] | None:
    """Write a token's rows into its slot; `Xᵀ [R,in,K']` and `U [R,K',out]` of the slots that may hold tokens."""
    if memory.factors is None:
        return None
    if isinstance(at.slot, int):
        slot = memory.slot(at.slot)
        for room, new in zip((*slot.inputs, *slot.taught), (*inputs, *taught), strict=True):
            room.copy_(new)
        return slot.filled
    for slots, new in zip((*memory.inputs, *memory.taught), (*inputs, *taught), strict=True):
        slots.scatter_(1, at.slot.expand_as(new), new)  # of a row that pauses, zeros go into a slot without a token
    return memory.slot(at.filled - 1).filled


def _end_(memory: Memory, rows: slice | None, inner: InnerRows | None) -> None:
    """Empty the factors of rows that are known: into the weights if their mini-batch closes, else into the base.

    Args:
        memory: of the streams.
        rows: which of the B; None means all.
        inner: step sizes; None if the mini-batch does not close.
    """
    these, factors, count_B = slice(None) if rows is None else rows, memory.factors, memory.stream.count_B
    assert count_B is not None

    def part(tensors: list[Tensor]) -> list[Tensor]:
        if rows is None:
            return tensors
        return [x[rows.start * memory.heads : rows.stop * memory.heads] for x in tensors]

    weights, sums = part(memory.weights), part(memory.sums)
    scale = 0.0 if inner is None else inner.steps[-1]
    based = True
    if factors is not None:
        based = any(factors.based_B[these].tolist())
        for layer, (x, u) in enumerate(zip(part(memory.inputs), part(memory.taught), strict=True)):
            if inner is None:
                sums[2 * layer].baddbmm_(x.mT, u)
            else:
                weights[2 * layer].baddbmm_(x.mT, u, alpha=-scale)
            u.zero_()
        factors.based_B[these] = inner is None
    if inner is not None:
        count_B[these] = 0
        for index, (w, g) in enumerate(zip(weights, sums, strict=True)):
            if based or index % 2:  # biases are summed always
                w.sub_(g, alpha=scale)
                g.zero_()


def _end_where_(memory: Memory, count_B: Tensor, inner: InnerRows, rows_B: Tensor | None) -> None:
    """`_end_` in the rows for which it is time, without knowing which: factors go into the base first."""
    closed_B = count_B == inner.inner.mini_batch_size
    closed = _each(closed_B, memory.heads)
    if memory.factors is not None:
        full_B = count_B % memory.slots == 0
        ended_B = closed_B | (full_B if rows_B is None else full_B & rows_B)
        ended = _each(ended_B, memory.heads)
        for g, x, u in zip(memory.sums[::2], memory.inputs, memory.taught, strict=True):
            g.baddbmm_(torch.where(ended, x, 0).mT, torch.where(ended, u, 0))
            u.masked_fill_(ended, 0)
        memory.factors.based_B.logical_or_(ended_B).logical_and_(~closed_B)
    taken = torch.where(closed, inner.inner.scale_C[-1], 0)
    for w, g in zip(memory.weights, memory.sums, strict=True):
        # Sums may hold a NaN that has just been read, which a factor of zero would not stop.
        w.addcmul_(torch.where(closed, g, 0), taken, value=-1)
        g.masked_fill_(closed, 0)
    count_B.masked_fill_(closed_B, 0)


def _learn_last_(
    token: Token, memory: Memory, inner: InnerRows, rows_B: Tensor | None, counts: Sequence[int] | None
) -> Tensor:
    """`learn_token_` if every token closes its mini-batch: the query's answer is that of the moved weights."""
    moved, scale = memory.weights, inner.inner.scale_C[-1]
    k_R1F, q_R1F = token.both_R2F.chunk(2, 1)
    inputs, taught = _keys(memory, k_R1F, torch.baddbmm(moved[1], k_R1F, moved[0]), token, inner, rows_B)
    for layer, (x, u) in enumerate(zip(inputs, taught, strict=True)):
        step = u * scale
        moved[2 * layer].addcmul_(x.mT, step, value=-1)
        moved[2 * layer + 1].sub_(step)
    z = q_R1F
    for layer in range(len(moved) // 2):
        z = torch.baddbmm(moved[2 * layer + 1], gelu(z) if layer else z, moved[2 * layer])
    return _normed_answer(z, q_R1F, inner)
