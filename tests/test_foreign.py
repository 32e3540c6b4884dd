"""What is no text, or no list of JSON objects, is named as what it is, wherever the house reads a file."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ttt import reading
from ttt.check import check_config
from ttt.config import Severity
from ttt.errors import EnvironmentProblem, TTTError
from ttt.files import read_json
from ttt.foreign import foreign, foreign_list
from ttt.jsonl import read_jsonl

LINE = b'{"path": "a.wav", "duration": 2.0}\n'


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("a.jsonl", content)
    return file.getvalue()


FOREIGN: dict[str, tuple[bytes, str]] = {
    "UTF-16": (LINE.decode().encode("utf-16"), "it is text in UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8 "),
    "UTF-16 BE": (codecs.BOM_UTF16_BE + LINE.decode().encode("utf-16-be"), "it is text in UTF-16; "),
    "UTF-16 unmarked": (LINE.decode().encode("utf-16-le"), "it is text in UTF-16; "),
    "UTF-32": (LINE.decode().encode("utf-32"), "it is text in UTF-32; "),
    "gzip": (gzip.compress(LINE), "it is compressed with gzip; unpack it: gunzip "),
    "bzip2": (bz2.compress(LINE), "it is compressed with bzip2; unpack it: bunzip2 "),
    "xz": (lzma.compress(LINE), "it is compressed with xz; unpack it: unxz "),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00" + bytes(20), "it is compressed with zstd; unpack it: unzstd "),
    "zip": (zipped(LINE), "it is a zip archive; unpack it: unzip "),
    "Parquet": (b"PAR1\x15\x04" + bytes(20), "it is a Parquet table; write its rows as text"),
    "WAV": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(20), "it is a WAV file; name "),
    "FLAC": (b"fLaC\0\0\0\x22" + bytes(20), "it is a FLAC file; name "),
    "MP3": (b"ID3\x04\0\0" + bytes(20), "it is an MP3 file; name "),
    "pickle": (pickle.dumps([{"path": "a.wav"}]), "it is a pickle; "),
    "safetensors": (b"\x20\0\0\0\0\0\0\0{}" + bytes(20), "it is a safetensors file; "),
    "git-lfs": (
        b"version https://git-lfs.example/spec/v1\noid sha256:0\nsize 9876\n",
        "it is a git-lfs pointer to a file of 9876 bytes; fetch the file itself: git lfs pull",
    ),
    "web page": (b"\n<!DOCTYPE html><html>404</html>", "it is a web page; download the file itself"),
}
LISTS: dict[str, tuple[bytes, str]] = {
    "an array": (b"[" + LINE.strip() + b"]", "it is one JSON array; write an object on each line: jq -c '.[]' "),
    "a long array": (b"[\n  " + LINE + b"]\n", "it is one JSON array; "),
    "laid out": (
        b'{\n  "path": "a.wav"\n}\n',
        "it is JSON laid out over several lines; write an object on each line: ",
    ),
    "CSV": (b"path,duration\na.wav,2.0\n", "it is a table of separated values; write each row as a JSON object"),
    "TSV": (b"path\tduration\r\na.wav\t2.0\r\n", "it is a table of separated values; "),
}
MODELS = {"moshi": "", "transformers": ", config: {model_type: llama}, tokenizer: bytes"}
"""Backbones whose lists name files, or hold the data themselves; and what else their configs need."""
READERS: dict[str, Callable[[Path], Any]] = {
    "jsonl": lambda path: list(read_jsonl(path)),
    "json": read_json,
    "text": lambda path: reading.read_text(path, limit=1 << 20),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_text_is_named_with_its_way_out(kind: str, reader: str, tmp_path: Path) -> None:
    content, told = FOREIGN[kind]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises((EnvironmentProblem, OSError)) as refused:
        READERS[reader](tmp_path / "a.jsonl")
    assert told.removeprefix("it is ") in str(getattr(refused.value, "strerror", None) or refused.value)


def test_who_names_a_recording_in_place_of_a_list_is_told_to_name_the_list(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(FOREIGN["WAV"][0])
    with pytest.raises(EnvironmentProblem, match="it is a WAV file; name the list of the files instead"):
        list(read_jsonl(tmp_path / "a.jsonl"))
    with pytest.raises(EnvironmentProblem, match="not JSON, but a WAV file; name another file"):
        read_json(tmp_path / "a.jsonl")


@pytest.mark.parametrize("kind", LISTS)
def test_text_that_is_no_list_is_named_too(kind: str, tmp_path: Path) -> None:
    content, told = LISTS[kind]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(EnvironmentProblem) as refused:
        list(read_jsonl(tmp_path / "a.jsonl"))
    assert f"a.jsonl: cannot be read: {told}" in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [
        *(LINE, codecs.BOM_UTF8 + LINE, b"\n \n" + LINE, LINE.replace(b"\n", b"\r\n"), b"[1, 2]\n" + LINE, b"{}\n"),
        *(
            b"",
            b"{",
            b"FORM 10-K of a company",
            b"RIFF raff",
            b"ID3 is a tree",
            b"BZh, said the bee",
            b"hello, world 3",
        ),
        *('{"text": "é"}\n'.encode(), b"1,2\n", b"\0" * 600),
    ],
)
def test_what_may_be_a_list_is_left_to_who_reads_it(content: bytes) -> None:
    assert foreign(content[:512]) is None
    assert foreign_list(content[:512]) is None


@pytest.mark.parametrize("backbone", MODELS)
@pytest.mark.parametrize("kind", [*FOREIGN, *LISTS])
def test_a_check_names_what_a_run_would_refuse(
    kind: str, backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, told = {**FOREIGN, **LISTS}[kind]
    (tmp_path / "a.jsonl").write_bytes(content)
    text = f"backbone: {{name: {backbone}{MODELS[backbone]}}}\ndata: {{train_data: a.jsonl}}\n"
    (found,) = [found for found in check_config("c.yaml", text=text).findings if found.severity is Severity.ERROR]
    assert (found.code, found.path) == ("TTT504", "data.train_data")
    assert f"a.jsonl: {told}" in f"{found.message}; {found.fix}"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"path": "\xe9.wav"}', "byte 11, 0xe9, is not UTF-8; save the file as UTF-8, from Latin-1 by iconv"),
        (b'{"path": "a.wav"}\0\0\0', "it holds NUL bytes"),
        (b'{"path": "a.wav"}\r{"path": "b.wav"}\r', "its lines end with CR alone"),
    ],
)
def test_a_line_in_another_encoding_is_named(line: bytes, told: str) -> None:
    from ttt.jsonl import parse_object

    with pytest.raises(ValueError, match=told):
        parse_object(line)


def test_a_mark_at_the_beginning_is_read_over_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(codecs.BOM_UTF8 + json.dumps({"path": "a.wav"}).encode())
    assert read_json(file) == {"path": "a.wav"}
    assert [line.content for line in read_jsonl(file)] == [b'{"path": "a.wav"}']
    assert check_config("c", text=codecs.BOM_UTF8 + b"backbone: {name: moshi}\n").findings == ()


def test_a_config_to_import_is_named_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ttt_cli.main import main

    (tmp_path / "old.yaml").write_bytes(gzip.compress(b"a: 1"))
    assert main(["import-config", str(tmp_path / "old.yaml")]) == TTTError.exit_code + 1
    assert "it is compressed with gzip; unpack it: gunzip" in capsys.readouterr().err
