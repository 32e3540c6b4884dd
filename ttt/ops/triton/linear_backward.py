"""TTT-Linear in Triton, the backward pass: one program for each row and head.

Groups run from the last to the first. The forward kernel, without its answers, writes the weights that open the
group's mini-batches; then one launch goes through them in reverse. It computes again what belongs to one mini-batch: Z,
E, A, y. With the numbers and symbols of `docs/backward.md`:

    (13)  dy = ι Π(γ dz)                             dβ += Σ dz,   dγ += Σ dz ŷ
    (14)  dB = dy Eᵀ,   dκ = dB A ⊙ M                ds −= dκ η,   dη −= dκᵀ s
    (15)  dA = dB κ,    dE = Bᵀ dy
    (16)  dK = dAᵀ Q                                 dQ = dz + dA K
    (18)  dE += c η ρ,  ρ = K dW' + db'              dK += c η E dW'ᵀ
    (24)  d(cη) = ⟨ρ, E⟩                             dη += c d(cη),   dc = Σ η d(cη)
    (20)  dr = ι Π(dE)                  dZ = ι (Π(γ² dr) − mean(r x̂) dr − E mean(dE x̂) − x̂ mean(dE E))
    (22)  dW = dW' + Kᵀ dZ + Qᵀ dy,   db = db' + Σ (dZ + dy)
    (23)  dK += dZ Wᵀ,  dQ += dy Wᵀ
    (25)  dt = −γ dr,   dβ += Σ γ dr                 dγ += Σ dr (2 γ x̂ + β − t)

A mini-batch that was open before adds `dG = dG' + Qᵀ (−s dy)`, `dQ −= s dy Gᵀ` and `ds −= ⟨dy, Q G + g⟩`; one that
stays open has `c = 1`, `dG'` in place of `dW'`, and its `dW` starts at zero.

W and dW together would not fit into registers at F 128. So both stay in memory, where a program's own are near. Each
mini-batch goes through them in blocks of rows, then of columns, then of columns of dW alone: it reads W twice, dW three
times, and writes dW once. Beside a block a program holds some tiles `[C,F]`. `dy`, `dZ` and E lie where dQ, dK and dt
will be written, so that their columns can be had without the rest, and so that no result of a product is turned round
on the chip, which compilers have got wrong: a product with a transpose reads both factors from memory.

Products of one loop share the warps' places in a tile. So those of `[C,F]`, of `[C,C]` and of `[F,BLOCK]` have loops of
their own: in one loop, every warp would hold the whole of `[C,F]`.

What all mini-batches share is summed by each program alone, and over rows by PyTorch, so that no sum depends on the
order in which programs run.

A lower precision rounds both operands of every product above.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt.ops.fused.layout import Problem, parted, room_for_tokens
from ttt.ops.fused.registration import Gradients
from ttt.ops.triton.linear import (
    LinearRun,
    addressable,
    errors_of,
    launch_of,
    rows_of_weights,
    strides_of,
    tokens_at,
)
from ttt.ops.triton.mlp_parts import coefficients, is_constant, normalised, product, projected

BLOCK = 16
"""Rows or columns of the weights that are on the chip at a time."""


@triton.jit
def _store_tokens(at, x_CF, heads, C: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr):
    """Write the tokens of a mini-batch that begins at the pointer `at` of memory `[B,T,H,F]`."""
    i, f = tl.arange(0, ROWS)[:, None], tl.arange(0, F)[None, :]
    tl.store(at + (i * heads * F + f), x_CF, mask=i < C)


# fmt: off
@triton.jit
def _products_of_tokens(
    a, b, a_t, b_t, start_CC,
    C: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """`start + a bᵀ` and `start + b aᵀ` of the tokens of a mini-batch in memory."""
    mixed_CC, turned_CC = start_CC, start_CC
    for at in range(0, F, BLOCK):
        a_CB, b_CB = tokens_at(a + at, a_t, C, ROWS, BLOCK), tokens_at(b + at, b_t, C, ROWS, BLOCK)
        mixed_CC += product(a_CB, tl.trans(b_CB), PRECISION)
        turned_CC += product(b_CB, tl.trans(a_CB), PRECISION)
    return mixed_CC, turned_CC


@triton.jit
def _norm_back(d_answer_CF, answer_CF, gamma_1F, F: tl.constexpr, EPS: tl.constexpr, LEAST: tl.constexpr):
    """`dy` of (13), and `ŷ`."""
    unit_CF, inverse_C1 = normalised(answer_CF, F, EPS)
    d_answered_CF = inverse_C1 * projected(gamma_1F * d_answer_CF, unit_CF, F)
    # A constant vector gets no gradient (`ttt.ops.norm`).
    return tl.where(is_constant(answer_CF, LEAST), 0, d_answered_CF), unit_CF


@triton.jit
def _errors_back(
    d_error_CF, output_CF, unit_CF, inverse_C1, slope_CF, error_CF, gamma_1F, F: tl.constexpr, LEAST: tl.constexpr
):
    """`dr` and `dZ` of (20)."""
    constant_C1 = is_constant(output_CF, LEAST)
    silent_C1 = (tl.max(tl.abs(error_CF), 1) == 0)[:, None]
    d_slope_CF = tl.where(constant_C1 & silent_C1, 0, inverse_C1) * projected(d_error_CF, unit_CF, F)
    along_unit_C1 = (tl.sum(d_error_CF * unit_CF, 1) / F)[:, None]
    along_error_C1 = (tl.sum(d_error_CF * error_CF, 1) / F)[:, None]
    to_slope_C1 = (tl.sum(slope_CF * unit_CF, 1) / F)[:, None]
    d_output_CF = projected(gamma_1F * gamma_1F * d_slope_CF, unit_CF, F) - to_slope_C1 * d_slope_CF
    d_output_CF -= error_CF * along_unit_C1 + unit_CF * along_error_C1
    return d_slope_CF, tl.where(constant_C1, 0, inverse_C1) * d_output_CF


# fmt: off
@triton.jit
def _products(
    q, k, q_t, k_t, weight, bias_1F, d_next, d_next_1F, summed, summed_1F,
    C: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, OPENED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: on
    """`Z`, `Q W + b`, `ρ` and `Q G + g`, a block of rows of the weights at a time."""
    output_CF = tl.zeros((ROWS, F), bias_1F.dtype) + bias_1F
    answer_CF = tl.zeros((ROWS, F), bias_1F.dtype) + bias_1F
    by_next_CF = tl.zeros((ROWS, F), bias_1F.dtype) + d_next_1F
    step_CF = tl.zeros((ROWS, F), bias_1F.dtype) + summed_1F
    for at in range(0, F, BLOCK):
        q_CB, k_CB = tokens_at(q + at, q_t, C, ROWS, BLOCK), tokens_at(k + at, k_t, C, ROWS, BLOCK)
        weight_BF = tl.load(weight + at * F + rows_of_weights(BLOCK, F))
        output_CF += product(k_CB, weight_BF, PRECISION)
        answer_CF += product(q_CB, weight_BF, PRECISION)
        by_next_CF += product(k_CB, tl.load(d_next + at * F + rows_of_weights(BLOCK, F)), PRECISION)
        if OPENED:
            step_CF += product(q_CB, tl.load(summed + at * F + rows_of_weights(BLOCK, F)), PRECISION)
    return output_CF, answer_CF, by_next_CF, step_CF


# fmt: off
@triton.jit
def _weights_back(
    q_CF, k_CF, d_y, d_output, error, spacing, push_C1, scale_C1, weight, d_next, summed, d_weight, d_summed,
    C: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, CLOSES: tl.constexpr,
    OPENED: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """`dW` and `dG` (22), a block of columns at a time, and what the weights give `dQ` and `dK`, (18) and (23).

    `dy`, `dZ` and `E` are read from memory, where their columns can be had without the rest.
    """
    d_q_CF, d_k_CF = tl.zeros_like(q_CF), tl.zeros_like(k_CF)
    for at in range(0, F, BLOCK):
        d_y_CB = tokens_at(d_y + at, spacing, C, ROWS, BLOCK)
        d_output_CB = tokens_at(d_output + at, spacing, C, ROWS, BLOCK)
        pushed_CB = push_C1 * tokens_at(error + at, spacing, C, ROWS, BLOCK)
        block = at + tl.arange(0, F)[:, None] * F + tl.arange(0, BLOCK)[None, :]
        weight_BF = tl.trans(tl.load(weight + block))
        d_q_CF += product(d_y_CB, weight_BF, PRECISION)
        d_k_CF += product(d_output_CB, weight_BF, PRECISION)
        d_k_CF += product(pushed_CB, tl.trans(tl.load(d_next + block)), PRECISION)
        if OPENED:
            d_q_CF += product(-scale_C1 * d_y_CB, tl.trans(tl.load(summed + block)), PRECISION)
    tl.debug_barrier()  # all have read what is now written over
    for at in range(0, F, BLOCK):
        d_y_CB = tokens_at(d_y + at, spacing, C, ROWS, BLOCK)
        d_output_CB = tokens_at(d_output + at, spacing, C, ROWS, BLOCK)
        block = at + tl.arange(0, F)[:, None] * F + tl.arange(0, BLOCK)[None, :]
        d_next_FB = tl.load(d_next + block)
        if OPENED:
            tl.store(d_summed + block, d_next_FB + product(tl.trans(q_CF), -scale_C1 * d_y_CB, PRECISION))
        if not CLOSES:
            d_next_FB = tl.zeros_like(d_next_FB)
        d_next_FB += product(tl.trans(k_CF), d_output_CB, PRECISION) + product(tl.trans(q_CF), d_y_CB, PRECISION)
        tl.store(d_weight + block, d_next_FB)
    return d_q_CF, d_k_CF


# fmt: off
@triton.jit(do_not_specialize=["steps", "last_n", "last_b", "d_answers_b", "d_answers_h", "d_answers_t"])
def linear_backward_kernel(
    q, k, target, rate, gamma, beta, scale, last, weight, bias, carries, summed, summed_bias,
    d_answers, d_q, d_k, d_target, d_rate, d_next, d_next_bias, d_weight, d_bias, d_summed, d_summed_bias,
    d_gamma, d_beta, d_scale, d_pushes,
    q_b, q_h, q_t, k_b, k_h, k_t, target_b, target_h, target_t, rate_b, rate_h, rate_t, last_n, last_b,
    d_answers_b, d_answers_h, d_answers_t, heads, steps, length,
    C: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
    LEAST: tl.constexpr, CAUSAL: tl.constexpr, CLOSES: tl.constexpr, OPENED: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """Run the mini-batches of one row and head from the last to the first.

    Arguments are named as in `linear_forward_kernel`; `weight` and `bias` open the first mini-batch, `carries` the
    others. `d_next` is the gradient of what a mini-batch leaves behind, `d_weight` receives that of the weights that
    open it: the same memory, if mini-batches close. Tokens' gradients lie in memory as `[B,length,H,F]`. What the
    mini-batches share, `d_gamma [P,F]`, `d_beta` and `d_scale [P,C]`, is added to.
    """
    pair, pairs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row, head = pair // heads, pair % heads
    i, f = tl.arange(0, ROWS), tl.arange(0, F)
    live = i < C
    gamma_1F = tl.load(gamma + pair * F + f)[None, :]
    beta_1F = tl.load(beta + pair * F + f)[None, :]
    scale_C = tl.load(scale + row * C + i, mask=live, other=0)
    d_next_F = tl.load(d_next_bias + pair * F + f)
    summed_F = tl.load(summed_bias + pair * F + f)
    d_gamma_F = tl.load(d_gamma + pair * F + f)
    d_beta_F = tl.load(d_beta + pair * F + f)
    d_scale_C = tl.load(d_scale + pair * C + i, mask=live, other=0)
    token = tl.cast(steps, tl.int64) * C  # the first of the mini-batch after this one
    q, k, target = q + row * q_b + head * q_h, k + row * k_b + head * k_h, target + row * target_b + head * target_h
    rate, last = rate + row * rate_b + head * rate_h, last + row * last_b
    d_answers += row * d_answers_b + head * d_answers_h
    d_next, summed = d_next + pair * F * F, summed + pair * F * F
    for back in range(steps):
        n = steps - 1 - back
        token -= C
        place = (row * length + token) * heads + head
        q_n, k_n, d_answers_n = q + token * q_t, k + token * k_t, d_answers + token * d_answers_t
        offset_CF = beta_1F - tokens_at(target + token * target_t, target_t, C, ROWS, F)
        rate_C = tl.load(rate + token * rate_t + i * rate_t, mask=live, other=0)
        d_answer_CF = tokens_at(d_answers_n, d_answers_t, C, ROWS, F)
        weight_n, bias_n = weight + pair * F * F, bias + pair * F
        if n > 0:
            weight_n = carries + ((n - 1) * pairs + pair) * (F + 1) * F
            bias_n = weight_n + F * F
        push = tl.full((), 1, rate_C.dtype)
        if CLOSES:
            push = -tl.load(last + n * last_n)

        output_CF, answer_CF, by_next_CF, step_CF = _products(
            q_n, k_n, q_t, k_t, weight_n, tl.load(bias_n + f)[None, :], d_next, d_next_F[None, :], summed,
            summed_F[None, :], C, ROWS, F, BLOCK, OPENED, PRECISION,
        )
        ones_CC = tl.full((ROWS, ROWS), 1, rate_C.dtype)
        seen_CC, seen_by_key_CC = _products_of_tokens(q_n, k_n, q_t, k_t, ones_CC, C, ROWS, F, BLOCK, PRECISION)
        unit_CF, inverse_C1, slope_CF, error_CF = errors_of(output_CF, offset_CF, gamma_1F, F, EPS)
        kappa_CC, kappa_by_key_CC = coefficients(rate_C, scale_C, CAUSAL, ROWS)
        answer_CF += product(seen_CC * kappa_CC, error_CF, PRECISION)
        if OPENED:
            answer_CF -= scale_C[:, None] * step_CF
        d_y_CF, answer_unit_CF = _norm_back(d_answer_CF, answer_CF, gamma_1F, F, EPS, LEAST)
        d_beta_F += tl.sum(d_answer_CF, 0)
        d_gamma_F += tl.sum(d_answer_CF * answer_unit_CF, 0)
        d_y_n, d_output_n, error_n = d_q + place * F, d_k + place * F, d_target + place * F
        _store_tokens(error_n, error_CF, heads, C, ROWS, F)
        _store_tokens(d_y_n, d_y_CF, heads, C, ROWS, F)
        tl.debug_barrier()

        # The queries, (14) and (15), and the update, (18) and (24).
        d_mixed_CC, d_mixed_by_key_CC = _products_of_tokens(
            d_y_n, error_n, heads * F, heads * F, tl.zeros_like(ones_CC), C, ROWS, F, BLOCK, PRECISION
        )
        d_kappa_CC = d_mixed_CC * seen_CC
        if CAUSAL:
            d_kappa_CC = tl.where(i[None, :] <= i[:, None], d_kappa_CC, 0)
        d_scale_C -= tl.sum(d_kappa_CC * rate_C[None, :], 1)
        if OPENED:
            d_scale_C -= tl.sum(d_y_CF * step_CF, 1)
            tl.store(d_summed_bias + pair * F + f, d_next_F - tl.sum(scale_C[:, None] * d_y_CF, 0))
        d_error_CF = product(seen_by_key_CC * kappa_by_key_CC, d_y_CF, PRECISION)
        d_error_CF += (push * rate_C)[:, None] * by_next_CF
        d_push_C = tl.sum(by_next_CF * error_CF, 1)
        d_rate_C = push * d_push_C - tl.sum(d_kappa_CC * scale_C[:, None], 0)
        tl.store(d_rate + place + i * heads, d_rate_C, mask=live)
        if CLOSES:
            tl.store(d_pushes + n * pairs + pair, tl.sum(rate_C * d_push_C, 0))

        # Through the inner loss's gradient (20), to target and norm (25), queries, keys and weights.
        d_slope_CF, d_output_CF = _errors_back(
            d_error_CF, output_CF, unit_CF, inverse_C1, slope_CF, error_CF, gamma_1F, F, LEAST
        )
        d_beta_F += tl.sum(gamma_1F * d_slope_CF, 0)
        d_gamma_F += tl.sum(d_slope_CF * (2 * gamma_1F * unit_CF + offset_CF), 0)
        _store_tokens(d_output_n, d_output_CF, heads, C, ROWS, F)
        tl.debug_barrier()
        q_CF, k_CF = tokens_at(q_n, q_t, C, ROWS, F), tokens_at(k_n, k_t, C, ROWS, F)
        d_q_CF, d_k_CF = _weights_back(
            q_CF, k_CF, d_y_n, d_output_n, error_n, heads * F, (push * rate_C)[:, None], scale_C[:, None], weight_n,
            d_next, summed, d_weight + pair * F * F, d_summed + pair * F * F, C, ROWS, F, BLOCK, CLOSES, OPENED,
            PRECISION,
        )
        d_q_CF += d_answer_CF + product(d_mixed_CC * kappa_CC, k_CF, PRECISION)
        d_k_CF += product(d_mixed_by_key_CC * kappa_by_key_CC, q_CF, PRECISION)
        tl.debug_barrier()  # all have read what is now written over
        _store_tokens(d_target + place * F, -gamma_1F * d_slope_CF, heads, C, ROWS, F)
        _store_tokens(d_q + place * F, d_q_CF, heads, C, ROWS, F)
        _store_tokens(d_k + place * F, d_k_CF, heads, C, ROWS, F)
        if not CLOSES:
            d_next_F = tl.zeros_like(d_next_F)
        d_next_F += tl.sum(d_output_CF + d_y_CF, 0)
        tl.debug_barrier()  # the next mini-batch reads what others have written
    tl.store(d_bias + pair * F + f, d_next_F)
    tl.store(d_gamma + pair * F + f, d_gamma_F)
    tl.store(d_beta + pair * F + f, d_beta_F)
    tl.store(d_scale + pair * C + i, d_scale_C, mask=live)


def linear_backward(
    problem: Problem, saved: list[Tensor], d_answers: Tensor, d_following: list[Tensor]
) -> Gradients:
    """All gradients of `linear_forward`: two launches for each group, one for groups of one mini-batch.

    Args:
        problem: the operation's arguments.
        saved: what `linear_forward` kept.
        d_answers: `dz [B,H,N,C,F]`.
        d_following: the gradients of the weights at the end, or of the sums.

    Returns:
        The gradients of the problem's tensors, in its order.
    """
    run = LinearBackward(problem, d_answers, d_following)
    steps, group = run.dims.steps, problem.group_size
    if group < 2:
        run.group(0, steps, run.weights, saved[0])
        return run.gradients()
    room = saved[0].new_empty((group - 1, *saved[0].shape[1:]))
    for start in range((steps - 1) // group * group, -1, -group):
        stop = min(start + group, steps)
        opening = parted(run.dims, [saved[0][start // group - 1]]) if start else run.weights
        if stop - start > 1:
            run.forward(start, stop - 1, opening, None, run.weights, [room], 1)
        run.group(start, stop, opening, room)
    return run.gradients()


class LinearBackward(LinearRun):
    """A problem's tensors and their gradients as the kernels address them, and the launches of the backward kernel."""

    def __init__(self, problem: Problem, d_answers: Tensor, d_following: list[Tensor]) -> None:
        super().__init__(problem)
        pairs, width, q = self.dims.pairs, self.dims.widths[0], problem.q_BHNCF
        self.d_answers = addressable(d_answers)
        self.d_tokens = [room_for_tokens(x) for x in problem[:4]]
        if self.closes:  # each mini-batch moves the gradient of the weights in place
            self.d_weights = self.d_next = [d.clone(memory_format=torch.contiguous_format) for d in d_following]
        else:
            self.d_next = [d.contiguous() for d in d_following]
            self.d_weights = [torch.empty_like(w) for w in self.weights]
        self.d_summed = [torch.empty_like(g) for g in self.summed] if problem.gradients else self.d_weights
        self.d_gamma, self.d_beta, self.d_scale = (
            q.new_zeros((pairs, size)) for size in (width, width, self.dims.size)
        )
        self.d_pushes = q.new_empty((self.dims.steps, pairs))
        self.least = 4 * torch.finfo(q.dtype).eps

    def group(self, start: int, stop: int, opening: list[Tensor], carries: Tensor) -> None:
        """Run the mini-batches from `stop` back to `start`.

        Args:
            start: the first.
            stop: the one after the last.
            opening: the weights that open the first.
            carries: `W̃ [≥ stop − start − 1,P,F+1,F]` that open the others.
        """
        dims = self.dims
        with torch.cuda.device_of(self.d_pushes):
            linear_backward_kernel[(dims.pairs,)](
                *self.of_steps(start, stop), *opening, carries, *self.summed,
                *(x[:, :, start:stop] for x in (self.d_answers, *self.d_tokens)), *self.d_next, *self.d_weights,
                *self.d_summed, self.d_gamma, self.d_beta, self.d_scale, self.d_pushes[start:],
                *self.strides(), *strides_of(self.d_answers), dims.heads, stop - start, dims.steps * dims.size,
                BLOCK=BLOCK, LEAST=self.least, **self.constants,
                **launch_of(dims.widths[0], dims.size, self.problem.precision, back=True),
            )  # fmt: skip

    def gradients(self) -> Gradients:
        """The gradients in the shapes of the inputs."""
        problem, dims = self.problem, self.dims
        shape = dims.batch, dims.heads
        d_gamma, d_beta = (
            x.view(*shape, 1, -1).sum_to_size(norm.shape)
            for x, norm in ((self.d_gamma, problem.gamma_H1F), (self.d_beta, problem.beta_H1F))
        )
        d_scale = self.d_scale.view(*shape, -1).sum(1).sum_to_size(problem.scale_BC.shape)
        if problem.last_NB is None:
            d_last = self.d_pushes.new_zeros((dims.steps, dims.batch))
        else:
            d_last = -self.d_pushes.view(dims.steps, *shape).sum(2).sum_to_size(problem.last_NB.shape)
        d_q, d_k, d_target, d_rate = self.d_tokens
        d_summed = self.d_summed if problem.gradients else []
        return d_q, d_k, d_target, d_rate, d_gamma, d_beta, d_scale, d_last, self.d_weights, d_summed
