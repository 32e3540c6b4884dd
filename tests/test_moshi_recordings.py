"""Recordings that were cut, damaged, of other kinds or odd, and transcripts that do not fit: told when a run starts, by
`ttt check`, and by `ttt check --data`."""

from __future__ import annotations

import json
import shlex
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import toy
from rich.console import Console

from ttt.check import check_config
from ttt.check.whole_data import read_all_data
from ttt.config import Finding
from ttt.errors import EnvironmentProblem
from ttt.plugins import get_backbone
from ttt_cli.main import main
from ttt_moshi import demo, hearing
from ttt_moshi.audio import UnreadableAudioError, inspect_audio, read_audio, read_wholly
from ttt_moshi.codec import DemoCodec
from ttt_moshi.data import SpeechWindows, load_tokenizer
from ttt_moshi.data_rules import DATA_RULES
from ttt_moshi.interleave import Word
from ttt_moshi.options import MoshiOptions
from ttt_moshi.recordings import read_recordings
from ttt_moshi.transcripts import Transcript

MOSHI = get_backbone("moshi")
RATE = 16000
WORDS = (("hello", (0.5, 0.9), "SPEAKER_MAIN"),)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def voices(seconds: float, rate: int = RATE) -> np.ndarray:
    """Two channels that differ, `[samples, 2]`."""
    times = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).normal(0, 0.02, (len(times), 2))
    return np.stack([0.3 * np.sin(2 * np.pi * 300 * (c + 1) * times) for c in range(2)], axis=1) + noise


def record(
    name: str,
    sound: np.ndarray | None = None,
    *,
    words: Any = WORDS,
    duration: float | None = None,
    change: Callable[[bytes], bytes] = bytes,
    index: str = "data.jsonl",
    rate: int = RATE,
    beside: dict[str, Any] | None = None,
    **form: Any,
) -> Path:
    """A recording, its transcript, and its line in an index."""
    sound = voices(4.0, rate) if sound is None else sound
    soundfile.write(name, sound, rate, **form)
    Path(name).write_bytes(change(Path(name).read_bytes()))
    Path(name).with_suffix(".json").write_text(json.dumps({"alignments": words, **(beside or {})}))
    with open(index, "a", encoding="utf-8") as file:
        line = {"path": name, "duration": len(sound) / rate if duration is None else duration}
        file.write(json.dumps(line) + "\n")
    return Path(index)


def started(index: str = "data.jsonl") -> list[str]:
    """What a run says of its data when it starts."""
    notes: list[str] = []
    read_recordings(Path(index), frame_sec=0.08, field="data.train_data", notes=notes)
    return notes


def refused(index: str = "data.jsonl") -> str:
    with pytest.raises(EnvironmentProblem) as caught:
        started(index)
    return str(caught.value)


def found(index: str = "data.jsonl", **data: Any) -> dict[str, Finding]:
    """The findings of a plain check, by code, without those about other things."""
    written = json.dumps({"train_data": index, "eval_data": str(demo.EVAL_DATA), **data})
    findings = check_config("c.yaml", text=f"backbone: {{name: moshi}}\ndata: {written}\n").findings
    return {finding.code: finding for finding in findings if finding.code[:3] == "MSH"}


# --- files that were cut or damaged ---


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda whole: whole[: round(len(whole) * share)]


def hole(whole: bytes) -> bytes:
    """Some of the middle is not there."""
    return whole[: len(whole) // 2] + whole[len(whole) * 6 // 10 :]


def noise(whole: bytes) -> bytes:
    """Some of the middle is overwritten."""
    middle, size = len(whole) // 2, len(whole) // 5
    return whole[:middle] + np.random.default_rng(1).bytes(size) + whole[middle + size :]


FORMS: dict[str, dict[str, Any]] = {
    "a.wav": {"subtype": "PCM_16"},
    "float.wav": {"subtype": "FLOAT"},
    "24.wav": {"subtype": "PCM_24", "format": "WAVEX"},
    "mulaw.wav": {"subtype": "ULAW"},
    "adpcm.wav": {"subtype": "MS_ADPCM"},
    "a.rf64": {"format": "RF64"},
    "rf64.wav": {"format": "RF64", "subtype": "PCM_24"},
    "a.w64": {"format": "W64"},
    "a.aiff": {},
    "a.flac": {},
    "a.ogg": {},
    "a.mp3": {},
}


@pytest.mark.parametrize("share", [0.3, 0.62, 0.9])
@pytest.mark.parametrize("name", FORMS)
def test_a_file_that_was_cut_is_refused_when_the_run_starts(name: str, share: float) -> None:
    record("whole.wav")
    record(name, change=cut(share), **FORMS[name])
    record("cut.wav", change=cut(0.62))
    told = refused().split("\n")
    assert told[0] == "data.train_data: 2 recordings cannot be used:"
    assert told[1].startswith(f"  data.jsonl:2: {name}: cannot be decoded: it")
    assert told[2].startswith("  data.jsonl:3: cut.wav: cannot be decoded: it was cut: it holds 2.48 s (158,")
    assert "of the 4.00 s (256,000 bytes) of sound that its header counts; copy or download it again" in told[2]


@pytest.mark.parametrize("share", [0.3, 0.62])
def test_opus_that_was_cut_differs_from_its_line(share: float) -> None:
    """Its length is that of its last page, so only the index tells."""
    record("a.opus", format="OGG", subtype="OPUS", rate=48000, change=cut(share), sound=voices(8, 48000))
    assert ': a.opus: "duration" is 8, but the audio lasts ' in refused()


@pytest.mark.parametrize("change", [hole, noise])
@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3"])
def test_damage_in_the_middle_is_found_when_the_run_starts(name: str, change: Callable[[bytes], bytes]) -> None:
    record(name, voices(6), change=change)
    assert f"data.jsonl:1: {name}: cannot be decoded: " in refused()


def test_too_much_to_decode_at_the_start_is_left_to_the_check_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hearing, "_MOST_WHOLE_SEC", 5.0)
    record("good.flac")
    record("a.flac", voices(40), change=lambda all: all[: len(all) * 29 // 100] + all[len(all) * 34 // 100 :])
    (note,) = started()
    assert "1 compressed recordings (0.0 h) were decoded at their ends only; `ttt check CONFIG --data` deco" in note
    text = "backbone: {name: moshi}\ndata: {train_data: data.jsonl, eval_data: data.jsonl}\n"
    Path("c.yaml").write_text(text)
    assert main(["check", "c.yaml"]) == 0
    assert main(["check", "c.yaml", "--data"]) == 1


def test_a_window_over_damage_is_told_with_what_was_wanted_and_what_came() -> None:
    record("a.flac", voices(6), change=hole)
    info = inspect_audio(Path("a.flac"))
    with pytest.raises(UnreadableAudioError, match=r"of the 5.00 s from 1.00 s on, [34]\.\d\d s \([\d,]+ of 80,000 s"):
        read_audio(Path("a.flac"), info, RATE, 6 * RATE)
    assert read_audio(Path("a.flac"), info, 0, RATE).shape == (2, RATE)


def test_whole_files_are_read_to_their_last_sample() -> None:
    for name, form in FORMS.items():
        record(name, voices(2), **form)
        info = inspect_audio(Path(name))
        assert info.seconds == pytest.approx(2.0, abs=0.11)
        pieces = torch.cat(list(read_wholly(Path(name), info)), 1)
        assert pieces.shape == (2, info.samples)
        heard = pieces[:, 2000:30000].square().mean(1).sqrt()
        torch.testing.assert_close(heard, torch.tensor([0.213, 0.213]), atol=0.02, rtol=0)
    assert started() == []


def wav(name: str, data: bytes, *, promised: int | None = None, more: bytes = b"") -> None:
    """A stereo WAV file of 16 bits whose header promises so many bytes of sound."""
    size = len(data) if promised is None else promised
    head = struct.pack("<IHHIIHH", 16, 1, 2, RATE, RATE * 4, 4, 16)
    content = b"WAVEfmt " + head + b"data" + struct.pack("<I", size) + data + more
    Path(name).write_bytes(b"RIFF" + struct.pack("<I", len(content) & 0xFFFFFFFF) + content)


SECOND = (voices(1) * 2**15).astype("<i2").tobytes()


@pytest.mark.parametrize(
    ("promised", "data", "told"),
    [
        (len(SECOND) * 2, SECOND, "it was cut: it holds 1.00 s (64,000 bytes) of the 2.00 s (128,000 bytes) of sound"),
        (len(SECOND), SECOND * 2, '"duration" is 2, but the audio lasts 1.00 s by its header, and 64,000 bytes follow'),
        (0, SECOND * 2, "its header does not say how long it is, as if written to a pipe, though 128,000 bytes of"),
        (0xFFFFFFFF, SECOND * 2, "its header does not say how long it is"),
        (0x7FFFF000, SECOND * 2, "its header does not say how long it is"),
        (0, b"", "0.000 s are less than one frame"),
    ],
)
def test_a_header_that_counts_something_else(promised: int, data: bytes, told: str) -> None:
    record("a.wav", voices(2))
    wav("a.wav", data, promised=promised)
    assert told in refused()


def test_what_follows_the_sound_is_no_matter() -> None:
    """A list of tags, or another program's rest."""
    record("a.wav", voices(1))
    wav("a.wav", SECOND, more=b"LIST" + struct.pack("<I", 4) + b"INFO")
    assert started() == []


@pytest.mark.parametrize("duration", [3.4, 4.6, 40.0])
def test_a_duration_that_is_not_the_files(duration: float) -> None:
    record("a.wav", duration=duration)
    assert f'"duration" is {duration:g}, but the audio lasts 4.00 s; correct the line' in refused()
    Path("data.jsonl").unlink()
    record("a.wav", duration=4.4)
    assert started() == []


# --- kinds of files ---


@pytest.mark.parametrize(
    "form",
    [
        *({"format": "OGG", "subtype": "OPUS"}, {"format": "RF64"}, {"format": "W64"}, {"format": "AU"}),
        *({"format": "AIFF", "subtype": "FLOAT"}, {"format": "WAV", "subtype": "IMA_ADPCM"}),
    ],
    ids=lambda form: "-".join(form.values()),
)
def test_kinds_that_need_soundfile(form: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read in windows that equal the whole, and without the package one sentence says what to do."""
    record("a.x", voices(4, 48000), rate=48000, **form)
    assert started() == []
    info = inspect_audio(Path("a.x"))
    whole = torch.from_numpy(soundfile.read("a.x", dtype="float32")[0].T)
    assert torch.equal(read_audio(Path("a.x"), info, 30001, 90001), whole[:, 30001:90001])
    monkeypatch.setitem(sys.modules, "soundfile", None)
    told = refused()
    assert (
        "is read by the package soundfile, which is not installed: pip install soundfile; or convert it: ffmpeg" in told
    )
    assert "ffmpeg -i a.x a.wav" in told


MP4 = b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(200)
OTHERS: dict[str, tuple[bytes, str]] = {
    "AAC": (MP4, "M4A (AAC or ALAC) is not read"),
    "WebM": (b"\x1a\x45\xdf\xa3" + bytes(200), "; convert it: ffmpeg -i a.wav a.flac"),
    "text": (b"no sound at all " * 20, "it is no sound file of a known kind; convert it: ffmpeg -i a.wav a.flac"),
    "git-lfs": (
        b"version https://git-lfs\nsize 9876\n",
        "it is a git-lfs pointer to a file of 9876 bytes; fetch the file",
    ),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "it is compressed with gzip; unpack it: gunzip -c a.wav > NEW"),
    "a page": (b"<!DOCTYPE html><html>", "it is a web page; download the file itself"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_read_is_named_with_the_way_out(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    content, told = OTHERS[kind]
    record("a.wav", change=lambda _: content)
    assert f"data.jsonl:1: a.wav: cannot be decoded: {told}" in refused() or told in refused()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("channels", [1, 3])
def test_another_number_of_channels(channels: int) -> None:
    record("a.wav", np.repeat(voices(1)[:, :1], channels, 1))
    assert "a.wav: mono; Moshi needs two" in refused() if channels == 1 else "a.wav: 3 channels; Moshi" in refused()


# --- transcripts ---


def test_words_that_no_window_reads_are_dropped_and_counted() -> None:
    words = [
        *(["late", [4.7, 5.0], "SPEAKER_MAIN"], ["at", [4.0, 4.1], "SPEAKER_MAIN"], ["hours", [9999, 9999.5], "A"]),
        *(["early", [-0.5, 0.2], "SPEAKER_MAIN"], ["back", [2.0, 1.0], "SPEAKER_MAIN"], ["never", [2, 2], "A"]),
        *(["two", [1.5, 3.0], "SPEAKER_MAIN"], ["over", [3.9, 4.4], "SPEAKER_MAIN"], ["", [3.1, 3.2], "SPEAKER_MAIN"]),
        *(["one", [0.5, 2.0], "SPEAKER_MAIN"], ["x", [0.1, 0.2], "A"]),
    ]
    record("a.wav", words=words)
    record("b.wav", words=[["alone", [4.7, 5.0], "SPEAKER_MAIN"]])
    (note,) = started()
    assert note == (
        "data.train_data: no window reads 4 words after the end of the recording: a.json ('late' at 4.7 s of 4.00 s), "
        "b.json ('alone' at 4.7 s of 4.00 s); 1 word before its beginning: a.json ('early' at -0.5 s of 4.00 s); "
        "2 words without duration: a.json ('back' at 2 s of 4.00 s); they are left out, as moshi-finetune does"
    )
    read = Transcript.read(Path("a.json"), 4.0)
    assert [word.text for word in read.words] == ["x", "one", "two", "", "over"]
    finding = found()["MSH501"]
    assert (finding.severity.value, finding.value, finding.path) == ("warning", 7, "data.train_data")
    assert "4 words after the end of the recording: a.json ('late' at 4.7 s of 4.00 s), b.json" in finding.message


def test_a_word_past_the_end_changes_no_window() -> None:
    """The windows are those of the same transcript without it."""
    codec, tokenizer = DemoCodec.load(), load_tokenizer(MoshiOptions())
    record("a.wav", index="a.jsonl")
    record("b.wav", index="b.jsonl", words=[*WORDS, ["late", [4.7, 5.0], "SPEAKER_MAIN"]])
    windows = [SpeechWindows(f"{x}.jsonl", codec=codec, tokenizer=tokenizer, duration_sec=3.0) for x in "ab"]
    assert torch.equal(torch.stack([windows[0][i] for i in (0, 1)]), torch.stack([windows[1][i] for i in (0, 1)]))
    assert windows[0].notice == DemoCodec.stand_in
    assert windows[1].notice is not None
    assert windows[1].notice.startswith(f"{DemoCodec.stand_in}\ndata.train_data: no window reads 1 word after the end")


@pytest.mark.parametrize("words", [[["a", [float("nan"), 1], "A"]], [["a", [0, float("inf")], "A"]]])
def test_times_at_which_upstream_fails_are_refused(words: Any) -> None:
    record("a.wav", words=words)
    assert "not [word, [start, end], speaker] with times in seconds" in refused()
    assert found()["MSH503"].severity.value == "error"


def test_a_transcript_in_milliseconds_is_refused() -> None:
    record("a.wav", words=[[word, [at, at + 200], "SPEAKER_MAIN"] for word, at in (("a", 0), ("b", 900), ("c", 1800))])
    told = "'c' starts at 1800 s, but the audio lasts 4.00 s; 2 of 3 words start after its end; times are in seconds"
    assert told in refused()
    assert told in found()["MSH503"].message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xef\xbb\xbf" + json.dumps({"alignments": WORDS}).encode(), None),
        (
            json.dumps({"alignments": WORDS}).encode("utf-16"),
            "a.json: cannot be read: it is text in UTF-16; save it as",
        ),
        (
            b"\x1f\x8b\x08" + bytes(50),
            "a.json: cannot be read: it is compressed with gzip; unpack it: gunzip -c a.json > NEW",
        ),
        (
            '{"alignments": [["é", [0, 1], "A"]]}'.encode("latin-1"),
            "a.json: cannot be read: it is not text in UTF-8: byte",
        ),
        (b"", "a.json: it is empty; if nobody speaks, write"),
        (b'{"alignments": [["a", [0.5', "a.json: it is no JSON to its end, as if it was cut (Expecting"),
        (b"a b c", "a.json: it is no JSON (Expecting value: line 1 column 1 (char 0)); write it again"),
        (b'{"words": []}', 'a.json: it is not an object with a list "alignments"'),
    ],
)
def test_what_a_transcript_is_instead(content: bytes, told: str | None) -> None:
    record("a.wav")
    Path("a.json").write_bytes(content)
    if told is None:
        assert started() == []
        assert found() == {}
    else:
        assert told in refused()
        assert told in found()["MSH503"].message


def test_conditions_are_said_to_be_unread() -> None:
    record("a.wav", beside={"text_conditions": {"description": "kind"}})
    record("b.wav", beside={"text_conditions": None})
    told = "1 transcript has text_conditions, which are not read: a.json"
    assert started() == [f"data.train_data: {told}"]
    assert found()["MSH502"].message == told


# --- what recordings sound like ---

VOICE = voices(8)
SILENCE = np.zeros_like(VOICE)
LEFT, RIGHT = VOICE * [1, 0], VOICE * [0, 1]
MONO = VOICE[:, :1].repeat(2, 1)
ODD: dict[str, tuple[np.ndarray, str]] = {
    "equal": (MONO, hearing.EQUAL),
    "nearly equal": (MONO + np.random.default_rng(2).normal(0, 5e-4, MONO.shape), hearing.EQUAL),
    "the same at half the level": (MONO * [1, 0.5], hearing.SCALED),
    "the same inverted": (MONO * [1, -1], hearing.SCALED),
    "silent": (SILENCE, hearing.SILENT),
    "no user": (LEFT, hearing.NO_USER),
    "swapped": (RIGHT, hearing.SWAPPED),
    "swapped, with noise": (RIGHT + VOICE[::-1] * [0.01, 0.01], hearing.SWAPPED),
}


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
@pytest.mark.parametrize("kind", ODD)
def test_odd_channels_are_told_when_the_run_starts(kind: str, name: str) -> None:
    sound, told = ODD[kind]
    record("good.wav", VOICE)
    record(name, sound)
    (note,) = started()
    assert note.startswith("data.train_data: in 1 of 2 recordings")
    assert f", {told}: {name}; " in note


def test_floats_beyond_full_scale_are_told() -> None:
    record("good.wav", VOICE)
    record("a.wav", VOICE)
    soundfile.write("a.wav", VOICE * 32767, RATE, subtype="FLOAT")
    (note,) = started()
    assert f"in 1 of 2 recordings heard in part, {hearing.LOUD}: a.wav; divide the samples" in note


def test_channels_are_swapped_by_a_command_that_a_shell_reads() -> None:
    assert shlex.split(hearing._WAYS_OUT[hearing.SWAPPED].split(": ")[1])[4] == "channelmap=1|0"


def test_moshis_silent_channel_without_words_is_told_as_such() -> None:
    record("a.wav", RIGHT, words=[["hm", [1, 2], "SPEAKER_01"]])
    record("b.wav", VOICE)
    (note,) = started()
    assert f"{hearing.NO_MOSHI}: a.wav" in note


def test_a_recording_is_heard_in_several_places_and_wholly_on_request() -> None:
    """Equal where it is heard in part, and different elsewhere."""
    sound = MONO.repeat(4, 0)
    info = record("a.wav", sound) and inspect_audio(Path("a.wav"))
    places = list(hearing._spans(info))
    assert len(places) == 6
    assert places[0][0] == 0
    assert info.samples - places[-1][1] < RATE // 12
    between = places[0][1] + RATE
    sound[between : between + RATE] *= [1, 0]
    soundfile.write("a.wav", sound, RATE)
    assert hearing.heard_in_part(Path("a.wav"), info).verdict(()) == hearing.EQUAL
    assert hearing.heard_wholly(Path("a.wav"), info).verdict(()) is None
    words = [Word("x", 1.0, 1.5, "SPEAKER_MAIN")]
    assert hearing.heard_wholly(Path("a.wav"), info).verdict(words) is None


# --- ttt check --data, and the codes ---


def test_check_data_names_every_recording_of_every_source(capsys: pytest.CaptureFixture[str]) -> None:
    record("a.flac", change=hole, sound=voices(6))
    record("b.flac", index="more.jsonl", change=hole, sound=voices(6))
    record("c.flac", MONO, index="held.jsonl")
    sources = "[{path: data.jsonl}, {path: more.jsonl, weight: 2}]"
    Path("c.yaml").write_text(f"backbone: {{name: moshi}}\ndata: {{train_data: {sources}, eval_data: held.jsonl}}\n")
    assert main(["check", "c.yaml"]) == 0
    capsys.readouterr()
    assert main(["check", "c.yaml", "--data", "--format", "json"]) == 1
    out, err = capsys.readouterr()
    told = {finding["code"]: finding for finding in json.loads(out)}
    assert told["TTT521"]["path"] == "data.train_data"
    for place in ("data.jsonl:1: a.flac: cannot be decoded: ", "more.jsonl:1: b.flac: cannot be decoded: "):
        assert place in told["TTT521"]["message"]
    assert hearing.EQUAL in told["TTT522"]["message"]
    assert "held.jsonl: decoding: recording 1/1" in err


def test_speech_without_transcripts_is_read_to_its_end_too(capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of sound files, and a list; their one channel is not compared with another."""
    Path("book").mkdir()
    for name, change in (("good", bytes), ("holed", hole), ("cut", cut(0.62))):
        soundfile.write(f"book/{name}.flac", voices(6)[:, 0], RATE)
        Path(f"book/{name}.flac").write_bytes(change(Path(f"book/{name}.flac").read_bytes()))
    record("mono.flac", voices(6)[:, 0], change=hole, index="mono.jsonl")
    for source, names in (("book", ("holed", "cut")), ("mono.jsonl", ("mono",))):
        Path("c.yaml").write_text(
            f"backbone: {{name: moshi}}\ndata: {{eval_data: [{{path: {source}, format: audio}}]}}\nrun_dir: r\n"
        )
        capsys.readouterr()
        assert main(["check", "c.yaml", "--data"]) == 1
        out = capsys.readouterr().out
        assert all(f"{name}.flac: cannot be decoded: " in out for name in names)
        assert "good.flac: " not in out
        assert "TTT522" not in out
        assert main(["train", "c.yaml"]) == 3
        err = capsys.readouterr().err
        assert all(f"{name}.flac: " in err for name in names)


def test_the_voice_of_speech_without_transcripts_is_heard() -> None:
    record("a.wav", RIGHT)
    for channel, told in (("left", f"in 1 of 1 recordings, {hearing.NO_VOICE}: a.wav; read"), ("right", "")):
        data = f"{{train_data: data.jsonl, format: audio, channel: {channel}}}"
        config = check_config("c", text=f"backbone: {{name: moshi}}\ndata: {data}\n").config
        assert config is not None
        notes = MOSHI.read_data(config, split="train", console=Console(quiet=True))
        assert [told in note for note in notes] == [True] * bool(told)


def test_check_data_reads_the_demos_data_and_not_those_of_a_broken_config(capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text("backbone: {name: moshi}\n")
    assert main(["check", "c.yaml", "--data"]) == 0
    assert "dialogue.jsonl: decoding: recording 1/1" in capsys.readouterr().out
    assert main(["check", "c.yaml", "--data", "--fix"]) == 2
    Path("e.yaml").write_text("backbone: {name: moshi}\ndata: {duration_sec: x}\n")
    assert main(["check", "e.yaml", "--data"]) == 1
    assert "its data are not read: its errors come first" in capsys.readouterr().err


def test_data_of_other_backbones_are_read_window_by_window_or_by_themselves() -> None:
    Path("good.txt").write_text(" ".join(str(number % 5) for number in range(40)) + "\n")
    Path("one.txt").write_text("1 " * 40 + "\n")
    Path("bad.txt").write_text("1 2 x\n")
    console = Console(quiet=True)

    def codes(backbone: Any, name: str) -> list[tuple[str, str]]:
        text = f"backbone: {{name: toy}}\ndata: {{eval_data: {name}, window: 8}}\n"
        config = check_config("c", text=text, backbone=backbone).config
        assert config is not None
        return [(finding.code, finding.message) for finding in read_all_data(config, backbone, console=console)]

    for backbone in (toy.ToyBackbone(), toy.MakingToy()):
        assert codes(backbone, "good.txt") == []
        assert codes(backbone, "bad.txt") == [("TTT521", "bad.txt:1: tokens are whole numbers below 16")]
    assert codes(toy.ToyBackbone(), "one.txt") == []
    ((code, told),) = codes(toy.MakingToy(), "one.txt")
    assert code == "TTT522"
    assert "windows hold one token: " in told


def test_a_run_refuses_what_the_check_names(capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback, and the exit code of what the machine lacks."""
    record("a.wav", change=cut(0.62))
    record("b.flac", change=hole, sound=voices(6))
    Path("c.yaml").write_text("backbone: {name: moshi}\ndata: {train_data: data.jsonl}\nrun_dir: r\n")
    assert main(["train", "c.yaml"]) == 3
    out, err = capsys.readouterr()
    assert "a.wav: it was cut: it holds 2.48 s" in out + err
    (Path("data.jsonl")).write_text(Path("data.jsonl").read_text().split("\n")[1] + "\n")
    assert main(["train", "c.yaml"]) == 3
    assert "data.jsonl:1: b.flac: cannot be decoded: " in capsys.readouterr().err
    assert not Path("r").exists()


@pytest.mark.parametrize("code", [code.number for rule in DATA_RULES for code in rule.codes])
def test_the_codes_are_explained_by_configs_of_their_own(code: str) -> None:
    entry = MOSHI.explanations()[code]
    for name, text in entry.files.items():
        Path(name).write_text(text, encoding="utf-8")
    bad, good = (check_config("c.yaml", text=text).findings for text in (entry.bad, entry.good))
    assert [(finding.code, finding.severity.value) for finding in bad] == [(code, entry.severity)]
    assert bad[0].fix
    assert good == ()


def test_reading_data_needs_no_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_moshi.data.load_codec", None)
    record("a.wav")
    config = check_config("c", text="backbone: {name: moshi}\ndata: {train_data: data.jsonl}\n").config
    assert MOSHI.read_data(config, split="train", console=Console(quiet=True)) == ()


def test_the_demos_own_data_are_read_as_training_reads_them() -> None:
    """In the format that the config says: as sound without transcripts, its two channels need a word."""
    checked = "backbone: {{name: moshi}}\ndata: {{format: audio{}}}\n"
    config, left = (check_config("c", text=checked.format(more)).config for more in ("", ", channel: left"))
    for read in (
        lambda config: MOSHI.read_data(config, split="train", console=Console(quiet=True)),
        lambda config: MOSHI.dataset(config, split="train", device="cpu"),
    ):
        with pytest.raises(EnvironmentProblem, match=r"stereo; write data\.channel"):
            read(config)
        read(left)
