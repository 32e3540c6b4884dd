"""`ttt schema`: a schema that agrees with the loader about what each key may be, plugins' options included."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from fake_distributions import TOY, importable, install
from toy_config import DEMO, ToyBackbone

from ttt.check import check_config, load_config
from ttt.check.json_schema import EDITOR_LINE, json_schema
from ttt.config import RunConfig, dump_config
from ttt.config.source import parse_source
from ttt.plugins import get_backbone, run_config_model
from ttt_cli.main import main

TOY_BACKBONE = ToyBackbone()
OTHERS = ["moshi", "other"]
OTHER = """\
from toy_config import *
class Options(BackboneOptions):
    name: str = "other"
    spice: int
    "Heat."
class Other(ToyBackbone):
    name = "other"
    options = Options
    ttt_defaults = {"layer_type": "linear"}
    def facts(self, config):
        return BackboneFacts(32, 4, 4)
@hookimpl
def ttt_backbone():
    return Other()
"""


@pytest.fixture(scope="module", autouse=True)
def _plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("plugins")
    install(folder, "toy", "toy_plugin", TOY)
    install(folder, "other", "other_plugin", OTHER)
    install(folder, "broken", "broken_plugin", "import a_package_that_nobody_has\n")
    with importable(folder):
        yield


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _validator(schema: dict[str, Any]) -> Any:
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module")
def validators(_plugins: None) -> list[Any]:
    """Of the toy alone, and of it among others."""
    return [_validator(json_schema(all_)) for all_ in ([TOY_BACKBONE], [*map(get_backbone, OTHERS), TOY_BACKBONE])]


def _says(validator: Any, text: str) -> bool:
    return validator.is_valid(dict(parse_source(text, file="c.yaml").data))


def test_what_ships_fits_the_schema_however_it_is_written() -> None:
    moshi = get_backbone("moshi")
    validator = _validator(json_schema([moshi]))
    for text in moshi.presets().values():
        assert _says(validator, text)
        checked = check_config("c.yaml", text=text)
        assert checked.config is not None
        assert _says(validator, dump_config(checked.config))


@pytest.mark.parametrize(
    "text",
    [
        "ttt: {layers: '1,2'}",
        "ttt: {layers: 3}",
        "ttt: {layers: [1, 2], mini_batch_size: 1e2}",
        "ttt:\ntrain:\ndata:\n",
        "ttt: {layer_type: mlp, mlp_hidden_dims: [8]}",
        "train: {lr: 1e-4, betas: [0.8, 0.9], ckpt_keep: null}",
        "run_dir: runs/x",
        "data: {window_tokens: 8}",
    ],
)
def test_what_the_loader_takes_the_schema_takes(text: str, validators: list[Any]) -> None:
    text = f"backbone: {{name: toy}}\n{text}\n"
    load_config("c.yaml", text=text)
    assert all(_says(validator, text) for validator in validators)


@pytest.mark.parametrize(
    "text",
    [
        "ttt: {layrs: all}",
        "ttt: {layer_type: liner}",
        "ttt: {mini_batch_size: 0}",
        "ttt: {mini_batch_size: 1.5}",
        "train: {lr: fast}",
        "train: {lr: 0}",
        "train: {max_steps: -1}",
        "train: [1]",
        "data: {duration_sec: 15}",  # another backbone's
        "backbone: {name: toy, spice: 1}",
        "backbone: {name: nobody}",
        "backbone: {dim: 8}",
        "run_dir: 3",
        "lr: 1",
    ],
)
def test_what_the_loader_refuses_of_one_key_the_schema_refuses(text: str, validators: list[Any]) -> None:
    text = text if text.startswith("backbone") else f"backbone: {{name: toy}}\n{text}\n"
    assert any(finding.severity.value == "error" for finding in check_config("c.yaml", text=text).findings)
    assert not any(_says(validator, text) for validator in validators)


def test_every_key_is_described_and_every_bound_is_one_of_json_schema() -> None:
    schema = json_schema([TOY_BACKBONE, get_backbone("moshi")])
    text = json.dumps(schema)
    assert not any(f'"{word}":' in text for word in ("ge", "gt", "le", "lt", "multiple_of"))
    model = run_config_model(get_backbone("moshi"))
    sections = {"ttt": "TTTConfig", "train": "TrainConfig", "backbone": "backbone moshi", "data": "MoshiData"}
    for section, name in sections.items():
        annotation = model.model_fields[section].annotation
        assert set(schema["$defs"][name]["properties"]) == set(annotation.model_fields)  # type: ignore[union-attr]
        assert all(key["description"] for key in schema["$defs"][name]["properties"].values())
    assert set(schema["properties"]) == set(RunConfig.model_fields)


def test_defaults_are_those_that_a_config_gets() -> None:
    alone = json_schema([TOY_BACKBONE])["$defs"]["TTTConfig"]["properties"]
    assert alone["layer_type"]["default"] == "mlp"
    assert alone["base_lr"]["default"] == 0.1
    several = json_schema([TOY_BACKBONE, get_backbone("other")])["$defs"]["TTTConfig"]["properties"]
    assert "default" not in several["layer_type"]  # it depends
    assert several["mini_batch_size"]["default"] == 16


# --- the command ---


def test_schema_of_all_backbones_or_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("note: left out: the backbone broken is broken: ModuleNotFoundError")
    assert {"backbone moshi", "backbone other", "backbone toy"} <= set(json.loads(out)["$defs"])
    assert main(["schema", "--backbone", "toy"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == json_schema([TOY_BACKBONE])


def test_the_line_of_init_names_the_file_that_schema_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--backbone", "toy"]) == 0
    advice = capsys.readouterr().err.splitlines()[-1].split("`")[1]
    assert main(advice.split()[1:]) == 0
    line, _, rest = Path("toy.yaml").read_text().partition("\n")
    assert f"{line}\n" == EDITOR_LINE
    assert rest == DEMO
    schema = json.loads(Path(line.partition("=")[2]).read_text())
    assert _validator(schema).is_valid(yaml.safe_load(Path("toy.yaml").read_text()))
    assert "ttt.schema.json" in capsys.readouterr().err
    assert main(advice.split()[1:]) == 0  # plugins came or went
    assert main(["init", "--backbone", "toy", "--force"]) == 0
    assert "editor" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--out", "mine.yaml"], 2, "mine.yaml: is already there"),
        (["--out", "mine.json"], 2, "mine.json: is already there"),
        (["--out", "."], 2, "a folder"),
        (["--out", "no/such/folder.json"], 3, "no/such/folder.json"),
        (["--backbone", "tyo"], 2, "did you mean 'toy'?"),
        (["--backbone", "broken"], 3, "ModuleNotFoundError"),
    ],
)
def test_schema_that_cannot(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(DEMO)
    Path("mine.json").write_text("[1]")
    assert main(["schema", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err.splitlines()[-1]
    assert Path("mine.yaml").read_text() == DEMO
    assert Path("mine.json").read_text() == "[1]"


def test_options_that_have_no_schema_are_told_with_their_plugin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = OTHER.replace("spice: int", "spice: __import__('collections').abc.Callable").replace('"other"', '"odd"')
    (tmp_path / "odd").mkdir()
    install(tmp_path / "odd", "odd", "odd_plugin", source)
    with importable(tmp_path / "odd"):
        assert main(["schema", "--backbone", "odd"]) == 3
        assert "the options of the plugin odd have no JSON schema" in capsys.readouterr().err
        assert main(["schema"]) == 0
        out, err = capsys.readouterr()
    assert "backbone toy" in json.loads(out)["$defs"]
    assert "note: left out: the options of the plugin odd have no JSON schema" in err
