"""What a plugin brings beside a backbone: rules, loggers, evaluation tasks, the import of another program's config.

Each is really installed and acts through the real commands. Wrong ones are told, and nothing else suffers from them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_distributions import importable, install

from ttt import plugins
from ttt.check import check_config, load_config
from ttt.check.doctor import examine
from ttt.config import EvalConfig, RunConfig, dump_config
from ttt.errors import ConfigError, PluginError
from ttt.plugins import registry
from ttt.plugins.hookspecs import BACKBONES, CONFIG_IMPORTS, EVAL_TASKS, KINDS, LOGGERS, RULES, Kind
from ttt.plugins.installed_tasks import chosen_tasks
from ttt.train.loggers import Loggers
from ttt.train.metrics import read_metrics
from ttt_cli.main import main

TOY = """\
from toy import ToyBackbone

import ttt

@ttt.hookimpl
def ttt_backbone():
    return ToyBackbone()
"""
HOUSE_RULE = """\
from ttt.config import Code, Severity
from ttt.plugins import hookimpl, rule

LAB101 = Code("LAB101", "a batch too large for this lab", Severity.ERROR, home=__name__)

@rule(LAB101, reads=("train.batch_size",))
def small_batches(config):
    if config.train.batch_size > 2:
        yield LAB101.at("train.batch_size", "batches of more than 2 windows are too large for this lab", "write 2")

@hookimpl
def ttt_rules(backbone):
    return [small_batches] if backbone != "videodit" else []
"""
HOUSE_RULE_EXPLAINED = """\
LAB101:
  what: "`train.batch_size` is above 2."
  why: The lab's GPUs are small.
  bad: |
    train: {batch_size: 3}
  good: |
    train: {batch_size: 2}
  source: the lab
"""
LOGGER = """\
import json
from ttt.plugins import hookimpl

class Lines:
    def __init__(self, file, first_step):
        self.file = open(file, "a")
        self.file.write(f"from {first_step}\\n")

    def log(self, line):
        self.file.write(json.dumps(line) + "\\n")
        line.clear()  # it is the logger's own copy
        line["layers"] = None

    def close(self):
        self.file.write("closed\\n")
        self.file.close()

@hookimpl
def ttt_loggers(run_dir, first_step, config):
    return Lines(run_dir / f"{config.backbone.name}.log", first_step)
"""
TASK = """\
from typing import Annotated

import torch
from pydantic import Field
from ttt.adapter import gates_closed
from ttt.config import TaskOptions
from ttt.plugins import EvalTask, hookimpl

class WordsOptions(TaskOptions):
    windows: Annotated[int, Field(ge=1)] = 1

class Words(EvalTask):
    name = "words"
    options = WordsOptions

    def run(self, context, options):
        assert not context.model.training and not torch.is_grad_enabled()
        samples = [context.dataset[index] for index in range(options.windows)]
        batch = context.dataset.collate(samples)
        loss = context.backbone.loss(context.model, batch, context.config).loss
        with gates_closed(context.model):
            closed = context.backbone.loss(context.model, batch, context.config).loss
        context.model.train()  # the run puts it back
        return {"loss": loss, "gain,none": float(closed - loss), "step": context.step, "drawn": torch.rand(())}

@hookimpl
def ttt_eval_tasks():
    return [Words()]
"""
ITEM_TASK = """\
from ttt.eval.items import Item, Measured
from ttt.eval.tasks import ItemOptions, ItemTask
from ttt.plugins import hookimpl

class Lines(ItemTask):
    name = "lines"
    requires = ()

    def items(self, setup):
        return [Item(line, line, line, {"first": line[0]}) for line in setup.data.read_text().split()]

    def measure(self, bench, items):
        closed = 0.5 if bench.arm == "closed" else 1.0
        return [Measured({"letters": closed * len(item.id)}) for item in items]

    def values(self, setup, item, numbers):
        return {"letters": numbers["letters"]}

@hookimpl
def ttt_eval_tasks():
    return [Lines()]
"""
IMPORT = """\
from ttt.config.source import parse_source
from ttt.plugins import Import, hookimpl

@hookimpl
def ttt_import_config(file, text):
    source = parse_source(text, file=file)
    if "toynet" not in source.data:
        return None
    moving = Import(source, "toynet")
    moving.add("backbone.name", "moshi", "whose config it is")
    moving.move("rate", "train.lr")
    moving.drop("toynet", "its mark")
    return moving.done()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where distributions are installed; the working folder is another one, and empty."""
    installed, work = tmp_path / "installed", tmp_path / "work"
    installed.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    with importable(installed):
        yield installed


def bring(folder: Path, kind: Kind, source: str, *, name: str = "lab", **more: Any) -> None:
    """Install a distribution, lab-… 1.2, that brings one kind of thing."""
    install(folder, name, f"{name}_plugin", source, distribution=f"lab-{name}", groups=[kind.group], **more)
    if 'Code("LAB101"' in source:
        (folder / f"{name}_plugin.yaml").write_text(HOUSE_RULE_EXPLAINED)
    plugins.forget()


def moshi(text: str = "") -> str:
    Path("c.yaml").write_text(f"backbone: {{name: moshi}}\nttt: {{layers: [1]}}\n{text}")
    return "c.yaml"


def run_toy(folder: Path, text: str = "", *options: str, steps: int = 2) -> tuple[int, Path]:
    """`ttt train` of the toy: the exit code and the run's folder."""
    if not (folder / "toy_plugin.py").exists():
        bring(folder, BACKBONES, TOY, name="toy")
    Path("toy.yaml").write_text(
        f"backbone: {{name: toy}}\nttt: {{layers: [1]}}\ntrain: {{max_steps: {steps}, device: cpu}}\n"
        f"run_dir: run\n{text or 'eval: {max_batches: 1}'}\n"
    )
    return main(["train", "toy.yaml", *options]), Path("run")


# --- rules ---


def test_a_plugin_of_a_rule_alone_acts_in_a_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bring(folder, RULES, HOUSE_RULE)
    assert main(["check", moshi("train:\n  batch_size: 4\n")]) == 1
    out = capsys.readouterr().out
    assert "c.yaml:4:15  error LAB101  batches of more than 2 windows are too large for this lab" in out
    assert main(["check", moshi("train:\n  batch_size: 2\n")]) == 0
    assert main(["check", moshi("train:\n  batch_size: 4\n"), "--ignore", "LAB"]) == 0
    Path("v.yaml").write_text("backbone: {name: videodit, preset: demo}\ntrain: {batch_size: 4}\n")
    assert "LAB101" not in {finding.code for finding in check_config("v.yaml").findings}  # it is not for this backbone


def test_the_codes_of_house_rules_are_explained_and_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bring(folder, RULES, HOUSE_RULE)
    bring(folder, RULES, HOUSE_RULE.replace("LAB", "LBA"), name="untold")
    assert main(["check", "--explain", "LAB101"]) == 0
    assert "LAB101  error  a batch too large for this lab\n\n`train.batch_size` is above 2." in capsys.readouterr().out
    assert main(["check", "--list"]) == 0
    assert "The plugin lab\n  LAB101  error    a batch too large for this lab" in capsys.readouterr().out


def test_house_rules_of_one_name_are_all_explained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bring(folder, RULES, HOUSE_RULE)
    other = HOUSE_RULE.replace("LAB101", "LBA101")
    install(folder, "lab", "other_plugin", other, distribution="another-lab", groups=[RULES.group])
    (folder / "other_plugin.yaml").write_text(HOUSE_RULE_EXPLAINED.replace("LAB101", "LBA101"))
    plugins.forget()
    for code in ("LAB101", "LBA101"):
        assert main(["check", "--explain", code]) == 0, capsys.readouterr().err


def test_a_house_rule_stops_a_run_and_no_examination_of_a_backbone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bring(folder, RULES, HOUSE_RULE.replace("> 2", "> 0"))
    assert run_toy(folder)[0] == 2
    assert "error LAB101" in capsys.readouterr().err
    assert main(["plugins"]) == 0  # presets are the backbone's, not the lab's


WRONG_RULES = {
    "raises at import": ("import nobody_has_this\n", "TTT802", "is broken: ModuleNotFoundError: No module named"),
    "misspelt": (
        HOUSE_RULE.replace("def ttt_rules", "def ttt_rule"),
        "TTT802",
        r"unknown hook 'ttt_rule'; did you mean `ttt_rules`\?",
    ),
    "unmarked": (HOUSE_RULE.replace("@hookimpl", ""), "TTT802", "mark the function with @ttt.hookimpl"),
    "a parameter that is none": (
        HOUSE_RULE.replace("def ttt_rules(backbone)", "def ttt_rules(config, backbone)"),
        "TTT802",
        "{'config'} are declared in the hookimpl but can not be found in the hookspec",
    ),
    "a parameter with a default": (
        HOUSE_RULE.replace("def ttt_rules(backbone)", "def ttt_rules(backbone=None)"),
        "TTT802",
        "`ttt_rules` would never get its `backbone`; write it as a parameter without a default",
    ),
    "a wrapper": (HOUSE_RULE.replace("@hookimpl", "@hookimpl(wrapper=True)"), "TTT802", "wraps what other plugins"),
    "raises": (
        HOUSE_RULE.replace("return [", "return 1 / 0 or ["),
        "TTT803",
        r"failed in `ttt_rules`, \S*wrong_plugin\.py:\d+: ZeroDivisionError",
    ),
    "one rule": (
        HOUSE_RULE.replace("return [small_batches]", "return small_batches"),
        "TTT803",
        r"failed in `ttt_rules`, \S*wrong_plugin\.py:\d+: it returned a Rule, not a sequence of Rule",
    ),
    "functions": (
        HOUSE_RULE.replace("return [small_batches]", "return [small_batches.check]"),
        "TTT803",
        "it returned a function as number 0, not of type Rule",
    ),
    "a rule without a code": (
        HOUSE_RULE.replace("return [small_batches]", "return [type(small_batches)(small_batches.check, ())]"),
        "TTT803",
        "it returned the rule small_batches without a code; make it with ttt.plugins.rule",
    ),
    "a code of the core": (
        HOUSE_RULE.replace('"LAB101"', '"TTT101"'),
        "TTT803",
        "it returned the rule small_batches with the core's code TTT101; write letters of its own, as LAB101",
    ),
    "a code that it does not declare": (
        HOUSE_RULE.replace("yield LAB101", 'yield Code("LAB102", "x", Severity.NOTE)'),
        "TTT803",
        "its rule small_batches, .*: it returned a Finding of the code LAB102, and declares LAB101 alone",
    ),
    "a key that no config has": (
        HOUSE_RULE.replace('"train.batch_size",)', '"train.batchsize",)'),
        "TTT803",
        r"has the rule small_batches, which reads 'train\.batchsize', a key that no config has; did you mean train\.b",
    ),
    "a rule that raises": (
        HOUSE_RULE.replace("> 2", "> config.train.none"),
        "TTT803",
        r"failed in its rule small_batches, \S*wrong_plugin\.py:\d+: AttributeError",
    ),
    "a rule of texts": (
        HOUSE_RULE.replace("yield LAB101.at", "yield dict(a=1) or"),
        "TTT803",
        "its rule small_batches, .*: it returned dict, not Finding",
    ),
    "a rule that exits": (
        HOUSE_RULE.replace("if config.train.batch_size > 2:", "raise SystemExit(0)\n    if True:"),
        "TTT803",
        r"failed in its rule small_batches, \S*wrong_plugin\.py:\d+: SystemExit: 0",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_RULES)
def test_wrong_rules_are_a_finding_and_the_others_are_asked(folder: Path, wrong: str) -> None:
    source, code, told = WRONG_RULES[wrong]
    bring(folder, RULES, HOUSE_RULE, name="good")
    bring(folder, RULES, source, name="wrong")
    findings = check_config("c.yaml", text="backbone: {name: moshi}\ntrain: {batch_size: 4}\n").findings
    by_code = {finding.code: finding for finding in findings}
    assert {"LAB101", code} <= set(by_code)
    message = by_code[code].message
    assert message.startswith("the plugin wrong (lab-wrong 1.2) ")
    assert re.search(told, message), message
    assert "\n" not in message
    assert str(by_code[code].place).startswith("c.yaml")


# --- loggers ---


def test_a_plugin_of_a_logger_alone_gets_every_line(folder: Path) -> None:
    bring(folder, LOGGERS, LOGGER)
    code, run = run_toy(folder)
    assert code == 0
    first, *lines, last = (run / "toy.log").read_text().splitlines()
    assert (first, last) == ("from 1", "closed")
    assert [json.loads(line) for line in lines] == read_metrics(run / "metrics.jsonl")
    assert "layers" in json.loads((run / "summary.json").read_text())  # what a logger does to its line is its own
    assert run_toy(folder, "", "--resume", steps=3)[0] == 0
    assert (run / "toy.log").read_text().splitlines()[len(lines) + 2] == "from 3"


WRONG_LOGGERS = {
    "raises at import": ("import nobody_has_this\n", r"is broken: ModuleNotFoundError"),
    "misspelt": (LOGGER.replace("def ttt_loggers", "def ttt_loger"), "is broken: unknown hook 'ttt_loger'; did you"),
    "raises": (LOGGER.replace("return Lines(", "raise KeyError("), r"failed in `ttt_loggers`, \S*:\d+: KeyError"),
    "no logger": (
        LOGGER.replace("return Lines(run_dir", "return str(run_dir").replace('log", first_step)', 'log")'),
        "failed in .*: it returned a str, not a Logger",
    ),
    "a class": (
        LOGGER.split("    return Lines(")[0] + "    return Lines\n",
        r"it returned the class Lines, not a Logger, which has `log\(line\)` and `close\(\)`",
    ),
    "refuses": (
        LOGGER.replace(
            "    return Lines(", "    raise __import__('ttt').errors.UsageError('log in first')\n    return Lines("
        ),
        r"^warning: the plugin wrong \(lab-wrong 1\.2\): log in first; the run goes on$",
    ),
    "fails in a line": (
        LOGGER.replace("self.file.write(json", "1 / 0 or self.file.write(json"),
        r"failed in `log` of its logger, \S*wrong_plugin\.py:\d+: ZeroDivisionError: division by zero; the run goes",
    ),
    "exits in a line": (
        LOGGER.replace("self.file.write(json", "exit(3) or self.file.write(json"),
        r"failed in `log` of its logger, \S*wrong_plugin\.py:\d+: SystemExit: 3; the run goes",
    ),
    "takes no line": (
        LOGGER.replace("def log(self, line)", "def log(self)"),
        r"failed in `log` of its logger, \S*wrong_plugin\.py:\d+: TypeError",
    ),
    "fails at the end": (
        LOGGER.replace("self.file.close()", "self.file.close()\n        raise OSError(28, 'No space left on device')"),
        r"failed in `close` of its logger, \S*wrong_plugin\.py:\d+: OSError",
    ),
}


RUN = RunConfig.model_validate({"backbone": {"name": "toy"}, "data": {}})


@pytest.mark.parametrize("wrong", WRONG_LOGGERS)
def test_a_wrong_logger_is_told_once_and_the_others_go_on(folder: Path, wrong: str) -> None:
    source, told = WRONG_LOGGERS[wrong]
    bring(folder, LOGGERS, LOGGER.replace('.log"', '.good"'), name="good")
    bring(folder, LOGGERS, source, name="wrong")
    warnings: list[str] = []
    with contextlib.closing(Loggers(RUN, Path(), first_step=1, warn=warnings.append)) as loggers:
        for step in (1, 2):
            loggers.log({"step": step, "loss": 2.0})
    assert Path("toy.good").read_text().splitlines() == [
        "from 1", *(json.dumps({"step": step, "loss": 2.0}) for step in (1, 2)), "closed",
    ]  # fmt: skip
    (warning,) = warnings
    assert warning.startswith("warning: the plugin wrong (lab-wrong 1.2)")
    assert re.search(told, warning), warning
    assert "\n" not in warning


def test_a_run_goes_on_without_its_loggers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, wrong in enumerate(("raises at import", "raises", "fails in a line")):
        bring(folder, LOGGERS, WRONG_LOGGERS[wrong][0], name=f"wrong{number}")
    code, run = run_toy(folder)
    assert code == 0
    assert len(read_metrics(run / "metrics.jsonl")) == 2
    out = capsys.readouterr().out
    assert [re.findall(r"^warning: the plugin (\w+)", out, re.MULTILINE)] == [["wrong0", "wrong1", "wrong2"]]


# --- evaluation tasks ---

CHOSEN = "eval: {max_batches: 1, eval_freq: 1, tasks: [{name: words, windows: 2}]}"


def test_a_plugin_of_a_task_alone_is_measured_at_each_evaluation(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    bring(folder, EVAL_TASKS, TASK)
    bring(folder, LOGGERS, LOGGER, name="lines")
    code, run = run_toy(folder, CHOSEN)
    assert code == 0
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["words/step"] for line in lines] == [1, 2]
    keys = {"words/loss", "words/gain,none", "words/step", "words/drawn"}
    assert all(keys <= set(line) for line in lines)
    assert lines[0]["words/drawn"] == lines[1]["words/drawn"]  # seeded by the run and the task alone
    assert lines[0]["words/loss"] != lines[1]["words/loss"]
    summary = json.loads((run / "summary.json").read_text())
    assert {key: summary[key] for key in keys} == {key: lines[-1][key] for key in keys}
    assert '"words/loss": ' in (run / "toy.log").read_text()
    events = event_accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert keys <= set(events.Tags()["scalars"])
    out = capsys.readouterr().out
    assert re.search(r"^step 1: words: loss [\d.]+, gain,none \S+, step 1, drawn", out, re.MULTILINE)
    assert re.search(r"^words: loss [\d.]+, gain,none \S+, step 2, drawn", out, re.MULTILINE)
    assert "tasks: [{name: words, windows: 2}]" in (run / "config.yaml").read_text()
    assert run_toy(folder, "eval: {max_batches: 1, tasks: []}", "--resume", steps=3)[0] == 0  # it may go
    assert "words/loss" not in read_metrics(run / "metrics.jsonl")[-1]


def test_a_task_changes_nothing_of_the_training(folder: Path) -> None:
    bring(folder, EVAL_TASKS, TASK)
    losses = []
    for name, evaluated in (("with", CHOSEN), ("without", "eval: {max_batches: 1}")):
        code, _ = run_toy(folder, evaluated, "--set", f"run_dir={name}", steps=3)
        assert code == 0
        losses.append([line["loss"] for line in read_metrics(Path(name) / "metrics.jsonl")])
    assert losses[0] == losses[1]


MISTAKEN = {
    "unknown": (
        "{name: wrods}",
        ("TTT103", "eval.tasks.0.name", "no installed plugin brings a task 'wrods'", "write `words`"),
        "c.yaml:3:23",
    ),
    "unknown, and like none": (
        "{name: stories}",
        ("TTT103", "eval.tasks.0.name", "no installed plugin brings a task 'stories'",
         "`words`, or install its plugin"),
        "c.yaml:3:23",
    ),
    "an unknown option": (
        "{name: words, window: 3}",
        ("TTT101", "eval.tasks.0.window", "unknown key `window` in `eval.tasks.0`", "write `windows`"),
        "c.yaml:3:30",
    ),
    "an option of the wrong type": (
        "{name: words, windows: many}",
        ("TTT102", "eval.tasks.0.windows", "`eval.tasks.0.windows` must be a whole number, not 'many'", ""),
        "c.yaml:3:39",
    ),
    "an option out of its range": (
        "{name: words, windows: 0}",
        ("TTT103", "eval.tasks.0.windows", "`eval.tasks.0.windows` must be at least 1, not 0", ""),
        "c.yaml:3:39",
    ),
    "twice": (
        "{name: words}, {name: words}",
        ("TTT106", "eval.tasks.1.name", "the task `words` stands in `eval.tasks` already", "leave one of them out"),
        "c.yaml:3:38",
    ),
    "a word": ("words", ("TTT102", "eval.tasks.0", "`eval.tasks.0` must be a section", ""), "c.yaml:3:16"),
    "without a name": (
        "{windows: 2}", ("TTT104", "eval.tasks.0.name", "`eval.tasks.0.name` is missing", "write `name: …`"),
        "c.yaml:3:16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKEN)
def test_the_options_of_a_task_are_checked_with_their_places(folder: Path, mistake: str) -> None:
    bring(folder, EVAL_TASKS, TASK)
    written, (code, path, message, fix), place = MISTAKEN[mistake]
    text = f"backbone: {{name: moshi}}\ntrain: {{max_steps: 3}}\neval: {{tasks: [{written}]}}\n"
    findings = check_config("c.yaml", text=text).findings
    (finding,) = [found for found in findings if found.path.startswith("eval.tasks")]
    assert (finding.code, finding.path) == (code, path)
    assert finding.message.startswith(message)
    assert fix in finding.fix
    assert str(finding.place) == place


@pytest.mark.parametrize(
    ("error", "code", "fix"),
    [
        ("UsageError('no licence', fix='write windows: 1')", "TTT106", "write windows: 1"),
        ("EnvironmentProblem('no licence')", "TTT605", ""),
        ("PluginError('no licence')", "TTT803", "tell who made it"),
    ],
)
def test_what_the_options_of_a_task_refuse_is_a_finding(folder: Path, error: str, code: str, fix: str) -> None:
    validator = (
        "    @__import__('pydantic').model_validator(mode='after')\n"
        f"    def _licensed(self):\n        raise __import__('ttt').errors.{error}\n\n"
    )
    bring(folder, EVAL_TASKS, TASK.replace("class Words(EvalTask)", f"{validator}class Words(EvalTask)"))
    text = "backbone: {name: moshi}\ntrain: {max_steps: 3}\neval: {tasks: [{name: words}]}\n"
    (finding,) = [each for each in check_config("c.yaml", text=text).findings if each.path.startswith("eval.tasks")]
    assert (finding.code, finding.message, str(finding.place)) == (code, "no licence", "c.yaml:3:23")
    assert finding.fix.startswith(fix)


def test_a_misspelt_task_can_be_fixed_and_a_sample_needs_no_task(folder: Path) -> None:
    bring(folder, EVAL_TASKS, TASK)
    config = moshi("eval:\n  tasks: [{name: wrods}]\n")
    assert main(["check", config, "--fix", "--write"]) == 0
    assert "tasks: [{name: words}]" in Path(config).read_text()
    loaded = load_config(config).config
    assert type(loaded.eval.tasks[0]).__name__ == "WordsOptions"
    assert loaded.model_dump()["eval"]["tasks"] == ({"name": "words", "windows": 1},)
    assert load_config("c.yaml", text=dump_config(loaded)).config == loaded
    plugins.forget()
    (folder / "lab_plugin.py").unlink()
    sys.modules.pop("lab_plugin")
    assert load_config(config, training=False).config.eval.tasks[0].name == "words"
    with pytest.raises(ConfigError, match="TTT802"):
        load_config(config)


def test_tasks_of_a_config_made_in_python_are_looked_up_too(folder: Path) -> None:
    bring(folder, EVAL_TASKS, TASK)

    def chosen(*tasks: dict[str, Any]) -> Any:
        return chosen_tasks(RUN.model_copy(update={"eval": EvalConfig.model_validate({"tasks": list(tasks)})}))

    (task,) = chosen({"name": "words", "windows": 3})
    assert (task.task.name, task.options.windows) == ("words", 3)
    with pytest.raises(ConfigError, match=r"eval\.tasks\.words\.windows: Input should be"):
        chosen({"name": "words", "windows": 0})
    with pytest.raises(ConfigError, match=r"no installed plugin brings a task 'stories'; write .*, `words`, or"):
        chosen({"name": "stories"})
    bring(folder, EVAL_TASKS, "import nobody_has_this\n", name="broken")
    with pytest.raises(PluginError, match=r"the plugin broken \(lab-broken 1\.2\) is broken: ModuleNotFoundError"):
        chosen({"name": "stories"})
    assert chosen({"name": "words"})  # the broken one is none of this config's


WRONG_TASKS = {
    "raises at import": ("import nobody_has_this\n", "TTT802", "is broken: ModuleNotFoundError"),
    "misspelt": (TASK.replace("def ttt_eval_tasks", "def ttt_evaltasks"), "TTT802", "did you mean `ttt_eval_tasks`"),
    "raises": (
        TASK.replace("return [Words()]", "raise KeyError(1)"),
        "TTT803",
        r"`ttt_eval_tasks`, \S*:\d+: KeyError",
    ),
    "one task": (TASK.replace("return [Words()]", "return Words()"), "TTT803", "returned a Words, not a sequence of"),
    "a class": (TASK.replace("return [Words()]", "return [Words]"), "TTT803", "as number 0, not of type AnyEvalTask"),
    "a name with a slash": (TASK.replace('"words"', '"words/all"'), "TTT803", "a task whose name is 'words/all'"),
    "options of another kind": (TASK.replace("options = W", "options = dict  # W"), "TTT803", "not a subclass of Task"),
    "options that fail": (
        TASK.replace("class Words(", "WordsOptions = None\n\nclass Words(").replace("options = Wo", "options = O  # "),
        "TTT802",
        "NameError: name 'O' is not defined",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_TASKS)
def test_a_wrong_plugin_of_tasks_is_a_finding_where_a_task_is_missing(folder: Path, wrong: str) -> None:
    source, code, told = WRONG_TASKS[wrong]
    bring(folder, EVAL_TASKS, TASK.replace('"words"', '"good"'), name="good")
    bring(folder, EVAL_TASKS, source, name="wrong")
    text = "backbone: {{name: moshi}}\neval: {{tasks: [{{name: {}}}]}}\n"
    (finding,) = [f for f in check_config("c.yaml", text=text.format("words")).findings if f.path.startswith("eval.t")]
    assert finding.code == code
    assert re.search(rf"^the plugin wrong \(lab-wrong 1\.2\) .*{told}", finding.message), finding.message
    assert not {"TTT802", "TTT803"} & {
        found.code for found in check_config("c.yaml", text=text.format("good")).findings
    }


def test_a_task_of_two_plugins_is_nobodys(folder: Path) -> None:
    bring(folder, EVAL_TASKS, TASK)
    bring(folder, EVAL_TASKS, TASK, name="other")
    findings = check_config("c.yaml", text="backbone: {name: moshi}\neval: {tasks: [{name: words}]}\n").findings
    (told,) = [finding.message for finding in findings if finding.code == "TTT802"]
    assert told == "the task 'words' is claimed more than once: lab-lab, lab-other; uninstall all but one"


MEASURED_WRONGLY = {
    "raises": (
        "raise RuntimeError('no words')",
        r"`run` of its task raises, \S*wrong_plugin\.py:\d+: RuntimeError: no",
    ),
    "refuses": (
        "raise EnvironmentProblem('words.csv: no such file')",
        r"\(lab-wrong 1\.2\): words\.csv: no such file",
    ),
    "no_memory": ("raise MemoryError", "MemoryError"),
    "exits": ("raise SystemExit(0)", "SystemExit: 0"),
    "one_number": ("return 0.5", "it returned a float, not a mapping of names to numbers"),
    "a_tensor": ("return {'acc': context.model}", r"it returned for acc a \w+, not one number"),
    "a_flag": ("return {'acc': True}", "it returned for acc a bool, not one number"),
    "a_path": ("return {'words/acc': 1.0}", "it returned a number called 'words/acc'"),
}


def test_a_task_that_fails_is_told_and_the_others_are_measured(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = MEASURED_WRONGLY
    source = "from ttt.errors import EnvironmentProblem\nfrom ttt.plugins import EvalTask, hookimpl\n"
    for name, (line, _) in wrong.items():
        source += (
            f"class {name}(EvalTask):\n    name = '{name}'\n    def run(self, context, options):\n        {line}\n"
        )
    source += f"@hookimpl\ndef ttt_eval_tasks():\n    return [{', '.join(f'{name}()' for name in wrong)}]\n"
    bring(folder, EVAL_TASKS, source, name="wrong")
    bring(folder, EVAL_TASKS, TASK)
    chosen = ", ".join(f"{{name: {name}}}" for name in (*wrong, "words"))
    code, run = run_toy(folder, f"eval: {{max_batches: 1, tasks: [{chosen}]}}", steps=1)
    assert code == 0
    out = " ".join(capsys.readouterr().out.split())
    for name, (_, told) in wrong.items():
        (warning,) = re.findall(rf"warning: step 1: the task {name} has no numbers \((.*?)\); the run goes on", out)
        assert "the plugin wrong (lab-wrong 1.2)" in warning
        assert re.search(told, warning), warning
    (line,) = read_metrics(run / "metrics.jsonl")
    assert {key.split("/")[0] for key in line if "/" in key} == {"words"}


def test_a_run_stopped_within_a_task_measures_anew_when_it_goes_on(folder: Path) -> None:
    stopping = "import os, signal, pathlib\n        if not pathlib.Path('stopped').exists():\n            "
    stopping += "pathlib.Path('stopped').touch()\n            os.kill(os.getpid(), signal.SIGTERM)\n"
    stopping += "            assert context.stop()\n            return {}\n        samples = "
    bring(folder, EVAL_TASKS, TASK.replace("samples = ", stopping))
    code, run = run_toy(folder, CHOSEN)
    assert code == 130
    assert read_metrics(run / "metrics.jsonl") == []
    assert main(["train", "run/config.yaml", "--resume"]) == 0
    assert [line["words/step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2]


def test_a_task_of_items_is_measured_by_ttt_eval_and_in_a_run(folder: Path) -> None:
    bring(folder, EVAL_TASKS, ITEM_TASK)
    Path("lines.txt").write_text("ab abcd b")
    code, run = run_toy(folder, "eval: {max_batches: 1, tasks: [{name: lines, data: lines.txt}]}", steps=1)
    assert code == 0
    (line,) = read_metrics(run / "metrics.jsonl")
    assert (line["lines/letters"], line["lines/letters_closed"]) == (7 / 3, 7 / 6)
    assert main(["eval", "run"]) == 0
    (results,) = Path("run/eval").glob("*/results.json")
    found = json.loads(results.read_text())
    assert found["results"]["lines"]["letters,ttt-closed"] == pytest.approx(7 / 6)
    assert found["parts"]["lines"]["first=b,none"] == 1
    assert found["versions"] == {"lines": 1}


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("next(bench.model.parameters()).add_(1)", 3, "of the plugin lab (lab-lab 1.2) changed the weight"),
        ("raise RuntimeError('no lines')", 1, "lines: 3 of 3 items failed"),
        ("return [1, 2]", 3, "not a Measured for each of"),
    ],
)
def test_a_task_of_items_that_is_wrong_is_told_by_ttt_eval(
    folder: Path, line: str, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bring(folder, EVAL_TASKS, ITEM_TASK.replace("closed = 0.5", f"{line}\n        closed = 0.5"))
    Path("lines.txt").write_text("ab abcd b")
    text = "backbone: {name: toy}\nttt: {layers: [1], mini_batch_size: 4}\n"
    Path("c.yaml").write_text(f"{text}eval: {{tasks: [{{name: lines, data: lines.txt}}]}}\n")
    bring(folder, BACKBONES, TOY, name="toy")
    assert main(["eval", "c.yaml", "--out", "out"]) == code
    assert told in " ".join(capsys.readouterr().err.split())
    assert Path("out/results.json").exists() == (code == 1)


def test_a_task_that_changes_a_weight_ends_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bring(
        folder, EVAL_TASKS, TASK.replace("samples = ", "next(context.model.parameters()).add_(1)\n        samples = ")
    )
    assert run_toy(folder, "eval: {max_batches: 1, tasks: [{name: words}]}", steps=1)[0] == 3
    told = " ".join(capsys.readouterr().err.split())
    assert re.search(r"the task words of the plugin lab \(lab-lab 1\.2\) changed the weight \S+, so the run", told)
    assert "go on from the last checkpoint with `ttt train run/config.yaml --resume`" in told
    bring(folder, EVAL_TASKS, TASK, name="sound")
    (folder / "lab_lab-1.2.dist-info" / "entry_points.txt").unlink()
    plugins.forget()
    assert main(["train", "run/config.yaml", "--resume"]) == 0


# --- the import of another program's config ---


def test_a_plugin_of_an_import_alone_reads_its_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bring(folder, CONFIG_IMPORTS, IMPORT)
    Path("old.yaml").write_text("toynet: 1\nrate: 0.5\nother: 2\n")
    assert main(["import-config", "old.yaml", "--out", "new.yaml"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("old.yaml (toynet)  →  new.yaml\n")
    assert re.search(r"^  rate → train\.lr: 0\.5$", out, re.MULTILINE)
    assert "no key of toynet that is known here" in out
    assert load_config("new.yaml").config.train.lr == 0.5
    assert main(["import-config", "old.yaml", "--backbone", "videodit"]) == 2
    told = capsys.readouterr().err
    assert "no installed plugin reads this file as a config for videodit (asked: lab, moshi, videodit)" in told
    assert main(["import-config", "old.yaml", "--backbone", "moshi"]) == 0


WRONG_IMPORTS = {
    "raises at import": ("import nobody_has_this\n", "is broken: ModuleNotFoundError"),
    "misspelt": (IMPORT.replace("def ttt_import_config", "def ttt_config_import"), "unknown hook 'ttt_config_import'"),
    "undeclared": (
        IMPORT + "@hookimpl\ndef ttt_loggers():\n    return None\n",
        "implements the hook `ttt_loggers`, but no entry point in the group ttt.loggers declares it; add one",
    ),
    "raises": (IMPORT.replace("source = ", "1 / 0; source = "), r"`ttt_import_config`, \S*:\d+: ZeroDivisionError"),
    "a dict": (
        IMPORT.replace("source = ", "return {}\n    source = "),
        "it returned a dict, not an ImportedConfig, or None where it does not know the file",
    ),
    **{
        name: (IMPORT.replace("source = ", f"import ttt.plugins.imported as p; return {made}\n    source = "), told)
        for name, made, told in (
            ("texts as values", "p.ImportedConfig('x', 'train', ())", "whose values are a str, not a mapping"),
            ("no format", "p.ImportedConfig(3, {}, ())", "whose format is an int, not a text"),
            ("texts as keys", "p.ImportedConfig('x', {}, ['train.lr'])", "it returned a str as number 0, not of type"),
            (
                "no such section",
                "p.ImportedConfig('x', {'trian.lr': 1}, [p.ImportedKey('lr', 'trian.lr')])",
                "an ImportedConfig with the key 'trian.lr', whose section no config has",
            ),
            (
                "a value from nowhere",
                "p.ImportedConfig('x', {'train.lr': 1}, ())",
                "with the value train.lr, and no ImportedKey says where it is from",
            ),
            (
                "a key without a value",
                "p.ImportedConfig('x', {}, [p.ImportedKey('lr', 'train.lr')])",
                "with an ImportedKey for 'train.lr', which has no value",
            ),
        )
    },
}


@pytest.mark.parametrize("wrong", WRONG_IMPORTS)
def test_a_wrong_import_is_told_and_the_others_are_asked(
    folder: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, told = WRONG_IMPORTS[wrong]
    bring(folder, CONFIG_IMPORTS, source, name="wrong")
    Path("old.yaml").write_text("moshi_paths: {}\n")
    load_config("c.yaml", text="backbone: {name: moshi}")  # moshi is asked last: the newest plugin is asked first
    assert main(["import-config", "old.yaml", "--out", "new.yaml"]) == 1  # it names no data
    assert Path("new.yaml").is_file()
    note = " ".join(capsys.readouterr().err.split())
    assert re.search(rf"^note: the plugin wrong \(lab-wrong 1\.2\) .*{told}", note), note
    Path("other.yaml").write_text("what: is this\n")
    assert main(["import-config", "other.yaml"]) == 3
    assert re.search(rf"the plugin wrong \(lab-wrong 1\.2\) .*{told}", " ".join(capsys.readouterr().err.split()))


# --- one manager ---

EVERYTHING = "\n".join(
    [
        "import toy\nCOUNT = getattr(toy, 'COUNT', 0) + 1\ntoy.COUNT = COUNT",
        *(TOY, HOUSE_RULE, LOGGER, TASK, IMPORT),
    ]
)


def test_a_module_in_many_groups_is_registered_once(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy

    monkeypatch.setattr(toy, "COUNT", 0, raising=False)
    install(folder, "toy", "toy_plugin", EVERYTHING, groups=[kind.group for kind in KINDS])
    (folder / "toy_plugin.yaml").write_text(HOUSE_RULE_EXPLAINED)
    plugins.forget()
    for kind, arguments in (
        (RULES, {"backbone": None}),
        (LOGGERS, {"config": RUN, "run_dir": Path(), "first_step": 1}),
        (EVAL_TASKS, {}),
        (CONFIG_IMPORTS, {"text": "toynet: 1", "file": "f.yaml"}),
    ):
        answers = registry.ask(kind, **arguments)
        (mine,) = [answer for answer in answers.given if answer.plugin.name == "toy"]
        if kind is LOGGERS:
            mine.value.close()
    assert plugins.get_backbone("toy").name == "toy"
    assert toy.COUNT == 1  # type: ignore[attr-defined]
    assert main(["plugins"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("toy ")]
    assert line.endswith("backbone (can stream), rules, import of configs, logger, evaluation tasks (words)")


TWO = """\
from toy import ToyBackbone, ToyOptions

import ttt

class LeftOptions(ToyOptions):
    name: str = "left"

class Left(ToyBackbone):
    name = "left"
    options = LeftOptions

@ttt.hookimpl
def ttt_backbone(name):
    return {"left": Left, "toy": ToyBackbone}[name]()
"""


def test_one_module_can_bring_two_backbones(folder: Path) -> None:
    install(folder, "left", "two_plugin", TWO, distribution="two")
    points = folder / "two-1.2.dist-info" / "entry_points.txt"
    points.write_text(points.read_text() + "toy = two_plugin\n")
    plugins.forget()
    assert [plugins.get_backbone(name).name for name in ("toy", "left")] == ["toy", "left"]


def test_what_is_declared_and_not_there_is_broken_in_every_group(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(folder, "toy", "toy_plugin", TOY, groups=[BACKBONES.group, RULES.group])
    plugins.forget()
    assert main(["plugins", "--json"]) == 1
    (found,) = [each for each in json.loads(capsys.readouterr().out) if each["name"] == "toy"]
    assert found["brings"] == ["ttt.backbones", "ttt.rules"]
    assert found["error"].startswith("toy_plugin implements no hook `ttt_rules`, which its entry point in the group")
    with pytest.raises(PluginError, match="no hook `ttt_rules`"):
        plugins.get_backbone("toy")


def test_every_kind_of_plugin_is_listed_working_or_broken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, source in ((RULES, HOUSE_RULE), (LOGGERS, LOGGER), (EVAL_TASKS, TASK), (CONFIG_IMPORTS, IMPORT)):
        bring(folder, kind, source, name=f"good{KINDS.index(kind)}")
    assert main(["plugins"]) == 0
    out = capsys.readouterr().out
    for kind in KINDS[1:]:
        number = KINDS.index(kind)
        assert re.search(
            rf"^good{number} +1\.2 +lab-good{number} \(good{number}_plugin\) +{kind.words}"
            rf"{' .words.' if kind is EVAL_TASKS else ''}$",
            out,
            re.MULTILINE,
        )
    assert re.search(
        r"^moshi .*  backbone \(can answer, precompute, index, read-data, stream, score, lora\), import of configs$",
        out,
        re.MULTILINE,
    )
    wrong = (
        (RULES, WRONG_RULES["raises"][0]),
        (LOGGERS, WRONG_LOGGERS["misspelt"][0]),
        (EVAL_TASKS, WRONG_TASKS["raises"][0]),
        (CONFIG_IMPORTS, WRONG_IMPORTS["raises at import"][0]),
    )
    for kind, source in wrong:
        bring(folder, kind, source, name=f"wrong{KINDS.index(kind)}")
    bring(folder, EVAL_TASKS, TASK, name="twin")
    bring(folder, RULES, HOUSE_RULE.replace("LAB", "LBA"), name="untold")
    bring(folder, RULES, WRONG_RULES["a key that no config has"][0], name="misread")
    assert main(["plugins", "--json"]) == 1
    found = {plugin["name"]: plugin for plugin in json.loads(capsys.readouterr().out)}
    broken = {name for name, plugin in found.items() if not plugin["works"]}
    assert broken == {
        "wrong1",
        "wrong2",
        "wrong3",
        "wrong4",
        "twin",
        "untold",
        "misread",
        f"good{KINDS.index(EVAL_TASKS)}",
    }
    assert "does not explain its codes: " in found["untold"]["error"]
    told = [problem.message for problem in examine().problems if " is broken: " in problem.message]
    assert {message.split()[2] for message in told} == {"wrong2", "wrong3"}  # those that cannot be loaded


def test_a_check_loads_what_its_config_needs_and_no_more(folder: Path) -> None:
    for kind, source in ((RULES, HOUSE_RULE), (LOGGERS, LOGGER), (EVAL_TASKS, TASK), (CONFIG_IMPORTS, IMPORT)):
        bring(folder, kind, source, name=kind.group.removeprefix("ttt."))
    loaded = []
    for text in ("", "eval: {tasks: [{name: words}]}\n"):
        program = (
            "import sys\nfrom ttt_cli.main import main\n"
            f"assert main(['check', {moshi(text)!r}]) in (0, 1)\n"
            "print(*(name for name in sys.modules if name.endswith('_plugin') or name in ('torch', 'ttt_videodit')))"
        )
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
        )
        loaded.append(set(done.stdout.splitlines()[-1].split()))
    assert loaded[0] == {"rules_plugin"}
    assert {"rules_plugin", "eval_tasks_plugin"} <= loaded[1]
    assert not {"loggers_plugin", "config_imports_plugin", "ttt_videodit"} & loaded[1]
