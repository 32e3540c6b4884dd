"""`ttt eval` on a run of the demo Moshi: results, killed and gone on with, failed items, what a folder refuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ttt.eval.folder import EvalFolder
from ttt_cli.main import main

IDS, VOICES = 4, ("ann", "bob")
PAIRS = IDS * len(VOICES)
DEMO = """\
backbone: {name: moshi, preset: demo, dim: 32, num_heads: 2, num_layers: 2}
ttt: {layers: [1], mini_batch_size: 4}
data: {duration_sec: 2}
train: {max_steps: 1, device: cpu}
eval: {max_batches: 1, eval_batch_size: 2}
"""
WORDS = "eval.tasks=[{name: swuggy, data: words}]"


def sound(file: Path, *, seed: int, seconds: float = 0.5) -> None:
    samples = np.random.default_rng(seed).normal(0, 3000, int(seconds * 24_000)).astype("<i2")
    with wave.open(str(file), "wb") as out:
        out.setparams((1, 2, 24_000, 0, "NONE", ""))
        out.writeframes(samples.tobytes())


def benchmark(folder: Path) -> Path:
    """sWUGGY's layout with noise in it."""
    place = folder / "lexical" / "dev"
    place.mkdir(parents=True)
    lines = ["filename,id,voice,frequency,word,phones,length,correct"]
    for number in range(IDS):
        for voice in VOICES:
            for correct in (1, 0):
                name = f"{number}{voice}{correct}"
                lines.append(f"{name},{number},{voice},{number},w,p,3,{correct}")
                sound(place / f"{name}.wav", seed=len(lines), seconds=0.3 + 0.1 * (len(lines) % 3))
    (place / "gold.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, `run`, and words, `words`."""
    folder = tmp_path_factory.mktemp("trained")
    benchmark(folder / "words")
    (folder / "moshi.yaml").write_text(f"{DEMO}run_dir: {folder}/run\n")
    (folder / "7b.yaml").write_text("backbone: {name: moshi, preset: 7b, random_weights: true}\n")
    assert main(["train", str(folder / "moshi.yaml")]) == 0
    return folder


@pytest.fixture(scope="module")
def evaluated(trained: Path) -> Path:
    """The run's evaluation."""
    assert main([*command(trained), "--out", str(trained / "whole")]) == 0
    return trained / "whole"


@pytest.fixture
def here(trained: Path, tmp_path: Path) -> Path:
    """The same words in a folder that a test may change."""
    shutil.copytree(trained / "words", tmp_path / "words")
    return tmp_path


def command(folder: Path, words: Path | None = None, **options: Any) -> list[str]:
    task = {"name": "swuggy", "data": str(words or folder / "words"), **options}
    return ["eval", str(folder / "run"), "--set", f"eval.tasks=[{json.dumps(task)}]"]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples" / "swuggy.jsonl").read_text().splitlines()]


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def killed_after_two_batches(arguments: list[str]) -> None:
    """Evaluate until the second batch is on the disk, and a part of the next line; then die as of kill -9."""
    add, done = EvalFolder.add, []

    def dies(self: EvalFolder, task: str, rows: Any, arrays: Any) -> None:
        add(self, task, rows, arrays)
        done.append(task)
        if len(done) == 2:
            with self._rows_file(task).open("ab") as out:
                out.write(b'{"item": "2/ann", "uni')
            os.kill(os.getpid(), signal.SIGKILL)

    EvalFolder.add = dies  # type: ignore[method-assign]
    main(arguments)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The items that are measured from here on."""
    found: list[str] = []
    add = EvalFolder.add

    def noting(self: EvalFolder, task: str, rows: Any, arrays: Any) -> None:
        found.extend(row.item.id for row in rows)
        add(self, task, rows, arrays)

    monkeypatch.setattr(EvalFolder, "add", noting)
    return found


# --- what it gives ---


def test_a_runs_evaluation_is_results_a_summary_and_samples(evaluated: Path) -> None:
    found = results(evaluated)
    table = found["results"]["swuggy"]
    lines = rows(evaluated)
    assert len({line["item"] for line in lines}) == len(lines) == PAIRS
    for arm, name in (("ttt", "none"), ("closed", "closed")):
        better = [
            line["arms"][arm]["correct.weighted.mean"] > line["arms"][arm]["incorrect.weighted.mean"] for line in lines
        ]
        assert table[f"acc,{name}"] == pytest.approx(sum(better) / PAIRS)
    assert table["acc,ttt-closed"] == pytest.approx(table["acc,none"] - table["acc,closed"])
    assert table["acc_stderr,none"] >= 0
    assert {
        f"acc/{streams}.{how},none" for streams in ("semantic", "all") for how in ("mean", "sum", "continuation")
    } <= {*table}
    assert found["n-samples"]["swuggy"] == {"original": 8, "effective": 8, "failed": 0, "units": 4, "clusters": 4}
    assert "vocabulary=in" in json.dumps(found["parts"])
    assert found["groups"] == {"average": None}  # of one task
    assert "| swuggy (acc) |" in (evaluated / "summary.md").read_text()
    submitted = (evaluated / "submission" / "ttt" / "lexical" / "dev.txt").read_text().splitlines()
    assert len(submitted) == 2 * PAIRS
    assert all(len(line["files"]) == 2 and line["error"] is None for line in lines)


def test_the_same_again_measures_nothing(
    trained: Path, evaluated: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (evaluated / "results.json").read_bytes()
    assert main([*command(trained), "--out", str(evaluated)]) == 0
    assert "swuggy: 8 of 8 items are there already" in capsys.readouterr().out
    assert measured == []
    assert (evaluated / "results.json").read_bytes() == before


def test_results_go_below_the_run_and_a_limit_keeps_voices(trained: Path, measured: list[str]) -> None:
    assert main([*command(trained), "--limit", "2", "--arms", "ttt"]) == 0
    (folder,) = (trained / "run" / "eval").iterdir()
    assert folder.name == next((trained / "run" / "checkpoints").iterdir()).name
    assert results(folder)["n-samples"]["swuggy"]["units"] == 2
    assert len(measured) == 4
    assert "acc,closed" not in results(folder)["results"]["swuggy"]
    shutil.rmtree(trained / "run" / "eval")


def test_an_adapter_alone_gives_the_numbers_of_its_run(trained: Path, evaluated: Path, tmp_path: Path) -> None:
    (checkpoint,) = (trained / "run" / "checkpoints").iterdir()
    shutil.copytree(checkpoint, tmp_path / "adapter")
    arguments = command(trained)
    arguments[1] = str(tmp_path / "adapter")
    assert main([*arguments, "--set", "eval.eval_batch_size=2", "--set", "train.device=cpu"]) == 0
    assert results(tmp_path / "adapter" / "eval")["results"] == results(evaluated)["results"]


@pytest.mark.parametrize("file", ["", "adapter_model.safetensors"])
def test_a_checkpoint_is_its_run_at_that_step(trained: Path, evaluated: Path, tmp_path: Path, file: str) -> None:
    """With the run's config; results are not in the checkpoint, which is dropped when newer ones are kept."""
    shutil.copytree(trained / "run", tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    before = sorted(checkpoint.rglob("*"))
    arguments = command(trained)
    arguments[1] = str(checkpoint / file)
    assert main(arguments) == 0
    assert sorted(checkpoint.rglob("*")) == before
    found = results(tmp_path / "run" / "eval" / checkpoint.name)
    assert found["results"] == results(evaluated)["results"]
    assert found["config"]["data"] == results(evaluated)["config"]["data"]


def test_arrays_of_items_whose_names_look_alike_are_kept_apart(tmp_path: Path) -> None:
    folder = EvalFolder(tmp_path, {})
    names = ("a/b", "a_b", "a b", "..", "x" * 200 + "1", "x" * 200 + "2", "ä", "ö")
    (tmp_path / "samples").mkdir()
    for number, name in enumerate(names):
        folder.add("task", [], {(name, "ttt"): {"losses": np.array([number])}})
    for number, name in enumerate(names):
        assert folder.arrays("task").of(name, "ttt")["losses"].tolist() == [number]
    assert {file.parent for file in tmp_path.rglob("*.npz")} == {tmp_path / "positions" / "task"}


# --- killed, stopped, gone on with ---


def test_killed_in_the_middle_it_goes_on_to_the_same_results(
    trained: Path, evaluated: Path, tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "killed"
    arguments = [*command(trained), "--out", str(out)]
    killed = multiprocessing.get_context("fork").Process(target=killed_after_two_batches, args=(arguments,))
    killed.start()
    killed.join(240)
    assert killed.exitcode == -signal.SIGKILL
    assert not (out / "results.json").exists()
    assert main(arguments) == 2  # nobody said what to do with what is there
    assert "has 4 of 8 items of swuggy; go on with --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert "swuggy: 4 of 8 items are there already" in capsys.readouterr().out
    assert len(measured) == 4
    assert (out / "results.json").read_bytes() == (evaluated / "results.json").read_bytes()
    for one, other in zip(rows(out), rows(evaluated), strict=True):
        assert (one["item"], one["files"]) == (other["item"], other["files"])
        for arm, numbers in one["arms"].items():  # two processes may round otherwise
            assert numbers == pytest.approx(other["arms"][arm], rel=1e-5)


def test_stopped_by_hand_it_ends_with_130_and_keeps_what_is_measured(
    trained: Path, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add, out = EvalFolder.add, tmp_path / "stopped"

    def stops(self: EvalFolder, task: str, rows: Any, arrays: Any) -> None:
        add(self, task, rows, arrays)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(EvalFolder, "add", stops)
        assert main([*command(trained), "--out", str(out)]) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    assert len(rows(out)) == 2
    assert main([*command(trained), "--out", str(out), "--resume"]) == 0
    assert (out / "results.json").read_bytes() == (evaluated / "results.json").read_bytes()


# --- items that fail, files that change ---


def test_an_item_that_fails_is_counted_and_in_no_number(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = here / "words" / "lexical" / "dev" / "2bob1.wav"
    good = broken.read_bytes()
    broken.write_bytes(good[:20])
    arguments = [*command(trained, here / "words"), "--out", str(here / "out")]
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert "swuggy: 1 of 8 items failed, more than 1%" in err
    (failed,) = [line for line in rows(here / "out") if line["error"] is not None]
    assert failed["item"] == "2/bob"
    assert failed["arms"] == {}
    assert "2bob1.wav" in failed["error"]
    assert results(here / "out")["n-samples"]["swuggy"] == {
        **{"original": 8, "effective": 7, "failed": 1},
        **{"units": 4, "clusters": 4},
    }
    broken.write_bytes(good)
    assert main([*arguments, "--resume"]) == 0  # what failed is tried again
    assert results(here / "out")["n-samples"]["swuggy"]["failed"] == 0


def test_a_recording_that_changes_is_measured_anew(
    trained: Path, here: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*command(trained, here / "words"), "--out", str(here / "out"), "--arms", "ttt"]
    assert main(arguments) == 0
    before = {line["item"]: line for line in rows(here / "out")}
    measured.clear()
    sound(here / "words" / "lexical" / "dev" / "0ann1.wav", seed=99)
    assert main([*arguments, "--resume"]) == 0
    assert measured == ["0/ann", "0/bob"]  # the batch that it is in
    after = {line["item"]: line for line in rows(here / "out")}
    assert [item for item in after if after[item] != before[item]] == ["0/ann"]


# --- what a folder refuses ---


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--set", "eval.score.normalise=sum"], "eval.score"),
        (["--set", "eval.score.user_stream=zeros"], "user_stream"),
        (["--set", "eval.eval_batch_size=3"], "eval.eval_batch_size: 2 then, 3 now"),
        (["--limit", "2"], "options.limit: null then, 2 now"),
        (["--arms", "ttt"], "arms"),
    ],
)
def test_results_of_something_else_are_never_used(
    trained: Path, evaluated: Path, more: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (evaluated / "samples" / "swuggy.jsonl").read_bytes()
    for way in ([], ["--resume"]):
        assert main([*command(trained), "--out", str(evaluated), *more, *way]) == 2
        err = capsys.readouterr().err
        assert told in err
        assert "--overwrite" in err
        assert "Traceback" not in err
    assert (evaluated / "samples" / "swuggy.jsonl").read_bytes() == before


def test_another_adapter_is_refused(trained: Path, evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(trained)
    arguments[1] = str(trained / "moshi.yaml")
    assert main([*arguments, "--out", str(evaluated)]) == 2
    assert "holds results of something else" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([], 2, "name a run, an adapter or a config"),
        (["7b.yaml", "--list"], 2, "evaluate nothing; leave 7b.yaml out"),
        (["7b.yaml", "--compare", "a", "b"], 2, "evaluate nothing; leave 7b.yaml out"),
        (["7b.yaml", "--resume", "--overwrite"], 2, "leave one of them out"),
        (["--compare", "a", "b"], 3, "a: holds no results (results.json) of an evaluation"),
        (["nowhere"], 3, "nowhere"),
        (["7b.yaml"], 2, "there is nothing to measure"),
        (["moshi.yaml", "--tasks", "stories"], 2, "no installed plugin brings a task 'stories'"),
        (["moshi.yaml", "--tasks", "a,,b"], 2, "names separated by commas"),
        (["7b.yaml", "--tasks", "sblimp", "--out", "o"], 2, "the task sblimp has no data"),
        (["moshi.yaml", "--set", WORDS, "--arms", "open"], 2, "there is no arm open"),
        (["moshi.yaml", "--limit", "0"], 2, "--limit"),
        (["moshi.yaml", "--set", "eval.tasks=[{name: sstory, data: gone}]", "--out", "o"], 3, "gone: there is no such"),
        (["moshi.yaml", "--set", WORDS], 2, "say where results go with --out"),
        (
            ["moshi.yaml", "--set", WORDS, "--out", "moshi.yaml"],
            2,
            "is not a folder",
        ),
        (
            ["moshi.yaml", "--set", "eval.tasks=[{name: swuggy, data: words, split: test}]", "--out", "o"],
            *(3, "has no gold.csv in lexical/test"),
        ),
        (["moshi.yaml", "--set", "eval.tasks=[{name: swuggy, data: words, colour: red}]"], 2, "unknown key"),
        (["moshi.yaml", "--set", "eval.tasks=[{name: swuggy}, {name: swuggy}]"], 2, "stands in `eval.tasks` already"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(
    trained: Path,
    arguments: list[str],
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(trained)
    assert main(["eval", *arguments]) == code
    err = capsys.readouterr().err
    assert told in err
    assert "Traceback" not in err
    assert not (trained / "o").exists()


def test_the_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--list"]) == 0
    out = capsys.readouterr().out
    for name in ("swuggy", "sblimp", "tstory", "sstory", "librilight", "recall", "inner_loss"):
        assert f"\n{name}" in f"\n{out}"
