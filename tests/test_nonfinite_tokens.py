"""`ttt.skip_nonfinite_tokens`: a token that is not finite stays out of the fast weights, and is counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ttt.adapter import TTTAdapter
from ttt.adapter_file import load_adapter, save_adapter
from ttt.config import TTTConfig
from ttt.layer import TTTLayer
from ttt.ops import minibatch
from ttt.state import TTTState

B, T, D, H, C = 3, 11, 12, 3, 4
BAD = ((0, 2), (0, 3), (2, 0), (2, 7), (2, 10))
"""Row and token: inside a mini-batch, at its end, at the start and at the end of all."""


def make(**settings: Any) -> TTTLayer:
    config = {"mini_batch_size": C, "qkvo_bias": True, "normalize_target": True, "skip_nonfinite_tokens": True}
    layer = TTTLayer(D, H, TTTConfig.model_validate({**config, **settings}), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def tokens() -> tuple[Tensor, Tensor]:
    """Tokens of which some are not finite, and which."""
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    bad = torch.zeros(B, T, dtype=torch.bool)
    for number, (row, token) in enumerate(BAD):
        x[row, token, slice(None) if number % 2 else 5] = (math.nan, math.inf, -math.inf)[number % 3]
        bad[row, token] = True
    return x, bad


def by_definition(layer: TTTLayer, x: Tensor, bad: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, TTTState]:
    """The definition token by token, the rate of those tokens at zero; theirs are zeros, and their answers too."""
    plain = TTTLayer(D, H, layer.config.model_copy(update={"skip_nonfinite_tokens": False}), dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    made = plain._tokens

    def without_rate(*args: Any) -> minibatch.Tokens:
        found = made(*args)
        return found._replace(rate=found.rate * (~bad)[:, None, :, None])

    with monkeypatch.context() as patch:
        patch.setattr(plain, "_tokens", without_rate)
        patch.setenv("TTT_OPS", "reference")
        y, state = plain(torch.where(bad[..., None], 0, x))
    return y * ~bad[..., None], state


KINDS: list[dict[str, Any]] = [
    {},
    {"layer_type": "mlp"},
    {"causal": False, "rope": "none", "learnable_token_idx": False},
    {"input_norm": "rms", "normalize_qk": True, "mini_batch_size": 1},
]


@pytest.mark.parametrize("ops", ["fused", "generic"])
@pytest.mark.parametrize("settings", KINDS)
def test_it_teaches_nothing_and_all_else_is_by_the_definition(
    settings: dict[str, Any], ops: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make(**settings)
    x, bad = tokens()
    expected, end = by_definition(layer, x, bad, monkeypatch)
    monkeypatch.setenv("TTT_OPS", ops)
    y, state = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
    wanted = end.opened().tensors()
    for name, tensor in state.opened().tensors().items():
        if name != "skipped":
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-9, atol=1e-11)
    assert state.skipped is not None
    assert state.skipped.tolist() == [2, 0, 3]


@pytest.mark.parametrize("ops", ["fused", "generic"])
def test_nothing_of_it_comes_back_in_gradients(ops: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands in its place, and none reaches it."""
    monkeypatch.setenv("TTT_OPS", ops)
    layer = make(layer_type="mlp", input_norm="rms", normalize_qk=True, mini_batch_size=2, scan_checkpoint_group_size=2)
    x, bad = tokens()
    found = []
    for value in (math.nan, math.inf):
        changed = torch.where(bad[..., None], value, x).requires_grad_()
        y, state = layer(changed)
        outputs = [y, *state.opened().weights, *(state.opened().gradients or ())]
        total = torch.stack([(out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).sum() for out in outputs]).sum()
        found.append(torch.autograd.grad(total, [changed, *layer.parameters()]))
        assert all(gradient.isfinite().all() for gradient in found[-1])
        assert not found[-1][0][bad].any()
        assert found[-1][0][~bad].any(-1).all()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)  # the same operations on the same numbers


@pytest.mark.parametrize("pieces", [[1] * T, [3, 1, 7], [5, 6]])
def test_in_pieces_it_is_kept_out_as_in_the_whole(pieces: list[int]) -> None:
    layer = make(layer_type="mlp")
    x, _ = tokens()
    whole, end = layer(x)
    parts, state = [], None
    for piece in x.split(pieces, 1):
        y, state = layer(piece, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-11, atol=1e-11)
    assert state is not None
    wanted = end.opened().tensors()
    for name, tensor in state.opened().tensors().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [1, C])
def test_streamed_in_place_it_is_kept_out_and_counted_where_rows_read(size: int) -> None:
    layer = make(mini_batch_size=size)
    x, bad = tokens()
    state = layer.streaming_state(B, dtype=torch.float64)
    places = {name: tensor.data_ptr() for name, tensor in state.memory().items()}
    rows = torch.tensor([True, True, False])
    with torch.no_grad():
        paused = layer.step_(x[:, :1], state, rows=rows)
        assert paused[:2].isfinite().all()
        assert state.skipped is not None
        assert state.skipped.tolist() == [0, 0, 0], "row 2 has not read its NaN"
        steps = [layer.step_(token, state) for token in x[:, 1:].split(1, 1)]
    straight, end = layer(x[:2])
    torch.testing.assert_close(torch.cat([paused, *steps], 1)[:2], straight, rtol=1e-11, atol=1e-11)
    assert end.skipped is not None
    assert state.skipped.tolist() == [*end.skipped.tolist(), int(bad[2, 1:].sum())]
    assert {name: tensor.data_ptr() for name, tensor in state.memory().items()} == places
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="no count of skipped tokens to write to"),
    ):
        layer.step_(x[:, :1], TTTState(state.weights, state.gradients, state.count))


def test_rows_start_over_alone_and_a_saved_state_goes_on(tmp_path: Any) -> None:
    layer = make()
    x, _ = tokens()
    _, state = layer(x)
    reset = layer.reset(state, torch.tensor([True, False, False]))
    assert reset.skipped is not None
    assert reset.skipped.tolist() == [0, 0, 3]
    state.detach().save(tmp_path / "state.safetensors")
    loaded = TTTState.load(tmp_path / "state.safetensors")
    _, end = layer(x, loaded)
    assert end.skipped is not None
    assert end.skipped.tolist() == [4, 0, 6]
    without = TTTState.from_tensors({name: t for name, t in state.tensors().items() if name != "skipped"})
    assert without.where(torch.tensor([True, True, False]), state).skipped.tolist() == [0, 0, 3]  # type: ignore[union-attr]
    _, end = layer(x, without)
    assert end.skipped is not None
    assert end.skipped.tolist() == [2, 0, 3]


def test_left_alone_it_spoils_its_row_and_no_other() -> None:
    """The default: training stops there, by what it does to the loss."""
    layer = make(skip_nonfinite_tokens=False)
    x, _ = tokens()
    y, state = layer(x)
    assert state.skipped is None
    assert "skipped" not in state.tensors()
    assert not y[0, 2:].isfinite().any()
    assert not state.weights[0][0].isfinite().all()
    assert y[1].isfinite().all()
    finite = torch.nan_to_num(x, posinf=0.0, neginf=0.0)
    other = make()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(finite)[0], layer(finite)[0], rtol=0, atol=0)  # the same operations


def test_the_adapter_hands_it_on_as_it_is() -> None:
    """Nothing hides it from what comes after: not from a loss either, where training stops."""
    config = TTTConfig(mini_batch_size=C, skip_nonfinite_tokens=True, initial_gating_alpha=0.5)
    adapter = TTTAdapter(D, H, config, dtype=torch.float64)
    x, bad = tokens()
    out = adapter(x)
    torch.testing.assert_close(out[bad], x[bad], rtol=0, atol=0, equal_nan=True)
    assert out[~bad].isfinite().all()
    assert (out[~bad] != x[~bad]).any(-1).all()


def test_it_compiles_whole() -> None:
    torch._dynamo.reset()
    layer = make(scan_checkpoint_group_size=1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    x = tokens()[0][:, :7]  # a group of one mini-batch, and an open one
    y, state = compiled(x)
    expected, end = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert state.skipped.tolist() == end.skipped.tolist() == [2, 0, 1]


def test_an_adapter_made_without_it_loads_where_it_is_asked_for(tmp_path: Any) -> None:
    """It changes no finite token: a user turns it on for a file from before it was there."""
    from toy import ToyBackbone

    from ttt import inject
    from ttt.adapter_file import backbone_identity

    toy = ToyBackbone()

    def injected(**settings: Any) -> inject.Injection:
        model: nn.Module = toy.build(toy.tiny(), device="cpu", dtype=torch.float32)
        return inject.apply(model, toy.sites(model), TTTConfig(mini_batch_size=C, **settings), seed=1)

    save_adapter(tmp_path, injected(), backbone=backbone_identity(toy, toy.tiny()))
    asked = injected(skip_nonfinite_tokens=True)
    assert load_adapter(tmp_path, asked.model, injection=asked) is asked
    assert asked.config.skip_nonfinite_tokens
