"""The states of TTT beside a `transformers` cache: exact where they are supported, refused where they would be lost."""

from __future__ import annotations

import copy
import io
import pickle
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forking
import pytest
import torch
from test_hf_families import padded
from tiny_lm import CACHE, build, cache_of, difference, read, text, with_ttt
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from ttt import gates_closed
from ttt.adapter import carried
from ttt.errors import UsageError
from ttt.hf.masks import token_mask
from ttt.hf.states import StatefulCache

IDS = text(3, 12)
PROMPT = torch.cat([IDS[:1, :6]] * 2, 1)  # repeats itself, so that a prompt lookup finds something
TOLERANCE = 1e-9  # float64


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def make(family: str = "llama", **options: Any) -> PreTrainedModel:
    model = build(family)
    with_ttt(model, **options)
    return model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make()


@pytest.fixture(scope="module")
def whole(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def fresh(model: PreTrainedModel, length: int = 6, rows: int = 3) -> Any:
    return cache_of(read(model, IDS[:rows, :length]))


def assert_goes_on(model: PreTrainedModel, cache: Any, whole: Tensor, start: int = 6) -> None:
    rows = whole.shape[0]
    assert difference(read(model, IDS[:rows, start:], cache).logits, whole[:, start:]) < TOLERANCE


# ---- what a cache can become


def test_a_copied_cache_has_states_of_its_own(model: PreTrainedModel, whole: Tensor) -> None:
    prefix = fresh(model)
    one, other = copy.deepcopy(prefix), copy.deepcopy(prefix)
    read(model, text(3, 5, seed=9), other)
    for cache in (one, prefix):
        assert_goes_on(model, cache, whole)


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_a_saved_cache_has_its_states(model: PreTrainedModel, whole: Tensor, kind: str) -> None:
    cache = fresh(model)
    if kind == "pickle":
        loaded = pickle.loads(pickle.dumps(cache))
    else:
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    assert_goes_on(model, loaded, whole)


def test_streams_are_selected_repeated_and_forgotten(model: PreTrainedModel) -> None:
    cache = fresh(model)
    cache.batch_select_indices(torch.tensor([2, 1]))
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([2, 2, 1, 1])
    want = model(input_ids=IDS[rows]).logits[:, 6:]
    assert difference(read(model, IDS[rows, 6:], cache).logits, want) < TOLERANCE
    cache.reset()
    assert not cache.ttt_states
    if not cache.get_seq_length():  # transformers 5.0 keeps as many keys, all zero
        assert difference(read(model, IDS, cache).logits, model(input_ids=IDS).logits) < TOLERANCE


def test_a_cache_goes_on_over_turns_of_generate(model: PreTrainedModel) -> None:
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    first = model.generate(
        IDS[:2, :5], attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    turn = torch.cat([first.sequences, IDS[:2, 5:8]], 1)
    mask = torch.cat([mask, torch.ones(2, 7, dtype=torch.long)], 1)
    mask[1, 9] = 0  # the shorter turn is padded, so that the cache gets a hole
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    want = model.generate(turn, use_cache=False, **options)
    assert torch.equal(model.generate(turn, **{CACHE: first[CACHE]}, **options), want)


# ---- what a cache must not be


def test_tokens_read_with_closed_gates_are_missed(model: PreTrainedModel) -> None:
    with gates_closed(model):
        cache = fresh(model)
    with pytest.raises(
        UsageError, match="holds 6 tokens, of which the TTT layer 0 has read 0: it was filled with the ga"
    ):
        read(model, IDS[:, 6:], cache)
    cache = fresh(model)
    with gates_closed(model):
        read(model, IDS[:, 6:8], cache)
    with pytest.raises(UsageError, match="holds 8 tokens, of which the TTT layer 0 has read 6"):
        read(model, IDS[:, 8:], cache)


def test_keys_and_values_alone_are_no_cache_with_ttt(model: PreTrainedModel) -> None:
    bare = DynamicCache(list(fresh(model)))
    assert not isinstance(bare, StatefulCache)
    with pytest.raises(UsageError, match="copied without its TTT states; start from a new cache"):
        read(model, IDS[:, 6:], bare)


def test_layers_of_a_cache_cut_behind_its_back(model: PreTrainedModel) -> None:
    cache = fresh(model)
    for layer in cache.layers:
        layer.crop(-2)
    with pytest.raises(UsageError, match="holds 4 tokens, of which the TTT layer 0 has read 6"):
        read(model, IDS[:, 4:], cache)


def test_states_of_other_layers_are_not_gone_on_from(model: PreTrainedModel) -> None:
    other = make()
    with pytest.raises(UsageError, match="TTT states of another model or process, of layers since taken out"):
        read(other, IDS[:, 6:], fresh(model))
    once = build("llama")
    injection = with_ttt(once)
    cache = fresh(once)
    injection.eject()
    with_ttt(once)
    with pytest.raises(UsageError, match="start from a new cache"):
        read(once, IDS[:, 6:], cache)


@pytest.mark.parametrize("by", ["injection", "model", "adapter_alone"])
def test_states_of_weights_that_others_were_loaded_over_are_not_gone_on_from(by: str) -> None:
    model = build("llama")
    injection = with_ttt(model)
    cache, copied = fresh(model), copy.deepcopy(fresh(model))
    loaded = {name: value * 1.5 for name, value in injection.state_dict().items()}
    if by == "injection":
        injection.load_state_dict(loaded)
    elif by == "model":
        model.load_state_dict(model.state_dict() | loaded)
    else:
        model.load_state_dict(loaded, strict=False, assign=True)
    for old in (cache, copied):
        with pytest.raises(UsageError, match="of weights that others were loaded over; start from a new cache"):
            read(model, IDS[:, 6:], old)
    want = model(input_ids=IDS, use_cache=False).logits[:, 6:]
    assert difference(read(model, IDS[:, 6:], fresh(model)).logits, want) < TOLERANCE


def _is_refused_the_cache(file: Path) -> None:
    with torch.no_grad():
        model = build("llama", seed=1)
        with_ttt(model)
        ids, cache = torch.load(file, weights_only=False)
        with pytest.raises(UsageError, match="TTT states of another model or process"):
            read(model, ids[:, 6:], cache)


def test_states_that_another_process_has_saved_are_not_gone_on_from(tmp_path: Path) -> None:
    """It cannot be known whether its weights were these."""
    torch.save((IDS, fresh(make())), tmp_path / "cache.pt")
    with forking.start(_is_refused_the_cache, tmp_path / "cache.pt") as process:
        assert process.wait(120) == 0, process.communicate(5)


def test_a_layer_that_is_not_given_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    forward = model.model.layers[0].forward

    def without(*args: Any, **given: Any) -> Any:
        return forward(*args, **{name: value for name, value in given.items() if name != CACHE})

    monkeypatch.setattr(model.model.layers[0], "forward", without)
    with pytest.raises(UsageError, match="the model was given a cache, but its LlamaDecoderLayer was given no cache"):
        read(model, IDS, DynamicCache())


# ---- tokens taken back


def test_tokens_of_the_last_pass_can_be_taken_back(model: PreTrainedModel, whole: Tensor) -> None:
    cache = fresh(model, 8, rows=1)
    cache.crop(-1)
    cache.crop(-1)
    assert_goes_on(model, cache, whole[:1])
    cache = fresh(model, 6, rows=1)
    read(model, text(1, 4, seed=9), cache)
    if CACHE == "cache":  # before, 0 was how many remain
        cache.crop(0)
    cache.crop(-4)
    assert_goes_on(model, cache, whole[:1])


def test_a_long_pass_keeps_its_last_tokens(
    model: PreTrainedModel, whole: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ttt.hf.states._KEPT", 3)
    cache = fresh(model, 8, rows=1)
    with pytest.raises(UsageError, match=r"4 tokens cannot be taken back from this cache: .* keep 3 of them"):
        cache.crop(-4)
    cache.crop(-2)  # the refusal has changed nothing
    assert_goes_on(model, cache, whole[:1])


def test_tokens_that_are_not_kept_cannot_be_taken_back(model: PreTrainedModel, whole: Tensor) -> None:
    cache = fresh(model)
    assert not cache.is_croppable
    with pytest.raises(
        UsageError, match=r"2 tokens cannot be taken back .* fast weights cannot forget .* keep none of them"
    ):
        cache.crop(-2)
    assert_goes_on(model, cache, whole)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_assisted_decoding(family: str) -> None:
    if family == "mistral" and CACHE != "cache":
        pytest.skip("this version of transformers takes nothing back from a sliding cache")
    model = make(family, mini_batch_size=4)
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": 1}
    want = model.generate(PROMPT, use_cache=False, **options)
    assert torch.equal(model.generate(PROMPT, prompt_lookup_num_tokens=3, **options), want)
    assert torch.equal(model.generate(PROMPT, assistant_model=build(family), **options), want)


# ---- caches of a fixed size


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_generate_with_a_static_cache(family: str, attention: str) -> None:
    model = build(family, dtype=torch.float32, attn_implementation=attention)
    with_ttt(model)
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, :3] = 0
    prompt = IDS[:, :6].masked_fill(mask == 0, 0)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    want = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **options), want)


def test_a_mask_as_long_as_a_static_cache(model: PreTrainedModel, whole: Tensor) -> None:
    cache = StaticCache(config=model.config, max_cache_len=20)
    mask = torch.zeros(3, 20, dtype=torch.long)
    for start, end in ((0, 5), (5, 12)):
        mask[:, :end] = 1
        logits = read(model, IDS[:, start:end], cache, attention_mask=mask).logits
        assert difference(logits, whole[:, start:end]) < TOLERANCE


def test_a_static_cache_filled_with_closed_gates(model: PreTrainedModel) -> None:
    cache = StaticCache(config=model.config, max_cache_len=20)
    with gates_closed(model):
        read(model, IDS[:, :5], cache)
    with pytest.raises(UsageError, match="holds 5 tokens, of which the TTT layer 0 has read 0"):
        read(model, IDS[:, 5:], cache)


# ---- masks and positions


def test_a_mask_with_holes_is_the_text_without_them(model: PreTrainedModel) -> None:
    mask = torch.ones_like(IDS)
    mask[:, [2, 3, 7]] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    holes = model(input_ids=IDS, attention_mask=mask, position_ids=positions).logits[:, mask[0] == 1]
    assert difference(holes, model(input_ids=IDS[:, mask[0] == 1]).logits) < TOLERANCE


def test_embeddings_instead_of_tokens(model: PreTrainedModel, whole: Tensor) -> None:
    embeddings = model.get_input_embeddings()(IDS)
    assert difference(model(inputs_embeds=embeddings).logits, whole) < TOLERANCE
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    want = model(input_ids=IDS, attention_mask=mask).logits
    assert difference(model(inputs_embeds=embeddings, attention_mask=mask).logits, want) < TOLERANCE


def block_diagonal() -> Tensor:
    mask = torch.ones(3, 1, 12, 12, dtype=torch.bool).tril()
    mask[:, :, 6:, :6] = False
    return mask


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": torch.ones(3, 11)}, "attention_mask is .3, 11., but this pass has 12 tokens, in 3 rows"),
        ({"attention_mask": torch.ones(2, 12)}, "it must have a column for each token"),
        (
            {"attention_mask": torch.ones(3, 12, 12)},
            "attention_mask is of shape .3, 12, 12.: TTT layers need the two-dim",
        ),
        (
            {"attention_mask": block_diagonal()},
            "attention_mask keeps a token from the one before it, as if several texts",
        ),
        ({"attention_mask": torch.ones(3, 1, 12, 12, dtype=torch.long)}, "with four dimensions it is bool or floating"),
        ({"position_ids": torch.arange(12)[None] % 7}, "several texts are packed into a row .position_ids start again"),
        ({"position_ids": torch.zeros(1, 12, dtype=torch.long)}, "several texts are packed into a row"),
        ({"cu_seq_lens_q": torch.tensor([0, 6, 12])}, "several texts are packed into a row"),
    ],
)
def test_a_mask_that_is_not_understood(model: PreTrainedModel, given: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model(input_ids=IDS, use_cache=False, **given)


def test_a_mask_of_the_new_tokens_alone(model: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match=r"but the cache holds 6 tokens and this pass 6.* those in the cache included"):
        read(model, IDS[:, 6:], fresh(model), attention_mask=torch.ones(3, 6))


def test_a_layer_outside_of_a_pass(model: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match=r"was called outside of its model's forward pass") as caught:
        model.model.layers[0](torch.zeros(1, 4, 16))
    (named,) = re.findall(r"write model\.(\w+)\(\) instead", str(caught.value))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is what this version has, and does not call old
        getattr(build("llama"), named)()


def test_masks_by_kind_of_layer() -> None:
    """A chunk does not see the chunk before it; that is no text of its own."""
    full = torch.ones(3, 1, 12, 12, dtype=torch.bool).tril()
    full[0, :, :, :2] = False
    counted = torch.ones(3, 12, dtype=torch.bool)
    counted[0, :2] = False
    chunked = full & block_diagonal()
    for masks in ({"chunked_attention": chunked}, {"chunked_attention": chunked, "full_attention": full}):
        own = token_mask(masks, (3, 12), 0)
        assert own is not None
        assert torch.equal(own, counted)
    with pytest.raises(UsageError, match="attention_mask is a dict"):
        token_mask({"another": full}, (3, 12), 0)


def test_states_carried_from_window_to_window() -> None:
    """Training may carry states beside a cache that the model makes for each window and throws away."""
    model = build("llama")
    injection = with_ttt(model)
    made = []
    for use_cache in (True, False):
        with carried(injection) as carry:
            model(input_ids=IDS[:, :7], use_cache=use_cache)
        with carried(injection, carry.states) as after:
            logits = model(input_ids=IDS[:, 7:], use_cache=use_cache).logits
        made.append((logits, after.states["model.layers.1.ttt"].weights[0]))
    assert difference(made[0][0], model(input_ids=IDS[:, 7:]).logits) > 0.001
    for one, other in zip(*made, strict=True):
        assert difference(one, other) < TOLERANCE


# ---- at the same time


def test_two_streams_in_turns(model: PreTrainedModel, whole: Tensor) -> None:
    texts, caches = (IDS, text(3, 12, seed=9)), [None, None]
    pieces: list[list[Tensor]] = [[], []]
    for at in range(0, 12, 3):
        for stream in (0, 1):
            outputs = read(model, texts[stream][:, at : at + 3], caches[stream])
            caches[stream] = cache_of(outputs)
            pieces[stream].append(outputs.logits)
    assert difference(torch.cat(pieces[0], 1), whole) < TOLERANCE
    assert difference(torch.cat(pieces[1], 1), model(input_ids=texts[1]).logits) < TOLERANCE


def test_two_threads(model: PreTrainedModel) -> None:
    """Each is inside of its pass while the other is, with padding of its own."""
    ids, kwargs, _ = padded("left", model)
    want, other = model(input_ids=ids, **kwargs).logits, model(input_ids=IDS).logits
    inside = {name: threading.Event() for name in ("one", "other", "done")}
    made: list[Tensor] = []

    def wait(*_: Any) -> None:
        """The one waits for the other to begin, and that for the one to end."""
        one = threading.current_thread() is thread
        inside["one" if one else "other"].set()
        assert inside["other" if one else "done"].wait(30)

    def run() -> None:
        try:
            with torch.no_grad():
                made.append(model(input_ids=ids, **kwargs).logits)
        except UsageError:
            pass
        finally:
            inside["done"].set()

    thread = threading.Thread(target=run)
    handle = model.model.layers[0].register_forward_pre_hook(wait)
    try:
        thread.start()
        assert inside["one"].wait(30)
        mine = model(input_ids=IDS).logits
        thread.join(30)
    finally:
        handle.remove()
    assert len(made) == 1
    assert difference(made[0], want) < TOLERANCE
    assert difference(mine, other) < TOLERANCE


# ---- wrong ones, each caught by what is written above


def forget_reorder(self: StatefulCache, beam_idx: Tensor) -> None:
    super(StatefulCache, self).reorder_cache(beam_idx)


def forget_crop(self: StatefulCache, tokens: int) -> None:
    super(StatefulCache, self).crop(tokens)


def test_a_cache_that_forgets_is_caught(model: PreTrainedModel, whole: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_hf_families import assert_reordered

    monkeypatch.setattr(StatefulCache, "reorder_cache", forget_reorder)
    with pytest.raises(AssertionError):
        assert_reordered(model, IDS)
    monkeypatch.setattr(StatefulCache, "crop", forget_crop)
    cache = fresh(model, 8, rows=1)
    cache.crop(-2)
    with pytest.raises(UsageError, match="holds 6 tokens, of which the TTT layer 0 has read 8"):
        assert_goes_on(model, cache, whole[:1])


class OneStack:
    """Wrong: what `ContextVar` does, but for all threads together."""

    def __init__(self) -> None:
        self.value: Any = ()

    def get(self) -> Any:
        return self.value

    def set(self, value: Any) -> Any:
        before, self.value = self.value, value
        return before

    def reset(self, before: Any) -> None:
        self.value = before


def test_passes_that_threads_share_are_caught(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt.hf.passes._CURRENT", OneStack())
    with pytest.raises((AssertionError, UsageError)):
        test_two_threads(model)


def test_states_of_one_for_all_caches_are_caught(
    model: PreTrainedModel, whole: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: Any = cache_of(read(model, IDS[:, :1]))

    def one_for_all(cache: Any, owner: int) -> Any:
        return shared

    shared.reset()
    monkeypatch.setattr("ttt.hf.sites.stateful", one_for_all)
    with pytest.raises(UsageError, match="of which the TTT layer 0 has read"):
        test_two_streams_in_turns(model, whole)


def no_mask(mask: Tensor | None, shape: tuple[int, int], past: int) -> Tensor | None:
    return None


def off_by_one(mask: Tensor | None, shape: tuple[int, int], past: int) -> Tensor | None:
    return None if mask is None else (mask != 0).roll(1, 1)


@pytest.mark.parametrize("wrong", [no_mask, off_by_one])
def test_a_wrong_mask_is_caught(wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from test_hf_families import assert_padded

    monkeypatch.setattr("ttt.hf.passes.token_mask", wrong)
    with pytest.raises(AssertionError, match="left, row 1"):
        assert_padded(make("opt"), {"0": None, "1": None})
