"""A model with TTT in PEFT's manner: wrapped, counted, closed, saved, loaded, unloaded; and what is refused."""

from __future__ import annotations

import copy
import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import forking
import pytest
import torch
from small_llama import logits, opened, small_llama, some_tokens
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers import LlamaModel as Decoder
from typer.testing import CliRunner

import ttt
from ttt.errors import AdapterFileError, AdapterMismatchError, InjectionError, UsageError
from ttt.hf import causal_lm_sites
from ttt.plugins import get_backbone
from ttt_cli.app import app

MIDDLE = ttt.TTTConfig(layers="middle")


def _flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def _left_as_it_was(model: nn.Module, before: dict[str, Any], flags: dict[str, bool], attributes: set[str]) -> None:
    """The model has its class, parameters, flags, hooks and attributes again."""
    assert type(model) is LlamaForCausalLM
    assert {type(module).__name__ for module in model.modules() if "TTT" in type(module).__name__} == set()
    assert _same(dict(model.state_dict()), before)
    assert _flags(model) == flags
    assert set(vars(model)) == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_readme_itself_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its block as it stands, but for a model of the hub and the arguments that it leaves to its reader."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    block = text.partition("## As a library")[2].partition("```python\n")[2].partition("```")[0]
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda name: small_llama())
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {"tokens": some_tokens()}
    assert "model.generate(...)" in block
    exec(block.replace("generate(...)", "generate(tokens, max_new_tokens=2, do_sample=False)"), known)
    assert isinstance(known["model"], ttt.TTTModel)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_lines_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tokens = small_llama(), some_tokens()
    flags = _flags(base)
    flags["lm_head.weight"] = False
    base.lm_head.requires_grad_(False)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    attributes, plain = set(vars(base)), logits(base, tokens)

    model = ttt.get_ttt_model(base, ttt.TTTConfig(layers="middle"))
    assert model is base
    assert isinstance(model, ttt.TTTModel)
    assert isinstance(model, PreTrainedModel)
    opened(model)

    model.print_trainable_parameters()
    told = capsys.readouterr().out
    assert told == (
        "trainable params: 9,384 || all params: 44,488 || trainable%: 21.0933\n"
        "TTT in 2 layers: 9,384; the rest is frozen: 35,104\n"
    )
    trained = {name for name, flag in _flags(model).items() if flag}
    assert trained
    assert all(".ttt." in name for name in trained)
    assert model.get_nb_trainable_parameters() == (9384, 44488)

    written = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False)
    adapted = logits(model, tokens)
    assert not torch.equal(adapted, plain)

    model.save_pretrained(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors")
    ]

    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), plain)
        closed = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False)
    assert torch.equal(logits(model, tokens), adapted)

    assert model.unload() is base
    _left_as_it_was(base, before, flags, attributes)
    plainly = base.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False)
    assert torch.equal(plainly, closed)

    loaded = ttt.TTTModel.from_pretrained(base, tmp_path / "out")
    assert torch.equal(logits(loaded, tokens), adapted)
    again = loaded.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False)
    assert torch.equal(again, written)
    assert loaded.ttt_config == MIDDLE
    assert list(loaded.injection.adapters) == ["model.layers.1.ttt", "model.layers.2.ttt"]


def _requires_the_same_bits(folder: str) -> None:
    """What a process does that knows nothing of this one but the files."""
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/elsewhere")
    model = ttt.TTTModel.from_pretrained(base, f"{folder}/out")
    given = torch.load(f"{folder}/expected.pt")
    assert torch.equal(logits(model, given["tokens"]), given["logits"])


def test_it_is_loaded_in_a_new_process_with_the_same_bits(tmp_path: Path) -> None:
    model, tokens = opened(ttt.get_ttt_model(small_llama(), MIDDLE)), some_tokens()
    base = copy.deepcopy(model).unload()
    base.save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path / "out")
    torch.save({"tokens": tokens, "logits": expected}, tmp_path / "expected.pt")
    (tmp_path / "base").rename(tmp_path / "elsewhere")  # which weights they are is known by the weights
    with forking.start(_requires_the_same_bits, str(tmp_path)) as process:
        assert process.wait(120) == 0, process.communicate(5)


def test_closing_nests_and_an_error_opens_the_gates_again() -> None:
    model, tokens = opened(ttt.get_ttt_model(small_llama(), MIDDLE)), some_tokens()
    adapted = logits(model, tokens)
    with model.disable_adapter():
        closed = logits(model, tokens)
        with pytest.raises(ZeroDivisionError), model.disable_adapter():
            1 / 0  # noqa: B018
        assert torch.equal(logits(model, tokens), closed)
    assert torch.equal(logits(model, tokens), adapted)
    assert not torch.equal(closed, adapted)


def test_what_is_trained_beside_ttt_is_told_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tokens = small_llama(), some_tokens()
    plain = logits(base, tokens)
    model = opened(ttt.get_ttt_model(base, MIDDLE))
    model.lm_head.weight.requires_grad_(True)
    model.print_trainable_parameters()
    assert "also trained: 2,048 of the backbone (lm_head.weight)" in capsys.readouterr().out
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "backbone_model.safetensors").is_file()
    loaded = ttt.TTTModel.from_pretrained(small_llama(), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded, tokens), expected)
    assert loaded.lm_head.weight.requires_grad
    frozen = ttt.TTTModel.from_pretrained(small_llama(), tmp_path)
    assert not any(_flags(frozen).values())
    frozen.save_pretrained(tmp_path / "again")  # what was trained once is saved, though it is frozen now
    assert torch.equal(logits(ttt.TTTModel.from_pretrained(small_llama(), tmp_path / "again"), tokens), expected)
    assert torch.equal(logits(frozen.unload(), tokens), plain)


def test_attention_that_is_limited_is_part_of_what_it_belongs_to(tmp_path: Path) -> None:
    base = small_llama()
    base.config._attn_implementation = "ttt_limited_sdpa_128_4"  # as ttt.hf.limit_attention leaves it
    ttt.get_ttt_model(base, MIDDLE).save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatchError, match=r"\(128, 4\) in the file, \(None, 0\) here; call ttt\.hf\.limit"):
        ttt.TTTModel.from_pretrained(small_llama(), tmp_path)


def test_tied_weights_and_bfloat16(tmp_path: Path) -> None:
    base = small_llama(tie_word_embeddings=True).to(torch.bfloat16)
    tokens = some_tokens()
    before, plain = {name: value.clone() for name, value in base.state_dict().items()}, logits(base, tokens)
    model = opened(ttt.get_ttt_model(base, MIDDLE))
    assert {p.dtype for name, p in model.named_parameters() if ".ttt." in name} == {torch.float32}
    adapted = logits(model, tokens)
    assert adapted.dtype == torch.bfloat16
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), plain)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "backbone_model.safetensors").exists()
    assert _same(dict(model.unload().state_dict()), before)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert torch.equal(logits(ttt.TTTModel.from_pretrained(base, tmp_path), tokens), adapted)


def test_the_decoder_alone_is_a_model_too() -> None:
    base, tokens = small_llama().model, some_tokens()
    plain = base(input_ids=tokens).last_hidden_state
    model = opened(ttt.get_ttt_model(base, MIDDLE))
    assert not torch.equal(model(input_ids=tokens).last_hidden_state, plain)
    assert type(model.unload()) is Decoder
    assert torch.equal(base(input_ids=tokens).last_hidden_state, plain)


def test_a_copy_is_a_model_of_its_own() -> None:
    model, tokens = opened(ttt.get_ttt_model(small_llama(), MIDDLE)), some_tokens()
    adapted = logits(model, tokens)
    copied = copy.deepcopy(model)
    assert isinstance(copied, ttt.TTTModel)
    opened(copied)
    assert not torch.equal(logits(copied, tokens), adapted)
    assert torch.equal(logits(model, tokens), adapted)
    assert type(copied.unload()) is LlamaForCausalLM
    assert isinstance(model, ttt.TTTModel)
    assert torch.equal(logits(model, tokens), adapted)


def test_it_is_not_pickled(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not pickled; write model\.save_pretrained"):
        torch.save(ttt.get_ttt_model(small_llama(), MIDDLE), tmp_path / "model.pt")


def test_its_forward_is_the_models_own() -> None:
    base = small_llama()
    own = inspect.signature(base.forward)
    model = ttt.get_ttt_model(base, MIDDLE)
    assert inspect.signature(model.forward) == own
    assert type(model).__name__ == "LlamaForCausalLM"  # by which transformers finds how to shift labels, and pipelines


def test_training_lowers_the_loss_and_leaves_the_backbone(tmp_path: Path) -> None:
    base, tokens = small_llama(), some_tokens(4)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = ttt.get_ttt_model(base, ttt.TTTConfig(layers="middle", mini_batch_size=4)).train()
    model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.02
    assert _same(dict(model.unload().state_dict()), before)


def test_seeds_draw_other_adapters_and_the_same_seed_the_same() -> None:
    drawn = [ttt.get_ttt_model(small_llama(), MIDDLE, seed=seed).injection.state_dict() for seed in (0, 1, 1)]
    assert _same(drawn[1], drawn[2])
    assert not _same(drawn[0], drawn[1])


def test_its_file_says_what_it_is(tmp_path: Path) -> None:
    opened(ttt.get_ttt_model(small_llama(), MIDDLE)).save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["info", str(tmp_path), "--json"])
    facts = json.loads(done.stdout)
    assert done.exit_code == 0
    assert facts["backbone"]["name"] == "transformers"
    assert facts["training"]["architecture"] == "llama"
    assert facts["parameters"] == 9384
    assert [site["name"] for site in facts["sites"]] == ["model.layers.1.ttt", "model.layers.2.ttt"]


def test_the_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = json.loads((Path(__file__).parent.parent / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for number, cell in enumerate(page["cells"]):
            assert cell.get("outputs", []) == []
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"notebook cell {number}", "exec"), names)
    assert type(names["base"]) is LlamaForCausalLM
    assert (tmp_path / names["folder"] / "adapter_model.safetensors").is_file()


# --- other models ---


def test_the_backbone_of_a_plugin_is_recognised(tmp_path: Path) -> None:
    backbone = get_backbone("videodit")  # and Moshi with its run, in the tests of model cards
    base = backbone.build(backbone.tiny(), device="cpu", dtype=torch.float32)
    batch = backbone.example_batch(base, batch_size=1, tokens=8, seed=0)
    plain = backbone.outputs(base, batch)
    model = opened(ttt.get_ttt_model(base))  # the plugin's own settings
    assert model.ttt_config == ttt.TTTConfig(**backbone.ttt_defaults)
    adapted = backbone.outputs(model, batch)
    assert not torch.equal(adapted, plain)
    model.save_pretrained(tmp_path)
    assert torch.equal(backbone.outputs(model.unload(), batch), plain)
    loaded = ttt.TTTModel.from_pretrained(base, tmp_path)
    assert torch.equal(backbone.outputs(loaded, batch), adapted)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class _BlockWithTTT(_Block):
    ttt: ttt.TTTAdapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ttt(super().forward(x))


def test_any_model_with_sites(tmp_path: Path) -> None:
    def made() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(_Block(), _Block())

    def sites(model: nn.Sequential) -> list[ttt.Site]:
        return [
            ttt.Site(layer=n, path=str(n), module=block, dim=8, num_heads=2, subclass=_BlockWithTTT)
            for n, block in enumerate(model)
        ]

    base, x = made(), torch.randn(1, 6, 8)
    plain = base(x)
    model = opened(ttt.get_ttt_model(base, ttt.TTTConfig(), sites=sites(base)))
    adapted = model(x)
    assert not torch.equal(adapted, plain)
    model.save_pretrained(tmp_path)
    other = made()
    loaded = ttt.TTTModel.from_pretrained(other, tmp_path, sites=sites(other))
    assert torch.equal(loaded(x), adapted)
    assert torch.equal(loaded.unload()(x), plain)
    with pytest.raises(InjectionError, match="none of the installed backbones knows it"):
        ttt.TTTModel.from_pretrained(made(), tmp_path)


# --- what is refused ---


def _meta() -> Any:
    with torch.device("meta"):
        return small_llama()


def _injected() -> Any:
    base = small_llama()
    ttt.inject.apply(base, causal_lm_sites(base), MIDDLE)
    return base


REFUSED = {
    "a name": (lambda: "org/model", MIDDLE, "goes into a model .* not str 'org/model'; load it first"),
    "a config as a mapping": (small_llama, {"layers": "all"}, "config must be a ttt.TTTConfig, not dict"),
    "TTT put in otherwise": (_injected, MIDDLE, "put in by ttt.inject or a plugin; eject that first"),
    "no layer": (small_llama, ttt.TTTConfig(layers="none"), "names no layer"),
    "a layer that is not there": (small_llama, ttt.TTTConfig(layers=(9,)), "layer 9 does not exist"),
    "an update that sees ahead": (
        small_llama,
        ttt.TTTConfig(preset="video", rope="none"),
        "causal: false on a causal backbone",
    ),
    "twice": (lambda: ttt.get_ttt_model(small_llama(), MIDDLE), MIDDLE, r"already; call model\.unload\(\) first"),
    "no values": (_meta, MIDDLE, "on the device meta"),
    "not understood": (lambda: nn.Linear(2, 2), MIDDLE, "no model of transformers; none of the installed backbones"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_sentence_says_why_it_is_refused(case: str) -> None:
    make, config, words = REFUSED[case]
    model = make()
    before = type(model)
    with pytest.raises(UsageError, match=words) as raised:
        ttt.get_ttt_model(model, config)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
    assert type(model) is before


def test_wrong_types_are_told() -> None:
    with pytest.raises(UsageError, match="seed must be a whole number, not 'a'"):
        ttt.get_ttt_model(small_llama(), MIDDLE, seed="a")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"sites must be ttt\.Site objects"):
        ttt.get_ttt_model(small_llama(), MIDDLE, sites=["model.layers.0"])  # type: ignore[list-item]
    for name in (7, "", None):
        with pytest.raises(UsageError, match="named by its folder or its repository"):
            ttt.TTTModel.from_pretrained(small_llama(), name)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="goes into a model"):
        ttt.TTTModel.from_pretrained("org/base", "out")  # type: ignore[arg-type]


def test_a_refused_model_is_left_as_it_was() -> None:
    base = small_llama()
    flags, attributes = _flags(base), set(vars(base))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(InjectionError):
        ttt.get_ttt_model(base, ttt.TTTConfig(layers=(1, 9)))
    _left_as_it_was(base, before, flags, attributes)


def test_an_adapter_is_refused_by_what_it_does_not_belong_to(tmp_path: Path) -> None:
    opened(ttt.get_ttt_model(small_llama(), MIDDLE)).save_pretrained(tmp_path)
    for base, words in (
        (small_llama(seed=1), "the backbone's weights: other values here"),
        (small_llama(layers=8), "ttt.layers: .1, 2. in the file, .2, 3, 4, 5. here"),
    ):
        flags, attributes = _flags(base), set(vars(base))
        before = {name: value.clone() for name, value in base.state_dict().items()}
        with pytest.raises(AdapterMismatchError, match=words):
            ttt.TTTModel.from_pretrained(base, tmp_path)
        _left_as_it_was(base, before, flags, attributes)
    with pytest.raises(UsageError, match="there is TTT in this model already"):
        ttt.TTTModel.from_pretrained(ttt.get_ttt_model(small_llama(), MIDDLE), tmp_path)
    with pytest.raises(AdapterFileError, match="holds no adapter_model"):
        ttt.TTTModel.from_pretrained(small_llama(), tmp_path.parent)


def test_after_unload_it_is_the_backbone_that_is_trained() -> None:
    model = ttt.get_ttt_model(small_llama(), MIDDLE)
    unload = model.unload
    base, tokens = model.unload(), some_tokens()
    with pytest.raises(AttributeError):
        base.unload()
    with pytest.raises((UsageError, AttributeError)):
        unload()
    base(input_ids=tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in base.parameters())
    model = ttt.get_ttt_model(base, MIDDLE)  # and TTT can go in again
    assert isinstance(model, ttt.TTTModel)
    model.resize_token_embeddings(72)  # makes new parameters
    assert all(parameter.requires_grad for parameter in model.unload().parameters())


def test_it_is_made_of_a_model_only() -> None:
    with pytest.raises(UsageError, match=r"made by ttt\.get_ttt_model"):
        ttt.TTTModel()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"is_main_proces": True}, "knows no argument is_main_proces; did you mean is_main_process"),
        ({"safe_serialization": False}, "would write a pickle"),
        ({"variant": "fp16"}, "takes no variant"),
        ({"selected_adapters": ["default"]}, "selected_adapters is for PEFT's adapters"),
        ({"repo_id": "me/it"}, "repo_id acts with push_to_hub=True only"),
        ({"state_dict": {"a": torch.ones(1)}}, r"does not hold model\.layers\.1\.ttt"),
    ],
)
def test_options_of_saving_act_or_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = ttt.get_ttt_model(small_llama(), MIDDLE)
    with pytest.raises(UsageError, match=words):
        model.save_pretrained(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_transformers_and_accelerate_give_is_taken(tmp_path: Path) -> None:
    model = ttt.get_ttt_model(small_llama(), MIDDLE)
    model.save_pretrained(tmp_path / "not", is_main_process=False)
    assert not (tmp_path / "not").exists()
    values = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(
        str(tmp_path), state_dict=values, save_function=torch.save, max_shard_size="5GB", is_main_process=True
    )
    loaded = ttt.TTTModel.from_pretrained(small_llama(), str(tmp_path))
    assert all(torch.equal(value, values[name]) for name, value in loaded.injection.state_dict().items())
    for wrong in ("", 7, tmp_path / "README.md"):
        with pytest.raises(UsageError, match="save_pretrained"):
            model.save_pretrained(wrong)
