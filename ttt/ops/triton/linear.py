"""TTT-Linear in Triton, the forward pass: one program for each row and head, the fast weights in registers.

A program runs all mini-batches of its row and head, one after the other, with `W [F,F]` and `b [F]` of the linear inner
model in registers. It writes each answer once; the state is read once, leaves the chip where a group opens, if a
backward will follow, and at the end. For one mini-batch, with the numbers of `docs/backward.md`:

    (1)   Z = K W + b
    (5)   r = γ (γ x̂ + β − t)                       x̂ and ι of Z
    (6)   E = ι Π(r)
    (9)   U = ((Q Kᵀ + 1) ⊙ M ηᵀ) E                 + Q G + g, if the mini-batch was open before
    (10)  y = Q W + b − s U
    (8)   W' = W + Kᵀ (c η E),   b' = b + Σ c η E   or G' = G + Kᵀ (η E), …, if it stays open
    (9')  y = Q W' + b'                             in place of (9) and (10), if the update is not causal and closes
    (11)  z = Q + γ ŷ + β

U is what the mini-batch has taught up to a query; the fused scan has `−s` inside of (9). All errors are those at W. So
they come first, block by block of tokens, each with its causal answers, which need the errors of the blocks before;
then W moves. Errors of more than one block wait in memory, which the program that writes them reads behind a barrier.

On the chip are W, in blocks of rows, so that a thread has few numbers of a product's factors at a time (F 128, 8 warps:
W is 64 numbers a thread), and four tiles `[ROWS,F]` at most (F 128, ROWS 16: 8 numbers each). Keys and queries are read
in blocks of columns, twice; of a mini-batch they are 64 KiB at F 128 and C 64, and near.

A lower precision rounds both operands of every product above, `W` among them; not the state, sums and biases.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt.ops.fused.layout import Problem, room_between_passes, room_for_tokens
from ttt.ops.fused.registration import Answered
from ttt.ops.triton.linear_parts import (
    both_times_weights,
    errors_of,
    no_weights,
    numbers_at,
    store_tokens,
    store_weights,
    taught,
    times_weights,
    tokens_at,
    weights_at,
)
from ttt.ops.triton.linear_token import token_forward_kernel
from ttt.ops.triton.mlp_parts import normalised, product

BLOCK = 16
"""Rows of the weights that are in a product at a time."""
LAUNCH = {"num_warps": 8, "num_stages": 1}
"""How a program runs; loads are not run ahead."""


@triton.jit
def _errors(
    output_RF, target, target_t, left, gamma_1F, beta_1F, ROWS: tl.constexpr, F: tl.constexpr, EPS: tl.constexpr
):
    """`E` of a block of keys, (5) and (6)."""
    offset_RF = beta_1F - tokens_at(target, target_t, left, ROWS, F)
    _, _, _, error_RF = errors_of(output_RF, offset_RF, gamma_1F, F, EPS)
    return error_RF


@triton.jit
def _answer(
    q, answers, q_t, heads, left, answer_RF, gamma_1F, beta_1F, ROWS: tl.constexpr, F: tl.constexpr, EPS: tl.constexpr
):
    """Write the answers of a block of queries (11); `answer` is `y`."""
    unit_RF, _ = normalised(answer_RF, F, EPS)
    answer_RF = tokens_at(q, q_t, left, ROWS, F) + (gamma_1F * unit_RF + beta_1F)
    store_tokens(answers, answer_RF, heads * F, left, ROWS, F)


# fmt: off
@triton.jit
def _moved(
    weight, k, k_t, left, pushed_RF, ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: on
    """`W + Kᵀ (c η E)` (8) of a block of tokens."""
    moved = ()
    for r in tl.static_range(F // BLOCK):
        k_RB = tokens_at(k + r * BLOCK, k_t, left, ROWS, BLOCK)
        moved += (weight[r] + product(tl.trans(k_RB), pushed_RF, PRECISION),)  # type: ignore[assignment]
    return moved


# fmt: off
@triton.jit(do_not_specialize=["steps", "openings", "group", "last_n", "last_b"])
def linear_forward_kernel(
    q, k, target, rate, gamma, beta, scale, last, weight, bias, summed, summed_bias,
    answers, following, following_bias, carries, errors,
    q_b, q_h, q_t, k_b, k_h, k_t, target_b, target_h, target_t, rate_b, rate_h, rate_t, last_n, last_b,
    heads, steps, openings, group,
    C: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
    CAUSAL: tl.constexpr, CLOSES: tl.constexpr, OPENED: tl.constexpr, ANSWERS: tl.constexpr, KEEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: on
    """Run all mini-batches of one row and head.

    Token t of row b and head h begins `b x_b + h x_h + t x_t` numbers after `x`; answers lie in memory as `[B,T,H,F]`.
    `CLOSES`: mini-batches close; else the one mini-batch stays open, and `following` are its sums. `OPENED`: `summed`
    is what it had summed before. `ANSWERS`: queries are answered; else only the weights move. `KEEPS`: `carries
    [G,P,F+1,F]` receives the `(W; b)` that open the mini-batches `group`, `2 group`, … before `openings`. `errors
    [P,C,F]` is room for one mini-batch; nothing, if a block has all its tokens.
    """
    pair, pairs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row, head = pair // heads, pair % heads
    f = tl.arange(0, F)
    gamma_1F = tl.load(gamma + pair * F + f)[None, :]
    beta_1F = tl.load(beta + pair * F + f)[None, :]
    blocks, bias_F = weights_at(weight + pair * F * F, F, BLOCK), tl.load(bias + pair * F + f)
    q, k, target = q + row * q_b + head * q_h, k + row * k_b + head * k_h, target + row * target_b + head * target_h
    rate, last, scale = rate + row * rate_b + head * rate_h, last + row * last_b, scale + row * C
    answers += (row * steps * C * heads + head) * F
    errors += pair * C * F
    summed, summed_F = summed + pair * F * F, tl.load(summed_bias + pair * F + f)
    # When queries answer: with the errors of their block and those before; with those of all; or with what W becomes.
    AT_ONCE: tl.constexpr = ANSWERS and (CAUSAL or (not CLOSES and C <= ROWS))
    LATER: tl.constexpr = ANSWERS and not CAUSAL and not CLOSES and C > ROWS
    AFTER: tl.constexpr = ANSWERS and not CAUSAL and CLOSES
    error_RF = tl.zeros((ROWS, F), bias_F.dtype)
    for n in range(steps):
        for first in range(0, C, ROWS):
            k_f, q_f, left = k + first * k_t, q + first * q_t, C - first
            if AT_ONCE:
                output_RF, answer_RF = both_times_weights(
                    k_f, k_t, q_f, q_t, left, blocks, bias_F, ROWS, F, BLOCK, PRECISION
                )
            else:
                output_RF = times_weights(k_f, k_t, left, blocks, bias_F, ROWS, F, BLOCK, PRECISION)
            error_RF = _errors(output_RF, target + first * target_t, target_t, left, gamma_1F, beta_1F, ROWS, F, EPS)
            if C > ROWS:
                store_tokens(errors + first * F, error_RF, F, left, ROWS, F)
                tl.debug_barrier()  # others of the program read them
            if AT_ONCE:
                taught_RF = taught(
                    q, k, rate, errors, error_RF, summed, summed_F, q_t, k_t, rate_t, first,
                    C, ROWS, F, BLOCK, CAUSAL, OPENED, PRECISION,
                )
                answer_RF -= numbers_at(scale + first, 1, left, ROWS)[:, None] * taught_RF
                _answer(q_f, answers + first * heads * F, q_t, heads, left, answer_RF, gamma_1F, beta_1F, ROWS, F, EPS)
        if LATER:
            for first in range(0, C, ROWS):
                q_f, left = q + first * q_t, C - first
                answer_RF = times_weights(q_f, q_t, left, blocks, bias_F, ROWS, F, BLOCK, PRECISION)
                taught_RF = taught(
                    q, k, rate, errors, error_RF, summed, summed_F, q_t, k_t, rate_t, first,
                    C, ROWS, F, BLOCK, CAUSAL, OPENED, PRECISION,
                )
                answer_RF -= numbers_at(scale + first, 1, left, ROWS)[:, None] * taught_RF
                _answer(q_f, answers + first * heads * F, q_t, heads, left, answer_RF, gamma_1F, beta_1F, ROWS, F, EPS)
        if not CLOSES and OPENED:
            blocks, bias_F = weights_at(summed, F, BLOCK), summed_F
        elif not CLOSES:
            blocks, bias_F = no_weights(bias_F.dtype, F, BLOCK), tl.zeros_like(bias_F)
        push = -tl.load(last + n * last_n) if CLOSES else 1
        for first in range(0, C, ROWS):
            if C > ROWS:
                error_RF = tokens_at(errors + first * F, F, C - first, ROWS, F)
            pushed_RF = error_RF * (push * numbers_at(rate + first * rate_t, rate_t, C - first, ROWS))[:, None]
            blocks = _moved(blocks, k + first * k_t, k_t, C - first, pushed_RF, ROWS, F, BLOCK, PRECISION)
            bias_F += tl.sum(pushed_RF, 0)
        if AFTER:
            for first in range(0, C, ROWS):
                q_f, left = q + first * q_t, C - first
                answer_RF = times_weights(q_f, q_t, left, blocks, bias_F, ROWS, F, BLOCK, PRECISION)
                _answer(q_f, answers + first * heads * F, q_t, heads, left, answer_RF, gamma_1F, beta_1F, ROWS, F, EPS)
        if KEEPS and (n + 1 < openings) & ((n + 1) % group == 0):
            carry = carries + (((n + 1) // group - 1) * pairs + pair) * (F + 1) * F
            store_weights(carry, blocks, F, BLOCK)
            tl.store(carry + F * F + f, bias_F)
        q, k, target, rate = q + C * q_t, k + C * k_t, target + C * target_t, rate + C * rate_t
        answers += C * heads * F
        if C > ROWS:
            tl.debug_barrier()  # all have read the errors that the next mini-batch writes over
    if ANSWERS:
        store_weights(following + pair * F * F, blocks, F, BLOCK)
        tl.store(following_bias + pair * F + f, bias_F)


def linear_forward(problem: Problem, *, keep: bool) -> Answered:
    """Answer all mini-batches of a linear inner model, in one launch.

    Args:
        problem: the operation's arguments.
        keep: whether a backward will follow.

    Returns:
        `z [B,H,N,C,F]` in the memory order of `room_for_tokens`; the weights after the last mini-batch, or the sums of
        one that stays open, in the shapes of `problem.weights`; and the kept tensor: `W̃ [groups − 1,P,F+1,F]` that open
        the groups after the first, with groups of one mini-batch for the group size 0.
    """
    run = LinearRun(problem)
    dims, group = run.dims, problem.group_size or 1
    answers = room_for_tokens(problem.q_BHNCF)
    following = [torch.empty_like(w) for w in run.weights]
    saved = room_between_passes(dims, group, problem.q_BHNCF) if keep else []
    run.forward(0, dims.steps, run.weights, answers, following, saved, group)
    return answers, following, saved


class LinearRun:
    """A problem's tensors as the kernels address them, and the launches of the forward kernel."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.dims = problem, problem.dims
        batch, heads, width = self.dims.batch, self.dims.heads, self.dims.widths[0]
        self.tokens = [addressable(x) for x in problem[:4]]
        self.gamma, self.beta = (
            x.expand(batch, heads, 1, width).contiguous() for x in (problem.gamma_H1F, problem.beta_H1F)
        )
        self.scale = problem.scale_BC.expand(batch, -1).contiguous()
        self.closes = problem.last_NB is not None
        self.causal = problem.causal and self.dims.size > 1
        self.single = self.closes and self.dims.size == 1
        """Whether mini-batches have one token, for which there are kernels of their own."""
        self.after = self.closes and not self.causal and not self.single
        """Whether backward reads the weights after each mini-batch."""
        # A pointer is needed where none is read, too.
        self.last = self.scale if problem.last_NB is None else problem.last_NB.expand(self.dims.steps, batch)
        self.weights = [w.contiguous() for w in problem.weights]
        self.summed = [g.contiguous() for g in problem.gradients] or self.weights
        size = self.dims.size
        blocks = -(-size // rows_of(width, size))
        self.errors = self.weights[0].new_empty((self.dims.pairs, size, width)) if blocks > 1 else self.weights[0]
        self.constants: dict[str, object] = {"F": width, "EPS": problem.eps}
        if self.single:
            return
        self.constants |= {
            "C": size, "ROWS": rows_of(width, size), "BLOCK": BLOCK, "CAUSAL": self.causal, "CLOSES": self.closes,
            "OPENED": bool(problem.gradients), "PRECISION": problem.precision,
        }  # fmt: skip

    def strides(self) -> tuple[int, ...]:
        """Strides of rows, heads and tokens of q, k, target and rate, then those of mini-batches and rows of `last`."""
        return (*(stride for x in self.tokens for stride in strides_of(x)), self.last.stride(0), self.last.stride(1))

    def of_steps(self, start: int, stop: int) -> list[Tensor]:
        """What mini-batches from `start` to `stop` read besides weights, in the kernels' order."""
        last = self.last[start:stop] if self.closes else self.last
        scale = [] if self.single else [self.scale]
        return [*(x[:, :, start:stop] for x in self.tokens), self.gamma, self.beta, *scale, last]

    def forward(
        self,
        start: int,
        stop: int,
        opening: list[Tensor],
        answers: Tensor | None,
        following: list[Tensor],
        carries: list[Tensor],
        group: int,
    ) -> None:
        """Run the mini-batches from `start` to `stop`.

        Args:
            start: the first.
            stop: the one after the last.
            opening: the weights that open the first.
            answers: receives the answers; None if they are not wanted, nor the weights at the end.
            following: receives the weights at the end, or the sums; anything, if `answers` is None.
            carries: one tensor that receives the openings of every `group`-th mini-batch after the first; without
                answers the opening of `stop` too. Empty if they are not wanted.
            group: see `carries`.
        """
        steps, answered = stop - start, answers is not None
        written = self.tokens[0] if answers is None else answers, *following, *(carries or self.weights[:1])
        counts = *self.strides(), self.dims.heads, steps, steps if answered else steps + 1, group
        flags = {"ANSWERS": answered, "KEEPS": bool(carries), **self.constants, **LAUNCH}
        tokens = self.of_steps(start, stop)
        with torch.cuda.device_of(self.tokens[0]):
            if self.single:
                token_forward_kernel[(self.dims.pairs,)](*tokens, *opening, *written, *counts, **flags)
            else:
                linear_forward_kernel[(self.dims.pairs,)](
                    *tokens, *opening, *self.summed, *written, self.errors, *counts, **flags
                )


def rows_of(width: int, size: int, *, back: bool = False) -> int:
    """The tokens of a block, for mini-batches of C: 32 where they fit into registers, which in backward is nowhere."""
    return 32 if width == 64 and size > 16 and not back else 16


def addressable(x: Tensor) -> Tensor:
    """`x [B,H,N,C,F]` with its vectors in one piece and its tokens evenly spaced; a copy where they are not."""
    steps, size, width = x.shape[2:]
    even = steps == 1 or size == 1 or x.stride(2) == size * x.stride(3)
    if even and (width == 1 or x.stride(4) == 1):
        return x
    return room_for_tokens(x).copy_(x)


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """The strides of rows, heads and tokens of `x [B,H,N,C,F]`."""
    return x.stride(0), x.stride(1), x.stride(3) if x.shape[3] > 1 else x.stride(2)
