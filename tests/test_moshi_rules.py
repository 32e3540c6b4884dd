"""What `ttt check` finds in Moshi's configs: data that are missing, contexts that limit nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from ttt.check import check_config
from ttt.config.findings import Finding
from ttt_cli.main import main


def _found(text: str, *codes: str) -> Sequence[Finding]:
    return [finding for finding in check_config("c.yaml", text=text).findings if finding.code in codes]


@pytest.mark.parametrize(
    ("backbone", "found"),
    [
        ("preset: 7b", True),
        ("preset: 7b, random_weights: true, mimi_path: mimi.safetensors, tokenizer_path: t.model", True),
        ("preset: 7b, random_weights: true", False),
        ("preset: demo", False),
    ],
)
def test_a_pretrained_model_without_data_is_an_error(backbone: str, found: bool) -> None:
    text = f"backbone: {{name: moshi, {backbone}}}\nttt: {{layers: [1]}}\n"
    findings = _found(text, "MSH505")
    assert [(finding.path, finding.severity.value) for finding in findings] == [("data.train_data", "error")] * found
    assert _found(f"{text}data: {{train_data: gone.jsonl}}\n", "MSH505") == []


def test_a_run_without_data_is_refused_as_the_check_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("backbone: {name: moshi, preset: 7b}\nttt: {layers: [1]}\n")
    for command, code in (("check", 1), ("train", 2)):
        assert main([command, "c.yaml"]) == code
        assert "the preset 7b has no data of its own" in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize(
    ("backbone", "advised"),
    [
        ("{name: moshi}", True),
        ("{name: moshi, preset: 7b}", False),
        ("{name: videodit}", True),
        ("{name: videodit, preset: 5b}", False),
        ("{name: transformers, model: nobody/nothing}", False),
    ],
)
def test_null_is_advised_only_where_there_are_data_of_its_own(backbone: str, advised: bool) -> None:
    text = f"backbone: {backbone}\ndata: {{train_data: gone.jsonl, eval_data: gone_too.jsonl}}\n"
    train, evaluated = _found(text, "TTT501")
    assert ("or null for the demo data" in train.fix) == advised
    assert evaluated.fix.endswith("or null")


@pytest.mark.parametrize(
    ("backbone", "data", "keys"),
    [
        ("ttt_layer_context: 3000, non_ttt_layer_context: 3000", "duration_sec: 60", ["ttt_layer", "non_ttt_layer"]),
        ("context: 188", "duration_sec: 15", [""]),
        ("context: 187", "duration_sec: 15", []),
        ("ttt_layer_context: 50, non_ttt_layer_context: 200", "duration_sec: 15", ["non_ttt_layer"]),
        ("", "duration_sec: 15", []),  # the model's own context is nobody's mistake
    ],
)
def test_a_context_as_long_as_a_window_limits_nothing(backbone: str, data: str, keys: list[str]) -> None:
    text = f"backbone: {{name: moshi, preset: demo, {backbone}}}\ndata: {{{data}}}\n"
    found = [finding.path for finding in _found(text, "MSH302")]
    assert found == [f"backbone.{key}_context".replace("._", ".") for key in keys]
