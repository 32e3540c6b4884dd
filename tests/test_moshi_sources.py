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
from ttt.check.json_schema import json_schema
from ttt.config import RunConfig, dump_config
from ttt.config.sources import sources_of
from ttt.errors import ConfigError, EnvironmentProblem
from ttt.plugins import get_backbone
from ttt.train import train
from ttt.train.metrics import read_metrics
from ttt_cli.main import main
from ttt_moshi import data as windows_of_moshi
from ttt_moshi import demo
from ttt_moshi.clips import MoshiClips
from ttt_moshi.codec import DemoCodec
from ttt_moshi.data import SpeechWindows, speech_windows
from ttt_moshi.model import loss
from ttt_moshi.options import (
    NO_TRANSCRIPT,
    NOTHING,
    MoshiData,
    MoshiOptions,
    MoshiScoreOptions,
    MoshiSource,
)

MOSHI = get_backbone("moshi")
RATE = 16_000
TEXT_PADDING = 3
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
    assert told.count("a.wav") == 1
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


def text_loss(codes: torch.Tensor, weight: float | None = None, **options: Any) -> tuple[float, torch.Tensor]:
    """The text loss, and its gradient at the text head."""
    chosen = MoshiOptions(dim=32, num_heads=2, num_layers=1, **options)
    data = MoshiData(format="audio") if weight is None else MoshiData(format="audio", untranscribed_text_weight=weight)
    config = RunConfig[MoshiOptions, MoshiData](backbone=chosen, data=data)
    model = MOSHI.build(chosen, device="cpu", dtype=torch.float32)
    output = MOSHI.loss(model, codes, config)
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
    assert text_loss(audio, 0)[0] == 0
    assert text_loss(audio, 1)[0] == whole
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


# --- the keys ---


@pytest.mark.parametrize(
    ("data", "path", "message", "fix"),
    [
        (
            "train_data: [{path: a}, {path: a, weight: 3}]",
            "data.train_data",
            "names 'a' twice",
            "the sum of the weights",
        ),
        ("train_data: []", "data.train_data", "must be text or a list of at least 1", ""),
        ("train_data: {path: a}", "data.train_data", "must be text or a list, not a section", ""),
        ("train_data: [a, b]", "data.train_data.0", "must be a section of", "`path`, `weight`, `format`, `channel`"),
        ("train_data: [{weight: 1}]", "data.train_data.0.path", "is missing", "write `path: …`"),
        ("train_data: [{pth: a}]", "data.train_data.0.pth", "unknown key `pth`", "write `path`"),
        ("train_data: [{path: a, weight: 0}]", "data.train_data.0.weight", "at least 1e-06, not 0", ""),
        ("train_data: [{path: a, weight: .nan}]", "data.train_data.0.weight", "a finite number", ""),
        (
            "train_data: [{path: a, format: adio}]",
            "data.train_data.0.format",
            "`transcribed`, `audio`",
            "write `audio`",
        ),
        ("train_data: [{path: a, channel: left}]", "data.train_data", "'a' has a channel", "write format: audio"),
        ("eval_data: [{path: a, weight: 2}]", "data.eval_data", "reads each window once", "leave out weight"),
        (
            "{format: audio, train_data: [{path: a, format: transcribed}]}",
            "data.format",
            "each has one",
            "leave it out",
        ),
        ("channel: right", "data.channel", "acts with format: audio", "write format: audio"),
        (
            "{channel: left, train_data: [{path: a, format: audio, channel: right}]}",
            "data.channel",
            "each has one",
            "leave it out",
        ),
        ("untranscribed_text_weight: 0", "data.untranscribed_text_weight", "acts with format: audio", "leave out"),
        ("shuffle: file", "data.shuffle", "must be true or false or `files`", "write `files`"),
        (
            "train_data: 'a.jsonl:1,b.jsonl:2'",
            "data.train_data",
            "does not exist",
            "[{path: a.jsonl, weight: 1}, {path",
        ),
    ],
)
def test_what_is_wrong_with_sources_is_said_at_its_key(data, path, message, fix):
    text = f"{MODEL}\ndata: {data if data[0] == '{' else '{' + data + '}'}"
    found = [finding for finding in check_config(None, text=text).findings if finding.path == path]
    assert any(message in finding.message and fix in finding.fix for finding in found), found


def test_sources_are_kept_in_every_form_of_a_config():
    """Written, overridden, stored and read again, in the schema, in Python."""
    sources = "[{path: a, weight: 2}, {path: b, format: audio, channel: left}]"
    given = [f"data.train_data={sources}", "data.shuffle=files"]
    written = check_config(None, text=f"{MODEL}\ndata: {{train_data: {sources}, shuffle: files}}").config
    overridden = check_config(None, text=MODEL, overrides=given).config
    assert written is not None
    assert written == overridden == check_config(None, text=dump_config(written)).config
    assert [(each.path, each.weight) for each in sources_of(written.data, "train_data")] == [("a", 2.0), ("b", 1.0)]
    assert sources_of(MoshiData(train_data="a"), "train_data") == (MoshiSource(path="a"),)
    assert sources_of(MoshiData(), "train_data") == ()
    data = json_schema([MOSHI])["$defs"]["MoshiData"]["properties"]
    assert {"$ref": "#/$defs/MoshiSource"} in [each.get("items") for each in data["train_data"]["anyOf"]]
    assert {"const": "files", "type": "string"} in data["shuffle"]["anyOf"]


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
        if int(checkpoint.name.removeprefix("step_")) > 5:
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


# --- the index of a folder ---


def indexed(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["index", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_an_index_is_of_the_folders_order_and_reads_as_the_folder_does(speech, tmp_path, capsys):
    out = tmp_path / "lists" / "data.jsonl"
    out.parent.mkdir()
    code, told = indexed(capsys, speech, "--out", out)
    assert code == 0
    assert "4 recordings, 13 s" in told
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [Path(line["path"]).name for line in lines] == [
        "chapter_2.flac",
        "chapter_10.flac",
        "last.flac",
        "chapter_2.flac",
    ]
    assert [line["duration"] for line in lines] == [5.6, 2.6, 1.5, 3.0]
    assert not any(Path(line["path"]).is_absolute() for line in lines)
    listed, found = (
        of({"train_data": str(source), "format": "audio", "duration_sec": 2.0}) for source in (out, speech)
    )
    assert all(torch.equal(listed[number], found[number]) for number in range(len(found)))

    before = out.read_bytes()
    code, told = indexed(capsys, speech / "man", "--out", out)
    assert (code, out.read_bytes()) == (2, before)
    assert "is already there; write another file with --out, or replace it with --force" in told
    assert indexed(capsys, speech, "--out", out, "--force", "--backbone", "moshi")[0] == 0
    assert out.read_bytes() == before


def test_files_that_cannot_be_read_are_named_and_left_out_only_if_that_is_wanted(speech, tmp_path, capsys):
    folder = tmp_path / "speech"
    shutil.copytree(speech, folder)
    (folder / "broken.wav").write_bytes(b"RIFF")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "w\u00f6rter \U0001f600.flac").write_bytes((speech / "woman/more/last.flac").read_bytes())
    out = tmp_path / "data.jsonl"
    code, told = indexed(capsys, folder, "--out", out)
    assert code == 3
    assert "broken.wav: cannot be decoded" in told
    assert "empty.wav: cannot be decoded: it is empty; copy" in told
    assert "2 recordings cannot be read; mend or remove them" in " ".join(told.split())
    assert "leave them out with --leave-out" in told
    assert not out.exists()
    code, told = indexed(capsys, folder, "--out", out, "--leave-out")
    assert code == 0
    assert "left out:" in told
    assert len(of({"train_data": str(out), "format": "audio"}).files) == 5
    assert '"speech/w\u00f6rter \U0001f600.flac"' in out.read_text(encoding="utf-8")


def test_what_an_index_cannot_be_made_of(speech, tmp_path, capsys):
    out = tmp_path / "data.jsonl"
    (tmp_path / "empty").mkdir()
    for arguments, expected, words in (
        ((tmp_path / "empty", "--out", out), 3, "empty: holds no recording"),
        ((tmp_path / "gone", "--out", out), 3, "gone: no such folder"),
        ((next(speech.rglob("*.flac")), "--out", out), 3, "a file, not a folder; name the folder that holds it"),
        ((speech, "--out", tmp_path / "data.txt"), 2, "an index is a .jsonl file; write --out"),
        ((speech, "--out", out, "--backbone", "videodit"), 2, "the backbone videodit has no index"),
    ):
        code, told = indexed(capsys, *arguments)
        assert code == expected
        assert words in told
    assert not out.exists()
