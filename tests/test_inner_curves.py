"""Curves of the inner loss from real models: in forward passes, streamed in pieces, from states that are carried."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ttt import inject, inner_curves
from ttt.adapter import carried, gates_closed
from ttt.config import TTTConfig
from ttt.errors import UsageError
from ttt.inner_curves import InnerCurve, InnerCurves
from ttt.layer import TTTLayer
from ttt.plugins import get_backbone
from ttt.state import TTTState

MOSHI = get_backbone("moshi")
LENGTH, STREAMS = 191, 2
Curves = dict[str, InnerCurve]


def moshi(**settings: object) -> tuple[torch.nn.Module, inject.Injection]:
    """The smallest Moshi with TTT in two layers, whose weights and rates let something be learned."""
    model = MOSHI.build(MOSHI.tiny(), device="cpu", dtype=torch.float32)
    config = {
        **MOSHI.ttt_defaults,
        "layers": "1,2",
        "mini_batch_size": 16,
        "initial_gating_alpha": 0.3,
        "base_lr": 4.0,
        **settings,
    }
    return model, inject.apply(model, MOSHI.sites(model), TTTConfig.model_validate(config), seed=2)


def codes(model: torch.nn.Module, seed: int = 3, length: int = LENGTH) -> Tensor:
    return MOSHI.example_batch(model, batch_size=STREAMS, tokens=length, seed=seed)


def cut(piece: int, length: int) -> list[int]:
    return [min(piece, length - first) for first in range(0, length, piece)]


def recorded(injection: inject.Injection, read: Callable[[], object]) -> Curves:
    with InnerCurves(injection) as recorder, torch.no_grad():
        read()
    return recorder.curves()


def differ(one: Curves, other: Curves) -> float:
    """The largest difference of two records, as a share of the losses."""
    assert list(one) == list(other)
    return max(
        float(np.abs(a - b).max() / np.abs(b).max())
        for site in one
        for a, b in zip(one[site], other[site], strict=True)
    )


def test_streamed_in_pieces_or_read_whole_the_curves_are_the_same() -> None:
    model, injection = moshi()
    batch = codes(model)
    whole = recorded(injection, lambda: MOSHI.outputs(model, batch))
    assert list(whole) == list(injection.adapters)
    for curve in whole.values():
        assert {(x.shape, x.dtype) for x in curve} == {((STREAMS, LENGTH), np.dtype(np.float32))}
        np.testing.assert_allclose(curve.before[:, 0], curve.w0[:, 0], rtol=1e-5)
        assert np.abs(curve.before - curve.w0)[:, 16:].min() > 1e-4 * curve.w0.mean()
        assert curve.after.mean() < 0.99 * curve.before.mean()
    for piece, length in ((1, 35), (13, LENGTH), (188, LENGTH), (LENGTH, LENGTH)):
        part = batch[:, :, :length]
        found = recorded(
            injection, lambda part=part, piece=piece: MOSHI.stream(model, part, pieces=cut(piece, part.shape[2]))
        )
        here = {site: InnerCurve(*(losses[:, :length] for losses in curve)) for site, curve in whole.items()}
        assert differ(found, here) < 1e-4, piece


def _anew_each_piece(trace: Callable[..., object]) -> Callable[..., object]:
    return lambda layer, x, state=None, **options: trace(layer, x, state, **(options | {"start": state}))


SABOTEURS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "W₀ is the state of each piece": lambda patch: patch.setattr(TTTLayer, "trace", _anew_each_piece(TTTLayer.trace)),
    "W₀ is not copied": lambda patch: patch.setattr(inner_curves, "_set_back", lambda layer, start, state: start),
    "a stream set back keeps W₀": lambda patch: patch.setattr(
        inner_curves, "_is_anew", lambda _, state: torch.zeros(state.batch_size, dtype=torch.bool)
    ),
}


class Streaming:
    """Moshi's streams from states of another text, of which row 1 is set back to the layers' own weights midway."""

    at = 18

    def __init__(self) -> None:
        self.model, self.injection = moshi()
        with carried(self.injection) as carry, torch.no_grad():
            MOSHI.outputs(self.model, codes(self.model, seed=8, length=45))
        self.states, self.batch = carry.states, codes(self.model, length=26)

    def read(self, piece: int) -> None:
        with self.model.streaming(STREAMS):
            for name, adapter in self.injection.adapters.items():
                adapter._streaming_state.update(self.states[name], torch.ones(STREAMS, dtype=torch.bool))
            self._read(slice(None, self.at), piece)
            for adapter in self.injection.adapters.values():
                adapter._streaming_state.reset(torch.tensor([False, True]))
            self._read(slice(self.at, None), piece)

    def _read(self, part: slice, piece: int) -> None:
        for codes in self.batch[:, :, part].split(piece, dim=2):
            MOSHI.outputs(self.model, codes)

    def curves(self, piece: int) -> Curves:
        return recorded(self.injection, lambda: self.read(piece))


@pytest.fixture(scope="module")
def streams() -> Streaming:
    return Streaming()


@pytest.fixture(scope="module")
def right(streams: Streaming) -> Curves:
    return expected(streams)


def expected(streams: Streaming) -> Curves:
    """The same by `TTTLayer.trace` alone, of what each adapter is given in one pass over each of the two parts."""
    given: dict[str, list[tuple[Tensor, TTTState]]] = {name: [] for name in streams.injection.adapters}
    handles = [
        adapter.layer.register_forward_hook(
            lambda layer, args, _, name=name: given[name].append((args[0], _copy(args[1])))
        )
        for name, adapter in streams.injection.adapters.items()
    ]
    with torch.no_grad():
        streams.read(1000)
    for handle in handles:
        handle.remove()
    curves = {}
    for name, ((first, state), (second, later)) in given.items():
        layer = streams.injection.adapters[name].layer
        anew = layer.reset(state, torch.tensor([False, True]))
        parts = layer.trace(first, state, start=state), layer.trace(second, later, start=anew)
        curves[name] = InnerCurve(*(torch.cat(pair, dim=1).numpy() for pair in zip(*parts, strict=True)))
    return curves


def _copy(state: TTTState) -> TTTState:
    return TTTState.from_tensors({name: tensor.clone() for name, tensor in state.tensors().items()})


def test_w0_is_the_state_from_which_the_stream_started_until_it_is_set_back(streams: Streaming, right: Curves) -> None:
    for curve in right.values():
        np.testing.assert_allclose(curve.w0[:, 0], curve.before[:, 0], rtol=1e-4)
        np.testing.assert_allclose(curve.w0[1, 18], curve.before[1, 18], rtol=1e-4)
        assert np.abs(curve.w0 - curve.before)[0].max() > 2e-3 * curve.w0.mean()
    for piece in (1, 7, 1000):
        assert differ(streams.curves(piece), right) < 1e-4, piece


@pytest.mark.parametrize("name", SABOTEURS)
def test_a_wrong_w0_is_told(name: str, streams: Streaming, right: Curves, monkeypatch: pytest.MonkeyPatch) -> None:
    SABOTEURS[name](monkeypatch)
    wrong = streams.curves(1)
    assert differ(wrong, right) > 1e-2
    for site in right:
        np.testing.assert_allclose(wrong[site].before, right[site].before, rtol=1e-4)


def test_streams_that_start_from_states_have_their_weights_for_w0() -> None:
    model, injection = moshi()
    with carried(injection) as carry, torch.no_grad():
        MOSHI.outputs(model, codes(model, seed=8, length=37))
    batch = codes(model, length=40)
    with carried(injection, carry.states):
        found = recorded(injection, lambda: MOSHI.outputs(model, batch))
    fresh = recorded(injection, lambda: MOSHI.outputs(model, batch))
    for site, curve in found.items():
        np.testing.assert_allclose(curve.w0[:, 0], curve.before[:, 0], rtol=1e-4)
        assert np.abs(curve.w0 - fresh[site].w0).min() > 0


def test_a_row_that_pauses_has_no_number_and_learns_nothing() -> None:
    model, injection = moshi()
    batch, mask = codes(model, length=12), torch.tensor([True, False])

    def read() -> None:
        with model.streaming(STREAMS):
            for t in range(12):
                model.set_exec_mask(mask if 4 <= t < 7 else torch.ones_like(mask))
                MOSHI.outputs(model, batch[:, :, t : t + 1])

    for curve in recorded(injection, read).values():
        for losses in curve:
            assert np.isnan(losses).nonzero()[0].tolist() == [1, 1, 1]
            assert np.isnan(losses).nonzero()[1].tolist() == [4, 5, 6]


def test_sequences_read_whole_are_streams_of_their_own() -> None:
    model, injection = moshi()
    short, long = codes(model, length=9), codes(model, length=20)
    both = recorded(injection, lambda: [MOSHI.outputs(model, batch) for batch in (short, long)])
    for batch, rows in ((short, slice(0, STREAMS)), (long, slice(STREAMS, None))):
        alone = recorded(injection, lambda batch=batch: MOSHI.outputs(model, batch))
        length = batch.shape[2]
        for site, curve in both.items():
            assert curve.w0.shape == (2 * STREAMS, 20)
            for a, b in zip(curve, alone[site], strict=True):
                np.testing.assert_array_equal(a[rows, :length], b)
                assert np.isnan(a[rows, length:]).all()


def test_watching_changes_nothing_and_ends_with_the_context() -> None:
    model, injection = moshi()
    batch = codes(model, length=20)
    before = MOSHI.stream(model, batch, pieces=[1, 1, 18])
    recorder = InnerCurves(injection)
    with recorder:
        assert torch.equal(MOSHI.stream(model, batch, pieces=[1, 1, 18]), before)
    assert all(not adapter.layer.observers for adapter in injection.adapters.values())
    found = recorder.curves()
    MOSHI.stream(model, batch, pieces=[20])
    assert differ(recorder.curves(), found) == 0


def test_nothing_is_recorded_with_gates_closed_and_refused_with_gradients() -> None:
    model, injection = moshi()
    batch = codes(model, length=5)
    with gates_closed(model):
        assert recorded(injection, lambda: MOSHI.outputs(model, batch)) == {}
    with InnerCurves(injection) as recorder, pytest.raises(UsageError, match=r"under torch.no_grad\(\)"):
        MOSHI.outputs(model, batch)
    assert recorder.curves() == {}


def test_another_number_of_streams_asks_for_a_recorder_of_its_own() -> None:
    layer = TTTLayer(8, 2, TTTConfig(layers="all"))
    holder = type("Holder", (), {"adapters": {"here": torch.nn.ModuleList([layer])}})()
    with InnerCurves(holder) as recorder, torch.no_grad():
        _, state = layer(torch.randn(2, 3, 8))
        layer(torch.randn(2, 3, 8), state)
        with pytest.raises(UsageError, match="was given 2 streams, and then states of 3; take an InnerCurves for each"):
            layer(torch.randn(3, 3, 8), layer.initial_state(3))
    assert recorder.curves()["here"].w0.shape == (2, 6)
