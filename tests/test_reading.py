"""What is no file, never ends or holds something else is told in a sentence, wherever a file is read or replaced."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt import files, reading
from ttt.adapter_file import read_info
from ttt.check import check_config
from ttt.check.reading import read_source
from ttt.check.recordings import read_recordings
from ttt.errors import EnvironmentProblem, TTTError, UsageError
from ttt.prompts import given_prompts, read_prompts
from ttt.train.metrics import MetricsFile, read_metrics
from ttt_cli.main import main


@pytest.fixture(autouse=True)
def _never_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A read that waits for ever fails the test instead of the suite."""
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _too_long(*_: object) -> None:
    raise AssertionError("it waits for ever")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)  # in the working folder: a socket's path is short


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 << 30)


KINDS: dict[str, Callable[[Path], None]] = {
    "a FIFO": fifo,
    "a device": endless,
    "a folder": folder,
    "a socket": listening,
    "10 GB": sparse,
}
READERS: dict[str, Callable[[Path], Any]] = {
    "header": files.read_header,
    "tensors": files.read_tensors,
    "json": files.read_json,
    "config": lambda path: read_config(path),
    "prompts": lambda path: read_prompts(str(path)),
    "adapter": read_info,
    "metrics": lambda path: read_metrics(path) if not path.is_file() else files.read_json(path),
    "resumed metrics": lambda path: MetricsFile(path) if not path.is_file() else files.read_json(path),
}


def read_config(path: Path) -> None:
    found = read_source(path).findings
    if found:
        raise EnvironmentProblem(found[0].message)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_reader_of_the_core_tells_what_is_no_file(kind: str, reader: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "x")
    with pytest.raises(TTTError) as refused:
        READERS[reader](tmp_path / "x")
    if kind == "a folder" and reader == "adapter":  # which may lie in a folder
        assert "holds no adapter_model.safetensors" in str(refused.value)
    elif kind != "10 GB":
        assert kind.removeprefix("a ") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_is_read_and_its_limit_is_reached_and_not_passed(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"x" * 100)
    assert reading.read_file(file, limit=100) == b"x" * 100
    with pytest.raises(OSError, match="larger than 99 bytes"):
        reading.read_file(file, limit=99)
    assert reading.read_start(file, 7) == b"x" * 7
    for name in ("none", "a\0b", "\ud800"):
        with pytest.raises(OSError, match=r"No such file|no file can have such a name"):
            reading.read_file(tmp_path / name, limit=1)


def test_lines_are_counted_as_they_stand_and_none_is_too_long(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf{}\r\n\n  \n[1]")
    assert list(reading.read_lines(file)) == [(1, b"{}"), (4, b"[1]")]
    assert list(reading.read_lines(file, most=len(b"\xef\xbb\xbf{}\r\n\n  \n[1"))) == [(1, b"{}")]
    file.write_bytes(b"12345\n1234567\n")
    assert list(reading.read_lines(file, limit=7)) == [(1, b"12345"), (2, b"1234567")]
    with pytest.raises(OSError, match="line 2 is longer than 6 bytes"):
        list(reading.read_lines(file, limit=6))


def test_memory_that_a_file_takes_is_told_of_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is no matter of `batch_size`, which is what training says when memory is out."""

    class Hungry:
        def read(self, count: int) -> bytes:
            raise MemoryError

    with pytest.raises(OSError, match="larger than the memory that is left"):
        reading._read(Hungry(), 5)  # type: ignore[arg-type]


def test_lines_of_data_that_are_no_file_are_no_recordings(tmp_path: Path) -> None:
    for kind, make in KINDS.items():
        path = tmp_path / f"{kind[-2:]}.jsonl"
        make(path)
        found = read_recordings(str(path))
        assert found is None or not found.seconds


@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a socket"])
def test_check_says_what_the_data_are(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "x")
    text = "backbone: {name: moshi}\ndata: {train_data: x}\n"
    found = [finding for finding in check_config("c", text=text).findings if finding.code == "TTT501"]
    assert [f"'x' is {kind}, not a file" in finding.message for finding in found] == [True]


# --- streams ---


@pytest.mark.parametrize("name", ["/dev/stdin", "/dev/fd/0", "/proc/self/fd/0", "-"])
def test_a_config_may_come_through_a_pipe(name: str) -> None:
    """As from a shell's `ttt check <(…)`, which becomes the name of a FIFO that this process was handed."""
    ran = subprocess.run(
        [sys.executable, "-m", "ttt_cli", "check", name], input=b"backbone: {name: moshi}\nnot_a_key: 1\n",
        capture_output=True, check=False, timeout=50,
    )  # fmt: skip
    assert (ran.returncode, b"not_a_key" in ran.stdout, ran.stderr) == (1, True, b"")


def test_a_stream_is_none_to_write_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--fix", "--write", "/dev/stdin"]) == 2
    assert "/dev/stdin is a stream, which cannot be written to" in capsys.readouterr().err
    assert not reading.is_stream("/dev/fd/x")
    assert not reading.is_stream("/dev/zero")


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1"])
def test_the_names_of_standard_output_mean_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--backbone", "moshi", "--out", name]) == 0
    assert "backbone:" in capsys.readouterr().out


# --- what is written ---


WRITERS = {
    "init": ["init", "--backbone", "moshi", "--force", "--out", "x"],
    "import-config": ["import-config", "old.yaml", "--force", "--out", "x"],
    "schema": ["schema", "--out", "x"],
}


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a folder", "a socket"])
def test_nothing_but_a_file_is_replaced(
    kind: str, linked: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.yaml").write_text("moshi_paths: {hf_repo_id: a/b}\nduration_sec: 10\n")
    KINDS[kind](tmp_path / "y")
    (tmp_path / "x").symlink_to("y") if linked else (tmp_path / "y").rename(tmp_path / "x")
    before = os.lstat(tmp_path / "x"), os.stat(tmp_path / "x")
    for name, command in WRITERS.items():
        assert main(command) in (2, 3), name
        said = capsys.readouterr().err
        assert kind in said, name
        assert "Traceback" not in said, name
    for write in (files.write_bytes, lambda path, _: files.write_tensors(path, {}, {})):
        with pytest.raises(EnvironmentProblem, match=kind):
            write(tmp_path / "x", b"")
    after = os.lstat(tmp_path / "x"), os.stat(tmp_path / "x")
    assert [(facts.st_ino, facts.st_mode) for facts in after] == [(facts.st_ino, facts.st_mode) for facts in before]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.yaml", "x"] + ["y"] * linked


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root makes devices")
def test_a_devices_node_stays_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        os.mknod(tmp_path / "x", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this root may not make devices")
    assert main(WRITERS["init"]) == 3
    assert "it is a device, not a file" in capsys.readouterr().err
    assert stat.S_ISCHR(os.stat(tmp_path / "x").st_mode)


def test_a_link_goes_on_pointing_to_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")
    for content in (b"first", b"second"):  # to a file that is not there yet, and to one that is
        files.write_bytes(tmp_path / "link", content)
        assert (tmp_path / "there" / "file").read_bytes() == content
        assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["file"]
    (tmp_path / "ring").symlink_to("ring")
    with pytest.raises(EnvironmentProblem, match="a link that leads to itself"):
        files.write_bytes(tmp_path / "ring", b"")


@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a socket"])
def test_a_run_goes_into_a_folder(kind: str, tmp_path: Path) -> None:
    from ttt.train.rundir import RunDir

    KINDS[kind](tmp_path / "x")
    with pytest.raises(UsageError, match=f"is {kind}; name a folder"):
        RunDir(tmp_path / "x").require_unused()


# --- texts ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("a\ud800", "holds U+D800, half a character"),
        (os.fsdecode(b"caf\xe9"), "holds U+DCE9, half a character"),
        ("a\0b", "holds U+0000"),
        ("a" * (reading.MAX_TEXT + 1), "has 10,001 characters; 10,000 are the most"),
    ],
)
def test_a_text_that_no_encoder_reads(text: str, words: str, tmp_path: Path) -> None:
    assert reading.wrong_with(text) is not None
    with pytest.raises(UsageError, match=r"--prompt: the text for segment 2 ") as refused:
        given_prompts(["good", text])
    assert words in str(refused.value)
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(["good", {"text": text}]))
    with pytest.raises(UsageError, match=r"segment 2: its text ") as refused:
        read_prompts(str(file))
    assert words in str(refused.value)
    if text.strip():
        file.write_text(json.dumps(["good", {"text": "good", "neg_text": text}]))
        with pytest.raises(UsageError, match=r"segment 2: its neg_text "):
            read_prompts(str(file))


def test_any_other_text_is_read() -> None:
    for text in ("a", "ein Äffchen 🐒", "a\tb\nc", "a" * reading.MAX_TEXT):
        assert reading.wrong_with(text) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=12) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["text", "neg_text", "a"]), inner),
    max_leaves=12,
)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_prompts_raise_anything_but_a_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.json"
    file.write_bytes(content)
    try:
        read = read_prompts(str(file))
    except UsageError as error:
        assert str(error).startswith(str(file))  # noqa: PT017 - there may be none
    else:
        assert all(reading.wrong_with(text) is None for text in read.prompts)
        json.dumps(read.prompts, ensure_ascii=False).encode()
