# mypy: allow-untyped-defs, allow-incomplete-defs
"""TTT-Linear in Triton for mini-batches of one token, forward and backward: one program for each row and head.

The token answers with the weights after it, so the update is not causal (`docs/backward.md`, (9'), (12'), (16')). A
product of one row is a sum over a column of weights, and an update has rank one. So nothing here is a product of
matrices: everything is multiplied as it is on the ordinary cores, in every precision, as a streaming state is
(`ttt.ops.decode`). For one token, with `p = c η E`:

    forward    Z = k W + b,   W' = W + kᵀ p,   b' = b + p,   y = q W' + b',   z = q + γ ŷ + β
    backward   y = q W + b + (q·k + 1) p       since `q W' = q W + (q·k) p`: only W is read again, not W'
               dW' += qᵀ dy,   db' += dy       dq = dz + W dy + k (p·dy)
               ρ = k dW' + db'                 dη = c ⟨E, ρ⟩,   dc = η ⟨E, ρ⟩,   dE = c η ρ
               dk = dW' p + W dZ               dW = dW' + kᵀ dZ,   db = db' + dZ

and (20) and (25) for dZ, dt, dγ and dβ. On the chip is `W [F,F]`, in backward dW beside it (F 128, 8 warps: 64 numbers
a thread each), and rows and columns of F. Forward reads and writes the state once a sequence, and writes it once a
group; backward reads the W that opens each token once, and dW once a group.

Shapes of tiles end in `1F` for a row, `F1` for a column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt.ops.triton.linear_parts import errors_of
from ttt.ops.triton.linear_parts_back import errors_back, norm_back
from ttt.ops.triton.mlp_parts import normalised


@triton.jit
def _by_row(x_F1, weight_FF):
    """`x W`, a row."""
    return tl.sum(x_F1 * weight_FF, 0)[None, :]


@triton.jit
def _by_column(weight_FF, x_1F):
    """`W xᵀ`, a column."""
    return tl.sum(weight_FF * x_1F, 1)[:, None]


# fmt: off
@triton.jit(do_not_specialize=["steps", "openings", "group", "last_n", "last_b"])
def token_forward_kernel(
    q, k, target, rate, gamma, beta, last, weight, bias, answers, following, following_bias, carries,
    q_b, q_h, q_t, k_b, k_h, k_t, target_b, target_h, target_t, rate_b, rate_h, rate_t, last_n, last_b,
    heads, steps, openings, group,
    F: tl.constexpr, EPS: tl.constexpr, ANSWERS: tl.constexpr, KEEPS: tl.constexpr,
):
    # fmt: on
    """Run all mini-batches of one row and head; arguments are those of `linear_forward_kernel`."""
    pair, pairs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row, head = pair // heads, pair % heads
    f_F1, f_1F = tl.arange(0, F)[:, None], tl.arange(0, F)[None, :]
    gamma_1F, beta_1F = tl.load(gamma + pair * F + f_1F), tl.load(beta + pair * F + f_1F)
    weight_FF, bias_1F = tl.load(weight + pair * F * F + f_F1 * F + f_1F), tl.load(bias + pair * F + f_1F)
    q, k, target = q + row * q_b + head * q_h, k + row * k_b + head * k_h, target + row * target_b + head * target_h
    rate, last = rate + row * rate_b + head * rate_h, last + row * last_b
    answers += (row * steps * heads + head) * F
    for n in range(steps):
        k_F1 = tl.load(k + f_F1)
        offset_1F = beta_1F - tl.load(target + f_1F)
        _, _, _, error_1F = errors_of(_by_row(k_F1, weight_FF) + bias_1F, offset_1F, gamma_1F, F, EPS)
        pushed_1F = -tl.load(last + n * last_n) * tl.load(rate) * error_1F
        weight_FF += k_F1 * pushed_1F
        bias_1F += pushed_1F
        if ANSWERS:
            unit_1F, _ = normalised(_by_row(tl.load(q + f_F1), weight_FF) + bias_1F, F, EPS)
            tl.store(answers + f_1F, tl.load(q + f_1F) + (gamma_1F * unit_1F + beta_1F))
        if KEEPS and (n + 1 < openings) & ((n + 1) % group == 0):
            carry = carries + (((n + 1) // group - 1) * pairs + pair) * (F + 1) * F
            tl.store(carry + f_F1 * F + f_1F, weight_FF)
            tl.store(carry + F * F + f_1F, bias_1F)
        q, k, target, rate = q + q_t, k + k_t, target + target_t, rate + rate_t
        answers += heads * F
    if ANSWERS:
        tl.store(following + pair * F * F + f_F1 * F + f_1F, weight_FF)
        tl.store(following_bias + pair * F + f_1F, bias_1F)


# fmt: off
@triton.jit(do_not_specialize=["steps", "last_n", "last_b", "d_answers_b", "d_answers_h", "d_answers_t"])
def token_backward_kernel(
    q, k, target, rate, gamma, beta, last, weight, bias, carries,
    d_answers, d_q, d_k, d_target, d_rate, d_weight, d_bias, d_gamma, d_beta, d_pushes,
    q_b, q_h, q_t, k_b, k_h, k_t, target_b, target_h, target_t, rate_b, rate_h, rate_t, last_n, last_b,
    d_answers_b, d_answers_h, d_answers_t, heads, steps, length,
    F: tl.constexpr, EPS: tl.constexpr, LEAST: tl.constexpr,
):
    # fmt: on
    """Run the mini-batches of one row and head from the last to the first; `linear_backward_kernel` has the arguments.

    `d_weight` and `d_bias` hold the gradients of what the last leaves, and then of what opens the first.
    """
    pair, pairs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row, head = pair // heads, pair % heads
    f_F1, f_1F = tl.arange(0, F)[:, None], tl.arange(0, F)[None, :]
    gamma_1F, beta_1F = tl.load(gamma + pair * F + f_1F), tl.load(beta + pair * F + f_1F)
    d_gamma_1F, d_beta_1F = tl.load(d_gamma + pair * F + f_1F), tl.load(d_beta + pair * F + f_1F)
    d_weight += pair * F * F
    d_next_FF, d_next_1F = tl.load(d_weight + f_F1 * F + f_1F), tl.load(d_bias + pair * F + f_1F)
    q, k, target = q + row * q_b + head * q_h, k + row * k_b + head * k_h, target + row * target_b + head * target_h
    rate, last = rate + row * rate_b + head * rate_h, last + row * last_b
    d_answers += row * d_answers_b + head * d_answers_h
    for back in range(steps):
        n = tl.cast(steps, tl.int64) - 1 - back
        place = (row * length + n) * heads + head
        weight_n, bias_n = weight + pair * F * F, bias + pair * F
        if n > 0:
            weight_n = carries + ((n - 1) * pairs + pair) * (F + 1) * F
            bias_n = weight_n + F * F
        weight_FF, bias_1F = tl.load(weight_n + f_F1 * F + f_1F), tl.load(bias_n + f_1F)
        k_F1, q_F1 = tl.load(k + n * k_t + f_F1), tl.load(q + n * q_t + f_F1)
        push, rate_n = -tl.load(last + n * last_n), tl.load(rate + n * rate_t)
        offset_1F = beta_1F - tl.load(target + n * target_t + f_1F)
        output_1F = _by_row(k_F1, weight_FF) + bias_1F
        unit_1F, inverse_11, slope_1F, error_1F = errors_of(output_1F, offset_1F, gamma_1F, F, EPS)
        pushed_1F = push * rate_n * error_1F
        answer_1F = _by_row(q_F1, weight_FF) + bias_1F + (tl.sum(q_F1 * k_F1, 0)[None, :] + 1) * pushed_1F

        # The query, and what it gives to the weights after the token.
        d_answer_1F = tl.load(d_answers + n * d_answers_t + f_1F)
        d_y_1F, answer_unit_1F = norm_back(d_answer_1F, answer_1F, gamma_1F, F, EPS, LEAST)
        d_beta_1F += d_answer_1F
        d_gamma_1F += d_answer_1F * answer_unit_1F
        d_q_F1 = _by_column(weight_FF, d_y_1F) + k_F1 * tl.sum(pushed_1F * d_y_1F, 1)[:, None]
        tl.store(d_q + place * F + f_F1, tl.load(d_answers + n * d_answers_t + f_F1) + d_q_F1)
        d_next_FF += q_F1 * d_y_1F
        d_next_1F += d_y_1F

        # The key, through the update and the inner loss's gradient.
        by_next_1F = _by_row(k_F1, d_next_FF) + d_next_1F
        d_push = tl.sum(tl.sum(error_1F * by_next_1F, 1), 0)
        tl.store(d_rate + place, push * d_push)
        tl.store(d_pushes + n * pairs + pair, rate_n * d_push)
        d_slope_1F, d_output_1F = errors_back(
            push * rate_n * by_next_1F, output_1F, unit_1F, inverse_11, slope_1F, error_1F, gamma_1F, F, LEAST
        )
        d_beta_1F += gamma_1F * d_slope_1F
        d_gamma_1F += d_slope_1F * (2 * gamma_1F * unit_1F + offset_1F)
        tl.store(d_target + place * F + f_1F, -gamma_1F * d_slope_1F)
        tl.store(d_k + place * F + f_F1, _by_column(d_next_FF, pushed_1F) + _by_column(weight_FF, d_output_1F))
        d_next_FF += k_F1 * d_output_1F
        d_next_1F += d_output_1F
    tl.store(d_weight + f_F1 * F + f_1F, d_next_FF)
    tl.store(d_bias + pair * F + f_1F, d_next_1F)
    tl.store(d_gamma + pair * F + f_1F, d_gamma_1F)
    tl.store(d_beta + pair * F + f_1F, d_beta_1F)
