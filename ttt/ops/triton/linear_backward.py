"""TTT-Linear in Triton, the backward pass: one program for each row and head.

Groups run from the last to the first. The forward kernel, without its answers, writes the weights that open the
group's mini-batches; then one launch goes through them in reverse. It computes again what belongs to one mini-batch: Z,
E, U, y. With the numbers and symbols of `docs/backward.md`, and `u = −s dy`, which is dU of the forward kernel's (9):

    (13)  dy = ι Π(γ dz)                             dβ += Σ dz,   dγ += Σ dz ŷ
    (15)  V = ((K Qᵀ + 1) ⊙ Mᵀ) u + c ρ              dE = η V,     ρ = K dW' + db'
    (14)  ds −= ⟨dy, U⟩                              dη = ⟨E, V⟩,  dc = Σ η ⟨E, ρ⟩
    (16)  dQ = dz + ((u Eᵀ) ⊙ M ηᵀ) K                dK = ((E uᵀ) ⊙ η Mᵀ) Q
    (20)  dr = ι Π(dE)                  dZ = ι (Π(γ² dr) − mean(r x̂) dr − E mean(dE x̂) − x̂ mean(dE E))
    (22)  dW = dW' + Kᵀ dZ + Qᵀ dy,   db = db' + Σ (dZ + dy)
    (23)  dQ += dy Wᵀ,  dK += dZ Wᵀ + c η E dW'ᵀ
    (25)  dt = −γ dr,   dβ += Σ γ dr                 dγ += Σ dr (2 γ x̂ + β − t)

(14) is the fused scan's with the sums taken the other way round: `Σ_j dκ_ij η_j` is `⟨dy_i, U_i⟩`. A mini-batch that
was open before adds `dG = dG' + Qᵀ u` and `dQ += u Gᵀ`; one that stays open has `c = 1`, `dG'` in place of `dW'`, and
its `dW` starts at zero. If the update is not causal and closes, queries belong to W', which the forward kernel writes
too:

    (12') dW' += Qᵀ dy,   db' += Σ dy                before everything else; no u, no U
    (16') dQ = dz + dy W'ᵀ                           and dy is left out of (22)

W and dW together would not fit into registers at F 128. So both stay in memory, where a program's own are near, and go
by in blocks of `BLOCK` rows or columns. A block of `ROWS` tokens goes by W twice, for Z and y and for (23), and by dW'
twice, for ρ and for (23); a mini-batch then reads and writes dW once, and once more for (12'). On the chip are, beside
a block, about eight tiles `[ROWS,F]` (F 128, ROWS 16, 8 warps: 8 numbers a thread each).

E, dy and Z, then dZ, of one mini-batch wait in memory, `[3,C,F]`, so that their columns, and other blocks of tokens,
can be had without the rest, and so that no result of a product is turned round on the chip, which compilers have got
wrong: a product with a transpose reads both factors from memory.

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
from ttt.ops.triton.linear import LAUNCH, LinearRun, addressable, rows_of, strides_of
from ttt.ops.triton.linear_parts import (
    errors_of,
    numbers_at,
    rows_of_weights,
    store_numbers,
    store_tokens,
    taught,
    times_weights_at,
    tokens_at,
)
from ttt.ops.triton.linear_parts_back import (
    add_outer,
    add_outer_scaled,
    errors_back,
    norm_back,
    products,
    pulled,
    through_tokens,
    through_weights,
)
from ttt.ops.triton.linear_token import token_backward_kernel


# fmt: off
@triton.jit(do_not_specialize=["steps", "last_n", "last_b", "d_answers_b", "d_answers_h", "d_answers_t"])
def linear_backward_kernel(
    q, k, target, rate, gamma, beta, scale, last, weight, bias, carries, summed, summed_bias,
    d_answers, d_q, d_k, d_target, d_rate, d_next, d_next_bias, d_weight, d_bias, d_summed, d_summed_bias,
    d_gamma, d_beta, d_scale, d_pushes, room,
    q_b, q_h, q_t, k_b, k_h, k_t, target_b, target_h, target_t, rate_b, rate_h, rate_t, last_n, last_b,
    d_answers_b, d_answers_h, d_answers_t, heads, steps, length,
    C: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
    LEAST: tl.constexpr, CAUSAL: tl.constexpr, CLOSES: tl.constexpr, OPENED: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """Run the mini-batches of one row and head from the last to the first.

    Arguments are named as in `linear_forward_kernel`; `weight` and `bias` open the first mini-batch, `carries` the
    others, and if queries answer with the weights after their mini-batch, one more. `d_next` is the gradient of what a
    mini-batch leaves behind, `d_weight` receives that of the weights that open it: the same memory, if mini-batches
    close. Tokens' gradients lie in memory as `[B,length,H,F]`. What the mini-batches share, `d_gamma [P,F]`, `d_beta`
    and `d_scale [P,C]`, is added to. `room [P,3,C,F]` is for E, dy and Z or dZ of one mini-batch.
    """
    pair, pairs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row, head = pair // heads, pair % heads
    f = tl.arange(0, F)
    gamma_1F = tl.load(gamma + pair * F + f)[None, :]
    beta_1F = tl.load(beta + pair * F + f)[None, :]
    d_next_F = tl.load(d_next_bias + pair * F + f)
    summed_F = tl.load(summed_bias + pair * F + f)
    d_gamma_F = tl.load(d_gamma + pair * F + f)
    d_beta_F = tl.load(d_beta + pair * F + f)
    token = tl.cast(steps, tl.int64) * C  # the first of the mini-batch after this one
    q, k, target = q + row * q_b + head * q_h, k + row * k_b + head * k_h, target + row * target_b + head * target_h
    rate, last, scale = rate + row * rate_b + head * rate_h, last + row * last_b, scale + row * C
    d_answers += row * d_answers_b + head * d_answers_h
    d_next, summed = d_next + pair * F * F, summed + pair * F * F
    d_weight, d_summed, d_scale = d_weight + pair * F * F, d_summed + pair * F * F, d_scale + pair * C
    errors = room + pair * 3 * C * F
    d_y, d_output = errors + C * F, errors + 2 * C * F
    DUAL: tl.constexpr = CAUSAL or not CLOSES
    for back in range(steps):
        n = steps - 1 - back
        token -= C
        q_n, k_n, target_n, rate_n = q + token * q_t, k + token * k_t, target + token * target_t, rate + token * rate_t
        weight_n, bias_n = weight + pair * F * F, bias + pair * F
        if n > 0:
            weight_n = carries + ((n - 1) * pairs + pair) * (F + 1) * F
            bias_n = weight_n + F * F
        bias_F = tl.load(bias_n + f)
        push = -tl.load(last + n * last_n) if CLOSES else 1
        answering, answering_F = weight_n, bias_F
        if not DUAL:
            answering = carries + (n * pairs + pair) * (F + 1) * F
            answering_F = tl.load(answering + F * F + f)
        if DUAL and not CAUSAL and C > ROWS:  # a query needs the errors of all blocks
            for first in range(0, C, ROWS):
                left = C - first
                output_RF = tl.zeros((ROWS, F), bias_F.dtype) + bias_F[None, :]
                output_RF = times_weights_at(
                    k_n + first * k_t, k_t, left, weight_n, output_RF, ROWS, F, BLOCK, PRECISION
                )
                offset_RF = beta_1F - tokens_at(target_n + first * target_t, target_t, left, ROWS, F)
                _, _, _, error_RF = errors_of(output_RF, offset_RF, gamma_1F, F, EPS)
                store_tokens(errors + first * F, error_RF, F, left, ROWS, F)
            tl.debug_barrier()

        # The keys' errors, and the queries back to `dy`.
        d_bias_F = d_next_F if CLOSES else tl.zeros_like(d_next_F)
        d_summed_F = d_next_F
        for first in range(0, C, ROWS):
            left = C - first
            output_RF, answer_RF = products(
                k_n + first * k_t, q_n + first * q_t, k_t, q_t, left, weight_n, bias_F, answering, answering_F,
                ROWS, F, BLOCK, PRECISION,
            )
            store_tokens(d_output + first * F, output_RF, F, left, ROWS, F)
            offset_RF = beta_1F - tokens_at(target_n + first * target_t, target_t, left, ROWS, F)
            _, _, _, error_RF = errors_of(output_RF, offset_RF, gamma_1F, F, EPS)
            if CAUSAL or CLOSES or C <= ROWS:
                store_tokens(errors + first * F, error_RF, F, left, ROWS, F)
            scale_R = numbers_at(scale + first, 1, left, ROWS)
            taught_RF = tl.zeros_like(answer_RF)
            if DUAL:
                if C > ROWS:
                    tl.debug_barrier()  # others of the program read the errors
                taught_RF = taught(
                    q_n, k_n, rate_n, errors, error_RF, summed, summed_F, q_t, k_t, rate_t, first,
                    C, ROWS, F, BLOCK, CAUSAL, OPENED, PRECISION,
                )
                answer_RF -= scale_R[:, None] * taught_RF
            d_answer_RF = tokens_at(d_answers + (token + first) * d_answers_t, d_answers_t, left, ROWS, F)
            d_y_RF, answer_unit_RF = norm_back(d_answer_RF, answer_RF, gamma_1F, F, EPS, LEAST)
            store_tokens(d_y + first * F, d_y_RF, F, left, ROWS, F)
            d_beta_F += tl.sum(d_answer_RF, 0)
            d_gamma_F += tl.sum(d_answer_RF * answer_unit_RF, 0)
            d_bias_F += tl.sum(d_y_RF, 0)
            d_summed_F -= tl.sum(scale_R[:, None] * d_y_RF, 0)
            if DUAL:
                d_scale_R = numbers_at(d_scale + first, 1, left, ROWS) - tl.sum(d_y_RF * taught_RF, 1)
                store_numbers(d_scale + first, d_scale_R, 1, left, ROWS)
        tl.debug_barrier()
        if OPENED:
            tl.store(d_summed_bias + pair * F + f, d_summed_F)
        if not DUAL:  # (12')
            d_next_F = d_bias_F
            for at in range(0, F, BLOCK):
                block = at * F + rows_of_weights(BLOCK, F)
                d_next_BF = tl.load(d_next + block)
                d_next_BF = add_outer(d_next_BF, q_n + at, q_t, d_y, C, ROWS, F, BLOCK, PRECISION)
                tl.store(d_next + block, d_next_BF)
            tl.debug_barrier()

        # Through the update (15), and the inner loss's gradient (20), to targets, rates, keys and queries.
        d_push_R = tl.zeros((ROWS,), bias_F.dtype)
        for first in range(0, C, ROWS):
            left, place = C - first, (row * length + token + first) * heads + head
            rate_R = numbers_at(rate_n + first * rate_t, rate_t, left, ROWS)
            by_next_RF = tl.zeros((ROWS, F), bias_F.dtype) + d_next_F[None, :]
            by_next_RF = times_weights_at(k_n + first * k_t, k_t, left, d_next, by_next_RF, ROWS, F, BLOCK, PRECISION)
            offset_RF = beta_1F - tokens_at(target_n + first * target_t, target_t, left, ROWS, F)
            output_RF = tokens_at(d_output + first * F, F, left, ROWS, F)
            unit_RF, inverse_R1, slope_RF, error_RF = errors_of(output_RF, offset_RF, gamma_1F, F, EPS)
            d_push_R += rate_R * tl.sum(error_RF * by_next_RF, 1)
            reached_RF = push * by_next_RF
            if DUAL:
                reached_RF += pulled(k_n, q_n, d_y, scale, k_t, q_t, first, C, ROWS, F, BLOCK, CAUSAL, PRECISION)
            store_numbers(d_rate + place, tl.sum(error_RF * reached_RF, 1), heads, left, ROWS)
            d_slope_RF, d_output_RF = errors_back(
                rate_R[:, None] * reached_RF, output_RF, unit_RF, inverse_R1, slope_RF, error_RF, gamma_1F, F, LEAST
            )
            d_beta_F += tl.sum(gamma_1F * d_slope_RF, 0)
            d_gamma_F += tl.sum(d_slope_RF * (2 * gamma_1F * unit_RF + offset_RF), 0)
            d_bias_F += tl.sum(d_output_RF, 0)
            store_tokens(d_target + place * F, -gamma_1F * d_slope_RF, heads * F, left, ROWS, F)
            store_tokens(d_output + first * F, d_output_RF, F, left, ROWS, F)
            tl.debug_barrier()  # its columns are read by all
            d_q_RF, d_k_RF = through_weights(
                errors + first * F, d_y + first * F, d_output + first * F, (push * rate_R)[:, None],
                numbers_at(scale + first, 1, left, ROWS)[:, None], left, weight_n, answering, d_next, summed,
                ROWS, F, BLOCK, OPENED, PRECISION,
            )
            if DUAL:
                d_q_RF, d_k_RF = through_tokens(
                    d_q_RF, d_k_RF, q_n, k_n, rate_n, scale, errors, d_y, q_t, k_t, rate_t, first,
                    C, ROWS, F, BLOCK, CAUSAL, PRECISION,
                )
            d_q_RF += tokens_at(d_answers + (token + first) * d_answers_t, d_answers_t, left, ROWS, F)
            store_tokens(d_q + place * F, d_q_RF, heads * F, left, ROWS, F)
            store_tokens(d_k + place * F, d_k_RF, heads * F, left, ROWS, F)
        if CLOSES:
            tl.store(d_pushes + n * pairs + pair, tl.sum(d_push_R, 0))

        # The weights (22).
        tl.debug_barrier()  # all have read what is now written over
        for at in range(0, F, BLOCK):
            block = at * F + rows_of_weights(BLOCK, F)
            d_next_BF = tl.load(d_next + block)
            if OPENED:
                d_summed_BF = add_outer_scaled(d_next_BF, q_n + at, q_t, d_y, scale, C, ROWS, F, BLOCK, PRECISION)
                tl.store(d_summed + block, d_summed_BF)
            if not CLOSES:
                d_next_BF = tl.zeros_like(d_next_BF)
            d_next_BF = add_outer(d_next_BF, k_n + at, k_t, d_output, C, ROWS, F, BLOCK, PRECISION)
            if DUAL:
                d_next_BF = add_outer(d_next_BF, q_n + at, q_t, d_y, C, ROWS, F, BLOCK, PRECISION)
            tl.store(d_weight + block, d_next_BF)
        d_next_F = d_bias_F
        tl.debug_barrier()  # the next mini-batch reads what others have written, and writes over it
    tl.store(d_bias + pair * F + f, d_next_F)
    tl.store(d_gamma + pair * F + f, d_gamma_F)
    tl.store(d_beta + pair * F + f, d_beta_F)


def linear_backward(
    problem: Problem, saved: list[Tensor], d_answers: Tensor, d_following: list[Tensor]
) -> Gradients:
    """All gradients of `linear_forward`: two launches for each group; one in all for groups of one mini-batch, or three
    if queries answer with the weights after theirs.

    Args:
        problem: the operation's arguments.
        saved: what `linear_forward` kept.
        d_answers: `dz [B,H,N,C,F]`.
        d_following: the gradients of the weights at the end, or of the sums.

    Returns:
        The gradients of the problem's tensors, in its order.
    """
    run = LinearBackward(problem, d_answers, d_following)
    steps, group, own = run.dims.steps, problem.group_size or 1, 1 if run.after else 0

    def again(start: int, stop: int, room: Tensor) -> None:
        opening = parted(run.dims, [saved[0][start // group - 1]]) if start else run.weights
        if stop - start > 1 - own:
            run.forward(start, stop - 1 + own, opening, None, run.weights, [room], 1)
        run.group(start, stop, opening, room)

    room = saved[0].new_empty((max(1, group - 1 + own), *saved[0].shape[1:]))
    if group == 1:  # all openings are there, but not what the last mini-batch leaves
        if own:
            again(steps - 1, steps, room)
        if steps > own:
            run.group(0, steps - own, run.weights, saved[0])
        return run.gradients()
    for start in range((steps - 1) // group * group, -1, -group):
        again(start, min(start + group, steps), room)
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
        rows = {} if self.single else {"ROWS": rows_of(width, self.dims.size, back=True)}
        self.settings = {**self.constants, **rows, "LEAST": 4 * torch.finfo(q.dtype).eps, **LAUNCH}
        self.room = q.new_empty((pairs, 3, self.dims.size, width))

    def group(self, start: int, stop: int, opening: list[Tensor], carries: Tensor) -> None:
        """Run the mini-batches from `stop` back to `start`.

        Args:
            start: the first.
            stop: the one after the last.
            opening: the weights that open the first.
            carries: `W̃ [≥ stop − start − 1,P,F+1,F]` that open the others; if queries answer with the weights after
                their mini-batch, those after the last too.
        """
        dims, d_tokens = self.dims, [x[:, :, start:stop] for x in (self.d_answers, *self.d_tokens)]
        counts = *self.strides(), *strides_of(self.d_answers), dims.heads, stop - start, dims.steps * dims.size
        with torch.cuda.device_of(self.d_pushes):
            if self.single:
                token_backward_kernel[(dims.pairs,)](
                    *self.of_steps(start, stop), *opening, carries, *d_tokens, *self.d_weights, self.d_gamma,
                    self.d_beta, self.d_pushes[start:], *counts, **self.settings,
                )  # fmt: skip
                return
            linear_backward_kernel[(dims.pairs,)](
                *self.of_steps(start, stop), *opening, carries, *self.summed,
                *d_tokens, *self.d_next, *self.d_weights, *self.d_summed, self.d_gamma, self.d_beta, self.d_scale,
                self.d_pushes[start:], self.room, *counts, **self.settings,
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
