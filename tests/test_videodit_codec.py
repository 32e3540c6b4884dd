"""The demo's stand-ins for the VAE and T5, and video files as pictures."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_videos import noisy, numbered, write_lossless

from ttt.errors import EnvironmentProblem, UsageError
from ttt_videodit import demo
from ttt_videodit.clip import CROPS, demo_captions, demo_frames, demo_pictures
from ttt_videodit.codec import BLOCK, DemoCodec, peak_signal_to_noise
from ttt_videodit.frames import UnreadableVideoError, inspect_video, read_every_frame, read_frames, to_tensor
from ttt_videodit.text import DemoTextEncoder

# --- the codec ---


@pytest.fixture(scope="module")
def codec() -> DemoCodec:
    return DemoCodec.load()


def random_video(frames: int, height: int = 16, width: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, frames, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_latent_is_a_block_by_its_definition(codec: DemoCodec) -> None:
    video = random_video(9)
    latents = codec.encode(video)
    assert latents.shape == (2, 3, 16, 2, 3)
    for row, frame, top, left in ((0, 1, 0, 0), (1, 2, 1, 2), (1, 1, 0, 2)):
        block = video[row, 4 * frame - 3 : 4 * frame + 1, :, 8 * top : 8 * top + 8, 8 * left : 8 * left + 8]
        expected = codec.basis @ (block.flatten() - codec.mean) / codec.scale
        torch.testing.assert_close(latents[row, frame, :, top, left], expected)
    first = video[1, :1, :, 8:16, 8:16].expand(4, -1, -1, -1)
    torch.testing.assert_close(latents[1, 0, :, 1, 1], codec.basis @ (first.flatten() - codec.mean) / codec.scale)


def test_pieces_of_a_video_are_the_whole(codec: DemoCodec) -> None:
    video = random_video(17)
    pieces = [codec.encode(video[:, :9]), codec.encode(video[:, 9:13], opening=False)]
    pieces.append(codec.encode(video[:, 13:], opening=False))
    # Products of other shapes add up n = 768 terms in another order. Each sum is within λ√n u Σ|x b| of the true one
    # but for a chance of 2 exp(−λ²/2) (Higham and Mary 2019; u = eps / 2), and Σ|x b| ≤ ‖x‖ ‖b‖ = ‖x‖. Two, λ = 6:
    norm = (1 + codec.mean.abs().max()) * math.sqrt(BLOCK)
    bound = 6 * math.sqrt(BLOCK) * torch.finfo(torch.float32).eps * norm / codec.scale.min()
    assert (torch.cat(pieces, 1) - codec.encode(video)).abs().max() <= bound


def test_what_decoding_makes_is_coded_as_it_was(codec: DemoCodec) -> None:
    """The basis is orthonormal: decoding is its right inverse, but for the first frame, which is the mean of four."""
    latents = torch.randn(1, 4, 16, 2, 3, generator=torch.Generator().manual_seed(1))
    video = codec.decode(latents)
    assert video.shape == (1, 13, 3, 16, 24)
    torch.testing.assert_close(codec.encode(video)[:, 1:], latents[:, 1:], atol=1e-4, rtol=1e-4)
    still = codec.decode(codec.encode(video[:, :1]))
    twice = codec.decode(codec.encode(still))
    assert peak_signal_to_noise(twice, still) > peak_signal_to_noise(still, video[:, :1])


def test_fitting_finds_the_components_and_unit_variance() -> None:
    """A video of two patterns and a mean: two channels carry it, at unit variance, and it comes back exactly."""
    generator = torch.Generator().manual_seed(2)
    patterns = torch.linalg.qr(torch.randn(BLOCK, 2, generator=generator, dtype=torch.float64))[0].T
    amounts = torch.randn(50, 2, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0])
    blocks = (amounts @ patterns + 0.1).view(50, 4, 3, 8, 8)
    still = torch.full((1, 3, 8, 8), 0.1, dtype=torch.float64)
    codec = DemoCodec.fit(torch.cat([still, blocks.flatten(0, 1)]) + 1e-6 * torch.randn(201, 3, 8, 8))
    video = torch.cat([still, blocks.flatten(0, 1)])[None].float()
    latents = codec.encode(video)[0, :, :, 0, 0]
    torch.testing.assert_close(latents[:, :2].std(0, correction=0), torch.ones(2), atol=1e-3, rtol=0)
    span = codec.basis[:2].double() @ patterns.T
    torch.testing.assert_close(span @ span.T, torch.eye(2, dtype=torch.float64), atol=1e-4, rtol=0)
    assert peak_signal_to_noise(codec.decode(codec.encode(video)), video) > 80


def test_the_shipped_codec_is_what_the_script_makes(codec: DemoCodec) -> None:
    whole = demo_frames("train", width=128)
    made = DemoCodec.fit(whole)
    latents, again = codec.encode(whole[None]), made.encode(whole[None])
    torch.testing.assert_close(latents, again, atol=1e-3, rtol=0)
    deviation = latents.std((0, 1, 3, 4))
    torch.testing.assert_close(deviation, torch.ones(16), atol=1e-3, rtol=0)


def test_the_figures_of_the_notice_are_true(codec: DemoCodec) -> None:
    notice = (demo.FOLDER / "NOTICE.md").read_text(encoding="utf-8")
    for split, words in (("train", "what trains"), ("eval", "what is held out")):
        frames = demo_frames(split, width=128)[None]
        decibels = peak_signal_to_noise(codec.decode(codec.encode(frames)), frames)
        line = next(line for line in notice.splitlines() if words in line and "dB" in line)
        # rounded to two places, and on another processor to the other side of an edge
        (told,) = (float(part.split()[-1]) for part in line.split(" dB")[:1])
        assert told == pytest.approx(decibels, abs=0.005 + 1e-4)


def test_noise_and_signal_in_decibels() -> None:
    ones = torch.ones(3, 4)
    assert peak_signal_to_noise(ones, ones - 0.2) == pytest.approx(20.0)
    assert peak_signal_to_noise(ones, -ones) == pytest.approx(0.0)


def test_a_codec_is_read_back_as_it_was_written(codec: DemoCodec, tmp_path: Path) -> None:
    codec.save(tmp_path / "codec.safetensors")
    again = DemoCodec.load(tmp_path / "codec.safetensors")
    for name in ("basis", "mean", "scale"):
        assert torch.equal(getattr(again, name), getattr(codec, name))


@pytest.mark.parametrize("problem", ["missing", "cut", "other", "shape", "nan", "scale"])
def test_a_file_that_is_no_codec_is_a_sentence(codec: DemoCodec, tmp_path: Path, problem: str) -> None:
    file = tmp_path / "codec.safetensors"
    tensors = {"basis": codec.basis.clone(), "mean": codec.mean.clone(), "scale": codec.scale.clone()}
    if problem == "other":
        tensors["more"] = torch.zeros(1)
    elif problem == "shape":
        tensors["mean"] = torch.zeros(3)
    elif problem == "nan":
        tensors["basis"][3, 5] = math.nan
    elif problem == "scale":
        tensors["scale"][0] = 0
    if problem != "missing":
        save_file(tensors, file)
    if problem == "cut":
        file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(EnvironmentProblem, match=r"codec.safetensors: cannot be read as the demo's codec: .*make_demo"):
        DemoCodec.load(file)


@pytest.mark.parametrize("shape", [(1, 8, 3, 8, 8), (1, 9, 3, 12, 8), (1, 9, 1, 8, 8), (9, 3, 8, 8), (1, 0, 3, 8, 8)])
def test_video_that_does_not_divide_into_blocks(codec: DemoCodec, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"the codec takes video as \[batch, 1 \+ 4·n, 3, 8·h, 8·w\], not"):
        codec.encode(torch.zeros(shape))


def test_latents_of_another_shape(codec: DemoCodec) -> None:
    with pytest.raises(UsageError, match=r"\[batch, frames, 16, h, w\], not \[1, 3, 4, 2, 2\]"):
        codec.decode(torch.zeros(1, 3, 4, 2, 2))


# --- the text embedding ---


def test_a_word_is_the_bytes_of_its_hash() -> None:
    embed = DemoTextEncoder(text_length=4)
    (row,) = embed(["Dark SKY, dark"])
    assert row.shape == (4, 32)
    for token, word in zip(row, ("dark", "sky", "dark"), strict=False):
        digest = np.frombuffer(hashlib.shake_256(word.encode()).digest(32), np.uint8).astype(np.float64)
        expected = (digest - 127.5) / np.arange(256).std()
        np.testing.assert_allclose(token.numpy(), expected, rtol=1e-6)
    assert torch.equal(row[3], torch.zeros(32))
    assert not torch.equal(row[0], row[1])


def test_texts_without_words_are_zeros_and_long_ones_are_cut() -> None:
    embed = DemoTextEncoder(text_length=2)
    rows = embed(["", "?!", "one two three", "one two"])
    assert torch.equal(rows[:2], torch.zeros(2, 2, 32))
    assert torch.equal(rows[2], rows[3])
    assert [embed.count(text) for text in ("", "one two three")] == [0, 3]


def test_the_demos_captions_fit() -> None:
    encoder = DemoTextEncoder(text_length=8)
    for split, crops in CROPS.items():
        for left in crops:
            captions = demo_captions(split, left)
            assert len(captions) == 3
            assert all(0 < encoder.count(caption) <= 8 for caption in captions)


# --- the demo's clip ---


def test_the_squares_are_cut_from_the_clip_and_none_shows_what_another_split_holds_out() -> None:
    whole = list(read_every_frame(demo.CLIP, height=64, width=128))
    assert len(whole) == 190
    played = {
        "train": [*range(20, 141), *range(139, 115, -1)],
        "eval": [*range(141, 190), *range(188, 140, -1), *range(142, 190)],
    }
    assert not set(played["train"]) & set(played["eval"])
    for split, crops in CROPS.items():
        for left in crops:
            pictures = demo_pictures(split, left)
            assert len(pictures) == 145
            for picture, number in zip(pictures, played[split], strict=True):
                assert np.array_equal(picture, whole[number][:, left : left + 64])
    frames = demo_frames("train")
    assert frames.shape == (145, 3, 64, 64)
    jumps = (frames[1:] - frames[:-1]).abs().mean((1, 2, 3))
    assert int(jumps.argmax()) == 95, "the cut is where the third segment begins"


# --- video files ---


def greys(pictures: list[np.ndarray]) -> list[int]:
    assert all(bool((picture == picture[0, 0, 0]).all()) for picture in pictures)
    return [int(picture[0, 0, 0]) for picture in pictures]


def read(path: Path, count: int, start_sec: float = 0.0, height: int = 32, width: int = 32) -> list[np.ndarray]:
    return list(read_frames(path, start_sec=start_sec, count=count, height=height, width=width))


@pytest.mark.parametrize("rate", [16, 25, 12, 60, Fraction(30000, 1001)])
@pytest.mark.parametrize("start", [0.0, 0.5, 2.6])
def test_sixteen_pictures_a_second_are_those_on_the_screen(tmp_path: Path, rate: int | Fraction, start: float) -> None:
    path = write_lossless(tmp_path / "a.mov", numbered(250), frames_per_second=rate)
    count = 21
    shown = [int((Fraction(start).limit_denominator(1000) + Fraction(i, 16)) * rate) for i in range(count)]
    assert greys(read(path, count, start)) == shown


def test_pictures_are_the_files_bit_for_bit(tmp_path: Path) -> None:
    frames = noisy(20)
    path = write_lossless(tmp_path / "a.mov", frames)
    assert np.array_equal(np.stack(read(path, 20)), frames)
    assert np.array_equal(np.stack(list(read_every_frame(path, height=32, width=32))), frames)
    tensor = to_tensor(read(path, 2))
    torch.testing.assert_close(tensor, torch.from_numpy(frames[:2]).permute(0, 3, 1, 2) / 127.5 - 1)


def test_the_last_frame_is_held_for_one_picture_and_no_more(tmp_path: Path) -> None:
    path = write_lossless(tmp_path / "a.mov", numbered(48))
    assert inspect_video(path).seconds == pytest.approx(3.0)
    assert greys(read(path, 49)) == [*range(48), 47]
    with pytest.raises(UnreadableVideoError, match=r"ends after 3.00 s, but 3.0625 s from 0 s on are asked for"):
        read(path, 50)
    with pytest.raises(UnreadableVideoError, match=r"ends after 3.00 s, but 1 s from 2.5 s on"):
        read(path, 17, 2.5)


def test_what_sticks_out_is_cut_off_on_both_sides(tmp_path: Path) -> None:
    frames = noisy(2, height=32, width=80)
    assert np.array_equal(np.stack(read(write_lossless(tmp_path / "wide.mov", frames), 2)), frames[:, :, 24:56])
    frames = noisy(2, height=48, width=32)
    assert np.array_equal(np.stack(read(write_lossless(tmp_path / "high.mov", frames), 2)), frames[:, 8:40])


def test_a_video_is_scaled_to_cover_the_picture(tmp_path: Path) -> None:
    frames = np.zeros((1, 64, 256, 3), np.uint8)
    frames[:, :, 64:128, 0] = frames[:, :, 128:192, 2] = 255  # a red and a blue square in the middle
    (picture,) = read(write_lossless(tmp_path / "a.mov", frames), 1, height=32, width=64)
    assert picture.shape == (32, 64, 3)
    assert (picture[:, 4:28] == (255, 0, 0)).all()
    assert (picture[:, 36:60] == (0, 0, 255)).all()


def test_pixels_that_are_not_square_are_made_so(tmp_path: Path) -> None:
    frames = np.zeros((1, 32, 32, 3), np.uint8)
    frames[:, :, :16, 1] = 255  # seen 64 × 32, the left half green
    path = write_lossless(tmp_path / "a.mov", frames, pixel_aspect=Fraction(2, 1))
    (picture,) = read(path, 1)
    assert (picture[:, :12] == (0, 255, 0)).all()
    assert (picture[:, 20:] == 0).all()


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV writes no rotation")
@pytest.mark.parametrize(("turned", "turns"), [(90, 1), (-90, 3), (180, 2)])
def test_a_video_that_was_filmed_sideways_stands_upright(tmp_path: Path, turned: int, turns: int) -> None:
    frames = noisy(2, height=32, width=48)
    path = write_lossless(tmp_path / "a.mov", frames, turned=turned)
    upright = np.rot90(frames, turns, axes=(1, 2))
    read_back = read(path, 2, height=upright.shape[1], width=upright.shape[2])
    assert np.array_equal(np.stack(read_back), upright)


@pytest.mark.parametrize("content", [b"", b"no video at all\n", bytes(5000)])
def test_a_file_that_is_no_video_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    for attempt in (lambda: inspect_video(path), lambda: read(path, 1)):
        with pytest.raises(UnreadableVideoError, match="cannot be decoded: "):
            attempt()


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mov"
    with av.open(str(path), "w", format="mov") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(UnreadableVideoError, match="holds no video stream"):
        inspect_video(path)


def test_a_video_that_is_cut_short_or_overwritten_does_not_pass(tmp_path: Path) -> None:
    content = demo.CLIP.read_bytes()
    half = tmp_path / "half.mp4"
    middle = tmp_path / "middle.mp4"
    half.write_bytes(content[: len(content) // 2])
    middle.write_bytes(content[:60_000] + bytes(20_000) + content[80_000:])
    for path in (half, middle):
        with pytest.raises(UnreadableVideoError, match=r"cannot be decoded|is damaged|ends after"):
            read(path, 100)
