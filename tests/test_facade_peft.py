"""LoRA and TTT in one model, in either order: both are trained, saved, loaded, and each is taken out alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from small_llama import logits, opened, small_llama, some_tokens
from torch import nn
from transformers import LlamaForCausalLM

import ttt
from ttt.adapter import gates_closed
from ttt.config.lora import LoraSettings
from ttt.errors import AdapterMismatchError, UsageError
from ttt.lora import Lora, LoraPlan
from ttt.plugins import LoraSite

MIDDLE = ttt.TTTConfig(layers="middle")

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def _lora(targets: Any = ("q_proj", "v_proj"), **settings: Any) -> LoraConfig:
    targets = targets if isinstance(targets, str) else list(targets)
    return LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **settings)


def _moved(model: nn.Module) -> Any:
    """LoRA moved from where it starts, where it does nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def _lora_first(targets: Any = ("q_proj", "v_proj")) -> Any:
    return opened(ttt.get_ttt_model(_moved(get_peft_model(small_llama(), _lora(targets))), MIDDLE))


def _ttt_first(targets: Any = ("q_proj", "v_proj")) -> Any:
    return _moved(get_peft_model(opened(ttt.get_ttt_model(small_llama(), MIDDLE)), _lora(targets)))


def _trained(model: nn.Module) -> set[str]:
    """Whose parameters are trained."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {"lora" if "lora_" in name else "ttt" if ".ttt." in name else name for name in names}


def _files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


BOTH = [
    *("README.md", "adapter_config.json", "adapter_model.safetensors"),
    *("ttt/README.md", "ttt/adapter_config.json", "ttt/adapter_model.safetensors"),
]


@pytest.mark.parametrize("made", [_lora_first, _ttt_first, lambda: ttt.get_ttt_model(_ttt_first())])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear"])
def test_both_are_trained_saved_and_loaded(made: Any, targets: Any, tmp_path: Path) -> None:
    model, tokens = made() if "lambda" in made.__name__ else made(targets), some_tokens()
    assert isinstance(model, PeftModel)
    assert _trained(model) == {"lora", "ttt"}
    assert not any("lora" in name and ".ttt." in name for name, _ in model.named_parameters())
    both = logits(model, tokens)
    model.save_pretrained(tmp_path)
    assert _files(tmp_path) == BOTH
    loaded = ttt.TTTModel.from_pretrained(small_llama(), tmp_path)
    assert isinstance(loaded, PeftModel)
    assert isinstance(loaded, ttt.TTTModel)
    assert torch.equal(logits(loaded, tokens), both)
    assert _trained(loaded) == set()
    peft = PeftModel.from_pretrained(small_llama(), str(tmp_path), is_trainable=True)
    further = ttt.TTTModel.from_pretrained(peft, tmp_path, is_trainable=True)
    assert torch.equal(logits(further, tokens), both)
    assert _trained(further) == {"lora", "ttt"}


def test_ttt_beside_lora_is_refused_without_it(tmp_path: Path) -> None:
    _lora_first().save_pretrained(tmp_path / "both")
    ttt.get_ttt_model(small_llama(), MIDDLE).save_pretrained(tmp_path / "alone")
    plain = small_llama()
    with pytest.raises(AdapterMismatchError, match="what PEFT put into the backbone: LORA in the file, nothing here"):
        ttt.TTTModel.from_pretrained(plain, tmp_path / "both" / "ttt")
    assert type(plain) is LlamaForCausalLM
    with pytest.raises(AdapterMismatchError, match="nothing in the file, LORA here"):
        ttt.TTTModel.from_pretrained(get_peft_model(small_llama(), _lora()), tmp_path / "alone")


def test_if_ttt_does_not_fit_lora_is_taken_out_again(tmp_path: Path) -> None:
    _lora_first().save_pretrained(tmp_path)
    base = small_llama(seed=1)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(AdapterMismatchError, match="the backbone's weights: other values"):
        ttt.TTTModel.from_pretrained(base, tmp_path)
    assert list(base.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not hasattr(base, "peft_config")
    ttt.get_ttt_model(base, MIDDLE)


def test_each_is_taken_out_alone() -> None:
    tokens = some_tokens()
    peft = _moved(get_peft_model(small_llama(), _lora()))
    with_lora = logits(peft, tokens)
    kind, flags = type(peft), {name: p.requires_grad for name, p in peft.named_parameters()}
    model = opened(ttt.get_ttt_model(peft, MIDDLE))
    assert model is peft
    both = logits(model, tokens)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), with_lora)
    assert model.unload() is peft
    assert type(peft) is kind
    assert {name: p.requires_grad for name, p in peft.named_parameters()} == flags
    assert torch.equal(logits(peft, tokens), with_lora)
    opened(ttt.get_ttt_model(peft, MIDDLE))
    assert torch.equal(logits(peft, tokens), both)


@pytest.mark.parametrize("made", [_lora_first, _ttt_first, lambda: ttt.get_ttt_model(_ttt_first())])
def test_lora_is_merged_with_ttt_in_place(made: Any, tmp_path: Path) -> None:
    model, tokens = made(), some_tokens()
    both, weights = logits(model, tokens), copy.deepcopy(model).merge_and_unload().unload()
    merged = model.merge_and_unload()
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert isinstance(merged, ttt.TTTModel)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert torch.allclose(logits(merged, tokens), both, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert "peft" not in ttt.TTTModel.from_pretrained(weights, tmp_path)._attached().backbone
    assert torch.equal(logits(weights, tokens), logits(merged, tokens))
    assert type(merged.unload()) is LlamaForCausalLM


def test_an_adapter_of_peft_that_comes_later_leaves_ttt_alone(tmp_path: Path) -> None:
    model = ttt.get_ttt_model(_ttt_first())
    model.add_adapter("second", _lora("all-linear"))
    assert _trained(model) == {"lora", "ttt"}
    model.set_adapter("second")
    model.merge_adapter()
    with pytest.raises(UsageError, match=r"is merged into the backbone's weights.* call unmerge_adapter\(\) before"):
        model.save_pretrained(tmp_path)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    assert {"second/adapter_model.safetensors", "ttt/adapter_model.safetensors"} < set(_files(tmp_path))
    plainly = _ttt_first()  # PEFT's own wrapper
    plainly.add_adapter("second", _lora("all-linear"))
    plainly.set_adapter("second")
    tokens = some_tokens()
    plainly(input_ids=tokens, labels=tokens).loss.backward()
    assert not [name for name, parameter in plainly.named_parameters() if ".ttt." in name and parameter.grad is None]
    plainly.set_adapter("default")
    plainly.save_pretrained(tmp_path / "plainly")
    again = ttt.TTTModel.from_pretrained(small_llama(), tmp_path / "plainly")
    assert torch.equal(logits(again, some_tokens()), logits(plainly, some_tokens()))


def test_a_copy_that_peft_trains_is_of_the_backbone_alone(tmp_path: Path) -> None:
    settings = _lora(modules_to_save=["o_proj"])
    model = _moved(get_peft_model(opened(ttt.get_ttt_model(small_llama(), MIDDLE)), settings))
    trained = [name for name, parameter in model.named_parameters() if ".ttt." in name and parameter.requires_grad]
    assert any(name.endswith("ttt.layer.o_proj.weight") for name in trained)
    assert not [name for name in trained if "modules_to_save" in name]
    model.save_pretrained(tmp_path)
    again = ttt.TTTModel.from_pretrained(small_llama(), tmp_path)
    assert torch.equal(logits(again, some_tokens()), logits(model, some_tokens()))


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # PEFT says it
def test_prompt_learning(tmp_path: Path) -> None:
    tokens, prompt = some_tokens(), {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    inside = opened(ttt.get_ttt_model(small_llama(), MIDDLE))
    model = ttt.get_ttt_model(get_peft_model(inside, PromptTuningConfig(**prompt)))
    assert {name.partition(".")[0] for name in _trained(model)} == {"ttt", "prompt_encoder"}
    model.save_pretrained(tmp_path)
    again = ttt.TTTModel.from_pretrained(small_llama(), tmp_path)
    assert torch.equal(logits(again.eval(), tokens), logits(model.eval(), tokens))
    prefix = get_peft_model(opened(ttt.get_ttt_model(small_llama(), MIDDLE)), PrefixTuningConfig(**prompt))
    with pytest.raises(UsageError, match=r"holds 3 tokens, of which the TTT layer . has read 0: .*prefix tuning"):
        logits(prefix, tokens)


def test_the_model_inside_is_unloaded_and_lora_stays() -> None:
    peft = _ttt_first()
    inner = peft.get_base_model()
    inner.unload()
    assert type(inner) is LlamaForCausalLM
    assert _trained(peft) == {"lora"}
    assert type(peft.peft_config["default"]) is LoraConfig


def test_wrong_calls_are_one_sentence(tmp_path: Path) -> None:
    model = _ttt_first()
    with pytest.raises(UsageError, match="there is TTT with other settings inside this model of PEFT"):
        ttt.get_ttt_model(model, ttt.TTTConfig(layers="all"))
    lifted = ttt.get_ttt_model(model, MIDDLE)
    with pytest.raises(UsageError, match="there is TTT in this model already"):
        ttt.get_ttt_model(lifted)
    named = get_peft_model(small_llama(), _lora(), adapter_name="ttt")
    with pytest.raises(UsageError, match="PEFT's adapter 'ttt' is saved where TTT's files go"):
        ttt.get_ttt_model(named, MIDDLE).save_pretrained(tmp_path)
    added = small_llama()
    added._hf_peft_config_loaded = True  # as add_adapter leaves it
    with pytest.raises(UsageError, match=r"got its LoRA by model\.add_adapter"):
        ttt.get_ttt_model(added, MIDDLE)
    later = ttt.get_ttt_model(small_llama(), MIDDLE)
    later._hf_peft_config_loaded = True
    with pytest.raises(UsageError, match=r"got its LoRA by model\.add_adapter"):
        later.save_pretrained(tmp_path)


def test_pefts_own_wrapper_says_that_it_loads_its_part_alone(tmp_path: Path) -> None:
    model = _ttt_first()
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="leaves TTT as it is; to load both"):
        model.load_adapter(str(tmp_path), "default")
    lifted, expected = ttt.get_ttt_model(_ttt_first()), logits(model, some_tokens())
    opened(lifted)
    lifted.load_adapter(str(tmp_path), "default", is_trainable=True)  # without a warning, which would be an error
    assert torch.equal(logits(lifted, some_tokens()), expected)
    assert _trained(lifted) == {"lora", "ttt"}


def test_the_lora_of_configs_computes_what_pefts_does() -> None:
    """`adapter: lora` has a LoRA of its own, in which each parameter keeps its name."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20))
    theirs: Any = inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=["0"]), copy.deepcopy(model))
    lora = Lora(model, LoraPlan((LoraSite("0", model[0]),), LoraSettings(3, 2.0, "all")))
    _moved(model)
    named = {f"{name.removesuffix('weight')}default.weight": value for name, value in lora.parameters().items()}
    assert not theirs.load_state_dict(named, strict=False).unexpected_keys
    x = torch.randn(4, 12)
    assert torch.allclose(model(x), theirs(x), rtol=0, atol=1e-7)
    with gates_closed(model):
        assert not torch.allclose(model(x), theirs(x), rtol=0, atol=1e-7)
