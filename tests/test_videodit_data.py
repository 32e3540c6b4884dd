"""Windows of latents and texts, the index that names them, and what `ttt check` finds in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ttt.check import check_config, load_config
from ttt.check.explain import catalogue, explain
from ttt.checksums import parse_line
from ttt.config import Explanation, Finding
from ttt.errors import ConfigError, EnvironmentProblem, UsageError
from ttt.files import read_header, write_tensors
from ttt.plugins import get_backbone
from ttt.train.setup import order
from ttt_videodit.clip import CROPS, Split, demo_frames
from ttt_videodit.codec import DemoCodec
from ttt_videodit.data import LatentWindows, latent_windows
from ttt_videodit.index import LineError, line_of, parse_encoded, parse_listed
from ttt_videodit.options import VideoDiTData, VideoDiTOptions
from ttt_videodit.text import DemoTextEncoder
from ttt_videodit.wanted import Wanted

VIDEODIT = get_backbone("videodit")
EXPLANATIONS: dict[str, Explanation] = dict(VIDEODIT.explanations())


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Folder:
    """An index of the demo's size, and the tensors that it names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self.lines: list[dict[str, Any]] = []
        self.index = path / "train.jsonl"

    def add(self, name: str, segments: int, *, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        seed, frames = 100 * len(self.lines), 12 * segments + 1
        self.tensors[name] = {
            "mean": random(frames, 16, 8, 8, seed=seed).to(dtype),
            "std": random(frames, 16, 8, 8, seed=seed + 1).abs().to(dtype),
            "start_mean": random(segments, 16, 8, 8, seed=seed + 2).to(dtype),
            "start_std": random(segments, 16, 8, 8, seed=seed + 3).abs().to(dtype),
        }
        texts = []
        for number in range(segments):
            self.tensors[f"{name}-{number}"] = {"text": random(8, 32, seed=seed + 4 + number).to(dtype)}
            texts.append({"caption": f"{name} {number}", "text": f"{name}-{number}.safetensors"})
        line = {
            "video": f"videos/{name}.mp4",
            "start_sec": 0.0,
            "latents": f"{name}.safetensors",
            "frames": frames,
            "height": 64,
            "width": 64,
            "text_length": 8,
            "segments": texts,
        }
        self.lines.append(line)
        return line

    def write(self) -> Path:
        for name, tensors in self.tensors.items():
            save_file(tensors, self.path / f"{name}.safetensors")
        self.index.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        return self.index

    def windows(self, duration_sec: int = 3, split: str = "train") -> LatentWindows:
        data = VideoDiTData(train_data=str(self.index), duration_sec=duration_sec)
        return latent_windows(VideoDiTOptions(), data, split=split, device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# --- windows ---


def test_latents_that_changed_are_told_when_they_are_first_read_unless_the_config_says_not_to_look(
    folder: Folder,
) -> None:
    folder.add("a", 2)
    folder.write()
    for name in ("a", "a-1"):
        write_tensors(folder.path / f"{name}.safetensors", folder.tensors[name], {})
    windows, unlooked = folder.windows(), VideoDiTData(train_data=str(folder.index), verify=False)
    file = folder.path / "a-1.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    assert windows[0]["text"].shape == (1, 8, 32)
    with pytest.raises(EnvironmentProblem, match=r"train\.jsonl:1: .*a-1\.safetensors: damaged.*run ttt precompute"):
        windows[1]
    changed = latent_windows(VideoDiTOptions(), unlooked, split="train", device="cpu")[1]["text"]
    assert not torch.equal(changed[0], folder.tensors["a-1"]["text"])


def test_several_indexes_with_weights_are_read_by_their_shares(tmp_path: Path) -> None:
    folders = []
    for name, videos in (("city", (2, 1)), ("sea", (3,))):
        (tmp_path / name).mkdir()
        folders.append(Folder(tmp_path / name))
        for number, segments in enumerate(videos):
            folders[-1].add(f"{name}{number}", segments)
        folders[-1].write()
    city, sea = folders
    named = [{"path": str(city.index), "weight": 1}, {"path": str(sea.index), "weight": 3}]
    loaded = reading(train_data=named)
    windows = latent_windows(loaded.backbone, loaded.data, split="train", device="cpu")
    assert [(source.name, source.files, source.weight) for source in windows.sources] == [
        (str(city.index), range(2), 1.0),
        (str(sea.index), range(2, 3), 3.0),
    ]
    assert [windows.describe(number) for number in range(len(windows))] == [
        each.describe(number) for each in (city.windows(), sea.windows()) for number in range(len(each))
    ]
    assert torch.equal(windows[4]["mean"], sea.windows()[1]["mean"])
    turns = order(loaded, windows)
    read = [window for number in range(40) for window in turns.at(number).windows]
    assert sum(window >= 3 for window in read) == 30
    (sea.path / "sea0.safetensors").unlink()
    with pytest.raises(EnvironmentProblem, match=r"^data\.train_data\.1\.path: .*sea/train\.jsonl:1: no file"):
        latent_windows(loaded.backbone, loaded.data, split="train", device="cpu")
    text = json.dumps({"backbone": {"name": "videodit"}, "data": {"train_data": named}})
    found = check_config("config.yaml", text=text).findings
    assert "data.train_data.1.path" in {finding.path for finding in found}


def reading(**data: Any) -> Any:
    text = {"backbone": {"name": "videodit"}, "data": data, "train": {"device": "cpu"}}
    return load_config("config.yaml", text=json.dumps(text)).config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train_data": [{"path": "a.jsonl"}, {"path": "a.jsonl"}]}, "names 'a.jsonl' twice"),
        ({"eval_data": [{"path": "a.jsonl", "weight": 2}]}, "an evaluation reads each window once"),
        ({"train_data": "a.jsonl:2,b.jsonl"}, "write a list, [{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 1}]"),
    ],
)
def test_sources_that_do_not_fit_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reading(**data)
    assert message in str(caught.value)


def test_another_file_under_the_name_of_the_one_that_was_listed_is_told(folder: Folder) -> None:
    line = folder.add("a", 1)
    folder.write()
    write_tensors(folder.path / "a.safetensors", folder.tensors["a"], {})
    line["latents_sha256"] = read_header(folder.path / "a.safetensors").checksum
    folder.index.write_text(json.dumps(line) + "\n")
    assert len(folder.windows()) == 1
    write_tensors(folder.path / "a.safetensors", {**folder.tensors["a"], "mean": folder.tensors["a"]["mean"] + 1}, {})
    with pytest.raises(EnvironmentProblem, match=r"a\.safetensors: damaged, or not the file that was listed"):
        folder.windows()


def test_windows_are_the_videos_segments_in_order(folder: Folder) -> None:
    folder.add("a", 3)
    folder.add("b", 2, dtype=torch.float16)
    folder.write()
    windows = folder.windows()
    assert (len(windows), list(windows.files)) == (5, [range(3), range(3, 5)])
    assert windows.notice is None
    for index, (name, segment) in enumerate([("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]):
        sample, whole = windows[index], folder.tensors[name]
        assert {key: value.dtype for key, value in sample.items()} == dict.fromkeys(
            ("mean", "std", "text"), torch.float32
        )
        for key in ("mean", "std"):
            assert sample[key].shape == (13, 16, 8, 8)
            first = whole[f"start_{key}"][segment] if segment else whole[key][0]
            assert torch.equal(sample[key][0], first.float())
            assert torch.equal(sample[key][1:], whole[key][12 * segment + 1 : 12 * segment + 13].float())
        assert torch.equal(sample["text"], folder.tensors[f"{name}-{segment}"]["text"].float()[None])
        assert windows.captions(index) == (f"{name} {segment}",)
        assert windows.describe(index) == f"{name}.mp4, {3 * segment}-{3 * segment + 3} s"
    batch = windows.collate([windows[1], windows[4]])
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "mean": (2, 13, 16, 8, 8),
        "std": (2, 13, 16, 8, 8),
        "text": (2, 1, 8, 32),
    }
    assert torch.equal(batch["mean"][1], windows[4]["mean"])
    for index in (5, -1):
        with pytest.raises(IndexError):
            windows[index]


def test_longer_windows_take_whole_runs_of_segments_and_say_what_they_leave(folder: Folder) -> None:
    folder.add("a", 5)
    folder.add("b", 1)
    folder.add("c", 2)["start_sec"] = 4.5
    folder.write()
    windows = folder.windows(6)
    assert [windows.describe(index) for index in range(len(windows))] == [
        "a.mp4, 0-6 s",
        "a.mp4, 6-12 s",
        "c.mp4, 4.5-10.5 s",
    ]
    whole = folder.tensors["a"]
    assert torch.equal(windows[1]["mean"], torch.cat([whole["start_mean"][2:3], whole["mean"][25:49]]))
    assert torch.equal(windows[1]["text"][1], folder.tensors["a-3"]["text"])
    assert windows.notice == (
        f"{folder.index}: 1 of 3 videos are shorter than a window of 6 s and are not read; 1 of 7 segments, at the "
        "ends of videos, fill no window of 6 s and are not read"
    )


def test_a_folder_of_indexes_is_read_whole(folder: Folder, tmp_path: Path) -> None:
    folder.add("a", 1)
    folder.write()
    (tmp_path / "more").mkdir()
    other = Folder(tmp_path / "more")
    other.add("b", 1)
    other.write()
    data = VideoDiTData(train_data=str(tmp_path))
    windows = latent_windows(VideoDiTOptions(), data, split="train", device="cpu")
    assert sorted(windows.describe(index) for index in range(len(windows))) == ["a.mp4, 0-3 s", "b.mp4, 0-3 s"]


def test_held_out_data_are_read_for_eval_and_else_the_training_data(folder: Folder, tmp_path: Path) -> None:
    folder.add("a", 1)
    folder.write()
    (tmp_path / "other").mkdir()
    held_out = Folder(tmp_path / "other")
    held_out.add("b", 1)
    held_out.write()
    both = VideoDiTData(train_data=str(folder.index), eval_data=str(held_out.index))
    windows = latent_windows(VideoDiTOptions(), both, split="eval", device="cpu")
    assert windows.describe(0) == "b.mp4, 0-3 s"
    assert folder.windows(split="eval").describe(0) == "a.mp4, 0-3 s"


def test_only_the_rows_of_a_window_are_read(folder: Folder) -> None:
    """Lazily: damage in another window's rows is that window's."""
    folder.add("a", 3)
    folder.tensors["a"]["mean"][30, 2, 3, 4] = float("nan")
    folder.write()
    windows = folder.windows()
    assert windows[0]["mean"].isfinite().all()
    with pytest.raises(EnvironmentProblem) as error:
        windows[2]
    assert str(error.value) == (
        f"data.train_data: {folder.index}:1: {folder.path / 'a.safetensors'}: mean is not finite in latent frame 30 "
        "(from 0); delete it and run ttt precompute again"
    )


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("a", "std", float("inf"), "std is not finite in latent frame 5"),
        ("a", "std", -1.0, "std is negative in latent frame 5"),
        ("a-0", "text", float("nan"), "text is not finite in token 5"),
    ],
)
def test_numbers_that_cannot_be_are_told_at_their_place(
    folder: Folder, name: str, key: str, value: float, message: str
) -> None:
    folder.add("a", 1)
    folder.tensors[name][key].view(folder.tensors[name][key].shape[0], -1)[5, 3] = value
    folder.write()
    with pytest.raises(EnvironmentProblem, match=rf"train.jsonl:1: .*{name}.safetensors: {message}"):
        folder.windows()[0]


def test_a_file_that_is_lost_during_the_run_is_a_sentence(folder: Folder) -> None:
    folder.add("a", 1)
    folder.write()
    windows = folder.windows()
    (folder.path / "a.safetensors").unlink()
    with pytest.raises(EnvironmentProblem, match=r"train.jsonl:1: .*a.safetensors: no such file; run ttt pre"):
        windows[0]


# --- the demo's ---


@pytest.mark.parametrize(("split", "windows_of_3_s"), [("train", 3), ("eval", 1)])
def test_the_demos_windows_are_its_clip_through_its_codec(split: Split, windows_of_3_s: int) -> None:
    options, codec = VideoDiTOptions(), DemoCodec.load()
    nine = latent_windows(options, VideoDiTData(duration_sec=9), split=split, device="cpu")
    three = latent_windows(options, VideoDiTData(duration_sec=3), split=split, device="cpu")
    assert [len(file) for file in nine.files] == [1] * len(CROPS[split])
    assert [len(file) for file in three.files] == [windows_of_3_s] * len(CROPS[split])
    assert nine.notice == DemoCodec.stand_in
    for number, left in enumerate(CROPS[split]):
        frames = demo_frames(split, left)[None]
        torch.testing.assert_close(nine[number]["mean"], codec.encode(frames)[0], atol=1e-5, rtol=1e-5)
        assert not nine[number]["std"].any()
        assert nine.describe(number) == f"city.mp4 from column {left}, 0-9 s"
        for index in range(windows_of_3_s):
            window = number * windows_of_3_s + index
            alone = codec.encode(frames[:, 48 * index : 48 * index + 49])[0]
            torch.testing.assert_close(three[window]["mean"], alone, atol=1e-5, rtol=1e-5)
            assert torch.equal(three[window]["text"], DemoTextEncoder(text_length=8)(three.captions(window)))
            assert three.captions(window)[0] == nine.captions(number)[index]


@pytest.mark.parametrize(("attn_length", "prefix", "count", "frames"), [(2, 1, 18, 3), (5, 1, 7, 6), (12, 0, 3, 12)])
def test_the_demo_is_cut_as_the_options_say(attn_length: int, prefix: int, count: int, frames: int) -> None:
    options = VideoDiTOptions(attn_length=attn_length, prefix_temporal_length=prefix)
    windows = latent_windows(options, VideoDiTData(), split="train", device="cpu")
    assert [len(file) for file in windows.files] == [count] * 5
    codec, video = DemoCodec.load(), demo_frames("train")[None]
    for index in (0, 1, count - 1):
        start = 4 * attn_length * index
        alone = codec.encode(video[:, start : start + 1 + 4 * (frames - 1)])[0]
        torch.testing.assert_close(windows[index]["mean"], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"preset": "5b"}, {}, r"data.train_data: the preset 5b has no data of its own; name the index"),
        ({}, {"duration_sec": 12}, r"data.duration_sec: the demo's clip has 3 segments, .* write 9 or less, or name"),
        ({}, {"width": 128}, r"data.width: the demo's clip is 64 × 64 pixels, not 128 wide and 64 high; leave"),
        ({"attn_length": 40}, {}, r"data.duration_sec: the demo's clip has 0 segments, .* asked for; name data.train"),
    ],
)
def test_data_that_a_preset_has_not(options: dict[str, Any], data: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        latent_windows(VideoDiTOptions(**options), VideoDiTData(**data), split="train", device="cpu")


def test_random_weights_have_random_data_of_the_real_size() -> None:
    options = VideoDiTOptions(preset="5b", random_weights=True)
    windows = latent_windows(options, VideoDiTData(duration_sec=6), split="train", device="cpu")
    (sample,) = (windows[index] for index in range(len(windows)))
    assert {key: tuple(value.shape) for key, value in sample.items()} == {
        "mean": (25, 16, 60, 90),
        "std": (25, 16, 60, 90),
        "text": (2, 226, 4096),
    }
    assert sample["mean"].std() == pytest.approx(1, abs=0.01)
    held_out = latent_windows(options, VideoDiTData(duration_sec=6), split="eval", device="cpu")
    assert not torch.equal(held_out[0]["mean"], sample["mean"])
    assert windows.notice is not None
    assert "losses mean nothing" in windows.notice


# --- what can be wrong with an index ---


def broken(folder: Folder, what: str) -> None:
    """Two good videos and, on line 3, one that is not."""
    folder.add("a", 1)
    folder.add("b", 1)
    line = folder.add("c", 3)
    if what == "shape":
        folder.tensors["c"]["std"] = folder.tensors["c"]["std"][:, :, :7].contiguous()
    elif what == "starts":
        folder.tensors["c"]["start_mean"] = folder.tensors["c"]["start_mean"][:2]
    elif what == "text":
        folder.tensors["c-1"]["text"] = torch.zeros(9, 32)
    elif what == "text width":
        folder.tensors["c-1"]["text"] = torch.zeros(8, 48)
    elif what == "tensor":
        del folder.tensors["c"]["mean"]
    elif what == "integers":
        folder.tensors["c"]["mean"] = folder.tensors["c"]["mean"].int()
    elif what == "segment":
        del line["segments"][2]
    elif what == "caption":
        line["segments"][1] = {"text": "c-1.safetensors"}
    elif what == "size":
        line["height"] = 480
    elif what == "length":
        line["text_length"] = 226
    elif what == "frames":
        line["frames"] = 36
    elif what == "no frames":
        line["frames"] = "37"
    elif what == "no latents":
        del line["latents"]
    folder.write()
    if what == "missing":
        (folder.path / "c.safetensors").unlink()
    elif what == "missing text":
        (folder.path / "c-2.safetensors").unlink()
    elif what == "cut":
        file = folder.path / "c.safetensors"
        file.write_bytes(file.read_bytes()[:3000])
    elif what == "json":
        folder.index.write_text(folder.index.read_text()[:-20] + "\n")
    elif what == "list":
        folder.index.write_text("\n".join([*folder.index.read_text().splitlines()[:2], "[1, 2]", ""]))


BROKEN = {
    "shape": ("VDT504", r"c.safetensors: std is \[37, 16, 7, 8\], not \[37, 16, 8, 8\]"),
    "starts": ("VDT504", r"start_mean is \[2, 16, 8, 8\], not \[3, 16, 8, 8\]"),
    "text": ("VDT504", r"c-1.safetensors: text is \[9, 32\], not \[8, 32\]"),
    "text width": ("VDT504", r"text is \[8, 48\], not \[8, 32\]"),
    "tensor": ("VDT503", r"c.safetensors: no mean of floating point: it holds none; run ttt precompute again"),
    "integers": ("VDT503", r"no mean of floating point: it is of I32"),
    "segment": ("VDT505", r"37 latent frames are 3 segments, but 2 have texts"),
    "caption": ("VDT505", r'segment 2 of 3 is not \{"caption": "…", "text": "….safetensors"\}'),
    "size": (
        "VDT504",
        r"was encoded with height 480, but the config asks for 64; encode it anew, or write data.height",
    ),
    "length": ("VDT504", r"was encoded with text_length 226, but the config asks for 8"),
    "frames": (
        "VDT504",
        r"36 latent frames are not a whole number of segments: 1, 2 and 3 segments have 13, 25 and 37",
    ),
    "no frames": ("VDT501", r""""frames" is '37', not a whole number"""),
    "no latents": ("VDT501", r'"latents" is missing, not a path'),
    "missing": ("VDT502", r"no file .*c.safetensors; run ttt precompute again"),
    "missing text": ("VDT502", r"no file .*c-2.safetensors"),
    "cut": ("VDT503", r"c.safetensors: damaged: its header promises \d+ bytes, the file has 3000"),
    "json": ("VDT501", r"no JSON \(.*\); write the index with ttt precompute"),
    "list": ("VDT501", r"not an object"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_line_is_told_with_its_place_before_the_run_and_by_check(folder: Folder, what: str) -> None:
    broken(folder, what)
    code, message = BROKEN[what]
    with pytest.raises(EnvironmentProblem, match=rf"^data.train_data: .*train.jsonl:3: .*{message}"):
        folder.windows()
    (finding,) = found(folder)
    assert (finding.code, finding.severity.value, finding.value) == (code, "error", 1)
    assert finding.message.startswith("1 of 3 videos cannot be used, ")
    assert "train.jsonl:3 (" in finding.message
    assert finding.message.endswith("; the run stops before its first step")
    with pytest.raises(ConfigError) as error:
        load_config("config.yaml", text=config(folder))
    assert error.value.exit_code == 3, "the data are at fault, not the config"


def config(folder: Folder, **data: Any) -> str:
    section = {"train_data": str(folder.index), "eval_data": None, **data}
    return json.dumps({"backbone": {"name": "videodit"}, "data": section, "train": {"max_steps": 5}})


def found(folder: Folder, **data: Any) -> list[Finding]:
    findings = check_config("config.yaml", text=config(folder, **data)).findings
    return [finding for finding in findings if finding.code.startswith("VDT")]


def test_many_broken_lines_are_counted_and_the_first_named(folder: Folder) -> None:
    for number in range(9):
        folder.add(f"v{number}", 1)["height"] = 32
    folder.write()
    with pytest.raises(EnvironmentProblem) as error:
        folder.windows()
    lines = str(error.value).splitlines()
    assert lines[0] == "data.train_data: 9 videos cannot be used:"
    assert [line.split(":")[1] for line in lines[1:6]] == ["1", "2", "3", "4", "5"]
    assert lines[6] == "  and 4 more"
    (finding,) = found(folder)
    assert finding.message.startswith("9 of 9 videos cannot be used, their size is not the config's: train.jsonl:1 (")
    assert " and 6 more;" in finding.message


def test_videos_shorter_than_a_window(folder: Folder) -> None:
    folder.add("a", 1)
    folder.add("b", 2)
    folder.write()
    with pytest.raises(EnvironmentProblem, match=r"train.jsonl: no videos: all 2 are shorter than a window of 9 s"):
        folder.windows(9)
    (finding,) = found(folder, duration_sec=9)
    assert finding.code == "VDT506"
    (finding,) = found(folder, duration_sec=6)
    assert (finding.code, finding.severity.value) == ("VDT507", "note")
    assert finding.message == ("1 of 2 videos is shorter than a window of 6 s: train.jsonl:1; they are not read")
    assert found(folder) == []


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_index_without_videos(folder: Folder, content: str) -> None:
    folder.index.write_text(content)
    with pytest.raises(EnvironmentProblem, match=r"no videos: it lists none"):
        folder.windows()
    (finding,) = found(folder)
    assert finding.code == "VDT506"


def test_an_index_that_is_not_there_is_the_cores_finding(folder: Folder) -> None:
    with pytest.raises(EnvironmentProblem, match=r"train.jsonl does not exist; `ttt precompute` makes it"):
        folder.windows()
    assert found(folder) == []
    codes = [finding.code for finding in check_config("config.yaml", text=config(folder)).findings]
    assert "TTT501" in codes


def test_a_check_of_a_large_index_is_cut_short_and_says_so(folder: Folder) -> None:
    line = folder.add("a", 1)
    folder.lines = [{**line, "height": 32}] * 500
    folder.write()
    (finding,) = found(folder)
    assert finding.message.startswith("200 of 200 (the first that were read) videos cannot be used, their size")


def test_checking_data_needs_no_torch(folder: Folder) -> None:
    folder.add("a", 1)
    folder.write()
    (folder.path / "config.yaml").write_text(config(folder))
    program = (
        "import sys; from ttt.check import check_config; "
        f"print([f.code for f in check_config({str(folder.path / 'config.yaml')!r}).findings if f.code[:3] == 'VDT']); "
        "print(sorted({'torch', 'numpy', 'av', 'diffusers', 'safetensors'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[]", "[]"]


def test_a_line_says_what_it_was_made_of(folder: Folder) -> None:
    line = folder.add("a", 2)
    entry = parse_encoded(json.dumps(line).encode(), "place", folder.path)
    assert parse_line(line_of(entry, folder.path).encode()) == line


# --- the list of videos ---


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ("[]", "not an object"),
        ('{"captions": ["x"]}', '"path" is missing, not a path'),
        ('{"path": "a.mp4"}', '"captions" is missing, not a list with one for each 3 s'),
        ('{"path": "a.mp4", "captions": []}', r'"captions" is \[\], not a list'),
        ('{"path": "a.mp4", "captions": ["x", " "]}', "caption 2 of 2 is ' '; each 3 s need a text"),
        ('{"path": "a.mp4", "captions": [null]}', "caption 1 of 1 is None"),
        ('{"path": "a.mp4", "captions": ["x"], "start_sec": -1}', '"start_sec" is -1, not seconds from 0 on'),
        ('{"path": "a.mp4", "captions": ["x"], "start_secs": 1}', 'unknown key "start_secs"; the keys are path,'),
        ('{"path": "b.mp4", "captions": ["x"]}', r"no file .*b.mp4; paths are relative to the folder of the .jsonl"),
    ],
)
def test_a_line_of_a_list_that_cannot_be_used(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.mp4").touch()
    with pytest.raises(LineError, match=message):
        parse_listed(line.encode(), "place", tmp_path)


def test_check_reads_the_list_too(folder: Folder) -> None:
    folder.add("a", 1)
    folder.write()
    (folder.path / "a.mp4").touch()
    videos = folder.path / "videos.jsonl"
    videos.write_text('{"path": "a.mp4", "captions": ["x"]}\n\n{"path": "a.mp4", "captions": [""]}\n{}\n')
    (finding,) = found(folder, videos=str(videos))
    assert (finding.code, finding.severity.value, finding.path) == ("VDT509", "warning", "data.videos")
    assert finding.message.startswith("2 of 3 lines cannot be used: videos.jsonl:3 (caption 1 of 1 is ''")
    assert "videos.jsonl:4 (" in finding.message
    (finding,) = found(folder, eval_videos=str(folder.path / "none.jsonl"))
    assert finding.path == "data.eval_videos"
    assert "none.jsonl: cannot be read: No such file" in finding.message


def test_the_text_width_of_a_folder_is_its_transformers(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"text_embed_dim": 48}')

    def width(pretrained: str | None) -> int | None:
        return Wanted.of(VideoDiTOptions(preset="5b", pretrained=pretrained), VideoDiTData()).text_dim

    assert width(str(tmp_path)) == 48
    assert width(None) == 4096
    assert width("somebody/another") is None


# --- the codes ---


def _findings(text: str, options: tuple[str, ...]) -> tuple[Finding, ...]:
    assert not options
    return check_config("config.yaml", text=text).findings


@pytest.mark.parametrize("code", EXPLANATIONS)
def test_a_code_is_proved_by_its_own_configs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    entry = EXPLANATIONS[code]
    for name, text in entry.files.items():
        Path(name).write_bytes(text.encode())
    findings = _findings(entry.bad, entry.options)
    assert [(finding.code, finding.severity.value) for finding in findings] == [(code, entry.severity)]
    assert findings[0].fix
    assert not findings[0].message.endswith(".")
    assert _findings(entry.good, entry.options) == ()
    # `ttt sample` and `ttt precompute` begin all the same: the data are not there yet, or not on this machine
    assert load_config("config.yaml", text=entry.bad, training=False).findings == ()


@pytest.mark.parametrize("code", EXPLANATIONS)
def test_a_code_is_explained(code: str) -> None:
    text, entry = explain(code.lower()), EXPLANATIONS[code]
    assert text.splitlines()[0] == f"{code}  {entry.severity}  {entry.title}"
    unwrapped = " ".join(text.split())
    for part in (entry.what, entry.why, entry.source):
        assert " ".join(part.split()) in unwrapped
    assert f"{code}  {entry.severity:<7}  {entry.title}" in catalogue()


def test_every_code_that_rules_give_is_explained() -> None:
    others = {"VDT506", "VDT507", "VDT508", "VDT509", "VDT601"}
    assert {code for code, _ in BROKEN.values()} | others == set(EXPLANATIONS)
