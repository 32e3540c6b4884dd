"""Discovery through real metadata: good plugins work, broken ones are listed with their cause, none stops another."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from fake_distributions import TOY, importable, install

from ttt.check import check_config
from ttt.check.doctor import examine
from ttt.errors import PluginError, UsageError
from ttt.plugins import BackboneFacts, PluginInfo, discover, get_backbone
from ttt_cli.main import main

BROKEN = {
    "missing": ("import a_package_that_nobody_has\n", "No module named 'a_package_that_nobody_has'"),
    "typo": ("def (\n", "SyntaxError"),
    "panics": ("class Panic(BaseException): ...\nraise Panic('in Rust')\n", "Panic: in Rust"),
    "exits": ("raise SystemExit('not on this machine')\n", "not on this machine"),
    "misspelt": (
        "from ttt.plugins.hookspecs import hookimpl\n@hookimpl\ndef ttt_bakbone():\n    pass\n",
        "ttt_bakbone",
    ),
    "argument": (
        "from ttt.plugins.hookspecs import hookimpl\n@hookimpl\ndef ttt_backbone(torch):\n    pass\n",
        "torch",
    ),
    "number": (
        "from ttt.plugins.hookspecs import hookimpl\n@hookimpl\ndef ttt_backbone():\n    return 7\n",
        "returned int, not a Backbone",
    ),
    "nothing": (
        "from ttt.plugins.hookspecs import hookimpl\n@hookimpl\ndef ttt_backbone():\n    return None\n",
        "no hook `ttt_backbone`",
    ),
    "hookless": ("x = 1\n", "no hook `ttt_backbone`"),
    "raises": (
        "from ttt.plugins.hookspecs import hookimpl\n@hookimpl\ndef ttt_backbone():\n    raise KeyError('weights')\n",
        "KeyError: 'weights'",
    ),
    "refuses": (
        "import ttt\n@ttt.hookimpl\ndef ttt_backbone():\n    raise ttt.errors.UsageError('log in first')\n",
        "UsageError: log in first (",
    ),
    "alias": (TOY, "the backbone calls itself 'toy', its entry point 'alias'"),
    "optionless": (
        "from toy_config import ToyBackbone, hookimpl\n"
        "class Other(ToyBackbone):\n    name = 'optionless'\n    options = dict\n"
        "@hookimpl\ndef ttt_backbone():\n    return Other()\n",
        "Other.options is <class 'dict'>, not a subclass of BackboneOptions",
    ),
    "abstract": (
        "from ttt.plugins.backbone import Backbone\nfrom ttt.plugins.hookspecs import hookimpl\n"
        "class Half(Backbone):\n    name = 'abstract'\n"
        "@hookimpl\ndef ttt_backbone():\n    return Half()\n",
        "abstract",
    ),
}


def _found(folder: Path) -> dict[str, PluginInfo]:
    with importable(folder):
        return {plugin.name: plugin for plugin in discover()}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_listed_with_its_cause_and_the_good_one_works(tmp_path: Path, name: str) -> None:
    source, cause = BROKEN[name]
    install(tmp_path, "toy", "toy_plugin", TOY)
    install(tmp_path, name, f"broken_{name}", source)
    found = _found(tmp_path)
    assert found["toy"].backbone is not None
    assert found["toy"].error is None
    broken = found[name]
    assert broken.backbone is None
    assert broken.error is not None
    assert cause in broken.error
    assert "\n" not in broken.error
    assert (broken.distribution, broken.version, broken.module) == (f"ttt-{name}", "1.2", f"broken_{name}")


def test_all_of_them_at_once(tmp_path: Path) -> None:
    install(tmp_path, "toy", "toy_plugin", TOY)
    for name, (source, _) in BROKEN.items():
        install(tmp_path, name, f"broken_{name}", source)
    found = _found(tmp_path)
    assert {name for name in ("toy", *BROKEN) if found[name].backbone is not None} == {"toy"}


@pytest.mark.parametrize("points", [b"[ttt.backbones]\nno entry\n", b"[ttt.backbones]\n\xff = toy\n"])
def test_damaged_metadata_of_another_distribution_stop_nothing(tmp_path: Path, points: bytes) -> None:
    install(tmp_path, "toy", "toy_plugin", TOY)
    install(tmp_path, "damaged", "damaged_plugin", TOY)
    (tmp_path / "ttt_damaged-1.2.dist-info" / "entry_points.txt").write_bytes(points)
    assert _found(tmp_path)["toy"].backbone is not None


def test_damaged_metadata_are_told_wherever_their_plugin_is_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "damaged", "damaged_plugin", TOY)
    (tmp_path / "ttt_damaged-1.2.dist-info" / "entry_points.txt").write_bytes(b"[ttt.backbones]\n\xff = toy\n")
    told = "the entry points of ttt-damaged cannot be read (UnicodeDecodeError: "
    with importable(tmp_path):
        assert main(["plugins"]) == 1
        assert f"warning: {told}" in capsys.readouterr().err
        with pytest.raises(UsageError, match=re.escape(told)):
            get_backbone("damaged")
        (finding,) = check_config("c.yaml", text="backbone: {name: damaged}\n").findings
        assert finding.message.startswith(f"no backbone 'damaged' is installed; {told}")
        assert any(problem.message.startswith(told) for problem in examine().problems)
    assert main(["plugins"]) == 0


def test_a_distribution_without_a_name_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(tmp_path, "toy", "toy_plugin", TOY)
    install(tmp_path, "toy", "nameless_plugin", TOY, distribution="nameless")
    (tmp_path / "nameless-1.2.dist-info" / "METADATA").unlink()
    with importable(tmp_path):
        assert main(["plugins"]) == 1
    assert "? (nameless_plugin)" in capsys.readouterr().out


def test_two_plugins_of_one_name_are_both_broken(tmp_path: Path) -> None:
    install(tmp_path, "toy", "toy_plugin", TOY, distribution="ttt-toy")
    install(tmp_path, "toy", "other_toy_plugin", TOY, distribution="another-toy")
    with importable(tmp_path):
        toys = [plugin for plugin in discover() if plugin.name == "toy"]
        with pytest.raises(PluginError, match="claimed more than once: another-toy, ttt-toy"):
            get_backbone("toy")
    assert [plugin.backbone for plugin in toys] == [None, None]
    assert {plugin.distribution for plugin in toys} == {"ttt-toy", "another-toy"}


def test_get_backbone_names_what_there_is(tmp_path: Path) -> None:
    install(tmp_path, "toy", "toy_plugin", TOY)
    install(tmp_path, "missing", "broken_missing", BROKEN["missing"][0])
    with importable(tmp_path):
        assert get_backbone("toy").name == "toy"
        with pytest.raises(UsageError, match=r"unknown backbone 'tyo' \(did you mean 'toy'\?\); installed: .*toy"):
            get_backbone("tyo")
        with pytest.raises(PluginError, match=r"backbone 'missing' of ttt-missing 1\.2 is broken: ModuleNotFoundError"):
            get_backbone("missing")


def test_what_a_plugin_prints_when_it_is_imported_is_not_among_the_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "toy", "toy_plugin", TOY + "print('loading toy')\n")
    with importable(tmp_path):
        assert main(["plugins", "--json"]) == 0
    printed = capsys.readouterr()
    assert "toy" in [plugin["name"] for plugin in json.loads(printed.out)]
    assert "loading toy" in printed.err


def test_the_former_name_of_a_fact_is_refused_with_the_one_it_has_now() -> None:
    facts = BackboneFacts(dim=64, num_heads=4, num_layers=2, checkpoints_around_scans=(1, 0))
    assert dataclasses.replace(facts, gates=2).checkpoints_around_scans == (1, 0)
    with pytest.raises(TypeError, match=r"BackboneFacts\.scans is now called checkpoints_around_scans"):
        BackboneFacts(dim=64, num_heads=4, num_layers=2, scans=(1, 0))  # type: ignore[arg-type]
