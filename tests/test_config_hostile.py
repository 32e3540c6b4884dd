"""Hostile configs: numbers that nobody means, thousands of findings, endless overrides, TOML that no parser ends."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import random
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_config import ToyBackbone
from typer.testing import CliRunner

from ttt import costs as costs_module
from ttt.check import CheckedConfig, check_config, load_config, render_json, render_text
from ttt.check.fixes import fix_text
from ttt.check.importing import import_config as ask
from ttt.check.importing import render_account, write_imported
from ttt.check.render import MOST_CHARACTERS, MOST_OF_A_KIND, render_github, shown
from ttt.check.sarif import render_sarif
from ttt.config import Finding
from ttt.config.dumping import dump_value
from ttt.config.findings import Place, Severity
from ttt.config.scalars import resolve
from ttt.config.source import MAX_IN_OVERRIDES, MAX_OVERRIDES, parse_source
from ttt.costs import best_group_size
from ttt.errors import ConfigError, UsageError
from ttt.plugins import get_backbone, run_config_model
from ttt_cli.app import app
from ttt_cli.main import main
from ttt_videodit.importing import import_config as import_toml
from ttt_videodit.toml_files import MAX_BYTES as MOST_TOML

MOSHI, VIDEODIT = get_backbone("moshi"), get_backbone("videodit")
PRESETS = ((MOSHI, "demo"), (VIDEODIT, "demo"), (VIDEODIT, "63s"))
NUMBERS = (0, -1, 1, 2**31, 2**63, 10**22, 10**400, 1e308, 1e-308, math.inf, math.nan, True, "1e5")
STEPS = 3_000_000
"""Lines of the rules that one config may run, a second or so; a good one runs some thousands."""
HUGE = 10**22


class _TooLong(BaseException):
    """Not an `Exception`, so that nothing swallows it."""


@contextlib.contextmanager
def _steps_limited() -> Iterator[None]:
    """Refuse more than `STEPS` lines of this project's checker: loops end, on any machine."""
    left = STEPS

    def count(frame: types.FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= event == "line"
        if left < 0:
            raise _TooLong(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return count

    def enter(frame: types.FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        return count if name.endswith("estimate.py") or "/rules/" in name else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def _number_fields(backbone: Any) -> Iterator[tuple[str, str, Any]]:
    """Every option that takes a number: section, name, annotation with its bounds."""
    for section, info in run_config_model(backbone).model_fields.items():
        if isinstance(info.annotation, type) and hasattr(info.annotation, "model_fields"):
            for name, field in info.annotation.model_fields.items():
                kinds = [kind for kind, _ in _numbers(field.annotation, tuple(field.metadata))]
                if kinds:
                    yield section, name, field


def _numbers(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterator[tuple[type, tuple[Any, ...]]]:
    """The number types in an annotation, each with the constraints on it."""
    if annotation in (int, float):
        yield annotation, metadata
    elif typing.get_origin(annotation) is typing.Annotated:
        inside = [getattr(item, "metadata", [item]) for item in annotation.__metadata__]  # of a pydantic `Field`
        yield from _numbers(typing.get_args(annotation)[0], (*metadata, *itertools.chain(*inside)))
    elif typing.get_origin(annotation) is not typing.Literal:
        inner = () if typing.get_origin(annotation) is tuple else metadata
        for argument in typing.get_args(annotation):
            yield from _numbers(argument, inner)


def _most(metadata: tuple[Any, ...]) -> float | None:
    bounds = [bound for item in metadata for name in ("le", "lt") if (bound := getattr(item, name, None)) is not None]
    return min(bounds, default=None)


def _check(data: dict[str, Any], backbone: Any) -> CheckedConfig:
    text = "".join(
        f"{section}: {{{', '.join(f'{key}: {dump_value(value)}' for key, value in keys.items())}}}\n"
        if isinstance(keys, dict)
        else f"{section}: {dump_value(keys)}\n"
        for section, keys in data.items()
    )
    with _steps_limited():
        checked = check_config("c.yaml", text=text, backbone=backbone, memory=80 << 30, cost=True)
    render_text(checked.findings)
    json.loads(render_json(checked.findings))
    assert not [finding for finding in checked.findings if finding.code in ("TTT802", "TTT803")]
    return checked


# --- numbers ---


@pytest.mark.parametrize("backbone", [MOSHI, VIDEODIT], ids=lambda backbone: backbone.name)
def test_every_number_has_a_bound_on_either_side(backbone: Any) -> None:
    fields = list(_number_fields(backbone))
    assert len(fields) > 35
    for section, name, field in fields:
        for _, metadata in _numbers(field.annotation, tuple(field.metadata)):
            bounds = {bound for item in metadata for bound in ("ge", "gt", "le", "lt") if hasattr(item, bound)}
            assert bounds & {"le", "lt"}, f"{section}.{name} has no upper bound"
            assert bounds & {"ge", "gt"}, f"{section}.{name} has no lower bound"


@pytest.mark.parametrize(("backbone", "preset"), PRESETS, ids=lambda value: getattr(value, "name", value))
def test_a_check_ends_whatever_a_number_is(backbone: Any, preset: str) -> None:
    """Every number of a preset is replaced by its largest value, and by some of those that nobody means."""
    draw = random.Random(10)
    written = yaml.safe_load(backbone.presets()[preset])
    for section, name, field in _number_fields(backbone):
        most = [_most(metadata) for _, metadata in _numbers(field.annotation, tuple(field.metadata))]
        for value in [*filter(None, most), *draw.sample(NUMBERS, 2)]:
            keys = written.get(section) or {}
            _check({**written, section: {**keys, name: value}}, backbone)


@pytest.mark.parametrize("mini_batch_size", [1, 1 << 20, 1048573])
@pytest.mark.parametrize("group", ["auto", 0, 1, 10**12])
def test_a_check_ends_where_everything_is_as_large_as_it_may_be(mini_batch_size: int, group: Any) -> None:
    config = {
        "backbone": {"name": "videodit", "preset": "5b", "attn_length": 1024, "prefix_temporal_length": 1024},
        "ttt": {"mini_batch_size": mini_batch_size, "scan_checkpoint_group_size": group, "num_heads": 48},
        "data": {"duration_sec": 63 * 60, "height": 16384, "width": 16384, "text_length": 4096},
        "train": {"batch_size": 1 << 20, "num_microbatches": 1 << 20, "max_steps": 10**12, "ckpt_freq": 1},
    }
    _check(config, VIDEODIT)


def test_the_two_lines_that_never_ended() -> None:
    checked = _check({"backbone": {"name": "videodit", "preset": "5b"}, "data": {"width": 16 * 10**21}}, VIDEODIT)
    (finding,) = [finding for finding in checked.findings if finding.path == "data.width"]
    assert (finding.code, finding.message) == (
        "TTT103",
        "`data.width` must be at most 16384, not 16000000000000000000000",
    )


@pytest.mark.parametrize(
    ("section", "key"), [("backbone", "dim"), ("backbone", "heads"), ("backbone", "depth"), ("data", "window_tokens")]
)
@pytest.mark.parametrize("number", [1 << 16, 1 << 40, HUGE, 10**300])
def test_a_plugin_without_bounds_makes_no_check_endless(section: str, key: str, number: int) -> None:
    """A third party's options may have none: what its facts come to is bounded."""
    data = {"backbone": {"name": "toy"}, "ttt": {"persistent_states": True}, "data": {"shuffle": False}}
    data[section] = {**data[section], key: number}
    checked = _check(data, ToyBackbone())
    if number >= HUGE:
        assert any(
            finding.code == "TTT103" and "nothing is that large" in finding.message for finding in checked.findings
        )


def test_the_best_group_of_a_scan_beyond_counting_is_found_by_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, costs = (1 << 20) + 12345, {"carry": 1000, "activation": 300, "running": 100}
    with _steps_limited():
        size = best_group_size(steps, **costs)
        assert best_group_size(10**60, **costs) > 0
        assert best_group_size(10**60, carry=0, activation=1, running=1) >= 0

    def peak(size: int) -> int:
        return (-(-steps // size) - 1) * 1000 + size * 1400

    monkeypatch.setattr(costs_module, "COUNTED", 1 << 30)  # every size is tried
    least = peak(best_group_size(steps, **costs))
    assert least <= peak(size) <= least * 1.0001


# --- findings by the thousand ---

MANY = "backbone: {name: moshi, preset: demo}\nttt: {" + ", ".join(f"key{n}: 1" for n in range(9000)) + "}\n"


@pytest.fixture(scope="module")
def many() -> tuple[Finding, ...]:
    findings = check_config("c.yaml", text=MANY, backbone=MOSHI).findings
    assert len(findings) == 9000
    return findings


def test_of_a_kind_the_first_hundred_are_shown_and_the_others_counted(many: tuple[Finding, ...]) -> None:
    more = "and 8,900 more of TTT101"
    listed = json.loads(render_json(many))
    assert len(listed) == MOST_OF_A_KIND + 1
    assert (listed[-1]["message"], listed[-1]["value"], listed[-1]["severity"]) == (more, 8900, "error")
    assert listed[-2]["path"] == "ttt.key99"
    assert render_text(many).count(" error TTT101 ") == MOST_OF_A_KIND + 1
    assert more in render_text(many)
    results = json.loads(render_sarif(many, version="1"))["runs"][0]["results"]
    assert len(results) == MOST_OF_A_KIND + 1
    assert more in results[-1]["message"]["text"]
    lines = render_github(many).splitlines()
    assert len(lines) == MOST_OF_A_KIND + 1
    assert more in lines[-1]
    for text in (render_text(many), render_sarif(many, version="1"), render_github(many), render_json(many)):
        assert len(text) < 400_000  # each quotes a line of 100 kB


def test_codes_and_files_are_counted_apart_and_the_worst_stands_for_the_rest() -> None:
    def finding(code: str, severity: Severity, place: Place) -> Finding:
        return Finding(code=code, severity=severity, path="ttt", message="x", place=place)

    notes = [finding("TTT405", Severity.NOTE, Place(f"{n}.yaml", 1, 1)) for n in range(300)]
    assert len(shown(notes)) == 300  # one in each file
    overrides = [finding("TTT101", Severity.WARNING, Place(f"--set a{n}=1")) for n in range(150)]
    last = finding("TTT101", Severity.ERROR, Place("--set z=1"))
    listed = shown([*overrides, *notes, last])
    assert len(listed) == 100 + 300 + 1
    assert (listed[-1].severity, listed[-1].message) == (Severity.ERROR, "and 51 more of TTT101")


def test_exit_codes_and_sums_know_of_all_findings(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(MANY)
    result = CliRunner().invoke(app, ["check", str(tmp_path / "c.yaml")])
    assert result.exit_code == 1
    assert result.output.endswith(f"{tmp_path / 'c.yaml'}: 9000 errors\n")
    with pytest.raises(ConfigError) as caught:
        load_config("c.yaml", text=MANY)
    assert len(caught.value.findings) == 9000
    assert str(caught.value).endswith("c.yaml: 9000 errors")
    assert len(str(caught.value)) < 100_000


def test_spelling_is_asked_no_oftener_than_findings_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from ttt.check import unknown_key

    asked = []
    monkeypatch.setattr(unknown_key, "nearest", lambda word, known: asked.append(word))
    assert len(check_config("c.yaml", text=MANY, backbone=MOSHI).findings) == 9000
    assert len(asked) <= 2 * MOST_OF_A_KIND


@pytest.mark.parametrize(
    "text",
    [
        "run_dir: " + "x" * 500_000,
        "run_dir: !" + "x" * 500_000,
        "backbone: {name: " + "x" * 500_000 + "}",
        "data: {train_data: " + "x" * 500_000 + "}",
        "train: {init_from: " + "x" * 500_000 + "}",
        "? " + "x" * 500_000 + "\n: 1",
        "train: {max_steps: " + "9" * 500_000 + "}",
    ],
)
def test_a_text_of_half_a_megabyte_is_not_said_back(text: str) -> None:
    findings = check_config("c.yaml", text=f"{text}\n", backbone=None if "name" in text else MOSHI).findings
    assert findings
    for written in (render_text(findings), render_json(findings), render_github(findings)):
        assert len(written) < len(findings) * 6 * MOST_CHARACTERS


@pytest.mark.parametrize(
    "text",
    [
        MANY,
        "ttt: {layers: [" + ", ".join(f"'{n}'" for n in range(3000)) + "]}\n",
        "ttt:\n  layers:\n" + "".join(f"  - '{n}'\n  - {n + 5000}\n" for n in range(1000)),
        "a: &a {" + ", ".join(f"k{n}: '1'" for n in range(50)) + "}\ntrain: *a\nttt: *a\neval: *a\n",
        "".join(f"s{n}: {{lr: 1}}\n" for n in range(2000)),
        f"ttt:\n  ? {'9' * 5000}\n  : 1\n  layrs: all\n",
        "ttt: {" + ", ".join(f"layrs{n}: all" for n in range(3000)) + "}\n",
    ],
)
def test_fixing_ends(text: str) -> None:
    checks = 0

    def check(text: str) -> CheckedConfig:
        nonlocal checks
        checks += 1
        return check_config("c.yaml", text=text, backbone=ToyBackbone())

    fix_text(text, check)
    assert checks < 10


def test_fixes_that_are_tried_in_vain_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no edit does what it says, halves of halves would be read again thousands of times."""
    from ttt.check import fixes

    tried = []
    monkeypatch.setattr(fixes, "_does_what_it_says", lambda *_: tried.append(1) is not None)
    text = "ttt: {layers: [" + ", ".join(f"'{n}'" for n in range(1000)) + "]}\n"
    fixed = fix_text(text, lambda text: check_config("c.yaml", text=text, backbone=ToyBackbone()))
    assert fixed.text == text
    assert len(tried) == fixes.MOST_TRIALS


# --- overrides ---


def _overridden(*overrides: str) -> tuple[Finding, ...]:
    return parse_source("ttt: {rope: none}\n", file="c.yaml").with_overrides(overrides).findings


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([".".join("a" * 50_000) + "=1"], "nested 50,000 levels deep"),
        ([".".join("a" * 40) + "=1"], "nested 40 levels deep"),
        ([".".join("a" * 20) + "=" + "[" * 20 + "]" * 20], "nested more than 32 levels"),
        (["ttt.layers=" + "[" * 60_000], "nested more than 32 levels"),
        (["run_dir=" + "x" * MAX_IN_OVERRIDES], "overrides of 131,080 characters"),
        (["x" * 100_000], "`section.key=value`"),
        (["ttt.layers=[" + "1," * 20_000 + "]"], "more than 10,000 values"),
        (["train.lr=1"] * (MAX_OVERRIDES + 1), "257 overrides"),
        (["x"] * 9000, "9,000 overrides"),
    ],
)
def test_endless_overrides_are_one_sentence(overrides: list[str], words: str) -> None:
    (finding,) = _overridden(*overrides)
    assert finding.code == "TTT108"
    assert words in finding.message
    assert finding.fix
    assert len(render_text([finding])) < 5 * MOST_CHARACTERS


def test_as_many_overrides_as_are_read_are_read() -> None:
    overrides = [f"train.lr={n}" for n in range(MAX_OVERRIDES)]
    source = parse_source("{a: 1}", file="c.yaml").with_overrides(overrides)
    assert not source.findings
    assert source.data["train"] == {"lr": MAX_OVERRIDES - 1}
    assert not _overridden(".".join("a" * 32) + "=1")


_WORDS = st.sampled_from(["ttt", "train", "lr", "layers", "data", "backbone", "rope", "max_steps", "a", "", "0", "é"])
_VALUES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["1e308", "-1", "[1, 2]", "{a: 1}", "*x", "&x 1", "!!str 1", ".nan", "all", "9" * 500, "~", "[" * 40]
    ),
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.tuples(st.lists(_WORDS, max_size=40), st.sampled_from(["=", "", "=="]), _VALUES), max_size=4))
def test_no_override_raises(written: list[tuple[list[str], str, str]]) -> None:
    overrides = [".".join(key) + equals + value for key, equals, value in written]
    checked = check_config("c.yaml", text="backbone: {name: toy}\n", backbone=ToyBackbone(), overrides=overrides)
    render_text(checked.findings)
    json.loads(render_json(checked.findings))


# --- TOML ---

TOML = '[model]\nssm_layer = "ttt_mlp"\nvideo_length = "3sec"\n'


@pytest.mark.parametrize(
    ("more", "line", "words"),
    [
        ("x." * 20_000 + "x = 1\n", 4, "nested more than 32 levels deep"),
        ("# a.b\n\n[" + "x." * 20_000 + "x]\n", 6, "nested more than 32 levels deep"),
        ('"x".' * 10_000 + "x = 1\n", 4, "nested more than 32 levels deep"),
        ("x . " * 10_000 + "x = 1\n", 4, "nested more than 32 levels deep"),
        ("x = " + "[" * 40 + "]" * 40 + "\n", 4, "nested more than 32 levels deep"),
        ("x = " + "{a = " * 40 + "1" + "}" * 40 + "\n", 4, "nested more than 32 levels deep"),
        ("x." * 200_000 + "x = 1\n", 1, "larger than 64 KiB"),
        ("".join(f"[t{n}]\n" for n in range(20_000)), 1, "larger than 64 KiB"),
        ("[[t]]\n" * 6000, 5002, "more than 10,000 values"),
        ("x = [" + "1," * 20_000 + "]\n", 4, "more than 10,000 values"),
        ("x = " + "9" * 5000 + "\n", 4, "more than 400 characters"),
        ("x = " + "9_" * 500 + "9\n", 4, "more than 400 characters"),
        ("x = 0x" + "f" * 5000 + "\n", 4, "more than 400 characters"),
    ],
)
def test_toml_that_a_parser_chokes_on_is_never_given_to_one(more: str, line: int, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        import_toml(TOML + more, file="old.toml")
    assert str(caught.value).startswith(f"old.toml:{line}: not TOML: ")
    assert words in str(caught.value)
    assert import_toml(TOML + more, file="old.yaml") is None  # another reader's, it may be


def test_what_a_string_or_comment_holds_is_not_counted() -> None:
    more = f'a = "{"[" * 100}"\nb = """{"x." * 100}\n{"=" * 100}"""\nc = \'{"." * 100}\' # {"[" * 100}\n'
    more += "d = '''" + "[" * 100 + "'''\n" + 'e = "\\"' + "[" * 100 + '"\n'
    imported = import_toml(TOML + more, file="old.toml")
    assert imported is not None
    assert len(TOML + more) < MOST_TOML
    assert {key.old for key in imported.keys} >= {f"model.{key}" for key in "abcde"}


@pytest.mark.parametrize(
    "value",
    [
        *("07:32:00", "1979-05-27", "1979-05-27T07:32:00Z", "[1979-05-27, {x = 07:32:00}]", "nan", "-inf", "1e308"),
        *("9" * 400, "[]", "{}", "true", '"x"', "-1", "0", "1e-308", '"\\u2028\\nbackbone: 1"', "[[1], [2]]"),
    ],
)
@pytest.mark.parametrize(
    "key",
    [
        *("model.mini_batch_size", "model.size", "model.ssm_layer", "model.scale_factor", "model.video_length"),
        *(
            "training.steps",
            "training.global_batch_size",
            "training.adapter_method",
            "optimizer.lr",
            "optimizer.lr_end",
        ),
        *("optimizer.lr_ssm", "job.exp_name", "parallelism.dp_sharding", "parallelism.fsdp_unsharded_dtype", "odd"),
    ],
)
def test_a_value_of_any_kind_is_imported_or_told(key: str, value: str) -> None:
    section, _, name = key.rpartition(".")
    text = f"{name} = {value}\n[model]\nttt_base_lr = 0.1\n" if not section else ""
    if section == "model":
        text = f"[model]\nttt_base_lr = 0.1\n{name} = {value}\n"
    elif section:
        text = f"[model]\nttt_base_lr = 0.1\n[{section}]\n{name} = {value}\n"
    try:
        answer = ask(text, file="old.toml")
    except UsageError as refused:
        _blames_the_key(refused, name)
        return
    assert answer is not None
    _holds_together(answer)


def _blames_the_key(refused: UsageError, key: str) -> None:
    """A number that nothing can be computed from is refused at its key."""
    assert re.match(rf"old\.\w+:\d+:\d+: `[\w.]*{re.escape(key)}[\w.]*` is ", str(refused))


def _holds_together(imported: Any, origin: str = "old.toml") -> dict[str, Any]:
    """What is written reads back as what was imported, whatever the values and names are."""
    written = write_imported(imported, origin=origin)
    source = parse_source(written, file="new.yaml")
    assert source.complete
    assert not source.findings
    written_keys = [
        f"{section}.{key}" for section, keys in source.data.items() if section != "run_dir" for key in keys
    ] + ["run_dir"] * ("run_dir" in source.data)
    assert sorted(written_keys) == sorted(imported.values)
    for key, value in imported.values.items():
        section, _, name = key.rpartition(".")
        found = source.data[section][name] if section else source.data[name]
        assert dump_value(found) == dump_value(value)
    assert len(render_account(imported)) < 200_000
    check_config("new.yaml", text=written)
    return dict(source.data)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.text(alphabet=st.sampled_from("ab.[]{}=\"'#\n ,1e-_:TZ\\"), max_size=60),
    st.sampled_from(["old.toml", "old.conf"]),
)
def test_no_toml_raises(more: str, file: str) -> None:
    with contextlib.suppress(UsageError):
        answer = ask(TOML + more, file=file)
        assert answer is None or _holds_together(answer)


# --- YAML of other programs ---


@pytest.mark.parametrize(
    "more",
    [
        *("max_steps: .inf", "max_steps: .nan", "max_steps: 1" + "0" * 390, "max_steps: -.inf", "max_steps: [1]"),
        *("optim: {pct_start: .inf}", "optim: {pct_start: .nan}", "max_steps: true", "optim: {lr: .inf}"),
        "max_steps: 1" + "0" * 390 + "\noptim: {pct_start: 1e308}",
        "optim.lr: 3\noptim: {lr: 4}",
        "ttt: {layers: .nan, use_rope: .inf, ttt_mlp_layers: 1e308}",
        "".join(f"k{n}: 1\n" for n in range(4000)),
        '"a\\nbackbone: {name: evil}": 1',
        'run_dir: "x # y\\u2028backbone: 1\\x85z: 2"',
    ],
)
def test_any_value_of_moshi_finetune_is_imported_or_told(more: str) -> None:
    try:
        answer = ask(f"full_finetuning: false\n{more}\n", file="old.yaml")
    except UsageError as refused:
        assert any(word in more for word in ("inf", "nan", "0" * 300, "1e308"))
        _blames_the_key(refused, "")
        return
    assert answer is not None
    data = _holds_together(answer)
    assert data["backbone"]["name"] == "moshi"
    assert "evil" not in repr(data)


def test_a_key_with_a_dot_is_no_key_of_a_section() -> None:
    answer = ask("full_finetuning: false\noptim.lr: 3\noptim: {lr: 4}\n", file="old.yaml")
    assert answer is not None
    assert answer.values["train.lr"] == 4
    assert ('"optim.lr"', None) in [(key.old, key.new) for key in answer.keys]


NAMES = [
    "x\nbackbone: {name: evil}\n.yaml",
    "x\rtrain: {lr: 3}\r.yaml",
    "x\r\nrun_dir: evil\r\n.yaml",
    "x\u2028run_dir: evil\u2028.yaml",
    "x\u2029run_dir: evil\u2029.yaml",
    "x\x85run_dir: evil\x85.yaml",
    "x\x1b]0;evil\x07\x9b.yaml",
    "x\x0b\x0crun_dir: evil.yaml",
    "x\ufeff\ufffe\udcff.yaml",
    "x" * 250 + ".yaml",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_name_cannot_leave_the_comment_that_it_is_written_into(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "full_finetuning: false\nmax_steps: 7\n"
    Path("plain.yaml").write_text(text)
    Path(name).write_text(text)
    for old, out in (("plain.yaml", "one.yaml"), (name, "other.yaml")):
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["import-config", old, "--out", out]) == 1  # it names no data
    one, other = (parse_source(Path(file).read_bytes(), file=file) for file in ("one.yaml", "other.yaml"))
    assert not other.findings
    assert other.data == one.data
    assert len(Path("one.yaml").read_text().splitlines()) == len(Path("other.yaml").read_text().splitlines())


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.text(alphabet=st.characters(exclude_characters="\0/"), max_size=30), st.text(max_size=30))
def test_no_name_and_no_note_leaves_its_comment(name: str, note: str) -> None:
    from ttt.plugins import ImportedConfig
    from ttt.plugins.imported import ImportedKey

    imported = ImportedConfig(name, {"run_dir": "x", "train.lr": 1e-3}, [ImportedKey(name, "train.lr", note)])
    imported.keys.append(ImportedKey("", "run_dir", note))  # type: ignore[attr-defined]
    source = parse_source(write_imported(imported, origin=name), file="new.yaml")
    assert not source.findings
    assert source.data == {"run_dir": "x", "train": {"lr": 1e-3}}


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e308, 1e-308])
def test_a_number_is_written_as_one(value: float) -> None:
    assert resolve(dump_value(value)) == value
    assert dump_value(math.nan) == ".nan"
