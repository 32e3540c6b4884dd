"""`ttt sample --audio` with Moshi: what it says is what kyutai's `LMGen` says, by hand; files, options, refusals."""

from __future__ import annotations

import json
import shutil
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moshi.models import LMGen, LMModel, loaders
from torch import Tensor

from ttt.config import TTTConfig
from ttt.inject import apply
from ttt.plugins import get_backbone
from ttt.train.passes import seed_pass
from ttt_cli.main import main
from ttt_moshi import answers, demo
from ttt_moshi.audio import inspect_audio, read_audio, resample
from ttt_moshi.codec import DemoCodec
from ttt_moshi.model import DEMO_KWARGS
from ttt_moshi.speaking import SpokenFrame, WordReader, spoken
from ttt_moshi.streaming import codec_streaming
from ttt_moshi.user_audio import UserAudio
from ttt_moshi.wav import WavWriter
from ttt_moshi.weights import read_tokenizer

MOSHI: Any = get_backbone("moshi")
CONFIG = """\
backbone: {name: moshi, preset: demo, dim: 16, num_heads: 2, num_layers: 1}
ttt: {layers: LAYERS, layer_type: linear, mini_batch_size: 4, base_lr: 1.0, initial_gating_alpha: 2.0}
train: {device: cpu, cpu_threads: 1}
"""


def small_model(*, context: int, delays: list[int] | None = None) -> LMModel:
    """Moshi's structure with TTT in its one layer, whose attention sees few frames."""
    kwargs = {**loaders._lm_kwargs, **DEMO_KWARGS, "dim": 16, "num_heads": 2, "num_layers": 1, "context": context}
    kwargs |= {
        "depformer_dim": 16,
        "depformer_num_heads": 2,
        "depformer_dim_feedforward": 32,
        "depformer_num_layers": 1,
    }
    torch.manual_seed(3)
    model = LMModel(device="cpu", dtype=torch.float32, **kwargs | ({} if delays is None else {"delays": delays})).eval()
    settings = {**MOSHI.ttt_defaults, "layer_type": "linear", "mini_batch_size": 4, "initial_gating_alpha": 1.0}
    apply(model, MOSHI.sites(model), TTTConfig.model_validate(settings))
    return model


def sound(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """Of the demo's held-out dialogue, another part of Moshi's words in each channel, `[channels, samples]`."""
    info = inspect_audio(demo.FOLDER / "dialogue_eval.flac")
    one = resample(read_audio(demo.FOLDER / "dialogue_eval.flac", info, 8000, 16000 * 7)[:1], 16000, rate)
    return torch.cat([one, one.roll(-rate)])[:channels, : round(seconds * rate)].numpy()


def recording(path: Path, seconds: float = 0.8, *, rate: int = 16000, channels: int = 1) -> str:
    with WavWriter(path, sample_rate=rate, channels=channels) as file:
        file.write(sound(seconds, rate, channels))
    return str(path)


def samples(path: str | Path) -> np.ndarray:
    """Of a WAV, `[channels, samples]` int16."""
    with wave.open(str(path), "rb") as file:
        flat = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return flat.reshape(-1, file.getnchannels()).T


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a config of a model with TTT, and of one without."""
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(CONFIG.replace("LAYERS", "all"))
    Path("plain.yaml").write_text(CONFIG.replace("LAYERS", "none"))
    yield tmp_path
    assert not list(tmp_path.rglob(".writing-*"))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out + captured.err


# --- LMGen by hand ---


def by_hand(model: LMModel, codec: Any, frames: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The loop of kyutai's `moshi.run_inference`: tokens `[1, 1 + K, T]` and sound."""
    generator, tokens, sounds = LMGen(model), [], []
    with torch.no_grad(), generator.streaming(1), codec.streaming(1):
        for number, frame in enumerate(frames):
            codes = codec.encode(frame)
            if number == 0:
                assert generator.step(codes) is None
            out = generator.step(codes)
            assert out is not None
            tokens.append(out)
            sounds.append(codec.decode(out[:, 1:]))
    return torch.cat(tokens, 2), torch.cat(sounds, 2)


def joined(frames: list[SpokenFrame]) -> tuple[Tensor, Tensor]:
    codes = torch.stack([torch.cat([torch.tensor([frame.text]), frame.codes]) for frame in frames], 1)
    return codes, torch.cat([frame.sound for frame in frames])


def test_it_says_what_lmgen_says_driven_by_hand() -> None:
    """Codes and sound bit for bit, three times as long as the attention sees."""
    model, codec = small_model(context=5), DemoCodec.load()
    frames = [torch.from_numpy(part.copy())[None, None] for part in np.split(sound(1.2, 16000)[0], 15)]
    torch.manual_seed(5)
    tokens, wanted = by_hand(model, codec, frames)
    torch.manual_seed(5)
    found = list(spoken(model, codec, iter(frames)))
    codes, heard = joined(found)
    assert torch.equal(codes, tokens[0])
    assert torch.equal(heard, wanted[0, 0])
    assert torch.equal(torch.stack([frame.heard for frame in found]), torch.cat(frames, 1)[0])


def test_the_answer_is_as_long_as_the_recording_whatever_the_delays() -> None:
    model = small_model(context=20, delays=[0, 0, *[3] * 7, 0, *[3] * 7])
    frames = [torch.zeros(1, 1, 1280)] * 5
    found = list(spoken(model, DemoCodec.load(), frames, use_sampling=False))
    assert len(found) == 5
    assert len({tuple(frame.codes.tolist()) for frame in found}) > 1


def test_mimi_frame_by_frame_is_mimi_on_the_whole(small_mimi: Any) -> None:
    """Far beyond what its attention sees, 250 steps of which a frame has two; and kyutai's own streaming is not."""
    torch.manual_seed(0)
    wav = torch.randn(1, 1, 1920 * 20)
    with torch.no_grad():
        whole = small_mimi.encode(wav)
        codes = torch.randint(0, 64, (1, 8, 20))
        sounds = small_mimi.decode(codes)
        with codec_streaming(small_mimi, 1):
            encoded = torch.cat([small_mimi.encode(frame) for frame in wav.split(1920, 2)], 2)
            decoded = torch.cat([small_mimi.decode(frame) for frame in codes.split(1, 2)], 2)
        with small_mimi.streaming(1):
            inexact = torch.cat([small_mimi.decode(frame) for frame in codes.split(1, 2)], 2)
    assert float((encoded == whole).float().mean()) > 0.99  # a tie between two codes may round otherwise
    scale = float(sounds.abs().max())
    assert float((decoded - sounds).abs().max()) < 1e-4 * scale
    assert float((inexact - sounds).abs().max()) > 1e-3 * scale


def test_kyutais_own_codec_speaks_too(small_mimi: Any) -> None:
    model, frames = small_model(context=8), [0.1 * torch.randn(1, 1, 1920) for _ in range(6)]
    torch.manual_seed(1)
    found = joined(list(spoken(model, small_mimi, frames)))
    torch.manual_seed(1)
    generator, tokens, sounds = LMGen(model), [], []
    with torch.no_grad(), generator.streaming(1), codec_streaming(small_mimi, 1):
        generator.step(torch.zeros(1, 8, 1, dtype=torch.long))  # the model reads its initial tokens
        for frame in frames:
            tokens.append(generator.step(small_mimi.encode(frame)))
            sounds.append(small_mimi.decode(tokens[-1][:, 1:]))
    assert torch.equal(found[0], torch.cat(tokens, 2)[0])
    assert torch.equal(found[1], torch.cat(sounds, 2)[0, 0])
    assert found[1].shape == (6 * 1920,)


@pytest.fixture
def small_mimi(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kyutai's Mimi, narrow, with random weights and an attention that sees 8 steps."""
    import copy

    config: Any = copy.deepcopy(loaders._mimi_config)
    config["seanet"].update(dimension=32, n_filters=4)
    config["quantizer"].update(dimension=16, bins=64, input_dimension=32, output_dimension=32)
    config["transformer"].update(
        **{"d_model": 32, "num_heads": 2, "num_layers": 2, "dim_feedforward": 64, "input_dimension": 32},
        **{"output_dimensions": [32], "context": 8, "layer_scale": 1.0},
    )
    monkeypatch.setattr(loaders, "_mimi_config", config)
    torch.manual_seed(0)
    mimi = loaders.get_mimi(None, num_codebooks=8)
    for name, buffer in mimi.named_buffers():
        if name.endswith("embedding_sum"):
            buffer.normal_(std=1.0)
    return mimi.eval()


# --- the command ---


def sample(*arguments: str) -> int:
    return main(["sample", *arguments])


def test_a_recording_of_any_rate_is_answered_and_written_down(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stereo: the user as Moshi hears it on the left, and on the right what the same command says in mono."""
    recording(work / "in.wav", 0.45, rate=11025, channels=2)
    assert sample("c.yaml", "--audio", "in.wav", "--out", "o/a.wav", "--stereo", "--seconds", "0.3") == 0
    told = said(capsys)
    assert "its left channel is the user" in told
    assert "real-time factor" in told
    assert "wrote o/a.wav, o/a.json" in told
    both = samples("o/a.wav")
    assert both.shape == (2, 10 * 1280)  # 0.75 s are 9.4 frames
    heard = resample(torch.from_numpy(samples("in.wav")[:1].astype(np.float32) / 32768), 11025, 16000)
    expected = torch.round(heard.clamp(-1, 1) * 32767).numpy()
    assert np.abs(both[0, : expected.shape[1]] - expected[0]).max() <= 1
    assert not both[0, expected.shape[1] :].any()

    record = json.loads(Path("o/a.json").read_text())
    assert record["seconds"] == 0.8
    assert record["text"] == " ".join(word["word"] for word in record["words"])
    assert all(0 <= word["start"] < word["end"] <= 0.8 for word in record["words"])
    assert record["made_from"]["sampling"] == {"temp": 0.8, "temp_text": 0.7, "top_k": 250, "top_k_text": 25}
    assert record["made_from"]["user_channel"] == "left"
    assert [minute["seconds"] for minute in record["minutes"]] == [0.8]

    assert sample("c.yaml", "--audio", "in.wav", "--out", "b.wav", "--seconds", "0.3") == 0
    assert np.array_equal(samples("b.wav")[0], both[1])
    assert sample("c.yaml", "--audio", "in.wav", "--out", "b.wav") == 2
    assert "b.wav: is already there" in said(capsys)


def test_every_option_acts_and_the_same_seed_says_the_same(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording(work / "in.wav", 0.2, channels=2)
    runs = {
        "one": (),
        "again": (),
        "seed": ("--seed", "1"),
        "right": ("--user-channel", "right"),
        "mean": ("--user-channel", "mean"),
        "temperature": ("--temperature", "0"),
        "text": ("--text-temperature", "5"),
        "top": ("--top-k", "1"),
        "top text": ("--text-top-k", "1"),
        "closed": ("--gates", "closed"),
    }
    found = {}
    for name, options in runs.items():
        assert sample("c.yaml", "--audio", "in.wav", "--out", f"{name}.wav", *options) == 0
        content = json.loads(Path(f"{name}.json").read_text())
        found[name] = (samples(f"{name}.wav").tobytes(), content["text"])
    assert found.pop("again") == found["one"]
    assert len(set(found.values())) == len(found), {name: text for name, (_, text) in found.items()}
    capsys.readouterr()
    assert sample("plain.yaml", "--audio", "in.wav", "--out", "plain.wav") == 0
    assert (samples("plain.wav").tobytes(), json.loads(Path("plain.json").read_text())["text"]) == found["closed"]


def test_several_recordings_are_each_heard_fresh(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording(work / "one.wav", 0.4)
    recording(work / "two.wav", 0.3)
    assert sample("c.yaml", "--audio", "one.wav", "--audio", "two.wav", "--out", "both") == 0
    assert sample("c.yaml", "--audio", "two.wav", "--out", "alone.wav", "--seed", "1") == 0
    assert samples("both/one.wav").shape == (1, 5 * 1280)
    assert np.array_equal(samples("both/two.wav"), samples("alone.wav"))
    shutil.copy("one.wav", "both/one.wav")
    assert sample("c.yaml", "--audio", "one.wav", "--audio", "both/one.wav", "--out", "other") == 2
    assert "several recordings would be answered in one.wav" in said(capsys)


@pytest.mark.parametrize("ends", [KeyboardInterrupt, RuntimeError("out of luck")])
def test_an_answer_that_is_not_finished_leaves_nothing(
    work: Path, monkeypatch: pytest.MonkeyPatch, ends: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recording(work / "in.wav", 0.5)

    def broken(*arguments: Any, **more: Any) -> Iterator[SpokenFrame]:
        yield from list(spoken(*arguments, **more))[:3]
        raise ends

    monkeypatch.setattr(answers, "spoken", broken)
    (work / ".writing-01234567-a").mkdir()  # what a killed process left
    assert sample("c.yaml", "--audio", "in.wav", "--out", "a.wav") != 0
    assert sorted(file.name for file in work.iterdir()) == ["c.yaml", "in.wav", "plain.yaml"]
    said(capsys)


WRONG = {
    "nothing to answer": ((), "ttt sample: write the recording that it answers: --audio in.wav"),
    "prompts": (("--prompt", "a cat"), "it answers a recording: write --audio in.wav"),
    "steps": (("--steps", "5"), "ttt sample --steps: the backbone moshi has no sampling"),
    "both": (("--audio", "in.wav", "--prompt", "x"), "--prompt is for samples of prompts and --audio for answers"),
    "an option alone": (("--stereo",), "write the recording that it answers: --audio in.wav"),
    "no place": (("--audio", "in.wav"), "write where the sample goes: --out FILE"),
    "no WAV": (("--audio", "in.wav", "--out", "a.mp3"), "--out a.mp3: an answer is written as a WAV; write a.wav"),
    "itself": (
        ("--audio", "in.wav", "--out", "in.wav", "--overwrite"),
        "the answer would replace the recording in.wav",
    ),
    "missing": (("--audio", "no.wav", "--out", "a.wav"), "no.wav: cannot be read as sound: No such file"),
    "no sound": (("--audio", "c.yaml", "--out", "a.wav"), "c.yaml: cannot be read as sound"),
    "cut": (("--audio", "cut.wav", "--out", "a.wav"), "cut.wav: cannot be read as sound: "),
    "empty": (("--audio", "empty.wav", "--out", "a.wav"), "empty.wav: "),
    "seconds": (("--audio", "in.wav", "--out", "a.wav", "--seconds", "-1"), "--seconds -1: the silence"),
    "no seconds": (("--audio", "in.wav", "--out", "a.wav", "--seconds", "nan"), "--seconds nan: the silence"),
    "temperature": (("--audio", "in.wav", "--out", "a.wav", "--temperature", "-1"), "--temperature -1: is from 0"),
    "top-k": (("--audio", "in.wav", "--out", "a.wav", "--top-k", "-3"), "--top-k -3: is a number of codes"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_asked_is_one_sentence(work: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    recording(work / "in.wav", 0.4)
    recording(work / "empty.wav", 0)
    whole = Path(recording(work / "long.wav", 2.0)).read_bytes()
    (work / "cut.wav").write_bytes(whole[: len(whole) * 62 // 100])
    arguments, told = WRONG[wrong]
    assert sample("c.yaml", *arguments) in (2, 3)
    output = said(capsys)
    assert told in output
    assert output.count("error:") == 1
    assert not Path("a.wav").exists()


def test_random_weights_of_moshis_size_have_no_voice(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording(work / "in.wav", 0.4)
    Path("c.yaml").write_text("backbone: {name: moshi, preset: 7b, random_weights: true}\n")
    assert sample("c.yaml", "--audio", "in.wav", "--out", "a.wav") == 2
    assert "random weights of Moshi's size have no voice" in said(capsys)


def test_an_answer_too_long_for_a_wav_is_refused_before_anything_is_built(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recording(work / "in.wav", 0.4)
    monkeypatch.setattr(answers, "MOST_BYTES", 1000)
    assert sample("c.yaml", "--audio", "in.wav", "--out", "a.wav") == 2
    assert "more than a WAV file can hold" in said(capsys)


# --- its parts ---


def test_what_is_heard_does_not_depend_on_the_pieces_it_is_read_in(tmp_path: Path) -> None:
    """A recording of several pieces is what resampling the whole gives; silence fills the last frame."""
    path = Path(recording(tmp_path / "in.wav", 5.0, rate=8000))
    heard = UserAudio(path, inspect_audio(path), "left", 16000, 64, silence_sec=0.01)
    found = torch.cat(list(heard.frames()), 2)[0]
    info = inspect_audio(path)
    whole = resample(read_audio(path, info, 0, info.samples), 8000, 16000)
    assert found.shape[1] == heard.num_frames * 64
    torch.testing.assert_close(found[:, : whole.shape[1]], whole, rtol=0, atol=1e-6)
    assert not found[:, whole.shape[1] :].any()


def test_words_are_put_together_with_their_times() -> None:
    tokenizer = read_tokenizer(demo.TOKENIZER)
    reader = WordReader(tokenizer, frozenset({0, 3}), frame_rate=12.5)
    first, second = tokenizer.encode("hello"), tokenizer.encode("there")
    stream = [3, 0, *first, 3, 3, *second, 3, tokenizer.eos_id()]
    heard = [reader.read(token) for token in stream]
    assert "".join(heard).split() == ["hello", "there"]
    begin = 2 + len(first) + 2
    assert [(word.word, word.start, word.end) for word in reader.words()] == [
        ("hello", 0.16, round(0.08 * (2 + len(first)), 3)),
        ("there", round(0.08 * begin, 3), round(0.08 * (begin + len(second)), 3)),
    ]
    assert reader.is_padding == [token in (0, 3) or token == tokenizer.eos_id() for token in stream]


# --- the lines of the README ---


def test_the_readmes_lines_speak_with_a_run(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run as they are, in under fifteen lines, and say what the command says."""
    import ttt_moshi

    readme = Path(ttt_moshi.__file__).parent.parent / "README.md"
    lines = readme.read_text(encoding="utf-8").split("```python\n")[1:]
    (lines,) = [block.split("```")[0] for block in lines if "load_run(" in block]
    assert "..." not in lines
    assert len([line for line in lines.splitlines() if line.strip()]) < 15
    recording(work / "in.wav", 0.4)
    monkeypatch.setattr("ttt.train.pictures.draw_run", lambda run: [])
    short = ("train.max_steps=1", "data.duration_sec=0.4", "eval.max_batches=1", "run_dir=runs/mine")
    assert main(["train", "c.yaml", *(word for each in short for word in ("--set", each))]) == 0
    seeded = lines.replace("generator, out", "seed_pass(0, 'sample', 0)\ngenerator, out")  # loading draws too
    exec(compile(seeded, "README.md", "exec"), {"seed_pass": seed_pass})
    assert sample("runs/mine", "--audio", "in.wav", "--out", "command.wav") == 0
    assert samples("out.wav").shape == (1, 5 * 1280)
    assert np.array_equal(samples("out.wav"), samples("command.wav"))
