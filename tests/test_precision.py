"""`train.ttt_precision`: what the operands of inner products are, and that nothing global reaches them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy import ToyBackbone

from ttt.errors import EnvironmentProblem
from ttt.layer import TTTLayer
from ttt.machine import missing_precision
from ttt.ops.fused import operator, products, registration
from ttt.ops.minibatch import Inner, Stream, learn
from ttt.ops.norm import inner_loss_gradient, layer_norm
from ttt.ops.precision import global_precision, product
from ttt.ops.rows import Tokens
from ttt.plugins import run_config_model
from ttt.train.setup import build

ATEN = torch.ops.aten
_BMM = {ATEN.bmm.default: (0, 1), ATEN.bmm.out: (0, 1), ATEN.baddbmm_.default: (1, 2), ATEN.baddbmm.out: (1, 2)}
_ADDCMUL = {ATEN.addcmul_.default, ATEN.addcmul.out}


class Watch(TorchDispatchMode):
    """Sees every product inside of the fused operation: its operands, and what PyTorch is set to at the time."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[Tensor] = []
        self.settings: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = {
            torch.ops.ttt.minibatches.default: operator.RUN,
            torch.ops.ttt.minibatches_backward.default: operator.RUN_BACKWARD,
        }
        if func in inside:
            with self:
                return inside[func](*args, **(kwargs or {}))
        factors = [args[i] for i in _BMM.get(func, ())]
        if func in _ADDCMUL and args[1].shape[-1] == 1 < args[1].shape[-2] and args[2].shape[-2] == 1:  # an outer one
            factors = list(args[1:3])
        if factors:
            self.operands += [x.clone() for x in factors]
            self.settings.add(global_precision(factors[0]))
        return func(*args, **(kwargs or {}))


def problem(
    *, size: int, length: int, hidden: tuple[int, ...] = (20,), causal: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[Tokens, tuple[Tensor, ...], Inner]:
    generator = torch.Generator().manual_seed(size + length)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    width, heads, batch = 12, 2, 3
    tokens = Tokens(
        *(normal(batch, heads, length, width) for _ in range(3)), normal(batch, heads, length, 1, scale=0.1)
    )
    weights: tuple[Tensor, ...] = ()
    for fan_in, fan_out in itertools.pairwise((width, *hidden, width)):
        weights += (normal(batch, heads, fan_in, fan_out, scale=0.3), normal(batch, heads, 1, fan_out, scale=0.2))
    gamma = 1 + normal(heads, 1, width, scale=0.2)
    scale = 1 / torch.arange(1, size + 1).to(dtype) if causal else torch.full((size,), 1 / size, dtype=dtype)
    return tokens, weights, Inner(gamma, normal(heads, 1, width, scale=0.2), scale, causal, 1e-6)


def answers(given: tuple[Tokens, tuple[Tensor, ...], Inner], precision: str, group_size: int = 2) -> list[Tensor]:
    """Answers, final state, and the gradients of tokens and weights."""
    tokens, weights, inner = given
    inner = inner._replace(precision=precision)  # type: ignore[arg-type]
    z, end = learn(tokens, Stream(weights), inner, group_size=group_size)
    outputs = [z, *end.weights, *(end.gradients or ())]
    total = sum(((x * torch.linspace(0.5, 1.5, x.numel()).view_as(x)).sum() for x in outputs), torch.zeros(()))
    return [*(x.detach() for x in outputs), *torch.autograd.grad(total, [*tokens, *weights])]


@contextlib.contextmanager
def globally(precision: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = "none"


KINDS = [
    {"size": 4, "length": 19},
    {"size": 4, "length": 19, "hidden": ()},
    {"size": 4, "length": 19, "causal": False},
    {"size": 1, "length": 5},
    {"size": 3, "length": 8, "hidden": (9, 7)},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", ["fused", "generic"])
def test_a_global_setting_reaches_no_inner_product(
    kind: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither forward nor backward; and it holds again afterwards, for everybody else."""
    monkeypatch.setenv("TTT_OPS", name)
    given = problem(**kind, dtype=torch.float32)
    expected = answers(given, "ieee")
    with globally("medium"), Watch() as watch:
        found = answers(given, "ieee")
        assert torch.get_float32_matmul_precision() == "medium"
    assert watch.settings == {"ieee"}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_it_would_be_seen_if_a_global_setting_reached_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTT_OPS", "fused")
    monkeypatch.setattr(registration, "multiplying", lambda x, precision: contextlib.nullcontext())
    with globally("medium"), Watch() as watch:
        answers(problem(size=4, length=8, dtype=torch.float32), "ieee")
    assert watch.settings == {"bf16"}


def test_a_setting_of_all_backends_is_followed_again_afterwards() -> None:
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        given = problem(size=4, length=8, dtype=torch.float32)
        answers(given, "ieee")
        assert global_precision(given[0].q) == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert global_precision(given[0].q) == "ieee"
    finally:
        torch.backends.fp32_precision = before


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_bf16_rounds_both_operands_of_every_product(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else: fast weights and sums keep their digits."""
    monkeypatch.setenv("TTT_OPS", "fused")
    given = problem(**kind)
    exact = answers(given, "ieee")
    with Watch() as watch:
        found = answers(given, "bf16")
    assert watch.operands
    assert all(torch.equal(x, x.bfloat16().to(x.dtype)) for x in watch.operands)
    for a, b in zip(found, exact, strict=True):
        assert not torch.equal(a, a.bfloat16().to(a.dtype))
        assert 1e-4 * b.norm() < (a - b).norm() < 0.03 * b.norm()


def test_it_would_be_seen_if_one_operand_were_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTT_OPS", "fused")
    right = products.Products.operands
    monkeypatch.setattr(products.Products, "operands", lambda self, a, b: (right(self, a, b)[0], b))
    with Watch() as watch:
        answers(problem(size=4, length=8), "bf16")
    assert not all(torch.equal(x, x.bfloat16().to(x.dtype)) for x in watch.operands)


def test_bf16_is_this_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mini-batch of a linear model, each product written out with its operands rounded."""
    monkeypatch.setenv("TTT_OPS", "fused")
    tokens, (w, b), inner = problem(size=4, length=4, hidden=())
    q, k, target, rate = (x.detach() for x in tokens)

    def r(x: Tensor) -> Tensor:
        return x.detach().bfloat16().double()

    def with_ones(x: Tensor) -> Tensor:
        return torch.cat((x, torch.ones_like(x[..., :1])), -1)

    joined = torch.cat((w, b), -2).detach()
    norms = inner.gamma_H1F.detach(), inner.beta_H1F.detach()
    error = inner_loss_gradient(r(with_ones(k)) @ r(joined), target, *norms, eps=inner.eps)
    seen = r(with_ones(q)) @ r(with_ones(k)).mT * (-inner.scale_C[:, None] * rate.mT).tril()
    answer = q + layer_norm(r(with_ones(q)) @ r(joined) + r(seen) @ r(error), *norms, eps=inner.eps)
    moved = joined + r(with_ones(k) * rate * -inner.scale_C[-1]).mT @ r(error)
    z, end = learn(tokens, Stream((w, b)), inner._replace(precision="bf16"), group_size=0)
    torch.testing.assert_close(z, answer, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(end.weights, -2), moved, rtol=1e-12, atol=1e-12)


def test_a_recorded_product_rounds_in_its_derivatives_too() -> None:
    a, b, d = (torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(i)) for i in range(3))
    a.requires_grad_()
    b.requires_grad_()
    d_a, d_b = torch.autograd.grad(product(a, b, "bf16"), (a, b), d)
    r_a, r_b, r_d = (x.detach().bfloat16().float() for x in (a, b, d))
    torch.testing.assert_close(d_a, r_d @ r_b.mT)
    torch.testing.assert_close(d_b, r_a.mT @ r_d)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_implementation_rounds_about_alike(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """They round at other places of the same sums; the definition rounds nowhere, and says so."""
    given = problem(**kind)
    found = {}
    for name in ("fused", "generic"):
        monkeypatch.setenv("TTT_OPS", name)
        found[name] = answers(given, "bf16", group_size=0)
    exact = answers(given, "ieee")
    for a, b, c in zip(found["fused"], found["generic"], exact, strict=True):
        assert (a - b).norm() < 0.03 * c.norm()
        assert (b - c).norm() > 1e-4 * c.norm()
    monkeypatch.setenv("TTT_OPS", "reference")
    with pytest.raises(ValueError, match="rounds no operands to bf16; unset it"):
        answers(given, "bf16")


def test_which_devices_have_tf32() -> None:
    assert missing_precision("tf32", "cuda", (8, 0)) is None
    assert missing_precision("tf32", "cuda") is None  # not known yet
    for device, capability in (("cuda", (7, 5)), ("cpu", None), ("mps", None)):
        obstacle = missing_precision("tf32", device, capability)
        assert obstacle is not None
        assert "bf16" in obstacle.fix
        assert missing_precision("bf16", device, capability) is missing_precision("ieee", device, capability) is None


def test_a_run_sets_it_for_its_layers_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def layers(**train: Any) -> list[TTTLayer]:
        backbone = ToyBackbone()
        settings = {"backbone": {"name": "toy"}, "train": {"device": "cpu", **train}}
        model, _ = build(run_config_model(backbone).model_validate(settings), backbone, torch.device("cpu"))
        return [module for module in model.modules() if isinstance(module, TTTLayer)]

    assert {layer.precision for layer in layers()} == {"ieee"}
    rounding = layers(ttt_precision="bf16")
    assert {layer.precision for layer in rounding} == {"bf16"}
    assert rounding[0]._inner(torch.float32).precision == "bf16"
    with pytest.raises(EnvironmentProblem, match=r"ttt_precision: tf32, but TF32 needs .* on cpu; write .* bf16"):
        layers(ttt_precision="tf32")
    monkeypatch.setenv("TTT_OPS", "reference")
    with pytest.raises(EnvironmentProblem, match="TTT_OPS=reference computes from the definition"):
        layers(ttt_precision="bf16")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for name, said in {"triton": "triton needs .*; write another", "fussed": "fussed is not an implementation"}.items():
        monkeypatch.setenv("TTT_OPS", name)
        with pytest.raises(EnvironmentProblem, match=f"TTT_OPS={said}"):
            layers()
