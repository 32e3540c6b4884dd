"""Files of Moshi that are missing, unreadable or something else: a finding for each, and one sentence from a run."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from ttt.check import check_config
from ttt_cli.main import main

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 153750422\n"
KEYS = ("moshi_path", "mimi_path", "tokenizer_path", "config_path", "lora_path")


def _config(folder: Path, files: dict[str, str]) -> str:
    (folder / "data").mkdir(exist_ok=True)
    named = "".join(f"  {key}: {path}\n" for key, path in files.items())
    return f"backbone:\n  name: moshi\n  preset: 7b\n{named}data: {{train_data: {folder / 'data'}}}\n"


def _found(folder: Path, files: dict[str, str]) -> dict[str, list[str]]:
    """The errors at the backbone's keys, codes and messages with their fix."""
    found = check_config("c", text=_config(folder, files)).findings
    return {
        key: [f"{one.code} {one.message}; {one.fix}" for one in found if one.path == f"backbone.{key}"] for key in files
    }


@pytest.mark.parametrize("linked", [False, True])
def test_paths_that_are_not_there_are_found_each_once(tmp_path: Path, linked: bool) -> None:
    files = {key: str(tmp_path / f"{key}.safetensors") for key in KEYS}
    for path in files.values() if linked else ():
        Path(path).symlink_to(tmp_path / "nowhere")
    for key, told in _found(tmp_path, files).items():
        assert len(told) == 1, told
        assert told[0].startswith(f"TTT501 '{files[key]}' does not exist; write the path of the ")


def test_folders_and_names_that_no_file_can_have(tmp_path: Path) -> None:
    for key, told in _found(tmp_path, dict.fromkeys(KEYS, str(tmp_path))).items():
        assert len(told) == 1, (key, told)
        assert told[0].startswith(f"TTT501 '{tmp_path}' is a folder, not a file")
    for told in _found(tmp_path, dict.fromkeys(KEYS, '"a\\0b"')).values():
        assert len(told) == 1, told
        assert "no file can have such a name" in told[0]
    assert all("~ is not expanded" in told[0] for told in _found(tmp_path, dict.fromkeys(KEYS, "~/x.bin")).values())


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's refusal is made here, since root may read every file."""
    file = tmp_path / "x"
    file.write_bytes(b"{}")

    def refuse(path: object, *_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("ttt.reading.os.open", refuse)
    for told in _found(tmp_path, dict.fromkeys(KEYS, str(file))).values():
        assert len(told) == 1
        assert told[0].startswith(f"TTT501 '{file}' cannot be read: Permission denied; write the path of the ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS, "is a git-lfs pointer to a file of 153750422 bytes; fetch the file itself: git lfs pull"),
        (b"", "is an empty file; was its download"),
        (b"<!DOCTYPE html><html>", "is a web page; download the file itself"),
        (b"\x80\x04\x95\x0c\x00\x00", "is a pickle; convert it to safetensors"),
    ],
)
def test_files_that_are_something_else_are_found_by_check_and_by_train(
    content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    files = dict.fromkeys(KEYS, str(file))
    for told in _found(tmp_path, files).values():
        assert [line.startswith(f"TTT520 '{file}' {words}") for line in told] == [True], told
    (tmp_path / "c.yaml").write_text(_config(tmp_path, files))
    assert main(["train", str(tmp_path / "c.yaml")]) == 3
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    assert words.split(";")[0] in " ".join(said.err.split())


def test_files_that_nothing_reads_are_left_alone_or_refused() -> None:
    """Mimi's weights without a tokenizer are not read if the weights are random; the language model's are refused."""
    text = "backbone: {{name: moshi, preset: 7b, random_weights: true, {key}: none.safetensors}}\n"
    assert not check_config("c", text=text.format(key="mimi_path")).findings
    for key in ("moshi_path", "lora_path"):
        (found,) = check_config("c", text=text.format(key=key)).findings
        assert f"random_weights leaves the weights random and does not read {key}" in found.message
