"""TTT in tiny models of many families of `transformers`: one test for each, which builds the model once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tiny_lm import FAMILIES, build, cache_of, difference, read, text, with_ttt
from torch import Tensor
from transformers import PreTrainedModel

from ttt import gates_closed

pytest.importorskip("transformers", "5.0")
TOLERANCE = 1e-5  # float64, but for what a family itself does in float32
LENGTHS = (12, 9, 12, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    # Where the eager attention's softmax runs in float32, the mask's lowest float64 becomes -inf: NaN at padding.
    model = build(family, dtype=torch.float32 if family in ("gemma2", "bloom") else torch.float64)
    ids = text(3, 12)
    plain = model(input_ids=ids).logits.detach()
    injection = with_ttt(model, layer_type=("linear", "mlp")[sum(map(ord, family)) % 2])
    with torch.no_grad():
        with gates_closed(model):
            assert torch.equal(model(input_ids=ids).logits, plain), "with closed gates it is the plain model"
        whole = model(input_ids=ids).logits
        assert difference(whole, plain) > 0.01, "TTT acts"
        assert_streams(model, ids, whole)
        assert_reordered(model, ids)
        assert_padded(model, injection.adapters)
        assert_generates(model, ids[:2, :5])
    assert_padded_gradients(model)
    assert_checkpointing(model, ids, next(iter(injection.adapters)))
    model.eval()
    injection.eject()
    assert torch.equal(model(input_ids=ids).logits, plain), "ejected, it is the plain model"


def assert_streams(model: PreTrainedModel, ids: Tensor, whole: Tensor) -> None:
    for sizes in ([1] * 12, [5, 1, 2, 4]):
        cache, pieces = None, []
        for piece in ids.split(sizes, dim=1):
            outputs = read(model, piece, cache)
            cache = cache_of(outputs)
            pieces.append(outputs.logits)
        assert difference(torch.cat(pieces, 1), whole) < TOLERANCE, f"in pieces of {sizes}"


def assert_reordered(model: PreTrainedModel, ids: Tensor) -> None:
    cache = cache_of(read(model, ids[:, :7]))
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    want = model(input_ids=torch.cat([ids[order, :7], ids[:, 7:]], 1)).logits[:, 7:]
    assert difference(read(model, ids[:, 7:], cache).logits, want) < TOLERANCE


def singles() -> list[Tensor]:
    """Four texts `[1,T]`."""
    return [ids[None, :length] for ids, length in zip(text(4, max(LENGTHS), seed=2), LENGTHS, strict=True)]


def padded(side: str, model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor], list[slice]]:
    """A batch of four texts, what a model is given beside it, and where each text is."""
    width = max(LENGTHS)
    ids, mask = torch.zeros(2, 4, width, dtype=torch.long)
    places = [slice(width - n, width) if side == "left" else slice(0, n) for n in LENGTHS]
    for row, (place, single) in enumerate(zip(places, singles(), strict=True)):
        ids[row, place], mask[row, place] = single[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    takes_positions = model.config.model_type not in ("bloom", "opt")
    return ids, {"attention_mask": mask} | ({"position_ids": positions} if takes_positions else {}), places


def assert_padded(model: PreTrainedModel, adapters: dict[str, Any]) -> None:
    alone = [read(model, ids) for ids in singles()]
    for side in ("left", "right"):
        ids, kwargs, places = padded(side, model)
        batch = read(model, ids, **kwargs)
        for row, (place, single) in enumerate(zip(places, alone, strict=True)):
            assert difference(batch.logits[row : row + 1, place], single.logits) < TOLERANCE, f"{side}, row {row}"
            for index in range(len(adapters)):
                assert_same_state(cache_of(batch).ttt_states[index], cache_of(single).ttt_states[index], row)


def assert_same_state(batch: Any, single: Any, row: int) -> None:
    tensors = batch.state.opened().tensors()
    for name, tensor in single.state.opened().tensors().items():
        torch.testing.assert_close(tensors[name][row : row + 1], tensor, rtol=TOLERANCE, atol=TOLERANCE)


def assert_generates(model: PreTrainedModel, prompt: Tensor) -> None:
    prompt = prompt.clone()
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0  # left-padded
    for options in (
        {"do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "num_beams": 3},
    ):
        made = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            made.append(model.generate(prompt, attention_mask=mask, max_new_tokens=4, use_cache=use_cache, **options))
        assert torch.equal(*made), f"generate({options}) with and without a cache"


def gradients(model: PreTrainedModel, batches: list[tuple[Tensor, dict[str, Tensor], Tensor]]) -> dict[str, Tensor]:
    """Gradients of the weighted sum of logits over batches, of all parameters."""
    model.zero_grad()
    for ids, kwargs, weights in batches:
        (model(input_ids=ids, use_cache=False, **kwargs).logits * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_padded_gradients(model: PreTrainedModel) -> None:
    ids, kwargs, places = padded("left", model)
    weights = torch.randn(4, 12, 64, generator=torch.Generator().manual_seed(4), dtype=model.dtype)
    counted = weights * kwargs["attention_mask"][..., None]
    batch = gradients(model, [(ids, kwargs, counted)])
    rows = [
        (single, {}, weights[r : r + 1, place]) for r, (single, place) in enumerate(zip(singles(), places, strict=True))
    ]
    assert_same_gradients(batch, gradients(model, rows))


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert any(".ttt." in name for name in one)
    scale = max(float(value.norm()) for value in other.values())
    for name, value in other.items():
        assert float((one[name] - value).norm()) < TOLERANCE * max(float(value.norm()), 1e-3 * scale), name


def assert_checkpointing(model: PreTrainedModel, ids: Tensor, site: str) -> None:
    weights = torch.randn(3, 12, 64, generator=torch.Generator().manual_seed(5), dtype=model.dtype)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    model.train()
    want = gradients(model, [(ids, {"attention_mask": mask}, weights)])
    calls: list[int] = []
    # Before it, as recomputation stops at the last tensor that is needed.
    handle = model.get_submodule(site).register_forward_pre_hook(lambda *_: calls.append(1))
    for reentrant in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its name in later versions is another
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        calls.clear()
        assert_same_gradients(gradients(model, [(ids, {"attention_mask": mask}, weights)]), want)
        assert len(calls) == 2, "the layer is recomputed"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_disable()
    handle.remove()
