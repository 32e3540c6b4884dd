"""Every kind of file that a user of TTT-Video holds, through the commands: it works, or a sentence says what to do.

Its configs are in `test_videodit_import.py`, its checkpoints' tensors in `test_videodit_weights.py`.
"""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import forking
import pytest
import torch

import ttt_videodit
from ttt.check import check_config
from ttt.errors import EnvironmentProblem, UsageError
from ttt_cli.main import main
from ttt_videodit.building import build
from ttt_videodit.checkpoint import look_at
from ttt_videodit.model import VideoDiT
from ttt_videodit.options import VideoDiTOptions
from ttt_videodit.variants import wrong_repository, wrong_variant


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- data ---

DATA = {
    "index.jsonl": (
        json.dumps({"vid_emb": "a.pt", "text_chunk_emb": ["0.pt", "1.pt", "2.pt"]}),
        "index.jsonl:1 (a line of TTT-Video's index, whose .pt files lack what windows inside a video begin with; list",
    ),
    "captions.jsonl": (
        json.dumps({"scene_start": [True, False], "scene_end": [False, True], "text_0": "a", "text_1": "b"}),
        "captions.jsonl:1 (a line of TTT-Video's captions, which names no video; list the videos as",
    ),
    "segments.json": (
        json.dumps({"0": {"text": "a", "mp4": "e/video_sample_0001.mp4", "scene_start": True, "scene_end": False}}),
        "segments.json:1 (TTT-Video's table of captions, one for each piece of 3 s; list whole videos as",
    ),
    "a.pt": (
        None,
        "a.pt: cannot be read: it is a pickle by torch.save; write its data as text; TTT-Video's latents and",
    ),
}
"""Its index, what `data/precomp_text.py` reads in either form, and what `data/precomp_video.py` writes."""


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("key", ["train_data", "videos"])
def test_its_data_files_are_told_with_the_way_to_ours(key: str, name: str, here: Path) -> None:
    text, words = DATA[name]
    if text is None:
        torch.save(torch.zeros(13, 32, 4, 6, dtype=torch.bfloat16), name)
    else:
        Path(name).write_text(text + "\n")
    findings = check_config("c.yaml", text=f"backbone: {{name: videodit}}\ndata: {{{key}: {name}}}\n").findings
    told = [finding for finding in findings if finding.code in ("VDT501", "VDT509")]
    assert len(told) == 1
    assert words in told[0].message


def test_its_index_ends_a_run_before_its_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    Path("index.jsonl").write_text(DATA["index.jsonl"][0] + "\n")
    Path("c.yaml").write_text("backbone: {name: videodit}\ndata: {train_data: index.jsonl}\nrun_dir: run\n")
    assert main(["train", "c.yaml"]) in (2, 3)
    assert "a line of TTT-Video's index" in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"\xef\xbb\xbf" + b'{"path": "a.mp4", "captions": ["a"]}', None),
        (b'{"path": "a.mp4", "captions": ["a"], "captions": ["b"]}', "a key stands twice"),
    ],
)
def test_a_list_may_begin_with_a_mark_and_says_nothing_twice(line: bytes, told: str | None) -> None:
    Path("a.mp4").write_bytes(b"video")
    Path("videos.jsonl").write_bytes(line + b"\n")
    found = check_config("c.yaml", text="backbone: {name: videodit}\ndata: {videos: videos.jsonl}\n").findings
    assert [told in finding.message for finding in found if told and finding.code == "VDT509"] == [True] * bool(told)
    assert told or not found


SCRIPT = """\
#!/bin/bash
CONFIG_FILE="./configs/train/ttt-mlp/3s.toml"
torchrun --nproc_per_node=8 train.py \\
\t--job.config_file ${CONFIG_FILE} \\
\t--job.exp_name="a" \\
\t--training.global_batch_size=8
# --checkpoint.init_state_dir=b
"""


def test_a_script_names_what_to_import_and_what_it_changes(capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.sh").write_text(SCRIPT)
    assert main(["import-config", "train.sh"]) == 2
    assert capsys.readouterr().err == (
        "error: train.sh: is a script that starts TTT-Video; import the TOML that its --job.config_file names, with "
        "what it changes written into it: job.exp_name, training.global_batch_size\n"
    )


# --- checkpoints ---


def dcp(folder: Path, *, whole: bool = True, parts: bool = True) -> Path:
    """A distributed checkpoint, or what an interrupted save leaves of it."""
    folder.mkdir(parents=True)
    if parts:
        (folder / "__0_0.distcp").write_bytes(b"tensors")
    if whole:
        (folder / ".metadata").write_bytes(b"where they are")
    return folder


COMMAND = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"


def refused(source: Path) -> str:
    with pytest.raises(UsageError) as caught:
        look_at(source)
    return str(caught.value)


def test_the_folder_of_a_runs_checkpoints_names_its_newest(here: Path) -> None:
    run = here / "my exp" / "3s"
    for step in (500, 1000, 90, 5000):
        dcp(run / "checkpoint" / f"step-{step}")
    newest = f"the newest step-5000; turn it into a file first, and import that: {COMMAND} "
    assert newest + f"'{run}/checkpoint/step-5000' step-5000.pt" in refused(run / "checkpoint")
    assert "holds 4 distributed checkpoints of PyTorch, the newest checkpoint/step-5000; turn" in refused(run)
    for part in ("", ".metadata", "__0_0.distcp"):
        told = refused(run / "checkpoint" / "step-500" / part)
        assert (
            f"step-500: is a distributed checkpoint of PyTorch; turn it into a file first, and import that: {COMMAND}"
            in told
        )


def test_a_checkpoint_whose_saving_was_cut_short_is_passed_over(here: Path) -> None:
    dcp(here / "3s" / "checkpoint" / "step-9")
    cut = dcp(here / "3s" / "checkpoint" / "step-10", whole=False)
    assert "the distributed checkpoint checkpoint/step-9 (step-10 was cut short: it has no .metadata)" in refused(
        here / "3s"
    )
    assert refused(cut) == (
        f"{cut}: is a distributed checkpoint whose saving was cut short: it has no .metadata; name another, such as "
        f"{here}/3s/checkpoint/step-9"
    )
    dcp(here / "9s" / "checkpoint" / "step-1", whole=False, parts=False)
    assert "holds no whole checkpoint (step-1 was cut short" in refused(here / "9s")


def test_a_folder_of_several_runs_asks_for_one(here: Path) -> None:
    for run, step in (("3s", 5000), ("9s", 100), ("9s", 20)):
        dcp(here / "exp" / run / "checkpoint" / f"step-{step}")
    assert refused(here / "exp") == (
        f"{here}/exp: holds the checkpoints of 2 runs; name one of them: {here}/exp/3s/checkpoint/step-5000, "
        f"{here}/exp/9s/checkpoint/step-100 are their newest"
    )


def test_an_empty_folder_says_what_a_checkpoint_is(here: Path) -> None:
    (here / "empty").mkdir()
    assert "holds no .safetensors and no .pt file; name the checkpoint's file, or its folder step-N" in refused(
        here / "empty"
    )


def test_looking_at_checkpoints_imports_no_torch_and_says_so_at_once(here: Path) -> None:
    """The first line is there before what takes seconds to import."""
    dcp(here / "step-1")
    program = """
import sys
from ttt_cli.main import main
code = main(["import-weights", "--backbone", "videodit", "step-1", "--out", "out"])
print(code, "torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.splitlines() == ["reading step-1", "2 False"]


# --- CogVideoX's releases ---

_5B: dict[str, Any] = {
    "_class_name": "CogVideoXTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": None,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": False,
}
_1_5 = {"patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300}
RELEASES: dict[str, tuple[Mapping[str, Any], str]] = {
    "CogVideoX-2b": ({"use_rotary_positional_embeddings": False}, "CogVideoX 2b"),
    "CogVideoX-5b-I2V": ({"in_channels": 32, "use_learned_positional_embeddings": True}, "images to video"),
    "CogVideoX1.5-5B": (_1_5, "CogVideoX 1.5"),
    "CogVideoX1.5-5B-I2V": ({**_1_5, "in_channels": 32, "ofs_embed_dim": 512}, "CogVideoX 1.5"),
    "CogVideoX-Fun-V1.1-5b-InP": ({"in_channels": 33}, "CogVideoX-Fun"),
    "CogVideoX-Fun-V1.1-2b-InP": ({"in_channels": 33, "use_rotary_positional_embeddings": False}, "CogVideoX-Fun"),
}
"""What the configs of its releases say where that is not what 5b's says, and what they are called."""
OTHERS: dict[str, tuple[Mapping[str, Any], str]] = {
    "another class": (
        {"_class_name": "ConsisIDTransformer3DModel"},
        "is a 'ConsisIDTransformer3DModel', not CogVideoX",
    ),
    "learned positions": ({"use_learned_positional_embeddings": True}, "has learned positions"),
    "other outputs": ({"out_channels": 32}, "predicts 32 channels"),
    "patches": ({"patch_size": 4}, "has patches of 4 latents"),
    "quantised": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "has quantised weights"),
}


def folder_of(config: Mapping[str, Any], folder: Path) -> Path:
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", [*RELEASES, *OTHERS])
def test_another_release_is_refused_by_name_before_its_weights_are_looked_for(name: str, here: Path) -> None:
    changes, words = {**RELEASES, **OTHERS}[name]
    folder = folder_of({**_5B, **changes}, here / "weights")
    text = f"backbone: {{name: videodit, preset: 5b, pretrained: {folder}}}\n"
    (finding,) = [each for each in check_config("c.yaml", text=text).findings if each.code == "VDT601"]
    assert words in finding.message
    assert "THUDM/CogVideoX-5b" in finding.fix
    with pytest.raises(EnvironmentProblem, match="THUDM/CogVideoX-5b") as caught:  # there is no weight to be found
        build(VideoDiTOptions(preset="5b", pretrained=str(folder)), device="cpu", dtype=torch.float32)
    assert words in str(caught.value)


def test_the_model_itself_is_let_pass(here: Path) -> None:
    assert wrong_variant(_5B) is None
    assert wrong_variant({**_5B, "_class_name": "VideoDiT", "out_channels": None}) is None
    folder = folder_of(_5B, here / "weights")
    text = f"backbone: {{name: videodit, preset: 5b, pretrained: {folder}}}\n"
    assert "VDT601" not in {finding.code for finding in check_config("c.yaml", text=text).findings}
    built = build(VideoDiTOptions(preset="5b", pretrained=str(folder)), device="meta", dtype=torch.float32)
    assert isinstance(built, VideoDiT)


@pytest.mark.parametrize("owner", ["THUDM", "zai-org"])
@pytest.mark.parametrize("name", [name for name in RELEASES if "Fun" not in name])
def test_a_repository_that_is_known_is_refused_by_check(owner: str, name: str) -> None:
    text = f"backbone: {{name: videodit, preset: 5b, pretrained: {owner}/{name}}}\n"
    (finding,) = [each for each in check_config("c.yaml", text=text).findings if each.code == "VDT601"]
    assert finding.message.startswith(f"{owner}/{name} is CogVideoX")
    assert RELEASES[name][1] in finding.message


def test_other_repositories_are_left_to_their_config() -> None:
    assert "Fun" in (wrong_repository("alibaba-pai/CogVideoX-Fun-V1.5-5b-InP") or "")
    assert "SAT" in (wrong_repository("THUDM/CogVideoX-5b-SAT") or "")
    for name in ("THUDM/CogVideoX-5b", "zai-org/CogVideoX-5b", "somebody/CogVideoX-2b-of-mine", "CogVideoX-5b", ""):
        assert wrong_repository(name) is None


# --- other people's libraries ---


def _import_model_anew(noisy: str) -> None:
    """Import the model as for the first time, beside a bitsandbytes that speaks, and print what came along."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("diffusers", "bitsandbytes", "ttt_videodit"):
            del sys.modules[name]
    sys.modules["peft"] = None  # type: ignore[assignment]  # where it is, diffusers imports it, and it bitsandbytes
    sys.path.insert(0, noisy)
    importlib.invalidate_caches()
    importlib.import_module("ttt_videodit.model")
    print(sorted({"bitsandbytes", "diffusers"} & set(sys.modules)))
    importlib.import_module("bitsandbytes")


def test_bitsandbytes_is_not_imported_along(here: Path) -> None:
    """Where moshi is installed it is there, and on some processors it speaks before our first word."""
    (here / "noisy" / "bitsandbytes").mkdir(parents=True)
    (here / "noisy" / "bitsandbytes" / "__init__.py").write_text("print('noise')\n")
    with forking.start(_import_model_anew, str(here / "noisy")) as process:
        printed, told = process.communicate(120)
    assert printed.splitlines() == ["['diffusers']", "noise"], told


def test_whatever_imports_diffusers_imports_it_alone_first() -> None:
    """No module of the plugin brings diffusers in by another door."""
    package = Path(ttt_videodit.__file__).parent
    importing = set()
    for file in sorted(package.rglob("*.py")):
        seen = [
            name
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
        ]
        theirs = [name for name in seen if name.split(".")[0] == "diffusers"]
        if theirs and file.name != "diffusers_alone.py":
            importing.add(file.stem)
            assert "ttt_videodit.diffusers_alone" in seen, file
            assert seen.index("ttt_videodit.diffusers_alone") < seen.index(theirs[0]), file
    assert {"model", "sampling", "encoders"} <= importing
