"""`ttt precompute` for Video-DiT: what it writes is diffusers' own, and a killed run is gone on with."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import forking
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from rich.console import Console
from safetensors.torch import load_file
from small_videos import noisy, write_lossless
from tiny_cogvideox import write_pretrained
from transformers import AutoTokenizer, T5EncoderModel

from ttt.check import check_config
from ttt.config import RunConfig
from ttt.errors import EnvironmentProblem, TTTError, UnreadableError, UsageError
from ttt.files import read_header, write_tensors
from ttt.plugins import Part
from ttt_videodit import demo
from ttt_videodit import precompute as precompute_module
from ttt_videodit.clip import demo_pictures
from ttt_videodit.codec import DemoCodec
from ttt_videodit.data import latent_windows
from ttt_videodit.diffusion import make_scheduler
from ttt_videodit.encoders import (
    DemoVideoEncoder,
    Posterior,
    VAEEncoder,
    VideoPass,
    encode_video,
    load_text_encoder,
    load_vae,
    pieces,
)
from ttt_videodit.frames import read_frames, to_tensor
from ttt_videodit.jobs import Job
from ttt_videodit.options import VideoDiTOptions
from ttt_videodit.precompute import precompute
from ttt_videodit.text import DemoTextEncoder

CAPTIONS = ("towers at night, with lights", "cars drive through the city", "clouds pass over the buildings")


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pretrained(tmp_path_factory.mktemp("cogvideox"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(demo.CLIP, tmp_path / "city.mp4")
    return tmp_path


def config_text(
    folder: Path, pretrained: Path | None = None, *, train: Any = None, attn_length: int = 12, **data: Any
) -> str:
    backbone: dict[str, Any] = {"name": "videodit", "attn_length": attn_length}
    section = {"videos": str(folder / "videos.jsonl"), "train_data": str(folder / "train.jsonl")}
    if pretrained is not None:
        backbone |= {"preset": "5b", "pretrained": str(pretrained)}
        section |= {"height": 32, "width": 48, "text_length": 16}
    return json.dumps({"backbone": backbone, "data": section | data, "train": {"device": "cpu", **(train or {})}})


def config(folder: Path, pretrained: Path | None = None, **more: Any) -> RunConfig:
    checked = check_config("config.yaml", text=config_text(folder, pretrained, **more))
    assert checked.config is not None, checked.findings
    return checked.config


def listed(folder: Path, *videos: dict[str, Any], name: str = "videos.jsonl") -> None:
    (folder / name).write_text("".join(json.dumps(video) + "\n" for video in videos))


def video(start_sec: float = 0.0, segments: int = 1, path: str = "city.mp4", **more: Any) -> dict[str, Any]:
    captions = [f"{CAPTIONS[i % 3]} {start_sec:g}" for i in range(segments)]
    return {"path": path, "captions": captions, "start_sec": start_sec} | more


def run(config: RunConfig) -> str:
    """What it says."""
    told = io.StringIO()
    precompute(config, console=Console(file=told, width=100))
    return told.getvalue()


def index(folder: Path, name: str = "train.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def files(folder: Path, name: str = "latents") -> dict[str, tuple[int, str]]:
    """When each file was written, and what is in it; locks, and folders in which files were being written, aside."""
    return {
        path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted((folder / name).iterdir())
        if path.suffix != ".lock" and path.name != ".lock" and path.is_file()
    }


def assert_same(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Means come from the same operations on the same shapes. Deviations are exponentials of a piece, or of the whole.

    Each is within an ulp of the true one, and scaling it rounds once more: two are within 2 (1 + 1/2) eps.
    """
    rtol = {"mean": 0.0, "std": 3 * torch.finfo(torch.float32).eps}[name]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0)


# --- the encoders ---


@pytest.mark.parametrize(("frames", "expected"), [(49, [9, *[8] * 5]), (145, [9, *[8] * 17]), (16, [8, 8]), (5, [5])])
def test_pieces(frames: int, expected: list[int]) -> None:
    assert pieces(frames) == expected
    assert sum(expected) == frames


@pytest.mark.parametrize(("frames", "starts"), [(49, [0]), (145, [0, 48, 96]), (37, [0, 12, 24]), (45, [0])])
def test_latents_are_the_vaes_on_the_whole_video(pretrained: Path, frames: int, starts: list[int]) -> None:
    vae = AutoencoderKLCogVideoX.from_pretrained(pretrained, subfolder="vae").eval()
    pictures = noisy(frames, height=16, width=24)
    tensors = encode_video(pictures, frames=frames, starts=starts, encoder=VAEEncoder(vae))
    video = to_tensor(pictures).transpose(0, 1)[None]
    with torch.no_grad():
        whole = vae.encode(video).latent_dist
        alone = [vae.encode(video[:, :, start:]).latent_dist for start in starts]
    scale = vae.config.scaling_factor
    for name in ("mean", "std"):
        assert_same(name, tensors[name], (getattr(whole, name) * scale)[0].transpose(0, 1))
        for row, posterior in zip(tensors[f"start_{name}"], alone, strict=True):
            assert_same(name, row, (getattr(posterior, name) * scale)[0, :, 0])
    assert bool((tensors["std"] > 0).all())


def test_a_window_does_not_begin_as_the_same_frame_is_coded_in_the_whole(pretrained: Path) -> None:
    """Why the first latent frames are kept: those of the whole stand for four frames, and see those before."""
    vae = AutoencoderKLCogVideoX.from_pretrained(pretrained, subfolder="vae").eval()
    tensors = encode_video(noisy(97, height=16, width=24), frames=97, starts=[0, 48], encoder=VAEEncoder(vae))
    difference = (tensors["start_mean"][1] - tensors["mean"][12]).abs().mean()
    assert difference > 0.3 * tensors["mean"].std()


def test_no_more_than_a_piece_of_a_video_is_in_hand() -> None:
    """Pictures are read one by one, and what waits to be encoded stays bounded however long the video is."""
    taken, given = 0, []

    class Spy:
        def begin(self) -> VideoPass:
            encode = DemoVideoEncoder(DemoCodec.load()).begin()

            def spy(frames: torch.Tensor) -> Posterior:
                given.append((taken, len(frames)))
                return encode(frames)

            return spy

    def counted() -> Any:
        nonlocal taken
        for picture in noisy(193, height=8, width=8):
            taken += 1
            yield picture

    encode_video(counted(), frames=193, starts=[0, 48, 96, 144], encoder=Spy())
    whole = [(at, size) for at, size in given if (at - 1) % 8 == 0 and size == 8]
    assert whole == [(at, 8) for at in range(17, 194, 8)]
    assert [(at, size) for at, size in given if size == 9] == [(9, 9), (57, 9), (105, 9), (153, 9)]


def test_texts_are_embedded_as_cogvideoxs_pipeline_does(pretrained: Path) -> None:
    options = VideoDiTOptions(preset="5b", pretrained=str(pretrained))
    encode = load_text_encoder(options, text_length=12, device="cpu", dtype=torch.float32)
    texts = [*CAPTIONS, "", "towers", *CAPTIONS, *CAPTIONS[:2]]
    model = T5EncoderModel.from_pretrained(pretrained, subfolder="text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(pretrained, subfolder="tokenizer")
    pipeline = CogVideoXPipeline(tokenizer, model, vae=None, transformer=None, scheduler=make_scheduler())
    expected, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=12)
    torch.testing.assert_close(encode(texts), expected, atol=1e-6, rtol=1e-5)
    assert encode.count("") == 1, "T5 ends a text"
    assert encode.count(CAPTIONS[0]) > 12


def test_a_vae_of_another_geometry_is_refused(pretrained: Path, tmp_path: Path) -> None:
    other = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    other.save_pretrained(tmp_path / "vae")
    options = VideoDiTOptions(preset="5b", pretrained=str(tmp_path))
    with pytest.raises(EnvironmentProblem, match=r"vae: 16 channels for 4 frames of 4 × 4 pixels, not CogVideoX's 16"):
        load_vae(options, device="cpu", dtype=torch.float32)


# --- the whole ---


def test_videos_and_captions_become_windows_to_train_on(folder: Path, pretrained: Path) -> None:
    listed(folder, video(segments=2), video(1.25))
    told = run(config(folder, pretrained))
    assert "2/2  city.mp4  49 frames in " in told
    assert told.endswith("train.jsonl: 2 of 2 videos\n")
    run_config = config(folder, pretrained)
    windows = latent_windows(run_config.backbone, run_config.data, split="train", device="cpu")  # type: ignore[arg-type]
    assert [windows.describe(i) for i in range(3)] == ["city.mp4, 0-3 s", "city.mp4, 3-6 s", "city.mp4, 1.25-4.25 s"]
    vae = AutoencoderKLCogVideoX.from_pretrained(pretrained, subfolder="vae").eval()
    options = VideoDiTOptions(preset="5b", pretrained=str(pretrained))
    embed = load_text_encoder(options, text_length=16, device="cpu", dtype=torch.float32)
    for number, (start, count, segment) in enumerate([(0.0, 97, 0), (0.0, 97, 1), (1.25, 49, 0)]):
        pictures = list(read_frames(folder / "city.mp4", start_sec=start, count=count, height=32, width=48))
        pixels = to_tensor(pictures).transpose(0, 1)[None]
        with torch.no_grad():
            whole, alone = vae.encode(pixels).latent_dist, vae.encode(pixels[:, :, 48 * segment :]).latent_dist
        sample, scale = windows[number], vae.config.scaling_factor
        for name in ("mean", "std"):
            latents = (getattr(whole, name) * scale)[0].transpose(0, 1)
            assert_same(name, sample[name][1:], latents[12 * segment + 1 : 12 * segment + 13])
            assert_same(name, sample[name][0], (getattr(alone, name) * scale)[0, :, 0])
        torch.testing.assert_close(sample["text"], embed(windows.captions(number)))
    header = read_header(folder / index(folder)[0]["latents"])
    assert json.loads(header.metadata["ttt_videodit.precompute"]) == {
        "video": "city.mp4",
        "start_sec": 0.0,
        "height": 32,
        "width": 48,
        "frames_per_second": 16,
        "encoder": str(pretrained),
    }


def test_the_demo_encodes_by_its_own_codec_and_words(folder: Path) -> None:
    write_lossless(folder / "clip.mov", np.stack(demo_pictures("train")))
    listed(folder, {"path": "clip.mov", "captions": ["one two", "three", "one two"]})
    run(config(folder))
    windows = latent_windows(
        VideoDiTOptions(),
        config(folder, duration_sec=9).data,
        split="train",
        device="cpu",  # type: ignore[arg-type]
    )
    frames = to_tensor(demo_pictures("train"))[None]
    torch.testing.assert_close(windows[0]["mean"], DemoCodec.load().encode(frames)[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(windows[0]["text"], DemoTextEncoder(text_length=8)(["one two", "three", "one two"]))
    (line,) = index(folder)
    assert line["segments"][0] == line["segments"][2], "a text is embedded once"


def test_both_lists_become_their_indexes(folder: Path) -> None:
    listed(folder, video(segments=2))
    listed(folder, video(3.0), name="held_out.jsonl")
    eval_data = {"eval_videos": str(folder / "held_out.jsonl"), "eval_data": str(folder / "data" / "eval.jsonl")}
    told = run(config(folder, **eval_data))
    assert "train.jsonl: 1 of 1 videos" in told
    assert "eval.jsonl: 1 of 1 videos" in told
    assert (len(index(folder)[0]["segments"]), index(folder, "data/eval.jsonl")[0]["start_sec"]) == (2, 3.0)
    only = {"videos": None, "train_data": None}
    shutil.rmtree(folder / "data")
    run(config(folder, **eval_data, **only))
    assert len(index(folder, "data/eval.jsonl")) == 1


def test_in_bfloat16_files_are_half_as_large(folder: Path, pretrained: Path) -> None:
    listed(folder, video())
    run(config(folder, pretrained, train={"param_dtype": "bfloat16"}, attn_length=2))
    (line,) = index(folder)
    latents = load_file(folder / line["latents"])
    assert {tensor.dtype for tensor in latents.values()} == {torch.float16}
    assert load_file(folder / line["segments"][0]["text"])["text"].dtype == torch.bfloat16
    vae = AutoencoderKLCogVideoX.from_pretrained(pretrained, subfolder="vae", torch_dtype=torch.bfloat16).eval()
    pictures = list(read_frames(folder / "city.mp4", start_sec=0, count=9, height=32, width=48))
    with torch.no_grad():
        posterior = vae.encode(to_tensor(pictures).transpose(0, 1)[None].bfloat16()).latent_dist
    expected = posterior.mean.float() * vae.config.scaling_factor
    torch.testing.assert_close(latents["mean"].float(), expected[0].transpose(0, 1), rtol=2**-11, atol=1e-6)


def test_long_captions_are_cut_and_told(folder: Path) -> None:
    listed(folder, {"path": "city.mp4", "captions": ["one two three four five six seven eight nine", "x"]})
    place = f"{folder / 'videos.jsonl'}:1, caption 1"
    assert f"captions of more than 8 tokens, cut off there: {place}\n" in run(config(folder))


def test_captions_with_scene_tokens_that_were_read_as_text_are_read_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **settings: Any) -> Any:
        encoder = load_text_encoder(*args, **settings)
        encoder.knows_scenes = False  # type: ignore[misc]
        return encoder

    listed(folder, {"path": "city.mp4", "captions": ["rain<end_scene>", "<start_scene>sun"]}, video(1.0))
    with monkeypatch.context() as before:
        for module in ("jobs", "precompute"):
            before.setattr(f"ttt_videodit.{module}.names_scenes", lambda _: False)
        run(config(folder))
    first = files(folder)
    with monkeypatch.context() as without:
        without.setattr("ttt_videodit.precompute.load_text_encoder", load)
        words = "captions: this text encoder has no embeddings for <start_scene> and <end_scene>: they are read as text"
        assert words in run(config(folder))
    second = files(folder)
    assert {name: second[name] for name in first} == first
    assert len(second) == len(first) + 2
    run(config(folder))
    assert files(folder) == second


def test_progress_on_a_terminal(folder: Path) -> None:
    listed(folder, video(), video(1.0))
    told = io.StringIO()
    precompute(config(folder), console=Console(file=told, force_terminal=True, width=100, color_system=None))
    assert "texts" in told.getvalue()
    assert "98/98" in told.getvalue()


# --- resuming ---


def precompute_as(text: str) -> None:
    precompute(check_config("config.yaml", text=text).config, console=Console())


def test_a_killed_run_is_gone_on_with_and_no_video_is_redone_or_lost(folder: Path, pretrained: Path) -> None:
    listed(folder, *(video(0.25 * number) for number in range(5)))
    short = {"attn_length": 4}  # segments of 17 frames
    with forking.start(precompute_as, config_text(folder, pretrained, **short)) as process:
        deadline = time.monotonic() + 240
        lines = folder / "train.jsonl"
        while not (lines.exists() and lines.read_bytes().count(b"\n") >= 1):
            assert process.poll() is None, "it was done before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
    before, done = files(folder), lines.read_bytes().count(b"\n")
    assert 1 <= done < 5
    run(config(folder, pretrained, **short))
    after = files(folder)
    kept = {name: stamp for name, stamp in before.items() if not name.startswith(".writing-")}
    assert {name: after[name] for name in kept} == kept, "what was there was made again"
    assert not any(name.startswith(".writing-") for name in after)
    assert [line["start_sec"] for line in index(folder)] == [0.25 * number for number in range(5)]
    other = folder / "other"
    other.mkdir()
    shutil.copy2(folder / "city.mp4", other / "city.mp4")
    shutil.copy(folder / "videos.jsonl", other / "videos.jsonl")
    run(config(other, pretrained, **short))
    assert index(other) == index(folder)
    contents = {name: digest for name, (_, digest) in files(other).items()}
    assert contents == {name: digest for name, (_, digest) in after.items()}, "as if it had never been killed"


@pytest.mark.parametrize("written", [1, 4, 11])
def test_a_run_that_ends_among_the_files_goes_on_to_the_same_bytes(
    folder: Path, pretrained: Path, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight texts, four videos: what is left is computed in the shapes that an unbroken run computes it in."""
    listed(folder, *(video(0.25 * number, segments=2) for number in range(4)))
    other = folder / "other"
    other.mkdir()
    shutil.copy2(folder / "city.mp4", other / "city.mp4")
    shutil.copy(folder / "videos.jsonl", other / "videos.jsonl")
    short = {"attn_length": 2}  # segments of 9 frames
    run(config(other, pretrained, **short))
    with monkeypatch.context() as patch:
        left = iter(range(written))

        def write(*args: Any) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            write_tensors(*args)

        patch.setattr(precompute_module, "write_tensors", write)
        with pytest.raises(KeyboardInterrupt):
            run(config(folder, pretrained, **short))
    assert len(files(folder)) == written
    run(config(folder, pretrained, **short))
    digests = [{name: digest for name, (_, digest) in files(made).items()} for made in (folder, other)]
    assert digests[0] == digests[1]
    assert index(folder) == index(other)


def test_a_run_again_writes_nothing(folder: Path) -> None:
    listed(folder, video(), video(1.0))
    run(config(folder))
    before, stamp = files(folder), (folder / "train.jsonl").stat().st_mtime_ns
    assert run(config(folder)) == f"{folder / 'train.jsonl'}: 2 of 2 videos\n"
    assert files(folder) == before
    assert (folder / "train.jsonl").stat().st_mtime_ns == stamp


def test_parts_make_the_index_of_one_process_and_nothing_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three first; its process is killed in its last line. Videos 0 and 4 have a text in common."""
    short = {"attn_length": 2}  # segments of 9 frames
    whole = folder / "whole"
    whole.mkdir()
    shutil.copy2(folder / "city.mp4", whole / "city.mp4")
    videos = [video(0.25 * number, captions=["waves" if number % 4 == 0 else f"{number}"]) for number in range(6)]
    for place in (folder, whole):
        listed(place, *videos)
    run(config(whole, **short))
    parts, seen = config(folder, **short), {}
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, done in ((1, 2), (0, 4), (2, 6)):
        monkeypatch.setenv("RANK", str(rank))
        assert f"{done} of 6 videos (part {rank + 1} of 3)" in "".join(run(parts).splitlines())
        assert seen.items() <= files(folder).items()
        seen = files(folder)
        if rank == 1:
            with (folder / "train.jsonl").open("a") as half:
                half.write('{"video": "city.mp4", ')
    assert (folder / "train.jsonl").read_bytes() == (whole / "train.jsonl").read_bytes()
    contents = {name: digest for name, (_, digest) in files(whole).items()}
    assert {name: digest for name, (_, digest) in seen.items()} == contents
    monkeypatch.setenv("RANK", "1")
    assert "frames in" not in run(parts)


def test_a_part_that_lacks_a_text_of_another_part_makes_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed(folder, *(video(0.25 * number, captions=["waves"]) for number in range(2)))
    parts = config(folder, attn_length=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert "1 of 2 videos (part 2 of 2)" in run(parts)
    assert [line["start_sec"] for line in index(folder)] == [0.25]
    assert len(files(folder)) == 2


def test_a_line_that_a_killed_process_left_half_does_not_spoil_the_next(folder: Path) -> None:
    listed(folder, video(), video(0.25))
    made = config(folder, attn_length=2)
    (job,) = [Job.of(made.backbone, made.data, "videos", "train_data", Part())]
    run(made)
    lines = (folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "train.jsonl").write_bytes(lines[0] + lines[1][:40])
    job.append(job.videos[1])
    assert (folder / "train.jsonl").read_bytes() == b"".join(lines)


def _half_a_line(folder: Path) -> None:
    lines = (folder / "train.jsonl").read_bytes()
    (folder / "train.jsonl").write_bytes(lines[:-40])
    (folder / "latents" / ".writing-1234-city.safetensors").write_bytes(b"half")


def _no_line(folder: Path) -> None:
    lines = (folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "train.jsonl").write_bytes(b"".join(lines[:-1]))


def _no_line_break(folder: Path) -> None:
    (folder / "train.jsonl").write_bytes((folder / "train.jsonl").read_bytes()[:-1])


def _no_index(folder: Path) -> None:
    (folder / "train.jsonl").unlink()


@pytest.mark.parametrize("killed_at", [_half_a_line, _no_line, _no_line_break, _no_index])
def test_wherever_a_run_was_killed(folder: Path, killed_at: Callable[[Path], None]) -> None:
    listed(folder, video(), video(1.0), video(2.0))
    run(config(folder))
    before, lines = files(folder), index(folder)
    killed_at(folder)
    run(config(folder))
    assert files(folder) == before
    assert index(folder) == lines


def test_what_is_lost_is_made_again_and_nothing_else(folder: Path) -> None:
    listed(folder, video(), video(1.0))
    run(config(folder))
    before, lines = files(folder), index(folder)
    lost = {Path(lines[0]["latents"]).name, Path(lines[1]["segments"][0]["text"]).name}
    for name in lost:
        (folder / "latents" / name).unlink()
    run(config(folder))
    after = files(folder)
    assert {name for name in before if after[name][0] != before[name][0]} == lost
    assert {name: digest for name, (_, digest) in after.items()} == {n: digest for n, (_, digest) in before.items()}
    assert index(folder) == lines


def test_another_caption_is_another_text_and_the_same_latents(folder: Path) -> None:
    listed(folder, video(), video(1.0))
    run(config(folder))
    before = files(folder)
    listed(folder, {**video(), "captions": ["rain"]}, video(1.0))
    run(config(folder))
    after = files(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1
    assert [line["segments"][0]["caption"] for line in index(folder)] == ["rain", f"{CAPTIONS[0]} 1"]


def test_another_video_of_the_same_name_is_encoded_anew(folder: Path) -> None:
    path = write_lossless(folder / "a.mov", noisy(49, seed=1))
    listed(folder, video(path="a.mov"))
    run(config(folder))
    (first,) = index(folder)
    write_lossless(path, noisy(49, seed=2))
    os.utime(path, ns=(1, 1))
    run(config(folder))
    (second,) = index(folder)
    assert first["latents"] != second["latents"]
    means = [load_file(folder / line["latents"])["mean"] for line in (first, second)]
    assert not torch.equal(*means)


def test_videos_that_the_list_no_longer_names_stay(folder: Path) -> None:
    listed(folder, video(), video(1.0))
    run(config(folder))
    listed(folder, video(2.0), video(1.0))
    run(config(folder))
    assert [line["start_sec"] for line in index(folder)] == [0.0, 2.0, 1.0]


def test_an_index_of_other_settings_is_left_alone(folder: Path) -> None:
    listed(folder, video())
    run(config(folder))
    before = (folder / "train.jsonl").read_bytes()
    message = r"train.jsonl:1: city.mp4 was encoded with height 64, but the config asks for 32; name another index"
    with pytest.raises(UsageError, match=message):
        run(config(folder, height=32))
    with pytest.raises(UsageError, match=r"with text_length 8, but the config asks for 9"):
        run(config(folder, text_length=9))
    (folder / "train.jsonl").write_bytes(b"[]\n" + before)
    with pytest.raises(EnvironmentProblem, match=r"train.jsonl:1: not an object"):
        run(config(folder))
    assert (folder / "train.jsonl").read_bytes() == b"[]\n" + before


def test_stages_beside_each_other_share_their_latents(folder: Path) -> None:
    listed(folder, video(segments=2), video(1.0))
    run(config(folder))
    before = files(folder)
    told = run(config(folder, text_length=7, train_data=str(folder / "next.jsonl")))
    assert told == f"{folder / 'next.jsonl'}: 2 of 2 videos\n", "no video was encoded"
    after = files(folder)
    assert {name: after[name] for name in before} == before
    assert {name[:5] for name in set(after) - set(before)} == {"text-"}
    for first, second in zip(index(folder), index(folder, "next.jsonl"), strict=True):
        assert second["latents"] == first["latents"]


def test_two_processes_do_not_make_the_same_index_nor_clear_away_each_others_files(folder: Path) -> None:
    listed(folder, video())
    latents = folder / "latents"
    latents.mkdir()
    left = latents / ".writing-1234-city.safetensors"
    left.touch()
    (latents / ".writing-5678-city.safetensors").mkdir()
    (latents / ".writing-5678-city.safetensors" / ".tmpA1b2C3").touch()
    (latents / ".tmpA1b2C3").touch()  # of safetensors, as it was written before
    (folder / ".writing-12345678-train.jsonl").touch()
    (folder / ".writing-12345678-notes.jsonl").touch()
    with (latents / ".lock").open("w") as others, (latents / ".train.jsonl.lock").open("w") as held:
        fcntl.flock(others, fcntl.LOCK_SH)
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match=r"train.jsonl: another process is making it; wait for it"):
            run(config(folder))
        run(config(folder, train_data=str(folder / "next.jsonl")))
        assert left.exists(), "somebody may be writing it"
    run(config(folder))
    assert [path.name for path in latents.iterdir() if path.name.startswith((".writing", ".tmp"))] == []
    assert [path.name for path in folder.glob(".writing*")] == [".writing-12345678-notes.jsonl"], "another's"


def test_a_damaged_file_is_made_anew_before_it_gets_into_an_index(folder: Path) -> None:
    listed(folder, video())
    run(config(folder))
    before = files(folder)
    (folder / "train.jsonl").unlink()
    for file in (folder / "latents").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\xee")
    told = run(config(folder))
    assert told.count("damaged: its checksum is not that of its content") == 2
    assert {name: digest for name, (_, digest) in files(folder).items()} == {
        name: digest for name, (_, digest) in before.items()
    }


def test_an_index_says_the_checksums_of_its_files_and_a_changed_line_is_refused(folder: Path) -> None:
    listed(folder, video())
    run(config(folder))
    (line,) = index(folder)
    assert line["latents_sha256"] == read_header(folder / line["latents"]).checksum
    assert line["segments"][0]["text_sha256"] == read_header(folder / line["segments"][0]["text"]).checksum
    text = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(text.replace("night", "light"))
    assert text != (folder / "train.jsonl").read_text()
    with pytest.raises(EnvironmentProblem, match=r"train\.jsonl:1: damaged: its checksum is not that of its content"):
        run(config(folder))


def test_what_another_index_had_made_anew_is_listed_anew(folder: Path) -> None:
    """Indexes share latents: the checksum of a file that was lost and made again on another machine may be another."""
    listed(folder, video())
    run(config(folder))
    (line,) = index(folder)
    latents = folder / line["latents"]
    tensors = {name: tensor + 0.5 for name, tensor in load_file(latents).items()}
    latents.unlink()
    write_tensors(latents, tensors, {"made": "elsewhere"})
    made = config(folder)
    with pytest.raises(EnvironmentProblem, match=r"its checksum is another; run ttt precompute again"):
        latent_windows(made.backbone, made.data, split="train", device="cpu")
    run(made)
    assert len(latent_windows(made.backbone, made.data, split="train", device="cpu")) == 1
    assert index(folder)[0]["latents_sha256"] == read_header(latents).checksum


def test_latents_that_the_disk_does_not_give_are_not_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed(folder, video())
    run(config(folder))
    before = files(folder)
    (folder / "train.jsonl").unlink()

    def fails(path: Path, *more: Any) -> None:
        raise UnreadableError(f"{path}: cannot be read: Input/output error")

    monkeypatch.setattr(precompute_module, "verify_tensors", fails)
    with pytest.raises(UnreadableError, match="Input/output error"):
        run(config(folder))
    assert files(folder) == before


# --- what can be wrong ---


def test_a_video_that_cannot_be_decoded_is_told_at_the_end_and_the_rest_is_done(folder: Path) -> None:
    content = (folder / "city.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 3])
    (folder / "none.mp4").write_text("no video")
    listed(folder, video(), video(path="cut.mp4"), video(path="none.mp4"), video(1.0))
    with pytest.raises(EnvironmentProblem) as error:
        run(config(folder))
    assert error.value.exit_code == 3
    first, cut, none = str(error.value).splitlines()
    assert first.startswith("2 videos could not be encoded; the rest is done. Mend them, or take their lines out, and")
    assert cut.startswith(f"  {folder / 'videos.jsonl'}:2: {folder / 'cut.mp4'}: ")
    assert none.startswith(f"  {folder / 'videos.jsonl'}:3: {folder / 'none.mp4'}: cannot be decoded: ")
    assert [line["start_sec"] for line in index(folder)] == [0.0, 1.0]
    before = files(folder)
    for name in ("cut.mp4", "none.mp4"):
        shutil.copy(folder / "city.mp4", folder / name)
    run(config(folder))
    assert [line["video"] for line in index(folder)] == ["city.mp4", "cut.mp4", "none.mp4", "city.mp4"]
    after = files(folder)
    assert {name: after[name] for name in before} == before


def test_a_wrong_list_stops_everything_before_anything_is_done(folder: Path) -> None:
    write_lossless(folder / "short.mov", noisy(40))
    listed(
        folder,
        video(),
        {"path": "city.mp4", "captions": ["x", None]},
        video(path="lost.mp4"),
        video(0.5, segments=3),
        video(path="short.mov"),
        video(),
    )
    with pytest.raises(EnvironmentProblem) as error:
        run(config(folder))
    lines = str(error.value).splitlines()
    place = folder / "videos.jsonl"
    assert lines[0] == "data.videos: 5 lines cannot be used:"
    assert lines[1].startswith(f"  {place}:2: caption 2 of 2 is None; each 3 s need a text")
    assert lines[2].startswith(f"  {place}:3: no file {folder / 'lost.mp4'}")
    assert lines[3] == (
        f"  {place}:4: 3 captions for 3 s each from 0.5 s on, but {folder / 'city.mp4'} lasts 7.60 s; write 2"
    )
    assert lines[4].endswith("short.mov lasts 2.50 s; leave it out")
    assert lines[5] == f"  {place}:6: the same video from the same start_sec as in {place}:1; leave one out"
    assert not (folder / "train.jsonl").exists()
    assert not (folder / "latents").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"videos": None}, r"data.videos: null; name a .jsonl file with lines such as"),
        ({"train_data": None}, r"data.train_data: null; name the .jsonl index that data.videos is to become"),
        ({"train_data": [{"path": "a.jsonl"}]}, r"data.train_data: a list; name the .jsonl index that data.videos is"),
        ({"train_data": "latents"}, r"data.train_data: latents; name the .jsonl index"),
        (
            {"eval_videos": "videos.jsonl", "eval_data": "train.jsonl"},
            r"data.eval_data: .*train.jsonl is data.train_data",
        ),
        ({"videos": "none.jsonl"}, r"data.videos: .*none.jsonl is not a file; name a .jsonl with lines such as"),
        ({"videos": "empty.jsonl"}, r"data.videos: .*empty.jsonl: no videos; write lines such as"),
    ],
)
def test_a_config_that_says_not_what_or_where(folder: Path, data: dict[str, Any], message: str) -> None:
    listed(folder, video())
    listed(folder, name="empty.jsonl")
    there = {key: str(folder / value) if str(value).endswith(".jsonl") else value for key, value in data.items()}
    with pytest.raises(TTTError, match=message):
        run(config(folder, **there))


def test_latents_that_are_no_numbers_are_not_written(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(pretrained, spoilt)
    vae = AutoencoderKLCogVideoX.from_pretrained(spoilt, subfolder="vae")
    vae.encoder.conv_in.conv.weight.data[0, 0, 0, 0, 0] = float("inf")
    vae.save_pretrained(spoilt / "vae")
    listed(folder, video())
    with pytest.raises(
        EnvironmentProblem, match=r"videos.jsonl:1: .*mean of its latents is not finite; try train.param"
    ):
        run(config(folder, spoilt))
    assert index(folder) == []
    text = T5EncoderModel.from_pretrained(spoilt, subfolder="text_encoder")
    text.encoder.final_layer_norm.weight.data[0] = float("nan")
    text.save_pretrained(spoilt / "text_encoder")
    listed(folder, video(1.0))
    with pytest.raises(EnvironmentProblem, match=r"videos.jsonl:1, caption 1: T5 gave numbers that are not finite"):
        run(config(folder, spoilt))


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_encoders_that_are_not_there(folder: Path, pretrained: Path, tmp_path: Path, part: str) -> None:
    partial = tmp_path / "partial"
    shutil.copytree(pretrained, partial)
    shutil.rmtree(partial / part)
    listed(folder, video())
    with pytest.raises(EnvironmentProblem, match=rf"backbone.pretrained: .*partial holds no {part}/; name a folder"):
        run(config(folder, partial))
    (partial / part).mkdir()
    with pytest.raises(
        EnvironmentProblem, match=r"partial: cannot be loaded as (T5|CogVideoX's VAE) \(.*\); name a lo"
    ):
        run(config(folder, partial))


def test_no_memory_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: DemoCodec, frames: torch.Tensor, **more: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DemoCodec, "encode", full)
    listed(folder, video())
    with pytest.raises(EnvironmentProblem, match=r"out of memory while encoding: write train.param_dtype: bfloat16"):
        run(config(folder))


def test_a_full_disk_is_told_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Sequence[int] = (10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": usage[2]})())
    listed(folder, video())
    told = r"latents: what the videos become takes .* but only 1000 bytes are free"
    with pytest.raises(EnvironmentProblem, match=told):
        run(config(folder))
