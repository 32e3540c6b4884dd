"""Decoding's Triton kernels, in Triton's interpreter: against the definition, and beside the CPU's own form."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from test_decode import Case, Operations

from ttt import TTTConfig, TTTLayer, TTTState
from ttt.ops.decode import learn_one_
from ttt.ops.minibatch import Stream
from ttt.ops.triton import decode

pytestmark = pytest.mark.usefixtures("interpreted")


CASES = {
    "linear": lambda: Case(16, 1, 3, 6, rows=2).pausing(),
    "linear, anywhere": lambda: Case(16, 1, 3, 5, counts=(2, 0, 1)).pausing(),
    "linear, F 64": lambda: Case(64, 1, 2, 3, rows=1),
    "linear, 16 tokens": lambda: Case(16, 1, 16, 5, rows=1, counts=(13,)),
    "linear, more tokens than slots": lambda: Case(16, 1, 17, 4, rows=2, counts=(14, 15)),
    "MLP": lambda: Case(16, 2, 3, 6, rows=2).pausing(),
    "MLP, anywhere": lambda: Case(16, 2, 3, 5, counts=(2, 0, 1)).pausing(),
    "MLP, two tiles, F 64": lambda: Case(64, 2, 2, 3, rows=1),
    "MLP, two tiles, anywhere": lambda: Case(32, 2, 3, 4, rows=2, counts=(2, 1)),
    "MLP, more tokens than slots": lambda: Case(16, 2, 17, 4, rows=2, counts=(14, 15)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_are_the_definition(name: str) -> None:
    """Answers, states and what stands still; slots that no token has filled hold NaN."""
    case = CASES[name]()
    expected, end = case.expected()
    state = case.state.streaming(case.size)
    places = {name: x.data_ptr() for name, x in state.memory().items()}
    torch.testing.assert_close(case.read(state, wait=False), expected, rtol=1e-12, atol=1e-12)
    assert {name: x.data_ptr() for name, x in state.memory().items()} == places
    last = end.opened().tensors()
    for name, x in state.tensors().items():
        torch.testing.assert_close(x, last[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2])
def test_kernels_leave_the_memory_that_the_other_form_leaves(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So each can go on from the other, token by token, through flushes, closings and pauses."""
    case = Case(16, layers, 17, 5, rows=2, counts=(14, 13)).pausing()
    both = case.state.streaming(case.size), case.state.streaming(case.size)
    for t in range(case.length):
        token, rows = case.tokens.map(lambda x, t=t: x[:, :, t : t + 1]), case.mask[:, t]
        for state, chosen in zip(both, ("triton", ""), strict=True):
            monkeypatch.setenv("TTT_OPS", chosen)
            stream = Stream(state.weights, state.gradients, state.count)
            learn_one_(token, stream, case.inner, rows, state.factors, wait=True)
        one, other = (state.memory() for state in both)
        for name, x in one.items():
            if not name.startswith("x"):  # inputs of slots that hold no token may differ
                torch.testing.assert_close(x, other[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_base_is_read_only_where_there_is_one(layers: int) -> None:
    """Without a base its memory holds NaN, and keeps it; so do the slots after the last token."""
    case = Case(16, layers, 3, 4, rows=2)
    expected, _ = case.expected()
    state = case.state.streaming(case.size)
    assert state.gradients is not None
    assert state.factors is not None
    for x in (*state.gradients[::2], *state.factors.inputs, *state.factors.taught):
        x.fill_(torch.nan)
    answers = []
    for t in range(case.length):
        token = case.tokens.map(lambda x, t=t: x[:, :, t : t + 1])
        stream = Stream(state.weights, state.gradients, state.count)
        answers.append(learn_one_(token, stream, case.inner, None, state.factors, wait=False))
    torch.testing.assert_close(torch.cat(answers, 2), expected, rtol=1e-12, atol=1e-12)
    assert all(bool(x.isnan().all()) for x in state.gradients[::2])


@pytest.mark.parametrize(("kind", "launches"), [("mlp", 3), ("linear", 2)])
@torch.no_grad()
def test_a_layer_takes_the_kernels_in_few_launches(kind: str, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = TTTLayer(32, 2, TTTConfig(layer_type=kind, mini_batch_size=2))
    x = torch.randn(2, 3, 32)
    state, other = layer.streaming_state(2), layer.streaming_state(2)
    ran = []
    for name in ("mlp_keys", "mlp_errors", "mlp_answers", "linear_token", "linear_counts"):
        kernel = getattr(decode, name)
        run = kernel.run
        monkeypatch.setattr(kernel, "run", lambda *a, run=run, name=name, **k: (ran.append(name), run(*a, **k))[1])
    y = torch.cat([layer.step_(token, state) for token in x.split(1, 1)], 1)
    assert len(ran) == 3 * launches
    monkeypatch.setenv("TTT_OPS", "")
    expected = torch.cat([layer.step_(token, other) for token in x.split(1, 1)], 1)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
def test_beside_the_kernels_nothing_is_computed(layers: int) -> None:
    """What only the CPU's own form takes of norms and step sizes would be launches for nothing."""
    case = Case(16, layers, 3, 1, rows=2)
    state = case.state.streaming(case.size)
    stream = Stream(state.weights, state.gradients, state.count)
    with Operations() as ran:
        learn_one_(case.tokens, stream, case.inner, None, state.factors, wait=False)
    assert "aten::clone" in ran.names
    interpreters = {"aten::set_", "aten::copy_"}
    assert set(ran.names) - interpreters <= {
        "aten::cat",
        "aten::clone",
        "aten::empty",
        "aten::empty_like",
        "aten::new_empty",
    }


def test_what_the_kernels_cannot_do_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (Case(8, 2, 3, 1), Case(16, 3, 3, 1)):
        with pytest.raises(ValueError, match="TTT_OPS=triton decodes with inner models of one or two layers"):
            case.read(case.state.streaming(3), wait=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    case = Case(16, 2, 3, 1)
    with pytest.raises(ValueError, match="TTT_OPS=triton needs a GPU, not the device cpu"):
        case.read(case.state.streaming(3), wait=False)


def test_what_has_no_factors_needs_no_kernels() -> None:
    """One token a mini-batch; a state that was copied."""
    for case in (Case(16, 2, 1, 3), Case(16, 2, 3, 4, counts=(1, 2, 0))):
        expected, _ = case.expected()
        state = TTTState.from_tensors({name: x.clone() for name, x in case.state.tensors().items()})
        torch.testing.assert_close(case.read(state, wait=True), expected, rtol=1e-12, atol=1e-12)
