"""`ttt new-backbone`: what it writes, which names and folders it refuses, and that nothing half written is left.

That what it writes is installed, keeps the laws and trains is in `test_example.py`.
"""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from fake_distributions import TOY, importable, install
from new_backbone import KINDS as OPTIONS
from new_backbone import lines_to_change

from ttt.files import TEMPORARY
from ttt_cli.main import main
from ttt_cli.new_backbone import _OF_THIS_PROJECT, TEMPLATES, Names, contents

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "plugins" / "example"
KINDS = ("backbone", "hf")
NAMES = ("example", "my-model", "my_model", "a", "torch", "x9", "deep-2-net", "on-line")
"""Names that can be given. A module of the same name is none of ours: the package begins with `ttt_`."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of the test's own."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def _files(root: Path) -> dict[str, bytes]:
    """What is in a folder, without what tools leave."""
    left = {"__pycache__", "build"}
    found = [file for file in root.rglob("*") if file.is_file()]
    kept = [f for f in found if not any(part in left or part.endswith(".egg-info") for part in f.parts)]
    return {str(file.relative_to(root)): file.read_bytes() for file in kept}


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on standard error."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").rstrip("\n")


# --- what it writes ---


def test_the_example_is_what_the_template_gives(capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, the change belongs into `cli/ttt_cli/templates/backbone`; then `make example`."""
    assert main(["new-backbone", "example"]) == 0
    assert _files(Path("ttt-example")) == _files(EXAMPLE)
    assert capsys.readouterr().out.startswith("Wrote ttt-example. ")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_it_writes_is_sound_for_each_name(kind: str, name: str, here: Path) -> None:
    hf = ["--hf"] * (kind == "hf")
    assert main(["new-backbone", name, "--out", "new", *hf]) == 0
    names = Names.of(name)
    files = {path: content.decode() for path, content in _files(here / "new").items()}
    assert names.package.isidentifier()
    assert {path.split("/")[0] for path in files} == {"README.md", "pyproject.toml", "tests", names.package}
    for path, text in files.items():
        assert not re.search(r"\$|\.template|\bpackage/", text + path), path
        if path.endswith(".py"):
            ast.parse(text)
    assert f'\n{name} = "{names.package}.plugin"\n' in files["pyproject.toml"]
    assert yaml.safe_load(files[f"{names.package}/presets/demo.yaml"])["backbone"]["name"] == name
    assert f'\nTest{names.Class} = laws("{name}")\n' in files["tests/test_laws.py"]


@pytest.mark.parametrize("kind", KINDS)
def test_its_code_is_in_the_form_of_ours(kind: str, here: Path) -> None:
    assert main(["new-backbone", "my-model", *["--hf"] * (kind == "hf")]) == 0
    ruff = [str(Path(sys.executable).with_name("ruff"))]
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    for command in (["check", *config, "--ignore=D,I"], ["format", "--check", *config]):
        done = subprocess.run([*ruff, *command, "ttt-my-model"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_of_the_readme_has_its_places_and_the_reverse(kind: str) -> None:
    files = {path: text.decode() for path, text in contents(Names.of("my-model"), kind).items()}
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", files["README.md"], re.MULTILINE)
    told = {(int(step), path) for step, places in rows for path in re.findall(r"`([\w./]+)`", places)}
    marked = {(int(n), path) for path, text in files.items() for n in re.findall(r"# CHANGE (\d)[:,]", text)}
    assert [int(step) for step, _ in rows] == list(range(1, len(rows) + 1))
    assert marked <= told
    assert {step for step, _ in marked} == {step for step, _ in told}


def test_what_comes_next_is_printed_and_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-backbone", "my-model", "--out", "of mine/new"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Wrote of mine/new. It passes the laws and trains as it is:",
        "  cd 'of mine/new'",
        "  pip install -e '.[test]'",
        "  pytest tests",
        "  ttt train --backbone my-model",
        "Then put your model in: README.md says what to change, in which order; `grep -rn CHANGE .` finds the places.",
    ]


def test_the_templates_are_in_what_is_installed() -> None:
    """The wheel holds every file of its packages that git does not ignore."""
    config = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wheel = config.partition("[tool.hatch.build.targets.wheel]\n")[2].partition("\n[")[0]
    assert wheel.split("\n") == ['packages = ["ttt", "cli/ttt_cli"]', ""]
    assert TEMPLATES.parent == ROOT / "cli" / "ttt_cli"
    patterns = [line.strip("/*") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()]
    for kind in KINDS:
        for file in (TEMPLATES / kind).rglob("*"):
            assert file.suffix != ".py"  # pip would compile it
            assert not any(pattern in file.relative_to(ROOT).parts for pattern in patterns), file


# --- names ---

WRONG = {
    "": "NAME is empty; write what the backbone is to be called",
    "1x": "'1x' cannot be a backbone's name",
    "-": "'-' cannot be",
    "_x": "write `x`",
    "x-": "write `x`",
    "my--model": "write `my-model`",
    "my-_model": "write `my-model`",
    "MyModel": "write `mymodel`",
    "my model": "write `my-model`",
    "my.model": "write `my-model`",
    "modèle": "write `modele`",
    "ﬁne": "write `fine`",
    "模型": "'模型' cannot be",
    "а": "'а' cannot be",  # Cyrillic
    "x\n": r"'x\n' cannot be",
    "x\x1b[31m": r"'x\x1b[31m' cannot be",
    "a/b": "write `a-b`",
    "../up": "write `up`",
    "/tmp/up": "write `tmp-up`",
    r"a\b": "write `a-b`",
    "$name": "write `name`",
    "x" * 41: "has 41 characters; 40 are the most",
    "y" * 3000: "has 3000 characters",
    "class": "class is a word of Python's; write another, as `my-class`",
    "async": "is a word of Python's",
    "null": "YAML reads None",
    "on": "YAML reads True",
    "no": "YAML reads False",
    "data": "would give its options the name of ttt's own DataOptions",
    "backbone": "the name of ttt's own BackboneOptions",
    "ttt-mine": "so write `mine` for ttt-mine",
    "ttt_mine": "so write `mine` for ttt_mine",
    "moshi": "moshi is taken: the backbone moshi is installed; write another name",
    "cli": "the package ttt_cli is installed",
    "adapters": "the distribution ttt-adapters is installed",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_name_is_refused_in_a_sentence(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-backbone", "--", name]) == 2
    said = _said(capsys)
    assert WRONG[name] in said
    assert list(here.iterdir()) == []
    suggested = re.search(r"write (?:another, as )?`([^`]+)`", said)
    if suggested:
        assert main(["new-backbone", suggested[1]]) == 0


def test_a_name_is_taken_whatever_stands_between_its_words(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "my_toy", "toy_plugin", TOY)
    install(tmp_path, "broken", "broken_plugin", "import a_package_that_nobody_has\n", distribution="theirs")
    with importable(tmp_path):
        for name, taken in {"my-toy": "my_toy", "my_toy": "my_toy", "broken": "broken"}.items():
            assert main(["new-backbone", name]) == 2
            assert f"the backbone {taken} is installed" in _said(capsys)
    assert list(here.iterdir()) == []
    assert main(["new-backbone", "my-toy"]) == 0


def test_the_names_of_this_projects_distributions_are_taken_where_they_are_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {"example", *_OF_THIS_PROJECT} == {folder.parent.name for folder in ROOT.glob("plugins/*/pyproject.toml")}
    monkeypatch.setattr("ttt.plugins.names", tuple)
    assert main(["new-backbone", "videodit"]) == 2
    assert "ttt-videodit is a distribution of this project" in _said(capsys)


# --- folders ---


def _occupied(place: Path, kind: str) -> None:
    """Put something where the folder is to go."""
    if kind == "file":
        place.write_text("mine")
    elif kind == "link to nothing":
        place.symlink_to("nowhere")
    elif kind == "link to itself":
        place.symlink_to(place.name)
    elif kind == "FIFO":
        os.mkfifo(place)
    else:
        place.mkdir()
        (place / ".hidden").touch()


@pytest.mark.parametrize("kind", ["file", "link to nothing", "link to itself", "FIFO", "folder"])
def test_a_place_that_holds_anything_is_refused(kind: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _occupied(here / "ttt-mine", kind)
    before = [(file, os.lstat(file)[:7]) for file in here.rglob("*")]
    assert main(["new-backbone", "mine"]) == 2
    assert re.match("ttt-mine: is already there, and (is no folder|not empty); name .* --out", _said(capsys))
    assert [(file, os.lstat(file)[:7]) for file in here.rglob("*")] == before


@pytest.mark.parametrize("out", ["", " ", "-", "/dev/stdout"])
def test_an_out_that_is_no_folder_is_refused(out: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-backbone", "mine", "--out", out]) == 2
    assert _said(capsys) == "--out: name a folder that is new or empty"
    assert list(here.iterdir()) == []


def test_the_folder_that_one_is_in_is_not_replaced(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-backbone", "mine", "--out", "."]) == 2
    assert _said(capsys).startswith(".: is the folder that you are in; go to the one above it")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("out", ["empty", "link", "new", "deep/er/new", "empty/../new", "new/", "über $x"])
def test_an_empty_folder_and_a_new_one_are_taken(out: str, here: Path) -> None:
    (here / "empty").mkdir()
    (here / "link").symlink_to("empty")
    umask = os.umask(0o027)
    try:
        assert main(["new-backbone", "example", "--out", out]) == 0
    finally:
        os.umask(umask)
    assert _files(here / out) == _files(EXAMPLE)
    assert (here / "link").is_symlink()
    assert Path(here / out).stat().st_mode & 0o777 == 0o750
    assert not list(here.rglob(f"{TEMPORARY}*"))


@contextmanager
def _as_a_user() -> Iterator[None]:
    """Without root's right to write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nobody
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_place_that_cannot_be_written_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "file").touch()
    assert main(["new-backbone", "mine", "--out", "file/new"]) == 3
    assert "file is not a folder; name another place" in _said(capsys)
    for parent in (here, here.parent):
        parent.chmod(0o555)
    try:
        with _as_a_user():
            code = main(["new-backbone", "mine"])
    finally:
        for parent in (here, here.parent):
            parent.chmod(0o700)
    assert code == 3
    assert re.match("ttt-mine: cannot be written: (Permission denied|no permission to write in )", _said(capsys))
    assert main(["new-backbone", "mine", "--out", "x" * 300]) == 3
    assert "File name too long" in _said(capsys)
    assert [file.name for file in here.iterdir()] == ["file"]


FAILURES = {
    OSError(errno.ENOSPC, "No space left on device"): (3, "new/mine: no space left on the disk; nothing half written"),
    OSError(errno.EIO, "Input/output error"): (3, "new/mine: cannot be written: Input/output error"),
    KeyboardInterrupt(): (130, ""),
}


@pytest.mark.parametrize("error", FAILURES, ids=str)
@pytest.mark.parametrize("point", ["first", "last", "rename"])
def test_nothing_half_written_is_left(
    point: str, error: BaseException, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, rename = Path.write_bytes, os.rename
    last = len(_files(EXAMPLE))
    written: list[Path] = []

    def failing_write(path: Path, content: bytes) -> int:
        written.append(path)
        if len(written) == {"first": 1, "last": last}.get(point):
            write(path, content[: len(content) // 2])
            raise error
        return write(path, content)

    def failing_rename(source: Path, target: Path) -> None:
        if point == "rename":
            raise error
        rename(source, target)

    monkeypatch.setattr(Path, "write_bytes", failing_write)
    monkeypatch.setattr(os, "rename", failing_rename)
    code, sentence = FAILURES[error]
    assert main(["new-backbone", "mine", "--out", "new/mine"]) == code
    assert sentence in capsys.readouterr().err
    assert list(here.iterdir()) == []
    assert len(written) == (1 if point == "first" else last)
    monkeypatch.undo()
    os.chdir(here)
    assert main(["new-backbone", "mine", "--out", "new/mine"]) == 0  # and it goes now


def test_a_folder_that_fills_while_it_is_written_is_left_alone(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        Path(target).mkdir()
        (Path(target) / "theirs").touch()
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert main(["new-backbone", "mine"]) == 3
    assert "ttt-mine: cannot be written: Directory not empty" in capsys.readouterr().err
    assert [str(file) for file in Path().rglob("*")] == ["ttt-mine", "ttt-mine/theirs"]


def test_it_needs_no_torch() -> None:
    program = """
import sys
from ttt_cli.main import main
assert main(["new-backbone", "mine"]) == 0
print(sorted({"torch", "numpy", "transformers", "matplotlib", "rich"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    shutil.rmtree("ttt-mine")


# --- what is left to write ---


def test_the_lines_to_change_are_counted_at_the_marks(here: Path) -> None:
    (here / "plugin.py").write_text(
        'class A:\n    """Docstring."""\n\n'
        '    # CHANGE 1: a comment\n    x: int = 1\n    """Docstring."""\n    y = 2\n\n    z = 3\n\n'
        '    # CHANGE 2, with more\n    def f(self):\n        """Docstring."""\n\n        # none\n        return 1\n\n'
        "    def g(self): ...\n"
    )
    (here / "demo.yaml").write_text("a: 1\n# CHANGE 2: a comment\nb: 1\n# more\nc: 1\n\nd: 1\n")
    assert lines_to_change(here) == {"1": 2, "2": 4}


def test_the_published_figures_are_of_these_templates(here: Path) -> None:
    published = json.loads((ROOT / "benchmarks" / "results" / "new_backbone.json").read_text(encoding="utf-8"))
    assert set(published) == set(OPTIONS)
    for kind, options in OPTIONS.items():
        assert main(["new-backbone", "demo", "--out", kind, *options]) == 0
        assert lines_to_change(here / kind) == published[kind]["lines_to_change"]
