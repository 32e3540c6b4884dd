"""Models of `transformers` under what users do to them, and models that are not understood."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_lm import build, cache_of, difference, read, text, with_ttt
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from ttt.errors import InjectionError
from ttt.hf import causal_lm_sites

IDS = text(3, 12)
TOLERANCE = 1e-9  # float64
_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class Outer(nn.Module):
    """What holds two models."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = build("llama"), build("llama")


def unusual(kind: Any, family: str, **sizes: Any) -> Callable[[], nn.Module]:
    return lambda: kind.from_config(AutoConfig.for_model(family, **sizes))  # type: ignore[no-any-return]


LOOKED = "looked for one list of decoder layers: modules of one class that hold the layer_idx"
REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (
        unusual(AutoModelForSeq2SeqLM, "t5", vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
        "T5ForConditionalGeneration is an encoder and a decoder; TTT is injected into causal language models",
    ),
    (
        unusual(AutoModelForMaskedLM, "bert", **_SIZES),
        f"BertForMaskedLM is not understood: {LOOKED}.* found bert.encoder.layer the attention of BertLayer is not cau",
    ),
    (
        unusual(AutoModelForCausalLM, "mamba", vocab_size=64, hidden_size=16, num_hidden_layers=2),
        "backbone .MambaModel. is not understood: looked for attention layers, whose cache counts its tokens; transfor",
    ),
    (
        unusual(AutoModelForCausalLM, "jamba", attn_layer_period=2, attn_layer_offset=1, num_experts=2, **_SIZES),
        "found model.layers holds modules of several classes .JambaAttentionDecoderLayer, JambaMambaDecoderLayer.",
    ),
    (
        unusual(AutoModelForCausalLM, "gpt_neo", vocab_size=64, hidden_size=16, num_layers=2, num_heads=2,
                attention_types=[[["global", "local"], 1]]),
        "transformer.h number 0, a GPTNeoBlock, should hold the layer_idx 0, and holds none",
    ),
    (Outer, f"Outer is not understood: {LOOKED}.* found 2: one.model.layers, other.model.layers"),
    (lambda: nn.Linear(2, 2), f"Linear is not understood: {LOOKED}.* found no list of modules at all"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=["t5", "bert", "mamba", "jamba", "gpt_neo", "two", "none"])
def test_a_model_that_is_not_understood(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(InjectionError, match=message):
        causal_lm_sites(make())


def test_the_language_model_beside_a_vision_tower() -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=8, patch_size=4)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=LlamaConfig(**_SIZES), vision_config=vision)).eval()
    assert [site.path for site in causal_lm_sites(model)] == [f"model.language_model.layers.{n}" for n in (0, 1)]
    with_ttt(model)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    want = model.generate(IDS[:, :5], use_cache=False, **options)
    assert torch.equal(model.generate(IDS[:, :5], **options), want)


def test_sites_of_a_model_that_has_ttt_already() -> None:
    model = build("llama")
    plain = causal_lm_sites(model)
    with_ttt(model, layers=(1,))
    assert [(site.path, site.dim) for site in causal_lm_sites(model)] == [(site.path, site.dim) for site in plain]
    with pytest.raises(InjectionError, match=r"model.layers.1.ttt is there already; eject the first injection"):
        with_ttt(model)


@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "torch.save"])
def test_a_copied_model(kind: str) -> None:
    model = build("llama")
    with_ttt(model)
    if kind == "deepcopy":
        copied = copy.deepcopy(model)
    elif kind == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    want = model(input_ids=IDS).logits
    assert torch.equal(copied(input_ids=IDS).logits, want)
    with torch.no_grad():
        copied.model.layers[0].ttt.gate.gating_alpha.zero_()
    assert torch.equal(model(input_ids=IDS).logits, want)
    assert not torch.equal(copied(input_ids=IDS).logits, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_another_type(dtype: torch.dtype) -> None:
    model = build("llama", dtype=torch.float32).to(dtype)
    with_ttt(model)  # its own parameters are in float32
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        first = read(model, IDS[:, :7])
        rest = read(model, IDS[:, 7:], cache_of(first)).logits
    assert rest.dtype == dtype
    assert difference(rest.float(), want[:, 7:].float()) < 0.05
    assert model.to(torch.bfloat16)(input_ids=IDS).logits.isfinite().all()  # and with all of it in bfloat16


def test_under_hooks_of_accelerate() -> None:
    """A model on several devices has them on its layers: `forward` of the objects."""
    hooks = pytest.importorskip("accelerate.hooks")

    def hooked(model: PreTrainedModel) -> None:
        for module in (model.model, *model.model.layers):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook(io_same_device=True))

    want, plain = build("llama"), build("llama")(input_ids=IDS).logits
    with_ttt(want)
    for before in (True, False):
        model = build("llama")
        if before:
            hooked(model)
        injection = with_ttt(model)
        if not before:
            hooked(model)
        assert torch.equal(model(input_ids=IDS).logits, want(input_ids=IDS).logits)
        injection.eject()
        assert torch.equal(model(input_ids=IDS).logits, plain)
        assert hasattr(model.model.layers[0], "_hf_hook")
        assert type(model.model.layers[0]).__name__ == "LlamaDecoderLayer"


def test_a_forward_that_something_else_has_replaced() -> None:
    model = build("llama")
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(
        InjectionError, match=r"model.layers.1: the forward of its LlamaDecoderLayer is replaced on the ob"
    ):
        with_ttt(model)
    assert type(model.model.layers[0]).__name__ == "LlamaDecoderLayer"


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # peft calls transformers by an old name
def test_beside_lora() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=r".*self_attn.q_proj", task_type="CAUSAL_LM", init_lora_weights=False)
    made = []
    for first in (True, False):
        torch.manual_seed(0)
        model: Any = build("llama")
        if not first:
            with_ttt(model)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, lora)
        if first:
            assert list(with_ttt(model).adapters) == [f"base_model.model.model.layers.{n}.ttt" for n in (0, 1)]
        made.append(model.eval())
    with torch.no_grad():
        one, other = (model(input_ids=IDS).logits for model in made)
    assert difference(one, other) < TOLERANCE
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    want = made[0].generate(input_ids=IDS, use_cache=False, **options)
    assert torch.equal(made[0].generate(input_ids=IDS, **options), want)


@pytest.mark.filterwarnings("ignore")
def test_compiled() -> None:
    """What dynamo makes of the passes, the layers and the states; the backend changes nothing of it."""
    model = build("llama", config={"num_hidden_layers": 1})
    with_ttt(model)
    compiled = torch.compile(model, backend="eager")
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with torch.no_grad():
        want = model(input_ids=IDS, attention_mask=mask).logits
        first = read(model, IDS[:, :7], attention_mask=mask[:, :7])
        rest = read(compiled, IDS[:, 7:], cache_of(first), attention_mask=mask)
    assert difference(rest.logits, want[:, 7:]) < TOLERANCE
