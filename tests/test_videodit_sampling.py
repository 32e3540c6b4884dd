from __future__ import annotations

import gc
import io
import json
import math
import os
import shutil
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import av
import forking
import matplotlib.image
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from rich.console import Console
from tiny_cogvideox import write_pretrained
from torch import Tensor, nn

import ttt
from ttt import inject
from ttt.check import load_config
from ttt.config import RunConfig
from ttt.errors import EnvironmentProblem, NonFiniteError, UsageError
from ttt.plugins import SampleRequest, run_config_model
from ttt_cli.main import main
from ttt_videodit import model as videodit
from ttt_videodit.building import build
from ttt_videodit.diffusion import make_scheduler
from ttt_videodit.encoders import load_text_encoder
from ttt_videodit.options import VideoDiTOptions
from ttt_videodit.plugin import ttt_backbone
from ttt_videodit.request import check_request, plan_sample
from ttt_videodit.sampling import (
    decode_pieces,
    denoise,
    guidance_weight,
    load_decoder,
    prepare_samples,
    sample,
    to_pixels,
)
from ttt_videodit.scenes import with_scene_tokens
from ttt_videodit.video import write_contact_sheet, write_video

OPTIONS = VideoDiTOptions(preset="demo", dim=32, num_heads=2, num_layers=2)
CONFIG = """
backbone: {name: videodit, preset: demo, dim: 32, num_heads: 2, num_layers: 2, text_dropout: 0.1}
ttt: {mini_batch_size: 16, initial_gating_alpha: 0.3}
"""


def config() -> RunConfig:
    return load_config("test.yaml", text=CONFIG, backbone=ttt_backbone()).config


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A tiny adapted transformer whose outputs depend on its text."""
    made = build(OPTIONS, device="cpu", dtype=torch.float32)
    torch.manual_seed(2)
    for parameter in made.parameters():  # diffusers' last layers start near zero
        nn.init.normal_(parameter, std=0.15) if parameter.ndim > 1 else None
    inject.apply(made, videodit.sites(made), config().ttt, causal=False, seed=3)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny CogVideoX."""
    return write_pretrained(tmp_path_factory.mktemp("cogvideox") / "tiny")


def request(out: Path, **changes: Any) -> SampleRequest:
    settings: dict[str, Any] = {
        "prompts": ("towers at night", "the lights of cars", "clouds over the city"),
        "negative_prompts": (),
        "seconds": 9.0,
        "out": out,
        "steps": 4,
        "guidance_scale": 6.0,
        "seed": 7,
    }
    return SampleRequest(**{**settings, **changes})


def quiet() -> Console:
    return Console(record=True, force_terminal=False, width=200, file=io.StringIO())


def pretrained_config(folder: Path, *, text_dropout: float = 0.1) -> RunConfig:
    """Of a model in a folder, whose training data need not be here."""
    settings = {
        "backbone": {"name": "videodit", "preset": "5b", "pretrained": str(folder), "text_dropout": text_dropout},
        "data": {"height": 32, "width": 48, "text_length": 6, "train_data": "elsewhere.jsonl"},
    }
    return run_config_model(ttt_backbone()).model_validate(settings)


def _tensor(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


# --- the solver ---


@pytest.mark.parametrize(("steps", "scale"), [(10, 6.0), (4, 1.0)])
def test_one_segment_is_what_diffusers_own_pipeline_makes(steps: int, scale: float) -> None:
    """The same weights, prompts and seed, through `CogVideoXPipeline`."""
    ours = build(OPTIONS, device="cpu", dtype=torch.float32)
    torch.manual_seed(1)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.15) if parameter.ndim > 1 else None
    theirs = CogVideoXTransformer3DModel.from_config({**ours.config, "_class_name": "CogVideoXTransformer3DModel"})
    theirs.load_state_dict(ours.state_dict())
    text, negative = torch.randn(2, 1, 1, 8, 32, generator=torch.Generator().manual_seed(0))
    pipeline = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=theirs.eval(), scheduler=make_scheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=text[0],
        negative_prompt_embeds=negative[0],
        height=64,
        width=64,
        num_frames=49,
        num_inference_steps=steps,
        guidance_scale=scale,
        use_dynamic_cfg=True,
        generator=torch.Generator().manual_seed(9),
        output_type="latent",
    ).frames
    found = denoise(
        ours,
        text,
        negative,
        shape=(1, 13, 16, 8, 8),
        schedule=make_scheduler(),
        steps=steps,
        guidance_scale=scale,
        seed=9,
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.std() > 0.1


def solve(model: nn.Module, *, text: Tensor, unconditional: Tensor | None = None, **changes: Any) -> Tensor:
    settings: dict[str, Any] = {
        "shape": (text.shape[0], OPTIONS.segments.frames(text.shape[1]), 16, 4, 4),
        "schedule": make_scheduler(),
        "steps": 4,
        "guidance_scale": 6.0,
        "seed": 7,
    }
    return denoise(model, text, unconditional, **{**settings, **changes})


def texts(rows: int = 1, segments: int = 2) -> Tensor:
    return torch.randn(rows, segments, 3, 32, generator=torch.Generator().manual_seed(4))


def test_guidance_of_1_is_the_conditional_model(model: nn.Module) -> None:
    text = texts()
    conditional = solve(model, text=text)
    assert torch.equal(solve(model, text=text, unconditional=-text, guidance_scale=1.0), conditional)
    assert not torch.equal(solve(model, text=text, unconditional=-text, guidance_scale=2.0), conditional)


def test_guidance_away_from_itself_changes_nothing(model: nn.Module) -> None:
    text = texts()
    torch.testing.assert_close(solve(model, text=text, unconditional=text), solve(model, text=text))


def test_guidance_by_its_definition() -> None:
    """`1 + s (1 − cos(π ((N − t)/N)⁵))/2`, at places where it is known by heart."""
    assert guidance_weight(6, timestep=50, steps=50) == 1
    assert guidance_weight(6, timestep=0, steps=50) == pytest.approx(7)
    half = 50 * (1 - 0.5**0.2)
    assert guidance_weight(4, timestep=half, steps=50) == pytest.approx(3)  # type: ignore[arg-type]
    weights = [guidance_weight(6, timestep=timestep, steps=50) for timestep in range(1000)]
    assert all(1 <= weight <= 7 + 1e-12 for weight in weights)


def test_a_seed_means_a_video(model: nn.Module) -> None:
    text = texts()
    first = solve(model, text=text)
    torch.randn(3)  # the global generator has no part in it
    assert torch.equal(solve(model, text=text), first)
    assert not torch.equal(solve(model, text=text, seed=8), first)


def test_steps_that_do_not_divide_the_timesteps_end_without_noise(model: nn.Module) -> None:
    """7 steps end at timestep 142, before 0: the answer is that step's x0 all the same."""
    text = texts()

    class Fixed(nn.Module):
        """Knows the clean latents: 0.5 everywhere."""

        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = model.patch_embed

        def forward(self, *, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
            signal = make_scheduler().alphas_cumprod[timestep[0]].float()
            noise = (hidden_states - signal.sqrt() * 0.5) / (1 - signal).sqrt()
            return (signal.sqrt() * noise - (1 - signal).sqrt() * 0.5,)

    for steps in (7, 10):
        found = solve(Fixed(), text=text, steps=steps)
        torch.testing.assert_close(found, torch.full_like(found, 0.5), rtol=0, atol=1e-5)


def test_a_prompt_reaches_its_segment_and_by_ttt_the_whole_video(model: nn.Module) -> None:
    """With gates closed, two blocks of attention by segments carry a change one segment on, and no further."""
    from ttt.adapter import gates_closed

    text = texts(segments=3)
    other = text.clone()
    other[:, 0] += 1
    with gates_closed(model):
        change = (solve(model, text=other, steps=1) - solve(model, text=text, steps=1)).abs().amax((0, 2, 3, 4))
    assert (change[:25] > 0).all()
    assert (change[25:] == 0).all()
    through_ttt = (solve(model, text=other, steps=1) - solve(model, text=text, steps=1)).abs().amax((0, 2, 3, 4))
    assert (through_ttt > 0).all(), "TTT carries it to the whole video"


# --- from prompts to files ---


def test_prompts_become_a_video_and_its_contact_sheet(model: nn.Module, tmp_path: Path) -> None:
    asked = request(tmp_path / "new" / "clip.mp4", negative_prompts=("", "blur", ""))
    model.train()
    files = sample(model, asked, config(), console=quiet())
    assert files == [tmp_path / "new" / "clip.mp4", tmp_path / "new" / "clip.png"]
    assert sorted((tmp_path / "new").iterdir()) == files
    frames, rate, metadata, _ = read_video(files[0])
    assert frames.shape == (145, 64, 64, 3)
    assert rate == 16
    assert frames.std() > 10
    told = json.loads(metadata["comment"])
    assert told.pop("ttt_version") == ttt.__version__
    assert told.pop("sampling_schedule") == "diffusers"
    assert told.pop("guidance_leads_away_from") == "the negative prompts"
    assert told == json.loads(json.dumps({**asdict(asked), "out": "clip.mp4"}))
    assert model.training, "as it was"
    model.eval()


def test_the_same_request_gives_the_same_files(model: nn.Module, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        asked = request(tmp_path / name / "clip.mp4", seconds=3.0, prompts=("towers at night",), steps=2)
        contents.append([file.read_bytes() for file in sample(model, asked, config(), console=quiet())])
        torch.manual_seed(99)
    assert contents[0] == contents[1]


def test_what_guidance_leads_away_from(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative prompts; without any, zeros where training dropped texts, and else the embedding of nothing.

    Published weights never saw zeros, so for an adapter imported from TTT-Video it is nothing, as there, whatever the
    config says of training here.
    """
    seen: list[Tensor | None] = []

    def recorded(model: nn.Module, text: Tensor, unconditional: Tensor | None, **settings: Any) -> Tensor:
        seen.append(unconditional)
        return denoise(model, text, unconditional, **settings)

    monkeypatch.setattr("ttt_videodit.sampling.denoise", recorded)
    settings = pretrained_config(folder)
    made = ttt_backbone().build(settings.backbone, device="cpu", dtype=torch.float32)
    encode = load_text_encoder(settings.backbone, text_length=6, device="cpu", dtype=torch.float32)  # type: ignore[arg-type]
    asked = request(tmp_path / "clip.mp4", seconds=3.0, prompts=("towers at night",), steps=1)
    for text_dropout, changes, expected, told in (
        (0.1, {}, torch.zeros(1, 1, 6, 32), "zeros in place of text"),
        (0.0, {}, encode([""])[None], "empty texts"),
        (0.1, {"imported_from": "TTT-Video"}, encode([""])[None], "empty texts"),
        (0.1, {"imported_from": "another"}, torch.zeros(1, 1, 6, 32), "zeros in place of text"),
        (0.1, {"negative_prompts": ("blurred",)}, encode(["blurred"])[None], "the negative prompts"),
    ):
        console = quiet()
        wanted = pretrained_config(folder, text_dropout=text_dropout)
        video, _ = sample(made, replace(asked, **changes), wanted, console=console)
        assert torch.equal(_tensor(seen[-1]), expected)
        assert f"guided away from {told}\n" in console.export_text()
        metadata = json.loads(read_video(video)[2]["comment"])
        assert metadata["guidance_leads_away_from"] == told
        assert metadata["imported_from"] == changes.get("imported_from")
    console = quiet()
    sample(made, replace(asked, guidance_scale=1.0), settings, console=console)
    assert seen[-1] is None
    assert "without guidance" in console.export_text()
    assert encode([""]).abs().max() > 0


def test_whose_steps_are_taken(model: nn.Module, tmp_path: Path) -> None:
    """diffusers' schedule, or TTT-Video's where the config says so or the adapter comes from there: said, and taken."""
    pictures = {}
    for name, override, imported_from, expected in (
        ("plain", "null", None, "diffusers (backbone.sampling_schedule is null)"),
        ("imported", "null", "TTT-Video", "ttt-video (the adapter was imported from TTT-Video)"),
        ("asked", "ttt-video", None, "ttt-video (as backbone.sampling_schedule says)"),
        ("refused", "diffusers", "TTT-Video", "diffusers (as backbone.sampling_schedule says)"),
    ):
        change = f"backbone.sampling_schedule={override}"
        settings = load_config("test.yaml", text=CONFIG, backbone=ttt_backbone(), overrides=[change]).config
        asked = request(tmp_path / f"{name}.mp4", seconds=3.0, prompts=("towers at night",), negative_prompts=("fog",))
        console = quiet()
        video, _ = sample(model, replace(asked, imported_from=imported_from), settings, console=console)
        assert f"samples by the schedule {expected}, guided away from the negative prompts\n" in console.export_text()
        pictures[name], _, metadata, _ = read_video(video)
        assert expected.startswith(json.loads(metadata["comment"])["sampling_schedule"])
    assert np.array_equal(pictures["plain"], pictures["refused"])
    assert np.array_equal(pictures["imported"], pictures["asked"])
    assert not np.array_equal(pictures["plain"], pictures["imported"])


def test_a_pretrained_folder_is_sampled_with_its_own_vae_and_t5(folder: Path, tmp_path: Path) -> None:
    """A whole tiny CogVideoX: what the files show is what diffusers' VAE makes of what the solver made."""
    settings = pretrained_config(folder)
    made = ttt_backbone().build(settings.backbone, device="cpu", dtype=torch.float32)
    asked = request(tmp_path / "clip.mp4", seconds=6.0, prompts=("towers at night", "cars drive"), steps=2)
    console = quiet()
    video, _ = sample(made, asked, settings, console=console)
    frames, _, _, _ = read_video(video)
    options = settings.backbone
    assert isinstance(options, VideoDiTOptions)
    encode = load_text_encoder(options, text_length=6, device="cpu", dtype=torch.float32)
    text = encode(asked.prompts)[None]
    assert text.shape == (1, 2, 6, 32)
    latents = denoise(
        made,
        text,
        torch.zeros_like(text),
        shape=(1, 25, 16, 4, 6),
        schedule=make_scheduler(str(folder)),
        steps=2,
        guidance_scale=6.0,
        seed=7,
    )
    vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae").eval()
    with torch.no_grad():
        expected = vae.decode((latents / vae.config.scaling_factor).transpose(1, 2)).sample[0].transpose(0, 1)
    write_video(tmp_path / "expected.mp4", to_pixels(expected))  # loses what H.264 loses
    assert np.array_equal(frames, read_video(tmp_path / "expected.mp4")[0])
    assert frames.std() > 10
    assert "stand" not in console.export_text(), "nothing stands in for anything here"


@pytest.mark.parametrize("frames", [1, 2, 3, 13, 14])
def test_decoding_by_pieces_is_decoding_the_whole(frames: int) -> None:
    torch.manual_seed(frames)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=16
    ).eval()
    latents = torch.randn(1, frames, 16, 4, 6)
    with torch.no_grad():
        whole = vae.decode((latents / vae.config.scaling_factor).transpose(1, 2)).sample[0].transpose(0, 1)
    pieces = list(decode_pieces(vae, latents))
    assert torch.equal(torch.cat(pieces), whole)
    assert max(len(piece) for piece in pieces) <= 12
    assert whole.std() > 0.01


@pytest.mark.parametrize(("part", "what"), [("vae", "vae/"), ("text_encoder", "text_encoder/"), ("tokenizer", "tok")])
def test_a_missing_part_is_missed_before_the_first_step(folder: Path, tmp_path: Path, part: str, what: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "tiny")
    settings = pretrained_config(copy)
    made = ttt_backbone().build(settings.backbone, device="cpu", dtype=torch.float32)
    shutil.rmtree(copy / part)
    console = quiet()
    asked = request(tmp_path / "clip.mp4", seconds=3.0, prompts=("towers at night",))
    with pytest.raises(EnvironmentProblem, match=f"holds no {what}"):
        ttt_backbone().check_sample(settings, asked)
    with pytest.raises(EnvironmentProblem, match=f"holds no {what}"):
        sample(made, asked, settings, console=console)
    assert console.export_text() == ""


def test_predictions_that_are_no_numbers_leave_no_video(tmp_path: Path) -> None:
    made = build(OPTIONS, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        made.proj_out.weight[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match="not finite"):
        sample(made, request(tmp_path / "clip.mp4"), config(), console=quiet())
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told(model: nn.Module, tmp_path: Path) -> None:
    asked = request(tmp_path / "clip.mp4", seconds=3.0, prompts=("towers at night",), steps=12)
    console = quiet()
    sample(model, asked, config(), console=console)
    lines = console.export_text().splitlines()
    assert lines[1].startswith("sample: step 1/12, ")
    assert lines[-2] == "sample: step 12/12, 0 s left"
    assert lines[-1].startswith("Latents come from the demo's own small linear codec")
    assert 12 <= len(lines) <= 13
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    sample(model, replace(asked, steps=3), config(), console=terminal)
    assert "3/3" in terminal.file.getvalue()  # type: ignore[attr-defined]


# --- many videos ---


def test_many_videos_are_each_what_they_are_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VAE and T5 are loaded once, T5 is gone before the first step; with no room for texts, T5 comes again."""
    settings = pretrained_config(folder)
    made = ttt_backbone().build(settings.backbone, device="cpu", dtype=torch.float32)
    encoders: list[weakref.ref[Any]] = []
    decoders: list[Any] = []  # loaded, and not used: decoding takes the time of everything else together
    alive = []

    def load_text(*args: Any, **settings: Any) -> Any:
        encoder = load_text_encoder(*args, **settings)
        encoders.append(weakref.ref(encoder))
        return encoder

    def load_vae(*args: Any, **settings: Any) -> Any:
        decoders.append(load_decoder(*args, **settings))
        return lambda latents: to_pixels(latents[0, :, :3].repeat_interleave(8, -1).repeat_interleave(8, -2))

    def solve(*args: Any, **settings: Any) -> Tensor:
        gc.collect()
        alive.append(sum(encoder() is not None for encoder in encoders))
        return denoise(*args, **settings)

    for name, stand_in in {"load_text_encoder": load_text, "load_decoder": load_vae, "denoise": solve}.items():
        monkeypatch.setattr(f"ttt_videodit.sampling.{name}", stand_in)
    texts = ("towers at night", "cars drive")
    asked = [
        request(
            tmp_path / f"{number}.mp4", seconds=3.0, prompts=(text,), steps=1, seed=number, negative_prompts=("fog",)
        )
        for number, text in enumerate(texts)
    ]
    contents = []
    for most, loaded in ((1 << 30, 1), (0, 2)):
        monkeypatch.setattr("ttt_videodit.sampling._MOST_TEXT_BYTES", most)
        encoders.clear()
        decoders.clear()
        make = prepare_samples(made, asked, settings, console=quiet())
        contents.append([make(each)[0].read_bytes() for each in asked])
        assert (len(encoders), len(decoders)) == (loaded, 1)
    alone = sample(made, asked[1], settings, console=quiet())[0].read_bytes()
    assert contents[0] == contents[1] != [alone, alone]
    assert contents[0][1] == alone
    assert not any(alive)


def test_three_videos_killed_in_the_second_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kill -9` and the same command again: every file is that of the command left alone, and nothing else is there."""
    monkeypatch.chdir(tmp_path)
    threads = CONFIG + "train: {device: cpu, cpu_threads: 1}\n"
    Path("c.yaml").write_text(threads)
    videos = [["towers at night"], [{"text": "cars drive", "neg_text": "fog"}], ["clouds"]]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, videos)))
    words = ["sample", "c.yaml", "--prompts", "p.jsonl", "--seconds", "3", "--steps", "1", "--seed", "5"]
    assert main([*words, "--out", "whole"]) == 0
    names = [f"{number}{end}" for number in ("000", "001", "002") for end in (".json", ".mp4", ".png")]
    assert sorted(os.listdir("whole")) == names

    with forking.start(main, [*words, "--out", "killed"]) as process:
        assert any(line.startswith("sample 2 of 3: killed/001.mp4, seed 6") for line in process.stdout)
    left = sorted(os.listdir("killed"))
    assert [name for name in left if not name.startswith(".writing-")] == names[:3]
    times = {name: os.stat(f"killed/{name}").st_mtime_ns for name in names[:3]}
    assert main([*words, "--out", "killed"]) == 0
    assert sorted(os.listdir("killed")) == names
    assert {name: os.stat(f"killed/{name}").st_mtime_ns for name in names[:3]} == times
    for name in names:
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes(), name


def test_texts_that_are_cut_off_are_told_before_the_first_step(model: nn.Module, tmp_path: Path) -> None:
    console = quiet()
    short, long = "towers at night", " ".join(["word"] * 9)
    changes = {"seconds": 6.0, "steps": 1}
    asked = [
        request(tmp_path / "a.mp4", prompts=(short, long), negative_prompts=("", f"{long} more"), **changes),
        request(tmp_path / "b.mp4", prompts=(long, short), **changes),
    ]
    by_the_schedule = "samples by the schedule diffusers (backbone.sampling_schedule is null)"
    make = prepare_samples(model, asked, config(), console=console)
    assert console.export_text().splitlines() == [
        "prompt 2 of a.mp4 has 9 tokens; the first 8 are read",
        "negative prompt 2 of a.mp4 has 10 tokens; the first 8 are read",
        f"{by_the_schedule}, guided away from the negative prompts or, without any, zeros in place of text",
    ]
    del make
    prepare_samples(model, [replace(asked[0], guidance_scale=1.0)], config(), console=console)
    assert console.export_text().splitlines() == [
        "prompt 2 has 9 tokens; the first 8 are read",
        f"{by_the_schedule}, without guidance",
    ]


def test_scenes_are_marked_as_ttt_video_marks_them(folder: Path, tmp_path: Path) -> None:
    """Its tokens are added to T5's tokenizer, and take rows of T5's embedding that no token has: here 28, as T5's."""
    from transformers import AutoTokenizer, T5EncoderModel

    copy = shutil.copytree(folder, tmp_path / "tiny")
    t5 = T5EncoderModel.from_pretrained(copy / "text_encoder")
    torch.manual_seed(5)
    t5.resize_token_embeddings(t5.config.vocab_size + 28)
    t5.save_pretrained(copy / "text_encoder")
    scenes = ("towers at night", "cars drive", "clouds", "towers")
    marked = ("towers at night", "cars drive<end_scene>", "<start_scene>clouds<end_scene>", "<start_scene>towers")
    begins = (True, False, True, True)
    assert with_scene_tokens(scenes, begins) == marked
    assert with_scene_tokens(scenes, ()) == scenes

    tokenizer = AutoTokenizer.from_pretrained(copy / "tokenizer")
    before = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_scene>", "<start_scene>"]})
    t5.resize_token_embeddings(len(tokenizer))  # to fewer rows: nothing is drawn at random
    read = tokenizer(list(marked), padding="max_length", max_length=12, truncation=True, return_tensors="pt").input_ids
    assert [(read == before + number).sum().item() for number in (0, 1)] == [2, 2]
    with torch.no_grad():
        expected = torch.cat([t5.eval()(row[None])[0] for row in read])
    options = pretrained_config(copy).backbone
    assert isinstance(options, VideoDiTOptions)
    encode = load_text_encoder(options, text_length=12, device="cpu", dtype=torch.float32)
    assert encode.knows_scenes
    assert torch.equal(encode(marked), expected)
    plain = load_text_encoder(options_of(folder), text_length=12, device="cpu", dtype=torch.float32)
    assert torch.equal(encode(scenes), plain(scenes)), "texts without them are read as before"
    assert not plain.knows_scenes, "an embedding without rows to spare"


def test_a_text_encoder_without_scenes_is_told_and_reads_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def recorded(model: nn.Module, text: Tensor, *args: Any, **settings: Any) -> Tensor:
        seen.append(text)
        return denoise(model, text, *args, **settings)

    monkeypatch.setattr("ttt_videodit.sampling.denoise", recorded)
    settings = pretrained_config(folder)
    made = ttt_backbone().build(settings.backbone, device="cpu", dtype=torch.float32)
    asked = request(tmp_path / "clip.mp4", seconds=6.0, prompts=("towers", "cars"), steps=1, new_scenes=(False, True))
    console = quiet()
    sample(made, asked, settings, console=console)
    line = "requires_scene_transition: this text encoder has no embeddings for <start_scene> and <end_scene>; "
    assert console.export_text().splitlines()[0] == f"{line}transitions are left to the texts"
    encode = load_text_encoder(options_of(folder), text_length=6, device="cpu", dtype=torch.float32)
    assert torch.equal(seen[0], encode(asked.prompts)[None])


def options_of(folder: Path) -> VideoDiTOptions:
    options = pretrained_config(folder).backbone
    assert isinstance(options, VideoDiTOptions)
    return options


# --- what is asked ---


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        (10, r"--seconds 10: .* segments of 3 s; write 9 or 12"),
        (1.5, r"--seconds 1.5: .*; write 3$"),
        (0, r"--seconds 0: .*; write 3$"),
        (-3, r"--seconds -3: .*; write 3$"),
        (math.nan, r"--seconds nan: .*; write 3$"),
        (math.inf, r"--seconds inf: .*; write 3$"),
    ],
)
def test_seconds_are_whole_segments(seconds: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_sample(seconds=seconds, out=Path("clip.mp4"))


def test_a_plan_says_how_many_prompts_and_which_files() -> None:
    plan = plan_sample(seconds=63, out=Path("a/clip.mp4"))
    assert plan.prompts == 21
    assert plan.files == (Path("a/clip.mp4"), Path("a/clip.png"))
    with pytest.raises(UsageError, match=r"--out a/clip\.gif: .* write a/clip\.mp4"):
        plan_sample(seconds=3, out=Path("a/clip.gif"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ("a", "b")}, r"9 s are 3 segments of 3 s, each with a prompt of its own, but 2 were given"),
        ({"seconds": 3.0}, r"3 s are 1 segment of 3 s, .* but 3 were given"),
        ({"prompts": ("a", " \n", "c")}, r"the prompt of segment 2 of 3 is empty"),
        ({"negative_prompts": ("blur",)}, r"but 1 negative prompts were given; give one for each, or none"),
        ({"new_scenes": (False,)}, r"but new_scenes has 1 entries; give one for each, or none"),
        ({"steps": 0}, r"--steps 0: write from 1 to 1000"),
        ({"steps": 1001}, r"--steps 1001: write from 1 to 1000"),
        ({"guidance_scale": 0.5}, r"--guidance-scale 0\.5: write 1 for none"),
        ({"guidance_scale": math.nan}, r"--guidance-scale nan: write 1 for none"),
    ],
)
def test_a_request_that_cannot_be_honoured(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_request(request(Path("clip.mp4"), **changes), OPTIONS)


# --- files ---


def picture(frames: int, height: int = 64, width: int = 96) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A square that wanders over a gradient."""
    video = np.zeros((frames, height, width, 3), dtype=np.uint8)
    video[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
    video[..., 1] = np.linspace(255, 0, height, dtype=np.uint8)[:, None]
    for index in range(frames):
        left = index * (width - 16) // max(1, frames - 1)
        video[index, 20:36, left : left + 16] = (250, 250, 20)
    return video


def read_video(path: Path) -> tuple[np.ndarray[Any, Any], float, dict[str, str], str]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert stream.codec_context.pix_fmt == "yuv420p"
        return frames, float(stream.average_rate), dict(container.metadata), stream.codec_context.name


def test_a_video_is_read_back_as_it_was(tmp_path: Path) -> None:
    video = picture(49)
    write_video(tmp_path / "new" / "clip.mp4", video, comment='{"seed": 1}')
    frames, rate, metadata, codec = read_video(tmp_path / "new" / "clip.mp4")
    assert (frames.shape, rate, codec) == (video.shape, 16.0, "h264")
    assert np.abs(frames.astype(int) - video).mean() < 4
    assert metadata["comment"] == '{"seed": 1}'
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["clip.mp4"]


def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(EnvironmentProblem, match=r"file/clip\.mp4: cannot be written"):
        write_video(tmp_path / "file" / "clip.mp4", picture(5))
    kept = tmp_path / "clip.mp4"
    write_video(kept, picture(5))
    before = kept.read_bytes()
    with pytest.raises(EnvironmentProblem, match=r"clip\.mp4: cannot be written"):
        write_video(kept, picture(5)[:, :63])  # 4:2:0 has no odd heights
    assert kept.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["clip.mp4", "file"]


def test_a_contact_sheet_shows_the_frames_of_each_segment(tmp_path: Path) -> None:
    """Each segment in a colour of its own; the sheet has them in order, at the segments' places."""
    colours = [(200, 30, 30), (30, 160, 30), (30, 30, 220)]
    video = np.zeros((145, 32, 32, 3), dtype=np.uint8)
    for index in range(145):
        video[index] = colours[min(index // 48, 2)]
    write_contact_sheet(tmp_path / "clip.png", video, ["red $1 & <b>", "green " * 80, "blue"], title="clip.mp4")
    sheet = (matplotlib.image.imread(tmp_path / "clip.png")[..., :3] * 255).round().astype(int)
    rows = [np.flatnonzero((np.abs(sheet - colour).sum(-1) < 6).sum(1) > 100) for colour in colours]
    assert all(len(row) > 20 for row in rows)
    assert rows[0].max() < rows[1].min() < rows[1].max() < rows[2].min()


def test_pixels_are_rounded_and_clipped() -> None:
    values = torch.tensor([-1.5, -1.0, -0.001, 0.0, 1.0, 7.0]).repeat(3, 1).view(1, 3, 1, 6)
    assert to_pixels(values)[0, 0, :, 1].tolist() == [0, 0, 127, 128, 255, 255]
