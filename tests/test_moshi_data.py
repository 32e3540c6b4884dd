"""Speech to Moshi's 17 streams: the text stream, windows, real Mimi, other sample rates, and everything that is wrong
with somebody's data."""

from __future__ import annotations

import copy
import importlib
import io
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import forking
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from moshi.models import loaders
from safetensors.torch import save_file

from ttt import plugins
from ttt.check import load_config
from ttt.errors import EnvironmentProblem, UsageError
from ttt.plugins import get_backbone
from ttt_moshi import demo
from ttt_moshi.audio import inspect_audio, read_audio, resample
from ttt_moshi.codec import DemoCodec
from ttt_moshi.data import SpeechWindows, speech_windows
from ttt_moshi.interleave import Word, frames_in, read_alignments, text_stream, words_between
from ttt_moshi.options import MoshiData, MoshiOptions
from ttt_moshi.weights import read_tokenizer

MOSHI = get_backbone("moshi")
PAD, END = 3, 0


# --- the text stream ---


def spell(text: str) -> list[int]:
    """One token for each letter: a is 10."""
    return [ord(letter) - ord("a") + 10 for letter in text]


def stream(words: list[tuple[str, float]], frames: int = 10) -> list[int]:
    """With ten frames a second, so that a word at 0.3 begins in frame 3."""
    return text_stream(
        [Word(text, start, start + 0.1, "SPEAKER_MAIN") for text, start in words],
        spell,
        frames=frames,
        frame_rate=10.0,
        padding_id=PAD,
        end_of_padding_id=END,
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [3] * 10),
        ([("ab", 0.35)], [3, 3, 0, 10, 11, 3, 3, 3, 3, 3]),
        ([("ab", 0.0)], [10, 11, 3, 3, 3, 3, 3, 3, 3, 3]),  # nothing before it to announce it
        ([("a", 0.1), ("b", 0.35)], [0, 10, 0, 11, 3, 3, 3, 3, 3, 3]),
        ([("ab", 0.1), ("c", 0.3)], [0, 10, 11, 12, 3, 3, 3, 3, 3, 3]),  # no padding between: none ends
        ([("abcdef", 0.1), ("g", 0.35)], [0, 10, 11, 16, 3, 3, 3, 3, 3, 3]),  # cut off by the next word
        ([("abc", 0.5), ("de", 0.52)], [3, 3, 3, 3, 0, 13, 14, 3, 3, 3]),  # in one frame: the last
        ([("abc", 0.8)], [3, 3, 3, 3, 3, 3, 3, 0, 10, 11]),  # cut off by the window's end
        ([("a", 1.2)], [3] * 10),
        ([("", 0.1), (" b ", 0.3)], [3, 3, 0, 11, 3, 3, 3, 3, 3, 3]),
    ],
)
def test_words_stand_where_they_begin(words, expected):
    assert stream(words) == expected


def test_unknown_letters_do_not_read_as_padding():
    """SentencePiece's unknown token has the id of the end of padding."""
    words = [Word("x", 0.2, 0.3, "SPEAKER_MAIN"), Word("y", 0.5, 0.6, "SPEAKER_MAIN")]
    spelling = {"x": [0, 20, 3, 21], "y": [0]}
    tokens = text_stream(words, spelling.__getitem__, frames=8, frame_rate=10.0, padding_id=PAD, end_of_padding_id=END)
    assert tokens == [3, 0, 20, 21, 3, 3, 3, 3]


@given(
    st.lists(st.tuples(st.text("abc", min_size=1, max_size=6), st.integers(0, 60)), max_size=12),
    st.integers(1, 30),
)
def test_the_stream_is_what_a_frame_by_frame_reader_writes(drawn, frames):
    """The format told as a machine: in each frame, words that have begun replace what is left to write."""
    words = sorted(((text, tick / 20 + 0.01) for text, tick in drawn), key=lambda word: word[1])
    expected, left = [], []
    for frame in range(frames):
        begun = [text for text, start in words if frame <= start * 10 < frame + 1]
        if begun:
            left = spell(begun[-1])
        if left:
            if expected and expected[-1] == PAD:
                expected[-1] = END
            expected.append(left.pop(0))
        else:
            expected.append(PAD)
    assert stream(words, frames) == expected


def test_only_moshis_words_of_the_window_are_written():
    words = [
        Word("before", 14.9, 15.2, "SPEAKER_MAIN"),
        Word("first", 15.0, 15.2, "SPEAKER_MAIN"),
        Word("user", 16.0, 16.2, "SPEAKER_OTHER"),
        Word("last", 29.9, 30.2, "SPEAKER_MAIN"),
        Word("after", 30.0, 30.2, "SPEAKER_MAIN"),
    ]
    kept = words_between(words, 15.0, 30.0)
    assert [word.text for word in kept] == ["first", "last"]
    assert kept[0].start == 0.0
    assert kept[1].end == pytest.approx(15.2)


def test_alignments_are_ordered_and_those_that_last_no_time_left_out():
    content = {"alignments": [["b", [2, 3.5], "A"], ["gone", [1, 1], "A"], ["a", [0.5, 1], "B"]], "text_conditions": 1}
    assert read_alignments(content) == [Word("a", 0.5, 1.0, "B"), Word("b", 2.0, 3.5, "A")]


@pytest.mark.parametrize(
    ("seconds", "rate", "frames"),
    [(15, 12.5, 188), (16, 12.5, 200), (0.08, 12.5, 1), (0.56, 12.5, 7), (100, 12.5, 1250)],
)
def test_frames_of_a_duration(seconds, rate, frames):
    assert frames_in(seconds, rate) == frames


# --- windows of the demo ---


@pytest.fixture(scope="module")
def codec() -> DemoCodec:
    return DemoCodec.load()


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(demo.TOKENIZER)


def demo_windows(split: str, **data: Any) -> SpeechWindows:
    return speech_windows(MoshiOptions(), MoshiData(**data), split=split, device="cpu")


def test_the_demos_windows():
    windows = demo_windows("train")
    assert len(windows) == 5
    assert windows.files == (range(5),)
    assert windows.describe(1) == "dialogue.flac, 15.0-30.0 s"
    assert windows.describe(4) == "dialogue.flac, 60.0-63.2 s"
    assert windows.notice == DemoCodec.stand_in
    batch = windows.collate([windows[0], windows[4]])
    assert batch.shape == (2, 17, 188)
    assert batch.dtype == torch.int64
    assert (batch[0] >= 0).all()
    # 3.24 s are 41 frames; the rest is nothing, in all streams
    assert (batch[1, :, :41] >= 0).all()
    assert (batch[1, :, 41:] == -1).all()
    with pytest.raises(IndexError):
        windows[5]


def test_left_is_moshi_right_is_the_user(codec):
    """In the first window the man speaks first, the woman second, each while the other is silent."""
    codes = demo_windows("train")[0]
    moshi, user = codes[1:9], codes[9:]
    assert moshi[:, 8:88].any(0).all()
    assert not moshi[:, 100:].any()
    assert not user[:, :88].any()
    assert user[:, 105:].any(0).float().mean() > 0.9
    path = demo.FOLDER / "dialogue.flac"
    sound = read_audio(path, inspect_audio(path), 0, 240000)
    left, right = codec.encode(sound[:, None])  # together, as a window is: alone a tie may fall otherwise
    assert torch.equal(left, moshi)
    assert torch.equal(right, user)


def test_the_text_stream_says_what_moshi_says(tokenizer):
    """Each word's tokens, as far as they fit, in the frame in which it begins; none of the user's."""
    windows = demo_windows("train")
    words = read_alignments(json.loads((demo.FOLDER / "dialogue.json").read_text(encoding="utf-8")))
    text = torch.cat([windows[i][0, :188] for i in range(5)])
    written = 0
    for word in words:
        if word.speaker == "SPEAKER_MAIN":
            window = int(word.start // 15)
            first = window * 188 + int((word.start - window * 15) * 12.5)
            assert text[first] == tokenizer.encode(word.text)[0]
            assert text[first - 1] not in (PAD, -1)
            written += 1
    assert written == 52
    silent = demo_windows("train")[4][0]
    assert (silent[:41] == PAD).all()


def test_a_window_is_encoded_once_when_it_is_asked_for(tmp_path, codec, tokenizer):
    index = write_recording(tmp_path, seconds=3.0)
    windows = SpeechWindows(index, codec=codec, tokenizer=tokenizer, duration_sec=1.0)
    first = windows[0]
    (tmp_path / "a.wav").unlink()
    assert torch.equal(windows[0], first)
    first.fill_(7)
    assert not torch.equal(windows[0], first)
    with pytest.raises(EnvironmentProblem, match=r"^data.train_data: .*data.jsonl:1: .*a.wav: .*No such file"):
        windows[1]


def test_the_demos_held_out_part_and_the_users_data(tmp_path):
    assert demo_windows("eval").describe(1) == "dialogue_eval.flac, 15.0-16.9 s"
    mine = str(write_recording(tmp_path, seconds=2.0))
    assert demo_windows("train", train_data=mine, duration_sec=1.0).describe(1) == "a.wav, 1.0-2.0 s"
    assert demo_windows("eval", train_data=mine).describe(0) == "a.wav, 0.0-2.0 s"
    assert demo_windows("eval", eval_data=mine).describe(0) == "a.wav, 0.0-2.0 s"
    assert demo_windows("train", eval_data=mine).describe(0) == "dialogue.flac, 0.0-15.0 s"
    with pytest.raises(EnvironmentProblem, match=r"^data.eval_data: nowhere.jsonl does not exist"):
        demo_windows("eval", eval_data="nowhere.jsonl")


def test_the_demos_model_codec_and_tokenizer_belong_together(codec, tokenizer):
    model = MOSHI.build(MoshiOptions(), device="cpu", dtype=torch.float32)
    assert model.card == codec.cardinality
    assert model.text_card == tokenizer.vocab_size()
    assert model.n_q == 2 * codec.num_codebooks
    assert model.dep_q == codec.num_codebooks
    assert (model.text_padding_token_id, tokenizer.pad_id()) == (PAD, PAD)
    assert (model.end_of_text_padding_id, tokenizer.unk_id()) == (END, END)
    assert model.zero_token_id == -1
    letters = 'The quick brown fox, it\'s 0123456789; (jumps) over-the lazy dog & "so on"! Why?'
    assert {PAD, END}.isdisjoint(tokenizer.encode(letters))


def test_the_dialogues_words_tell_their_turns():
    """Times rise, lie in the audio, and the channel of whoever speaks is the one that sounds."""
    for name in ("dialogue", "dialogue_eval"):
        info = inspect_audio(demo.FOLDER / f"{name}.flac")
        sound = read_audio(demo.FOLDER / f"{name}.flac", info, 0, info.samples)
        words = read_alignments(json.loads((demo.FOLDER / f"{name}.json").read_text(encoding="utf-8")))
        assert all(a.end <= b.start for a, b in itertools.pairwise(words))
        assert words[-1].end < info.seconds
        for word in words:
            said = sound[:, round(word.start * 16000) : round(word.end * 16000)].square().mean(1)
            own, other = said if word.speaker == "SPEAKER_MAIN" else said.flip(0)
            assert own > 1e-5
            assert other == 0


def _data_before_the_model():
    before = importlib.import_module("moshi.modules.rope")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("moshi", "ttt_moshi")]:
        del sys.modules[name]
    plugins.forget()
    loaded = load_config(None, text=plugins.get_backbone("moshi").presets()["demo"])
    loaded.backbone.dataset(loaded.config, split="train", device="cpu")
    loaded.backbone.build(loaded.backbone.tiny(), device="cpu", dtype=torch.float32)
    rope = importlib.import_module("moshi.modules.rope")
    assert rope is not before  # it was imported anew, without the switch that `conftest.py` sets
    assert not hasattr(rope.apply_rope, "__wrapped__"), "would compile"


def test_data_before_the_model_leaves_moshis_compiler_off(monkeypatch):
    """Moshi reads the switch when it is first imported: whoever comes first has to have set it, on a CPU."""
    monkeypatch.delenv("NO_TORCH_COMPILE", raising=False)
    with forking.start(_data_before_the_model) as process:
        _, err = process.communicate(300)
    assert process.returncode == 0, err


# --- the preset 7b ---


@pytest.fixture
def small_mimi(monkeypatch, tmp_path) -> dict[str, str]:
    """Paths of a Mimi of kyutai's structure with random weights, narrow enough to be quick."""
    config = copy.deepcopy(loaders._mimi_config)
    config["seanet"].update(dimension=32, n_filters=4)
    config["quantizer"].update(dimension=16, bins=64, input_dimension=32, output_dimension=32)
    config["transformer"].update(
        d_model=32, num_heads=2, num_layers=1, dim_feedforward=64, input_dimension=32, output_dimensions=[32]
    )
    monkeypatch.setattr(loaders, "_mimi_config", config)
    torch.manual_seed(0)
    mimi = loaders.get_mimi(None)
    for name, buffer in mimi.named_buffers():
        if name.endswith("embedding_sum"):
            buffer.normal_(std=0.02)
    weights = tmp_path / "mimi.safetensors"
    save_file(mimi.state_dict(), weights)
    (tmp_path / "moshi.safetensors").write_bytes(b"")  # the language model's weights are not read for data
    return {
        "moshi_path": str(tmp_path / "moshi.safetensors"),
        "mimi_path": str(weights),
        "tokenizer_path": str(demo.TOKENIZER),
    }


def test_kyutais_mimi_codes_the_windows(small_mimi):
    """The real `MimiModel`, through the real loader, at 24 kHz: each window is what Mimi makes of its sound."""
    options = MoshiOptions(preset="7b", **small_mimi)
    windows = speech_windows(options, MoshiData(train_data=str(demo.TRAIN_DATA)), split="train", device="cpu")
    assert windows.notice == (
        "the tokenizer has 300 tokens, but the model reads 32000; the codec has 64 codes a codebook, but the model "
        "reads 2048: was the model trained with others?"
    )
    codes = windows[4]
    assert codes.shape == (17, 188)
    assert (codes[:, 41:] == -1).all()
    assert (codes[:, :41] >= 0).all()
    assert codes[9:, :41].diff(dim=1).any(1).sum() >= 6  # codebooks that follow the sound
    path = demo.FOLDER / "dialogue.flac"
    info = inspect_audio(path)
    sound = resample(read_audio(path, info, 60 * 16000, info.samples), 16000, 24000)
    mimi = loaders.get_mimi(small_mimi["mimi_path"], num_codebooks=8)
    with torch.no_grad():
        expected = mimi.encode(sound[:, None])
    assert torch.equal(codes[1:, :41], expected.flatten(0, 1))


def test_pretrained_pieces_that_are_none(small_mimi, tmp_path):
    data = MoshiData(train_data=str(demo.TRAIN_DATA))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(Path(small_mimi["mimi_path"]).read_bytes()[:5000])
    for changes, reason in (
        ({"mimi_path": str(broken)}, r"mimi_path: .*broken.safetensors: no safetensors file, or cut short"),
        ({"mimi_path": str(demo.CODEC)}, r"mimi_path: .*codec.safetensors: 0 of its 1 tensors fit"),
        ({"mimi_path": str(demo.TOKENIZER)}, r"backbone.mimi_path: .*tokenizer.model is not a safetensors file"),
        (
            {"tokenizer_path": str(demo.TRAIN_DATA)},
            r"dialogue.jsonl: cannot be read as a text tokenizer: it is JSON text",
        ),
    ):
        with pytest.raises(EnvironmentProblem, match=reason):
            speech_windows(MoshiOptions(preset="7b", **{**small_mimi, **changes}), data, split="train", device="cpu")


def test_7b_without_data_is_told_so_and_with_random_weights_has_the_demos():
    with pytest.raises(UsageError, match=r"^data.train_data: the preset 7b has no data of its own; name a .jsonl"):
        speech_windows(MoshiOptions(preset="7b"), MoshiData(), split="train", device="cpu")
    options = MoshiOptions(preset="7b", random_weights=True)
    windows = speech_windows(options, MoshiData(), split="train", device="cpu")
    assert windows.notice == DemoCodec.stand_in
    assert windows.describe(0) == "dialogue.flac, 0.0-15.0 s"


# --- somebody's own recordings ---


def write_recording(
    folder: Path,
    *,
    name: str = "a.wav",
    seconds: float = 2.0,
    rate: int = 16000,
    channels: int = 2,
    duration: float | None = None,
    alignments: Any = (("hello", (0.5, 0.9), "SPEAKER_MAIN"),),
) -> Path:
    """A recording of two tones, its transcript, and a line for it in `data.jsonl`."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(round(seconds * rate)) / rate
    tones = np.stack([0.3 * np.sin(2 * np.pi * 300 * (c + 1) * times) for c in range(channels)], axis=1)
    soundfile.write(path, tones, rate)
    path.with_suffix(".json").write_text(json.dumps({"alignments": alignments}), encoding="utf-8")
    line = json.dumps({"path": name, "duration": seconds if duration is None else duration})
    with open(folder / "data.jsonl", "a", encoding="utf-8") as index:
        index.write(line + "\n")
    return folder / "data.jsonl"


@pytest.fixture
def windows_of(codec, tokenizer):
    def make(source: Path, duration_sec: float = 1.0) -> SpeechWindows:
        return SpeechWindows(source, codec=codec, tokenizer=tokenizer, duration_sec=duration_sec)

    return make


def test_recordings_follow_one_another(tmp_path, windows_of):
    """Blank lines, further keys, other folders; a rest shorter than a frame is no window."""
    write_recording(tmp_path, name="one/a.wav", seconds=2.5)
    with open(tmp_path / "data.jsonl", "a", encoding="utf-8") as index:
        index.write("\n  \n")
    write_recording(tmp_path, name="b.wav", seconds=2.0)
    write_recording(tmp_path, name="c.wav", seconds=3.05, alignments=[])
    write_recording(tmp_path, name="d.wav", seconds=0.08)
    windows = windows_of(tmp_path / "data.jsonl")
    assert windows.files == (range(3), range(3, 5), range(5, 8), range(8, 9))
    assert len(windows) == 9
    assert [windows.describe(i) for i in (2, 4, 7, 8)] == [
        "a.wav, 2.0-2.5 s",
        "b.wav, 1.0-2.0 s",
        "c.wav, 2.0-3.0 s",
        "d.wav, 0.0-0.1 s",
    ]
    shapes = {windows[i].shape for i in range(9)}
    assert shapes == {(17, 13)}
    assert [int((windows[i][0] >= 0).sum()) for i in range(9)] == [13, 13, 7, 13, 13, 13, 13, 13, 1]
    assert (windows[3] != windows[5]).any()


def test_a_folder_is_all_its_indexes(tmp_path, windows_of):
    write_recording(tmp_path / "b", name="b.wav")
    write_recording(tmp_path / "a" / "deep", name="a.wav")
    windows = windows_of(tmp_path)
    assert [windows.describe(i) for i in (0, 2)] == ["a.wav, 0.0-1.0 s", "b.wav, 0.0-1.0 s"]


@pytest.mark.parametrize(
    ("name", "rate"), [("a.flac", 16000), ("a.wav", 24000), ("a.flac", 44100), ("a.ogg", 48000), ("a.mp3", 16000)]
)
def test_formats_and_rates(tmp_path, windows_of, name, rate):
    """The same sound, whatever file it comes in, is nearly the same to the codec."""
    codec = DemoCodec.load()
    wanted = windows_of(write_recording(tmp_path / "reference"))[0]
    codes = windows_of(write_recording(tmp_path, name=name, rate=rate))[0]
    assert torch.equal(codes[0], wanted[0])
    for channel in (slice(1, 9), slice(9, 17)):
        heard, expected = (codec.decode_log_mels(c[None, channel, 3:12]) for c in (codes, wanted))
        assert (heard - expected).abs().mean() < 4.0


def test_a_later_window_begins_where_the_one_before_ended(tmp_path):
    """Sample by sample, at a rate that no second divides."""
    path = tmp_path / "a.flac"
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (70000, 2)).round(3)
    soundfile.write(path, sound, 11025, subtype="PCM_16")
    info = inspect_audio(path)
    assert (info.channels, info.sample_rate, info.samples) == (2, 11025, 70000)
    edges = [0, 1, 3307, 3308, 44100, 69999, 70000]
    pieces = [read_audio(path, info, begin, end) for begin, end in itertools.pairwise(edges)]
    assert [piece.shape[-1] for piece in pieces] == np.diff(edges).tolist()
    expected, _ = soundfile.read(path, dtype="float32")
    torch.testing.assert_close(torch.cat(pieces, 1), torch.from_numpy(expected.T), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("source", "target"), [(16000, 24000), (24000, 16000), (44100, 24000), (48000, 16000), (8000, 24000)]
)
def test_resampling_keeps_time_and_pitch(source, target):
    times = torch.arange(source, dtype=torch.float64) / source
    later = torch.arange(target, dtype=torch.float64) / target
    tone = lambda t, hertz: torch.sin(2 * math.pi * hertz * t + 0.3)  # noqa: E731
    signal = torch.stack([tone(times, 440.0), tone(times, 3000.0), torch.ones_like(times)]).float()
    expected = torch.stack([tone(later, 440.0), tone(later, 3000.0), torch.ones_like(later)]).float()
    out = resample(signal, source, target)
    assert out.shape == (3, target)
    inner = slice(target // 50, -target // 50)
    torch.testing.assert_close(out[:, inner], expected[:, inner], rtol=0, atol=2e-3)


def test_resampling_leaves_out_what_the_lower_rate_cannot_hold():
    times = torch.arange(48000) / 48000
    folded = resample(torch.sin(2 * math.pi * 10000 * times)[None], 48000, 16000)
    assert folded[:, 200:-200].abs().max() < 2e-3


@pytest.mark.parametrize(("samples", "expected"), [(0, 0), (1, 2), (441, 240), (442, 241)])
def test_resampled_lengths(samples, expected):
    source = 44100 if expected > 2 else 16000
    assert resample(torch.zeros(2, samples), source, 24000).shape == (2, expected)


# --- what is wrong with somebody's data ---


def line(folder: Path, text: str | bytes) -> Path:
    """One line after a good one."""
    write_recording(folder)
    with open(folder / "data.jsonl", "ab") as index:
        index.write((text.encode() if isinstance(text, str) else text) + b"\n")
    return folder / "data.jsonl"


def transcript(folder: Path, content: str | bytes | None) -> Path:
    """A recording with this in place of its transcript."""
    index = line(folder, '{"path": "b.wav", "duration": 2}')
    (folder / "b.wav").write_bytes((folder / "a.wav").read_bytes())
    if content is not None:
        (folder / "b.json").write_bytes(content.encode() if isinstance(content, str) else content)
    return index


def audio(folder: Path, content: bytes) -> Path:
    """A recording with these bytes for audio."""
    index = line(folder, '{"path": "b.flac", "duration": 2}')
    (folder / "b.flac").write_bytes(content)
    return index


def flac(seconds: float, channels: int = 2) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (round(seconds * 16000), channels))
    soundfile.write(file, noise, 16000, format="FLAC")
    return file.getvalue()


WRONG_LINES = [
    (lambda f: line(f, "{"), r"no JSON \(Expecting property name.*\); write \{\"path\": \"a.wav\""),
    (lambda f: line(f, b'{"path": "\xff"}'), r"no JSON \(byte 11, 0xff, is not UTF-8"),
    (lambda f: line(f, "[" * 100000), r"no JSON \("),
    (lambda f: line(f, "[1]"), r"not an object; write"),
    (lambda f: line(f, '{"duration": 2}'), r'"path" is missing; write'),
    (lambda f: line(f, '{"path": 5, "duration": 2}'), r'"path" is 5; write'),
    (lambda f: line(f, '{"path": "", "duration": 2}'), r'"path" is \'\'; write'),
    (lambda f: line(f, '{"path": "a\\u0000.wav", "duration": 2}'), r'"path" is \'a\\x00.wav\'; write'),
    (lambda f: line(f, '{"path": "a.wav"}'), r'"duration" is missing, not seconds; write'),
    (lambda f: line(f, '{"path": "a.wav", "duration": "2"}'), r"\"duration\" is '2', not seconds; write"),
    (lambda f: line(f, '{"path": "a.wav", "duration": true}'), r'"duration" is True, not seconds; write'),
    (lambda f: line(f, '{"path": "a.wav", "duration": NaN}'), r'"duration" is nan, not seconds; write'),
    (lambda f: line(f, '{"path": "a.wav", "duration": -1}'), r'"duration" is -1, not seconds; write'),
    (lambda f: line(f, '{"path": "b.wav", "duration": 2}'), r"no file .*b.wav; paths are relative to the folder"),
    (lambda f: line(f, '{"path": ".", "duration": 2}'), r"jsonl:2: .*: cannot be read: a folder, not a file"),
    (lambda f: line(f, f'{{"path": "{"x" * 5000}", "duration": 2}}'), r"x…: cannot be read: File name too long"),
    (
        lambda f: line(f, '{"path": "a.wav", "duration": 3.5}'),
        r'"duration" is 3.5, but the audio lasts 2.00 s; correct the line',
    ),
]
WRONG_AUDIO = [
    (lambda f: audio(f, b""), r"b.flac: cannot be decoded: "),
    (
        lambda f: audio(f, b"no sound at all" * 100),
        r"b.flac: cannot be decoded: it is no sound file of a known kind; convert it: ffmpeg -i b.flac b.wav",
    ),
    (lambda f: audio(f, flac(2)[:30000]), r"b.flac: cannot be decoded: "),  # the download broke off
    (lambda f: audio(f, flac(2, channels=1)), r"b.flac: mono; Moshi needs two channels: left its own voice, right"),
    (lambda f: audio(f, flac(2, channels=3)), r"b.flac: 3 channels; Moshi needs two"),
    (lambda f: audio(f, flac(0.07)), r"b.flac: 0.070 s are less than one frame \(0.08 s\); leave it out"),
]
WRONG_TRANSCRIPTS = [
    (lambda f: transcript(f, None), r"no file .*b.json; write its words beside the audio as \{\"alignments\": "),
    (lambda f: transcript(f, ""), r"b.json: it is empty; if nobody speaks"),
    (lambda f: transcript(f, b"\xff\xfe"), r"b.json: cannot be read: it is text in UTF-16; save it as UTF-8"),
    (lambda f: transcript(f, "[" * 100000), r"b.json: "),
    (lambda f: transcript(f, "[]"), r"b.json: it is not an object with a list \"alignments\""),
    (lambda f: transcript(f, '{"alignments": 1}'), r"b.json: it is not an object with a list"),
    (
        lambda f: transcript(f, '{"alignments": [["a", [0, 1], "A"], ["b", 1, 2, "A"]]}'),
        r"b.json: alignment 2 is \['b', 1, 2, 'A'\], not \[word, \[start, end\], speaker\] with times in seconds",
    ),
    (lambda f: transcript(f, '{"alignments": [["a", [0, NaN], "A"]]}'), r"b.json: alignment 1 is \['a', \[0, nan\]"),
    (lambda f: transcript(f, '{"alignments": [["a", [0, true], "A"]]}'), r"b.json: alignment 1 is \['a', \[0, True\]"),
    (lambda f: transcript(f, '{"alignments": [["a", [0, "1"], "A"]]}'), r"b.json: alignment 1 is "),
    (lambda f: transcript(f, '{"alignments": [[5, [0, 1], "A"]]}'), r"b.json: alignment 1 is \[5, "),
    (lambda f: transcript(f, '{"alignments": [["a", [0, 1], null]]}'), r"b.json: alignment 1 is "),
    (
        lambda f: transcript(f, '{"alignments": [["a", [1200, 1500], "SPEAKER_MAIN"]]}'),
        r"b.json: 'a' starts at 1200 s, but the audio lasts 2.00 s; 1 of 1 words start after its end; times are in sec",
    ),
]


@pytest.mark.parametrize(("make", "message"), WRONG_LINES + WRONG_AUDIO + WRONG_TRANSCRIPTS)
def test_what_is_wrong_is_told_with_file_and_line(tmp_path, windows_of, make, message):
    index = make(tmp_path)
    with pytest.raises(EnvironmentProblem, match=message) as caught:
        windows_of(index)
    text = str(caught.value)
    assert text.startswith(f"data.train_data: {index}:2: ")
    assert "\n" not in text
    assert len(text) < 700


def test_many_problems_are_counted_and_the_first_named(tmp_path, windows_of):
    index = write_recording(tmp_path)
    with open(index, "a", encoding="utf-8") as file:
        file.write("".join(f'{{"path": "{i}.wav", "duration": 1}}\n' for i in range(8)))
    with pytest.raises(EnvironmentProblem) as caught:
        windows_of(index)
    lines = str(caught.value).splitlines()
    assert lines[0] == "data.train_data: 8 recordings cannot be used:"
    assert [f"{index}:{n}: no file {tmp_path / f'{n - 2}.wav'};" in lines[n - 1] for n in range(2, 7)] == [True] * 5
    assert lines[6:] == ["  and 3 more"]


def test_sources_that_are_none(tmp_path, windows_of):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.jsonl").write_text("\n\n", encoding="utf-8")
    index = write_recording(tmp_path)
    for source, message in (
        (tmp_path / "nowhere.jsonl", r"nowhere.jsonl does not exist; name a .jsonl file or a folder of them$"),
        (tmp_path / "empty", r"empty holds no .jsonl file; write one with lines such as"),
        (tmp_path / "blank.jsonl", r"blank.jsonl: no recordings; write lines such as"),
        (f"{index}:2", r"jsonl:2 is not a file; write several files and their weights as a list, \[\{path: a"),
        (f"{index}:2,{index}:1", r"write several files and their weights as a list"),
        (f"{index},{index}", r"write several files and their weights as a list"),
    ):
        with pytest.raises(EnvironmentProblem, match=message) as caught:
            windows_of(source)
        assert str(caught.value).startswith("data.train_data: ")


def test_transcripts_in_which_moshi_never_speaks(tmp_path, windows_of):
    """A wrong label would train on silence without a word."""
    index = write_recording(tmp_path, alignments=[["a", [0, 1], "SPEAKER_00"], ["b", [1, 2], "SPEAKER_01"]])
    with pytest.raises(EnvironmentProblem, match=r"no word is Moshi's: .* speakers are SPEAKER_00, SPEAKER_01; label"):
        windows_of(index)
    write_recording(tmp_path, name="b.wav")
    assert len(windows_of(index)) == 4


def test_a_window_shorter_than_a_frame(tmp_path, windows_of):
    with pytest.raises(UsageError, match=r"^data.duration_sec: 0.05 s is shorter than a frame \(0.08 s\)"):
        windows_of(write_recording(tmp_path), 0.05)


def test_audio_that_breaks_off_later_is_told_when_it_is_read(tmp_path, windows_of):
    """Its header and its end are fine; the middle is not."""
    index = write_recording(tmp_path, name="a.flac", seconds=20.0)
    whole = bytearray((tmp_path / "a.flac").read_bytes())
    windows = windows_of(index, 10.0)
    (tmp_path / "a.flac").write_bytes(bytes(whole[: len(whole) // 4]))
    with pytest.raises(
        EnvironmentProblem, match=r"^data.train_data: .*data.jsonl:1: .*a.flac: breaks off: 4.[0-9]+ s .*of the 20.00 s"
    ):
        windows[1]
