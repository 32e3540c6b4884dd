"""`ttt diff`: configs compared as a run sees them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_distributions import TOY, importable, install

from ttt.check import check_config
from ttt.check.diff import diff_configs, render_values
from ttt.config import dump_config
from ttt_cli.main import main

OTHER = """\
from toy_config import *
class Options(BackboneOptions):
    name: str = "other"
    spice: int = 3
class Other(ToyBackbone):
    name = "other"
    options = Options
    data_options = DataOptions
    def facts(self, config):
        return BackboneFacts(32, 4, 4)
@hookimpl
def ttt_backbone():
    return Other()
"""


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("plugins", "work"):
        (tmp_path / name).mkdir()
    install(tmp_path / "plugins", "toy", "toy_plugin", TOY)
    install(tmp_path / "plugins", "other", "other_plugin", OTHER)
    monkeypatch.chdir(tmp_path / "work")
    with importable(tmp_path / "plugins"):
        yield


def _diff(left: str, right: str, *options: str) -> int:
    Path("a.yaml").write_text(left)
    Path("b.yaml").write_text(right)
    return main(["diff", "a.yaml", "b.yaml", *options])


def test_how_a_config_is_written_makes_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    left = "backbone: {name: toy}\nttt: {layers: '1,2'}\n"
    resolved = check_config("c.yaml", text=left).config
    assert resolved is not None
    assert _diff(left, dump_config(resolved)) == 0
    assert capsys.readouterr().out == "a.yaml and b.yaml are the same run\n"
    assert _diff(left, dump_config(resolved), "--json") == 0
    assert json.loads(capsys.readouterr().out)["values"] == []


def test_values_by_section_and_findings_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    left = "backbone: {name: toy}\nttt: {scan_checkpoint_group_size: 1}\ntrain: {warmup_steps: 2000}\nrun_dir: x\n"
    right = "train: {lr: 1.0, warmup_steps: 2000}\nttt: {layers: middle}\nbackbone: {name: toy}\n"
    assert _diff(left, right) == 1
    out = capsys.readouterr().out
    values, _, findings = out.partition("\nfound in a.yaml only:\n")
    assert values.splitlines() == [
        "a.yaml  →  b.yaml",
        "",
        "ttt:",
        "  layers                      all (default)     →  middle",
        "  scan_checkpoint_group_size  1                 →  16 (default)",
        "",
        "train:",
        "  lr                          0.0001 (default)  →  1.0",
        "",
        "top level:",
        "  run_dir                     x                 →  null (default)",
    ]
    assert findings.startswith("a.yaml:2:35  note TTT201")
    assert "TTT701" not in out  # both have it
    assert "found in b.yaml only" not in out


def test_configs_of_two_backbones(capsys: pytest.CaptureFixture[str]) -> None:
    assert _diff("backbone: {name: toy}\n", "backbone: {name: other}\n", "--json") == 1
    found = {each["key"]: each for each in json.loads(capsys.readouterr().out)["values"]}
    assert found["backbone.name"] == {
        "key": "backbone.name",
        "left": {"value": "toy", "written": True},
        "right": {"value": "other", "written": True},
    }
    assert found["backbone.spice"] == {"key": "backbone.spice", "right": {"value": 3, "written": False}}
    assert found["backbone.dim"] == {"key": "backbone.dim", "left": {"value": 32, "written": False}}
    assert "ttt.layers" not in found
    assert _diff("backbone: {name: toy}\n", "backbone: {name: other}\n") == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "spice" in line]
    assert line.split() == ["spice", "-", "→", "3", "(default)"]


def test_a_finding_about_the_run_keeps_no_one_from_comparing(capsys: pytest.CaptureFixture[str]) -> None:
    leaking = "backbone: {name: toy}\nttt: {causal: false, rope: none, learnable_token_idx: false}\n"
    assert _diff(leaking, "backbone: {name: toy}\ndata: {train_data: nowhere.txt}\n") == 1
    out = capsys.readouterr().out
    assert "error TTT301" in out.partition("found in a.yaml only:")[2].partition("found in b.yaml only:")[0]
    assert "error TTT501" in out.partition("found in b.yaml only:")[2]


@pytest.mark.parametrize(
    ("left", "code", "words"),
    [
        ("ttt: [", 2, "a.yaml: cannot be compared before these errors are mended"),
        ("backbone: {name: toy}\nttt: {layrs: all}\n", 2, "error TTT101"),
        ("backbone: {name: tyo}\n", 2, "error TTT801"),
        ("ttt: {}\n", 2, "error TTT104"),
    ],
)
def test_a_config_that_means_nothing_is_not_compared(
    left: str, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _diff(left, "backbone: {name: toy}\n") == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err


def test_a_file_that_is_not_there_ends_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "a.yaml", "b.yaml"]) == 3
    assert capsys.readouterr().err.startswith("error: a.yaml: no such file")


def test_long_values_stand_below_their_key_on_a_narrow_terminal() -> None:
    left = check_config("a.yaml", text=f"backbone: {{name: toy}}\nrun_dir: {'x' * 70}\n")
    right = check_config("b.yaml", text="backbone: {name: toy}\nttt: {layers: [0, 3]}\n")
    lines = render_values(diff_configs(left, right), width=80).splitlines()
    assert lines[-3:] == ["  run_dir", f"    {'x' * 70}", "    →  null (default)"]
    assert max(map(len, lines)) <= 80
