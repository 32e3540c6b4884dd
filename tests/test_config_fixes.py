"""Fixes written into a config: what they change, what they leave alone, and that twice is once."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_config import ToyBackbone

from ttt.check import CheckedConfig, check_config
from ttt.check.fixes import Fixed, fix_text, unified_diff
from ttt.config.lora import LoraConfig
from ttt.config.schema import EvalConfig, TrainConfig, TTTConfig
from ttt.config.source import parse_source

BACKBONE = ToyBackbone()


def _check(text: str) -> CheckedConfig:
    return check_config("c.yaml", text=text, backbone=BACKBONE)


def _fix(text: str) -> Fixed:
    fixed = fix_text(text, _check)
    again = fix_text(fixed.text, _check)
    assert again.text == fixed.text
    assert not again.fixed
    return fixed


def _codes(fixed: Fixed) -> list[str]:
    return [finding.code for finding in fixed.fixed]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("ttt:\n  layrs:   all  # which\n", "ttt:\n  layers:   all  # which\n"),
        ("'ttt ': {\"layrs\": all}\n", "ttt: {layers: all}\n"),
        ('train: {lr: "1e-4"} # text\n', "train: {lr: 1e-4} # text\n"),
        ("train:\n  max_steps:\n    '10'\n", "train:\n  max_steps:\n    10\n"),
        ("train: {max_steps: '1,000', warmup_steps: 1_0}\n", "train: {max_steps: 1000, warmup_steps: 10}\n"),
        ("ttt: {layers: [0, '1']}\n", "ttt: {layers: [0, 1]}\n"),
        ("ttt: {qkvo_bias: yes}\n", "ttt: {qkvo_bias: true}\n"),
        ("ttt: {num_heads: None}\n", "ttt: {num_heads: null}\n"),
        ("ttt: {layer_type: liner}\n", "ttt: {layer_type: linear}\n"),
        (
            "ttt: {scan_checkpoint_group_size: 1, mini_batch_size: 1}\n",
            "ttt: {scan_checkpoint_group_size: 5, mini_batch_size: 1}\n",
        ),
        ("ttt:\r\n  layrs: all\r\n", "ttt:\r\n  layers: all\r\n"),
        ("\ufeffttt: {layrs: all}", "\ufeffttt: {layers: all}"),
        ("# é 漢字 🎉\nttt: {layrs: all}   # é\n", "# é 漢字 🎉\nttt: {layers: all}   # é\n"),
    ],
)
def test_a_fix_changes_what_is_wrong_and_nothing_else(wrong: str, right: str) -> None:
    fixed = _fix(wrong)
    assert fixed.text == right
    assert not fixed.checked.findings


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        # to a section that is there, as its other keys are indented
        (
            "ttt:\n  lr: 1e-3   # peak\n  layers: all\n# how\ntrain:  # long\n    max_steps: 3\n",
            "ttt:\n  layers: all\n# how\ntrain:  # long\n    lr: 1e-3   # peak\n    max_steps: 3\n",
        ),
        # one that is there, but empty
        (
            "train:\n  # nothing yet\nttt:\n  lr: 1e-3\n  layers: all\n",
            "train:\n  lr: 1e-3\n  # nothing yet\nttt:\n  layers: all\n",
        ),
        # one that is not there, out of one that is empty then
        ("train:\n  layers: [0, 1]  # which\n", "train:\nttt:\n  layers: [0, 1]  # which\n"),
        # from the top level, and to it; a file that does not end in a line's end
        ("lr: 1e-3 # peak\ntrain:\n  max_steps: 3", "train:\n  lr: 1e-3 # peak\n  max_steps: 3"),
        ("train:\n  run_dir: here  # mine\n  max_steps: 3", "train:\n  max_steps: 3\nrun_dir: here  # mine\n"),
        ("train:\n  max_steps: 3\n  run_dir: here", "train:\n  max_steps: 3\nrun_dir: here\n"),
        ("ttt:\r\n  lr: 1e-3\r\n  layers: all\r\n", "ttt:\r\n  layers: all\r\ntrain:\r\n  lr: 1e-3\r\n"),
        # several, into one section that is not there
        (
            "ttt:\n  lr: 1e-3\n  layers: all\n  max_steps: 3\n",
            "ttt:\n  layers: all\ntrain:\n  max_steps: 3\n  lr: 1e-3\n",
        ),
        # what is misspelt in the wrong place is spelt first where it stands
        (
            "trian:\n  max_steps: '3'\nttt:\n  lr: '1e-3'\n  layers: all\n",
            "train:\n  lr: 1e-3\n  max_steps: 3\nttt:\n  layers: all\n",
        ),
    ],
)
def test_a_key_in_the_wrong_section_moves_with_its_comment(wrong: str, right: str) -> None:
    fixed = _fix(wrong)
    assert fixed.text == right
    assert "TTT105" in _codes(fixed)
    assert not fixed.checked.findings


@pytest.mark.parametrize(
    "text",
    [
        "ttt: {lr: 1e-3, layers: all}\n",  # in braces
        "ttt:\n  lr: 1e-3\ntrain: {max_steps: 3}\n",  # to braces
        "ttt:\n  lr: 1e-3\ntrain: null\n",
        "ttt:\n  lr: 1e-3\ntrain:\n  lr: 1e-4\n",  # which of the two?
        "ttt:\n  betas:\n    - 0.9\n    - 0.95\n",  # more than a line
        "ttt:\n  betas: [0.9,\n    0.95]\n",
        "ttt: &t\n  lr: 1e-3\neval: *t\n",  # the line is in two sections
        "ttt:\n  no_such_key_at_all: 1\n",
    ],
)
def test_a_move_that_is_more_than_a_line_is_left_to_the_user(text: str) -> None:
    fixed = _fix(text)
    assert fixed.text == text
    assert not fixed.fixed


def test_what_a_fix_brings_to_light_is_fixed_too() -> None:
    fixed = _fix("trian: {max_step: '10'}\nttt: {layrs: '9'}\n")
    assert fixed.text == "train: {max_steps: 10}\nttt: {layers: '9'}\n"
    assert _codes(fixed) == ["TTT101", "TTT101", "TTT101", "TTT102"]
    assert [finding.code for finding in fixed.checked.findings] == ["TTT111"]  # which layer, only the user knows


@pytest.mark.parametrize(
    "text",
    [
        "ttt: {layers: all, layrs: middle}\n",  # the key is there already
        "train: {lr: fast}\n",
        "train: {lr: '1,5'}\n",  # fifteen, or one and a half
        "train: {layers: all}\n",
        "train: {max_steps: &n '10', warmup_steps: *n, note: *n}\n",  # an edit would be three
        "train: {max_steps: '10\n  0'}\n",
        "ttt: [\n",
        "",
    ],
)
def test_what_needs_a_thought_is_left_to_the_user(text: str) -> None:
    fixed = _fix(text)
    assert fixed.text == text
    assert not fixed.fixed


def test_where_no_backbone_is_known_a_key_is_still_told_where_it_belongs() -> None:
    text = "name: toy\ntrain_data: x\n"
    checked = check_config("c.yaml", text=text)
    assert {(found.code, found.moves_to) for found in checked.findings if found.path in ("name", "train_data")} == {
        ("TTT105", "backbone"),
        ("TTT105", "data"),
    }
    fixed = fix_text(text, lambda text: check_config("c.yaml", text=text))
    assert parse_source(fixed.text, file="c.yaml").data == {"backbone": {"name": "toy"}, "data": {"train_data": "x"}}


@pytest.mark.parametrize("section", ["-1", "x", "[1]", "{a: 1}"])
def test_a_key_whose_section_is_no_section_is_left(section: str) -> None:
    text = f"backbone: {section}\nname: toy\n"
    fixed = fix_text(text, lambda text: check_config("c.yaml", text=text))
    assert parse_source(fixed.text, file="c.yaml").complete


def test_of_two_misspellings_of_one_key_one_is_fixed() -> None:
    fixed = _fix("ttt: {layrs: all, layes: middle}\n")
    assert fixed.text == "ttt: {layers: all, layes: middle}\n"


def test_overrides_are_not_in_the_file() -> None:
    text = "train: {lr: 1e-4}\n"
    fixed = fix_text(
        text, lambda text: check_config("c.yaml", text=text, backbone=BACKBONE, overrides=["train.max_step='10'"])
    )
    assert fixed.text == text
    assert [finding.code for finding in fixed.checked.findings] == ["TTT101"]


def test_many_fixes_of_which_some_do_not_hold_take_a_moment() -> None:
    keys = "".join(f"  {name[:-1]}: {default}\n" for name, default in [("max_steps", "'10'"), ("warmup_steps", "'1'")])
    text = f"x: &n '3'\ny: *n\neval: {{eval_freq: *n, max_batches: *n}}\ntrain:\n{keys}"
    fixed = _fix(text)
    assert fixed.text == text.replace("max_step:", "max_steps:").replace("warmup_step:", "warmup_steps:").replace(
        "'10'", "10"
    ).replace("'1'", "1")


def test_the_diff_shows_the_change_as_diff_does() -> None:
    before = "# a\nttt: {layrs: all}"
    assert unified_diff(before, _fix(before).text, file="c.yaml").splitlines() == [
        "--- c.yaml",
        "+++ c.yaml (fixed)",
        "@@ -1,2 +1,2 @@",
        " # a",
        "-ttt: {layrs: all}",
        "\\ No newline at end of file",
        "+ttt: {layers: all}",
        "\\ No newline at end of file",
    ]
    assert unified_diff(before, before, file="c.yaml") == ""


SECTIONS = {"ttt": TTTConfig, "train": TrainConfig, "eval": EvalConfig}
KEYS = [
    (section, key)
    for section, model in SECTIONS.items()
    for key in model.model_fields
    if key not in LoraConfig.model_fields  # which of two homes it has, nobody can tell
]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_misspelt_config_keeps_its_comments_and_order_and_settles(data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=6, unique=True))
    lines = ["# head", "backbone: {name: toy}"]
    for section in SECTIONS:
        keys = [key for home, key in chosen if home == section]
        lines += [f"{section}:  # {section}"] if keys else []
        for key in keys:
            at = data.draw(st.integers(0, len(key) - 1))
            word = data.draw(st.sampled_from([key, key[:at] + key[at + 1 :], key[:at] + "x" + key[at:], key.upper()]))
            value = data.draw(
                st.sampled_from(["1", "'1'", "yes", "true", "null", "None", "[1, '2']", "liner", '"0.1"'])
            )
            lines.append(f"  {word or 'x'}:  {value}   # {key}")
    text = "\n".join(lines) + "\n"
    fixed = _fix(text)
    assert re.findall(r"#.*", fixed.text) == re.findall(r"#.*", text)
    assert len(fixed.text.splitlines()) == len(text.splitlines())
    assert len(fixed.checked.findings) <= len(_check(text).findings) + len(fixed.fixed)
    before, after = parse_source(text, file="c"), parse_source(fixed.text, file="c")
    assert after.complete
    assert len(after.findings) <= len(before.findings)
    assert (text == fixed.text) == (not fixed.fixed)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_keys_in_any_section_end_in_their_own(data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=8, unique_by=lambda pair: pair[1]))
    places: dict[str, list[str]] = {}
    for home, key in chosen:
        places.setdefault(data.draw(st.sampled_from([home, *SECTIONS, ""])), []).append(key)
    lines = ["# head", "backbone: {name: toy}"]
    for section, keys in sorted(places.items(), key=lambda item: item[0] != ""):
        lines += [f"{section}:  # {section}"] if section else []
        lines += [f"{'  ' * bool(section)}{key}:  null   # {key}" for key in keys]
    text = "\n".join(lines) + "\n"
    fixed = _fix(text)
    assert sorted(re.findall(r"#.*", fixed.text)) == sorted(re.findall(r"#.*", text))
    assert "TTT105" not in {finding.code for finding in fixed.checked.findings}
    after = parse_source(fixed.text, file="c").data
    assert {(section, key) for section in SECTIONS for key in after.get(section) or {}} == set(chosen)
