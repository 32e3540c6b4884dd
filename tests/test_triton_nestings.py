"""Law 2 with the Triton kernels, in Triton's interpreter: no nesting of checkpoints changes an answer or a gradient."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from kernel_results import weighed

from ttt.config import TTTConfig
from ttt.layer import TTTLayer
from ttt.train import compiling
from ttt.train.compiling import CompiledRead

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    # PyTorch looks at gradients while it traces, and hides the warning itself where warnings are no errors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

KINDS = ("linear", "mlp")
LENGTHS = (8, 11)
"""Two mini-batches; and two with one that stays open."""
Run = Callable[[Tensor], Tensor]
Found = list[Tensor]


# What PyTorch's users, FSDP's and kyutai wrap around a layer.
AROUND: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "reentrant, no random state": {"use_reentrant": True, "preserve_rng_state": False},
    "non-reentrant": {"use_reentrant": False, "determinism_check": "default"},
    "kyutai's": {"use_reentrant": False, "determinism_check": "none", "preserve_rng_state": False},
}


def layer_of(kind: str, group_size: int, dtype: torch.dtype = torch.float64) -> TTTLayer:
    config = TTTConfig.model_validate(
        {"layer_type": kind, "mini_batch_size": 4, "base_lr": 0.5, "scan_checkpoint_group_size": group_size}
        | ({"mlp_expansion_factor": 1} if kind == "mlp" else {})
    )
    layer = TTTLayer(16, 1, config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    layer.reset_parameters(generator)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return layer


def tokens_of(length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(1, length, 16, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def made(kind: str, length: int, group_size: int, autocast: bool) -> tuple[TTTLayer, Tensor]:
    """A layer and tokens, in float32 where autocast is to be on around them."""
    dtype = torch.float32 if autocast else torch.float64
    return layer_of(kind, group_size, dtype), tokens_of(length, dtype)


def nested(run: Run, nesting: tuple[str, ...]) -> Run:
    for name in nesting:
        # What follows a checkpoint needs its output, as a layer's feed-forward does: so it really runs again.
        run = functools.partial(checkpoint, lambda x, inner=run: inner(x).sin(), **AROUND[name])
    return run


def gradients(layer: nn.Module, x: Tensor, run: Run) -> Found:
    """What `run` makes of `x`, and the gradients of `x` and of every parameter."""
    y = run(x)
    weighed(y).backward()
    return [y.detach(), *(leaf.grad for leaf in (x, *layer.parameters()) if leaf.grad is not None)]


@functools.cache
def expected(kind: str, length: int, autocast: bool = False) -> Found:
    """What no checkpoint, no group and no kernel gives, with two sines after the layer."""
    layer, x = made(kind, length, 0, autocast)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTT_OPS", "fused")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = gradients(layer, x, lambda x: layer(x)[0].sin().sin())
    assert len(found) >= len(list(layer.parameters()))
    return found


def assert_same(found: Found, right: Found, bound: float = 1e-11) -> None:
    for index, (a, b) in enumerate(zip(found, right, strict=True)):
        assert (a - b).norm() <= bound * b.norm(), (index, ((a - b).norm() / b.norm()).item())


# --- stress ---


@pytest.mark.parametrize("outer", AROUND)
@pytest.mark.parametrize("inner", AROUND)
def test_no_nesting_changes_a_gradient(inner: str, outer: str) -> None:
    draw = random.Random(f"{inner} in {outer}")
    kind, length, group_size = draw.choice(KINDS), draw.choice(LENGTHS), draw.choice([0, 1, 2, 16])
    autocast = draw.random() < 0.5
    layer, x = made(kind, length, group_size, autocast)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = gradients(layer, x, nested(lambda x: layer(x)[0], (inner, outer)))
    assert_same(found, expected(kind, length, autocast), 1e-5 if autocast else 1e-11)


# --- FSDP ---


class Block(nn.Module):
    """A TTT layer, and something behind it that needs its answers."""

    def __init__(self, layer: TTTLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0].sin()
        return y


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A world of one process, whose parameters FSDP frees and gathers as in any other."""
    store = distributed.FileStore(str(tmp_path_factory.mktemp("world") / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_fsdp_takes_away_and_brings_back(kind: str, reentrant: bool) -> None:
    """Between the passes a layer's parameters are not there; its scan's groups and two checkpoints run again."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    impl = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    block, x = Block(layer_of(kind, 1)), tokens_of(11)
    inner = checkpoint_wrapper(block, impl)
    fully_shard(inner)
    outer = checkpoint_wrapper(nn.Sequential(inner), impl)
    fully_shard(outer)
    found = gradients(outer, x, lambda x: outer(x).sin())
    assert_same([getattr(g, "full_tensor", lambda g=g: g)() for g in found], expected(kind, 11))


# --- train.compile ---


@pytest.mark.parametrize(
    ("kind", "length", "nestings", "versions"),
    [
        ("linear", 8, [("non-reentrant", "kyutai's")], 1),
        ("mlp", 11, [("reentrant", "non-reentrant"), ("kyutai's", "reentrant")], 2),  # with and without gradient
    ],
)
def test_a_compiled_layer_in_nested_checkpoints(
    kind: str, length: int, nestings: list[tuple[str, str]], versions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `train.compile: true`; traced and differentiated as for a compiler, and run by PyTorch's own operations."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    layer = layer_of(kind, 1)
    layer.compiled = read = CompiledRead()
    for nesting in nestings:
        layer.zero_grad()
        x = tokens_of(length)
        assert_same(gradients(layer, x, nested(lambda x: layer(x)[0], nesting)), expected(kind, length))
    assert read.versions == versions
    torch._dynamo.reset()


# --- that these tests can fail ---


def _operation(monkeypatch: pytest.MonkeyPatch, kind: str, change: Callable[[Any, Any, bool], Any]) -> None:
    """Let the forward of a kind's kernels be `change(right, problem, keep)`."""
    import ttt.ops.triton.linear as linear
    import ttt.ops.triton.mlp_forward as mlp

    module, name = (linear, "linear_forward") if kind == "linear" else (mlp, "mlp_forward")
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda problem, *, keep: change(right, problem, keep))


def found_in(kind: str, nesting: tuple[str, str]) -> Found:
    layer, x = layer_of(kind, 1), tokens_of(8)
    return gradients(layer, x, nested(lambda x: layer(x)[0], nesting))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_without_gradients_that_rounds_is_caught_in_reentrant_checkpoints_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def coarse(right: Any, problem: Any, keep: bool) -> Any:
        return right(problem if keep else problem._replace(precision="bf16"), keep=keep)

    _operation(monkeypatch, kind, coarse)
    assert_same(found_in(kind, ("kyutai's", "non-reentrant")), expected(kind, 8))
    with pytest.raises(AssertionError):
        assert_same(found_in(kind, ("non-reentrant", "reentrant")), expected(kind, 8))


def test_a_first_pass_that_keeps_something_else_is_caught_in_non_reentrant_checkpoints_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one that fills a cache for those after it would."""
    filled: list[Tensor] = []

    def keeping(right: Any, problem: Any, keep: bool) -> Any:
        answers, following, kept = right(problem, keep=keep)
        if keep and not filled:
            filled.append(answers.clone())
            kept = [*kept, *filled]
        return answers, following, kept

    _operation(monkeypatch, "linear", keeping)
    assert_same(found_in("linear", ("reentrant", "reentrant")), expected("linear", 8))
    filled.clear()
    with pytest.raises(CheckpointError, match="different number of tensors"):
        found_in("linear", ("non-reentrant", "reentrant"))
