"""Attention limited to a window and sinks, against masks written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_lm import build, cache_of, difference, read, text, with_ttt
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ttt.errors import UsageError
from ttt.hf import limit_attention
from ttt.hf.attention import describe_limit

IDS = text(3, 14)
TOLERANCE = 1e-6  # the eager softmax runs in float32
WINDOW, SINKS = 4, 2
LIMITED = ["llama", "mistral", "gemma3_text", "gpt2", "gpt_neox", "qwen3"]


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def seen(length: int, window: int, sinks: int) -> Tensor:
    """Whether each query `[T, 1]` sees each key `[1, T]`, from the definition."""
    rows = [
        [key <= query and (query - key < window or key < sinks) for key in range(length)] for query in range(length)
    ]
    return torch.tensor(rows)


def defined(model: PreTrainedModel, window: int, sinks: int) -> Tensor:
    """What a model says under masks written out."""
    length, own = IDS.shape[1], getattr(model.config, "sliding_window", None)
    full = seen(length, window, sinks)
    sliding = full & seen(length, own, 0) if own else full
    masks = {kind: _mask(model, mask) for kind, mask in (("full_attention", full), ("sliding_attention", sliding))}
    by_kind = getattr(model.config, "layer_types", None) is not None and model.config.model_type == "gemma3_text"
    return model(input_ids=IDS, attention_mask=masks if by_kind else masks["sliding_attention"]).logits


def _mask(model: PreTrainedModel, mask: Tensor) -> Tensor:
    if model.config._attn_implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    return mask.expand(IDS.shape[0], 1, *mask.shape)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", LIMITED)
def test_it_is_the_mask_written_out(family: str, attention: str) -> None:
    model = build(family, attn_implementation=attention)
    plain, want = model(input_ids=IDS).logits, defined(model, WINDOW, SINKS)
    assert difference(want, plain) > 0.001
    with limit_attention(model, window=WINDOW, sinks=SINKS):
        assert difference(model(input_ids=IDS).logits, want) < TOLERANCE
        cache, pieces = None, []
        for piece in IDS.split([5, 1, 1, 7], 1):
            outputs = read(model, piece, cache)
            cache = cache_of(outputs)
            pieces.append(outputs.logits)
        assert difference(torch.cat(pieces, 1), want) < TOLERANCE
    assert torch.equal(model(input_ids=IDS).logits, plain), "undone"


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("window", [1, 5, 13, 14, 100])
def test_every_window(window: int, sinks: int) -> None:
    model = build("llama")
    want = defined(model, window, sinks)
    limit = limit_attention(model, window=window, sinks=sinks)
    assert difference(model(input_ids=IDS).logits, want) < 1e-12
    limit.undo()
    limit.undo()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_counts_for_neither_window_nor_sinks(attention: str) -> None:
    # In float64 the lowest number of eager masks is -inf to a softmax in float32: NaN at padding.
    model = build("llama", dtype=torch.float32, attn_implementation=attention)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    mask[1, 9:] = 0
    mask[2, [3, 4, 8]] = 0  # holes too
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with limit_attention(model, window=WINDOW, sinks=SINKS):
        batch = model(input_ids=IDS, attention_mask=mask, position_ids=positions).logits
        for row in range(3):
            real = mask[row] == 1
            single = model(input_ids=IDS[row : row + 1, real]).logits
            assert difference(batch[row : row + 1, real], single) < 1e-5


def test_a_limit_is_told_as_the_model_has_it() -> None:
    model = build("llama")
    assert describe_limit(model) == []
    with limit_attention(model, window=5, sinks=2):
        assert describe_limit(model) == ["attention sees the newest 5 tokens at most, and the first 2 of its text"]
    with limit_attention(model, window=1):
        assert describe_limit(model) == ["attention sees the newest 1 token at most"]
    assert describe_limit(model) == []


def test_generate_with_ttt_under_a_limit() -> None:
    model = build("mistral", dtype=torch.float32)
    with_ttt(model)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    with limit_attention(model, window=3, sinks=1):
        want = model.generate(IDS[:2, :6], use_cache=False, **options)
        assert torch.equal(model.generate(IDS[:2, :6], **options), want)
        assert torch.equal(model.generate(IDS[:2, :6], cache_implementation="static", **options), want)


def test_what_cannot_be_limited() -> None:
    for family in ("bloom", "falcon"):
        model = build(family)
        before = model.config._attn_implementation
        with pytest.raises(
            UsageError, match="cannot be limited: it does not look its implementation up in the Attention"
        ):
            limit_attention(model, window=4)
        assert model.config._attn_implementation == before
    model = build("llama")
    for options, message in (
        ({"window": 0}, "attention window: 0 is not a whole number from 1"),
        ({"window": True}, "attention window: True is not"),
        ({"window": 4, "sinks": -1}, "attention sinks: -1 is not a whole number from 0"),
        ({"window": None, "sinks": 2}, "attention sinks: 2 without a window"),
    ):
        with pytest.raises(UsageError, match=message):
            limit_attention(model, **options)  # type: ignore[arg-type]
    with limit_attention(model, window=None):
        assert model.config._attn_implementation == "sdpa"
    with limit_attention(model, window=4), pytest.raises(UsageError, match="limited already; undo that first"):
        limit_attention(model, window=5)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(
        UsageError, match="LlamaForCausalLM has the attention implementation 'flash_attention_2', and a"
    ):
        limit_attention(model, window=4)


def test_packed_texts_have_no_sinks() -> None:
    model = build("llama")
    packed = {"position_ids": torch.arange(14)[None] % 7, "use_cache": False}
    with limit_attention(model, window=WINDOW):
        both = model(input_ids=IDS, **packed).logits
        assert difference(both[:, 7:], model(input_ids=IDS[:, 7:]).logits) < TOLERANCE
    with limit_attention(model, window=WINDOW, sinks=1), pytest.raises(UsageError, match="several texts were packed"):
        model(input_ids=IDS, **packed)


def test_attention_without_a_mask_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that makes its masks elsewhere would see everything."""
    model = build("llama")
    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda **_: None)
    with limit_attention(model, window=20):
        model(input_ids=IDS)
    with (
        limit_attention(model, window=4),
        pytest.raises(UsageError, match="LlamaAttention cannot be limited to 4 tokens"),
    ):
        read(model, IDS, DynamicCache())


def by_column(attention_mask: Tensor, sizes: dict[str, Any]) -> Tensor:
    """Wrong: padding counts."""
    return torch.arange(1, sizes["kv_length"] + 1).expand(attention_mask.shape[0], -1)


def test_a_limit_that_counts_padding_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt.hf.attention._counted", by_column)
    with pytest.raises(AssertionError):
        test_padding_counts_for_neither_window_nor_sinks("sdpa")
