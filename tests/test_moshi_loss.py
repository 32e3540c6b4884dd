"""Moshi's loss against plain Python, gradients included, and on the real model's output."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from moshi.models.lm import LMOutput
from moshi.modules.transformer import RMSNorm
from torch import Tensor

from ttt import inject
from ttt.config import RunConfig, TTTConfig
from ttt.errors import PluginError
from ttt.plugins import get_backbone
from ttt_moshi.long_windows import _mask, long_window_loss
from ttt_moshi.loss import moshi_loss
from ttt_moshi.options import MoshiOptions

MOSHI = get_backbone("moshi")
BATCH, STREAMS, OWN, FRAMES, AUDIO_CARD, TEXT_CARD = 3, 9, 4, 5, 6, 7
PADDINGS = {3, 0}


def random_output(seed: int, *, dtype: torch.dtype = torch.float64) -> tuple[LMOutput, Tensor]:
    """Output and codes as `LMModel` would give them: NaN and masked where delays left no prediction, -1 padding."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, AUDIO_CARD, (BATCH, STREAMS, FRAMES), generator=generator)
    codes[:, 0, ::2] = torch.tensor([3, 0, 3])  # a good part of the text is padding
    codes[1, :, -2:] = -1
    codes[2, 2, 1] = -1
    text_logits = torch.randn(BATCH, 1, FRAMES, TEXT_CARD, generator=generator, dtype=torch.float64)
    logits = 3 * torch.randn(BATCH, OWN, FRAMES, AUDIO_CARD, generator=generator, dtype=torch.float64)
    mask, text_mask = codes[:, 1 : 1 + OWN] != -1, codes[:, :1] != -1
    mask[:, 1:, -1] = False
    logits[:, 1:, -1] = math.nan
    return LMOutput(logits.to(dtype), mask, text_logits.to(dtype), text_mask), codes


def by_hand(
    logits: Tensor, targets: Tensor, mask: Tensor, weight: Callable[[int, int], float]
) -> tuple[float, list[float]]:
    """`Σ w·ce / Σ w` and its gradient, position by position; `weight(codebook, target)` of one that counts."""
    rows, codebooks, frames, card = logits.shape
    places = [(b, k, t) for b in range(rows) for k in range(codebooks) for t in range(frames)]
    weights = {p: weight(p[1], int(targets[p])) if mask[p] else 0.0 for p in places}
    total, loss, gradient = sum(weights.values()), 0.0, []
    for place in places:
        if weights[place] == 0:
            gradient += [0.0] * card
            continue
        values = logits[place].tolist()
        top = max(values)
        exponentials = [math.exp(value - top) for value in values]
        probabilities = [value / sum(exponentials) for value in exponentials]
        target = int(targets[place])
        loss -= weights[place] / total * math.log(probabilities[target])
        gradient += [weights[place] / total * (p - (i == target)) for i, p in enumerate(probabilities)]
    return loss, gradient


def settings(**changes: float) -> dict:
    return {
        "dep_q": OWN,
        "text_padding_weight": 0.3,
        "first_codebook_weight_multiplier": 100.0,
        "text_padding_ids": PADDINGS,
    } | changes


@pytest.mark.parametrize("text_padding_weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("multiplier", [1.0, 100.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_weighted_mean_computed_by_hand(text_padding_weight, multiplier, seed):
    output, codes = random_output(seed)
    output.logits.requires_grad_()
    output.text_logits.requires_grad_()
    loss, parts = moshi_loss(
        output,
        codes,
        **settings(text_padding_weight=text_padding_weight, first_codebook_weight_multiplier=multiplier),
    )
    loss.backward()
    text, text_gradient = by_hand(
        output.text_logits.detach(),
        codes[:, :1],
        output.text_mask,
        lambda _, target: text_padding_weight if target in PADDINGS else 1.0,
    )
    audio, audio_gradient = by_hand(
        output.logits.detach(),
        codes[:, 1 : 1 + OWN],
        output.mask,
        lambda codebook, _: multiplier if codebook == 0 else 1.0,
    )
    assert loss.dtype == torch.float64
    assert parts["text_loss"].item() == pytest.approx(text, abs=1e-12)
    assert parts["audio_loss"].item() == pytest.approx(audio, abs=1e-12)
    assert loss.item() == pytest.approx(text + audio, abs=1e-12)
    assert not any(part.requires_grad for part in parts.values())
    for logits, expected in ((output.text_logits, text_gradient), (output.logits, audio_gradient)):
        assert logits.grad is not None
        torch.testing.assert_close(
            logits.grad.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14
        )


def test_masked_positions_contribute_nothing():
    """Whatever stands there: other targets, other logits, infinities."""
    output, codes = random_output(2)
    loss, _ = moshi_loss(output, codes, **settings())
    output.logits[~output.mask] = math.inf
    output.text_logits[~output.text_mask] = -math.inf
    codes[:, 1 : 1 + OWN][~output.mask] = AUDIO_CARD + 50
    codes[:, 1 + OWN :] = 0  # the user's codebooks are never predicted
    again, _ = moshi_loss(output, codes, **settings())
    assert torch.equal(loss, again)


def test_a_batch_with_nothing_to_predict_is_zero():
    output, codes = random_output(3)
    codes.fill_(-1)
    output.mask.zero_()
    output.text_mask.zero_()
    output.logits.requires_grad_()
    loss, parts = moshi_loss(output, codes, **settings())
    loss.backward()
    assert loss.item() == parts["text_loss"].item() == parts["audio_loss"].item() == 0
    assert output.logits.grad is not None
    assert not output.logits.grad.any()


def test_half_precision_logits_are_summed_in_float32():
    exact, codes = random_output(4)
    rounded, _ = random_output(4, dtype=torch.bfloat16)
    loss, _ = moshi_loss(rounded, codes, **settings())
    assert loss.dtype == torch.float32
    upcast = LMOutput(rounded.logits.double(), rounded.mask, rounded.text_logits.double(), rounded.text_mask)
    assert loss.item() == pytest.approx(moshi_loss(upcast, codes, **settings())[0].item(), rel=1e-6)
    assert loss.item() == pytest.approx(moshi_loss(exact, codes, **settings())[0].item(), rel=0.05)


def test_on_the_model_every_gradient_is_finite():
    """The real `LMModel` puts NaN where its delays leave no prediction."""
    model = MOSHI.build(MOSHI.tiny(), device="cpu", dtype=torch.float32)
    codes = MOSHI.example_batch(model, batch_size=2, tokens=6, seed=0)
    codes[:, 0, 1] = 3
    codes[1, :, 4:] = -1
    output = model(codes)
    assert output.logits.isnan().any()
    assert not output.mask[0, 1:, -1].any()
    paddings = {model.text_padding_token_id, model.end_of_text_padding_id}
    loss, parts = moshi_loss(output, codes, **settings(dep_q=model.dep_q, text_padding_ids=paddings))
    text, _ = by_hand(
        output.text_logits.detach(), codes[:, :1], output.text_mask, lambda _, target: 0.3 if target in paddings else 1
    )
    audio, _ = by_hand(output.logits.detach(), codes[:, 1:9], output.mask, lambda codebook, _: 1 if codebook else 100.0)
    assert parts["text_loss"].item() == pytest.approx(text, rel=1e-5)
    assert parts["audio_loss"].item() == pytest.approx(audio, rel=1e-5)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 50
    assert all(gradient.isfinite().all() for gradient in gradients)


# --- long windows ---


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """The model with norms in float64 too; kyutai's compute in float32."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.dtype = torch.float64
    return model


def gradients_of_loss(model: torch.nn.Module, codes: Tensor, **options: float) -> dict[str, Tensor]:
    """The loss, its parts, and every gradient."""
    model.zero_grad()
    found = MOSHI.loss(model, codes, RunConfig(backbone=MoshiOptions(**options)))
    found.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": found.loss.detach(), **found.metrics, **gradients}


def worst_of(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items() if value.any())


@pytest.fixture
def adapted() -> torch.nn.Module:
    """Moshi with TTT, attention that sees 3 and 5 frames, in float64."""
    options = MoshiOptions(dim=16, num_heads=2, num_layers=2, ttt_layer_context=3, non_ttt_layer_context=5)
    model = in_float64(MOSHI.build(options, device="cpu", dtype=torch.float64))
    settings = {**MOSHI.ttt_defaults, "layers": (1,), "mini_batch_size": 4}
    inject.apply(model, MOSHI.sites(model), TTTConfig.model_validate(settings), seed=1)
    return model


@pytest.fixture
def long_windows(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes every window a long one: 10 steps' logits at once, and 4 queries."""

    def make() -> None:
        for module in ("model", "long_windows"):
            monkeypatch.setattr(f"ttt_moshi.{module}.LONG_WINDOW", 4)
        monkeypatch.setattr("ttt_moshi.heads.HEAD_ROWS", 20)
        monkeypatch.setattr("ttt_moshi.long_windows.attention_block", lambda context: 4)

    return make


def codes_with_holes(model: torch.nn.Module) -> Tensor:
    codes = MOSHI.example_batch(model, batch_size=2, tokens=23, seed=0)
    codes[:, 0, ::2] = 3
    codes[1, :, 18:] = -1
    codes[0, 3, 7] = -1
    return codes


@pytest.mark.parametrize(
    ("options", "checkpointing"),
    [({}, False), ({}, True), ({"text_padding_weight": 0.0, "first_codebook_weight_multiplier": 1.0}, False)],
)
def test_a_long_window_has_the_loss_and_gradients_of_a_short_one(adapted, long_windows, options, checkpointing):
    """Attention in blocks, logits in pieces, both made again in backward."""
    codes = codes_with_holes(adapted)
    expected = gradients_of_loss(adapted, codes, **options)
    assert len(expected) > 50
    long_windows()
    MOSHI.set_gradient_checkpointing(adapted, checkpointing)
    assert worst_of(gradients_of_loss(adapted, codes, **options), expected) < 1e-12


@pytest.mark.parametrize(
    ("place", "saboteur"),
    [
        ("ttt_moshi.long_windows._mask", lambda block, context, like: _mask(block, context + 1, like)[:, 1:]),
        ("ttt_moshi.long_windows.weights_of_codebooks", lambda dep_q, first, **kind: torch.ones(dep_q, 1, **kind)),
        ("ttt_moshi.long_windows._delay_sequence", lambda delays, codes, initial: codes),
    ],
)
def test_each_part_of_a_long_window_is_compared(adapted, long_windows, monkeypatch, place, saboteur):
    codes = codes_with_holes(adapted)
    expected = gradients_of_loss(adapted, codes)
    long_windows()
    monkeypatch.setattr(place, saboteur)
    assert worst_of(gradients_of_loss(adapted, codes), expected) > 1e-6


@torch.no_grad()
def test_frames_without_a_transcript_count_for_less_in_a_long_window(adapted):
    """What their text adds is weighted, the divisor is not: the loss is a line in the weight."""
    codes = codes_with_holes(adapted)
    some = torch.zeros(2, 1, 23, dtype=torch.bool)
    some[0, :, 5:20] = True

    def text_loss(frames: Tensor | None, weight: float) -> float:
        more = {"untranscribed": frames, "untranscribed_text_weight": weight}
        given = {name: value for name, value in settings().items() if name != "dep_q"}
        return float(long_window_loss(adapted, codes, **given, **more)[1]["text_loss"])

    plain, without = text_loss(None, 0.25), text_loss(some, 0.0)
    assert text_loss(some, 1.0) == plain > without > 0
    assert text_loss(some, 0.25) == pytest.approx(without + 0.25 * (plain - without), rel=1e-12)
    assert text_loss(torch.ones_like(some), 0.25) == pytest.approx(0.25 * plain, rel=1e-12)


def test_a_window_of_240_s_is_read_at_once_and_a_longer_one_in_pieces(monkeypatch):
    """As far as windows went before, the loss is kyutai's model's own, bit for bit."""
    model = MOSHI.build(MoshiOptions(dim=8, num_heads=1, num_layers=1, context=2), device="cpu", dtype=torch.float32)
    codes = MOSHI.example_batch(model, batch_size=1, tokens=3001, seed=0)
    config = RunConfig(backbone=MoshiOptions())
    seen: list[int] = []
    monkeypatch.setattr(model, "forward", lambda codes: seen.append(codes.shape[2]) or 1 / 0)
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        MOSHI.loss(model, codes[:, :, :3000], config)
    assert seen == [3000]
    with torch.no_grad():
        assert MOSHI.loss(model, codes, config).loss.isfinite()
    assert seen == [3000]
