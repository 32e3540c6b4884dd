"""`ttt runs`: runs that were trained here, side by side; and everything that looks like a run and is none."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from toy import ToyBackbone, ToyData, ToyOptions

from ttt.config import EvalConfig, RunConfig, TrainConfig, TTTConfig
from ttt.errors import EnvironmentProblem, NonFiniteError, UsageError
from ttt.files import lock, read_json, write_json
from ttt.interrupt import Interrupt
from ttt.runs.differing import ABSENT, differing
from ttt.runs.metrics_ends import curves, newest_lines
from ttt.runs.page import page_of
from ttt.runs.picture import IN_COLOR, _apart, curves_figure, drawn_runs, picture_bytes
from ttt.runs.table import Table, table_of
from ttt.runs.text import csv_of, text_of
from ttt.train import pictures, train
from ttt.train.failure import FAILURE
from ttt.train.metrics import MetricsFile
from ttt_cli.main import main

STEPS = 4


def config(run_dir: Path, *, ttt: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    return RunConfig(
        backbone=ToyOptions(name="toy", num_layers=2, dim=16, num_heads=2),
        ttt=TTTConfig(mini_batch_size=4, **(ttt or {})),
        data=ToyData(window=12),
        train=TrainConfig(**{"max_steps": STEPS, "lr": 3e-3, "device": "cpu", "evidence_freq": 2, **train}),
        eval=EvalConfig(eval_freq=2),
        run_dir=str(run_dir),
    )


class Breaking(ToyBackbone):
    """Its loss is not finite in the third pass of training."""

    passes = 0

    def loss(self, model: Any, batch: Any, config: RunConfig) -> Any:
        output = super().loss(model, batch, config)
        self.passes += model.training
        return type(output)(output.loss * math.nan, output.tokens, {}) if self.passes == 3 else output


class Stopping(ToyBackbone):
    """Somebody asks to stop in the third pass of training."""

    passes = 0

    def loss(self, model: Any, batch: Any, config: RunConfig) -> Any:
        self.passes += model.training
        if self.passes == 3:
            assert Interrupt._active is not None
            Interrupt._active.requested = True
        return super().loss(model, batch, config)


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[None]:
    """Runs do not draw: nobody looks at their own pictures here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw_run", lambda run: [])
        yield


@pytest.fixture(scope="module")
def trained(undrawn: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs: two that finished, one that failed, one that was interrupted."""
    folder = tmp_path_factory.mktemp("runs")
    quiet = Console(file=io.StringIO())
    train(config(folder / "sweep" / "run-2"), ToyBackbone(), console=quiet)
    train(config(folder / "sweep" / "run-10", lr=1e-3, ttt={"layer_type": "mlp"}), ToyBackbone(), console=quiet)
    with pytest.raises(NonFiniteError):
        train(config(folder / "failed", ckpt_freq=1), Breaking(), console=quiet)
    assert train(config(folder / "stopped"), Stopping(), console=quiet).interrupted
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def column(table: Table, key: str) -> dict[str, Any]:
    return dict(zip([run.name for run in table.runs], table.column(key).values, strict=True))


# --- what the table says ---


def test_every_number_is_the_one_that_the_run_left(trained: Path) -> None:
    table = table_of(trained)
    assert [run.name for run in table.runs] == ["failed", "stopped", "sweep/run-2", "sweep/run-10"]
    states = {"failed": "failed", "stopped": "interrupted", "sweep/run-2": "finished", "sweep/run-10": "finished"}
    assert column(table, "state") == states
    assert [each.key for each in table.columns if each.is_config] == [
        *("ttt.layer_type", "ttt.base_lr", "train.lr", "train.ckpt_freq"),
    ]
    assert column(table, "train.lr")["sweep/run-10"] == 1e-3
    for name in ("sweep/run-2", "sweep/run-10"):
        summary = read_json(trained / name / "summary.json", sealed=True)
        row = {each.key: column(table, each.key)[name] for each in table.columns}
        for key in ("steps", "loss", "eval_loss", "eval_loss_gates_closed", "tokens", "seconds", "eval_windows"):
            assert row[key] == summary[key], key
        layers = summary["layers"].values()
        for key in ("gate", "movement", "inner_loss_before"):
            assert row[key] == pytest.approx(sum(layer[key] for layer in layers) / len(layers), rel=1e-12)
        assert row["gate_max"] == max(layer["gate_max"] for layer in layers)
        closed = summary["eval_loss_gates_closed"]
        assert row["eval_gain"] == pytest.approx((closed - summary["eval_loss"]) / closed, rel=1e-12)
        assert row["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"], rel=1e-12)
        assert 0 <= row["accuracy"] <= 1  # the backbone's own
    assert table.left_out == []


def test_what_a_run_that_is_not_finished_has_is_its_newest(trained: Path) -> None:
    table = table_of(trained)
    lines = [json.loads(line) for line in (trained / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert column(table, "steps")["stopped"] == lines[-1]["step"] == 3
    assert column(table, "loss")["stopped"] == lines[-1]["loss"]
    assert column(table, "eval_loss")["stopped"] == lines[1]["eval_loss"]
    assert column(table, "movement")["stopped"] is not ABSENT
    record = read_json(trained / "stopped" / "checkpoints" / "step_000003" / "trainer_state.json", sealed=True)
    assert column(table, "tokens")["stopped"] == record["tokens"]
    assert column(table, "device")["stopped"] is ABSENT
    assert re.search(r"^stopped +interrupted .* 3/4 ", text_of(table), re.MULTILINE)


def test_a_failed_run_says_why_until_it_goes_on(here: Path) -> None:
    (note,) = [note for note in table_of(here).notes if note.startswith("failed: ")]
    assert note.startswith("failed: failed after step 2: step 3: the loss is nan on ")
    quiet = Console(file=io.StringIO())
    train(config(here / "failed", ckpt_freq=1), ToyBackbone(), resume=True, console=quiet)
    assert not (here / "failed" / FAILURE).exists()
    assert column(table_of(here), "state")["failed"] == "finished"


def test_what_learned_is_counted_also_in_runs_that_did_not_write_it(here: Path) -> None:
    before = column(table_of(here), "learned_parameters")
    for file in here.rglob("*.json"):
        if "learned_parameters" in file.read_text():
            content = read_json(file)
            del content["learned_parameters"], content["sha256"]
            write_json(file, content)
    after = column(table_of(here), "learned_parameters")
    assert before == after
    assert before["sweep/run-10"] > before["sweep/run-2"] > 1000


def test_a_run_in_progress_is_told_by_its_lock(here: Path) -> None:
    metrics = here / "stopped" / "metrics.jsonl"
    with open(metrics, "rb") as file:
        lock(file, metrics)
        assert column(table_of(here), "state")["stopped"] == "running"
    assert column(table_of(here), "state")["stopped"] == "interrupted"
    with contextlib.closing(MetricsFile(metrics, last_step=3)):  # looking holds nothing
        assert column(table_of(here), "state")["stopped"] == "running"


def test_a_run_that_has_begun_and_has_no_step_yet_is_in_the_table_while_it_lives(here: Path) -> None:
    run = here / "stopped"
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").write_bytes(b"")
    with open(run / "metrics.jsonl", "rb") as file:
        lock(file, run / "metrics.jsonl")
        assert column(table_of(here), "state")["stopped"] == "running"
    (left_out,) = table_of(here).left_out
    assert str(left_out).endswith(
        "stopped: left out: it has no step, no checkpoint and no summary: a run that did not begin"
    )


def test_a_run_by_itself_is_a_table_of_one(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of(trained / "sweep" / "run-2")
    assert [run.name for run in table.runs] == ["run-2"]
    assert [each.key for each in table.columns if each.is_config] == []
    monkeypatch.chdir(trained / "sweep" / "run-2")
    assert [run.name for run in table_of(Path(".")).runs] == ["run-2"]


# --- ttt eval ---


def results(run: Path, folder: str, acc: float, **options: Any) -> None:
    content = {
        "results": {
            "swuggy": {"alias": "swuggy", "acc,none": acc, "acc_stderr,none": 0.1, "acc,closed": 0.5},
            "none": None,
        },
        "configs": {"swuggy": {"name": "swuggy", **options}},
        "versions": {"swuggy": 1},
        "n-samples": {"swuggy": {"original": 40}},
    }
    (run / "eval" / folder).mkdir(parents=True)
    write_json(run / "eval" / folder / "results.json", content)


def test_the_newest_results_of_an_evaluation_stand_beside_the_losses(here: Path) -> None:
    run = here / "sweep" / "run-2"
    for name, acc in (("step_999999", 0.6), ("step_1000000", 0.75), ("mine", 0.7)):
        results(run, name, acc)
    table = table_of(here)
    assert column(table, "results.swuggy.acc")["sweep/run-2"] == 0.75
    assert column(table, "results.swuggy.acc_closed")["sweep/run-2"] == 0.5
    assert column(table, "evaluated") == {
        "failed": ABSENT, "stopped": ABSENT, "sweep/run-2": "step_1000000", "sweep/run-10": ABSENT
    }  # fmt: skip
    heads = text_of(table).splitlines()[0].split()
    assert "results.swuggy.acc" in heads
    assert "results.swuggy.acc_closed" in heads
    assert "results.swuggy.acc_stderr" not in heads


def test_numbers_of_other_measurements_are_told(here: Path) -> None:
    results(here / "sweep" / "run-2", "step_4", 0.6, limit=10)
    results(here / "sweep" / "run-10", "step_4", 0.7, limit=None)
    told = [note for note in table_of(here).notes if "measurement" in note]
    assert told == [
        "results.swuggy are not of the same measurement: limit 10 in sweep/run-2, None in sweep/run-10",
    ]
    run = here / "sweep" / "run-2" / "summary.json"
    write_json(run, {**read_json(run, sealed=True), "eval_windows": 2})
    assert any(note.startswith("eval_loss is not of the same windows: ") for note in table_of(here).notes)


def test_broken_results_are_told_and_older_ones_taken(here: Path) -> None:
    run = here / "sweep" / "run-2"
    results(run, "step_000002", 0.6)
    results(run, "step_000004", 0.7)
    newest = run / "eval" / "step_000004" / "results.json"
    newest.write_text(newest.read_text().replace("0.7", "0.8"))
    table = table_of(here)
    assert column(table, "results.swuggy.acc")["sweep/run-2"] == 0.6
    assert any("results.json: damaged" in note for note in table.notes)


# --- configs ---


def plain(**sections: Any) -> dict[str, Any]:
    return {"backbone": {"name": "toy"}, "train": {"lr": 1.0}, "run_dir": str(sections), **sections}


def test_a_key_is_a_column_if_its_values_differ() -> None:
    assert differing([plain(), plain()]) == {}
    assert differing([plain()]) == {}
    assert differing([plain(), plain(train={"lr": 2.0})]) == {"train.lr": [1.0, 2.0]}
    assert differing([plain(train={"lr": 1}), plain(train={"lr": True})]) == {"train.lr": [1, True]}
    assert differing([plain(train={"betas": [0.9, 0.95]}), plain(train={"betas": [0.9, 0.99]})]) == {
        "train.betas": [[0.9, 0.95], [0.9, 0.99]]
    }


def test_a_key_that_an_older_ttt_did_not_write_has_its_default() -> None:
    written = {"lr": 1.0, "seed": 0}
    assert differing([plain(train=written), plain()]) == {}
    assert differing([plain(train={"lr": 1.0, "seed": 3}), plain()]) == {"train.seed": [3, 0]}
    # what this ttt does not know: a newer one's
    assert differing([plain(train={"lr": 1.0, "novel": 3}), plain()]) == {"train.novel": [3, ABSENT]}
    # of a plugin that is installed
    moshi = [plain(backbone={"name": "moshi", **more}) for more in ({"dim": 64}, {}, {"dim": None})]
    assert differing(moshi) == {"backbone.dim": [64, None, None]}


def test_what_only_another_backbone_has_is_no_difference() -> None:
    one, other = plain(), plain(backbone={"name": "strange", "wings": 2})
    assert differing([one, other]) == {"backbone.name": ["toy", "strange"]}
    third = plain(backbone={"name": "strange", "wings": 4})
    assert differing([one, other, third])["backbone.wings"] == [ABSENT, 2, 4]


# --- order ---


def test_any_column_sorts_and_what_is_no_number_comes_last(here: Path) -> None:
    table = table_of(here)
    names = [run.name for run in table.sorted_by("loss").runs]
    assert names == sorted(names, key=column(table, "loss").__getitem__)
    assert [run.name for run in table.sorted_by("loss", reverse=True).runs] == names[::-1]
    assert [run.name for run in table.sorted_by("lr", reverse=True).runs][-1] == "sweep/run-10"
    assert [run.name for run in table.reversed().runs] == [run.name for run in table.runs][::-1]
    file = here / "sweep" / "run-2" / "summary.json"
    write_json(file, {**read_json(file, sealed=True), "loss": None})
    for reverse in (False, True):
        ordered = table_of(here).sorted_by("loss", reverse=reverse)
        assert ordered.runs[-1].name == "sweep/run-2"
        assert csv_of(ordered).splitlines()[-1].startswith("sweep/run-2,")
    with pytest.raises(UsageError, match=r"--sort: los is no column of this table; it has run, state, ttt\.layer_type"):
        table.sorted_by("los")


# --- the forms ---


def test_csv_has_every_number_in_full(here: Path) -> None:
    file = here / "sweep" / "run-2" / "summary.json"
    summary = read_json(file, sealed=True)
    write_json(file, {**summary, "eval_loss": None})
    os.rename(here / "stopped", here / 'a, "strange"\nname')
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(csv_of(table_of(here))))}
    assert set(rows) == {"failed", 'a, "strange"\nname', "sweep/run-2", "sweep/run-10"}
    row = rows["sweep/run-2"]
    assert float(row["loss"]) == summary["loss"]
    assert math.isnan(float(row["eval_loss"]))
    assert rows["failed"]["seconds"] != ""
    assert rows["failed"]["device"] == ""
    assert int(row["steps"]) == STEPS


def test_a_narrow_terminal_shows_blocks_of_columns(trained: Path) -> None:
    table = table_of(trained)
    wide, narrow = text_of(table), text_of(table, width=70)
    assert len(wide.splitlines()) == 1 + len(table.runs)
    assert max(map(len, narrow.splitlines())) <= 70
    blocks = narrow.split("\n\n")
    assert len(blocks) > 1
    assert all(block.splitlines()[0].startswith("run ") for block in blocks)
    assert (
        " ".join(block.splitlines()[0].removeprefix("run") for block in blocks).split()
        == wide.split("\n")[0].split()[1:]
    )


def test_a_page_holds_all_it_needs_and_nothing_that_acts(here: Path) -> None:
    os.rename(here / "stopped", here / "<img src=x onerror=alert(1)>")
    table = table_of(here)
    figure = curves_figure(drawn_runs(table.runs))
    assert figure is not None
    page = page_of(table, title="Runs in <here>", picture=picture_bytes(figure, svg=True))
    assert "<img" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "<title>Runs in &lt;here&gt;</title>" in page
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?!#)(?:https?:)?//""", page)
    assert "prefers-color-scheme: dark" in page
    keys = [json.loads(found.replace("&quot;", '"')) for found in re.findall(r'data-key="([^"]*)"', page)]
    assert len(keys) == len(table.runs) * len(table.columns)
    losses = [key for key in keys if key[0] == 0]
    assert [0, column(table, "loss")["failed"]] in losses
    assert page.count("<svg") == 1
    assert "currentColor" in page


NODE = shutil.which("node")


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_pages_script_sorts_as_the_table_does(trained: Path) -> None:
    assert NODE is not None
    table = table_of(trained)
    page = page_of(table, title="runs", picture=None)
    place = [each.key for each in table.columns].index("loss")
    program = f"""
const page = {json.dumps(page)};
const cell = (key) => ({{dataset: {{key: key.replaceAll("&quot;", '"')}}}});
const cells = (row) => [...row.matchAll(/data-key="([^"]*)"/g)].map((found) => cell(found[1]));
const rows = page.match(/<tbody>([^]*)<\\/tbody>/)[1].split("\\n").map((row) => ({{cells: cells(row)}}));
const heads = [...page.matchAll(/<th scope/g)].map(() => {{
  const head = {{sorted: null, getAttribute: () => head.sorted, setAttribute: (_, how) => head.sorted = how,
    removeAttribute: () => head.sorted = null,
    querySelector: () => ({{addEventListener: (_, act) => head.click = act}})}};
  return head;
}});
const body = {{rows, append: (...sorted) => {{ body.rows = sorted; }}}};
const document = {{querySelector: () => body, querySelectorAll: () => heads}};
new Function("document", page.match(/<script>([^]*)<\\/script>/)[1])(document);
const names = () => body.rows.map((row) => JSON.parse(row.cells[0].dataset.key)[1]);
heads[{place}].click(); console.log(JSON.stringify(names()));
heads[{place}].click(); console.log(JSON.stringify(names()));
heads[0].click(); console.log(JSON.stringify(names()));
"""
    done = subprocess.run([NODE, "-e", program], capture_output=True, text=True, timeout=60, check=True)
    up, down, by_name = map(json.loads, done.stdout.splitlines())
    assert up == [run.name for run in table.sorted_by("loss").runs]
    assert down == [run.name for run in table.sorted_by("loss", reverse=True).runs]
    assert by_name == [run.name for run in table.runs]


# --- the picture ---


def test_the_picture_names_every_run_beside_its_curve(trained: Path) -> None:
    table = table_of(trained)
    drawn = drawn_runs(table.runs)
    figure = curves_figure(drawn)
    assert figure is not None
    axes = figure.get_axes()
    assert [panel.get_title(loc="left").split(":")[0] for panel in axes][:2] == ["training loss", "evaluation loss"]
    for panel in axes:
        assert {text.get_text() for text in panel.texts} == {run.name for run in table.runs}
    (line,) = [line for line in axes[0].lines if line.get_color() == drawn[2].style["color"]]
    summary = read_json(trained / "sweep" / "run-2" / "summary.json", sealed=True)
    assert (line.get_xdata()[-1], line.get_ydata()[-1]) == (STEPS, summary["loss"])
    acting, closed = [line for line in axes[1].lines if line.get_color() == drawn[2].style["color"]]
    assert acting.get_ydata()[-1] == summary["eval_loss"]
    assert closed.get_ydata()[-1] == summary["eval_loss_gates_closed"]
    assert len({(run.style["color"], str(run.style["linestyle"])) for run in drawn}) == len(drawn)


def test_names_beside_curves_keep_apart_and_inside() -> None:
    assert _apart([0.2, 0.6], 0.1) == [0.2, 0.6]
    assert _apart([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert _apart([0.0, 0.0, 1.0, 1.0], 0.1) == pytest.approx([0.0, 0.1, 0.9, 1.0])
    crowded = _apart([0.5] * 12, 0.05)
    assert all(b - a == pytest.approx(0.05) for a, b in itertools.pairwise(crowded))


def test_runs_beyond_the_colours_stand_behind_in_grey(trained: Path) -> None:
    (run,) = table_of(trained / "sweep" / "run-2").runs
    drawn = drawn_runs([run] * (IN_COLOR + 3))
    assert [each.is_named for each in drawn] == [True] * IN_COLOR + [False] * 3
    assert len({(each.style["color"], str(each.style["linestyle"])) for each in drawn[:IN_COLOR]}) == IN_COLOR
    figure = curves_figure(drawn)
    assert figure is not None
    assert figure.get_suptitle() == f"{IN_COLOR} of {IN_COLOR + 3} runs in colour, the first of the table"


# --- long files ---


def metrics(file: Path, steps: int, **often: int) -> None:
    with contextlib.closing(MetricsFile(file)) as written:
        for step in range(1, steps + 1):
            line: dict[str, Any] = {"step": step, "loss": 1 / step}
            if step % often.get("evaluated", steps + 1) == 0:
                line.update(eval_loss=step / 10, eval_loss_gates_closed=float(step))
            if step % often.get("layers", steps + 1) == 0:
                line["layers"] = {"a": {"gate": step / 1000}, "b": {"gate": 0.0}}
            written.write(line)


def test_curves_of_a_long_file_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics(file, 9000, evaluated=1000, layers=50)
    found = curves(file)
    assert 1000 <= len(found.loss) <= 2001
    assert (found.loss[0], found.loss[-1]) == ((1, 1.0), (9000, 1 / 9000))
    assert all(loss == 1 / step for step, loss in found.loss)
    assert found.evaluations == [(step, step / 10, float(step)) for step in range(1000, 9001, 1000)]
    assert found.layers["gate"][3] == (200, 0.1)


def test_a_files_size_costs_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics(file, 3000, evaluated=1000)
    with open(file, "ab") as out:
        out.write(b"x" * (24 << 20) + b"\n")  # a line that is none
        out.write(b'{"step": 3001, "loss": 5.0}\n{"step": 3002, "lo')
    tracemalloc.start()
    try:
        found, ends = curves(file), newest_lines(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert ends.last == {"step": 3001, "loss": 5.0}
    assert found.loss[-1] == (3001, 5.0)
    assert ends.evaluated is not None
    assert ends.evaluated["step"] == 3000
    assert peak < 12 << 20


def test_the_end_of_a_file_is_read_whatever_blocks_it_falls_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics(file, 60, evaluated=7, layers=11)
    whole = file.read_bytes()
    for block in (1, 13, 97, 1 << 20):
        monkeypatch.setattr("ttt.runs.metrics_ends._BLOCK", block)
        for cut in (0, 1, 20):
            file.write_bytes(whole[: len(whole) - cut])
            ends = newest_lines(file)
            steps = [line and line["step"] for line in (ends.last, ends.measured, ends.evaluated)]
            assert steps == [60 - (cut > 0), 55, 56], (block, cut)


# --- what is no run ---


def broken(here: Path) -> Iterator[tuple[str, str]]:
    """Folders that look like runs, with what is said of each."""
    good = here / "sweep" / "run-2"
    for name, content, why in (
        ("empty", b"", "config.yaml: not a config of ttt"),
        ("foreign", b"model: resnet\nlr: 0.1\n", "config.yaml: not a config of ttt: it names no backbone"),
        ("binary", b"\xff\xfe\x00\x01", "config.yaml: not a config of ttt"),
        ("torn", b"backbone: {name: to", "config.yaml: not a config of ttt"),
        ("list", b"- 1\n", "config.yaml: not a config of ttt"),
        ("nameless", b"backbone: {name: 3}\n", "config.yaml: not a config of ttt: it names no backbone"),
    ):
        (here / name).mkdir()
        (here / name / "config.yaml").write_bytes(content)
        shutil.copy(good / "metrics.jsonl", here / name)
        yield name, why
    (here / "other").mkdir()
    (here / "other" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    yield "other", "config.yaml: no such file"
    shutil.copytree(good, here / "begun")
    shutil.rmtree(here / "begun" / "checkpoints")
    (here / "begun" / "summary.json").unlink()
    (here / "begun" / "metrics.jsonl").write_bytes(b'{"step": 1, "lo')
    yield "begun", "it has no step, no checkpoint and no summary: a run that did not begin"
    (here / "fifo").mkdir()
    shutil.copy(good / "config.yaml", here / "fifo")
    os.mkfifo(here / "fifo" / "metrics.jsonl")
    yield "fifo", "metrics.jsonl: cannot be read: a FIFO, not a file"
    (here / "nested").mkdir()
    shutil.copy(good / "config.yaml", here / "nested")
    (here / "nested" / "metrics.jsonl").mkdir()
    yield "nested", "metrics.jsonl: cannot be read: a folder, not a file"


def test_what_is_no_run_is_named_and_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = dict(broken(here))
    (here / "notes").mkdir()
    (here / "notes" / "config.yaml").write_text("a: 1\n")  # a config alone is anybody's
    table = table_of(here)
    assert len(table.runs) == 4
    told = {each.path.name: each.why for each in table.left_out}
    assert set(told) == set(expected)
    for name, why in expected.items():
        assert why in told[name], name
    assert main(["runs", str(here)]) == 0
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert all(f"{here / name}: left out: " in err for name in expected)
    assert len(out.splitlines()) == 5


def test_damage_beside_what_is_whole_is_told(here: Path) -> None:
    for name, file in (("run-2", "summary.json"), ("run-10", "config.yaml")):
        (here / "sweep" / name / file).write_text("{")
    table = table_of(here)
    assert column(table, "state") == {
        "failed": "failed", "stopped": "interrupted", "sweep/run-2": "interrupted", "sweep/run-10": "finished"
    }  # fmt: skip
    assert column(table, "eval_loss")["sweep/run-2"] is not ABSENT  # of its metrics
    assert column(table, "train.lr")["sweep/run-10"] == 1e-3  # of its checkpoint
    assert any("summary.json:1:2: not JSON" in note for note in table.notes)
    (here / "sweep" / "run-2" / "checkpoints" / "step_000004" / "trainer_state.json").write_text("[1]")
    assert column(table_of(here), "steps")["sweep/run-2"] == STEPS


STRANGE: list[dict[str, Any]] = [
    {"layers": [1], "loss": "low", "tokens": {}, "seconds": "1", "eval_loss": True, "learned_parameters": "x"},
    {"layers": {"a": 3, "b": {"gate": None}}, "loss": 1e999, "eval_loss": 1, "eval_loss_gates_closed": 0, "a/b": []},
    {"loss": -math.inf, "seconds": 0, "tokens": 10**400, "eval_split": ["eval"], "eval_windows": {}, "steps": None},
]


@pytest.mark.parametrize("content", STRANGE)
def test_strange_content_in_whole_files_is_no_traceback(
    content: dict[str, Any], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = here / "sweep" / "run-2"
    (run / "summary.json").write_text(json.dumps(content))
    results(run, "x", 0.5)
    (run / "eval" / "x" / "results.json").write_text(
        '{"results": {"swuggy": [1], "a": {"acc,none": "high"}}, "versions": 3}'
    )
    for form in ("table", "csv"):
        assert main(["runs", str(here), "--format", form, "--sort", "loss"]) == 0
        assert "sweep/run-2" in capsys.readouterr().out
    table = table_of(here)
    assert "sweep/run-2" in page_of(table, title="runs", picture=None)


def test_links_are_followed_once(here: Path) -> None:
    os.symlink(here, here / "sweep" / "loop")
    os.symlink(here / "sweep" / "run-2", here / "again")
    os.symlink("nowhere", here / "dangling")
    assert len(table_of(here).runs) == 4
    aside = here.parent / "aside"
    os.rename(here / "failed", aside)
    os.symlink(aside, here / "failed")
    assert "failed" in column(table_of(here), "state")


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (lambda path: None, 3, "cannot be read: No such file or directory; name a folder that holds runs"),
        (lambda path: path.mkdir(), 3, "holds no run that `ttt train` has begun; name a folder of runs"),
        (lambda path: path.write_text("x"), 2, "is a file; name a folder that holds runs"),
        (lambda path: os.mkfifo(path), 2, "is a FIFO; name a folder that holds runs"),
        (lambda path: os.symlink(path, path), 3, "name a folder that holds runs"),
    ],
)
def test_no_runs_there_is_one_sentence(
    make: Any, code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "here")
    assert main(["runs", str(tmp_path / "here")]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {tmp_path / 'here'}: ")
    assert words in err
    assert len(err.splitlines()) == 1


# --- the command ---


def test_the_command_writes_what_it_is_asked_for(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "runs.csv"
    assert main(["runs", str(trained), "--out", str(out), "--picture", str(tmp_path / "runs.png")]) == 0
    assert out.read_text() == csv_of(table_of(trained))
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    printed, err = capsys.readouterr()
    assert printed == ""
    assert f"wrote {out}" in err
    assert main(["runs", str(trained), "--sort", "loss", "--reverse"]) == 0
    order = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert order == [run.name for run in table_of(trained).sorted_by("loss", reverse=True).runs]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--format", "excel"], 2, "--format: 'excel' is none of table, csv, html"),
        (["--picture", "x.gif"], 2, "--picture: x.gif: name a file that ends in .png or .svg"),
        (["--sort", "beauty"], 2, "--sort: beauty is no column of this table"),
        (["--out", "/dev/null/x.csv"], 3, "/dev/null is not a folder"),
        (["--out", "."], 2, "--out: .: a folder; name a file in it"),
        (["--out", "x.xlsx"], 2, "x.xlsx: .xlsx does not say which format it is to have; write --format"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    options: list[str], code: int, words: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", str(trained), *options]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err


def test_the_table_needs_no_torch(trained: Path) -> None:
    program = (
        f"import sys; from ttt_cli.main import main; code = main(['runs', {str(trained)!r}])\n"
        "print(code, sorted({'torch', 'moshi', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr.splitlines()[-1] == "0 []"


def test_a_folder_that_may_not_be_read_is_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, scan = here / "failed", os.scandir

    def refuse(path: Any) -> Any:  # root may read everything
        if Path(path) in (closed, closed / "checkpoints"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("ttt.runs.finding.os.scandir", refuse)
    (left_out,) = table_of(here).left_out
    assert str(left_out) == f"{closed}: left out: cannot be read: Permission denied"
    with pytest.raises(EnvironmentProblem, match="failed: cannot be read: Permission denied"):
        table_of(closed)


def test_settings_of_lora_are_of_runs_that_have_it() -> None:
    def of(adapter: str, rank: int) -> dict[str, Any]:
        return {"backbone": {"name": "toy"}, "adapter": adapter, "lora": {"rank": rank, "scaling": 2.0}}

    assert differing([of("ttt", 64), of("lora", 8)]) == {"adapter": ["ttt", "lora"]}
    found = differing([of("ttt", 64), of("lora", 8), of("ttt+lora", 16)])
    assert found == {"adapter": ["ttt", "lora", "ttt+lora"], "lora.rank": [ABSENT, 8, 16]}
