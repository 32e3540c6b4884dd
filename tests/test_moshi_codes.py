"""Codes on disk: the same windows and losses as encoding in the run, never stale, made once by any processes."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import forking
import pytest
import soundfile
import torch
from rich.console import Console

from ttt.check import check_config, load_config
from ttt.errors import EnvironmentProblem, UsageError
from ttt.files import TEMPORARY
from ttt.plugins import Part, get_backbone
from ttt.train import train
from ttt.train.loading import Loader
from ttt.train.metrics import read_metrics
from ttt_cli.main import main
from ttt_moshi import data as windows_of_moshi
from ttt_moshi import demo

MOSHI = get_backbone("moshi")
RATE = 16_000


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """A dialogue with a transcript, and two recordings of one voice, one of them under two names."""
    folder = tmp_path / "speech"
    (folder / "voices").mkdir(parents=True)
    stereo, rate = soundfile.read(demo.TRAIN_DATA.with_suffix(".flac"))
    assert rate == RATE
    soundfile.write(folder / "talk.wav", stereo[: 5 * RATE], RATE)
    words = json.loads(demo.TRAIN_DATA.with_suffix(".json").read_text())["alignments"]
    (folder / "talk.json").write_text(json.dumps({"alignments": [word for word in words if word[1][1] < 5]}))
    (folder / "talk.jsonl").write_text('{"path": "talk.wav", "duration": 5}\n')
    soundfile.write(folder / "voices" / "one.wav", stereo[: 3 * RATE, 0], RATE)
    soundfile.write(folder / "voices" / "two.wav", stereo[3 * RATE : 7 * RATE, 0], RATE)
    shutil.copy(folder / "voices" / "one.wav", folder / "voices" / "once_more.wav")
    return folder


def config(speech: Path, codes: Path | None, *overrides: str, **data: Any) -> Any:
    text = {
        "backbone": {"name": "moshi", "dim": 32, "num_heads": 2, "num_layers": 2},
        "data": {
            "train_data": [
                {"path": str(speech / "talk.jsonl"), "weight": 2},
                {"path": str(speech / "voices"), "format": "audio"},
            ],
            "eval_data": str(speech / "talk.jsonl"),
            "duration_sec": 2,
            "codes": None if codes is None else str(codes),
            **data,
        },
        "train": {"device": "cpu", "cpu_threads": 1, "max_steps": 4, "batch_size": 2},
    }
    file = speech / "config.yaml"
    file.write_text(json.dumps(text))
    return load_config(file, overrides=overrides, training=False).config


def make(config: Any) -> str:
    text = io.StringIO()
    MOSHI.precompute(config, console=Console(file=text, width=200))
    return text.getvalue()


def windows(config: Any, split: str = "train") -> Any:
    return MOSHI.dataset(config, split=split, device="cpu")


def refused(config: Any) -> str:
    with pytest.raises(EnvironmentProblem) as caught:
        windows(config)
    return str(caught.value)


def files(codes: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in codes.glob("*.safetensors")}


# --- the same ---


def test_windows_of_codes_are_those_that_a_run_encodes_bit_for_bit(speech, tmp_path, monkeypatch):
    codes = tmp_path / "codes"
    plain = {split: windows(config(speech, None), split) for split in ("train", "eval")}
    told = make(config(speech, codes))
    assert f"{codes}: 3 of 3 recordings" in told  # the copy is no other
    assert len(files(codes)) == 4  # and silence
    monkeypatch.setattr(windows_of_moshi, "load_codec", None)  # none is needed now
    for split, expected in plain.items():
        stored = windows(config(speech, codes), split)
        assert stored.files == expected.files
        assert stored.notice == expected.notice
        assert all(torch.equal(stored[number], expected[number]) for number in range(len(expected)))


def test_losses_are_the_same_with_codes(speech, tmp_path, monkeypatch):
    monkeypatch.setattr("ttt.train.pictures.draw_run", lambda run: [])
    codes, lines = tmp_path / "codes", []
    make(config(speech, codes))
    for name, folder in (("plain", None), ("stored", codes)):
        train(config(speech, folder, f"run_dir={tmp_path / name}"), MOSHI, console=Console(file=io.StringIO()))
        written = read_metrics(tmp_path / name / "metrics.jsonl")
        lines.append([(line["loss"], line.get("eval_loss")) for line in written])
    assert len(lines[0]) == 4
    assert lines[1] == lines[0]


@pytest.mark.parametrize("stored", [False, True])
def test_workers_read_the_same(speech, tmp_path, stored):
    """Without codes they encode themselves; with codes the training process has nothing to encode either."""
    expected = windows(config(speech, None))
    codes = tmp_path / "codes" if stored else None
    if stored:
        make(config(speech, codes))
    device = torch.device("cpu")
    with Loader(windows(config(speech, codes)), lambda n: [n, n + 1], passes=7, device=device, workers=1) as loader:
        for number in range(7):
            assert torch.equal(loader.batch(number), expected.collate([expected[number], expected[number + 1]]))


def test_on_a_gpu_workers_read_sound_which_the_training_process_encodes(speech):
    expected = windows(config(speech, None))
    dataset = windows_of_moshi.speech_windows(
        (run := config(speech, None)).backbone, run.data, split="train", device="cpu"
    )
    dataset._device = torch.device("cuda")  # where it is asked what workers get
    reader = pickle.loads(pickle.dumps(dataset.reader))
    dataset._device = torch.device("cpu")
    for number in range(len(expected)):
        read = reader[number]
        assert read.audio.is_floating_point()
        assert torch.equal(dataset.finish(number, read), expected[number])
        assert dataset.kept(number)


# --- never of something else ---


def test_codes_that_are_missing_or_of_something_else_are_told(speech, tmp_path):
    codes = tmp_path / "codes"
    told = refused(config(speech, codes))
    assert told.startswith("data.codes: 4 recordings have no codes that can be read:\n")
    assert f"{speech / 'talk.jsonl'}:1: {speech / 'talk.wav'}: no codes of it in {codes}; run ttt precompute" in told
    make(config(speech, codes))
    assert f"talk.wav: its codes in {codes} are of windows of 2.0 s, not 3.0 s; run" in refused(
        config(speech, codes, duration_sec=3)
    )
    changed = [{"path": str(speech / "talk.jsonl"), "format": "audio", "channel": "right"}]
    assert "are of channel both, not right" in refused(config(speech, codes, train_data=changed))


def test_a_check_says_that_codes_are_missing_or_of_something_else(speech, tmp_path):
    codes = tmp_path / "codes"

    def told(**data: Any) -> list[str]:
        config(speech, codes, **data)
        return [each.message for each in check_config(speech / "config.yaml").findings if each.code == "MSH506"]

    assert told()[0].startswith(f"talk.jsonl:1 (talk.wav: no codes of it in {codes})")
    run = config(speech, codes)
    make(run)
    assert told() == []
    assert "talk.wav: its codes in" in told(duration_sec=3)[0]
    assert "are of windows of 2.0 s, not 3.0 s); " in told(duration_sec=3)[0]
    assert load_config(speech / "config.yaml", training=False).config.data.codes == str(codes)  # to precompute them
    (demos,) = told(train_data=None)
    assert demos.startswith(f"dialogue.jsonl:1 (dialogue.flac: no codes of it in {codes}); the run")
    (demos,) = told(train_data=None, eval_data=None)
    assert "; dialogue_eval.jsonl:1 (" in demos


def test_check_data_compares_all_of_each_recording_and_its_codes(speech, tmp_path):
    run, talk = config(speech, tmp_path / "codes"), speech / "talk.wav"
    make(run)

    def read() -> Any:
        return MOSHI.read_data(run, split="train", console=Console(file=io.StringIO()))

    read()
    dates, content = talk.stat(), bytearray(talk.read_bytes())
    content[200_000] ^= 1
    talk.write_bytes(content)
    os.utime(talk, ns=(dates.st_atime_ns, dates.st_mtime_ns))  # which hides it from a run
    windows(run)
    with pytest.raises(EnvironmentProblem, match=r"talk\.wav: .*\.safetensors is damaged, or of another content"):
        read()


def test_codes_of_another_codec_are_told(speech, tmp_path, monkeypatch):
    make(config(speech, tmp_path / "codes"))
    other = tmp_path / "codec.safetensors"
    windows_of_moshi.DemoCodec.load().save(other)
    with other.open("ab"):
        codec = windows_of_moshi.DemoCodec.load()
        codec.codebooks[0, 1] += 1
        codec.save(other)
    monkeypatch.setattr(demo, "CODEC", other)
    monkeypatch.setattr(demo, "require_whole", lambda: None)
    assert "are of another codec, the demo codec of 8 codebooks (sha256 " in refused(config(speech, tmp_path / "codes"))


@pytest.mark.parametrize("where", ["its beginning", "its middle"])
def test_a_recording_that_was_changed_since_is_told(speech, tmp_path, where):
    codes, talk = tmp_path / "codes", speech / "talk.wav"
    make(config(speech, codes))
    content = bytearray(talk.read_bytes())
    content[1000 if where == "its beginning" else 200_000] ^= 1  # of 320 kB; it is as long as before
    talk.write_bytes(content)
    assert f"{talk}: {'no codes of it' if 'beg' in where else 'was changed since'}" in refused(config(speech, codes))
    make(config(speech, codes))
    assert torch.equal(windows(config(speech, codes))[1], windows(config(speech, None))[1])


def test_recordings_that_were_moved_have_their_codes(speech, tmp_path):
    codes = tmp_path / "codes"
    make(config(speech, codes))
    before, moved = files(codes), tmp_path / "elsewhere"
    speech.rename(moved)
    for number, file in enumerate(moved.rglob("*.wav")):
        os.utime(file, (number, number))
    expected = windows(config(moved, None))
    stored = windows(config(moved, codes))
    assert all(torch.equal(stored[number], expected[number]) for number in range(len(expected)))
    make(config(moved, codes))
    assert files(codes) == before


def test_damaged_codes_are_told_and_made_anew(speech, tmp_path):
    codes = tmp_path / "codes"
    make(config(speech, codes))
    (file,) = [file for file in codes.glob("*-*.safetensors") if b"two.wav" in file.read_bytes()]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    stored = windows(config(speech, codes))
    number = next(n for n in range(len(stored)) if stored.describe(n).startswith("two.wav"))
    with pytest.raises(
        EnvironmentProblem, match=r"^data\.codes: .*\.safetensors: .*run ttt precompute again$"
    ) as caught:
        stored[number + 1]
    assert str(caught.value).count(file.name) == 1
    shutil.move(file, tmp_path / file.name)
    file.mkdir()
    with pytest.raises(EnvironmentProblem, match=r"cannot be read: a folder, not a file; run ttt pre") as caught:
        stored[number + 1]
    assert str(caught.value).count(file.name) == 1
    assert f"{file} is a folder, not a file of codes; move it away and run" in refused(config(speech, codes))
    with pytest.raises(EnvironmentProblem, match=rf"^{file}: "):
        make(config(speech, codes))
    file.rmdir()
    shutil.move(tmp_path / file.name, file)
    before = files(codes)
    make(config(speech, codes))
    assert {name for name, time in files(codes).items() if time != before[name]} == {file.name}
    assert torch.equal(windows(config(speech, codes))[number + 1], windows(config(speech, None))[number + 1])


# --- made once, by any processes ---


def test_each_process_makes_its_part_and_nothing_twice(speech, tmp_path, monkeypatch):
    codes, seen = tmp_path / "codes", {}
    run = config(speech, codes)
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        told = make(run)
        assert f"{'2 of 2' if rank == 0 else '1 of 1'} recordings (part {rank + 1} of 2)" in told
        assert seen.items() <= files(codes).items()
        seen = files(codes)
    monkeypatch.delenv("WORLD_SIZE")
    left = codes / f"{TEMPORARY}12345678-a.safetensors"
    left.mkdir()
    assert "windows in" not in make(run)
    assert files(codes) == seen
    assert not left.exists()


def test_a_part_is_known_by_the_variables_of_torchrun_and_of_srun():
    assert Part.of_launch({}) == Part(0, 1)
    assert Part.of_launch({"RANK": "1", "WORLD_SIZE": "3"}).of(range(7)) == [1, 4]
    assert Part.of_launch({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}) == Part(2, 4)
    for wrong, told in ({"RANK": "3"}, "RANK=3: ranks"), ({"RANK": "x"}, "RANK=x: ranks"), ({}, "no RANK: ranks"):
        with pytest.raises(EnvironmentProblem, match=f"WORLD_SIZE=3, but {told} count from 0 to 2"):
            Part.of_launch({"WORLD_SIZE": "3", **wrong})


def test_a_recording_that_cannot_be_decoded_is_told_when_all_others_are_done(speech, tmp_path, monkeypatch):
    from ttt_moshi import pieces

    whole = pieces.read_audio

    def broken(path, *arguments):
        if path.name == "two.wav":
            raise pieces.UnreadableAudioError("breaks off")
        return whole(path, *arguments)

    monkeypatch.setattr(pieces, "read_audio", broken)
    with pytest.raises(EnvironmentProblem, match=r"two\.wav: breaks off"):
        make(config(speech, tmp_path / "codes"))
    assert len(files(tmp_path / "codes")) == 3


def test_without_a_folder_nothing_is_made(speech):
    with pytest.raises(UsageError, match=r"^data\.codes: null; name the folder"):
        make(config(speech, None))


def test_processes_that_are_killed_leave_what_is_whole(speech, tmp_path):
    codes = tmp_path / "codes"
    config(speech, codes, duration_sec=0.4)
    process = forking.start(precompute, speech / "config.yaml")
    deadline = time.monotonic() + 120
    while not files(codes):
        assert process.poll() is None, process.communicate(60)
        assert time.monotonic() < deadline
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    out, err = process.communicate(120)
    assert process.returncode in (0, 137)
    assert process.returncode == 0 or "part 2 of 2 was killed; the same command goes on where it was" in err
    assert "part 1 of 2" in out
    before = {name: file for name, file in files(codes).items() if not name.startswith(".")}  # else half written
    make(config(speech, codes, duration_sec=0.4))
    assert before.items() <= files(codes).items()
    assert len(files(codes)) == 4


def precompute(file: Path) -> int:
    return main(["precompute", str(file), "--nproc", "2"])
