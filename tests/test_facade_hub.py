"""A model with TTT on the hub, a small one of which runs here; and the model card that goes with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from small_hub import SmallHub, small_hub
from small_llama import logits, opened, small_llama, some_tokens

import ttt
from ttt.errors import EnvironmentProblem, UsageError
from ttt.facade import model_card

MIDDLE = ttt.TTTConfig(layers="middle")

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SmallHub]:
    with small_hub(monkeypatch, tmp_path / "cache") as running:
        yield running


def _model() -> Any:
    return opened(ttt.get_ttt_model(small_llama(), MIDDLE))


def test_pushed_and_loaded_by_its_name(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    model, tokens = _model(), some_tokens()
    address = model.push_to_hub("me/memory", commit_message="first", private=True, token="hf_x")
    assert address == f"{hub.url}/me/memory/commit/{'c' * 40}"
    assert sorted(hub.repositories["me/memory"]) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert hub.private == {"me/memory"}
    loaded = ttt.TTTModel.from_pretrained(small_llama(), "me/memory")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what was fetched once is there without a network
    again = ttt.TTTModel.from_pretrained(small_llama(), "me/memory")
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_pushed_while_it_is_saved_and_beside_lora(hub: SmallHub, tmp_path: Path) -> None:
    peft = get_peft_model(small_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model = opened(ttt.get_ttt_model(peft, MIDDLE))
    model.save_pretrained(tmp_path / "both", push_to_hub=True)  # the folder's name is the repository's
    assert "ttt/adapter_model.safetensors" in hub.repositories["me/both"]
    loaded = ttt.TTTModel.from_pretrained(small_llama(), "me/both", revision="main")
    assert torch.equal(logits(loaded, some_tokens()), logits(model, some_tokens()))


def test_what_the_hub_refuses_is_one_sentence(hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.repositories["me/empty"] = {}
    for name, revision, words in (
        ("me/nowhere", None, "no folder of that name here, and no such repository on the hub"),
        ("me/empty", "v9", "it has no branch, tag or commit 'v9'"),
        ("me/empty", None, "holds no adapter_model.safetensors"),
        (str(tmp_path / "gone"), None, "no such file or folder, and no name of a repository"),
        ("a/b/c", None, "no such file or folder, and no name of a repository"),
    ):
        with pytest.raises(EnvironmentProblem, match=words) as raised:
            ttt.TTTModel.from_pretrained(small_llama(), name, revision=revision)
        assert "\n" not in str(raised.value)
    with pytest.raises(UsageError, match="where there is no revision"):
        ttt.TTTModel.from_pretrained(small_llama(), tmp_path, revision="main")
    hub.refuses = 403
    with pytest.raises(EnvironmentProblem, match="me/memory cannot be pushed to: the hub does not let you"):
        _model().push_to_hub("me/memory")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentProblem, match="not in the hub's cache, and the hub cannot be reached"):
        ttt.TTTModel.from_pretrained(small_llama(), "me/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(EnvironmentProblem, match="the hub cannot be reached"):
        _model().push_to_hub("me/memory")


# --- model cards ---


def _front(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(front)
    return found


def test_the_card_says_what_it_is_and_no_figure(tmp_path: Path) -> None:
    base = small_llama()
    base.name_or_path = base.config._name_or_path = "org/base"
    base.config._commit_hash = "a1b2"
    model = opened(ttt.get_ttt_model(base, MIDDLE))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert _front(card) == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "ttt-adapters",
        "tags": ["ttt", "test-time-training", "fast-weights", "adapter"],
        "pipeline_tag": "text-generation",
    }
    assert 'AutoModelForCausalLM.from_pretrained("org/base")' in card
    assert "(commit `a1b2`)" in card
    assert "layers 1, 2" in card
    assert "| `mini_batch_size` | 16 |" in card
    assert "## Training" not in card
    assert "## Evaluation" not in card
    (tmp_path / "README.md").write_text("mine\n", encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, and its evaluation."""
    from typer.testing import CliRunner

    from ttt_cli.app import app

    folder = tmp_path_factory.mktemp("runs") / "run"
    runner = CliRunner()
    settings = ["run_dir=" + str(folder), "train.max_steps=2", "train.device=cpu"]
    asked = ["train", "--backbone", "moshi", *(word for each in settings for word in ("--set", each))]
    assert runner.invoke(app, asked).exit_code == 0
    assert runner.invoke(app, ["eval", str(folder), "--tasks", "swuggy", "--limit", "2"]).exit_code == 0
    return folder


def test_the_card_of_a_run_has_its_figures_and_those_of_its_evaluation(run: Path) -> None:
    card = model_card(run)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    results = json.loads((run / "eval" / "step_000002" / "results.json").read_text(encoding="utf-8"))
    assert f"| outer loss | {summary['eval_loss']:.4f} |" in card
    assert f"| outer loss, gates closed | {summary['eval_loss_gates_closed']:.4f} |" in card
    assert "| windows that was measured on | 2 held out |" in card
    numbers = results["results"]["swuggy"]
    assert f"| swuggy (acc) | {numbers['acc,none']:.4g} ± " in card
    assert "| task | ttt | closed | ttt-closed | units |" in card
    assert "espeak-ng" in card  # what must be known of the data


def test_figures_of_other_weights_are_not_shown(run: Path, tmp_path: Path) -> None:
    from ttt.plugins import get_backbone

    backbone = get_backbone("moshi")
    base = backbone.build(backbone.options(name="moshi", preset="demo"), device="cpu", dtype=torch.float32)
    model = ttt.TTTModel.from_pretrained(base, run, is_trainable=True)
    model.save_pretrained(tmp_path / "same")
    assert "| outer loss |" in (tmp_path / "same" / "README.md").read_text(encoding="utf-8")
    opened(model)
    model.save_pretrained(tmp_path / "moved")
    assert "| outer loss |" not in (tmp_path / "moved" / "README.md").read_text(encoding="utf-8")
    results = run / "eval" / "step_000002" / "results.json"
    before = results.read_text(encoding="utf-8")
    try:
        results.write_text(before.replace('"checksum": "', '"checksum": "0'), encoding="utf-8")
        with pytest.raises(EnvironmentProblem, match="its checksum is not that of its content"):
            model_card(run)
        content = {key: value for key, value in json.loads(before).items() if key != "sha256"}
        content["adapter"]["checksum"] = "0" * 64  # of other weights
        results.write_text(json.dumps(content), encoding="utf-8")
        assert "## Evaluation" not in model_card(run)
    finally:
        results.write_text(before, encoding="utf-8")
