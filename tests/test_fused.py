"""The fused scan: the reference's numbers and gradients, any nesting, little memory, compiled without a break."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import random
import re
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ttt.config import TTTConfig
from ttt.costs import scan_cost
from ttt.layer import TTTLayer
from ttt.ops import fused
from ttt.ops.constants import ALIGNED, aligned_for
from ttt.ops.fused import layout, operator, pages
from ttt.ops.minibatch import Inner, Stream, learn
from ttt.ops.rows import Tokens
from ttt.ops.select import implementation
from ttt.state import TTTState

EXACT = {"rtol": 1e-9, "atol": 1e-9}


@dataclass
class Problem:
    """A sequence and a state, every tensor a leaf that wants a gradient."""

    tokens: Tokens
    weights: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    count_B: Tensor | None
    gamma: Tensor
    beta: Tensor
    offset_C: Tensor
    causal: bool

    @classmethod
    def draw(
        cls,
        *,
        length: int,
        size: int,
        hidden: tuple[int, ...],
        causal: bool = True,
        opened: bool = False,
        batch: int = 2,
        heads: int = 2,
        width: int = 6,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> Problem:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
            x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
            return x.to(dtype).requires_grad_()

        rate = torch.rand(batch, heads, length, 1, generator=generator, dtype=torch.float64) * 0.5 + 0.05
        tokens = Tokens(*(normal(batch, heads, length, width) for _ in range(3)), rate.to(dtype).requires_grad_())
        weights: tuple[Tensor, ...] = ()
        for fan_in, fan_out in itertools.pairwise((width, *hidden, width)):
            weights += (normal(batch, heads, fan_in, fan_out, scale=0.4), normal(batch, heads, 1, fan_out, scale=0.2))
        opened = opened and causal
        return cls(
            tokens,
            weights,
            tuple(normal(*w.shape, scale=0.1) for w in weights) if opened else (),
            torch.randint(0, size, (batch,), generator=generator) if opened else None,
            normal(heads, 1, width, scale=0.3, shift=1.0),
            normal(heads, 1, width, scale=0.3),
            normal(size, scale=0.2),
            causal,
        )

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.tokens, *self.weights, *self.gradients, self.gamma, self.beta, self.offset_C]

    def learn(self, monkeypatch: pytest.MonkeyPatch, name: str, group_size: int) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, final state included, and the gradients of all leaves, by one implementation."""
        size = len(self.offset_C)
        scale = 1 / torch.arange(1, size + 1).to(self.offset_C)
        scale = (scale + self.offset_C).clamp_min(0) if self.causal else torch.full_like(scale, 1 / size)
        inner = Inner(self.gamma, self.beta, scale, self.causal, 1e-6)
        stream = Stream(self.weights, self.gradients or None, self.count_B)
        with monkeypatch.context() as patch:
            patch.setenv("TTT_OPS", name)
            z, end = learn(self.tokens, stream, inner, group_size=group_size)
            outputs = [z, *end.weights, *(end.gradients or ())]
            total = sum((weighed(x) for x in outputs), torch.zeros((), dtype=z.dtype))
            found = torch.autograd.grad(total, self.leaves, allow_unused=True)
        return outputs, [torch.zeros_like(x) if g is None else g for x, g in zip(self.leaves, found, strict=True)]


def weighed(x: Tensor) -> Tensor:
    """A sum that weighs every number differently."""
    return (x * torch.linspace(0.3, 1.7, x.numel(), dtype=x.dtype).view_as(x)).sum()


def assert_same(
    found: tuple[list[Tensor], list[Tensor]], expected: tuple[list[Tensor], list[Tensor]], **how: Any
) -> None:
    for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        torch.testing.assert_close(a, b, **how)


@pytest.mark.parametrize("teaches", [False, True], ids=["zeros", "targets alone"])
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(("hidden", "causal"), [((), True), ((8,), True), ((8,), False), ((7, 5), True)])
def test_tokens_of_zeros_get_no_gradient_through_norms_in_every_implementation(
    hidden: tuple[int, ...], causal: bool, opened: bool, teaches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases zero, as at the start: what the inner model makes of zeros is constant, where formulas divide by ε alone.

    A mini-batch of nothing else begins the sequence, and one that has others too follows. Where targets stand beside
    such keys they teach, at the formula's rate, and get the formula's gradient.
    """
    problem = Problem.draw(length=14, size=4, hidden=hidden, causal=causal, opened=opened, seed=3)
    with torch.no_grad():
        for x in (*problem.tokens[:2], *([] if teaches else [problem.tokens.target])):
            x[:, :, [0, 1, 2, 3, 4, 9]] = 0
        problem.tokens.rate.mul_(1e-3 if teaches else 1)  # 1/√ε is much to learn by
        for biases in (problem.weights[1::2], problem.gradients[1::2]):
            for bias in biases:
                bias.zero_()
        problem.beta.zero_()
    expected = problem.learn(monkeypatch, "reference", 0)
    for name in ("generic", "fused"):
        assert_same(problem.learn(monkeypatch, name, 2), expected, rtol=1e-7, atol=1e-7)
    # The formulas' own: 1e6 for each of four tokens of zeros, and again through each mini-batch of them.
    assert all(gradient.abs().max() < 1e5 for gradient in expected[1])


def chunked(size: int, most: int, keep: bool, in_place: bool) -> int:
    """Mini-batches of a chunk; one where weights are to move in place."""
    return 1 if in_place and not keep else min(size, most)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms, under which PyTorch fills new tensors with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


PROBLEMS = st.fixed_dictionaries(
    {
        "length": st.integers(1, 13),
        "size": st.integers(1, 5),
        "hidden": st.sampled_from([(), (10,), (3,), (7, 5)]),
        "causal": st.booleans(),
        "opened": st.booleans(),
        "batch": st.integers(1, 3),
        "heads": st.integers(1, 3),
        # Not 2: two numbers are normalised to ±1 whatever they are, and what is left of a gradient is rounding.
        "width": st.integers(3, 7),
        "seed": st.integers(0, 1000),
    }
)
DRAWS = settings(
    max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@DRAWS
@given(
    shape=PROBLEMS,
    group_size=st.sampled_from([0, 1, 2, 3, 5, 16]),
    block=st.sampled_from([2, 3, 16]),
    chunk=st.sampled_from([1, 2, 16]),
    in_place=st.booleans(),
    aligned=st.sampled_from([1, ALIGNED]),
)
def test_it_is_the_reference_and_the_generic_scan(
    shape: dict[str, Any],
    group_size: int,
    block: int,
    chunk: int,
    in_place: bool,
    aligned: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every output and every gradient, open mini-batches in any row included.

    In chunks of all sizes, as large as the group on a GPU, with rows as a CPU or a GPU has them, and with every new
    tensor full of what must not be read.
    """
    problem = Problem.draw(**shape)
    with monkeypatch.context() as patch:
        patch.setattr(operator, "BLOCK", block)
        patch.setattr(layout, "aligned_for", lambda kind: aligned)
        patch.setattr(layout.Dims, "chunk", lambda dims, device, most, *, keep: chunked(chunk, most, keep, in_place))
        with deterministic():
            found = problem.learn(monkeypatch, "fused", group_size)
    assert_same(found, problem.learn(monkeypatch, "reference", 0), **EXACT)
    assert_same(found, problem.learn(monkeypatch, "generic", 0), **EXACT)


def test_rows_are_aligned_where_a_gpu_reads_them() -> None:
    dims = layout.Dims(1, 1, 1, 1, (64, 64), aligned=aligned_for("cuda"))
    assert [dims.joined(width) for width in (62, 63, 64)] == [64, 64, 68]
    assert dims._replace(aligned=aligned_for("cpu")).joined(64) == 65


@pytest.mark.parametrize("size", [1, 4, 16])
def test_float32(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for hidden in ((), (32,)):
        shape = {"length": 6 * size, "size": size, "hidden": hidden, "width": 16}
        found = Problem.draw(**shape, dtype=torch.float32).learn(monkeypatch, "fused", 2)
        # The same numbers, in float64: what is left is the arithmetic's rounding.
        exact = Problem.draw(**shape, dtype=torch.float32)
        exact.tokens = exact.tokens.map(lambda x: x.detach().double().requires_grad_())
        exact.weights = tuple(x.detach().double().requires_grad_() for x in exact.weights)
        exact.gamma, exact.beta, exact.offset_C = (
            x.detach().double().requires_grad_() for x in (exact.gamma, exact.beta, exact.offset_C)
        )
        for a, b in zip(itertools.chain(*found), itertools.chain(*exact.learn(monkeypatch, "fused", 2)), strict=True):
            assert a.dtype == torch.float32
            assert (a - b).norm() <= 1e-5 * b.norm()


def layer_of(seed: int = 0, dtype: torch.dtype = torch.float64, dim: int = 16, **options: Any) -> TTTLayer:
    """A layer every parameter of which acts, those that start at zero too."""
    config = TTTConfig.model_validate({"mini_batch_size": 4, "layer_type": "mlp", "base_lr": 0.5, **options})
    layer = TTTLayer(dim, 2, config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    layer.reset_parameters(generator)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return layer


def tokens_of(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_bfloat16_tokens_are_within_a_percent_and_fast_weights_float32() -> None:
    layer = layer_of(dtype=torch.float32, dim=64)
    with torch.no_grad():  # both get the numbers that bfloat16 can hold
        for parameter in layer.parameters():
            parameter.copy_(parameter.bfloat16())
    x = tokens_of(2, 34, 64, dtype=torch.bfloat16)
    expected, _ = layer(x.float())
    y, state = layer(x)
    assert y.dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for name, tensor in state.tensors().items() if name != "count")
    assert (y.float() - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_it_compiles_without_a_break(kind: str) -> None:
    """Whole mini-batches, and one left open."""
    layer = layer_of(layer_type=kind, learnable_token_idx=True, scan_checkpoint_group_size=2)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    x = tokens_of(2, 18, 16).requires_grad_()
    leaves = [x, *layer.parameters()]
    results = []
    for run in (compiled, layer):
        y, state = run(x)
        outputs = [y, *state.weights, *(state.gradients or ())]
        results.append((outputs, list(torch.autograd.grad(sum(map(weighed, outputs)), leaves))))  # type: ignore[arg-type]
    assert_same(results[0], results[1], rtol=1e-10, atol=1e-10)


def test_a_second_derivative_is_refused_in_words() -> None:
    layer = layer_of()
    x = tokens_of(1, 8, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; set TTT_OPS=generic"):
        gradient.sum().backward()


def test_a_backward_under_autocast_stays_in_its_own_type() -> None:
    problem = Problem.draw(length=24, size=4, hidden=(10,), dtype=torch.float32)
    inner = Inner(problem.gamma, problem.beta, 1 / torch.arange(1, 5), True, 1e-6)
    found = []
    for enabled in (True, False):
        z, _ = learn(problem.tokens, Stream(problem.weights), inner, group_size=2)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(weighed(z), [*problem.tokens, *problem.weights]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- law 2 under stress ---

Run = Callable[[Tensor], Tensor]


def _reentrant(run: Run) -> Run:
    return lambda x: checkpoint(run, x, use_reentrant=True)  # type: ignore[no-any-return]


def _non_reentrant(run: Run) -> Run:
    return lambda x: checkpoint(run, x, use_reentrant=False)  # type: ignore[no-any-return]


def _as_kyutai(run: Run) -> Run:
    return lambda x: checkpoint(run, x, use_reentrant=False, determinism_check="none", preserve_rng_state=False)  # type: ignore[no-any-return]


@functools.cache
def _gradients(kind: str, length: int, group_size: int, nesting: tuple[str, ...], autocast: bool) -> tuple[Tensor, ...]:
    layer = layer_of(layer_type=kind, dtype=torch.float32, dim=8, scan_checkpoint_group_size=group_size)
    x = tokens_of(2, length, 8, dtype=torch.float32).requires_grad_()
    around = {"reentrant": _reentrant, "non-reentrant": _non_reentrant, "kyutai": _as_kyutai}
    run: Run = lambda x: layer(x)[0]  # noqa: E731
    for name in nesting:
        # What follows a checkpoint needs its output, as a layer's feed-forward does: so it really runs again.
        run = around[name](lambda x, inner=run: inner(x).sin())  # type: ignore[misc]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = run(x)
    for _ in range(2 - len(nesting)):
        y = y.sin()
    weighed(y.float()).backward()
    return (y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters()))  # type: ignore[return-value]


def test_any_nesting_gives_the_same_gradients() -> None:
    """200 draws of nestings, groups, kinds, lengths and autocast against the plain layer that keeps everything."""
    draw = random.Random(0)
    names = ["reentrant", "non-reentrant", "kyutai"]
    for _ in range(200):
        nesting = tuple(draw.choice(names) for _ in range(2))
        kind, length, autocast = draw.choice(["linear", "mlp"]), draw.choice([8, 11, 20]), draw.random() < 0.5
        group_size = draw.choice([0, 1, 2, 3, 16])
        expected = _gradients(kind, length, 0, (), autocast)
        for a, b in zip(_gradients(kind, length, group_size, nesting, autocast), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


# --- memory ---


@contextlib.contextmanager
def storages_kept() -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd keeps, each once."""
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("group_size", [4, 16])
def test_what_is_held_between_forward_and_backward(kind: str, group_size: int) -> None:
    """`(N/g) S` and the inputs, within 10 %; nothing of what runs again."""
    heads, size, width, steps = 4, 4, 32, 128
    hidden = (4 * width,) if kind == "mlp" else ()
    problem = Problem.draw(length=steps * size, size=size, hidden=hidden, heads=heads, width=width, dtype=torch.float32)
    inner = Inner(problem.gamma, problem.beta, (1 / torch.arange(1, size + 1)), True, 1e-6)
    with storages_kept() as kept:
        z, _ = learn(problem.tokens, Stream(problem.weights), inner, group_size=group_size)
    inputs = {x.untyped_storage().data_ptr() for x in problem.leaves} & kept.keys()
    carries = sum(nbytes for pointer, nbytes in kept.items() if pointer not in inputs)
    state = sum(w.nbytes for w in problem.weights)
    given = sum(kept[pointer] for pointer in inputs)
    assert z.requires_grad
    assert carries <= steps / group_size * state
    assert carries + given == pytest.approx(steps / group_size * state + given, rel=0.1, abs=state)
    config = TTTConfig.model_validate(
        {
            "layer_type": kind,
            "mini_batch_size": size,
            "scan_checkpoint_group_size": group_size,
            "mlp_expansion_factor": 4,
        }
    )
    cost = scan_cost(config, dim=heads * width, num_heads=heads, tokens=steps * size, batch_size=2)
    assert carries == pytest.approx(cost.carries_kept_bytes, rel=0.01)


def flags_of(address: int) -> list[str]:
    """What the kernel notes of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no mapping has this address")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no large pages here")
@pytest.mark.parametrize("group_size", [0, 16])
def test_what_is_kept_is_asked_for_in_large_pages(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor of more than one: what waits for backward, and what a group keeps while backward recomputes it."""
    kept: list[Tensor] = []

    def noticed(dims: layout.Dims, steps: int, like: Tensor, *, keep: bool = True) -> layout.Kept:
        made = right(dims, steps, like, keep=keep)
        kept.extend(made.weights_MPJO if keep else [])
        return made

    right = layout.Kept.room
    monkeypatch.setattr(layout.Kept, "room", noticed)
    problem = Problem.draw(length=32, size=1, hidden=(256,), width=64, heads=4, dtype=torch.float32)
    problem.learn(monkeypatch, "fused", group_size)
    assert len(kept) == 2
    for x in kept:
        assert x.nbytes > 2 * pages.LARGE
        assert "hg" in flags_of(x.data_ptr() + x.nbytes // 2)
    assert "hg" not in flags_of(id(kept))


@pytest.mark.parametrize("group_size", [0, 2])
def test_rooms_are_freed_at_once(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the garbage collector comes: a cycle would hold a group's memory while the next layer takes its own."""
    rooms: list[weakref.ref[operator.Scratch]] = []

    def noticed(*arguments: Any) -> operator.Scratch:
        made = right(*arguments)
        rooms.append(weakref.ref(made))
        return made

    right = operator.Scratch
    monkeypatch.setattr(operator, "Scratch", noticed)
    problem = Problem.draw(length=24, size=4, hidden=(10,))
    gc.disable()
    try:
        problem.learn(monkeypatch, "fused", group_size)
        assert len(rooms) == 2
        assert not any(room() for room in rooms)
    finally:
        gc.enable()


def test_nothing_is_held_without_grad() -> None:
    layer = layer_of()
    with storages_kept() as kept, torch.no_grad():
        layer(tokens_of(2, 19, 16))
    assert not kept


class CopiesOfTheBase(TorchDispatchMode):
    """Counts products whose result is another tensor in the memory of their base: they copy it onto itself first."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "baddbmm" in func._schema.name:
            self.products += 1
            out = (kwargs or {}).get("out")
            self.copies += out is not None and out.data_ptr() == args[0].data_ptr()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("most", [1, 3])
def test_a_pass_that_keeps_nothing_updates_in_place(causal: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of one mini-batch every layer, in longer ones the first, of which no query reads the weights again."""
    drawn = Problem.draw(length=24, size=4, hidden=(10,), causal=causal)
    monkeypatch.setattr(layout.Dims, "chunk", lambda dims, device, longest, *, keep: most)
    tokens = [x.detach().unflatten(2, (-1, 4)) for x in drawn.tokens]
    shared = [x.detach() for x in (drawn.gamma, drawn.beta)]
    scale = torch.full((1, 4), 0.25, dtype=torch.float64)
    weights = [w.detach() for w in drawn.weights]
    problem = layout.Problem(*tokens, *shared, scale, scale[:, -1:], weights, [], causal, 1e-6, 0)
    room, rooms = layout.Kept.room, []
    monkeypatch.setattr(layout.Kept, "room", lambda *a, **k: rooms.append(room(*a, **k)) or rooms[-1])
    with CopiesOfTheBase() as watch:
        operator._run_forward(problem, keep=False)
    assert watch.products
    assert watch.copies == 0
    (kept,) = rooms
    assert kept.bends_MPCO == kept.query_slopes_MPCO == kept.attention_MPCC == []
    places = [len(w) for w in kept.weights_MPJO]
    assert places == ([1, 1] if most == 1 else [1, 3] if causal else [4, 4])


# --- one token at a time, in place ---


@pytest.mark.parametrize(
    "options", [{}, {"layer_type": "linear", "learnable_token_idx": True}, {"mini_batch_size": 1}], ids=str
)
def test_step_is_forward(options: dict[str, Any]) -> None:
    layer = layer_of(**options)
    x = tokens_of(3, 11, 16)
    expected, end = layer(x)
    state = layer.streaming_state(3, dtype=torch.float64)
    places = {name: tensor.data_ptr() for name, tensor in state.memory().items()}
    with torch.no_grad():
        y = torch.cat([layer.step_(token, state) for token in x.split(1, 1)], 1)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    last = end.opened().tensors()
    for name, tensor in state.tensors().items():
        torch.testing.assert_close(tensor, last[name], rtol=1e-11, atol=1e-11)
    assert {name: tensor.data_ptr() for name, tensor in state.memory().items()} == places


def test_rows_that_stand_still_do_so_bit_for_bit() -> None:
    """Also where they are fed what is not a number."""
    layer = layer_of()
    x = tokens_of(2, 9, 16)
    state = layer.streaming_state(2, dtype=torch.float64)
    outputs = []
    for t, token in enumerate(x.split(1, 1)):
        before = {name: tensor.clone() for name, tensor in state.tensors().items()}
        rows = torch.tensor([True, t % 3 != 1])
        with torch.no_grad():
            outputs.append(layer.step_(torch.where(rows[:, None, None], token, torch.nan), state, rows=rows))
        if not rows[1]:
            assert all(torch.equal(tensor[1], before[name][1]) for name, tensor in state.tensors().items())
    read = [t for t in range(9) if t % 3 != 1]
    torch.testing.assert_close(torch.cat(outputs, 1)[0], layer(x)[0][0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.cat(outputs, 1)[1, read], layer(x[:, read])[0][1], rtol=1e-11, atol=1e-11)


def test_step_refuses_what_it_would_break() -> None:
    layer = layer_of()
    x, state = tokens_of(2, 1, 16), layer.streaming_state(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"call it under torch.no_grad\(\)"):
        layer.step_(x, state)
    with torch.no_grad():
        with pytest.raises(ValueError, match="reads one token of each stream, not 3"):
            layer.step_(tokens_of(2, 3, 16), state)
        with pytest.raises(ValueError, match="no open mini-batch to write to"):
            layer.step_(x, layer.initial_state(2, dtype=torch.float64))
        with pytest.raises(ValueError, match="shares its memory"):
            layer.step_(x, layer.initial_state(2, dtype=torch.float64).opened())
        with pytest.raises(ValueError, match="shares its memory"):  # one stream's are the parameters themselves
            layer.step_(x[:1], layer.initial_state(1, dtype=torch.float64).opened())
        with pytest.raises(ValueError, match="learns from whole mini-batches"):
            layer_of(causal=False, learnable_token_idx=False, rope="none").step_(
                x, layer.initial_state(2, dtype=torch.float64)
            )


def test_decoding_allocates_nothing_that_stays() -> None:
    """2,000 tokens: of what the allocator gives out for one, all comes back."""
    layer = layer_of(dtype=torch.float32, dim=8)
    state = layer.streaming_state(2)
    token = tokens_of(2, 1, 8, dtype=torch.float32)
    held = []
    with torch.no_grad():
        for _ in range(10):
            for _ in range(199):
                layer.step_(token, state)
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                layer.step_(token, state)
            events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
            held.append(sum(event.nbytes() for event in events if event.name() == "[memory]"))
    assert held == [0] * 10


# --- the choice ---


def test_the_implementation_is_chosen_and_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(*dtypes: torch.dtype, mini_batches: int | None = 8, numbers: int = 0, device_type: str = "cpu") -> str:
        return implementation(device_type=device_type, dtypes=dtypes, mini_batches=mini_batches, numbers=numbers)

    monkeypatch.delenv("TTT_OPS", raising=False)
    assert chosen(torch.float32) == chosen(torch.float64) == "fused"
    assert chosen(torch.bfloat16) == chosen(torch.float32, torch.float64) == "generic"
    assert chosen(torch.float32, mini_batches=None, numbers=100) == "generic"
    assert chosen(torch.float32, mini_batches=None, numbers=10**6) == "fused"
    assert chosen(torch.float32, mini_batches=None, numbers=100, device_type="cuda") == "fused"
    for name in ("reference", "generic", "fused"):
        monkeypatch.setenv("TTT_OPS", name)
        assert chosen(torch.float32) == name
    with pytest.raises(ValueError, match="TTT_OPS=fused needs tokens and fast weights of one type"):
        chosen(torch.float16)
    monkeypatch.setenv("TTT_OPS", "fast")
    with pytest.raises(
        ValueError, match="TTT_OPS=fast is not an implementation; write reference, generic, fused, triton, or unset it"
    ):
        chosen(torch.float32)


# --- what is written about it ---


def test_the_table_of_symbols_names_what_the_code_has() -> None:
    rows = re.findall(r"^\| (`.+?) \| ", fused.__doc__ or "", re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {"bends", "pushes", "turned_error"} <= names
    folder = Path(fused.__file__).parent
    code = "\n".join(file.read_text(encoding="utf-8") for file in folder.glob("[a-z]*.py"))
    assert {name for name in names if not re.search(rf"\b{name}(_[A-Z][A-Z0-9]*)?\b", code)} == set()


def test_the_calls_from_a_layer_to_its_arithmetic_are_those_that_are_written_down() -> None:
    """The table of docs/ops.md, in its order, against the stack on which the arithmetic is called."""
    page = (Path(__file__).parent.parent / "docs" / "ops.md").read_text(encoding="utf-8")
    table = page.split("## From a layer to its arithmetic")[1].split("| --- | --- |")[1].split("\n\n")[0]
    firsts = [re.findall(r"`([\w.:]+)`", row.split("|")[1])[0] for row in table.strip().splitlines()]
    written = [name.split(".")[-1] for name in firsts]
    assert written[:3] == ["forward", "_read", "learn"]
    stack: list[str] = []
    chunk = operator.forward_chunk
    with pytest.MonkeyPatch.context() as patch:

        def noticed(*arguments: Any, **keywords: Any) -> Tensor:
            if not stack:
                stack.extend(frame.name for frame in traceback.extract_stack())
            return chunk(*arguments, **keywords)

        patch.setattr(operator, "forward_chunk", noticed)
        layer_of()(tokens_of(2, 16, 16))
    calls = iter(stack)
    ours = [name for name in written if name not in ("ttt::minibatches", "forward_chunk")]
    assert all(name in calls for name in ours), (ours, stack)


def test_forcing_reaches_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(), tokens_of(2, 11, 16)
    results: dict[str, tuple[Tensor, TTTState]] = {}
    for name in ("reference", "generic", "fused"):
        monkeypatch.setenv("TTT_OPS", name)
        with torch.profiler.profile() as profile, torch.no_grad():
            results[name] = layer(x)
        assert any(event.key == "ttt::minibatches" for event in profile.key_averages()) == (name == "fused")
    for name in ("reference", "generic"):
        torch.testing.assert_close(results[name][0], results["fused"][0], **EXACT)
        expected = results["fused"][1].tensors()
        for key, tensor in results[name][1].tensors().items():
            torch.testing.assert_close(tensor, expected[key], **EXACT)
