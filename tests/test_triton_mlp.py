"""The MLP's Triton kernels, in Triton's interpreter: outputs, final state and every gradient against the definition."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from kernel_results import Found, learned
from kernel_watched import products, watched
from kernels_launched import Launch, launches
from triton.runtime import interpreter

from ttt.ops.fused.layout import Problem
from ttt.ops.minibatch import Inner
from ttt.ops.rows import Tokens
from ttt.ops.triton.mlp_backward import mlp_backward
from ttt.ops.triton.mlp_forward import mlp_forward

pytestmark = pytest.mark.usefixtures("interpreted")


@dataclass
class Case:
    """A sequence and a state, of values that vary, every tensor a leaf that wants a gradient."""

    length: int
    size: int = 4
    width: int = 16
    hidden: int = 32
    batch: int = 1
    heads: int = 1
    causal: bool = True
    counts: tuple[int, ...] = ()
    """Tokens that each row has read of its open mini-batch; empty: every row begins."""
    lengths: tuple[int, ...] = ()
    """How many tokens of each row count; empty: all."""
    group_size: int = 2
    dtype: torch.dtype = torch.float64
    leaves: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.length)

        def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
            x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
            return x.to(self.dtype).requires_grad_()

        rows, width, hidden = (self.batch, self.heads), self.width, self.hidden
        tokens = [normal(*rows, self.length, width) for _ in range(3)]
        rate = torch.rand(*rows, self.length, 1, generator=generator, dtype=torch.float64) / width + 0.02
        shapes = ((width, hidden), (1, hidden), (hidden, width), (1, width))
        scales = (width**-0.5, 0.2, hidden**-0.5, 0.2)
        weights = [normal(*rows, *shape, scale=scale) for shape, scale in zip(shapes, scales, strict=True)]
        summed = [normal(*rows, *shape, scale=0.1) for shape in shapes] if self.counts else []
        norms = [normal(self.heads, 1, width, scale=0.3, shift=1.0), normal(self.heads, 1, width, scale=0.3)]
        self.leaves = [
            *tokens, rate.to(self.dtype).requires_grad_(), *norms, normal(self.size, scale=0.2), *weights, *summed
        ]  # fmt: skip

    def learn(self, name: str) -> Found:
        """Outputs, final state included, and the gradients of all leaves, by one implementation."""
        q, k, target, rate, gamma, beta, offset, *state = self.leaves
        scale = 1 / torch.arange(1, self.size + 1).to(offset)
        scale = (scale + offset).clamp_min(0) if self.causal else torch.full_like(scale, 1 / self.size)
        tokens, inner = Tokens(q, k, target, rate), Inner(gamma, beta, scale, self.causal, 1e-6)
        return learned(
            name, tokens, state, inner, self.leaves,
            group_size=self.group_size, counts=self.counts, lengths=self.lengths,
        )  # fmt: skip


def assert_near(found: Found, expected: Found, bound: float) -> None:
    for index, (a, b) in enumerate(zip(itertools.chain(*found), itertools.chain(*expected), strict=True)):
        assert a.shape == b.shape, index
        assert (a - b).norm() <= bound * b.norm(), (index, (a - b).norm() / b.norm())


CASES = {
    "3C + 2 tokens, groups of 2": Case(length=14, hidden=16, batch=2, lengths=(14, 6)),
    "C + 1 tokens, two heads, no groups": Case(length=6, size=5, heads=2, group_size=0),
    "groups of 1, one hidden tile": Case(length=12, hidden=16, group_size=1),
    "C tokens, groups beyond them, three hidden tiles": Case(length=4, hidden=48, group_size=16),
    "C - 1 tokens": Case(length=3),
    "one token": Case(length=1),
    "open in every row elsewhere": Case(length=8, hidden=16, batch=3, counts=(0, 1, 3), group_size=1),
    "one token of an open mini-batch": Case(length=1, batch=2, counts=(1, 3)),
    "not causal": Case(length=10, heads=2, causal=False),
    "not causal, masked, three tiles": Case(length=7, batch=2, hidden=48, causal=False, lengths=(7, 2)),
    "C 1, F 64": Case(length=3, size=1, width=64, hidden=32),
    "C 16, F 128": Case(length=17, size=16, width=128, hidden=32),
    "C 17, F 128": Case(length=17, size=17, width=128, hidden=16),
    "C 17, a block and a token": Case(length=18, size=17, hidden=16),
    "C 33, not causal, three blocks": Case(length=34, size=33, hidden=16, causal=False),
    "C 63, four blocks": Case(length=63, size=63, hidden=16),
    "C 40, found open in the second block": Case(length=37, size=40, hidden=16, counts=(22,)),
    "C 64, F 64": Case(length=64, size=64, width=64, hidden=32, causal=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_outputs_and_gradients_are_the_definitions(case: Case) -> None:
    assert_near(case.learn("triton"), case.learn("reference"), 1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_a_layers_hidden_width(causal: bool) -> None:
    """Four times the head's."""
    case = Case(length=4 if causal else 2, size=2, width=32, hidden=128, causal=causal)
    assert_near(case.learn("triton"), case.learn("reference"), 1e-12)


@pytest.mark.parametrize("teaches", [False, True], ids=["zeros", "targets alone"])
@pytest.mark.parametrize("opened", [False, True])
def test_tokens_of_zeros_get_no_gradient_through_norms(opened: bool, teaches: bool) -> None:
    """Biases zero, as at the start: what the model makes of zeros is constant, where formulas divide by ε alone."""
    case = Case(length=5, size=3, counts=(1,) if opened else ())
    with torch.no_grad():
        for x in case.leaves[: 2 if teaches else 3]:
            x[:, :, [0, 1, 4]] = 0
        case.leaves[3].mul_(1e-3 if teaches else 1)  # 1/√ε is much to learn by
        for bias in (case.leaves[5], *case.leaves[8::2]):
            bias.zero_()
    found, expected = case.learn("triton"), case.learn("reference")
    assert_near(found, expected, 1e-9)
    assert all(gradient.abs().max() < 1e5 for gradient in found[1])  # the formulas' own: 1e6 for each such token


def test_float32() -> None:
    found = Case(length=6, dtype=torch.float32)
    exact = Case(length=6, dtype=torch.float32)
    exact.leaves = [x.detach().double().requires_grad_() for x in exact.leaves]
    results = found.learn("triton")
    assert {x.dtype for x in itertools.chain(*results)} == {torch.float32}
    assert_near(results, exact.learn("reference"), 1e-5)


# --- the two functions themselves ---


def draw(steps: int, *, batch: int, heads: int, size: int = 2, hidden: int = 16, **settings: Any) -> Problem:
    """A problem with step sizes of each row, and of each mini-batch the last."""
    generator = torch.Generator().manual_seed(steps)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    rows = batch, heads
    shapes = ((16, hidden), (1, hidden), (hidden, 16), (1, 16))
    problem = Problem(
        *(normal(batch, heads, steps, size, 16) for _ in range(3)), normal(*rows, steps, size, 1, scale=0.1).abs(),
        1 + normal(heads, 1, 16, scale=0.3), normal(heads, 1, 16, scale=0.3), normal(batch, size).abs(),
        normal(steps, batch).abs(), [normal(*rows, *shape, scale=0.3) for shape in shapes], [], True, 1e-6, 0,
    )  # fmt: skip
    return problem._replace(**settings)


def gradients(problem: Problem) -> list[Tensor]:
    """All gradients, by the kernels."""
    z, following, saved = mlp_forward(problem, keep=True)
    *found, d_weights, d_gradients = mlp_backward(problem, saved, z.cos(), [w.cos() for w in following])
    return [*found, *d_weights, *d_gradients]


@pytest.mark.parametrize("precision", ["ieee", "tf32"])  # the same numbers here, by other code
def test_every_row_and_mini_batch_may_have_its_own_steps(precision: str) -> None:
    """Gradients of `s` and `s_C` themselves, and answers that do not depend on whether anything is kept."""
    problem = draw(3, batch=2, heads=1, group_size=2)
    leaves = [x.clone().requires_grad_() for x in (*problem[:8], *problem.weights)]  # type: ignore[arg-type]
    z, following, _ = torch.ops.ttt.minibatches(*leaves[:8], leaves[8:], [], *problem[10:], True)
    expected = torch.autograd.grad([z, *following], leaves, [z.cos(), *(w.cos() for w in following)])
    problem = problem._replace(precision=precision)
    assert_near((gradients(problem), []), (list(expected), []), 1e-12)
    answers, ends, kept = mlp_forward(problem, keep=False)
    assert_near(([answers, *ends], []), ([z, *following], []), 1e-12)
    assert not kept
    assert answers.stride() == z.stride()


@pytest.mark.parametrize("causal", [True, False])
def test_programs_of_a_launch_may_run_in_any_order(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """None reads what another writes: in reverse order they give the same numbers, bit for bit."""
    problem = draw(2, batch=1, heads=1, hidden=32, causal=causal, group_size=1)
    expected = gradients(problem)
    builder = interpreter.interpreter_builder
    forwards = builder.set_grid_idx
    monkeypatch.setattr(
        builder, "set_grid_idx",
        lambda *index: forwards(*(count - 1 - i for count, i in zip(builder.grid_dim, index, strict=True))),
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(gradients(problem), expected, strict=True))


@pytest.mark.parametrize(
    "case",
    [
        Case(length=18, size=17, hidden=32, group_size=1),
        Case(length=5, hidden=16, batch=2, counts=(1, 0)),
        Case(length=18, size=17, hidden=32, causal=False),
    ],
    ids=["two blocks", "found open", "not causal"],
)
def test_programs_stay_inside_their_tensors_and_their_threads_wait_for_each_other(case: Case) -> None:
    with watched():
        case.learn("triton")


@pytest.mark.parametrize("causal", [True, False])
def test_no_group_size_changes_a_bit(causal: bool) -> None:
    problem = draw(4, batch=1, heads=1, causal=causal)
    expected = gradients(problem)
    for group_size in (1, 3):
        found = gradients(problem._replace(group_size=group_size))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), group_size


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(("causal", "size"), [(True, 18), (False, 18), (True, 1)])
def test_a_mini_batch_that_stays_open(causal: bool, size: int, opened: bool) -> None:
    """In two blocks, or of one token; gradients of the sums that it found, and of every position's step size."""
    problem = draw(1, batch=1, heads=2, size=size, causal=causal, last_NB=None)
    before = [0.1 * w.flip(-1) for w in problem.weights] if opened else []
    scale = problem.scale_BC if causal else torch.full_like(problem.scale_BC, 0.3)
    problem = problem._replace(gradients=before, scale_BC=scale)
    leaves = [x.clone().requires_grad_() for x in (*problem[:7], *problem.weights, *before)]  # type: ignore[arg-type]
    z, sums, _ = torch.ops.ttt.minibatches(*leaves[:7], None, leaves[7:11], leaves[11:], *problem[10:], True)
    expected = torch.autograd.grad([z, *sums], leaves, [z.cos(), *(w.cos() for w in sums)])
    found = gradients(problem)
    del found[7]  # of the step size that closes
    assert_near((found, []), (list(expected), []), 1e-12)


def numbers(launched: list[Launch], *parameters: str) -> int:
    """How many numbers of weights, and of gradients in their shapes, launches load and store, in float64."""
    names = [f"{parameter}{tensor}" for parameter in parameters for tensor in ("w0", "b0", "w1", "b1")]
    return sum(one.moved[name] for one in launched for name in names) // 8


@pytest.mark.parametrize(("causal", "ends"), [(True, 1.5), (False, 3)])
def test_traffic_of_weights(causal: bool, ends: float) -> None:
    """Backward moves five sizes of the weights a mini-batch, and a little at the ends of a sequence; forward two."""
    count = 4
    problem = draw(count, batch=1, heads=1, hidden=32, causal=causal, group_size=2)
    size = sum(w.numel() for w in problem.weights)
    with launches() as forward:
        z, following, saved = mlp_forward(problem, keep=True)
    assert size * 2 * count < numbers(forward, "from_", "to_") <= size * (2 * count + 1)
    with launches() as backward:
        mlp_backward(problem, saved, z, following)
    moved = numbers(backward, "from_", "to_", "next_", "")
    assert size * 4.9 * count < moved <= size * (5 * count + ends)


def test_many_pairs() -> None:
    problem = draw(1, batch=4, heads=8)
    z, following, _ = torch.ops.ttt.minibatches(*problem, False)
    answers, ends, _ = mlp_forward(problem, keep=False)
    assert_near(([answers, *ends], []), ([z, *following], []), 1e-12)


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize(("causal", "size"), [(True, 2), (True, 17), (False, 2)])
def test_every_product_has_the_precision_that_is_asked_for(causal: bool, size: int, precision: str) -> None:
    with products() as found:
        gradients(draw(2, batch=1, heads=1, size=size, causal=causal, precision=precision))
    assert len(found) >= 30
    for asked, rounded in found:
        assert rounded if precision == "bf16" else asked == precision.upper()


def test_bfloat16_rounds_the_operands_of_every_product() -> None:
    """Forward against the same products of operands that are rounded by hand."""
    problem = draw(1, batch=1, heads=1, precision="bf16")
    answers, following, _ = mlp_forward(problem, keep=False)
    assert_near(([answers, *following], []), (_rounded_by_hand(problem), []), 1e-9)
    near = draw(1, batch=1, heads=1)
    for a, b in zip(gradients(problem), gradients(near), strict=True):
        assert 1e-4 * b.norm() < (a - b).norm() < 0.05 * b.norm() or b.norm() == 0


def _rounded_by_hand(problem: Problem) -> list[Tensor]:
    """Answers and weights of one causal mini-batch, of one head."""

    def times(a: Tensor, b: Tensor) -> Tensor:
        return a.bfloat16().double() @ b.bfloat16().double()

    q, k, target, eta = (x[0, 0, 0] for x in problem[:4])
    gamma, beta, s = problem.gamma_H1F[0], problem.beta_H1F[0], problem.scale_BC[0, :, None]
    w0, b0, w1, b1 = (w[0, 0] for w in problem.weights)
    kappa = (-s * eta.mT).tril()
    hidden = (times(k, w0) + b0).requires_grad_()
    inner = torch.nn.functional.gelu(hidden, approximate="tanh")
    (slope,) = torch.autograd.grad(inner.sum(), hidden)
    value = inner.detach()
    output = (times(value, w1) + b1).requires_grad_()
    loss = 0.5 * (gamma * torch.nn.functional.layer_norm(output, (16,), eps=1e-6) + beta - target).square().sum()
    (error1,) = torch.autograd.grad(loss, output)
    error0 = times(error1, w1.mT) * slope
    asked = times(q, w0) + b0 + times((times(q, k.mT) + 1) * kappa, error0)
    asking = torch.nn.functional.gelu(asked, approximate="tanh").detach()
    answered = times(asking, w1) + b1 + times(times(asking, value.mT) * kappa + kappa, error1)
    push = -problem.last_NB[0, 0]  # type: ignore[index]
    moved = [
        w0 + push * times((k * eta).mT, error0), b0 + push * (eta * error0).sum(0),
        w1 + push * times(value.mT, eta * error1), b1 + push * (eta * error1).sum(0),
    ]  # fmt: skip
    z = q + gamma * torch.nn.functional.layer_norm(answered, (16,), eps=1e-6) + beta
    return [z.view_as(problem.q_BHNCF), *(w.detach().view_as(x) for w, x in zip(moved, problem.weights, strict=True))]


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """N + 1 forward; in backward as many for each group, and N + 1 for the walk through all of them."""
    launched: list[int] = []
    run = interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda self, *a, **k: (launched.append(1), run(self, *a, **k))
    )
    problem = draw(3, batch=1, heads=1, group_size=2)
    z, following, saved = mlp_forward(problem, keep=True)
    assert len(launched) == 3 + 1
    mlp_backward(problem, saved, z, following)
    assert len(launched) == (3 + 1) + (1 + 1) + (2 + 1) + (3 + 1)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"width": 24}, "heads of 16, 32, 64, 128, not 24"),
        ({"hidden": 40}, "a multiple of 16, not 40"),
        ({"length": 65, "size": 65}, "at most 64 tokens with heads of 16, not 65"),
    ],
)
def test_what_has_no_form_is_refused(changed: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Case(**{"length": 4, **changed}).learn("triton")
