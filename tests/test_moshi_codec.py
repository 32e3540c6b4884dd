"""The demo's codec: what it keeps of speech, its promises to Moshi (causal, 12.5 Hz, silence), its file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ttt.errors import EnvironmentProblem, UsageError
from ttt.files import verify_tensors
from ttt_moshi import demo
from ttt_moshi.audio import inspect_audio, read_audio
from ttt_moshi.codec import CodecSettings, DemoCodec, mel_filters
from ttt_moshi.encoding import encode_window

FRAME = 1280


@pytest.fixture(scope="module")
def codec() -> DemoCodec:
    return DemoCodec.load()


def speech(name: str) -> Tensor:
    """Both channels as a batch, `[2, 1, samples]`."""
    path = demo.FOLDER / name
    info = inspect_audio(path)
    return read_audio(path, info, 0, info.samples)[:, None]


def test_it_has_mimis_surface(codec):
    assert (codec.sample_rate, codec.frame_rate, codec.frame_size, codec.num_codebooks) == (16000, 12.5, FRAME, 8)
    assert codec.cardinality == 64
    assert "Mimi" in codec.stand_in
    assert not list(codec.parameters())


@pytest.mark.parametrize("name", ["dialogue.flac", "dialogue_eval.flac"])
def test_every_codebook_brings_speech_closer(codec, name):
    """On the speech that it was fitted on, and on what it never heard."""
    wav = speech(name)
    truth, codes = codec.log_mels(wav), codec.encode(wav)
    sounds = (truth > 1).flatten(2).any(-1)
    errors = [(codec.decode_log_mels(codes[:, :k]) - truth)[sounds].square().mean().sqrt().item() for k in range(1, 9)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors)), errors
    assert errors[0] < 6.0
    assert errors[-1] < 0.65 * errors[0]


def test_no_codebook_makes_any_frame_worse(codec):
    """Entry 0, "nothing to add", is always there to take."""
    wav = speech("dialogue_eval.flac")
    truth, codes = codec.log_mels(wav), codec.encode(wav)
    assert not codec.codebooks[:, 0].any()
    total, before = torch.zeros_like(truth), truth.square().sum((-2, -1))
    for codebook, column in zip(codec.codebooks, codes.unbind(1), strict=True):
        total = total + codebook[column].view_as(truth)
        after = (truth - total).square().sum((-2, -1))
        assert (after <= before * (1 + 1e-5) + 0.5).all()
        before = after


def test_codes_can_be_listened_to(codec):
    """What is decoded sounds, to the codec, like what the codes stand for, and at the same time."""
    wav = speech("dialogue_eval.flac")[:1, :, : 7 * 16000]
    codes = codec.encode(wav)
    decoded = codec.decode(codes)
    wanted, heard = codec.decode_log_mels(codes), codec.log_mels(decoded)
    sounds = (wanted > 1).flatten(2).any(-1)
    assert (wanted - heard)[sounds].square().mean().sqrt() < 1.6
    assert 0.3 < decoded.abs().max() / wav.abs().max() < 3

    def envelope(sound: Tensor) -> Tensor:
        loudness = sound[0, 0, : 43 * 2560].view(-1, 80).square().mean(1).sqrt()
        return loudness - loudness.mean()

    original, copy = envelope(wav), envelope(decoded)
    lags = {lag: torch.dot(original, copy.roll(lag)).item() for lag in range(-8, 9)}
    assert abs(max(lags, key=lags.__getitem__)) <= 1  # within 5 ms


def test_the_same_sound_gives_the_same_codes_and_codes_the_same_sound(codec):
    wav = speech("dialogue_eval.flac")[:, :, 5 * 16000 : 9 * 16000]
    codes = codec.encode(wav)
    random_state = torch.get_rng_state()
    decoded = codec.decode(codes, iterations=4)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.manual_seed(5)
    assert torch.equal(codec.encode(wav), codes)
    assert torch.equal(codec.decode(codes, iterations=4), decoded)
    for row in range(2):
        assert (codec.encode(wav[row : row + 1])[0] != codes[row]).float().mean() < 0.01  # ties may fall otherwise
        alone = codec.decode(codes[row : row + 1], iterations=1)[0]
        torch.testing.assert_close(alone, codec.decode(codes, iterations=1)[row], rtol=0, atol=1e-3)


@pytest.mark.parametrize("frame", [0, 3, 10])
def test_a_frame_hears_nothing_that_comes_after_it(codec, frame):
    wav = torch.rand(1, 1, 12 * FRAME, generator=torch.Generator().manual_seed(0)) - 0.5
    changed = wav.clone()
    changed[..., (frame + 1) * FRAME :] *= -0.1
    codes, others = codec.encode(wav), codec.encode(changed)
    assert torch.equal(codes[..., : frame + 1], others[..., : frame + 1])
    assert not torch.equal(codes[..., frame + 1], others[..., frame + 1])


@pytest.mark.parametrize(("samples", "frames"), [(0, 0), (1, 1), (1279, 1), (1280, 1), (1281, 2), (240000, 188)])
def test_lengths(codec, samples, frames):
    codes = codec.encode(torch.full((2, 1, samples), 0.1))
    assert codes.shape == (2, 8, frames)
    assert codes.dtype == torch.int64
    assert codec.decode(codes, iterations=1).shape == (2, 1, frames * FRAME)


def test_silence_is_zeros_both_ways(codec):
    codes = codec.encode(torch.zeros(1, 1, 5 * FRAME))
    assert not codes.any()
    assert not codec.decode(codes).any()


def test_fewer_codebooks_decode_too(codec):
    codes = codec.encode(speech("dialogue_eval.flac")[:1, :, 16000:48000])
    assert codec.decode(codes[:, :1], iterations=1).shape == (1, 1, 32000)


def test_wrong_tensors_are_refused(codec):
    with pytest.raises(UsageError, match=r"\[batch, 1, samples\], not \[2, 100\]"):
        codec.encode(torch.zeros(2, 100))
    with pytest.raises(UsageError, match=r"1 to 8, frames\], not \[1, 9, 4\]"):
        codec.decode(torch.zeros(1, 9, 4, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"codes are 0 to 63, but these are -1 to 64; cut padding"):
        codec.decode(torch.tensor([[[-1, 64]]]))


def test_mel_filters_are_averages():
    filters = mel_filters(CodecSettings())
    assert filters.shape == (40, 513)
    assert (filters >= 0).all()
    torch.testing.assert_close(filters.sum(1), torch.ones(40, dtype=torch.float64))
    peaks = filters.argmax(1)
    assert (peaks.diff() > 0).all()
    with pytest.raises(ValueError, match="400 mel bands are too narrow"):
        mel_filters(CodecSettings(mels=400))


def test_a_saved_codec_is_the_codec(codec, tmp_path):
    """Its content is the same, as its checksum says; settings and codebooks come back from it."""
    codec.save(tmp_path / "codec.safetensors")
    assert verify_tensors(tmp_path / "codec.safetensors") == verify_tensors(demo.CODEC) is not None
    other = DemoCodec(CodecSettings(mels=20, floor_db=-60.0), torch.randn(3, 16, 160).half())
    other.save(tmp_path / "other.safetensors")
    again = DemoCodec.load(tmp_path / "other.safetensors")
    assert again.settings == other.settings
    assert torch.equal(again.codebooks, other.codebooks)


def _rewritten(path: Path, settings: str, **tensors: Tensor) -> None:
    save_file(tensors or {"codebooks": torch.zeros(2, 4, 320)}, path, metadata={"ttt_moshi.DemoCodec": settings})


GOOD = json.dumps(vars(CodecSettings()))


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "codec"),
        (lambda path: path.write_bytes(demo.CODEC.read_bytes()[:20000]), "[Ii]ncomplete|deserializing"),
        (lambda path: path.write_bytes(b"RIFF"), "codec"),
        (lambda path: save_file({"x": torch.zeros(1)}, path), "its header has no ttt_moshi.DemoCodec"),
        (lambda path: _rewritten(path, GOOD, books=torch.zeros(1)), "its header has no ttt_moshi.DemoCodec"),
        (lambda path: _rewritten(path, "{"), "Expecting property name"),
        (lambda path: _rewritten(path, "[]"), "settings are not sample_rate, "),
        (lambda path: _rewritten(path, GOOD.replace('"mels"', '"bands"')), "settings are not sample_rate, "),
        (lambda path: _rewritten(path, GOOD.replace('"mels": 40', '"mels": "40"')), "setting mels is '40'"),
        (
            lambda path: _rewritten(path, GOOD.replace('"hop_size": 160', '"hop_size": 170')),
            "not a multiple of hop_size",
        ),
        (lambda path: _rewritten(path, GOOD, codebooks=torch.zeros(2, 4, 8)), r"\[codebooks, cardinality, 320\], not"),
        (lambda path: _rewritten(path, GOOD, codebooks=torch.full((2, 4, 320), torch.nan)), "not finite"),
    ],
)
def test_a_file_that_is_no_codec_is_refused(tmp_path, write, reason):
    path = tmp_path / "codec.safetensors"
    write(path)
    with pytest.raises(EnvironmentProblem, match=reason) as caught:
        DemoCodec.load(path)
    assert str(caught.value).startswith(f"{path}: cannot be read as the demo's codec: ")


def test_the_demo_is_small():
    assert sum(path.stat().st_size for path in demo.FOLDER.iterdir() if path.is_file()) <= 2_000_000
    assert (demo.FOLDER / "NOTICE.md").is_file()


def test_a_long_window_is_encoded_in_pieces_to_the_codes_of_the_whole(monkeypatch):
    """Two rows, an end that is no whole frame; a short window is read at once."""
    codec = DemoCodec.load()
    sound = 0.1 * torch.randn(2, 1, codec.frame_size * 23 + 77, generator=torch.Generator().manual_seed(0))
    lengths, encode = [], codec.encode
    monkeypatch.setattr(codec, "encode", lambda wav, **more: lengths.append(wav.shape[2]) or encode(wav, **more))
    expected = encode_window(codec, sound)
    assert lengths == [sound.shape[2]]
    monkeypatch.setattr("ttt_moshi.encoding.LONG_WINDOW", 20)
    monkeypatch.setattr("ttt_moshi.encoding.PIECE", 10)
    assert torch.equal(encode_window(codec, sound), expected)
    assert lengths[1:] == [10 * codec.frame_size, 10 * codec.frame_size, 4 * codec.frame_size]


# --- streams ---


def test_a_stream_is_encoded_as_the_whole_and_decoded_the_same_in_any_pieces(codec):
    wav = speech("dialogue_eval.flac")[..., : FRAME * 12]
    whole = codec.encode(wav)
    with codec.streaming(2):
        assert torch.equal(
            torch.cat([codec.encode(piece) for piece in wav.split([FRAME, 3 * FRAME, 8 * FRAME], 2)], 2), whole
        )
        one = torch.cat([codec.decode(frame) for frame in whole.split(1, 2)], 2)
        with pytest.raises(UsageError, match="whole frames of 1280 samples, not 100"):
            codec.encode(wav[..., :100])
    with codec.streaming(2):
        pieces = torch.cat([codec.decode(piece) for piece in whole.split([5, 7], 2)], 2)
    assert one.shape == wav.shape
    torch.testing.assert_close(pieces, one, rtol=0, atol=1e-5)


def test_streams_are_reset_and_paused_alone(codec):
    wav = speech("dialogue_eval.flac")[..., : FRAME * 3]
    first, second, third = wav.split(FRAME, 2)
    with codec.streaming(2):
        codec.decode(codec.encode(first))
        codec.set_exec_mask(torch.tensor([True, False]))
        codec.decode(codec.encode(second))  # row 1 does not hear it
        codec.set_exec_mask(torch.tensor([True, True]))
        codec.reset_streaming(torch.tensor([True, False]))
        codes = codec.encode(third)
        sound = codec.decode(codes)
    with codec.streaming(1):
        alone = codec.encode(third[:1])
        assert torch.equal(codes[:1], alone)
        torch.testing.assert_close(sound[:1], codec.decode(alone), rtol=0, atol=1e-5)
    with codec.streaming(1):
        codec.decode(codec.encode(first[1:]))
        paused = codec.encode(third[1:])
        assert torch.equal(codes[1:], paused)
        torch.testing.assert_close(sound[1:], codec.decode(paused), rtol=0, atol=1e-5)


def test_a_stream_sounds_nearly_like_the_whole_and_has_no_seams(codec):
    """How far the spectra across seams are from those wanted; farther if each frame is decoded by itself."""
    wav = speech("dialogue_eval.flac")[:1, :, FRAME * 5 : FRAME * 25]
    codes = codec.encode(wav)
    target = codec.decode_log_mels(codes)
    loud = target.mean((-2, -1)) > 10

    def error(sound: Tensor) -> float:
        return float((codec.log_mels(sound) - target)[loud][:, :3].abs().mean())  # their windows reach back

    with codec.streaming(1):
        stream = torch.cat([codec.decode(frame) for frame in codes.split(1, 2)], 2)
    alone = torch.cat([codec.decode(frame, iterations=16) for frame in codes.split(1, 2)], 2)
    assert error(codec.decode(codes)) < error(stream) < 2.3 < error(alone)  # 0.7, 2.0, 2.7 dB
