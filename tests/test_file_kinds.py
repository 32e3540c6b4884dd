"""What a file is instead of what was meant, by its first bytes; and that whoever reads files says so."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from ttt.errors import EnvironmentProblem, UnreadableError
from ttt.files import kind_of_content, kind_of_file, read_header, read_json, read_tensors
from ttt.foreign import foreign, foreign_page

LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 153750422\n"
)


def _torch_saved(*, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def _zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", "a")
    return stream.getvalue()


def _tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return stream.getvalue()


KINDS = {
    "a git-lfs pointer to a file of 153750422 bytes; fetch the file itself: git lfs pull": LFS,
    "a git-annex pointer; fetch the file itself: git annex get": b"/annex/objects/SHA256E-s15--4d.safetens",
    "an empty file; was its download or copy broken off": b"",
    "a web page; download the file itself": b"\n <!DOCTYPE html>\n<html>",
    "an XML page, as a server sends for an error": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a pickle by torch.save; convert it to safetensors": _torch_saved(zipped=True),
    "a pickle; convert it to safetensors": pickle.dumps({"w": [1.0]}),
    "a zip archive; unpack it: unzip": _zipped(),
    "a tar archive; unpack it: tar -xf": _tarred(),
    "compressed with gzip; unpack it: gunzip": gzip.compress(b"{}"),
    "a GGUF file of llama.cpp": b"GGUF\x03\x00\x00\x00",
    "text in UTF-16; save it as UTF-8": '{"path": "a"}'.encode("utf-16"),
    "a WAV file": b"RIFF\x24\x08\x00\x00WAVEfmt ",
}


@pytest.mark.parametrize("words", KINDS)
def test_weights_and_settings_that_are_something_else_are_told_what_they_are(words: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(KINDS[words])
    assert str(kind_of_file(file)).startswith(words)
    for read, told in (
        (read_header, f"no safetensors file, but {words}"),
        (read_tensors, f"no safetensors file, but {words}"),
        (read_json, f"not JSON, but {words.split(';')[0]}; "),
    ):
        with pytest.raises(EnvironmentProblem) as refused:
            read(file)
        assert f"{file}: {told}" in str(refused.value)
        assert not isinstance(refused.value, UnreadableError), "an older checkpoint stands in for one that is damaged"
    assert "convert" not in str(refused.value), "of settings"


@pytest.mark.parametrize("words", KINDS)
def test_who_wants_text_is_told_the_same(words: str) -> None:
    content = KINDS[words][:512]
    if content:
        kind = kind_of_content(content, len(content))
        assert (foreign(content) or foreign_page(content)) == kind


def test_a_command_has_the_files_name_as_the_shell_reads_it() -> None:
    kind = kind_of_content(gzip.compress(b"{}"), 22, "my data.json")
    assert kind is not None
    assert kind.instead_of_text == "it is compressed with gzip; unpack it: gunzip -c 'my data.json' > NEW"


def test_a_safetensors_file_whose_header_begins_like_a_pickle_is_none() -> None:
    content = (640).to_bytes(8, "little") + b'{"w":'
    assert content.startswith(b"\x80\x02")
    assert "safetensors" in str(kind_of_content(content, 2000))


def test_an_old_pickle_of_torch_is_one() -> None:
    content = _torch_saved(zipped=False)
    assert str(kind_of_content(content[:512], len(content))).startswith("a pickle; convert it to safetensors")


def test_what_is_meant_is_nothing_else(tmp_path: Path) -> None:
    """A safetensors file with metadata, one whose header is long, JSON with blanks before it, a tokenizer, text."""
    from ttt_moshi import demo

    for content, kind in (
        (save({"w": torch.zeros(2)}, {"version": "https"}), "safetensors file"),
        (save({f"a.long.name.of.layer.{n}": torch.zeros(1) for n in range(500)}), "safetensors file"),
        (b'\n  {"dim": 8}', "JSON text"),
        (demo.TOKENIZER.read_bytes(), "SentencePiece model"),
    ):
        found = kind_of_content(content[:512], len(content))
        assert found is not None
        assert found.name == kind
    assert kind_of_content(b"a line of words\n", 16) is None
    (tmp_path / "x.json").write_bytes(b' {"dim": 8}')
    assert read_json(tmp_path / "x.json") == {"dim": 8}


def test_a_safetensors_file_cut_anywhere_is_refused_in_one_sentence(tmp_path: Path) -> None:
    whole = save({"w": torch.zeros(40), "v": torch.ones(3)})
    file = tmp_path / "w.safetensors"
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(EnvironmentProblem, match=r"cut short|an empty file|header promises"):
            read_tensors(file)
