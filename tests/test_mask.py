"""A token mask: a batch with padding and holes is its sequences without them, in outputs, states and gradients."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from toy import ToyBackbone

from ttt import inject
from ttt.adapter import TTTAdapter, carried, gates_closed
from ttt.config import TTTConfig
from ttt.evidence import Observation
from ttt.inner_curves import InnerCurves
from ttt.layer import Rotary, TTTLayer
from ttt.state import TTTState
from ttt.train import compiling
from ttt.train.compiling import CompiledRead

D, H, C = 12, 3, 4
LEFT, RIGHT, HOLES, WHOLE, NONE = range(5)
B = 5
TOLERANCE = 1e-10
JUNK = (math.nan, math.inf, -math.inf, 1e30)


def make(**settings: Any) -> TTTLayer:
    layer = TTTLayer(D, H, TTTConfig.model_validate({"mini_batch_size": C, **settings}), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    layer.reset_parameters(generator)
    with torch.no_grad():
        for parameter in layer.parameters():  # every parameter acts, those that start at zero too
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def mask_of(length: int, seed: int = 0) -> Tensor:
    """Padded on the left, padded on the right, with holes, without padding, without tokens."""
    mask = torch.ones(B, length, dtype=torch.bool)
    mask[LEFT, : (length + 1) // 3] = False
    mask[RIGHT, length - (length + 2) // 3 :] = False
    mask[HOLES] = torch.rand(length, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[NONE] = False
    return mask


def tokens_of(mask: Tensor, seed: int = 2) -> Tensor:
    """Tokens `[B,T,D]` of which those that do not count hold what no sum survives."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*mask.shape, D, generator=generator, dtype=torch.float64)
    junk = torch.tensor(JUNK, dtype=torch.float64).repeat(-(-mask.numel() // len(JUNK)))[: mask.numel()]
    return torch.where(mask[..., None], x, junk.view(*mask.shape, 1))


def state_of(layer: TTTLayer, *, opened: bool, seed: int = 3) -> TTTState:
    """Streams that have read before, each standing at another place of its mini-batch if some are open."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(like: Tensor) -> Tensor:
        return 0.2 * torch.randn(like.shape, generator=generator, dtype=torch.float64)

    own = layer.initial_state(B, dtype=torch.float64).weights
    weights = tuple((w.detach() + drawn(w)).requires_grad_() for w in own)
    if not opened:
        return TTTState(weights)
    count = torch.tensor([1, 3, 2, 0, 3]) % layer.config.mini_batch_size
    read = (count > 0)[:, None, None, None]
    return TTTState(weights, tuple((drawn(w) * read).requires_grad_() for w in weights), count)


def angles_of(layer: TTTLayer, mask: Tensor) -> Tensor | None:
    """Angles `[B,1,T,F/2]` if the backbone gives them: NaN where no token counts."""
    if layer.config.rope != "backbone":
        return None
    generator = torch.Generator().manual_seed(5)
    angles = 3 * torch.rand(B, 1, mask.shape[1], layer.head_width // 2, generator=generator, dtype=torch.float64)
    return torch.where(mask[:, None, :, None], angles, math.nan)


def turned(angles: Tensor | None) -> Rotary | None:
    return None if angles is None else (angles.cos(), angles.sin())


Read = tuple[Tensor, TTTState]


def row_of(state: TTTState | None, row: int) -> TTTState | None:
    """The state of one stream."""
    tensors = None if state is None else state.tensors().items()
    return None if tensors is None else TTTState.from_tensors({name: x[row : row + 1] for name, x in tensors})


def alone(layer: TTTLayer, x: Tensor, mask: Tensor, state: TTTState | None, dtype: torch.dtype = torch.float64) -> Read:
    """Each sequence without the tokens that do not count, by itself; put together as a batch with a mask is."""
    angles, answers, states = angles_of(layer, mask), [], []
    for row, counted in enumerate(mask):
        y, after = x.new_zeros(x.shape[1:]), row_of(state, row)
        if counted.any():
            rotary = None if angles is None else turned(angles[row : row + 1, :, counted])
            read, after = layer(x[row : row + 1, counted], after, rotary=rotary)
            y = y.index_put((counted.nonzero().squeeze(1),), read[0])
        answers.append(y)
        states.append((after or layer.initial_state(1, dtype=dtype)).opened().tensors())
    together = {name: torch.cat([one[name] for one in states]) for name in states[0]}
    return torch.stack(answers), TTTState.from_tensors(together)


def results(layer: TTTLayer, mask: Tensor, state: TTTState | None, read: Callable[[Tensor], Read]) -> dict[str, Tensor]:
    """Outputs, states, and the gradient of everything for a sum that weighs every number of them differently."""
    x = tokens_of(mask).requires_grad_()
    y, after = read(x)
    found = {"y": y, **after.opened().tensors()}
    numbers = [value for value in found.values() if value.requires_grad]
    total = sum((v * torch.linspace(0.3, 1.7, v.numel(), dtype=v.dtype).view_as(v)).sum() for v in numbers)
    given = {} if state is None else {n: t for n, t in state.tensors().items() if t.requires_grad}
    leaves = {"x": x, **dict(layer.named_parameters()), **{f"{name} before": t for name, t in given.items()}}
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)  # type: ignore[arg-type]
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        found[f"d {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return {name: value.detach() for name, value in found.items()}


def masked(layer: TTTLayer, mask: Tensor, state: TTTState | None) -> dict[str, Tensor]:
    rotary = turned(angles_of(layer, mask))
    return results(layer, mask, state, lambda x: layer(x, state, rotary=rotary, mask=mask))


def by_themselves(layer: TTTLayer, mask: Tensor, state: TTTState | None) -> dict[str, Tensor]:
    return results(layer, mask, state, lambda x: alone(layer, x, mask, state))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_nothing_of_padding(found: dict[str, Tensor], mask: Tensor) -> None:
    for name in ("y", "d x"):
        assert not found[name][~mask].any()
        assert found[name][mask].any(-1).all()


MOSHI: dict[str, Any] = {
    **{"qkvo_bias": True, "normalize_qk": True, "normalize_target": True, "input_norm": "rms"},
    **{"layer_type": "mlp", "mlp_hidden_dims": [6], "learnable_token_idx": False},
}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"layer_type": "mlp", "mlp_expansion_factor": 2.0, "scan_checkpoint_group_size": 2},
    "moshi": MOSHI,
    "angles given": {"rope": "backbone", "scan_checkpoint_group_size": 1},
    "linear, not causal": {"preset": "video", "rope": "none", "scan_checkpoint_group_size": 1},
    "mlp, not causal": {"preset": "video", "layer_type": "mlp", "mlp_hidden_dims": [6]},
}
FORMS = ["fused", "generic"]


def states_of(layer: TTTLayer) -> list[TTTState | None]:
    """None, streams at a boundary, and of a causal layer streams that stand anywhere."""
    return [None, *(state_of(layer, opened=opened) for opened in (False, True)[: 1 + layer.config.causal])]


@pytest.mark.parametrize("length", [1, 3, 11, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_is_its_sequences(kind: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, mask = make(**KINDS[kind]), mask_of(length)
    for state in states_of(layer):
        monkeypatch.setenv("TTT_OPS", "generic")
        expected = by_themselves(layer, mask, state)
        for ops in [*FORMS, *(["reference"] if length == 11 and state is not None else [])]:
            monkeypatch.setenv("TTT_OPS", ops)
            found = masked(layer, mask, state)
            assert_same(found, expected)
            assert_nothing_of_padding(found, mask)


@pytest.mark.parametrize("ops", FORMS)
@pytest.mark.parametrize("size", [1, 3, 7, 50])
@pytest.mark.parametrize("causal", [True, False])
def test_of_any_mini_batch_size(causal: bool, size: int, ops: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one token, of the whole piece, longer than it."""
    monkeypatch.setenv("TTT_OPS", ops)
    offsets = {"learnable_token_idx": True} if causal else {"preset": "video", "rope": "none"}
    layer, mask = make(mini_batch_size=size, **offsets), mask_of(7)
    for state in states_of(layer):
        assert_same(masked(layer, mask, state), by_themselves(layer, mask, state))


def test_random_masks_with_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    for seed in range(16):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(B, draw.randint(2, 19), generator=generator) < draw.choice([0.15, 0.5, 0.9])
        layer = make(**{**draw.choice(list(KINDS.values())), "mini_batch_size": draw.choice([2, 3, 5])})
        state = draw.choice(states_of(layer))
        monkeypatch.setenv("TTT_OPS", draw.choice(FORMS))
        assert_same(masked(layer, mask, state), by_themselves(layer, mask, state))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_without_holes_is_none(kind: str) -> None:
    layer, mask = make(**KINDS[kind]), torch.ones(B, 11, dtype=torch.bool)
    rotary = turned(angles_of(layer, mask))
    for state in states_of(layer):
        found = masked(layer, mask, state)
        assert_same(found, results(layer, mask, state, lambda x, s=state: layer(x, s, rotary=rotary)))  # type: ignore[misc]


@pytest.mark.parametrize("pieces", [[1] * 14, [5, 1, 8], [2, 12]], ids=str)
@pytest.mark.parametrize("kind", ["linear", "moshi"])
def test_in_pieces_it_is_the_whole(kind: str, pieces: list[int]) -> None:
    layer, mask = make(**KINDS[kind]), mask_of(14)

    def in_pieces(x: Tensor, state: TTTState | None) -> Read:
        parts = []
        for piece, counted in zip(x.split(pieces, 1), mask.split(pieces, 1), strict=True):
            y, state = layer(piece, state, mask=counted)
            parts.append(y)
        assert state is not None
        return torch.cat(parts, 1), state

    for state in (None, state_of(layer, opened=True)):
        found = results(layer, mask, state, lambda x, s=state: in_pieces(x, s))  # type: ignore[misc]
        assert_same(found, masked(layer, mask, state))


@pytest.mark.parametrize("opened", [False, True])
def test_no_group_and_no_checkpoint_changes_anything(opened: bool) -> None:
    mask = mask_of(14)

    def made(group_size: int) -> tuple[TTTLayer, TTTState]:
        layer = make(layer_type="mlp", mlp_hidden_dims=[6], scan_checkpoint_group_size=group_size)
        return layer, state_of(layer, opened=opened)

    layer, state = made(0)
    expected = masked(layer, mask, state)
    for group_size in (0, 1, 3):
        layer, state = made(group_size)

        def once(x: Tensor, layer: TTTLayer = layer, state: TTTState = state) -> Read:
            return layer(x, state, mask=mask)  # type: ignore[no-any-return]

        def twice(x: Tensor, read: Callable[[Tensor], Read] = once) -> Read:
            return checkpoint(read, x, use_reentrant=False)  # type: ignore[no-any-return]

        for read in (once, twice):
            assert_same(results(layer, mask, state, read), expected)


# --- types, tokens that are not finite, streaming ---


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_tokens_and_autocast(autocast: bool) -> None:
    layer, mask = make(layer_type="mlp", mlp_hidden_dims=[6]).float(), mask_of(11)
    x = tokens_of(mask).to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, state = layer(x, mask=mask)
        expected, end = alone(layer, x, mask, None, torch.float32)
    assert y.dtype == x.dtype
    assert not y[~mask].any()
    assert (y - expected).norm() <= 0.01 * expected.norm()
    for name, tensor in state.opened().tensors().items():
        assert tensor.dtype == (torch.int64 if name == "count" else torch.float32)
        assert (tensor - end.tensors()[name]).float().norm() <= 0.02 * end.tensors()[name].float().norm()


@pytest.mark.parametrize("ops", FORMS)
def test_a_masked_token_is_not_skipped_and_a_counted_one_is(ops: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTT_OPS", ops)
    layer, mask = make(skip_nonfinite_tokens=True), mask_of(11)
    bad = torch.zeros_like(mask)
    bad[:, 6] = True  # the middle, which counts on the left and on the right

    def spoiled(x: Tensor) -> Tensor:
        return torch.where((bad & mask)[..., None], math.nan, x)

    found = results(layer, mask, None, lambda x: layer(spoiled(x), mask=mask))
    assert_same(found, results(layer, mask, None, lambda x: alone(layer, spoiled(x), mask, None)))
    assert found["skipped"].tolist() == (bad & mask).sum(1).tolist() == [1, 1, int(mask[HOLES, 6]), 1, 0]
    assert not found["y"][bad | ~mask].any()


@pytest.mark.parametrize("size", [1, C])
@pytest.mark.parametrize("kind", ["linear", "moshi"])
def test_the_rows_of_a_streamed_token_are_its_mask(kind: str, size: int) -> None:
    layer = make(**{**KINDS[kind], "mini_batch_size": size, "skip_nonfinite_tokens": True})
    mask = mask_of(9, seed=4)
    x, state = tokens_of(mask), layer.streaming_state(B, dtype=torch.float64)
    streamed: TTTState | None = None
    with torch.no_grad():
        for t in range(9):
            read = mask[:, t]
            y = layer.step_(x[:, t : t + 1], state, rows=read)
            expected, streamed = layer(x[:, t : t + 1], streamed, mask=read[:, None])
            torch.testing.assert_close(y[read], expected[read], rtol=1e-11, atol=1e-11)
            found = state.opened().tensors()
            assert_same({n: found[n] for n in streamed.opened().tensors()}, streamed.opened().tensors(), 1e-11)


@pytest.mark.parametrize("length", [1, 7])
def test_a_stream_without_tokens_keeps_its_state_whatever_it_holds(length: int) -> None:
    mask = torch.ones(B, length, dtype=torch.bool)
    mask[NONE] = False
    for kind in KINDS:
        layer = make(**KINDS[kind])
        rotary = turned(angles_of(layer, mask))
        for state in states_of(layer):
            given = layer.initial_state(B, dtype=torch.float64) if state is None else state
            gone = torch.arange(B) == NONE
            broken = {n: x.detach().clone() for n, x in given.tensors().items()}
            for name, tensor in broken.items():
                if name != "count":
                    tensor[gone] = math.inf if name.endswith("grad") else math.nan
            with torch.no_grad():
                y, after = layer(tokens_of(mask), TTTState.from_tensors(broken), rotary=rotary, mask=mask)
                expected, _ = layer(tokens_of(mask), state, rotary=rotary, mask=mask)
            torch.testing.assert_close(y, expected, rtol=0, atol=0)  # the same operations on the same numbers
            kept = after.opened().tensors()
            for name, tensor in TTTState.from_tensors(broken).opened().tensors().items():
                assert torch.equal(kept[name][gone].nan_to_num(7.0), tensor[gone].nan_to_num(7.0)), (kind, name)


# --- what reads along ---


@pytest.mark.parametrize("kind", KINDS)
def test_traces_are_those_of_the_sequences(kind: str) -> None:
    layer, mask = make(**KINDS[kind]), mask_of(11)
    x, angles = tokens_of(mask), angles_of(layer, mask)
    for state in states_of(layer):
        found = layer.trace(x, state, start=state, rotary=turned(angles), mask=mask)
        steps = layer.trace_minibatches(x, state, rotary=turned(angles), mask=mask)
        sums, counts = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        for row, counted in enumerate(mask):
            assert all(losses[row, ~counted].isnan().all() for losses in found)
            if not counted.any():
                continue
            own, before = x[row : row + 1, counted], row_of(state, row)
            rotary = None if angles is None else turned(angles[row : row + 1, :, counted])
            expected = layer.trace(own, before, start=before, rotary=rotary)
            for losses, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(losses[row, counted], wanted[0], rtol=1e-11, atol=1e-11)
            read = torch.tensor([len(part) for part in counted.nonzero().split(C)], dtype=torch.float64)
            sums[:, : len(read)] += torch.stack(layer.trace_minibatches(own, before, rotary=rotary)) * read
            counts[: len(read)] += read
        torch.testing.assert_close(torch.stack(steps), sums / counts, rtol=1e-11, atol=1e-11)
    nothing = layer.trace_minibatches(x, rotary=turned(angles), mask=torch.zeros_like(mask))
    assert all(losses.isnan().all() and losses.shape == (3,) for losses in nothing)


def injected() -> tuple[inject.Injection, TTTAdapter]:
    toy = ToyBackbone()
    model = toy.build(toy.tiny(), device="cpu", dtype=torch.float32)
    injection = inject.apply(model, toy.sites(model), TTTConfig(mini_batch_size=C, initial_gating_alpha=0.5), seed=1)
    adapter = next(iter(injection.adapters.values()))
    assert isinstance(adapter, TTTAdapter)
    return injection, adapter


def padded(adapter: TTTAdapter, length: int) -> tuple[Tensor, Tensor]:
    """Tokens for an adapter: eight in each row that count, and those that do not."""
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[0, -8:] = mask[1, ::2][:8] = True
    x = torch.randn(2, length, adapter.layer.dim, generator=torch.Generator().manual_seed(6))
    return torch.where(mask[..., None], x, math.nan), mask


def test_evidence_and_curves_are_of_the_tokens_that_count() -> None:
    injection, adapter = injected()
    x, mask = padded(adapter, 17)
    together = x[mask].view(2, 8, -1)
    measured = []
    for tokens, counted in ((x, mask), (together, None)):
        with Observation(injection) as evidence, torch.no_grad(), InnerCurves(injection) as recorder:
            adapter(tokens, mask=counted)
        measured.append((*evidence.layers().values(), *recorder.curves().values()))
    (found, curve), (expected, plain) = measured
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected), rel=1e-5)
    for losses, wanted in zip(curve, plain, strict=True):
        assert np.isnan(losses[~mask.numpy()]).all()
        np.testing.assert_allclose(losses[mask.numpy()], wanted.ravel(), rtol=1e-5)


def test_the_adapter_hands_padding_on_bit_for_bit_and_learns_nothing_of_it() -> None:
    """Not even what comes back to it: a backbone may make NaN of NaN there."""
    injection, adapter = injected()
    x, mask = padded(adapter, 17)
    x[0, 0], x[0, 1] = -0.0, 1e30
    x.requires_grad_()
    with carried(injection) as carry:
        out = adapter(x, mask=mask)
        returned = torch.where(mask[..., None], torch.linspace(0.5, 1.5, out.numel()).view_as(out), math.nan)
        found = torch.autograd.grad(out, [x, *adapter.parameters()], returned)
    assert torch.equal(out[~mask].view(torch.int32), x[~mask].view(torch.int32))
    assert torch.equal(found[0][~mask].view(torch.int32), returned[~mask].view(torch.int32))
    together = x.detach()[mask].view(2, 8, -1).requires_grad_()
    with carried(injection) as plain:
        expected = adapter(together)
        wanted = torch.autograd.grad(expected, [together, *adapter.parameters()], returned[mask].view_as(expected))
    torch.testing.assert_close(out[mask].view_as(expected), expected)
    torch.testing.assert_close(found[0][mask].view_as(together), wanted[0])
    for one, other in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    (state,), (end,) = carry.states.values(), plain.states.values()
    assert_same(state.opened().tensors(), end.opened().tensors(), 1e-6)
    with gates_closed(adapter):
        assert adapter(x, mask=mask) is x


# --- compiled, on no device, refused ---


def test_compiled_whole_it_is_the_same_in_a_version_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    layer, mask = make(rope="none"), mask_of(6)
    x, states = tokens_of(mask), [None, state_of(layer, opened=True)]
    with torch.no_grad():
        expected = [layer(x, state, mask=mask) for state in states]
        layer.compiled = CompiledRead()
        layer(torch.zeros_like(x))
        for state, (y, end) in zip(states, expected, strict=True):
            found, after = layer(x, state, mask=mask)
            assert_same({"y": found, **after.tensors()}, {"y": y, **end.tensors()})
    assert layer.compiled.versions == 3


@pytest.mark.parametrize("kind", ["linear", "mlp, not causal"])
def test_nothing_waits_for_the_device(kind: str) -> None:
    """Tensors without numbers have none to wait for."""
    layer = make(**{**KINDS[kind], "rope": "none"}).to("meta")
    mask = torch.ones(2, 6, dtype=torch.bool, device="meta")
    x, state = torch.empty(2, 6, D, dtype=torch.float64, device="meta"), None
    with torch.no_grad():
        for length in (6, 6, 1):
            y, state = layer(x[:, :length], state, mask=mask[:, :length])
            assert y.shape == (2, length, D)
        layer.trace_minibatches(x, mask=mask)
        layer.trace(x, mask=mask)


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (torch.ones(2, 5, dtype=torch.bool), r"bool \[2, 6\], true for those that count; this one is \[2, 5\]"),
        (torch.ones(6, dtype=torch.bool), r"this one is \[6\]"),
        (torch.ones(2, 1, 6, 6, dtype=torch.bool), r"this one is \[2, 1, 6, 6\]"),
        (torch.ones(2, 6, dtype=torch.int64), r"this one is torch.int64: write mask.bool\(\)"),
        (torch.zeros(2, 6), r"this one is torch.float32: write mask.bool\(\)"),
        (torch.ones(2, 6, dtype=torch.bool, device="meta"), "this one is on meta, the tokens are on cpu"),
        ([[True] * 6] * 2, "it is not a list"),
    ],
    ids=str,
)
def test_a_mask_that_does_not_fit_is_refused(mask: Any, sentence: str) -> None:
    layer = make()
    x = torch.zeros(2, 6, D, dtype=torch.float64)
    for read in (layer, layer.trace, layer.trace_minibatches):
        with pytest.raises(ValueError, match=sentence):
            read(x, mask=mask)
