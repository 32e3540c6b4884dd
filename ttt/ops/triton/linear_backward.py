"""TTT-Linear in Triton, the backward pass: one program for each row and head, the weights' gradient in registers.

Groups run from the last to the first. The forward kernel, without its answers, writes the weights that open the group's
mini-batches; then one launch goes through them in reverse. It carries `dW̃'` in registers, reads each `W̃` once, and
computes again what belongs to one mini-batch: Z, E, A, y. For one mini-batch, with the numbers of `docs/backward.md` and
its symbols:

    (13)  dy = ι Π(γ dz)                             dβ += Σ dz,   dγ += Σ dz ŷ
    (14)  dB = dy Eᵀ,   dκ = dB A ⊙ M                ds −= dκ η,   dη −= dκᵀ s
    (15)  dA = dB κ,    dE = Bᵀ dy
    (16)  dKᵀ = Qᵀ dA                                dx = dA K + dy Wᵀ
    (18)  dE += c η ρ,  ρ = K dW' + db'              dKᵀ += dW' (c η E)ᵀ
    (20)  dr = ι Π(dE)                               dZ = ι Π(γ² dr) − ι mean(r x̂) dr − ι (E mean(dE x̂) + x̂ mean(dE E))
    (22)  dW = dW' + Kᵀ dZ + Qᵀ dy,   db = db' + Σ (dZ + dy)
    (23)  dK += dZ Wᵀ,  dQ = dz + dx
    (24)  d(cη) = ⟨ρ, E⟩                             dη += c d(cη),   dc = Σ η d(cη)
    (25)  dt = −γ dr,   dβ += Σ γ dr                 dγ += Σ dr (2 γ x̂ + β − t)

A mini-batch that was open before adds to (13) ff. `dG = dG' + Qᵀ (−s dy)`, `dx −= s dy Gᵀ`, `ds −= ⟨dy, Q G + g⟩`; one
that stays open has `c = 1`, `dG'` in place of `dW'`, and its `dW` starts at zero.

No result of a product is turned round on the chip, which compilers have got wrong: what must be read by columns, E and
`dKᵀ`, passes through the memory of dK. What all mini-batches share is summed by each program alone, and over rows by
PyTorch, so that no sum depends on the order in which programs run.

A lower precision rounds both operands of every product above.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt.ops.fused.layout import Problem, parted, room_for_tokens
from ttt.ops.fused.registration import Gradients
from ttt.ops.triton.linear import LinearRun, addressable, strides_of
from ttt.ops.triton.mlp_parts import coefficients, is_constant, normalised, product, projected


# fmt: off
@triton.jit
def linear_backward_kernel(
    q, k, target, rate, gamma, beta, scale, last, weight, bias, carries, summed, summed_bias,
    d_answers, d_q, d_k, d_target, d_rate, d_next, d_next_bias, d_weight, d_bias, d_summed, d_summed_bias,
    d_gamma, d_beta, d_scale, d_pushes,
    q_b, q_h, q_t, k_b, k_h, k_t, target_b, target_h, target_t, rate_b, rate_h, rate_t, last_n, last_b,
    d_answers_b, d_answers_h, d_answers_t, heads, steps, length,
    C: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, EPS: tl.constexpr, LEAST: tl.constexpr, CAUSAL: tl.constexpr,
    CLOSES: tl.constexpr, OPENED: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """Run the mini-batches of one row and head from the last to the first.

    Arguments are named as in `linear_forward_kernel`; `weight` and `bias` open the first mini-batch, `carries` the
    others. `d_next` is the gradient of what they leave behind, `d_weight` receives that of `weight`, and may be the same
    memory. Tokens' gradients lie in memory as `[B,length,H,F]`. `d_gamma [P,F]`, `d_beta`, `d_scale [P,C]` are added to.
    """
    pair = tl.program_id(0).to(tl.int64)
    row, head = pair // heads, pair % heads
    i, f = tl.arange(0, ROWS), tl.arange(0, F)
    live = i < C
    live_C1 = live[:, None]
    square = f[:, None] * F + f[None, :]
    gamma_1F = tl.load(gamma + pair * F + f)[None, :]
    beta_1F = tl.load(beta + pair * F + f)[None, :]
    scale_C = tl.load(scale + row * C + i, mask=live, other=0)
    d_next_FF = tl.load(d_next + pair * F * F + square)
    d_next_F = tl.load(d_next_bias + pair * F + f)
    d_gamma_F = tl.load(d_gamma + pair * F + f)
    d_beta_F = tl.load(d_beta + pair * F + f)
    d_scale_C = tl.load(d_scale + pair * C + i, mask=live, other=0)
    start = tl.cast(steps - 1, tl.int64) * C
    token_C = start + i
    q_at = q + row * q_b + head * q_h + token_C[:, None] * q_t + f[None, :]
    k_at = k + row * k_b + head * k_h + token_C[:, None] * k_t + f[None, :]
    target_at = target + row * target_b + head * target_h + token_C[:, None] * target_t + f[None, :]
    rate_at = rate + row * rate_b + head * rate_h + token_C * rate_t
    d_answer_at = d_answers + row * d_answers_b + head * d_answers_h + token_C[:, None] * d_answers_t + f[None, :]
    place_C = (row * length + token_C) * heads + head
    for back in range(steps):
        n = steps - 1 - back
        q_CF = tl.load(q_at, mask=live_C1, other=0)
        k_CF = tl.load(k_at, mask=live_C1, other=0)
        offset_CF = beta_1F - tl.load(target_at, mask=live_C1, other=0)
        rate_C = tl.load(rate_at, mask=live, other=0)
        d_answer_CF = tl.load(d_answer_at, mask=live_C1, other=0)
        if n == 0:
            weight_at, bias_at = weight + pair * F * F, bias + pair * F
        else:
            weight_at = carries + ((n - 1) * tl.num_programs(0) + pair) * (F + 1) * F
            bias_at = weight_at + F * F
        weight_FF = tl.load(weight_at + square)
        bias_1F = tl.load(bias_at + f)[None, :]
        push = tl.full((), 1, rate_C.dtype)
        if CLOSES:
            push = -tl.load(last + n * last_n + row * last_b)
        push_C1 = (push * rate_C)[:, None]
        rows_at, columns_at = place_C[:, None] * F + f[None, :], place_C[None, :] * F + f[:, None]

        # The keys once more, (1) to (6).
        output_CF = bias_1F + product(k_CF, weight_FF, PRECISION)
        unit_CF, inverse_C1 = normalised(output_CF, F, EPS)
        slope_CF = gamma_1F * (gamma_1F * unit_CF + offset_CF)
        error_CF = inverse_C1 * projected(slope_CF, unit_CF, F)
        tl.store(d_k + rows_at, error_CF, mask=live_C1)
        tl.debug_barrier()
        error_FC = tl.load(d_k + columns_at, mask=live[None, :], other=0)

        # The queries once more, (9) and (10), and back, (11) and (13).
        seen_CC = product(q_CF, tl.trans(k_CF), PRECISION) + 1
        seen_by_key_CC = product(k_CF, tl.trans(q_CF), PRECISION) + 1
        kappa_CC, kappa_by_key_CC = coefficients(rate_C, scale_C, CAUSAL, ROWS)
        answer_CF = bias_1F + product(q_CF, weight_FF, PRECISION)
        answer_CF += product(seen_CC * kappa_CC, error_CF, PRECISION)
        if OPENED:
            summed_FF = tl.load(summed + pair * F * F + square)
            step_CF = product(q_CF, summed_FF, PRECISION) + tl.load(summed_bias + pair * F + f)[None, :]
            answer_CF -= scale_C[:, None] * step_CF
        answer_unit_CF, answer_inverse_C1 = normalised(answer_CF, F, EPS)
        d_beta_F += tl.sum(d_answer_CF, 0)
        d_gamma_F += tl.sum(d_answer_CF * answer_unit_CF, 0)
        d_y_CF = answer_inverse_C1 * projected(gamma_1F * d_answer_CF, answer_unit_CF, F)
        d_y_CF = tl.where(is_constant(answer_CF, LEAST), 0, d_y_CF)

        # The queries' step, (14) to (16); dK and the update (18) by columns.
        d_mixed_CC = product(d_y_CF, error_FC, PRECISION)
        d_kappa_CC = d_mixed_CC * seen_CC
        if CAUSAL:
            d_kappa_CC = tl.where(i[None, :] <= i[:, None], d_kappa_CC, 0)
        d_scale_C -= tl.sum(d_kappa_CC * rate_C[None, :], 1)
        d_rate_C = -tl.sum(d_kappa_CC * scale_C[:, None], 0)
        d_seen_CC = d_mixed_CC * kappa_CC
        d_error_CF = product(seen_by_key_CC * kappa_by_key_CC, d_y_CF, PRECISION)
        by_next_CF = product(k_CF, d_next_FF, PRECISION) + d_next_F[None, :]
        d_error_CF += push_C1 * by_next_CF
        d_k_FC = product(tl.trans(q_CF), d_seen_CC, PRECISION)
        d_k_FC += product(d_next_FF, error_FC * (push * rate_C)[None, :], PRECISION)
        tl.debug_barrier()
        tl.store(d_k + columns_at, d_k_FC, mask=live[None, :])
        d_push_C = tl.sum(by_next_CF * error_CF, 1)  # (24)
        d_rate_C += push * d_push_C
        tl.store(d_rate + place_C, d_rate_C, mask=live)
        if CLOSES:
            tl.store(d_pushes + n * tl.num_programs(0) + pair, tl.sum(rate_C * d_push_C, 0))
        d_q_CF = d_answer_CF + product(d_seen_CC, k_CF, PRECISION)
        d_q_CF += product(d_y_CF, tl.trans(weight_FF), PRECISION)
        if OPENED:
            d_scale_C -= tl.sum(d_y_CF * step_CF, 1)
            d_step_CF = -scale_C[:, None] * d_y_CF
            summed_FF = tl.load(summed + pair * F * F + square)
            d_q_CF += product(d_step_CF, tl.trans(summed_FF), PRECISION)
            d_summed_FF = d_next_FF + product(tl.trans(q_CF), d_step_CF, PRECISION)
            tl.store(d_summed + pair * F * F + square, d_summed_FF)
            tl.store(d_summed_bias + pair * F + f, d_next_F + tl.sum(d_step_CF, 0))
        tl.store(d_q + rows_at, d_q_CF, mask=live_C1)

        # Through the inner loss's gradient (20), to the target and the norm (25).
        silent_C1 = (tl.max(tl.abs(error_CF), 1) == 0)[:, None]
        flat_C1 = is_constant(output_CF, LEAST)
        followed_C1 = tl.where(flat_C1, 0, inverse_C1)
        d_slope_CF = tl.where(flat_C1 & silent_C1, 0, inverse_C1) * projected(d_error_CF, unit_CF, F)
        d_target_CF = -gamma_1F * d_slope_CF
        tl.store(d_target + rows_at, d_target_CF, mask=live_C1)
        d_beta_F -= tl.sum(d_target_CF, 0)
        d_gamma_F += tl.sum(d_slope_CF * (2 * gamma_1F * unit_CF + offset_CF), 0)
        along_unit_C1 = (tl.sum(d_error_CF * unit_CF, 1) / F)[:, None]
        along_error_C1 = (tl.sum(d_error_CF * error_CF, 1) / F)[:, None]
        to_slope_C1 = (tl.sum(slope_CF * unit_CF, 1) / F)[:, None]
        d_output_CF = projected(gamma_1F * gamma_1F * d_slope_CF, unit_CF, F) - to_slope_C1 * d_slope_CF
        d_output_CF = followed_C1 * (d_output_CF - error_CF * along_unit_C1 - unit_CF * along_error_C1)

        # The weights (22) and the keys (23).
        if not CLOSES:
            d_next_FF = tl.zeros_like(d_next_FF)
            d_next_F = tl.zeros_like(d_next_F)
        d_next_FF += product(tl.trans(k_CF), d_output_CF, PRECISION)
        d_next_FF += product(tl.trans(q_CF), d_y_CF, PRECISION)
        d_next_F += tl.sum(d_output_CF + d_y_CF, 0)
        tl.debug_barrier()
        d_k_CF = tl.load(d_k + rows_at, mask=live_C1, other=0)
        d_k_CF += product(d_output_CF, tl.trans(weight_FF), PRECISION)
        tl.debug_barrier()
        tl.store(d_k + rows_at, d_k_CF, mask=live_C1)

        q_at -= C * q_t
        k_at -= C * k_t
        target_at -= C * target_t
        rate_at -= C * rate_t
        d_answer_at -= C * d_answers_t
        place_C -= C * heads
    tl.store(d_weight + pair * F * F + square, d_next_FF)
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
    room = torch.empty_like(saved[0][:1]).expand(group - 1, -1, -1, -1).contiguous()
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
                LEAST=self.least, **self.constants,
            )  # fmt: skip
        self.d_next = self.d_weights

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
