"""A token mask: a batch with padding and holes is its sequences without them, in outputs, states and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ttt.config import TTTConfig
from ttt.layer import Rotary, TTTLayer
from ttt.state import TTTState

D, H, C = 12, 3, 4
LEFT, RIGHT, HOLES, WHOLE, NONE = range(5)
B = 5
TOLERANCE = 1e-10
JUNK = (math.nan, math.inf, -math.inf, 1e30)


def make(**settings: Any) -> TTTLayer:
    layer = TTTLayer(D, H, TTTConfig.model_validate({"mini_batch_size": C, **settings}), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
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


def alone(layer: TTTLayer, x: Tensor, mask: Tensor, state: TTTState | None) -> Read:
    """Each sequence without the tokens that do not count, by itself; put together as a batch with a mask is."""
    angles, answers, states = angles_of(layer, mask), [], []
    for row, counted in enumerate(mask):
        y, after = x.new_zeros(x.shape[1:]), row_of(state, row)
        if counted.any():
            rotary = None if angles is None else turned(angles[row : row + 1, :, counted])
            read, after = layer(x[row : row + 1, counted], after, rotary=rotary)
            y = y.index_put((counted.nonzero().squeeze(1),), read[0])
        answers.append(y)
        states.append((after or layer.initial_state(1, dtype=torch.float64)).opened().tensors())
    together = {name: torch.cat([one[name] for one in states]) for name in states[0]}
    return torch.stack(answers), TTTState.from_tensors(together)


def tensors_of(read: Read) -> dict[str, Tensor]:
    return {"y": read[0], **read[1].opened().tensors()}


def gradients(found: dict[str, Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of a sum that weighs every number differently."""
    numbers = [x for x in found.values() if x.requires_grad]
    total = sum((x * torch.linspace(0.3, 1.7, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in numbers)
    made = torch.autograd.grad(total, leaves, allow_unused=True)  # type: ignore[arg-type]
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, made, strict=True)]


def assert_as_alone(
    layer: TTTLayer, x: Tensor, mask: Tensor, state: TTTState | None, monkeypatch: Any, ops: str
) -> None:
    """Outputs, states and the gradient of everything."""
    x = x.requires_grad_()
    given = [] if state is None else [t for t in state.tensors().values() if t.requires_grad]
    leaves = {"x": x, **dict(layer.named_parameters()), **{f"state {n}": t for n, t in enumerate(given)}}
    monkeypatch.setenv("TTT_OPS", ops)
    found = tensors_of(layer(x, state, rotary=turned(angles_of(layer, mask)), mask=mask))
    found_gradients = gradients(found, list(leaves.values()))
    monkeypatch.setenv("TTT_OPS", "generic")
    expected = tensors_of(alone(layer, x, mask, state))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not found["y"][~mask].any()
    for name, value, wanted in zip(leaves, found_gradients, gradients(expected, list(leaves.values())), strict=True):
        torch.testing.assert_close(value, wanted, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"d {n}: {m}")
    assert not found_gradients[0][~mask].any()
    assert found_gradients[0][mask].any(-1).all()


KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"layer_type": "mlp", "mlp_expansion_factor": 2.0, "scan_checkpoint_group_size": 2},
    "linear, not causal": {"preset": "video", "rope": "none", "scan_checkpoint_group_size": 1},
    "mlp, not causal": {"preset": "video", "layer_type": "mlp", "mlp_hidden_dims": [6]},
    "moshi": {
        **{"qkvo_bias": True, "normalize_qk": True, "normalize_target": True, "input_norm": "rms"},
        **{"layer_type": "mlp", "learnable_token_idx": False},
    },
}


@pytest.mark.parametrize("ops", ["fused", "generic"])
@pytest.mark.parametrize("opened", [None, False, True], ids=["fresh", "at a boundary", "open"])
@pytest.mark.parametrize("length", [1, 3, 11, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_is_its_sequences(
    kind: str, length: int, opened: bool | None, ops: str, monkeypatch: Any
) -> None:
    layer = make(**KINDS[kind])
    if opened and not layer.config.causal:
        pytest.skip("never left open")
    mask = mask_of(length)
    state = None if opened is None else state_of(layer, opened=opened)
    assert_as_alone(layer, tokens_of(mask), mask, state, monkeypatch, ops)
