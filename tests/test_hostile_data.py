"""Data, weights and videos that are none, lie or never end: a sentence at their place, from both plugins."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reading import KINDS

from ttt.check import check_config
from ttt.check.recordings import read_recordings
from ttt.config import Severity
from ttt.errors import EnvironmentProblem, TTTError, UsageError
from ttt.jsonl import Line, read_jsonl
from ttt_videodit import checkpoint, demo
from ttt_videodit.frames import UnreadableVideoError, inspect_video, read_frames
from ttt_videodit.index import LineError, parse_encoded, parse_listed
from ttt_videodit.options import VideoDiTOptions
from ttt_videodit.pretrained import source_of


@pytest.fixture(autouse=True)
def _never_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _too_long(*_: object) -> None:
    raise AssertionError("it waits for ever")


# --- sound ---


def wav(path: Path, *, rate: int = 24000, channels: int = 2, bits: int = 16, form: int = 1, **other: Any) -> Path:
    """A WAV file of a second whose header says what it is told."""
    data = other.get("data", bytes(24000 * 4))
    length, per = other.get("length", len(data)), channels * bits // 8
    head = struct.pack("<IHHIIHH", 16, form, channels, rate, rate * per & 0xFFFFFFFF, per & 0xFFFF, bits)
    riff = b"RIFF" + struct.pack("<I", (36 + length) & 0xFFFFFFFF) + b"WAVEfmt "
    path.write_bytes(riff + head + b"data" + struct.pack("<I", length) + data)
    return path


@pytest.fixture
def speech() -> Callable[[], Any]:
    """Windows of the recordings in `data.jsonl`."""
    pytest.importorskip("sphn")
    from ttt_moshi.codec import DemoCodec
    from ttt_moshi.data import SpeechWindows, load_tokenizer
    from ttt_moshi.demo import TOKENIZER

    codec, tokenizer = DemoCodec.load(), load_tokenizer(TOKENIZER)
    return lambda: SpeechWindows("data.jsonl", codec=codec, tokenizer=tokenizer, duration_sec=1)


def recording(folder: Path, *, words: Any = None, line: bytes | None = None, **entry: Any) -> None:
    """A line, its sound and its words, of which the test has put one there already."""
    written = json.dumps({"path": "a.wav", "duration": 1.0, **entry}).encode()
    (folder / "data.jsonl").write_bytes((written if line is None else line) + b"\n")
    if not os.path.lexists(folder / "a.wav"):
        wav(folder / "a.wav")
    if not os.path.lexists(folder / "a.json"):
        alignments = [["hello", [0.1, 0.4], "SPEAKER_MAIN"]] if words is None else words
        (folder / "a.json").write_text(json.dumps({"alignments": alignments}))


SOUNDS: dict[str, tuple[dict[str, Any], str]] = {
    "rate 0": ({"rate": 0}, "a.wav: "),
    "rate 1": ({"rate": 1}, "says 1 samples a second"),
    "rate 2^32 - 1": ({"rate": 0xFFFFFFFF}, "says 4294967295 samples a second"),
    "no channels": ({"channels": 0}, "a.wav: "),
    "65535 channels": ({"channels": 65535}, "a.wav: "),
    "no bits": ({"bits": 0}, "a.wav: "),
    "4 GB": ({"length": 0xFFFFFFF0}, "a.wav: "),
    "empty": ({"data": b""}, "less than one frame"),
    "text": ({"data": b"", "text": "hello\n" * 100}, "cannot be decoded"),
}


@pytest.mark.parametrize("sound", SOUNDS)
def test_a_sound_whose_header_lies_is_one_sentence(
    sound: str, tmp_path: Path, speech: Callable[[], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    header, words = SOUNDS[sound]
    wav(tmp_path / "a.wav", **header)
    if "text" in header:
        (tmp_path / "a.wav").write_text(header["text"])
    recording(tmp_path)
    with pytest.raises(EnvironmentProblem, match=r"data\.jsonl:1: ") as refused:
        speech()
    assert words in str(refused.value)
    assert capfd.readouterr().err == ""  # the decoder's panic writes a backtrace there


def test_what_else_is_written_meanwhile_is_only_held_back(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sphn")
    from ttt_moshi.audio import UnreadableAudioError
    from ttt_moshi.decoding import decode

    def panics() -> None:
        os.write(2, b"a backtrace")
        raise ValueError("broken")

    assert decode(Path("a"), lambda: os.write(2, b"a word of another thread")) == 24
    with pytest.raises(UnreadableAudioError, match="broken"):
        decode(Path("a"), panics)
    assert capfd.readouterr().err == "a word of another thread"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sound_that_is_no_number_is_told_with_its_time(value: float, tmp_path: Path, speech: Callable[[], Any]) -> None:
    samples = [0.0] * 24000 + [value] * 24000
    wav(tmp_path / "a.wav", bits=32, form=3, data=struct.pack("<48000f", *samples))
    recording(tmp_path)
    with pytest.raises(EnvironmentProblem, match=r"samples that are not finite, the first at 0\.50 s"):
        speech()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["data.jsonl", "a.wav", "a.json"])
def test_speech_from_what_is_no_file(name: str, kind: str, tmp_path: Path, speech: Callable[[], Any]) -> None:
    recording(tmp_path)
    (tmp_path / name).unlink()
    KINDS[kind](tmp_path / name)
    with pytest.raises(EnvironmentProblem, match=name.replace(".", r"\.")) as refused:
        speech()
    if kind != "10 GB" and not (kind == "a folder" and name == "data.jsonl"):  # a folder of lists is a way to say it
        assert f"{kind}, not a file" in str(refused.value)


WORDS: dict[str, tuple[Any, str]] = {
    "half a character": ([["\ud800", [0.1, 0.4], "SPEAKER_MAIN"]], "the word of alignment 1 holds U+D800"),
    "too long": ([["a", [0, 1], "x"], ["a" * 20_000, [0, 1], "x"]], "the word of alignment 2 has 20,000 characters"),
    "not a time": ([["a", [math.nan, 1], "SPEAKER_MAIN"]], "not [word, [start, end], speaker]"),
    "a huge time": ([["a", [0, 1e300], "SPEAKER_MAIN"]], "not [word, [start, end], speaker]"),
    "one time": ([["a", [0], "SPEAKER_MAIN"]], "not [word, [start, end], speaker]"),
    "a number": ([3], "alignment 1 is 3"),
}


@pytest.mark.parametrize("words", WORDS)
def test_words_that_no_tokenizer_reads(words: str, tmp_path: Path, speech: Callable[[], Any]) -> None:
    alignments, message = WORDS[words]
    recording(tmp_path, words=alignments)
    with pytest.raises(EnvironmentProblem) as refused:
        speech()
    assert message in str(refused.value)


def test_a_line_without_an_end_is_not_kept(tmp_path: Path, speech: Callable[[], Any]) -> None:
    recording(tmp_path)
    with (tmp_path / "data.jsonl").open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(EnvironmentProblem, match=r"data\.jsonl: cannot be read: line 2 is longer than 1 MiB"):
        speech()


@pytest.mark.parametrize(
    ("backbone", "name", "code", "words"),
    [
        ("moshi", "folder", "TTT501", "'folder' holds no line of data"),
        ("moshi", "empty.jsonl", "TTT501", "'empty.jsonl' holds no line of data"),
        ("moshi", "endless.jsonl", "TTT504", "1 of 1 (the first that were read) lines is not a JSON object: "
         "endless.jsonl: line 1 is longer than 1 MiB"),
        ("videodit", "endless.jsonl", "VDT501", "endless.jsonl: cannot be read: line 1 is longer than 1 MiB"),
        ("videodit", "folder", "VDT506", "it lists no video"),
    ],
)  # fmt: skip
def test_a_check_tells_of_data_that_a_run_would_refuse(
    backbone: str, name: str, code: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").touch()
    with (tmp_path / "endless.jsonl").open("wb") as file:
        file.truncate(10 << 30)
    text = f"backbone: {{name: {backbone}}}\ndata: {{train_data: {name}}}\n"
    errors = [found for found in check_config("c.yaml", text=text).findings if found.severity is Severity.ERROR]
    assert [found.code for found in errors] == [code]
    assert words in errors[0].message


TEXTS = st.text(st.characters(), max_size=8) | st.just("\ud800") | st.just("a.wav")
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
ENTRIES = st.dictionaries(st.sampled_from(["path", "duration", "captions", "start_sec", "latents"]), VALUES)
LINES = st.binary(max_size=40) | ENTRIES.map(lambda entry: json.dumps(entry).encode())


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(LINES)
def test_no_line_raises_anything_but_a_sentence(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    """What both plugins and the check make of a line."""
    from ttt_moshi.recordings import BadLineError, read_line

    folder = tmp_path_factory.getbasetemp()
    (folder / "a.wav").write_bytes(b"RIFF")
    for parse in (
        lambda: read_line(Line(folder / "data.jsonl", 1, line), 0.08),
        lambda: parse_listed(line, "list.jsonl:1", folder),
        lambda: parse_encoded(line, "index.jsonl:1", folder),
    ):
        with pytest.raises((BadLineError, LineError)):
            parse()
    (folder / "fuzzed.jsonl").write_bytes(line)
    read_recordings(str(folder / "fuzzed.jsonl"))


TIMES = st.sampled_from([0, 0.5, 1]) | st.floats()
ALIGNMENTS = st.lists(st.tuples(TEXTS, st.tuples(TIMES, TIMES), TEXTS), max_size=3)


@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(ALIGNMENTS, VALUES)
def test_no_words_raise_anything_but_a_sentence(alignments: list[Any], value: Any) -> None:
    from ttt_moshi.interleave import read_alignments

    for content in ({"alignments": alignments}, {"alignments": [*alignments, value]}, {"alignments": value}, value):
        words = []
        with contextlib.suppress(ValueError):
            words = read_alignments(content)
        for word in words:
            word.text.encode()


# --- videos ---


@pytest.mark.parametrize("kind", KINDS)
def test_video_from_what_is_no_file(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "x")
    with pytest.raises(UnreadableVideoError) as refused:
        inspect_video(tmp_path / "x")
    if kind != "10 GB":
        assert f"{kind}, not a file" in str(refused.value)
        with pytest.raises(LineError, match=f"x is {kind}, not a file"):
            parse_listed(b'{"path": "x", "captions": ["a"]}', "list.jsonl:1", tmp_path)
    with pytest.raises(EnvironmentProblem):
        list(read_jsonl(tmp_path / "x"))


@pytest.mark.parametrize(
    "content",
    [b"#EXTM3U\n#EXTINF:1,\nclip.mp4\n", b"ffconcat version 1.0\nfile clip.mp4\n", b"hello\n" * 100, b""],
    ids=["playlist", "concat", "text", "empty"],
)
def test_a_video_that_leads_elsewhere_or_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(demo.CLIP.read_bytes())
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(UnreadableVideoError, match="it is not a video, or a damaged one"):
        inspect_video(tmp_path / "a.mp4")


def test_a_name_that_ffmpeg_would_take_for_a_protocol_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "concat:clip.mp4").write_bytes(demo.CLIP.read_bytes())
    assert inspect_video(Path("concat:clip.mp4")).seconds == 7.6


def test_no_flipped_byte_of_a_header_raises_anything_but_a_sentence(tmp_path: Path) -> None:
    whole = demo.CLIP.read_bytes()
    header = whole.find(b"moov")
    told = 0
    for place in range(header - 4, len(whole), 61):
        content = bytearray(whole)
        content[place] ^= 0xFF
        (tmp_path / "a.mp4").write_bytes(content)
        try:
            inspect_video(tmp_path / "a.mp4")
            list(read_frames(tmp_path / "a.mp4", start_sec=0, count=2, height=16, width=16))
        except UnreadableVideoError:
            told += 1
    assert told > 3


@pytest.mark.parametrize("size", [(65_000, 65_000), (0, 64)])
def test_a_video_whose_header_says_an_absurd_size(size: tuple[int, int], tmp_path: Path) -> None:
    content = demo.CLIP.read_bytes()
    place = content.find(b"tkhd") + 4 + 76  # width and height, 16.16
    sample = content.find(b"avc1") + 28
    changed = bytearray(content)
    changed[place : place + 8] = struct.pack(">II", (size[0] << 16) & 0xFFFFFFFF, (size[1] << 16) & 0xFFFFFFFF)
    changed[sample : sample + 4] = struct.pack(">HH", size[0] & 0xFFFF, size[1] & 0xFFFF)
    (tmp_path / "a.mp4").write_bytes(changed)
    with contextlib.suppress(UnreadableVideoError):  # what the stream itself says may win over the header
        list(read_frames(tmp_path / "a.mp4", start_sec=0, count=2, height=16, width=16))


def test_frames_that_are_too_large_are_told_by_their_size() -> None:
    from ttt_videodit.frames import _require_size

    for size in ((100_000, 100_000), (0, 64), (64, -1)):
        with pytest.raises(UnreadableVideoError, match=f"{size[0]} × {size[1]} pixels"):
            _require_size(*size)
    _require_size(15360, 8640)  # 16K


@pytest.mark.parametrize("caption", ["\ud800", "a\0", "wave " * 180_000], ids=["half", "nul", "long"])
def test_a_caption_that_no_encoder_reads(caption: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    line = json.dumps({"path": "a.mp4", "captions": ["good", caption]}).encode()
    with pytest.raises(LineError, match="caption 2 of 2 h"):
        parse_listed(line, "list.jsonl:1", tmp_path)


@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a socket", "10 GB"])
def test_a_folder_of_weights_with_something_else_in_it(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "m" / "transformer").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "m" / "transformer")
    KINDS[kind](tmp_path / "m" / "transformer" / "config.json")
    with pytest.raises(EnvironmentProblem, match=r"transformer/config\.json is (larger|a )"):
        source_of(VideoDiTOptions(preset="5b", pretrained=str(tmp_path / "m")))


# --- another program's weights ---


def archive(path: Path, content: bytes, **others: bytes) -> None:
    with zipfile.ZipFile(path, "w") as made:
        for name, entry in {"x/data.pkl": content, "x/version": b"3\n", **others}.items():
            made.writestr(name, entry)


def older(path: Path, content: bytes) -> None:
    """The format of torch.save before 1.6: pickles one after another."""
    head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    path.write_bytes(head + content + pickle.dumps([], 2))


def in_itself(*keys: str) -> bytes:
    content: dict[str, Any] = {}
    inner = content
    for key in keys[:-1]:
        inner[key] = {}
        inner = inner[key]
    inner[keys[-1]] = content
    return pickle.dumps(content, 2)


def pairs(levels: int) -> bytes:
    """A key of a tuple of pairs of pairs, which takes 2^levels steps to hash."""
    pair: tuple[Any, ...] = ()
    for _ in range(levels):
        pair = (pair, pair)
    built = io.BytesIO()
    pickle.Pickler(built, 2).dump([pair])
    return built.getvalue().replace(b"]", b"}", 1).removesuffix(b"a.") + b"K\x01s."


def packed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("x/data.pkl", bytes(10 << 20))


def directory(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/data.pkl", pickle.dumps({}, 2))
    content = bytearray(path.read_bytes())
    end = content.rfind(b"PK\x05\x06")
    content[end + 12 : end + 16] = struct.pack("<I", 1 << 31)
    path.write_bytes(content)


def long_text(path: Path) -> None:
    older(path, b"\x80\x02X" + struct.pack("<I", 0xFFFFFFFF))
    with path.open("ab") as file:
        file.truncate(5 << 30)


CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "holds itself": (lambda path: archive(path, in_itself("model")), "holds no state_dict"),
    "holds itself in turns": (lambda path: older(path, in_itself("model", "state_dict")), "holds no state_dict"),
    "a key of pairs": (lambda path: archive(path, pairs(60)), "nested as no checkpoint is"),
    "a key of pairs, older": (lambda path: older(path, pairs(60)), "nested as no checkpoint is"),
    "levels": (lambda path: archive(path, b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."), "nested as no checkpoint"),
    "compressed": (packed, "x/data.pkl of its zip is compressed"),
    "a large directory": (directory, "a directory of 2,147,483,648 bytes"),
    "a long text": (long_text, "a pickle of more than 16 MiB"),
    "a cut pickle": (lambda path: archive(path, b"\x80\x02}X"), "or a damaged one"),
    "an empty stack": (lambda path: archive(path, b"\x80\x020."), "or a damaged one"),
    "code": (lambda path: archive(path, b"cos\nsystem\n(S'touch ran'\ntR."), "no code in it was run"),
    "a zip of nothing": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)) and None, "or a damaged one"),
    "an empty file": (lambda path: path.write_bytes(b"") and None, "no file of torch.save"),
}


@pytest.mark.parametrize("content", CHECKPOINTS)
def test_a_checkpoint_that_costs_more_than_it_is(content: str, tmp_path: Path) -> None:
    make, words = CHECKPOINTS[content]
    make(tmp_path / "x.pt")
    with pytest.raises(TTTError) as refused:
        checkpoint.open_checkpoint(tmp_path / "x.pt")
    assert words in str(refused.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["x.pt", "x.safetensors", "x.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a socket", "10 GB"])
def test_weights_from_what_is_no_file(kind: str, form: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / form)
    with pytest.raises(TTTError, match=form.replace(".", r"\.")) as refused:
        checkpoint.look_at(tmp_path / form)
    if kind != "10 GB":
        assert f"{kind}, not a file" in str(refused.value)


def test_a_tensor_of_more_numbers_than_the_file_has(tmp_path: Path) -> None:
    import torch

    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="a is a tensor whose numbers are not all in the file"):
        checkpoint.open_checkpoint(tmp_path / "x.pt")
    for older_format in (False, True):
        torch.save({"a": torch.ones(3)}, tmp_path / "x.pt", _use_new_zipfile_serialization=not older_format)
        assert checkpoint.open_checkpoint(tmp_path / "x.pt").tensors["a"].tolist() == [1, 1, 1]


def test_looking_at_a_checkpoint_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    archive(tmp_path / "x.pt", in_itself("model"))
    program = (
        "import sys; from pathlib import Path; from ttt_videodit.checkpoint import look_at; look_at(Path('x.pt'))\n"
        "print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
