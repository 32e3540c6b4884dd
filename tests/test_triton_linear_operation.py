"""TTT-Linear's Triton kernels as an operation of PyTorch, in a layer, and where they are chosen."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.utils.checkpoint import checkpoint

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from kernel_results import furthest, weighed

from ttt.config import TTTConfig
from ttt.layer import TTTLayer
from ttt.ops.select import implementation

pytestmark = pytest.mark.usefixtures("interpreted")


# --- the operation ---


def _arguments(*, closes: bool = True, opened: bool = False, size: int = 3) -> list[Any]:
    """Arguments of `ttt::triton_minibatches`: step sizes of each row, and mini-batches some of which do not close.

    Keys, rates and weights do not lie densely in memory.
    """
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).requires_grad_()

    batch, heads, width, steps = 2, 2, 16, (3 if size < 16 else 2) if closes else 1
    shape = (batch, heads, steps, size, width)
    tokens = [normal(*shape), normal(*shape[:-1], 2 * width)[..., ::2], normal(*shape).detach().requires_grad_()]
    rate = torch.rand(*shape[:-1], 3, generator=generator, dtype=torch.float64).mul_(0.1).requires_grad_()[..., 1:2]
    scale = torch.rand(batch, size, generator=generator, dtype=torch.float64).add_(0.1).requires_grad_()
    last = torch.rand(steps, batch, generator=generator, dtype=torch.float64).add_(0.1)
    last[-1, 1] = 0
    weights = [normal(batch, heads, width, width, scale=0.25).mT, normal(batch, heads, 1, width, scale=0.2)]
    sums = [normal(batch, heads, width, width, scale=0.1).mT, normal(batch, heads, 1, width, scale=0.1)]
    return [
        *tokens, rate, normal(1, 1, width), normal(heads, 1, width), scale, last.requires_grad_() if closes else None,
        weights, sums if opened else [], size > 1, 1e-6, 2, "ieee", True,
    ]  # fmt: skip


def _gradients(operation: Any, arguments: list[Any], weigh: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], Any]:
    z, following, _ = operation(*arguments)
    outputs = [z, *following]
    leaves = [x for x in arguments[:8] if x is not None] + arguments[8] + arguments[9]
    total = sum((weigh(x) for x in outputs), torch.zeros((), dtype=z.dtype))
    return outputs, list(torch.autograd.grad(total, leaves))


def _inside_tokens(x: Tensor) -> Tensor:
    """Every number weighed differently; the gradient has heads inside tokens, as answers have in a layer."""
    return weighed(x.movedim(1, -2))


@pytest.mark.parametrize(
    ("closes", "opened", "size"),
    [(True, False, 3), (False, False, 3), (False, True, 3), (True, False, 18), (False, True, 18), (True, False, 1)],
)
@pytest.mark.parametrize("weigh", [_inside_tokens, torch.sum], ids=["heads inside tokens", "expanded"])
def test_the_operation_is_the_fused_one(
    closes: bool, opened: bool, size: int, weigh: Callable[[Tensor], Tensor]
) -> None:
    """With tokens, and gradients of answers, whose memory is neither dense nor even."""
    arguments = _arguments(closes=closes, opened=opened, size=size)
    found = _gradients(torch.ops.ttt.triton_minibatches, arguments, weigh)
    assert furthest(found, _gradients(torch.ops.ttt.minibatches, arguments, weigh)) <= 1e-12


def test_step_sizes_get_the_slope_of_the_loss() -> None:
    """Of each position and row, and of each mini-batch's update; by differences, from no formula."""
    arguments = _arguments()

    def loss(scale: Tensor, last: Tensor) -> Tensor:
        z, following, _ = torch.ops.ttt.triton_minibatches(*arguments[:6], scale, last, *arguments[8:])
        return weighed(z) + weighed(following[0]) + weighed(following[1])

    assert torch.autograd.gradcheck(loss, (arguments[6], arguments[7]), rtol=1e-6, atol=1e-6, fast_mode=True)


def test_it_keeps_the_openings_of_groups_alone() -> None:
    arguments = _arguments()
    for group_size, openings in ((0, 2), (1, 2), (2, 1), (3, 0)):
        arguments[-3] = group_size
        (kept,) = torch.ops.ttt.triton_minibatches(*arguments)[2]
        assert kept.shape == (openings, 4, 17, 16)
    assert torch.ops.ttt.triton_minibatches(*arguments[:-1], False)[2] == []


def test_pytorch_takes_the_operation() -> None:
    arguments = _arguments(closes=False, opened=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    library.opcheck(torch.ops.ttt.triton_minibatches.default, tuple(arguments), test_utils=checks)


def test_a_second_derivative_is_refused_in_words() -> None:
    z, _, _ = torch.ops.ttt.triton_minibatches(*(arguments := _arguments()))
    (gradient,) = torch.autograd.grad(z.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; set TTT_OPS=generic"):
        gradient.sum().backward()


def test_the_gradients_that_are_given_stay_as_they_are() -> None:
    """Backward moves the gradient of the weights in place, in memory of its own."""
    arguments = _arguments()
    z, following, _ = torch.ops.ttt.triton_minibatches(*arguments)
    given = [torch.ones_like(z), *map(torch.ones_like, following)]
    torch.autograd.grad([z, *following], arguments[0], given)
    assert all((x == 1).all() for x in given)


# --- in a layer ---


def _layer(**options: Any) -> tuple[TTTLayer, Tensor]:
    config = TTTConfig.model_validate(
        {"mini_batch_size": 4, "layer_type": "linear", "base_lr": 0.5, "scan_checkpoint_group_size": 2, **options}
    )
    layer = TTTLayer(16, 1, config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    layer.reset_parameters(generator)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return layer, torch.randn(1, 14, 16, generator=generator, dtype=torch.float64).requires_grad_()


def test_inside_checkpoints_inside_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = _layer()

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [x, *layer.parameters()]
        for leaf in leaves:
            leaf.grad = None
        weighed(run(x).sin()).backward()  # what follows a checkpoint needs its output, so it really runs again
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    def nested(x: Tensor) -> Tensor:
        def inside(y: Tensor) -> Tensor:
            z: Tensor = checkpoint(lambda v: layer(v)[0], y, use_reentrant=False, determinism_check="none")
            return z.sin()

        z: Tensor = checkpoint(inside, x, use_reentrant=True)
        return z

    found = gradients(nested)
    monkeypatch.setenv("TTT_OPS", "fused")
    expected = gradients(lambda x: layer(x)[0].sin())
    assert furthest((found, []), (expected, [])) <= 1e-11


def test_it_compiles_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = _layer()
    torch._dynamo.reset()
    found = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)(x)[0]
    (gradient,) = torch.autograd.grad(weighed(found), x)
    monkeypatch.setenv("TTT_OPS", "fused")
    expected = layer(x)[0]
    (right,) = torch.autograd.grad(weighed(expected), x)
    assert furthest(([found], [gradient]), ([expected], [right])) <= 1e-11


# --- the choice ---


def test_it_runs_where_it_is_asked_to_and_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(*widths: int, size: int = 16, dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
        return implementation(device_type=device, dtypes={dtype}, mini_batches=2, widths=widths, size=size)

    assert chosen(64, 64) == chosen(128, 512, 128) == chosen(64, 64, device="cuda") == "triton"
    assert chosen(64, 64, size=64, device="cuda") == chosen(128, 128, size=64, device="cuda") == "triton"
    for arguments, why in (
        ({"widths": (24, 24)}, "heads of 16, 32, 64, 128, not 24"),
        ({"widths": (64, 64), "size": 65}, "at most 64 tokens with heads of 64, not 65"),
        ({"widths": (128, 128), "size": 65, "device": "cuda"}, "at most 64 tokens with heads of 128, not 65"),
        ({"widths": (128, 512, 128), "size": 65, "device": "cuda"}, "at most 64 tokens with heads of 128, not 65"),
        ({"widths": (64, 8, 8, 64)}, "inner models of one or two layers, not 3"),
        ({"widths": (64, 64), "dtype": torch.bfloat16}, "in float32, not bfloat16"),
        ({"widths": (64, 64), "dtype": torch.float64, "device": "cuda"}, "in float32, not float64"),
        ({"widths": (64, 64), "device": "mps"}, "needs a GPU, not the device mps"),
    ):
        with pytest.raises(ValueError, match=f"^TTT_OPS=triton .*{why}.*; write another implementation, or unset it$"):
            chosen(*arguments.pop("widths"), **arguments)  # type: ignore[arg-type,misc]
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 interprets the kernels on the CPU, slowly"):
        chosen(64, 64)
    monkeypatch.delenv("TTT_OPS")
    assert chosen(64, 64, device="cuda") == "fused"
