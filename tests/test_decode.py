"""One token at a time in place, its open mini-batch as factors: against the definition, and against `forward`."""

from __future__ import annotations

import itertools
import pickle
import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization as parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from ttt import TTTConfig, TTTLayer, TTTState, layer_sharing
from ttt.files import read_tensors
from ttt.layer_held import Held, Parts
from ttt.layer_sharing import Projection
from ttt.ops.decode import learn_one_
from ttt.ops.factors import slots_for
from ttt.ops.minibatch import Inner, Stream
from ttt.ops.reference import reference
from ttt.ops.rows import Tokens
from ttt.train.compiling import CompiledRead

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
HEADS = 2


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Case:
    """Streams of an inner model with widths `F, …, F`, and what they read."""

    width: int
    layers: int
    size: int
    length: int
    rows: int = 3
    counts: tuple[int, ...] | None = None
    """Tokens read of the open mini-batches, whose gradients are of full rank; None starts the streams fresh."""

    def __post_init__(self) -> None:
        self.mask = torch.ones(self.rows, self.length, dtype=torch.bool)
        widths = [self.width, *[2 * self.width] * (self.layers - 1), self.width]
        shapes = [(a, b) for i, o in itertools.pairwise(widths) for a, b in ((i, o), (1, o))]
        self.weights = tuple(0.3 * draw(self.rows, HEADS, *shape, seed=i) for i, shape in enumerate(shapes))
        count = torch.tensor(self.counts or [0] * self.rows)
        held = (count > 0)[:, None, None, None]
        gradients = tuple(held * 0.05 * draw(*w.shape, seed=20 + i) for i, w in enumerate(self.weights))
        self.state = TTTState(self.weights, gradients, count) if self.counts else TTTState(self.weights)
        shape = (self.rows, HEADS, self.length, self.width)
        q, k, target = (draw(*shape, seed=seed) for seed in (40, 41, 42))
        rate = 0.2 * draw(self.rows, HEADS, self.length, 1, seed=43).sigmoid() / self.width
        self.tokens = Tokens(q, k, target, rate)
        self.offset = 0.1 * draw(self.size, seed=44)
        scale = (1 / torch.arange(1, self.size + 1, dtype=torch.float64) + self.offset).clamp_min(0)
        gamma, beta = 1 + 0.1 * draw(HEADS, 1, self.width, seed=45), 0.1 * draw(HEADS, 1, self.width, seed=46)
        self.inner = Inner(gamma, beta, scale, True, 1e-6)

    def pausing(self) -> Case:
        """The same, with rows that pause: at places of their own, and where a mini-batch is full or new."""
        generator = torch.Generator().manual_seed(47)
        self.mask = torch.rand(self.rows, self.length, generator=generator) < 0.7
        self.mask[0, self.size - 1 : self.size + 2] = False
        return self

    def expected(self) -> tuple[Tensor, TTTState]:
        opened = self.state.opened()
        assert opened.count is not None
        z, weights, gradients, counts = reference(
            *self.tokens[:3], self.tokens.rate.squeeze(-1), self.weights, self.inner.gamma_H1F.squeeze(1),
            self.inner.beta_H1F.squeeze(1), mini_batch_size=self.size, causal=True, eps=1e-6, offset_C=self.offset,
            gradients=opened.gradients, count=opened.count.tolist(), mask=self.mask.tolist(),
        )  # fmt: skip
        return z, TTTState(weights, gradients, torch.tensor(counts))

    def read(self, state: TTTState, *, wait: bool) -> Tensor:
        """Read every token; rows that pause are fed NaN, and must stand still bit for bit."""
        answers = []
        for t in range(self.length):
            read = self.mask[:, t]
            before = {name: x[~read].clone() for name, x in _state_of(state).items()}
            token = self.tokens.map(
                lambda x, t=t, read=read: torch.where(read[:, None, None, None], x[:, :, t : t + 1], torch.nan)
            )
            rows = None if bool(read.all()) else read
            stream = Stream(state.weights, state.gradients, state.count)
            z = learn_one_(token, stream, self.inner, rows, state.factors, wait=wait)
            assert all(torch.equal(x[~read], before[name]) for name, x in _state_of(state).items())
            answers.append(torch.where(read[:, None, None, None], z, 0))
        return torch.cat(answers, 2)


def _state_of(state: TTTState) -> dict[str, Tensor]:
    """What a state is, whatever its slots hold beside it; and which rows have a base."""
    return state.tensors() | {name: x for name, x in state.memory().items() if name == "based"}


CASES = {
    "one token, linear": lambda: Case(8, 1, 1, 4),
    "one token, three layers": lambda: Case(8, 3, 1, 4).pausing(),
    "linear": lambda: Case(8, 1, 3, 11),
    "linear, wide": lambda: Case(128, 1, 16, 18, rows=1),
    "MLP": lambda: Case(8, 2, 3, 11).pausing(),
    "MLP, wide": lambda: Case(64, 2, 3, 5, rows=2, counts=(0, 2)),
    "MLP, 16 tokens": lambda: Case(8, 2, 16, 37, rows=2).pausing(),
    "three layers, anywhere": lambda: Case(8, 3, 3, 9, counts=(2, 0, 1)).pausing(),
    "anywhere, together": lambda: Case(8, 2, 4, 9, counts=(2, 2, 2)),
    "more tokens than slots": lambda: Case(8, 1, 37, 45, rows=2).pausing(),
    "more tokens than slots, anywhere": lambda: Case(8, 1, 37, 45, rows=2, counts=(30, 5)),
    "more tokens than slots, together": lambda: Case(8, 1, 37, 45, rows=1, counts=(5,)),
}


@pytest.mark.parametrize("wait", [True, False], ids=["places known", "places unknown"])
@pytest.mark.parametrize("name", CASES)
def test_tokens_one_by_one_are_the_definition(name: str, wait: bool) -> None:
    case = CASES[name]()
    expected, end = case.expected()
    state = case.state.streaming(case.size)
    assert case.size == 1 or (state.factors is not None and state.factors.slots == slots_for(case.size))
    places = {name: x.data_ptr() for name, x in state.memory().items()}
    torch.testing.assert_close(case.read(state, wait=wait), expected, **TOLERANCE)
    assert {name: x.data_ptr() for name, x in state.memory().items()} == places
    if state.factors is not None and case.counts is None and case.size <= state.factors.slots:
        assert not state.factors.based_B.any()
    last = end.opened().tensors()
    for name, x in state.opened().tensors().items():
        torch.testing.assert_close(x, last[name], **TOLERANCE)


@pytest.mark.parametrize("wait", [True, False])
def test_a_state_without_factors_is_summed_at_once(wait: bool) -> None:
    case = Case(8, 2, 3, 8, counts=(2, 0, 1)).pausing()
    expected, end = case.expected()
    state = TTTState.from_tensors({name: x.clone() for name, x in case.state.tensors().items()})
    torch.testing.assert_close(case.read(state, wait=wait), expected, **TOLERANCE)
    for name, x in end.tensors().items():
        torch.testing.assert_close(state.tensors()[name], x, **TOLERANCE)


@pytest.mark.parametrize("together", [True, False])
def test_what_no_row_needs_is_not_touched(together: bool) -> None:
    """Memory that holds NaN: the base, and on the way to the first mini-batch's end the slots after the last token."""
    case = Case(8, 2, 4, 9)
    if not together:
        case.pausing()
    expected, _ = case.expected()
    state = case.state.streaming(case.size)
    assert state.gradients is not None
    assert state.factors is not None
    for base in state.gradients[::2]:
        base.fill_(torch.nan)
    if together:
        for slots in (*state.factors.inputs, *state.factors.taught):
            slots.fill_(torch.nan)
    answers = []
    for t in range(case.length):
        stream = Stream(state.weights, state.gradients, state.count)
        rows = None if together else case.mask[:, t]
        token = case.tokens.map(lambda x, t=t: x[:, :, t : t + 1])
        answers.append(learn_one_(token, stream, case.inner, rows, state.factors, wait=True))
    z = torch.where(case.mask[:, None, :, None], torch.cat(answers, 2), 0)
    torch.testing.assert_close(z, expected, **TOLERANCE)
    assert all(bool(base.isnan().all()) for base in state.gradients[::2])


@pytest.mark.parametrize(("size", "slots"), [(2, 2), (16, 16), (17, 16), (64, 16)])
def test_factors_hold_a_mini_batch_or_16_tokens(size: int, slots: int) -> None:
    state = TTTState((torch.zeros(2, 3, 8, 6), torch.zeros(2, 3, 1, 6))).streaming(size)
    assert state.factors is not None
    assert [x.shape for x in (*state.factors.inputs, *state.factors.taught)] == [(2, 3, slots, 8), (2, 3, slots, 6)]


# --- in a layer ---


def layer_of(dim: int = 16, **options: Any) -> TTTLayer:
    torch.manual_seed(0)
    settings = {"layer_type": "mlp", "mini_batch_size": 4, "base_lr": 1.0} | options
    layer = TTTLayer(dim, 2, TTTConfig(**settings), dtype=torch.float64)
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.add_(draw(*parameter.shape, seed=index), alpha=0.2)
    return layer


def same(found: TTTState, expected: TTTState, tolerance: float = 1e-12) -> None:
    wanted = expected.opened().tensors()
    for name, x in found.opened().tensors().items():
        torch.testing.assert_close(x, wanted[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"layer_type": "linear", "mini_batch_size": 20}, {"mini_batch_size": 1}])
@torch.no_grad()
def test_pieces_of_any_length_in_turn_with_steps_are_the_whole(options: dict[str, Any]) -> None:
    """`forward` reads a streaming state, and a streaming state takes what `forward` leaves, anywhere."""
    layer, x = layer_of(**options), draw(2, 31, 16, seed=50)
    expected, end = layer(x)
    state, parts, start = layer.streaming_state(2, dtype=torch.float64), [], 0
    places = {name: tensor.data_ptr() for name, tensor in state.memory().items()}
    for piece in (1, 1, 2, 1, 1, 3, 1, 5, 1, 1, 1, 1, 1, 1, 9, 1):
        tokens = x[:, start : start + piece]
        if piece == 1:
            y = layer.step_(tokens, state)
        else:
            y, after = layer(tokens, state)
            state.take_(after)
        parts.append(y)
        start += piece
    assert start == 31
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-11, atol=1e-11)
    same(state, end, 1e-11)
    assert {name: tensor.data_ptr() for name, tensor in state.memory().items()} == places


@torch.no_grad()
def test_a_stream_goes_on_from_a_file_in_another_process(tmp_path: Path) -> None:
    """The file has the names and values that a state without factors has, and is written again bit for bit."""
    layer, x = layer_of(), draw(2, 13, 16, seed=51)
    expected, end = layer(x)
    state = layer.streaming_state(2, dtype=torch.float64)
    for t in range(6):
        layer.step_(x[:, t : t + 1], state)
    state.save(tmp_path / "one")
    _, plain = layer(x[:, :6])
    plain.save(tmp_path / "plain")
    one, other = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "plain")
    assert list(one) == list(other)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-12, atol=1e-12)
    for file in ("one", "plain"):
        loaded = TTTState.load(tmp_path / file)
        goes_on = loaded.streaming(4)
        goes_on.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / file).read_bytes()
        y = torch.cat([layer.step_(x[:, t : t + 1], goes_on) for t in range(6, 13)], 1)
        torch.testing.assert_close(y, expected[:, 6:], rtol=1e-11, atol=1e-11)
        same(goes_on, end, 1e-11)


@torch.no_grad()
def test_a_streaming_state_serves_as_any_other() -> None:
    layer, x = layer_of(skip_nonfinite_tokens=True), draw(3, 7, 16, seed=52)
    _, plain = layer(x[:, :6])
    state = layer.streaming_state(3, dtype=torch.float64)
    for t in range(6):
        layer.step_(x[:, t : t + 1], state)
    assert state.factors is not None
    rows, fresh = torch.tensor([True, False, True]), layer.initial_state(3, dtype=torch.float64)
    for function in (
        TTTState.detach, TTTState.opened, lambda s: s.to("cpu"), lambda s: s.where(rows, fresh),
        lambda s: fresh.where(rows, s), lambda s: layer.reset(s, rows), lambda s: layer(x[:, 6:], s)[1],
        lambda s: s.streaming(4), lambda s: replace(s, skipped=None).counting(), TTTState.counting,
    ):  # fmt: skip
        same(function(state), function(plain))
    for found, expected in zip(layer.effective_weights(state), layer.effective_weights(plain), strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)
    copy = state.streaming(4)
    mine = {tensor.data_ptr() for tensor in state.memory().values()}
    assert not mine & {tensor.data_ptr() for tensor in copy.memory().values()}


@pytest.mark.parametrize("wait", [True, False])
@torch.no_grad()
def test_rows_that_are_taken_forget_and_the_rest_stays(wait: bool) -> None:
    """A row that has read NaN is set back, and reads on as a new stream; the row beside it does not notice."""
    case = Case(8, 2, 4, 11, rows=2)
    state, beside = case.state.streaming(4), case.state.streaming(4)
    for t in range(6):
        token = case.tokens.map(lambda x, t=t: x[:, :, t : t + 1])
        bad = token._replace(k=torch.where(torch.tensor([[[[t == 5]]], [[[False]]]]), torch.nan, token.k))
        for one, given in ((state, bad), (beside, token)):
            learn_one_(given, Stream(one.weights, one.gradients, one.count), case.inner, None, one.factors, wait=wait)
    assert not state.tensors()["W1_grad"][0].isfinite().any()
    assert all(bool(w.isfinite().all()) for w in state.weights), "the mini-batch of the NaN has not closed"
    before = {name: x[1].clone() for name, x in state.memory().items()}
    state.take_(case.state, torch.tensor([True, False]))
    assert all(torch.equal(x[1], before[name]) for name, x in state.memory().items())
    assert all(bool(x.isfinite().all()) for x in state.memory().values())
    fresh, answers = case.state.streaming(4), []
    for t in range(11):
        token = case.tokens.map(lambda x, t=t: x[:, :, t : t + 1])
        answers.append(
            [
                learn_one_(
                    token, Stream(one.weights, one.gradients, one.count), case.inner, None, one.factors, wait=wait
                )
                for one in (state, fresh, beside)
            ]
        )
    found, anew, on = (torch.cat(parts, 2) for parts in zip(*answers, strict=True))
    torch.testing.assert_close(found[0], anew[0], **TOLERANCE)
    torch.testing.assert_close(found[1], on[1], **TOLERANCE)


@torch.no_grad()
def test_products_are_exact_whatever_pytorch_is_set_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 they would be a thousandth off."""
    case = Case(64, 1, 4, 3, rows=1)
    wide = case.read(case.state.streaming(4), wait=True)
    narrow = TTTState(tuple(w.float() for w in case.weights)).streaming(4)
    case.tokens, case.inner = (
        case.tokens.map(Tensor.float),
        Inner(*(x.float() for x in case.inner.learned), True, 1e-6, "bf16"),
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = case.read(narrow, wait=True)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(found.double(), wide, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_is_derived_of_a_streaming_state_stands_still() -> None:
    """Its sums are new tensors, so the rest must be too: a step would change a half of them."""
    layer, x = layer_of(), draw(2, 9, 16, seed=53)
    state = layer.streaming_state(2, dtype=torch.float64)
    for t in range(6):
        layer.step_(x[:, t : t + 1], state)
    end = layer(x[:, 6:8], state)[1]  # two tokens of four: it still has the weights that opened the mini-batch
    derived = [state.detach(), state.to("cpu"), state.opened(), end]
    before = [{name: tensor.clone() for name, tensor in one.tensors().items()} for one in derived]
    for t in range(6, 9):
        layer.step_(x[:, t : t + 1], state)
    for one, then in zip(derived, before, strict=True):
        assert all(torch.equal(tensor, then[name]) for name, tensor in one.tensors().items())


@torch.no_grad()
def test_a_step_writes_to_no_copy_of_its_state() -> None:
    """Heads before rows: as one dimension they are a copy, and what is written to it would be lost."""
    layer, x = layer_of(), draw(2, 7, 16, seed=54)
    _, state = layer(x[:, :6])
    own = {name: tensor.clone() for name, tensor in state.tensors().items()}
    turned = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in own.items() if name.endswith("_grad")}
    with pytest.raises(ValueError, match="take one from streaming_state"):
        layer.step_(x[:, 6:], TTTState.from_tensors({**own, **turned}))
    layer.step_(x[:, 6:], TTTState.from_tensors(own))


@pytest.mark.parametrize(("size", "kept"), [(20, True), (20, False), (8, True), (8, False)])
@pytest.mark.parametrize("wait", [True, False])
@torch.no_grad()
def test_a_nan_stays_out_of_the_weights_until_its_minibatch_closes(size: int, kept: bool, wait: bool) -> None:
    case = Case(8, 2, size, size, rows=1)
    state = case.state.streaming(size)
    factors = state.factors if kept else None
    for t in range(size):
        token = case.tokens.map(lambda x, t=t: x[:, :, t : t + 1])
        bad = token._replace(k=token.k * torch.nan) if t == 3 else token
        learn_one_(bad, Stream(state.weights, state.gradients, state.count), case.inner, None, factors, wait=wait)
        assert all(bool(w.isfinite().all()) for w in state.weights) is (t < size - 1)


@torch.no_grad()
def test_a_compiled_layer_reads_on_from_a_streaming_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt.train.compiling.BACKEND", "eager")
    layer, x = layer_of(), draw(2, 9, 16, seed=55)
    expected = layer(x)[0]
    state = layer.streaming_state(2, dtype=torch.float64)
    layer.step_(x[:, :1], state)
    layer.compiled = CompiledRead()
    torch.testing.assert_close(layer(x[:, 1:], state)[0], expected[:, 1:], **TOLERANCE)


OPTIONS = {
    "as published": {},
    "no turns, no offsets, biases": {"rope": "none", "learnable_token_idx": False, "qkvo_bias": True},
    "as videos": {"preset": "video", "causal": True},
    "all norms": {"input_norm": "rms", "normalize_qk": True, "normalize_target": True, "rope": "backbone"},
    "one token": {"mini_batch_size": 1, "normalize_qk": True},
    "linear, what is not finite skipped": {"layer_type": "linear", "skip_nonfinite_tokens": True},
}


@pytest.mark.parametrize("is_held", [False, True], ids=["", "held"])
@pytest.mark.parametrize(
    ("options", "by_head"), [(options, False) for options in OPTIONS.values()] + [(OPTIONS["all norms"], True)]
)
@torch.no_grad()
def test_one_token_is_read_as_a_sequence_is(options: dict[str, Any], by_head: bool, is_held: bool) -> None:
    """Whatever the layer makes of its tokens: in rows at one place, and at places of their own."""
    layer, x = layer_of(32, **options), draw(3, 11, 32, seed=56)
    if is_held:
        layer.hold_for_inference(torch.float64)
    angles = draw(*((3, 2, 11, 8) if by_head else (11, 8)), seed=57)
    rotary = (angles.cos(), angles.sin()) if layer.config.rope == "backbone" else None

    def at(t: int) -> tuple[Tensor, Tensor] | None:
        return None if rotary is None else (rotary[0][..., t : t + 1, :], rotary[1][..., t : t + 1, :])

    expected, end = layer(x, rotary=rotary)
    state = layer.streaming_state(3, dtype=torch.float64)
    y = torch.cat([layer.step_(x[:, t : t + 1], state, rotary=at(t)) for t in range(11)], 1)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    same(state, end, 1e-11)
    for t in range(6):  # the second row stands still, and is elsewhere in its mini-batch then
        rows = torch.tensor([True, t % 2 == 0, True])
        before = state.streaming(layer.config.mini_batch_size)
        y = layer.step_(x[:, t : t + 1], state, rows=rows, rotary=at(t))
        expected, end = layer(x[:, t : t + 1], before, rotary=at(t), mask=rows[:, None])
        torch.testing.assert_close(torch.where(rows[:, None, None], y, 0), expected, rtol=1e-11, atol=1e-11)
        same(state, end, 1e-11)


class Operations(TorchDispatchMode):
    """The names of the operations that run, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "widths", "threads", "pieces"),
    [
        (1, (512, 640), 2, True),
        (1, (512, 640), 6, True),
        (1, (512, 640), 1, False),
        (2, (512, 640), 5, True),
        (2, (512, 640), 6, False),
        (2, (512, 640), 1, True),
        (32, (512, 640), 1, True),
        (33, (512, 640), 1, False),
        (5, (512, 500), 1, False),
        (5, (512, 384), 1, False),
        (5, (2048, 128), 1, True),
    ],
)
def test_a_projection_of_few_rows_is_the_linear_layer(
    rows: int, widths: tuple[int, int], threads: int, pieces: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever product takes them; each output and every gradient."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    projection = Projection(*widths, bias=bias)
    x = draw(rows, widths[0], seed=58).float().requires_grad_()
    with Operations() as ran:
        y = projection(x)
    assert ("aten::bmm" in ran.names) is (pieces and torch.backends.mkl.is_available())
    assert y.shape == (rows, widths[1])
    assert y.is_contiguous()
    leaves = [x, *projection.parameters()]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = nn.functional.linear(*exact)
    weight = draw(*y.shape, seed=59)
    found = [y, *torch.autograd.grad(y, leaves, weight.float())]
    for result, true in zip(found, [expected, *torch.autograd.grad(expected, exact, weight)], strict=True):
        assert (result - true).abs().max() <= 2e-6 * true.abs().max()


# --- held for inference ---


def steps(layer: TTTLayer, x: Tensor) -> Tensor:
    """The answers to tokens of fresh streams, one by one."""
    state = layer.streaming_state(x.shape[0], dtype=x.dtype)
    return torch.cat([layer.step_(token, state) for token in x.split(1, 1)], 1)


def holding(**options: Any) -> TTTLayer:
    """A layer held for inference that has read a token."""
    layer = layer_of(qkvo_bias=True, **options)
    layer.hold_for_inference(torch.float64)
    steps(layer, draw(2, 1, 16, seed=60))
    assert parts(layer) is not None
    return layer


def parts(layer: TTTLayer, batch: int = 2) -> Parts | None:
    assert layer.held is not None
    return layer.held.parts(layer, torch.float64, batch)


def bytes_of(layer: TTTLayer) -> int:
    """What the weights of queries, keys and values take in memory, each and as one."""
    held = parts(layer)
    assert held is not None
    assert held.read is not None
    weights = (layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight, held.read.weight)
    return sum({s.data_ptr(): s.nbytes() for s in (weight.untyped_storage() for weight in weights)}.values())


@pytest.mark.parametrize("pieces", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 5])
@torch.no_grad()
def test_a_held_layer_answers_any_number_of_streams(
    batch: int, bias: bool, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with its projections in pieces; and so does one that is not held."""
    layer, x = layer_of(qkvo_bias=bias).float(), draw(batch, 9, 16, seed=61).float()
    expected = layer(x)[0]
    if pieces:
        monkeypatch.setattr(layer_sharing, "_LARGE", 1)
        monkeypatch.setattr(layer_sharing, "_PIECE", 8)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    torch.testing.assert_close(steps(layer, x), expected, rtol=1e-5, atol=1e-5)
    layer.hold_for_inference(torch.float32)
    assert torch.equal(layer(x)[0], expected)
    for _ in range(2):
        torch.testing.assert_close(steps(layer, x), expected, rtol=1e-5, atol=1e-5)
        x, expected = x[:1], expected[:1]


@torch.no_grad()
def test_a_held_layer_has_one_copy_of_its_projections() -> None:
    layer = holding()
    whole, first = 3 * 16 * 16 * 8, parts(layer)
    assert bytes_of(layer) == whole
    assert parts(layer) is first
    copy = deepcopy(layer)
    assert vars(copy.held) == vars(Held(torch.float64)), "a copy of what is held would be of no use"
    steps(copy, draw(2, 1, 16, seed=60))
    assert bytes_of(copy) == whole
    assert copy.q_proj.weight.data_ptr() != layer.q_proj.weight.data_ptr()


class Raised(nn.Module):
    """Computes a parameter from another one."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


NAMES = [name for name, _ in layer_of(qkvo_bias=True).named_parameters()]
OTHERS = {
    **{f"{name} written to": lambda layer, name=name: layer.get_parameter(name).add_(0.3) for name in NAMES},
    "a weight replaced": lambda layer: setattr(layer.v_proj, "weight", nn.Parameter(layer.v_proj.weight + 0.3)),
    "a norm moved": lambda layer: setattr(layer.ttt_norm_weight, "data", layer.ttt_norm_weight + 0.3),
    "the last norm's weight replaced": lambda layer: setattr(
        layer.post_norm, "weight", nn.Parameter(layer.post_norm.weight + 0.3)
    ),
    "values loaded": lambda layer: layer.load_state_dict({k: x + 0.1 for k, x in layer.state_dict().items()}),
    "another type and back": lambda layer: layer.float().double(),
    "a parameter that is computed": lambda layer: parametrize(layer, "ttt_norm_weight", Raised()),
    "the last norm's weight computed": lambda layer: parametrize(layer.post_norm, "weight", Raised()),
    "a step size computed": lambda layer: parametrize(layer, "learnable_token_idx", Raised()),
    "a hook": lambda layer: layer.k_proj.register_forward_hook(lambda _module, _x, y: 2 * y),
    "a projection replaced": lambda layer: setattr(layer, "q_proj", nn.Linear(16, 16, dtype=torch.float64)),
}


@pytest.mark.parametrize("other", OTHERS)
@torch.no_grad()
def test_what_a_layer_holds_is_never_out_of_date(other: str) -> None:
    layer, x = holding(), draw(2, 9, 16, seed=62)
    before = steps(layer, x)
    copy = deepcopy(layer)
    OTHERS[other](layer)
    y = steps(layer, x)
    assert not torch.equal(y, before)
    for module in layer.modules():
        if isinstance(module, Raised):
            module.by.add_(0.2)
            y, raised = steps(layer, x), y
            assert not torch.equal(y, raised)
    torch.testing.assert_close(y, layer(x)[0], rtol=1e-11, atol=1e-11)
    assert torch.equal(steps(copy, x), before)


NAMES_HELD = [name for name in NAMES if not name.startswith(("W", "b"))]


@pytest.mark.parametrize("name", NAMES_HELD)
@torch.no_grad()
def test_a_parameter_that_is_moved_twice_may_lie_where_it_lay(name: str) -> None:
    """New memory may be what another tensor has just left: then neither address nor count of writes tells."""
    layer, x = holding(), draw(2, 9, 16, seed=69)
    for _ in range(20):
        first = steps(layer, x)
        for _ in range(2):
            layer.get_parameter(name).data = layer.get_parameter(name) + 0.05
        assert not torch.equal(steps(layer, x), first)
    torch.testing.assert_close(steps(layer, x), layer(x)[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reads", [torch.float64, torch.float32])
@torch.no_grad()
def test_a_held_layer_of_another_type_keeps_nothing(reads: torch.dtype) -> None:
    layer = holding()
    layer.float()
    assert layer.held is not None
    assert layer.held.parts(layer, reads, 2) is None
    own = {x.untyped_storage().data_ptr() for x in layer.parameters()}
    kept = [x for value in vars(layer.held).values() if isinstance(value, list) for x in value if isinstance(x, Tensor)]
    assert {x.untyped_storage().data_ptr() for x in kept} <= own


@torch.no_grad()
def test_a_held_layer_of_another_type_is_read_as_one_that_is_not_held() -> None:
    layer, x = holding(), draw(2, 9, 16, seed=63)
    expected = layer(x)[0].float()
    torch.testing.assert_close(steps(layer, x.float()), expected, rtol=1e-4, atol=1e-4)
    layer.float()
    torch.testing.assert_close(steps(layer, x.float()), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(steps(layer, x), layer(x)[0], rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_a_layer_with_a_projection_of_another_program_is_held_without_it() -> None:
    layer, x = layer_of(), draw(2, 9, 16, seed=68)
    layer.v_proj = nn.Linear(16, 16, dtype=torch.float64)
    layer.hold_for_inference(torch.float64)
    assert parts(layer) is None
    torch.testing.assert_close(steps(layer, x), layer(x)[0], rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_parameters_made_in_inference_mode_are_held_too() -> None:
    """A tensor of that mode does not tell that it was written to, so nothing is kept of it."""
    with torch.inference_mode():
        layer = layer_of()
        layer.hold_for_inference(torch.float64)
        x = draw(2, 9, 16, seed=67)
        for _ in range(2):
            torch.testing.assert_close(steps(layer, x), layer(x)[0], rtol=1e-11, atol=1e-11)
            layer.ttt_norm_bias.add_(0.3)


# --- states that have been checked ---


def read_once(**options: Any) -> tuple[TTTLayer, TTTState, Tensor]:
    """A layer, a state that it has read a token into, and a token."""
    layer, x = layer_of(**options), draw(2, 2, 16, seed=64)
    state = layer.streaming_state(2, dtype=torch.float64)
    layer.step_(x[:, :1], state)
    return layer, state, x[:, 1:]


@torch.no_grad()
def test_a_state_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(), draw(2, 9, 16, seed=65)
    checked: list[TTTState] = []
    monkeypatch.setattr("ttt.layer.check_step", lambda state, *_: checked.append(state))
    states = [layer.streaming_state(2, dtype=torch.float64) for _ in range(2)]
    answers = [[layer.step_(token, state) for state in states] for token in x.split(1, 1)]
    assert checked == states
    expected = layer(x)[0]
    for found in zip(*answers, strict=True):
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-11, atol=1e-11)


def narrower(state: TTTState) -> None:
    state.weights[0].resize_(2, 2, 16, 16)


def turned(state: TTTState) -> None:
    state.weights[0].transpose_(0, 1)


def with_a_dimension(state: TTTState) -> None:
    state.weights[0].unsqueeze_(0)


@pytest.mark.parametrize("change", [narrower, turned, with_a_dimension])
@torch.no_grad()
def test_a_state_that_was_reshaped_is_refused(change: Callable[[TTTState], None]) -> None:
    layer, state, x = read_once()
    change(state)
    with pytest.raises(ValueError, match="the state"):
        layer.step_(x, state)


@torch.no_grad()
def test_a_state_that_came_to_share_memory_is_refused() -> None:
    layer, state, x = read_once()
    layer.W2.data = state.weights[2][0]
    with pytest.raises(ValueError, match="the state shares its memory"):
        layer.step_(x, state)
    layer, state, x = read_once()
    state.weights[1].data = layer.b1.expand(2, *layer.b1.shape)
    with pytest.raises(ValueError, match="the state shares its memory"):
        layer.step_(x, state)


@pytest.mark.parametrize("name", ["weights", "gradients", "factors", "count"])
@torch.no_grad()
def test_what_is_put_into_a_state_is_read(name: str) -> None:
    """By another way than a state allows; the tensors that it had stay as they were."""
    layer, state, x = read_once()
    other = layer.streaming_state(2, dtype=torch.float64)
    for _ in range(3):
        layer.step_(2 * x, other)
    before = [tensor.clone() for tensor in state.written()]
    had, expected = state.written(), deepcopy(replace(state, **{name: getattr(other, name)}))
    object.__setattr__(state, name, getattr(other, name))
    torch.testing.assert_close(layer.step_(x, state), layer.step_(x, expected), **TOLERANCE)
    now = {id(tensor) for tensor in state.written()}
    assert all(torch.equal(a, b) for a, b in zip(had, before, strict=True) if id(a) not in now)


@torch.no_grad()
def test_a_tensor_of_a_state_that_was_moved_is_read() -> None:
    layer, state, x = read_once()
    expected = state.streaming(4)
    expected.weights[0].mul_(2)
    state.weights[0].data = 2 * state.weights[0]
    torch.testing.assert_close(layer.step_(x, state), layer.step_(x, expected), **TOLERANCE)


@torch.no_grad()
def test_what_does_not_fit_a_checked_state_is_refused() -> None:
    layer, state, x = read_once()
    with pytest.raises(ValueError, match="the state is of 2 streams, the tokens of 1"):
        layer.step_(x[:1], state)
    with pytest.raises(ValueError, match=r"need torch\.float32"):
        layer.step_(x.float(), state)
    with pytest.raises(ValueError, match="not 2; forward reads more"):
        layer.step_(torch.cat((x, x), 1), state)
    with pytest.raises(ValueError, match="rotary angles were given"):
        layer.step_(x, state, rotary=(x, x))
    assert state.count is not None
    state.count.fill_(4)
    with pytest.raises(ValueError, match="has read 4 tokens of its open mini-batch"):
        layer.step_(x, state)
    with pytest.raises(ValueError, match="the state is of another layer"):
        layer_of(layer_type="linear").step_(x, state)


@torch.no_grad()
def test_a_layer_keeps_no_state_and_copies_without_any() -> None:
    layer, state, x = read_once()
    kept = weakref.ref(state.weights[0])
    copy, other = pickle.loads(pickle.dumps(layer)), state.streaming(4)
    torch.testing.assert_close(copy.step_(x, other), layer.step_(x, state), **TOLERANCE)
    del state
    assert kept() is None


def test_answers_are_tensors_like_others_in_every_mode() -> None:
    layer, x = layer_of(), draw(2, 9, 16, seed=66)
    expected = layer(x)[0]
    state = layer.streaming_state(2, dtype=torch.float64)
    answers = []
    for t, token in enumerate(x.split(1, 1)):
        with torch.inference_mode() if t % 2 else torch.no_grad():
            answers.append(layer.step_(token, state).clone())
        assert answers[-1].is_inference() == bool(t % 2)
    torch.testing.assert_close(torch.cat([y.clone() for y in answers], 1), expected, rtol=1e-11, atol=1e-11)
