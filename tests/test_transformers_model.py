"""Models of `transformers` as a backbone: built from a config, a folder or the hub, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_language_model import SIZES, save_tiny_model

from ttt import inject
from ttt.adapter_file import backbone_identity
from ttt.check import check_config
from ttt.config import RunConfig
from ttt.errors import EnvironmentProblem, InjectionError, UsageError
from ttt.hf.hub import loading
from ttt.laws import LAWS, Bench
from ttt.plugins import get_backbone, run_config_model

BACKBONE = get_backbone("transformers")
THREE = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
FAMILIES = ("mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt_neox", "gpt2")


def _options(**options: Any) -> Any:
    return BACKBONE.options.model_validate({"name": "transformers", **options})


def _build(device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return BACKBONE.build(_options(**options), device=device, dtype=dtype)


def _run(**options: Any) -> RunConfig[Any, Any]:
    return run_config_model(BACKBONE).model_validate({"backbone": {"name": "transformers", **options}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


# --- random models ---


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_small_unless_sizes_are_written_and_keeps_some_laws(kind: str) -> None:
    options = _options(config={"model_type": kind, **THREE, "vocab_size": 64})
    bench = Bench(BACKBONE, options=options, tokens=9, batch_size=2)
    facts = BACKBONE.facts(_run(config={"model_type": kind}))
    sites = BACKBONE.sites(_build("meta", config={"model_type": kind}))
    assert (facts.num_layers, facts.dim, facts.num_heads) == (len(sites), sites[0].dim, sites[0].num_heads)
    LAWS[3](bench, tokens=(4,))
    LAWS[4](bench, mini_batch_sizes=(4,), cuts=((1, 5, 3),), layers=False)
    LAWS[6](bench, dtypes=(torch.float32,))


def test_a_random_model_is_that_of_its_config_and_seed() -> None:
    config = {"model_type": "llama", **THREE, "intermediate_size": 48, "rope_theta": 500.0, "tie_word_embeddings": True}
    model, again, other = (_build(config=config, seed=seed) for seed in (1, 1, 2))
    assert model.config.intermediate_size == 48
    assert model.config.rope_parameters["rope_theta"] == 500.0
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert {p.dtype for p in _build(dtype=torch.bfloat16, config=config).parameters()} == {torch.bfloat16}
    assert all(p.is_meta for p in _build("meta", config=config).parameters())


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "lama"}, r"transformers has no architecture 'lama'; did you mean llama\?"),
        ({"model_type": "llama", "hiden_size": 3}, r"of llama has no 'hiden_size'; did you mean hidden_size\?"),
        ({"model_type": "gpt2", "rope_theta": 3.0}, "of gpt2 has no 'rope_theta'"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "llama cannot have such a config"),
        ({"model_type": "t5"}, "t5 is not a causal language model: AutoModelForCausalLM of transformers has none"),
        ({"model_type": "vit"}, "vit is not a causal language model"),
    ],
)
def test_a_config_that_no_model_has_is_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told) as error:
        _build(config=config)
    assert str(error.value).startswith("backbone.")
    assert len(str(error.value).splitlines()) == 1


def test_a_structure_that_is_not_understood_is_refused_in_the_words_of_the_sites() -> None:
    model = _build(config={"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2})  # it has no attention
    with pytest.raises(InjectionError, match="Mamba"):
        BACKBONE.sites(model)


# --- pretrained models ---


def test_a_folder_is_loaded_as_it_was_saved(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    saved = LlamaForCausalLM.from_pretrained(folder).state_dict()
    model = _build(model=str(folder), attn_implementation="eager")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == "eager"
    assert not model.training
    assert [*_build("meta", model=str(folder)).state_dict()] == [*saved]
    facts = BACKBONE.facts(_run(model=str(folder)))
    assert (facts.dim, facts.num_heads, facts.num_layers) == (32, 2, 2)
    assert BACKBONE.provenance(_options(model=str(folder))) == {}


@pytest.mark.parametrize("name", ["flash_attention_2", "nonsense"])
def test_attention_that_is_not_there_is_named_with_its_key(name: str) -> None:
    with pytest.raises(UsageError, match=f"^backbone.attn_implementation: {name} cannot be used here: .*; write sdpa"):
        _build(config={"model_type": "llama"}, attn_implementation=name)


def test_a_config_beside_a_model_must_be_the_models(folder: Path) -> None:
    fine = {**SIZES, "model_type": "llama", "rope_theta": 10000.0}
    assert _build(model=str(folder), config=fine).config.hidden_size == 32
    for key, value, told in (
        ("hidden_size", 64, "hidden_size is 64, and .* has 32"),
        ("model_type", "mistral", "model_type is 'mistral', and .* has 'llama'"),
        ("rope_theta", 5.0, "rope_theta is 5.0, and .* has 10000.0"),
        ("hiden_size", 32, "hiden_size is 32, and .* has no such key"),
    ):
        for device in ("cpu", "meta"):
            with pytest.raises(UsageError, match=rf"backbone\.config: {told}; write the loaded model's settings"):
                _build(device, model=str(folder), config={**fine, key: value})


def test_an_adapter_of_a_pretrained_model_is_of_its_weights_and_not_of_where_they_are(folder: Path) -> None:
    plain = backbone_identity(BACKBONE, _options(model=str(folder)))
    assert plain == backbone_identity(BACKBONE, _options(model="a/b", revision="c", config=dict(THREE)))
    assert plain != backbone_identity(BACKBONE, _options(model=str(folder), attention_window=8))
    random = [backbone_identity(BACKBONE, _options(config={"model_type": "llama"}, seed=seed)) for seed in (0, 1)]
    assert random[0] != random[1]


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}), encoding="utf-8")
    with pytest.raises(EnvironmentProblem, match=r"lacks 9 tensors of a LlamaForCausalLM: model\.layers\.2\."):
        _build(model=str(tmp_path))


def test_a_pointer_of_git_lfs_in_place_of_weights_is_named(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 153\n", encoding="utf-8")
    with pytest.raises(EnvironmentProblem) as refused:
        _build(model=str(tmp_path))
    told = (
        f"cannot be loaded: its {weights.name} is a git-lfs pointer to a file of 153 bytes; fetch the file itself: git"
    )
    assert told in str(refused.value)


def test_a_folder_without_a_model_is_one_sentence(tmp_path: Path) -> None:
    for broken in ("", "{", '{"model_type": "llama"}'):
        if broken:
            (tmp_path / "config.json").write_text(broken, encoding="utf-8")
        with pytest.raises(EnvironmentProblem, match=rf"^backbone\.model: {tmp_path} cannot be loaded: ") as error:
            _build(model=str(tmp_path))
        assert len(str(error.value).splitlines()) == 1
    for content, told in (("{", "is not JSON"), ("[]", "holds no object"), ("{}", "its config.json does not say it")):
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(EnvironmentProblem, match=told):
            BACKBONE.facts(_run(model=str(tmp_path)))


def test_a_model_that_is_nowhere_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentProblem, match="nobody/nothing cannot be loaded: it is no folder here and not"):
        _build(model="nobody/nothing")
    with pytest.raises(EnvironmentProblem, match="there is no such folder here, and the hub's cache does not have it"):
        BACKBONE.facts(_run(model="nobody/nothing"))
    # With its sizes in the config neither a check nor the structure needs it.
    assert BACKBONE.facts(_run(model="nobody/nothing", config=dict(THREE))).dim == 32
    meta = _build("meta", model="nobody/nothing", config={"model_type": "llama", **THREE})
    assert len(BACKBONE.sites(meta)) == 2
    (finding,) = [
        each
        for each in check_config(
            "a.yaml", text="backbone: {name: transformers, model: nobody/nothing}\ndata: {train_data: ., eval_data: .}"
        ).findings
        if each.code == "TTT605"
    ]
    assert finding.path == "backbone.model"


def test_the_hubs_cache_tells_sizes_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, cache = "c" * 40, tmp_path / "models--a--b"
    (cache / "snapshots" / commit).mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit, encoding="utf-8")
    sizes = {"n_embd": 48, "n_head": 3, "n_layer": 5, "n_positions": 64}  # as files of GPT-2 have them
    (cache / "snapshots" / commit / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision in (None, "main", commit):
        options = _options(model="a/b", revision=revision)
        assert BACKBONE.provenance(options) == {"repository": "a/b", "commit": commit}
        facts = BACKBONE.facts(_run(model="a/b", revision=revision))
        assert (facts.dim, facts.num_heads, facts.num_layers) == (48, 3, 5)
    assert BACKBONE.provenance(_options(model="a/b", revision="other")) == {"repository": "a/b"}
    text = json.dumps(
        {
            "backbone": {"name": "transformers", "model": "a/b", "config": {"hidden_size": 64}},
            "data": {"train_data": str(tmp_path), "window_tokens": 128},
        }
    )
    found = {each.code: each.message for each in check_config("a.yaml", text=text).findings}
    assert "hidden_size is 64, and a/b has 48" in found["HF102"]
    assert "made for 64 positions" in found["HF301"]
    assert "holds no .txt or .md or .jsonl or .parquet file" in found["HF502"]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("GatedRepoError", "its authors want to know who downloads it; accept its terms on its page"),
        ("RevisionNotFoundError", "it has no branch, tag or commit 'abc'; name another revision"),
        ("RepositoryNotFoundError", "no such repository on the hub that you may read; correct the name"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(kind: str, told: str) -> None:
    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, request=None)
    refused = OSError("many\nlines")
    refused.__cause__ = getattr(errors, kind)("no\nway", response=response)
    with pytest.raises(EnvironmentProblem, match=f"a/b cannot be loaded: .*{told}"), loading("a/b", "abc"):
        raise refused


def test_attention_that_is_limited_forgets_and_is_part_of_the_model(folder: Path) -> None:
    plain, limited = (_build(model=str(folder), attention_window=window) for window in (None, 4))
    tokens = torch.arange(40)[None]
    changed = tokens.clone()
    changed[:, 2] = 99
    for model, forgets in ((plain, False), (limited, True)):
        with torch.no_grad():
            ends = [model(input_ids=each).logits[0, -1] for each in (tokens, changed)]
        assert torch.equal(*ends) is forgets


def test_gradient_checkpointing_reaches_a_frozen_model(folder: Path) -> None:
    model = _build(model=str(folder)).requires_grad_(False)
    injection = inject.apply(model, BACKBONE.sites(model), _run(model=str(folder)).ttt, causal=True, seed=0)
    batch = BACKBONE.example_batch(model, batch_size=1, tokens=8, seed=0)
    found = []
    for enabled in (False, True):
        BACKBONE.set_gradient_checkpointing(model, enabled)
        model.train()
        BACKBONE.loss(model, batch, _run(model=str(folder))).loss.backward()
        found.append([p.grad.clone() for adapter in injection.adapters.values() for p in adapter.parameters()])
        model.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert BACKBONE.is_attention("model.layers.0.self_attn.q_proj.weight")
    assert not BACKBONE.is_attention("model.layers.0.post_attention_layernorm.weight")


@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox", "phi3"])
def test_lora_goes_into_the_linear_layers_that_are_named(kind: str) -> None:
    model = _build("meta", config={"model_type": kind, **THREE, "vocab_size": 64})
    found = {
        linears: [site.path for site in BACKBONE.lora_sites(model, linears)]  # type: ignore[attr-defined]
        for linears in ("all", "transformer", "attention", "feed_forward")
    }
    assert sorted(found["transformer"]) == sorted(found["attention"] + found["feed_forward"])
    assert len(set(found["all"]) - set(found["transformer"])) == 1  # the output head
    assert found["attention"]
    assert all("attn" in path or "attention" in path for path in found["attention"])
    assert not any("attn" in path or "attention" in path for path in found["feed_forward"])


def test_lora_is_refused_where_there_is_no_linear_layer() -> None:
    model = _build("meta", config={"model_type": "gpt2", **THREE, "vocab_size": 64})
    with pytest.raises(UsageError, match=r"lora.linears: attention: GPT2LMHeadModel has no torch.nn.Linear there"):
        BACKBONE.lora_sites(model, "attention")  # type: ignore[attr-defined]
