"""Other models of kyutai's, their LoRA, and files that are not what their keys name: understood, or one sentence."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from moshi.models import LMModel, loaders
from moshi.modules.transformer import StreamingTransformer, StreamingTransformerLayer
from safetensors.torch import load_file, save_file
from tiny_moshi import checkpoint, config_json, language_model, lora, mimi, mimi_config

from ttt import inject, load_adapter
from ttt.adapter_file import save_adapter
from ttt.check import check_config
from ttt.config import RunConfig, TTTConfig
from ttt.errors import AdapterMismatchError, EnvironmentProblem
from ttt.plugins import get_backbone
from ttt_cli.main import main
from ttt_moshi import demo
from ttt_moshi.model_config import PUBLISHED, ModelConfig, lm_settings
from ttt_moshi.options import MoshiData, MoshiOptions
from ttt_moshi.weights import checkpoint_info, load_mimi, load_moshi, load_tokenizer, model_config

MOSHI = get_backbone("moshi")


def options(files: dict[str, str], **more: Any) -> MoshiOptions:
    checkpoint_info.cache_clear()  # the same names may lead to other files
    return MoshiOptions(preset="7b", **{**files, **more})


def load(files: dict[str, str], **more: Any) -> LMModel:
    return load_moshi(options(files, **more), device="cpu", dtype=torch.float32)


def findings(files: dict[str, str], folder: Path, **more: str) -> list[tuple[str, str]]:
    """Key, message and fix of each error that `ttt check` finds; the same ends `ttt train` with 3."""
    (folder / "data").mkdir(exist_ok=True)
    named = "".join(f"  {key}: {path}\n" for key, path in {**files, **more}.items())
    text = f"backbone:\n  name: moshi\n  preset: 7b\n{named}data: {{train_data: {demo.EVAL_DATA}}}\n"
    (folder / "c.yaml").write_text(text)
    found = check_config(folder / "c.yaml").findings
    return [(one.path, f"{one.message}; {one.fix}") for one in found if one.severity.value == "error"]


# --- what kyutai's package takes ---


def test_the_keys_of_a_config_json_are_those_that_kyutais_package_reads() -> None:
    """With another version of the package this says which keys have come or gone."""
    made = {"device", "dtype", "condition_provider", "d_model", "dim_feedforward", "activation", "rope", "layer_class"}
    made |= {"checkpointing", "args", "kwargs", "self"}
    read = {name for name in inspect.signature(LMModel.__init__).parameters if name not in made}
    of_layers = set[str]()
    for part in (StreamingTransformer, StreamingTransformerLayer):
        of_layers |= set(inspect.signature(part.__init__).parameters) - made
    loader = (
        set(ModelConfig.model_fields)
        - read
        - of_layers
        - {name for name in ModelConfig.model_fields if name.startswith("depformer_")}
    )
    assert read | of_layers <= set(ModelConfig.model_fields) | {"num_heads"}
    assert loader == {
        *("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name", "model_type"),
        *("lm_gen_config", "tts_config", "stt_config", "model_id", "lora", "lora_rank", "lora_scaling"),
        *("conditioners", "demux_second_stream"),
    }  # fmt: skip
    for name in ModelConfig.model_fields:
        if name.startswith("depformer_") and name not in read:
            assert name.removeprefix("depformer_") in of_layers, name
    for name in ("dim", "num_heads", "num_layers", "n_q", "dep_q", "card", "text_card", "context"):
        assert getattr(PUBLISHED, name) == loaders._lm_kwargs[name]
    assert list(PUBLISHED.delays) == loaders._lm_kwargs["delays"]
    assert ModelConfig.model_validate(loaders._lm_kwargs).existing_text_padding_id == 3


# --- LoRA ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_is_merged_as_kyutais_loader_merges_it(tmp_path: Path, dtype: torch.dtype) -> None:
    files = checkpoint(tmp_path, lora=True, lora_rank=3, lora_scaling=1.5)
    config = json.loads(Path(files["config_path"]).read_text())
    save_file(lora(config), tmp_path / "lora.safetensors")
    chosen = options(files, lora_path=str(tmp_path / "lora.safetensors"))
    found = load_moshi(chosen, device="cpu", dtype=dtype).state_dict()
    expected = checkpoint_info(chosen).get_moshi(device="cpu", dtype=dtype, fuse_lora=True).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    plain = load_file(files["moshi_path"])
    changed = [name for name in plain if not torch.equal(plain[name].to(dtype), found[name])]
    assert len(changed) == sum(name.endswith("lora_A.weight") for name in lora(config))


def test_a_lora_of_some_linears_with_whole_embeddings_and_older_names(tmp_path: Path) -> None:
    """As with `ft_embed`; and as older versions of kyutai's package named attention, for the depformer stacked."""
    files = checkpoint(tmp_path)
    config = json.loads(Path(files["config_path"]).read_text())
    whole, text = lora(config), torch.randn(301, 32)
    kept = {name: tensor for name, tensor in whole.items() if "in_projs" in name}
    stacked = torch.cat([kept[f"depformer.layers.0.self_attn.in_projs.{n}.lora_A.weight"] for n in range(8)])
    old = {name: tensor for name, tensor in kept.items() if not name.startswith("depformer")}
    old["depformer.layers.0.self_attn.in_proj.lora_A.weight"] = stacked
    up = [kept[f"depformer.layers.0.self_attn.in_projs.{n}.lora_B.weight"] for n in range(8)]
    old["depformer.layers.0.self_attn.in_proj.lora_B.weight"] = torch.cat(up)
    for name, tensors in (("new", kept), ("old", old)):
        save_file({**tensors, "text_emb.weight": text}, tmp_path / f"{name}.safetensors")
    new, older = (load(files, lora_path=str(tmp_path / f"{name}.safetensors")).state_dict() for name in ("new", "old"))
    plain = load_file(files["moshi_path"])
    assert torch.equal(new["text_emb.weight"], text)
    for name, tensor in new.items():
        assert torch.equal(tensor, older[name]), name
        assert torch.equal(tensor, plain[name]) is not (name == "text_emb.weight" or "in_projs" in name)


def test_the_scaling_is_that_of_the_loras_own_config(tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "base")
    tensors = lora(config_json())
    folder = tmp_path / "run"
    folder.mkdir()
    save_file(tensors, folder / "lora.safetensors")
    name = "transformer.layers.0.gating.linear_in"
    added = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    plain = load_file(files["moshi_path"])[f"{name}.weight"]
    for written, scaling in ((None, 2.0), ({"lora_scaling": 0.5}, 0.5)):
        if written is not None:
            (folder / "config.json").write_text(json.dumps(written))
        found = load(files, lora_path=str(folder / "lora.safetensors")).state_dict()[f"{name}.weight"]
        torch.testing.assert_close(found, plain + scaling * added)
    (folder / "config.json").write_text('{"lora_scaling": "much"}')
    with pytest.raises(
        EnvironmentProblem, match=r"backbone\.lora_path: .*a lora_scaling of 'much', which is no number"
    ):
        load(files, lora_path=str(folder / "lora.safetensors"))


def test_a_model_that_was_trained_with_a_lora_is_none_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, kyutai's loader added a LoRA with random weights, and a run trained on that in silence."""
    files = checkpoint(tmp_path, lora=True)
    ((key, told),) = findings(files, tmp_path)
    assert key == "backbone.lora_path"
    assert f"{files['config_path']} says lora: true, so its weights alone are not the model that was trained" in told
    assert "; write the path of its LoRA; or, if the weights have it merged in, write lora: false" in told
    save_file(lora(config_json()), tmp_path / "lora.safetensors")
    assert f"write the path of its LoRA, as {tmp_path / 'lora.safetensors'};" in findings(files, tmp_path)[0][1]
    assert main(["train", str(tmp_path / "c.yaml")]) == 3
    said = capsys.readouterr().err
    assert "says lora: true" in said
    assert "Traceback" not in said
    with pytest.raises(EnvironmentProblem, match=r"backbone\.lora_path: .* says lora: true"):
        load(files)
    assert not findings(files, tmp_path, lora_path=str(tmp_path / "lora.safetensors"))
    built = MOSHI.build(
        options({"config_path": files["config_path"]}, random_weights=True), device="cpu", dtype=torch.float32
    )
    assert not [name for name, _ in built.named_parameters() if "lora" in name]


def test_weights_with_the_lora_merged_in_are_taken_as_moshi_finetune_writes_them(tmp_path: Path) -> None:
    files = checkpoint(tmp_path, lora=True)
    merged = tmp_path / "consolidated.safetensors"
    Path(files["moshi_path"]).rename(merged)
    files["moshi_path"] = str(merged)
    assert not findings(files, tmp_path)
    assert all(torch.equal(tensor, load_file(merged)[name]) for name, tensor in load(files).state_dict().items())


def test_the_hubs_config_may_name_a_lora_or_lack_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `CheckpointInfo` reads it: `lora_name` is a file of the repository."""
    files = checkpoint(tmp_path, lora=True, lora_scaling=0.5, moshi_name="moshi.safetensors")
    written = json.loads(Path(files["config_path"]).read_text())
    tensors = lora(config_json())
    save_file(tensors, tmp_path / "lora.safetensors")
    fetched: list[str] = []
    monkeypatch.setattr(loaders, "hf_hub_download", lambda _, name, **__: fetched.append(name) or str(tmp_path / name))
    monkeypatch.setattr("ttt_moshi.options._cached_config", lambda _: files["config_path"])
    of_the_hub = {key: path for key, path in files.items() if key in ("tokenizer_path", "mimi_path")}
    with pytest.raises(EnvironmentProblem, match=r"me/mine/config\.json says lora: true"):
        load(of_the_hub, hf_repo="me/mine")
    assert fetched == ["config.json"]  # no weights of a model that cannot be trained
    Path(files["config_path"]).write_text(json.dumps({**written, "lora_name": "lora.safetensors"}))
    found = load(of_the_hub, hf_repo="me/mine").state_dict()["linears.0.weight"]
    added = tensors["linears.0.lora_B.weight"] @ tensors["linears.0.lora_A.weight"]
    torch.testing.assert_close(found, load_file(files["moshi_path"])["linears.0.weight"] + 0.5 * added)
    Path(files["config_path"]).write_text(json.dumps({**written, "lora": False, "dep_q": 0}))
    with pytest.raises(EnvironmentProblem, match=r"backbone\.hf_repo: me/mine/config\.json is of a model that cannot"):
        load_mimi(options(of_the_hub, hf_repo="me/mine"))


def test_an_adapter_on_merged_weights_belongs_to_them_alone(tmp_path: Path) -> None:
    files = checkpoint(tmp_path)
    save_file(lora(config_json()), tmp_path / "lora.safetensors")
    settings = TTTConfig.model_validate({**MOSHI.ttt_defaults, "layers": (1,)})
    merged = load(files, lora_path=str(tmp_path / "lora.safetensors"))
    save_adapter(tmp_path / "adapter", inject.apply(merged, MOSHI.sites(merged), settings), backbone={"name": "moshi"})
    again, plain = load(files, lora_path=str(tmp_path / "lora.safetensors")), load(files)
    load_adapter(tmp_path / "adapter", again, sites=MOSHI.sites(again))
    with pytest.raises(AdapterMismatchError, match="the backbone's weights: other values here"):
        load_adapter(tmp_path / "adapter", plain, sites=MOSHI.sites(plain))


def test_loras_that_are_none_or_of_another_model(tmp_path: Path) -> None:
    files, path = checkpoint(tmp_path), tmp_path / "lora.safetensors"
    tensors = lora(config_json())
    lone = {name: tensor for name, tensor in tensors.items() if "linears.0.lora_B" not in name}
    other = lora(config_json(dim=64))
    for content, told in (
        (load_file(files["moshi_path"]), "none of its .* is a lora_A; it looks like weights of a Moshi language model"),
        ({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, "is no LoRA of this model"),
        (lone, r"1 of its \d+ tensors do not fit: linears\.0\.lora_A\.weight"),
        (other, r"is no LoRA of this model: \d+ of its"),
    ):
        save_file(content, path)
        with pytest.raises(EnvironmentProblem, match=rf"backbone\.lora_path: .*{told}"):
            load(files, lora_path=str(path))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(EnvironmentProblem, match=r"backbone\.lora_path: .*write the path of a lora.safetensors"):
        load(files, lora_path=str(path))


# --- other models ---


def test_sixteen_codebooks_of_each_speaker_are_trained_scored_and_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """33 streams: the model, Mimi, windows, the loss with its gradient, streaming and scores; a run of two steps."""
    files = checkpoint(tmp_path, with_mimi=True, codebooks=16, existing_text_padding_id=5)
    assert not findings(files, tmp_path)
    chosen = options(files)
    model, codec = load_moshi(chosen, device="cpu", dtype=torch.float32), load_mimi(chosen)
    assert (model.num_codebooks, codec.num_codebooks) == (33, 16)
    data = MoshiData(train_data=str(demo.TRAIN_DATA), duration_sec=4.0)
    windows = MOSHI.dataset(RunConfig(backbone=chosen, data=data), split="train", device="cpu")
    assert windows.notice is None
    codes = windows[0]
    assert codes.shape == (33, 50)
    assert codes[1:].min() >= 0
    assert codes[17:].diff(dim=1).any(1).sum() >= 12  # of the user's 16, codebooks that follow the sound
    inject.apply(model, MOSHI.sites(model), TTTConfig.model_validate({**MOSHI.ttt_defaults, "layers": (1,)}))
    output = MOSHI.loss(model, codes[None], RunConfig(backbone=chosen))
    output.loss.backward()
    assert model.linears[15].weight.grad.abs().sum() > 0
    whole = MOSHI.outputs(model, codes[None])
    torch.testing.assert_close(MOSHI.stream(model, codes[None], pieces=[20, 30]), whole.detach(), rtol=1e-4, atol=1e-4)
    facts = MOSHI.score_facts(RunConfig(backbone=chosen))
    assert len(facts.streams) == 17
    assert MOSHI.score(model, codes[None]).nll.shape == (1, 17, 50)
    small = ["train.max_steps=2", "ttt.layers=[1]", "train.param_dtype=float32", "data.duration_sec=4"]
    small += ["train.batch_size=2", f"run_dir={tmp_path / 'run'}", "train.gradient_checkpointing=false"]
    assert main(["train", str(tmp_path / "c.yaml"), *(word for one in small for word in ("--set", one))]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_the_text_stream_is_padded_as_the_model_says(tmp_path: Path) -> None:
    files = checkpoint(tmp_path, with_mimi=True, existing_text_padding_id=5, existing_text_end_padding_id=7)
    chosen = options(files)
    config = RunConfig(backbone=chosen, data=MoshiData(train_data=str(demo.TRAIN_DATA), duration_sec=10.0))
    text = MOSHI.dataset(config, split="train", device="cpu")[0][0]
    usual = RunConfig(backbone=MoshiOptions(), data=MoshiData(duration_sec=10.0))
    plain = MOSHI.dataset(usual, split="train", device="cpu")[0][0]
    assert {3, 0} <= set(plain.tolist())
    assert torch.equal(text, torch.where(plain == 3, 5, torch.where(plain == 0, 7, plain)))
    score = {"text": "padding", "streams": "weighted"}
    scored = RunConfig.model_validate({"backbone": chosen, "eval": {"score": MOSHI.score_options(**score)}})
    clip = MOSHI.clip_reader(scored, device="cpu").read(demo.FOLDER / "dialogue_eval.flac")
    assert clip[0].unique().tolist() == [5]
    model = load_moshi(chosen, device="cpu", dtype=torch.float32)
    assert (model.text_padding_token_id, model.end_of_text_padding_id) == (5, 7)


UNTRAINABLE = {
    "dep_q = 0 of them, as of speech to text": {"n_q": 32, "dep_q": 0, "delays": [0] * 33},
    "dep_q = 8 of them, as of text to speech": {"n_q": 8, "dep_q": 8, "delays": [0] * 9},
    "n_q = 32 codebooks and predicts dep_q = 8 of them, not half": {"n_q": 32, "delays": [0] * 33},
    "it has conditioners (description), as Hibiki has": {
        "conditioners": {"description": {"type": "lut", "lut": {"n_bins": 31, "dim": 16, "tokenizer": "noop"}}},
        "fuser": {"sum": ["description"], "cross": [], "prepend": []},
    },
    "it has a fuser of conditions": {"fuser": {"sum": ["description"]}},
    "it has cross-attention": {"cross_attention": True},
    "it reads two text streams": {"demux_second_stream": True},
    "it reads 300 text tokens and predicts 5": {"text_card_out": 5},
    "its attention is not causal": {"causal": False},
    "quantised to 8 bits": {"quantize": True},
}


@pytest.mark.parametrize("told", UNTRAINABLE)
def test_other_models_of_kyutais_are_refused_in_one_sentence(
    told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_json(**UNTRAINABLE[told])))
    ((key, said),) = findings({"config_path": str(file)}, tmp_path)
    assert key == "backbone.config_path"
    assert f"{file} is of a model that cannot be trained here: it" in said
    assert told in said
    assert "; name a model of Moshi's kind" in said
    assert main(["train", str(tmp_path / "c.yaml")]) == 3
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(EnvironmentProblem, match="cannot be trained here"):
        MOSHI.build(options({"config_path": str(file)}, random_weights=True), device="meta", dtype=torch.float32)


def test_empty_conditioners_are_none(tmp_path: Path) -> None:
    files = checkpoint(tmp_path)
    written = json.loads(Path(files["config_path"]).read_text())
    empty = {"conditioners": {}, "fuser": {"sum": [], "cross": [], "prepend": []}, "depformer_causal": True}
    Path(files["config_path"]).write_text(json.dumps({**written, **empty}))
    assert not findings(files, tmp_path)
    model = load(files)
    MOSHI.loss(model, MOSHI.example_batch(model, batch_size=1, tokens=9, seed=0), RunConfig(backbone=options(files)))


FOREIGN = {
    "is a config of transformers, not kyutai's config": {"model_type": "moshi", "transformers_version": "5", "dim": 8},
    "is a config of diffusers": {"_class_name": "CogVideoXTransformer3DModel"},
    "is a config of the codec Mimi": mimi_config(),
    "is the index of weights in several files": {"weight_map": {}, "metadata": {}},
    "has the key 'num_layer', which kyutai's LMModel does not take": config_json(num_layer=3),
    "its norm is 'batch_norm', not 'layer_norm', ": config_json(norm="batch_norm"),
    "its dim is -8, not greater than or equal to 2": config_json(dim=-8),
    "its dim is 1000000, not less than or equal to 65536": config_json(dim=10**6),
    "its delays is 'none', not tuple": config_json(delays="none"),
    "it has 3 delays for 1 + n_q = 17 streams": config_json(delays=[0, 0, 1]),
    "its width of 33 does not divide into 2 heads": config_json(dim=33),
    "its hidden_scale is nan, not a finite number": config_json(hidden_scale=float("nan")),
    "its existing_text_padding_id of 300 is no token": config_json(existing_text_padding_id=300),
    "its depformer_dim of 17 does not divide into 2 heads": config_json(depformer_dim=17),
    "it has no dim": {"num_heads": 2, "num_layers": 2},
}


@pytest.mark.parametrize("told", FOREIGN)
def test_a_config_json_that_is_something_else_is_a_finding(
    told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(FOREIGN[told]))
    ((key, said),) = findings({"config_path": str(file)}, tmp_path, random_weights="true")
    assert key == "backbone.config_path"
    assert told in said
    assert "; write the path of a Moshi model's config.json" in said
    assert main(["train", str(tmp_path / "c.yaml")]) == 3
    assert "Traceback" not in capsys.readouterr().err


def test_what_kyutais_package_refuses_beyond_is_one_sentence(tmp_path: Path) -> None:
    """Values that fit by themselves and make no model, as gating that lacks its width."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_json(depformer_dim_feedforward=[32, 32])))
    with pytest.raises(EnvironmentProblem, match=r"backbone\.config_path: .*cannot be loaded as the config of a Moshi"):
        MOSHI.build(options({"config_path": str(file)}, random_weights=True), device="cpu", dtype=torch.float32)


# --- weights of another kind ---


def _others(files: dict[str, str]) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of other kinds by what is said of them, made as their programs name them."""
    model = load_file(files["moshi_path"])
    eight = {**model, "text_linear.weight": model["text_linear.weight"].to(torch.int8)}
    hugging = {f"decoder.model.layers.{n}.self_attn.q_proj.weight": torch.zeros(2) for n in range(3)}
    return {
        "a LoRA by moshi-finetune": lora(config_json()),
        "a LoRA by PEFT": {"base_model.model.transformer.lora_A.weight": torch.zeros(2)},
        "quantised to 8 bits": {**eight, "text_linear.weight_scb": torch.zeros(300)},
        "quantised weights (I8)": eight,
        "for MLX": {"depformer.slices.0.linear_in.weight": torch.zeros(2)},
        "in the format of transformers (MoshiForConditionalGeneration)": {
            **hugging,
            "depth_decoder.x": torch.zeros(1),
        },
        "a language model of transformers": {f"model.{x}": torch.ones(1) for x in ("layers.0.x", "embed_tokens.y")},
        "weights of the codec Mimi": mimi(mimi_config()).state_dict(),
    }  # fmt: skip


def test_weights_of_another_kind_are_told_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = checkpoint(tmp_path)
    path = tmp_path / "other.safetensors"
    for told, tensors in _others(files).items():
        save_file(tensors, path)
        with pytest.raises(EnvironmentProblem) as refused:
            load(files, moshi_path=str(path))
        said = str(refused.value)
        own = load_file(files["moshi_path"])
        fitting = sum(name in own and tensor.is_floating_point() for name, tensor in tensors.items())
        assert f"{path}: {fitting} of its {len(tensors)} tensors fit the language model" in said, told
        assert said.startswith("backbone.moshi_path: ")
        assert "; it looks like " in said
        assert told in said
        assert len(said.split("; ")) >= 3  # the last is the way out
    assert findings(files, tmp_path, moshi_path=str(path))
    assert main(["train", str(tmp_path / "c.yaml"), "--set", "train.param_dtype=float32"]) == 3
    assert "Traceback" not in capsys.readouterr().err


def test_weights_of_another_size_name_what_differs(tmp_path: Path) -> None:
    files = checkpoint(tmp_path)
    other = checkpoint(tmp_path / "other", num_layers=3, text_card=290)
    with pytest.raises(EnvironmentProblem) as refused:
        load(files, moshi_path=other["moshi_path"])
    said = str(refused.value)
    assert "text_emb.weight has the shape [291, 32], not [301, 32]" in said
    assert "as backbone.config_path, the config.json of the same model" in said
    with pytest.raises(EnvironmentProblem, match=r"transformer\.layers\.2\..* is missing"):
        load({**files, "config_path": checkpoint(tmp_path / "third", num_layers=3)["config_path"]})


def test_kyutais_older_names_of_attention_still_load(tmp_path: Path) -> None:
    files = checkpoint(tmp_path)
    plain = load_file(files["moshi_path"])
    old = {}
    for name, tensor in plain.items():
        if "in_projs" not in name and "out_projs" not in name:
            old[name] = tensor
    for layer in ("transformer.layers.0", "transformer.layers.1", "depformer.layers.0"):
        for way, today in (("in_proj_weight", "in_projs"), ("out_proj.weight", "out_projs")):
            parts = [
                plain[name]
                for name in sorted(plain, key=lambda n: (len(n), n))
                if name.startswith(f"{layer}.self_attn.{today}.")
            ]
            old[f"{layer}.self_attn.{way}"] = torch.cat(parts)
    save_file(old, tmp_path / "old.safetensors")
    found = load(files, moshi_path=str(tmp_path / "old.safetensors")).state_dict()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_codecs_of_another_kind_are_told_what_they_are(tmp_path: Path) -> None:
    files = checkpoint(tmp_path, with_mimi=True)
    hugging = {"quantizer.semantic_residual_vector_quantizer.layers.0.codebook.embed_sum": torch.zeros(2)}
    for path, told in (
        (
            Path(files["moshi_path"]),
            r"0 of its \d+ tensors fit the codec Mimi, .*weights of a Moshi language model; write",
        ),
        (
            demo.CODEC,
            r"0 of its 1 tensors fit .*it looks like the codec of the demo; write the weights of kyutai's Mimi",
        ),
        (tmp_path / "hf.safetensors", r"it looks like Mimi's weights in the format of transformers"),
    ):
        save_file(hugging, tmp_path / "hf.safetensors")
        with pytest.raises(EnvironmentProblem, match=rf"backbone\.mimi_path: {path}: .*{told}"):
            load_mimi(options(files, mimi_path=str(path)))
    large = {**mimi_config(), "quantizer": {**mimi_config()["quantizer"], "bins": 128}}
    (tmp_path / "mimi.json").write_text(json.dumps(large))
    save_file(mimi(large).state_dict(), tmp_path / "mimi.safetensors")
    with pytest.raises(
        EnvironmentProblem, match=r"backbone\.mimi_path: .*codes of 0 to 127, but the model reads 0 to 63"
    ):
        load_mimi(options(files))
    few = {**mimi_config(), "quantizer": {**mimi_config()["quantizer"], "n_q": 4}}
    (tmp_path / "mimi.json").write_text(json.dumps(few))
    with pytest.raises(EnvironmentProblem, match="a Mimi of 4 codebooks, but the model reads 8 of each speaker"):
        load_mimi(options(files))


def test_tokenizers_of_another_kind_are_told_what_they_are(tmp_path: Path) -> None:
    files = checkpoint(tmp_path)
    other = tmp_path / "tokenizer.json"
    other.write_text('{"version": "1.0"}')
    for path, told in ((other, "it is JSON text"), (Path(files["moshi_path"]), "it is a safetensors file")):
        with pytest.raises(EnvironmentProblem, match=rf"backbone\.tokenizer_path: {path}: cannot be read .*{told}"):
            load_tokenizer(options(files, tokenizer_path=str(path)))
        assert findings({**files, "tokenizer_path": str(path)}, tmp_path)[0][0] == "backbone.tokenizer_path"
    smaller = checkpoint(tmp_path / "small", text_card=200)
    with pytest.raises(EnvironmentProblem, match=r"has 300 tokens, but the model reads 200 \(text_card\)"):
        load_tokenizer(options(smaller))


def test_what_stands_in_for_a_codec_fits_or_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_json(codebooks=16)))
    chosen = options({"config_path": str(file)}, random_weights=True)
    with pytest.raises(EnvironmentProblem, match=r"makes 8 codebooks of 64 entries, but this model reads 16 of 64"):
        MOSHI.dataset(RunConfig(backbone=chosen, data=MoshiData()), split="train", device="cpu")


def test_the_settings_of_a_config_json_reach_kyutais_package_as_they_are() -> None:
    written = {**config_json(), "lora": True, "lora_rank": 4, "moshi_name": "x", "conditioners": {}}
    settings = lm_settings(written, ModelConfig.model_validate(written))
    assert settings == config_json()
    built = MOSHI.build(MoshiOptions(), device="meta", dtype=torch.float32)
    for name in ("n_q", "dep_q", "card", "text_card", "context", "existing_text_padding_id"):
        assert getattr(model_config(MoshiOptions()), name) == getattr(built, name), name
    assert language_model(config_json()).num_codebooks == 17


def test_check_reads_what_headers_tell_before_torch_is_imported(tmp_path: Path) -> None:
    """Each kind of weights at each key that it is not for, a cut file, and another model's sizes."""
    files = checkpoint(tmp_path, with_mimi=True)
    save_file(lora(config_json()), tmp_path / "lora.safetensors")
    files["lora_path"] = str(tmp_path / "lora.safetensors")
    assert not findings(files, tmp_path)
    kinds = {
        "moshi_path": "weights of a Moshi language model",
        "mimi_path": "weights of the codec Mimi",
        "lora_path": "a LoRA by moshi-finetune",
    }
    for key in kinds:
        for other, words in kinds.items():
            if other != key:
                ((path, told),) = findings({**files, key: files[other]}, tmp_path)
                assert path == f"backbone.{key}"
                assert f"{files[other]} looks like {words}, not " in told
                assert f"; write it as backbone.{other}" in told
    model = load(files)
    settings = TTTConfig.model_validate({**MOSHI.ttt_defaults, "layers": (1,)})
    adapter = save_adapter(
        tmp_path / "adapter",
        inject.apply(model, MOSHI.sites(model), settings),
        backbone={"name": "moshi"},
        backbone_tensors={"text_linear.weight": model.text_linear.weight},
    )
    for file, words in ((adapter, "an adapter by ttt"), (adapter.with_name("backbone_model.safetensors"), "beside an")):
        for key in kinds:
            ((path, told),) = findings({**files, key: str(file)}, tmp_path)
            assert path == f"backbone.{key}"
            assert words in told
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(files["moshi_path"]).read_bytes()[:-100])
    for key in kinds:
        ((path, told),) = findings({**files, key: str(cut)}, tmp_path)
        assert (path, "header promises" in told, told.endswith("; fetch it again, or write the path of another")) == (
            f"backbone.{key}",
            True,
            True,
        )
    sixteen = checkpoint(tmp_path / "sixteen", codebooks=16, num_layers=1, text_card=310)
    ((path, told),) = findings({**files, "moshi_path": sixteen["moshi_path"]}, tmp_path)
    assert path == "backbone.moshi_path"
    for words in ("n_q is 16 there, but the weights have 32", "num_layers is 2 there, but the weights have 1"):
        assert words in told
    ((path, told),) = findings({key: path for key, path in files.items() if key != "config_path"}, tmp_path)
    assert "num_layers is 32 there, but the weights have 2" in told
