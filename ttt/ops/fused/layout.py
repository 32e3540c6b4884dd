"""The memory layout: the operation's inputs, tokens laid out for the products, and the tensors that backward reads.

Shape letters: see `ttt.ops.fused`. A list holds one tensor for each layer of the inner model, in order of layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttt.ops.constants import Precision, aligned_for
from ttt.ops.fused.products import Products

_CHUNK_NUMBERS = 1 << 20
"""On a CPU, the most numbers that a chunk's keys have at the widest layer of the inner model."""
_CHUNK_WEIGHTS = 1 << 20
"""On a CPU, the most numbers that a chunk's weights have if they need not be kept."""
_GPU_CHUNK_NUMBERS = 1 << 24
_GPU_CHUNK_WEIGHTS = 1 << 26
"""The same two on a GPU, for a pass that keeps nothing; what is kept runs in chunks of whole groups there."""
_MOST_MATRICES = 65_535
"""The most matrices of one batched product: a grid of a GPU is no larger in its third dimension."""
_BLOCK_NUMBERS = 1 << 22
"""The most numbers that the keys of a block have which is laid out in a pass that keeps nothing."""


class Dims(NamedTuple):
    """The sizes of a problem."""

    steps: int
    """`N`"""
    batch: int
    """`B`"""
    heads: int
    """`H`"""
    size: int
    """`C`"""
    widths: tuple[int, ...]
    """The input widths of the inner model's layers, then the output width of the last: `F, …, F`."""
    dual: bool = True
    """Whether each position answers with weights of its own, in dual form. If the update is not causal, all of a
    mini-batch answer with the weights after it."""
    aligned: int = 1
    """Rows of inputs and weights have a multiple of so many numbers."""

    @property
    def pairs(self) -> int:
        """`P`, the heads of all rows."""
        return self.batch * self.heads

    @property
    def depth(self) -> int:
        """`L`, the layers of the inner model."""
        return len(self.widths) - 1

    @property
    def rows(self) -> int:
        """`S`, the rows that go through the first product with the keys: in dual form those of the queries too."""
        return 2 * self.size if self.dual else self.size

    def joined(self, width: int) -> int:
        """`J`: a width, the column of ones or the row of the bias, and zeros up to a multiple of `aligned`."""
        return -(-(width + 1) // self.aligned) * self.aligned

    def block(self, most: int) -> int:
        """How many mini-batches a pass that keeps nothing lays out at a time."""
        return max(1, min(most, _BLOCK_NUMBERS // (self.pairs * self.size * self.widths[0])))

    def chunk(self, device: torch.device, most: int, *, keep: bool) -> int:
        """How many mini-batches run at a time in the part that does not depend on the carry.

        On a CPU they are just enough for calls to cost little compared with their arithmetic; on a GPU, whose launches
        cost more, all that there are. If weights need not be kept, their size is bounded too; a chunk of one mini-batch
        updates them in place.
        """
        cpu = device.type == "cpu"
        keys = self.pairs * self.size * max(self.widths)
        weights = self.pairs * sum(a * b for a, b in itertools.pairwise(self.widths))
        bounds = [most, _CHUNK_NUMBERS // keys if cpu else _MOST_MATRICES // self.pairs]
        if not keep:
            bounds += (
                [_CHUNK_WEIGHTS // weights] if cpu else [_GPU_CHUNK_NUMBERS // keys, _GPU_CHUNK_WEIGHTS // weights]
            )
        return max(1, min(bounds))


class Problem(NamedTuple):
    """The operation's arguments, in the order of its schema."""

    q_BHNCF: Tensor
    k_BHNCF: Tensor
    target_BHNCF: Tensor
    rate_BHNC1: Tensor
    gamma_H1F: Tensor
    beta_H1F: Tensor
    scale_BC: Tensor
    """`s`, for each row or `[1,C]`."""
    last_NB: Tensor | None
    """`s_C` for each mini-batch and row, or `[1,1]`; None if the one mini-batch stays open."""
    weights: list[Tensor]
    """`W_0, b_0, W_1, …` that open the first mini-batch: `W [B,H,I,O]` and `b [B,H,1,O]`."""
    gradients: list[Tensor]
    """`G`, the sums so far of a mini-batch that is already open; empty if it opens here."""
    causal: bool
    eps: float
    group_size: int
    """Mini-batches that backward recomputes at a time; 0 keeps everything."""
    precision: Precision = "ieee"
    """In what the operands of products are multiplied; weights and sums keep the type of the tokens."""

    @property
    def dims(self) -> Dims:
        """The sizes."""
        batch, heads, steps, size, width = self.q_BHNCF.shape
        widths = width, *(w.shape[-1] for w in self.weights[::2])
        dual = self.causal or self.last_NB is None
        return Dims(steps, batch, heads, size, widths, dual, aligned_for(self.q_BHNCF.device.type))


class Constants(NamedTuple):
    """Tensors that every mini-batch reads."""

    gamma_P1F: Tensor
    beta_P1F: Tensor
    gamma_squared_P1F: Tensor
    neg_scale_PC1: Tensor
    """`−s`"""
    pushes_NP11: Tensor
    """`c`, the factor of an update (8): `−s_C` if the mini-batch closes, 0 if it does not, 1 if it stays open."""


class Common(NamedTuple):
    """What all chunks of a problem share."""

    dims: Dims
    constants: Constants
    gradients_PJO: list[Tensor] | None
    """`G̃`, if the only mini-batch is already open."""
    closes: bool
    """Whether mini-batches close and their updates move the weights; else the one mini-batch stays open and its sums
    are returned."""
    causal: bool
    eps: float
    products: Products

    @classmethod
    def of(cls, problem: Problem) -> Common:
        """The layout of a whole problem."""
        dims = problem.dims
        opened = joined(dims, problem.gradients) if problem.gradients else None
        closes, products = problem.last_NB is not None, Products(problem.precision)
        return cls(dims, _constants(dims, problem), opened, closes, problem.causal, problem.eps, products)


def _constants(dims: Dims, problem: Problem) -> Constants:
    def per_pair(x: Tensor) -> Tensor:
        return x.expand(dims.batch, dims.heads, 1, dims.widths[0]).reshape(dims.pairs, 1, -1)

    shape = dims.batch, dims.heads
    last_NB = problem.last_NB
    if last_NB is None:
        pushes = problem.q_BHNCF.new_ones((dims.steps, dims.pairs, 1, 1))
    else:
        pushes = -last_NB[:, :, None].expand(dims.steps, *shape).reshape(dims.steps, dims.pairs, 1, 1)
    gamma = per_pair(problem.gamma_H1F)
    scale = problem.scale_BC[:, None].expand(*shape, dims.size).reshape(dims.pairs, dims.size, 1)
    return Constants(gamma, per_pair(problem.beta_H1F), gamma.square(), scale.neg(), pushes)


class Block(NamedTuple):
    """Tokens of consecutive mini-batches, laid out for the products."""

    stacked_MPSJ: Tensor
    """`(K̃; Q̃)`"""
    rate_MPC1: Tensor
    """`η`"""
    offset_MPCF: Tensor
    """`β − t`"""
    anchor_MPCF: Tensor
    """`γ (β − t)`"""
    push_MPC1: Tensor
    """`c η`"""
    pushed_keys_MPCJ: Tensor
    """`c η K̃`"""
    coefficient_MPCC: Tensor
    """`κ = −s ηᵀ ⊙ mask`; no columns if the queries do not answer in dual form"""

    @classmethod
    def room(cls, dims: Dims, steps: int, like: Tensor) -> Block:
        """Allocate memory for `steps` mini-batches, with the ones beside keys and queries."""
        size, width = dims.size, dims.widths[0]
        wide = dims.joined(width)

        def room(rows: int, columns: int) -> Tensor:
            return like.new_empty((steps, dims.pairs, rows, columns))

        stacked = _with_ones(room(2 * size, wide), width)
        narrow, column, among = (size, width), (size, 1), (size, size if dims.dual else 0)
        return cls(stacked, room(*column), room(*narrow), room(*narrow), room(*column), room(size, wide), room(*among))

    def part(self, start: int, stop: int) -> Block:
        """The mini-batches from `start` to `stop`."""
        return Block(*(x[start:stop] for x in self))

    def lay_out(self, problem: Problem, common: Common, start: int) -> None:
        """Write the tokens of the mini-batches from `start` on, as many as this block holds."""
        dims, constants = common.dims, common.constants
        stop, size, width = start + len(self.rate_MPC1), dims.size, dims.widths[0]
        q, k, target, rate = (x[:, :, start:stop].movedim(2, 0) for x in problem[:4])
        by_head = Block(*(x.unflatten(1, (dims.batch, dims.heads)) for x in self))
        by_head.stacked_MPSJ[..., :size, :width] = k
        by_head.stacked_MPSJ[..., size:, :width] = q
        by_head.rate_MPC1.copy_(rate)
        torch.sub(constants.beta_P1F.unflatten(0, (dims.batch, dims.heads)), target, out=by_head.offset_MPCF)
        torch.mul(self.offset_MPCF, constants.gamma_P1F, out=self.anchor_MPCF)
        torch.mul(self.rate_MPC1, constants.pushes_NP11[start:stop], out=self.push_MPC1)
        torch.mul(self.stacked_MPSJ[:, :, :size], self.push_MPC1, out=self.pushed_keys_MPCJ)
        if dims.dual:
            torch.mul(constants.neg_scale_PC1, self.rate_MPC1.mT, out=self.coefficient_MPCC)
        if dims.dual and common.causal:
            self.coefficient_MPCC.tril_()


def _with_ones(x: Tensor, width: int) -> Tensor:
    """The same tensor, with a one after the first `width` columns, and zeros in the others."""
    x[..., width] = 1
    x[..., width + 1 :] = 0
    return x


class Kept(NamedTuple):
    """What backward needs of mini-batches besides their tokens.

    A pass that keeps nothing has the same tensors for one chunk, as far as it reads them itself. What it reads within
    one mini-batch alone has room for one.
    """

    weights_MPJO: list[Tensor]
    """`W̃_l` that opened them; if the queries answer with the weights after a mini-batch, those after the last
    too. Where there is room for one, updates are in place."""
    inputs_MPSJ: list[Tensor]
    """`(X̃_l; x̃_l)` for l ≥ 1: the inputs of the layers after the first, for keys and queries."""
    slopes_MPCO: list[Tensor]
    """`φ'(Z_l)` of hidden layers."""
    bends_MPCO: list[Tensor]
    """`D_l ⊙ φ''(Z_l)` of hidden layers."""
    query_slopes_MPCO: list[Tensor]
    """`φ'(y_l)` of hidden layers."""
    errors_MPCO: list[Tensor]
    """`E_l = ∂ℓ/∂Z_l`"""
    attention_MPCC: list[Tensor]
    """`A_l = x̃_l X̃_lᵀ`; none if the queries do not answer in dual form."""
    output_MPCF: Tensor
    """`Z` of the last layer."""
    answer_MPCF: Tensor
    """`y` of the last layer."""
    mean_MPC1: Tensor
    """The mean of `output`, then its `ι = 1/σ`; then the same two of `answer`."""
    inverse_MPC1: Tensor
    query_mean_MPC1: Tensor
    query_inverse_MPC1: Tensor

    def flat(self) -> list[Tensor]:
        """All tensors, in the order of the fields."""
        return [
            *self.weights_MPJO, *self.inputs_MPSJ, *self.slopes_MPCO, *self.bends_MPCO, *self.query_slopes_MPCO,
            *self.errors_MPCO, *self.attention_MPCC, *self[7:],
        ]  # fmt: skip

    @classmethod
    def of(cls, tensors: Sequence[Tensor], dims: Dims) -> Kept:
        """The inverse of `flat`."""
        found, depth, hidden = iter(tensors), dims.depth, dims.depth - 1
        counts = depth, hidden, hidden, hidden, hidden, depth, depth if dims.dual else 0
        return cls(*(list(itertools.islice(found, count)) for count in counts), *found)  # type: ignore[arg-type]

    @classmethod
    def room(cls, dims: Dims, steps: int, like: Tensor, *, keep: bool = True) -> Kept:
        """Allocate memory for `steps` mini-batches, with the ones beside the layers' inputs."""
        size, hidden, last = dims.size, dims.widths[1:-1], dims.widths[-1]
        within = steps if keep else 1

        def room(count: int, rows: int, columns: int) -> Tensor:
            return like.new_empty((count, dims.pairs, rows, columns))

        def derivatives() -> list[Tensor]:
            return [room(steps, size, width) for width in hidden] if keep else []

        def opening(layer: int) -> int:
            """How many weights of a layer there are; in dual form no query reads those of the first layer again."""
            if keep or (steps > 1 and (layer > 0 or not dims.dual)):
                return steps if dims.dual else steps + 1
            return 1

        matrices = list(itertools.pairwise(dims.widths))
        return cls(
            weights_MPJO=[room(opening(layer), dims.joined(a), b) for layer, (a, b) in enumerate(matrices)],
            inputs_MPSJ=[_with_ones(room(steps, 2 * size, dims.joined(width)), width) for width in hidden],
            slopes_MPCO=[room(within, size, width) for width in hidden],
            bends_MPCO=derivatives(),
            query_slopes_MPCO=derivatives(),
            errors_MPCO=[room(steps if dims.dual else within, size, width) for width in dims.widths[1:]],
            attention_MPCC=[room(steps, size, size) for _ in matrices] if keep and dims.dual else [],
            output_MPCF=room(within, size, last),
            answer_MPCF=room(steps, size, last),
            **{name: room(steps if keep else 0, size, 1) for name in cls._fields[-4:]},
        )

    def part(self, start: int, stop: int, *, dual: bool) -> Kept:
        """The same for the mini-batches from `start` to `stop`."""

        def of(found: list[Tensor] | Tensor, more: int = 0) -> Any:
            return [x[start : stop + more] for x in found] if isinstance(found, list) else found[start:stop]

        return Kept(of(self.weights_MPJO, 0 if dual else 1), *(of(found) for found in self[1:]))


def room_between_passes(dims: Dims, group_size: int, like: Tensor) -> list[Tensor]:
    """Allocate what the operation keeps: all of every mini-batch, or the weights that open groups after the first.

    Those are `(W; b) [P,I+1,O]`, without the zeros.
    """
    if not group_size:
        return Kept.room(dims, dims.steps, like).flat()
    groups = -(-dims.steps // group_size)
    return [
        like.new_empty((groups - 1, dims.pairs, fan_in + 1, fan_out))
        for fan_in, fan_out in itertools.pairwise(dims.widths)
    ]


def room_for_tokens(like: Tensor) -> Tensor:
    """Allocate a tensor `[B,H,N,C,F]` whose memory is in the order of a sequence, `[B,N,C,H,F]`."""
    batch, heads, steps, size, width = like.shape
    return like.new_empty((batch, steps, size, heads, width)).permute(0, 3, 1, 2, 4)


def join(weights: Sequence[Tensor], into_PJO: Sequence[Tensor]) -> None:
    """Write `W [B,H,I,O]` and `b [B,H,1,O]` as `W̃ [P,J,O]`, for each layer, with zeros below the bias."""
    for whole, w, b in zip(into_PJO, weights[::2], weights[1::2], strict=True):
        fan_in, by_head = w.shape[-2], whole.unflatten(0, w.shape[:2])
        by_head[:, :, :fan_in] = w
        by_head[:, :, fan_in : fan_in + 1] = b
        whole[:, fan_in + 1 :] = 0


def joined(dims: Dims, weights: Sequence[Tensor]) -> list[Tensor]:
    """`join` into new memory."""
    found = [w.new_empty((dims.pairs, dims.joined(w.shape[-2]), w.shape[-1])) for w in weights[::2]]
    join(weights, found)
    return found


def parted(dims: Dims, weights_PJO: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `joined`; each tensor has memory of its own."""
    found = []
    for whole, fan_in in zip(weights_PJO, dims.widths, strict=False):
        by_head = whole.unflatten(0, (dims.batch, dims.heads))
        parts = by_head[:, :, :fan_in], by_head[:, :, fan_in : fan_in + 1]
        found += [part.clone(memory_format=torch.contiguous_format) for part in parts]
    return found


def by_step(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Split every tensor `[M,…]` into its M mini-batches."""
    return [x.unbind(0) for x in tensors]


def each(tensors: Sequence[Tensor], steps: int) -> list[tuple[Tensor, ...]]:
    """The same for so many mini-batches; a tensor with room for one is used by all of them in turn."""
    return [x.unbind(0) * (steps if len(x) == 1 else 1) for x in tensors]
