"""The linear inner model's Triton kernels, in Triton's interpreter: outputs, final state, gradients, precision."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from kernel_results import Found, distances, furthest, learned
from kernel_watched import products, watched
from triton.runtime import interpreter

from ttt.ops.constants import Precision
from ttt.ops.fused.layout import Problem
from ttt.ops.minibatch import Inner, Stream, learn
from ttt.ops.rows import Tokens
from ttt.ops.triton.linear import linear_forward
from ttt.ops.triton.linear_backward import LinearBackward

pytestmark = pytest.mark.usefixtures("interpreted")


@dataclass
class Case:
    """A sequence and a state, of values that vary, every tensor a leaf that wants a gradient."""

    length: int
    size: int = 4
    width: int = 16
    batch: int = 1
    heads: int = 1
    causal: bool = True
    counts: tuple[int, ...] = ()
    """Tokens that each row has read of its open mini-batch; empty: every row begins."""
    lengths: tuple[int, ...] = ()
    """How many tokens of each row count; empty: all."""
    group_size: int = 2
    dtype: torch.dtype = torch.float64
    precision: Precision = "ieee"
    leaves: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.length)

        def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
            x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
            return x.to(self.dtype).requires_grad_()

        rows, width = (self.batch, self.heads), self.width
        tokens = [normal(self.batch, self.length, self.heads, width) for _ in range(3)]
        rate = torch.rand(self.batch, self.length, self.heads, 1, generator=generator, dtype=torch.float64)
        shapes = ((width, width), (1, width))
        weights = [normal(*rows, *shape, scale=scale) for shape, scale in zip(shapes, (width**-0.5, 0.2), strict=True)]
        summed = [normal(*rows, *shape, scale=0.1) for shape in shapes] if self.counts else []
        norms = [normal(self.heads, 1, width, scale=0.3, shift=1.0), normal(self.heads, 1, width, scale=0.3)]
        # A quarter at the most below 1/i: every step size stays above zero, so that every one gets a gradient.
        offset = torch.rand(self.size, generator=generator, dtype=torch.float64) - 0.25 / self.size
        self.leaves = [
            *tokens, (rate / width + 0.02).to(self.dtype).requires_grad_(), *norms,
            offset.to(self.dtype).requires_grad_(), *weights, *summed,
        ]  # fmt: skip

    def as_type(self, dtype: torch.dtype) -> Case:
        """The same numbers in another type."""
        made = Case(**{name: getattr(self, name) for name in self.__dataclass_fields__ if name != "leaves"})
        made.leaves = [x.detach().to(dtype).requires_grad_() for x in self.leaves]
        return made

    def learn(self, name: str) -> Found:
        """Outputs, final state included, and the gradients of all leaves, by one implementation."""
        q, k, target, rate, gamma, beta, offset, *state = self.leaves
        scale = 1 / torch.arange(1, self.size + 1).to(offset)
        scale = scale + offset if self.causal else torch.full_like(scale, 1 / self.size)
        # As a layer has them: heads inside tokens.
        tokens = Tokens(*(x.transpose(1, 2) for x in (q, k, target, rate)))
        inner = Inner(gamma, beta, scale, self.causal, 1e-6, self.precision)
        return learned(
            name, tokens, state, inner, self.leaves,
            group_size=self.group_size, counts=self.counts, lengths=self.lengths,
        )  # fmt: skip


CASES = {
    "3C + 2 tokens, groups of 2": Case(length=14),
    "3C + 2 tokens, everything kept": Case(length=14, group_size=0),
    "groups of 1": Case(length=9, group_size=1),
    "groups of 3, the last of one": Case(length=17, group_size=3),
    "C + 1 tokens, the first of three": Case(length=6, size=5, batch=2, group_size=0, lengths=(6, 3)),
    "C tokens, three heads": Case(length=4, heads=3),
    "C - 1 tokens": Case(length=3),
    "one token": Case(length=1),
    "open in every row elsewhere": Case(length=8, batch=3, counts=(0, 1, 3), group_size=1),
    "one token of an open mini-batch": Case(length=1, batch=2, counts=(1, 3)),
    "two tokens of open mini-batches, one of which closes": Case(length=2, batch=2, counts=(1, 2)),
    "open, masked": Case(length=6, batch=2, counts=(2, 3), lengths=(6, 0)),
    "not causal": Case(length=14, batch=2, causal=False),
    "not causal, masked": Case(length=7, batch=2, causal=False, lengths=(7, 2)),
    "C 1, F 32": Case(length=5, size=1, width=32, batch=2, lengths=(5, 3)),
    "C 1, not causal, groups of 1": Case(length=3, size=1, causal=False, group_size=1),
    "C 16, F 128": Case(length=17, size=16, width=128),
    "C 17, the last block of one token": Case(length=36, size=17, group_size=1),
    "C 17, not causal": Case(length=34, size=17, causal=False, group_size=1),
    "C 33, not causal, the last of two blocks": Case(length=50, size=33, causal=False),
    "C 63, open in every row elsewhere": Case(length=60, size=63, batch=2, counts=(0, 40)),
    "C 64, F 64": Case(length=65, size=64, width=64),
    "C 64, F 32, not causal": Case(length=66, size=64, width=32, causal=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_outputs_and_gradients_are_the_definitions(case: Case) -> None:
    found = case.learn("triton")
    assert furthest(found, case.learn("reference")) <= 1e-12


def test_programs_in_reverse_order_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """None reads what another writes, rooms between blocks of tokens among them: bit for bit."""
    cases = Case(length=17, size=17, batch=2), Case(length=2, size=1, batch=2)
    expected = [case.learn("triton") for case in cases]
    builder = interpreter.interpreter_builder
    forwards = builder.set_grid_idx
    monkeypatch.setattr(
        builder, "set_grid_idx",
        lambda *index: forwards(*(count - 1 - i for count, i in zip(builder.grid_dim, index, strict=True))),
    )  # fmt: skip
    for case, before in zip(cases, expected, strict=True):
        found = case.learn("triton")
        assert all(torch.equal(a, b) for a, b in zip(itertools.chain(*found), itertools.chain(*before), strict=True))


def test_rooms_between_blocks_are_wholly_used() -> None:
    """Each program has its own: were two to share one, some of it would still be NaN."""
    case = Case(length=17, size=17, batch=2, heads=2)
    q, k, target, rate, gamma, beta, offset, *weights = (x.detach() for x in case.leaves)
    q, k, target, rate = (x.transpose(1, 2).unsqueeze(2) for x in (q, k, target, rate))
    scale = 1 / torch.arange(1, 18) + offset
    problem = Problem(q, k, target, rate, gamma, beta, scale[None], scale[-1:, None], weights, [], True, 1e-6, 1)
    answers, following, _ = linear_forward(problem, keep=False)
    run = LinearBackward(problem, torch.ones_like(answers), [torch.ones_like(w) for w in following])
    run.forward(0, 1, run.weights, None, run.weights, [], 1)
    run.group(0, 1, run.weights, run.weights[0])
    assert run.errors.isfinite().all()
    assert run.room.isfinite().all()


WATCHED = {
    "a group of two and one of one": Case(length=12, width=32),
    "two mini-batches and an open one, two heads": Case(length=9, heads=2, batch=2, counts=(0, 2), group_size=1),
    "two blocks": Case(length=34, size=17),
    "two blocks, not causal, one mini-batch open": Case(length=18, size=17, causal=False),
    "C 1": Case(length=4, size=1, batch=2),
}


@pytest.mark.parametrize("case", WATCHED.values(), ids=WATCHED.keys())
def test_programs_stay_inside_their_tensors_and_their_threads_wait_for_each_other(case: Case) -> None:
    with watched():
        case.learn("triton")


def test_thirty_two_programs() -> None:
    case = Case(length=4, size=3, batch=4, heads=8)
    with torch.no_grad():
        q, k, target, rate, gamma, beta, offset, *weights = case.leaves
        inner = Inner(gamma, beta, 1 / torch.arange(1, 4) + offset, True, 1e-6)
        tokens = Tokens(*(x.transpose(1, 2) for x in (q, k, target, rate)))
        z, end = learn(tokens, Stream(tuple(weights)), inner, group_size=2)
        for row, head in ((0, 0), (1, 7), (3, 2)):
            alone = Tokens(*(x[row : row + 1, head : head + 1] for x in tokens))
            its = Inner(gamma[head : head + 1], beta[head : head + 1], inner.scale_C, True, 1e-6)
            own = Stream(tuple(w[row : row + 1, head : head + 1] for w in weights))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TTT_OPS", "generic")
                expected, its_end = learn(alone, own, its, group_size=2)
            torch.testing.assert_close(z[row, head], expected[0, 0], rtol=1e-12, atol=1e-12)
            for a, b in zip((*end.weights, *end.gradients), (*its_end.weights, *its_end.gradients), strict=True):
                torch.testing.assert_close(a[row, head], b[0, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("teaches", [False, True], ids=["zeros", "targets alone"])
@pytest.mark.parametrize("opened", [False, True])
def test_constant_vectors_get_no_gradient(opened: bool, teaches: bool) -> None:
    """Tokens of zeros while biases are zero: a mini-batch of nothing else, and some among others."""
    case = Case(length=10, counts=(2,) if opened else ())
    with torch.no_grad():
        for x in case.leaves[: 2 if teaches else 3]:
            x[:, [0, 1, 2, 3, 4, 8]] = 0
        case.leaves[3].mul_(1e-3 if teaches else 1)  # 1/√ε is much to learn by
        for x in (case.leaves[5], *case.leaves[8::2]):  # β, b and the bias of the sums
            x.zero_()
    expected = case.learn("reference")
    assert furthest(case.learn("triton"), expected) <= 1e-9
    assert all(gradient.abs().max() < 1e5 for gradient in expected[1])  # the formula's own: 1e6 a token


@pytest.mark.parametrize("size", [1, 4])
def test_vectors_that_are_constant_up_to_rounding_get_no_gradient(size: int) -> None:
    """A key of zeros, and a bias of two neighbouring numbers, one to `ttt.ops.norm`, if not to the definition."""
    case = Case(length=3, size=size)
    with torch.no_grad():
        case.leaves[1][:, 0] = 0
        case.leaves[8].fill_(0.3)
        case.leaves[8][..., ::2] += 2.0**-54
    assert furthest(case.learn("triton"), case.learn("generic")) <= 1e-9


@pytest.mark.parametrize("size", [1, 4])
def test_errors_of_zeros_alone_stop_no_gradient(size: int) -> None:
    """With γ zero no token has an error, while outputs vary: γ gets a gradient through what they would teach."""
    case = Case(length=5, size=size)
    with torch.no_grad():
        case.leaves[4].zero_()
    assert furthest(case.learn("triton"), case.learn("reference")) <= 1e-12


# --- precision ---


def test_float32_is_within_rounding() -> None:
    for size, width in ((1, 16), (16, 64)):
        case = Case(length=2 * size + 3, size=size, width=width, dtype=torch.float32)
        found = case.learn("triton")
        assert all(x.dtype == torch.float32 for x in itertools.chain(*found))
        assert furthest(found, case.as_type(torch.float64).learn("reference")) <= 1e-5


def _forward_by_hand(case: Case, rounded: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The equations of `ttt.ops.triton.linear` for one row and head, both operands of every product rounded."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return rounded(a) @ rounded(b)

    def normed(x: Tensor) -> tuple[Tensor, Tensor]:
        centred = x - x.mean(-1, keepdim=True)
        inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
        return centred * inverse, inverse

    q, k, target, rate, gamma, beta, offset, w, b = (x.detach() for x in case.leaves)
    gamma, beta, w, b, s = gamma[0], beta[0], w[0, 0], b[0, 0], 1 / torch.arange(1, case.size + 1) + offset
    answers = []
    for n in range(case.length // case.size):
        of_n = slice(n * case.size, (n + 1) * case.size)
        Q, K, t, eta = (x[0, of_n, 0] for x in (q, k, target, rate))
        unit, inverse = normed(product(K, w) + b)
        r = gamma * (gamma * unit + beta - t)
        error = inverse * (r - r.mean(-1, keepdim=True) - unit * (r * unit).mean(-1, keepdim=True))
        taught = product(((product(Q, K.mT) + 1) * eta.mT).tril(), error)
        answers.append(Q + gamma * normed(product(Q, w) + b - s[:, None] * taught)[0] + beta)
        pushed = -s[-1] * eta * error
        w, b = w + product(K.mT, pushed), b + pushed.sum(0)
    return [torch.cat(answers), w, b]


def test_bfloat16_rounds_the_operands_of_products_alone() -> None:
    case = Case(length=24, size=8, width=32, dtype=torch.float32, precision="bf16")
    found = case.learn("triton")
    outputs = [x.detach().squeeze() for x in found[0]]
    rounded = _forward_by_hand(case, lambda x: x.bfloat16().float())
    whole = _forward_by_hand(case, lambda x: x)
    for a, b, c in zip(outputs, rounded, whole, strict=True):
        b, c = b.squeeze(), c.squeeze()
        assert (a - b).norm() <= 1e-4 * b.norm()
        assert (a - c).norm() >= 5e-4 * c.norm()
    # Backward rounds its own products; the gradients are those of whole numbers, to a few bfloat16's 2⁻⁹.
    exact = case.as_type(torch.float64)
    exact.precision = "ieee"
    apart = torch.tensor(distances(([], found[1]), ([], exact.learn("fused")[1])))
    assert apart.max() <= 3e-2
    assert apart[[0, 1, 2, 3, 4, 6, 7, 8]].min() >= 1e-4  # β's is a sum of gradients, nearly without a product


PRODUCTS = {
    "causal, found open": Case(length=4, batch=2, counts=(1, 0)),
    "two blocks, not causal, one mini-batch open": Case(length=18, size=17, causal=False),
}


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("case", PRODUCTS.values(), ids=PRODUCTS.keys())
def test_every_product_has_the_precision_that_is_asked_for(case: Case, precision: Precision) -> None:
    with products() as found:
        replace(case, precision=precision).learn("triton")
    assert len(found) >= 20
    for asked, rounded in found:
        assert rounded if precision == "bf16" else asked == precision.upper()


def test_tf32_is_left_to_the_device() -> None:
    """The interpreter multiplies whole numbers; float64 is never rounded for it."""
    case = Case(length=6, dtype=torch.float32)
    expected = case.learn("triton")
    case.precision = "tf32"
    found = case.learn("triton")
    assert all(torch.equal(a, b) for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True))
