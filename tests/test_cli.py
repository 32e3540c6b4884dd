"""The command `ttt`: what it prints where, what it writes, and the code it ends with."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import forking
import pytest
import yaml
from fake_distributions import TOY, importable, install
from toy_config import DEMO

from ttt.check import load_config
from ttt.check.json_schema import EDITOR_LINE
from ttt.plugins import forget
from ttt.version import __version__
from ttt_cli.app import COMMANDS
from ttt_cli.main import main

ROOT = Path(__file__).parent.parent
TRAINABLE = """\
from toy import ToyBackbone
from ttt.plugins.hookspecs import hookimpl

@hookimpl
def ttt_backbone():
    return ToyBackbone()
"""
BAD = "backbone: {name: toy}\nttt:\n  layrs: all\ntrain: {lr: fast}\n"
WARNED = "backbone: {name: toy}\nttt: {scan_checkpoint_group_size: 1, mini_batch_size: 1}\n"


@pytest.fixture(autouse=True)
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder, and beside it one where the toy and a broken plugin are installed."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    install(folder, "toy", "toy_plugin", TOY)
    install(folder, "broken", "broken_plugin", "import a_package_that_nobody_has\n")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT / "tests")]))
    with importable(folder):
        yield folder


@pytest.fixture
def trainable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toy that has a model; runs draw no pictures, which would take longer than they do."""
    from ttt.train import pictures

    monkeypatch.setattr(pictures, "draw_run", lambda run: [])
    (tmp_path / "plugins" / "toy_plugin.py").write_text(TRAINABLE)
    with importable(tmp_path / "plugins"):
        yield


def _write(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def _python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ttt_cli", *arguments]


# --- the command itself ---


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ttt {__version__}\n"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\S", text, re.MULTILINE)
        assert main([command, "--help"]) == 0
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    "arguments",
    [[], ["chekc"], ["check"], ["check", "--no-such-option"], ["init"], ["info"], ["check", "--format", "xml", "a"]],
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_interrupt_ends_with_130_and_a_bug_keeps_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, error in {"interrupted": "KeyboardInterrupt", "buggy": "AssertionError('of the plugin')"}.items():
        install(
            tmp_path / "plugins",
            name,
            f"{name}_plugin",
            f"from toy_config import ToyBackbone, hookimpl\n"
            f"class Plugin(ToyBackbone):\n    name = {name!r}\n"
            f"    @property\n    def rules(self):\n        raise {error}\n"
            f"@hookimpl\ndef ttt_backbone():\n    return Plugin()\n",
        )
    with importable(tmp_path / "plugins"):
        assert main(["check", _write("a.yaml", "backbone: {name: interrupted}")]) == 130
        assert capsys.readouterr().err == ""
        assert main(["check", _write("b.yaml", "backbone: {name: buggy}")]) == 1
        assert re.search(r"broken: AssertionError: of the plugin \(.*buggy_plugin\.py:6\)", capsys.readouterr().out)
    monkeypatch.setattr("ttt.check.load.run_rules", lambda *_: 1 / 0)  # of our own
    with pytest.raises(ZeroDivisionError):
        main(["check", _write("c.yaml", "backbone: {name: toy}")])


def test_commands_that_only_look_import_no_torch() -> None:
    _write("good.yaml", DEMO)
    _write("bad.yaml", BAD)
    commands = {
        "--help": 0,
        "plugins": 1,
        "check good.yaml": 0,
        "check bad.yaml": 1,
        "check bad.yaml --fix": 1,
        "check good.yaml --format sarif": 0,
        "schema": 0,
        "diff good.yaml good.yaml": 0,
        "import-config good.yaml": 2,
        "init --backbone toy --out -": 0,
        "train bad.yaml": 2,
        "train bad.yaml --resume": 2,
        "submit bad.yaml": 2,
        "submit good.yaml --dry-run": 0,
        "info nowhere": 3,
    }
    program = f"""
import sys
from ttt_cli.main import main
for command, expected in {commands!r}.items():
    assert main(command.split()) == expected, command
    heavy = {{'torch', 'numpy', 'moshi', 'matplotlib', 'rich'}} & set(sys.modules)
    assert not heavy, (command, heavy)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    # A pipe holds 64 KiB: the hundred findings that are shown must be more, or all is written before the reader leaves.
    _write("bad.yaml", "".join(f"{'x' * 900}{number}: 1\n" for number in range(1000)))
    assert len(subprocess.run(_python("check", "bad.yaml"), capture_output=True).stdout) > 3 << 15
    process = subprocess.Popen(_python("check", "bad.yaml"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141


def test_an_output_that_lacks_letters_gets_others() -> None:
    _write("c.yaml", "backbone: {name: toy}\nünï: 1\n")
    result = subprocess.run(
        _python("check", "c.yaml"), capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert result.returncode == 1
    assert b"unknown key `?n?`" in result.stdout


def _on_a_terminal(command: list[str], **environment: str) -> str:
    """What a command prints on a terminal 80 wide."""
    parent, child = pty.openpty()
    unset = {"NO_COLOR", "COLUMNS", "TERM"}
    env = {key: value for key, value in os.environ.items() if key not in unset} | {"TERM": "xterm"} | environment
    process = subprocess.Popen(command, stdout=child, stderr=child, env={**env, "COLUMNS": "80"})
    os.close(child)
    text = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not piece:
            break
        text += piece
    os.close(parent)
    process.wait(60)
    return text.decode()


def test_a_terminal_gets_colours_and_wrapped_lines_and_nothing_else_does() -> None:
    _write("c.yaml", WARNED + "eval: {eval_freq: often}\n")
    command = _python("check", "c.yaml")
    painted = _on_a_terminal(command)
    assert "\x1b[" in painted
    plain = _on_a_terminal(command, NO_COLOR="1")
    assert "\x1b" not in plain
    assert "\x1b" not in _on_a_terminal(command, TERM="dumb")
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == plain
    assert max(map(len, plain.splitlines())) <= 80
    piped = subprocess.run(command, capture_output=True, text=True).stdout
    assert "\x1b" not in piped
    assert max(map(len, piped.splitlines())) > 80
    assert " ".join(piped.split()) == " ".join(plain.split())


# --- ttt plugins ---


def test_plugins_lists_the_good_and_the_broken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "VERSION", "FROM", "BRINGS"]
    toy, broken = (next(line for line in lines if line.startswith(name)) for name in ("toy", "broken"))
    assert toy.split() == ["toy", "1.2", "ttt-toy", "(toy_plugin)", "backbone"]
    assert broken.endswith("BROKEN")
    moshi, videodit = (next(line for line in lines if line.startswith(name)) for name in ("moshi", "videodit"))
    can = "answer, precompute, index, read-data, stream, score, lora"
    assert moshi.split(maxsplit=4)[-1] == f"backbone (can {can}), import of configs"
    assert videodit.endswith(
        "  backbone (can sample, precompute, import-weights, score-diffusion, reset), import of configs"
    )
    assert "No module named 'a_package_that_nobody_has'" in lines[lines.index(broken) + 1]


def test_plugins_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--json"]) == 1
    found = {plugin["name"]: plugin for plugin in json.loads(capsys.readouterr().out)}
    assert found["toy"] == {
        "name": "toy",
        "distribution": "ttt-toy",
        "version": "1.2",
        "module": "toy_plugin",
        "brings": ["ttt.backbones"],
        "works": True,
        "error": None,
        "capabilities": [],
        "tasks": [],
    }
    moshi = ["answer", "precompute", "index", "read-data", "stream", "score", "lora"]
    assert found["moshi"]["capabilities"] == moshi
    assert found["videodit"]["capabilities"] == ["sample", "precompute", "import-weights", "score-diffusion", "reset"]
    assert not found["broken"]["works"]
    assert "ModuleNotFoundError" in found["broken"]["error"]


def test_plugins_where_there_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with importable(tmp_path), monkeypatch.context() as patch:
        patch.setattr(sys, "path", [])
        assert main(["plugins"]) == 0
        assert "pip install" in capsys.readouterr().out


# --- ttt init ---


def test_init_writes_a_config_that_checks_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--backbone", "toy"]) == 0
    assert Path("toy.yaml").read_text() == EDITOR_LINE + DEMO
    err = capsys.readouterr().err
    assert "ttt check toy.yaml" in err
    assert "`ttt schema --out ttt.schema.json`" in err
    assert main(["check", "toy.yaml"]) == 0
    assert main(["init", "--backbone", "toy", "--preset", "big", "--out", "-"]) == 0
    assert "layers: all" in capsys.readouterr().out


def test_init_does_not_replace_a_file_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    _write("mine.yaml", "precious")
    assert main(["init", "--backbone", "toy", "--out", "mine.yaml"]) == 2
    assert "--force" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "precious"
    assert main(["init", "--backbone", "toy", "--out", "mine.yaml", "--force"]) == 0
    assert Path("mine.yaml").read_text() == EDITOR_LINE + DEMO
    assert os.listdir() == ["mine.yaml"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--backbone", "tyo"], 2, "did you mean 'toy'?"),
        (["--backbone", "broken"], 3, "ModuleNotFoundError"),
        (["--backbone", "toy", "--preset", "bgi"], 2, "no preset 'bgi' (did you mean 'big'?); it has demo, big"),
        (["--backbone", "toy", "--out", "no/such/folder.yaml"], 3, "no/such/folder.yaml"),
        (["--backbone", "toy", "--out", ".", "--force"], 2, "a folder"),
    ],
)
def test_init_that_cannot(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert words in err
    assert len(err.splitlines()) == 1
    assert os.listdir() == []


# --- ttt check ---


@pytest.mark.parametrize(
    ("text", "code", "summary"),
    [
        (DEMO, 0, "c.yaml: no findings"),
        (WARNED, 0, "c.yaml: 1 warning"),
        (BAD, 1, "c.yaml: 2 errors"),
        ("ttt: [", 1, "c.yaml: 1 error"),
        ("backbone: {name: broken}", 1, "c.yaml: 1 error"),
    ],
)
def test_check_ends_with_the_worst_that_it_found(
    text: str, code: int, summary: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", _write("c.yaml", text)]) == code
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == summary
    assert err == ""


def test_check_of_several_files_checks_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    names = [_write("a.yaml", BAD), "nowhere.yaml", _write("b.yaml", DEMO)]
    assert main(["check", *names]) == 3
    out, err = capsys.readouterr()
    assert "a.yaml:3:3  error TTT101" in out
    assert out.splitlines()[-1] == "b.yaml: no findings"
    assert err == "error: nowhere.yaml: no such file; name a config, or write one with `ttt init`\n"


def test_check_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--format", "json", _write("a.yaml", BAD), _write("b.yaml", WARNED)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(finding["file"], finding["line"], finding["code"]) for finding in found] == [
        ("a.yaml", 3, "TTT101"),
        ("a.yaml", 4, "TTT102"),
        ("b.yaml", 2, "TTT201"),
    ]
    assert main(["check", "--format", "json", _write("c.yaml", DEMO)]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_check_takes_overrides_and_a_backbone(capsys: pytest.CaptureFixture[str]) -> None:
    _write("c.yaml", "ttt: {layers: [9]}\n")
    assert main(["check", "c.yaml", "--backbone", "toy", "--set", "ttt.layers=[1]"]) == 0
    assert main(["check", "c.yaml", "--backbone", "toy", "--set", "ttt.layers=[1]", "--set", "ttt.layers=[8]"]) == 1
    assert "--set ttt.layers=[8]  error TTT111  layer 8 does not exist" in capsys.readouterr().out


# --- ttt train ---


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "`ttt train --backbone moshi`"),
        (["nowhere.yaml"], 3, "nowhere.yaml: no such file"),
        (["bad.yaml"], 2, "error: bad.yaml: 2 errors"),
        (["good.yaml", "--set", "ttt.layers=[9]"], 2, "layer 9 does not exist"),
        (["good.yaml", "--set", "data.train_data=nowhere.jsonl"], 3, "'nowhere.jsonl' does not exist"),
        (["good.yaml", "--backbone", "sweet"], 2, "the config is for toy"),
        (["--backbone", "tyo"], 2, "did you mean 'toy'?"),
        (["--backbone", "broken"], 3, "ModuleNotFoundError"),
        (["folder"], 2, "continue the run in it with --resume"),
        (["folder", "--resume"], 2, "holds no run to resume"),
        (["good.yaml", "--resume"], 2, "--resume"),
        (["good.yaml", "--set", "run_dir=" + "a/" * 2000], 3, "cannot hold the run: 2,0"),
        (["good.yaml", "--set", "run_dir=good.yaml"], 3, "is a file"),
    ],
)
def test_a_run_that_cannot_start_says_why_and_writes_nothing(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _write("good.yaml", DEMO)
    _write("bad.yaml", BAD)
    Path("folder").mkdir()
    assert main(["train", *arguments]) == code
    err = capsys.readouterr().err
    assert words in err
    assert "error" in err
    assert sorted(str(path) for path in Path().rglob("*")) == ["bad.yaml", "folder", "good.yaml"]


def test_a_bad_config_is_shown_with_place_line_caret_and_fix(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", _write("bad.yaml", BAD)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "bad.yaml:3:3  error TTT101  unknown key `layrs` in `ttt`\n"
        "    3 |   layrs: all\n"
        "      |   ^^^^^\n"
        "    fix: write `layers`\n"
        "bad.yaml:4:13  error TTT102  `train.lr` must be a number, not 'fast'\n"
        "    4 | train: {lr: fast}\n"
        "      |             ^^^^\n"
        "    fix: write a number (default: 0.0001)\n"
        "error: bad.yaml: 2 errors\n"
    )


@pytest.mark.usefixtures("trainable")
@pytest.mark.parametrize("words", [["run"], ["run/config.yaml", "--set", "run_dir=run"], ["mine.yaml"]])
def test_a_requeued_job_needs_one_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = "backbone: {name: toy}\ntrain: {max_steps: 1}\n"
    _write("mine.yaml", f"{text}run_dir: run\n")
    if words != ["mine.yaml"]:
        Path("run").mkdir()
        _write("run/config.yaml", text)
    for said in ("no checkpoint yet to resume from", "done already"):
        assert main(["train", *words, "--resume"]) == 0
        assert said in capsys.readouterr().out
    assert Path("run/summary.json").is_file()
    assert Path("run/config.original.yaml").exists() == (words != ["mine.yaml"])


@pytest.mark.usefixtures("trainable")
def test_a_folder_that_is_named_is_the_run_whatever_its_config_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--backbone", "toy", "--set", "run_dir=run", "--set", "train.max_steps=1"]) == 0
    shutil.copytree("run", "copy")
    shutil.rmtree("copy/checkpoints")
    Path("copy/summary.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    assert main(["train", "copy", "--resume"]) == 0
    assert "copy: no checkpoint yet to resume from" in capsys.readouterr().out
    assert Path("copy/summary.json").is_file()
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before


@pytest.mark.usefixtures("trainable")
def test_the_command_that_a_diverged_run_ends_with_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--backbone", "toy", "--set", "run_dir=run", "--set", "ttt.base_lr=1.0e+30"]) == 4
    err = capsys.readouterr().err
    assert "Traceback" not in err
    command = re.findall(r"start anew: `ttt ([^`]*)`", err)[0]
    assert main([*shlex.split(command), "--set", "train.max_steps=1"]) == 0
    assert main(["train", "run", "--resume", "--set", "train.max_steps=1"]) == 0


@pytest.mark.usefixtures("trainable")
def test_the_demo_trains_moves_house_goes_on_and_says_what_it_made(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--set", "ttt.scan_checkpoint_group_size=1", "--set", "train.ckpt_freq=2"]
    assert main(["train", "--backbone", "toy", "--set", "run_dir=run", "--set", "train.max_steps=2", *arguments]) == 0
    err = capsys.readouterr().err
    assert "training the demo of toy" in err
    assert "--set ttt.scan_checkpoint_group_size=1  note TTT201" in err
    config = load_config("run/config.yaml").config
    assert (config.train.max_steps, config.ttt.scan_checkpoint_group_size, config.run_dir) == (2, 1, "run")

    Path("run").rename("moved")
    assert main(["train", "moved", "--resume", "--set", "train.max_steps=4"]) == 0
    assert not Path("run").exists()
    assert len(Path("moved/metrics.jsonl").read_text().splitlines()) == 4
    assert yaml.safe_load(Path("moved/config.yaml").read_text())["train"]["max_steps"] == 4
    capsys.readouterr()

    assert main(["train", "moved/config.yaml"]) == 2  # it holds a run, and nobody said to go on with it
    assert "already holds a run" in capsys.readouterr().err

    assert main(["info", "moved"]) == 0
    text = capsys.readouterr().out
    assert "step_000004" in text.splitlines()[0]
    assert re.search(r"^  mini_batch_size +4$", text, re.MULTILINE)
    assert main(["info", "moved/checkpoints/step_000002", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backbone"]["name"] == "toy"
    assert facts["ttt"]["mini_batch_size"] == 4
    assert [site["layer"] for site in facts["sites"]] == [0, 1, 2]
    assert facts["parameters"] > 0
    assert facts["written_by"] == f"ttt {__version__}"


@pytest.mark.usefixtures("trainable")
def test_a_loss_that_is_not_finite_ends_with_4(capsys: pytest.CaptureFixture[str]) -> None:
    _write("c.yaml", "backbone: {name: toy}\ndata: {poisoned: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]}\nrun_dir: run\n")
    assert main(["train", "c.yaml"]) == 4
    assert "the loss is nan" in capsys.readouterr().err


def program(*words: str) -> int:
    """Be the program `ttt`, with what is installed beside the working folder."""
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
    forget()
    sys.argv = ["ttt", *words]
    return main()


@pytest.mark.usefixtures("trainable")
def test_ctrl_c_saves_prints_the_way_on_and_ends_with_130() -> None:
    _write("c.yaml", "backbone: {name: toy}\ntrain: {max_steps: 1000000, lr: 1e-5}\nrun_dir: run\n")
    process = forking.start(program, "train", "c.yaml")
    metrics = Path("run/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "ttt train run/config.yaml --resume" in out
    assert "Traceback" not in out + err
    assert list(Path("run/checkpoints").iterdir())


# --- ttt info ---


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), (b"", "an empty file"), (b"\x10\0\0\0\0\0\0\0{not json at all", "does not parse")],
)
def test_info_of_what_is_no_adapter_ends_with_3(
    content: bytes | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        Path("adapter_model.safetensors").write_bytes(content)
    assert main(["info", "adapter_model.safetensors"]) == 3
    err = capsys.readouterr().err
    assert err.startswith("error: adapter_model.safetensors")
    assert words in err


# --- several processes ---


def test_a_layout_of_several_processes_is_refused_to_one_before_it_loads_anything(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("c.yaml").write_text("backbone: {name: toy}\ntrain: {batch_size: 2, parallel: {shard: 2}}\n")
    assert main(["train", "c.yaml"]) == 2
    printed = capsys.readouterr()
    assert "loading" not in printed.out
    assert "train.parallel: the sizes make a multiple of 2 processes, but this is one process; start as" in printed.err


@pytest.mark.parametrize(("command", "number"), [("train", 0), ("train", -3), ("precompute", 0), ("precompute", 2000)])
def test_a_number_of_processes_that_cannot_be_is_told_in_a_sentence(
    command: str, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("c.yaml").write_text("backbone: {name: toy}\n")
    assert main([command, "c.yaml", "--nproc", str(number)]) == 2
    told = "at most 1,024 processes" if number > 0 else "a run has at least one process; leave --nproc out for one"
    assert f"--nproc {number}: {told}\n" in capsys.readouterr().err
