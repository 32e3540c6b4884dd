"""TTT-Linear in Triton, the forward pass: one program for each row and head, the fast weights in registers.

A program runs all mini-batches of its row and head, one after the other, with `W [F,F]` and `b [F]` of the linear inner
model in registers. It reads each token once and writes each answer once; the state leaves the chip where a group opens,
if a backward will follow, and at the end. For one mini-batch, with the numbers of `docs/backward.md`:

    (1)   Z = K W + b
    (5)   r = γ (γ x̂ + β − t)                       x̂ and ι of Z
    (6)   E = ι Π(r)
    (9)   B = (Q Kᵀ + 1) κ,   κ = −(s ηᵀ) ⊙ M
    (10)  y = Q W + b + B E                         − s (Q G + g), if the mini-batch was open before
    (11)  z = Q + γ ŷ + β
    (8)   W' = W + Kᵀ (c η E),   b' = b + Σ c η E   or G' = G + Kᵀ (η E), …, if it stays open

Tiles have at least 16 rows, which `tl.dot` needs; the rows after the C tokens are zeros at zero rate. On the chip are
`W` in registers (F 128: 64 numbers a thread at 8 warps) and, as an operand, once more in shared memory, and the tokens.

A lower precision rounds both operands of every product above, `W` among them; not the state, sums and biases.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt.ops.constants import Precision
from ttt.ops.fused.layout import Problem, room_between_passes, room_for_tokens
from ttt.ops.fused.registration import Answered
from ttt.ops.triton.mlp_parts import coefficients, normalised, product, projected


@triton.jit
def tokens_at(at, spacing, C: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr):
    """The tokens of a mini-batch `[ROWS,F]` that begins at the pointer `at`, `spacing` numbers from token to token."""
    i, f = tl.arange(0, ROWS)[:, None], tl.arange(0, F)[None, :]
    return tl.load(at + (i * spacing + f), mask=i < C, other=0)


@triton.jit
def rows_of_weights(ROWS: tl.constexpr, F: tl.constexpr):
    """Where the numbers of consecutive rows of `W [F,F]` lie."""
    return tl.arange(0, ROWS)[:, None] * F + tl.arange(0, F)[None, :]


@triton.jit
def errors_of(output_CF, offset_CF, gamma_1F, F: tl.constexpr, EPS: tl.constexpr):
    """`x̂`, `ι`, `r` and `E` of a mini-batch's keys, (5) and (6); `output` is `Z`, `offset` is `β − t`."""
    unit_CF, inverse_C1 = normalised(output_CF, F, EPS)
    slope_CF = gamma_1F * (gamma_1F * unit_CF + offset_CF)
    return unit_CF, inverse_C1, slope_CF, inverse_C1 * projected(slope_CF, unit_CF, F)


# fmt: off
@triton.jit(do_not_specialize=["steps", "openings", "group", "last_n", "last_b"])
def linear_forward_kernel(
    q, k, target, rate, gamma, beta, scale, last, weight, bias, summed, summed_bias,
    answers, following, following_bias, carries,
    q_b, q_h, q_t, k_b, k_h, k_t, target_b, target_h, target_t, rate_b, rate_h, rate_t, last_n, last_b,
    heads, steps, openings, group,
    C: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, EPS: tl.constexpr, CAUSAL: tl.constexpr,
    CLOSES: tl.constexpr, OPENED: tl.constexpr, ANSWERS: tl.constexpr, KEEPS: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """Run all mini-batches of one row and head.

    Token t of row b and head h begins `b x_b + h x_h + t x_t` numbers after `x`; answers lie in memory as `[B,T,H,F]`.
    `CLOSES`: mini-batches close; else the one mini-batch stays open, and `following` are its sums. `OPENED`: `summed`
    is what it had summed before. `ANSWERS`: queries are answered; else only the weights move. `KEEPS`: `carries
    [G,P,F+1,F]` receives the `(W; b)` that open the mini-batches `group`, `2 group`, … before `openings`.
    """
    pair, pairs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row, head = pair // heads, pair % heads
    i, f = tl.arange(0, ROWS), tl.arange(0, F)
    gamma_1F = tl.load(gamma + pair * F + f)[None, :]
    beta_1F = tl.load(beta + pair * F + f)[None, :]
    scale_C = tl.load(scale + row * C + i, mask=i < C, other=0)
    weight_FF = tl.load(weight + pair * F * F + rows_of_weights(F, F))
    bias_F = tl.load(bias + pair * F + f)
    q, k, target = q + row * q_b + head * q_h, k + row * k_b + head * k_h, target + row * target_b + head * target_h
    rate, last = rate + row * rate_b + head * rate_h, last + row * last_b
    answers += (row * steps * C * heads + head) * F
    for n in range(steps):
        k_CF = tokens_at(k, k_t, C, ROWS, F)
        offset_CF = beta_1F - tokens_at(target, target_t, C, ROWS, F)
        rate_C = tl.load(rate + i * rate_t, mask=i < C, other=0)
        output_CF = bias_F[None, :] + product(k_CF, weight_FF, PRECISION)  # (1)
        _, _, _, error_CF = errors_of(output_CF, offset_CF, gamma_1F, F, EPS)
        if ANSWERS:
            q_CF = tokens_at(q, q_t, C, ROWS, F)
            seen_CC = product(q_CF, tl.trans(k_CF), PRECISION) + 1
            kappa_CC, _ = coefficients(rate_C, scale_C, CAUSAL, ROWS)  # (9)
            answer_CF = bias_F[None, :] + product(q_CF, weight_FF, PRECISION)
            answer_CF += product(seen_CC * kappa_CC, error_CF, PRECISION)  # (10)
            if OPENED:
                step_CF = product(q_CF, tl.load(summed + pair * F * F + rows_of_weights(F, F)), PRECISION)
                answer_CF -= scale_C[:, None] * (step_CF + tl.load(summed_bias + pair * F + f)[None, :])
            unit_CF, _ = normalised(answer_CF, F, EPS)
            answer_at = answers + (i[:, None] * heads * F + f[None, :])
            tl.store(answer_at, q_CF + (gamma_1F * unit_CF + beta_1F), mask=(i < C)[:, None])  # (11)
        if CLOSES:
            rate_C *= -tl.load(last + n * last_n)
        elif OPENED:
            weight_FF = tl.load(summed + pair * F * F + rows_of_weights(F, F))
            bias_F = tl.load(summed_bias + pair * F + f)
        else:
            weight_FF = tl.zeros_like(weight_FF)
            bias_F = tl.zeros_like(bias_F)
        pushed_CF = error_CF * rate_C[:, None]
        weight_FF += product(tl.trans(k_CF), pushed_CF, PRECISION)  # (8)
        bias_F += tl.sum(pushed_CF, 0)
        if KEEPS and (n + 1 < openings) & ((n + 1) % group == 0):
            carry = carries + (((n + 1) // group - 1) * pairs + pair) * (F + 1) * F
            tl.store(carry + rows_of_weights(F, F), weight_FF)
            tl.store(carry + F * F + f, bias_F)
        q, k, target, rate = q + C * q_t, k + C * k_t, target + C * target_t, rate + C * rate_t
        answers += C * heads * F
    if ANSWERS:
        tl.store(following + pair * F * F + rows_of_weights(F, F), weight_FF)
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
        # A pointer is needed where none is read, too.
        self.last = self.scale if problem.last_NB is None else problem.last_NB.expand(self.dims.steps, batch)
        self.weights = [w.contiguous() for w in problem.weights]
        self.summed = [g.contiguous() for g in problem.gradients] or self.weights
        size = self.dims.size
        self.constants = {
            "C": size, "ROWS": rows_of(size), "F": width, "EPS": problem.eps, "CAUSAL": problem.causal and size > 1,
            "CLOSES": self.closes, "OPENED": bool(problem.gradients), "PRECISION": problem.precision,
        }  # fmt: skip

    def strides(self) -> tuple[int, ...]:
        """Strides of rows, heads and tokens of q, k, target and rate, then those of mini-batches and rows of `last`."""
        return (*(stride for x in self.tokens for stride in strides_of(x)), self.last.stride(0), self.last.stride(1))

    def of_steps(self, start: int, stop: int) -> list[Tensor]:
        """What mini-batches from `start` to `stop` read besides weights, in the kernels' order."""
        last = self.last[start:stop] if self.closes else self.last
        return [*(x[:, :, start:stop] for x in self.tokens), self.gamma, self.beta, self.scale, last]

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
        with torch.cuda.device_of(self.tokens[0]):
            linear_forward_kernel[(self.dims.pairs,)](
                *self.of_steps(start, stop), *opening, *self.summed,
                self.tokens[0] if answers is None else answers, *following, *(carries or self.weights[:1]),
                *self.strides(), self.dims.heads, steps, steps if answered else steps + 1, group,
                ANSWERS=answered, KEEPS=bool(carries), **self.constants,
                **launch_of(self.dims.widths[0], self.dims.size, self.problem.precision),
            )  # fmt: skip


def rows_of(size: int) -> int:
    """The rows of a tile for mini-batches of C tokens."""
    return max(16, triton.next_power_of_2(size))


def launch_of(width: int, size: int, precision: Precision, *, back: bool = False) -> dict[str, int]:
    """How many warps run a program: four where everything fits into their registers. Loads are not run ahead."""
    small = width <= 64 and size <= 16 and precision != "ieee" and not back
    return {"num_warps": 4 if small else 8, "num_stages": 1}


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
