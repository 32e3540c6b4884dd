"""Speech without transcripts, several sources with weights, and training on them: real speech of the demo, cut up."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from rich.console import Console

from ttt.check import check_config, load_config
from ttt.errors import ConfigError, EnvironmentProblem
from ttt.plugins import get_backbone
from ttt.train import train
from ttt.train.metrics import read_metrics
from ttt_moshi import data as windows_of_moshi
from ttt_moshi import demo
from ttt_moshi.clips import MoshiClips
from ttt_moshi.codec import DemoCodec
from ttt_moshi.data import SpeechWindows, speech_windows
from ttt_moshi.model import loss
from ttt_moshi.options import NO_TRANSCRIPT, NOTHING, TEXT_PADDING, MoshiData, MoshiOptions, MoshiScoreOptions

MOSHI = get_backbone("moshi")
RATE = 16_000
MODEL = "backbone: {name: moshi, dim: 32, num_heads: 2, num_layers: 2}"


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real speech in Libri-Light's layout: two speakers, three books, four chapters of one voice each."""
    folder = tmp_path_factory.mktemp("speech")
    stereo, rate = soundfile.read(demo.TRAIN_DATA.with_suffix(".flac"))
    assert rate == RATE
    # from these seconds on, the man (left) or the woman (right) reads alone
    chapters = {
        "man/sense/chapter_2.flac": (0, 0.4, 6.0),
        "man/sense/chapter_10.flac": (0, 1.5, 4.1),
        "woman/sonnets/chapter_2.flac": (1, 8.4, 11.4),
        "woman/more/last.flac": (1, 9.0, 10.5),
    }
    for name, (channel, start, end) in chapters.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, stereo[round(start * RATE) : round(end * RATE), channel], RATE)
        file.with_suffix(".json").write_text('{"speaker": "as Libri-Light has it"}')
    return folder


def of(data: dict[str, Any], split: str = "train") -> SpeechWindows:
    return speech_windows(MoshiOptions(), MoshiData.model_validate(data), split=split, device="cpu")


# --- windows of speech without transcripts ---


def test_a_folder_in_libri_lights_layout(speech):
    windows = of({"train_data": str(speech), "format": "audio", "duration_sec": 2.0})
    assert [windows.describe(file.start) for file in windows.files] == [
        "sense/chapter_2.flac, 0.0-2.0 s",  # before chapter_10; and two are called chapter_2.flac
        "chapter_10.flac, 0.0-2.0 s",
        "last.flac, 0.0-1.5 s",
        "sonnets/chapter_2.flac, 0.0-2.0 s",
    ]
    assert [len(file) for file in windows.files] == [3, 2, 1, 2]


def test_the_voice_is_moshis_the_user_is_silent_and_the_text_is_padding(speech):
    """The streams are those of a clip with `user_stream: silence`, but for text, which is marked as untranscribed."""
    windows = of({"train_data": str(speech / "man"), "format": "audio", "duration_sec": 5.6})
    options = MoshiScoreOptions(user_stream="silence", text="padding")
    clip = MoshiClips(DemoCodec.load(), options, codec_hash="").read(speech / "man/sense/chapter_2.flac")
    assert torch.equal(windows[0][1:], clip[1:, :70])
    assert (windows[0][0] == NO_TRANSCRIPT).all()
    assert (clip[0] == TEXT_PADDING).all()
    assert windows[0][1:9].any(0).sum() > 40  # somebody speaks
    assert windows.collate([windows[0], windows[1]]).shape == (2, 17, 70)


def test_the_last_window_is_filled_with_nothing(speech):
    codes = of({"train_data": str(speech / "man"), "format": "audio", "duration_sec": 2.0})[4]  # 2.0-2.6 s of 2.6
    assert (codes[0, :8] == NO_TRANSCRIPT).all()
    assert (codes[1:, :8] >= 0).all()
    assert (codes[:, 8:] == NOTHING).all()


@pytest.mark.parametrize(("channel", "streams"), [("left", slice(1, 9)), ("right", slice(9, 17))])
def test_one_channel_of_a_dialogue_is_moshis_voice(channel, streams):
    """The transcript, and the other channel, are not read."""
    alone = of({"train_data": str(demo.TRAIN_DATA), "format": "audio", "channel": channel})[0]
    both = of({"train_data": str(demo.TRAIN_DATA)})[0]
    assert torch.equal(alone[1:9], both[streams])
    assert not alone[9:].any()  # the demo's codec writes silence as zeros


def test_the_mean_of_the_channels(speech, tmp_path):
    sound, _ = soundfile.read(speech / "woman/more/last.flac", always_2d=True)
    soundfile.write(tmp_path / "three.wav", sound.repeat(3, axis=1), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "one.wav", sound, RATE, subtype="FLOAT")
    windows = of({"train_data": str(tmp_path), "format": "audio", "channel": "mean", "duration_sec": 1.5})
    assert torch.equal(windows[0], windows[1])
    with pytest.raises(EnvironmentProblem, match=r"three\.wav: 3 channels have no left and right; write channel: mean"):
        of({"train_data": str(tmp_path), "format": "audio", "channel": "left"})


def refused(path: Path, **more: Any) -> str:
    with pytest.raises(EnvironmentProblem) as caught:
        of({"train_data": str(path), "format": "audio", **more})
    return str(caught.value)


def test_what_a_folder_of_speech_may_not_hold_is_named(speech, tmp_path):
    soundfile.write(tmp_path / "a.wav", [[0.1, 0.2]] * RATE, RATE)
    (tmp_path / "b.flac").write_bytes(b"no sound")
    soundfile.write(tmp_path / "c.wav", [0.1] * 100, RATE)
    (tmp_path / ".hidden.wav").write_bytes(b"no sound either, and not looked at")
    (tmp_path / "notes.txt").write_text("nor this")
    told = refused(tmp_path)
    assert told.startswith("data.train_data: 3 recordings cannot be used")
    assert "a.wav: stereo; write data.channel: left or right for the channel that is Moshi's voice, or mean" in told
    assert "b.flac: cannot be decoded" in told
    assert "c.wav: 0.006 s are less than one frame (0.08 s)" in told
    assert "hidden" not in told
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty: no recordings; write lines such as" in refused(empty)
    assert "gone does not exist; name a .jsonl file or a folder" in refused(tmp_path / "gone")


def test_lists_of_speech_are_checked_line_by_line(speech, tmp_path):
    lines = [
        {"path": str(speech / "woman/more/last.flac"), "duration": 1.5},
        {"path": "gone.wav", "duration": 1.5},
        {"path": str(speech / "woman/more/last.flac"), "duration": 9},
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = refused(tmp_path / "list.jsonl")
    assert told.startswith("data.train_data: 2 recordings cannot be used")
    assert "list.jsonl:2: no file" in told
    assert "list.jsonl:3: " in told
    assert '"duration" is 9, but the audio lasts 1.50 s' in told


def test_codes_of_long_data_do_not_grow_without_end(speech, monkeypatch):
    windows = of({"train_data": str(speech), "format": "audio", "duration_sec": 1.0})
    before = [windows[number] for number in range(len(windows))]
    monkeypatch.setattr(windows_of_moshi, "MOST_KEPT", 3 * 4 * before[0].numel())
    again = of({"train_data": str(speech), "format": "audio", "duration_sec": 1.0})
    for _ in range(2):
        assert all(torch.equal(again[number], codes) for number, codes in enumerate(before))
        assert len(again._codes) == 3


# --- the loss of their text ---


def text_loss(codes: torch.Tensor, **options: Any) -> tuple[float, torch.Tensor]:
    """The text loss, and its gradient at the text head."""
    chosen = MoshiOptions(dim=32, num_heads=2, num_layers=1, **options)
    model = MOSHI.build(chosen, device="cpu", dtype=torch.float32)
    output = loss(model, codes, chosen)
    output.loss.backward()
    return float(output.metrics["text_loss"]), model.text_linear.weight.grad


@pytest.fixture(scope="module")
def windows(speech) -> dict[str, torch.Tensor]:
    """A window of each format, `[1,17,25]`."""
    spoken = of({"train_data": str(demo.TRAIN_DATA), "duration_sec": 2.0})[1]
    return {
        "transcribed": spoken[None],
        "audio": of({"train_data": str(speech), "format": "audio", "duration_sec": 2.0})[0][None],
    }


def test_the_text_of_an_untranscribed_window_hardly_counts_whatever_its_batch(windows):
    audio, transcribed = windows["audio"], windows["transcribed"]
    read_as_text = torch.where(audio == NO_TRANSCRIPT, TEXT_PADDING, audio)
    whole, gradient = text_loss(read_as_text)
    little, its_gradient = text_loss(audio)
    assert whole > 1  # a window that is all padding has its whole mean, whatever text_padding_weight
    assert little == pytest.approx(0.01 * whole)
    torch.testing.assert_close(its_gradient, 0.01 * gradient, rtol=1e-3, atol=1e-8)
    assert text_loss(audio, untranscribed_text_weight=0)[0] == 0
    assert text_loss(audio, untranscribed_text_weight=1)[0] == whole
    assert text_loss(audio, text_padding_weight=0)[0] == 0
    # beside a window with words, its share is that of its padding
    together, _ = text_loss(torch.cat([transcribed, audio]), text_padding_weight=1)
    apart = [text_loss(each, text_padding_weight=1)[0] for each in (transcribed, audio)]
    assert together == pytest.approx(sum(apart) / 2)


def test_the_model_reads_padding_there(windows):
    """So the audio loss is that of the same codes with padding as text, and no index is out of a table."""
    audio = windows["audio"]
    model = MOSHI.build(MoshiOptions(), device="cpu", dtype=torch.float32)
    marked = loss(model, audio, MoshiOptions())
    padded = loss(model, torch.where(audio == NO_TRANSCRIPT, TEXT_PADDING, audio), MoshiOptions())
    assert torch.equal(marked.metrics["audio_loss"], padded.metrics["audio_loss"])


# --- several sources ---


def test_sources_of_both_formats(speech):
    data = {
        "train_data": [
            {"path": str(demo.TRAIN_DATA), "weight": 2},
            {"path": str(speech), "format": "audio"},
            {"path": str(demo.EVAL_DATA), "format": "audio", "channel": "right", "weight": 0.5},
        ],
        "duration_sec": 2.0,
    }
    windows = of(data)
    assert [(each.files, each.weight) for each in windows.sources] == [
        (range(0, 1), 2.0),
        (range(1, 5), 1.0),
        (range(5, 6), 0.5),
    ]
    firsts = [windows[file.start] for file in windows.files]
    assert [bool((codes[0] == NO_TRANSCRIPT).any()) for codes in firsts] == [False, True, True, True, True, True]
    assert windows.describe(0) == "dialogue.flac, 0.0-2.0 s"
    with pytest.raises(EnvironmentProblem, match=r"data\.train_data\.1\.path: gone does not exist"):
        of({"train_data": [{"path": str(demo.TRAIN_DATA)}, {"path": "gone", "format": "audio"}]})


def findings(text: str) -> list[tuple[str, str]]:
    found = check_config(None, text=f"{MODEL}\n{text}").findings
    return [(finding.code, finding.path) for finding in found if finding.code.startswith("TTT5")]


def test_each_source_is_checked_as_what_it_is(speech, tmp_path):
    here = str(speech / "woman")
    (tmp_path / "empty").mkdir()
    (tmp_path / "audio.jsonl").write_text(json.dumps({"path": f"{here}/more/last.flac", "duration": 1.5}))
    (tmp_path / "words.jsonl").write_text(json.dumps({"path": f"{demo.FOLDER}/dialogue.flac", "duration": 63.2}))
    shutil.copy(speech / "woman/more/last.flac", tmp_path / "alone.flac")
    (tmp_path / "alone.jsonl").write_text('{"path": "alone.flac", "duration": 1.5}')
    own = f"duration_sec: 1.0, eval_data: {demo.EVAL_DATA}"
    assert findings(f"data: {{{own}, train_data: [{{path: {here}, format: audio}}]}}") == []
    assert findings(f"data: {{{own}, train_data: [{{path: {tmp_path}/alone.jsonl, format: audio}}]}}") == []
    mixed = f"data: {{{own}, train_data: [{{path: {tmp_path}/words.jsonl}}, {{path: {tmp_path}/alone.jsonl}}]}}"
    assert findings(mixed) == [("TTT508", "data.train_data.1.path")]
    assert findings(f"data: {{{own}, train_data: {tmp_path}/empty}}") == [("TTT501", "data.train_data")]
    assert findings(f"data: {{{own}, train_data: [{{path: {tmp_path}/empty, format: audio}}]}}") == [
        ("TTT501", "data.train_data.0.path")
    ]
    assert findings(f"data: {{{own}, train_data: [{{path: {here}, format: audio}}, {{path: gone}}]}}") == [
        ("TTT501", "data.train_data.1.path")
    ]
    assert findings(f"data: {{{own}, train_data: [{{path: {here}, format: audio}}, {{path: {demo.EVAL_DATA}}}]}}") == [
        ("TTT502", "data.eval_data")
    ]


# --- training ---


def trained(folder: Path, text: str, *, resume: bool = False, **overrides: Any) -> tuple[list[dict[str, Any]], str]:
    """A run's lines without its times, and what it said."""
    said = io.StringIO()
    given = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    loaded = load_config(None, text=f"{MODEL}\n{text}\nrun_dir: {folder}", overrides=given)
    train(loaded.config, loaded.backbone, resume=resume, console=Console(file=said, width=200))
    times = {"tokens_per_second", "peak_memory_bytes"}
    lines = [{key: each[key] for key in each.keys() - times} for each in read_metrics(folder / "metrics.jsonl")]
    return lines, said.getvalue()


def test_pretraining_on_speech_without_transcripts_learns_and_resumes_exactly(speech, tmp_path):
    """Files in random order, each row with a file of its own, fast weights carried from window to window."""
    config = f"""
ttt: {{persistent_states: true, mini_batch_size: 5}}
data: {{train_data: {speech}, format: audio, shuffle: files, duration_sec: 1.0}}
train: {{max_steps: 14, batch_size: 2, lr: 0.004, trainable: all, ckpt_freq: 5, ckpt_keep: null, device: cpu}}
eval: {{max_batches: 1}}"""
    whole, said = trained(tmp_path / "whole", config)
    assert "data: 14 windows in 4 files, in random order, the windows of each in order; batches of 2" in said
    losses = [line["loss"] for line in whole]
    assert sum(losses[7:]) < 0.92 * sum(losses[:7])  # the second epoch and the first
    assert all(line["text_loss"] < 0.07 < line["audio_loss"] for line in whole)

    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    (killed / "summary.json").unlink()
    for checkpoint in (killed / "checkpoints").iterdir():
        if checkpoint.name > "step_00000005":
            shutil.rmtree(checkpoint)
    resumed, said = trained(killed, config, resume=True)
    assert "resumed after step 5 of 14" in said
    assert resumed == whole


def test_a_run_of_two_sources_says_what_each_gives(speech, tmp_path):
    config = f"""
data:
  train_data: [{{path: {demo.TRAIN_DATA}, weight: 3}}, {{path: {speech}, weight: 1, format: audio}}]
  eval_data: {demo.EVAL_DATA}
  duration_sec: 2.0
train: {{max_steps: 4, device: cpu}}
eval: {{max_batches: 1}}"""
    lines, said = trained(tmp_path / "run", config)
    assert f"32 windows in 1 file are of {demo.TRAIN_DATA}, which gives 75.0% of what is read" in said
    assert f"8 windows in 4 files are of {speech}, which gives 25.0% of what is read" in said
    untranscribed = [line["text_loss"] < 0.1 for line in lines]
    assert sorted(untranscribed) == [False, False, False, True]
    with pytest.raises(ConfigError, match=r"dialogue\.jsonl has 1 files, but its share of 75% is 1\.5 of 2 rows"):
        trained(
            tmp_path / "lanes",
            config,
            ttt__persistent_states="true",
            data__shuffle="files",
            train__batch_size=2,
        )
