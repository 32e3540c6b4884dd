"""Words are for reading: whatever a message says, the keys that are blamed, the fix and the edit are the same."""

from __future__ import annotations

import ast
import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError
from test_config_load import ALL_AT_ONCE, FOLLOW_UPS, TOY_BACKBONE, WORDS
from toy_config import ToyBackbone, ToyData, ToyOptions

from ttt.check import check_config, misfits
from ttt.config import Finding, Misfit, RunConfig, TTTConfig
from ttt.config.section import Section
from ttt.errors import EnvironmentProblem, NestedCheckpointWarning, PluginError, TTTError, UsageError
from ttt.plugins import Backbone, run_config_model
from ttt_moshi.plugin import MoshiBackbone
from ttt_videodit.plugin import VideoDiTBackbone

ROOT = Path(__file__).parent.parent
NOISE = "Value error, train.lr and seed are no number, 'mlp' or true or false; write layers. Write causal: true"
"""What none of it may be taken for: keys of every section, types, choices and ways out."""


def _findings(text: str, backbone: Backbone = TOY_BACKBONE) -> tuple[Finding, ...]:
    return check_config("c.yaml", text=text, backbone=backbone).findings


def _decided(findings: tuple[Finding, ...]) -> list[tuple[Any, ...]]:
    """All of the findings but the sentences."""
    return [(f.code, f.path, f.fix, f.replacement, f.moves_to, str(f.place), f.value) for f in findings]


# --- words changed, nothing else ---

MISFITS: list[tuple[type[Backbone], str, str, str, str]] = [
    # backbone       config                                  path                  its fix
    (ToyBackbone, "ttt: {layers: middel}", "ttt.layers", 'write "all"', "is no value of"),
    (ToyBackbone, "ttt: {layers: true}", "ttt.layers", 'write "all"', "is no value of"),
    (ToyBackbone, "ttt: {layers: '99999'}", "ttt.layers", "write numbers from 0 to 4095", "no backbone has"),
    (ToyBackbone, "ttt: {layers: [1, 1]}", "ttt.layers", "", "a layer is named twice"),
    (ToyBackbone, "ttt: {preset: lm, mlp_layers: 3}", "ttt.mlp_layers", "", "needs layer_type: mlp"),
    (
        ToyBackbone,
        "ttt: {mlp_expansion_factor: 2, mlp_hidden_dims: [8]}",
        "ttt.mlp_hidden_dims",
        "write one of them",
        "both give the hidden widths",
    ),
    (ToyBackbone, "ttt: {mlp_layers: 3, mlp_hidden_dims: [8]}", "ttt.mlp_hidden_dims", "", "names 1 widths"),
    (ToyBackbone, "ttt: {target_eps: 1e-5}", "ttt.target_eps", "write normalize_target: true", "normalised target"),
    (ToyBackbone, "ttt: {causal: false}", "ttt.causal", "write causal: true or learnable_token_idx", "step sizes 1/i"),
    (ToyBackbone, "ttt: {causal: false, learnable_token_idx: false}", "ttt.causal", "", "counts tokens"),
    (ToyBackbone, "train: {backbone_lr_schedule: linear}", "train.backbone_lr_schedule", "write backbone_", "freezes"),
    (ToyBackbone, "backbone: {flavour: sour}", "backbone.flavour", "write weights: FILE", "no weights of its own"),
    (MoshiBackbone, "backbone: {preset: 7b, dim: 8}", "backbone.dim", "", "belongs to preset: demo"),
    (MoshiBackbone, "backbone: {num_heads: 7}", "backbone.num_heads", "", "does not divide into 7 heads"),
    (VideoDiTBackbone, "backbone: {revision: x}", "backbone.revision", "", "belongs to preset: 5b"),
    (
        VideoDiTBackbone,
        "backbone: {preset: 5b, pretrained: x, random_weights: true}",
        "backbone.random_weights",
        "write one of them",
        "does not read pretrained",
    ),
    (VideoDiTBackbone, "backbone: {dim: 24}", "backbone.dim", "", "as rotary embedding in three dimensions needs"),
    (
        VideoDiTBackbone,
        "backbone: {attn_length: 1, prefix_temporal_length: 2}",
        "backbone.prefix_temporal_length",
        "",
        "",
    ),
    (VideoDiTBackbone, "data: {duration_sec: 4}", "data.duration_sec", "write a multiple of 3", "segments of 3 s"),
    (VideoDiTBackbone, "data: {width: 17}", "data.width", "write a multiple of 16", "16 × 16 pixels"),
]


@pytest.mark.parametrize(("backbone", "text", "path", "fix", "words"), MISFITS)
def test_what_a_validator_says_can_be_reworded(
    backbone: type[Backbone], text: str, path: str, fix: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_it_is = _findings(text, backbone())
    assert as_it_is[0].path == path
    assert as_it_is[0].fix.startswith(fix)
    assert bool(as_it_is[0].fix) == bool(fix)
    assert words in as_it_is[0].message
    given = Misfit.__init__

    def reworded(self: Misfit, message: str = "", **more: Any) -> None:
        given(self, NOISE, **more)

    monkeypatch.setattr(Misfit, "__init__", reworded)
    again = _findings(text, backbone())
    assert _decided(again) == _decided(as_it_is)
    assert NOISE in again[0].message


@pytest.mark.parametrize("text", [*(text for text, *_ in (*WORDS, *FOLLOW_UPS)), ALL_AT_ONCE])
def test_what_pydantic_says_can_be_reworded(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_it_is = _findings(text)

    def reworded(path: Any, kind: str, value: Any, context: Any, message: str) -> misfits.Problem:
        told = {"expected": "'mpl', 'x' or a number"} if "expected" in context else {}
        return given(path, kind, value, {**context, **told}, NOISE)

    given = misfits.Problem
    monkeypatch.setattr(misfits, "Problem", reworded)
    assert _findings(text) == as_it_is


def test_a_section_built_in_python_says_the_way_out_too() -> None:
    with pytest.raises(ValidationError) as caught:
        TTTConfig(target_eps=1e-5)
    told = "target_eps acts on the normalised target; write normalize_target: true, or leave target_eps out"
    assert f"Value error, {told} [" in str(caught.value)
    (problem,) = caught.value.errors()
    misfit = problem["ctx"]["error"]
    assert isinstance(misfit, Misfit)
    assert isinstance(misfit, ValueError)
    for same in (misfit, copy.copy(misfit), pickle.loads(pickle.dumps(misfit))):
        assert (str(same), same.keys) == (told, ("target_eps", "normalize_target"))
        assert (same.message, same.fix) == tuple(told.split("; "))
    assert [str(Misfit("a")), str(Misfit(fix="write b")), str(Misfit())] == ["a", "write b", ""]


# --- what somebody else's validators raise ---


def _with_options(check: Callable[[ToyOptions], None]) -> ToyBackbone:
    """The toy, with a validator of its whole `backbone` section."""

    class Options(ToyOptions):
        @model_validator(mode="after")
        def _own(self) -> Options:
            check(self)
            return self

    return _with(options=Options)


def _with(**attributes: Any) -> ToyBackbone:
    return type("Somebodys", (ToyBackbone,), {"__module__": __name__, **attributes})()


def _raising(error: Exception) -> Callable[[Any], None]:
    def check(options: Any) -> None:
        raise error

    return check


def test_a_typed_error_blames_its_keys_and_no_other_that_it_mentions() -> None:
    backbone = _with_options(_raising(Misfit(NOISE, keys=("heads", "dim"), fix="keep heads at 2; write dim: 8")))
    text = "backbone:\n  flavour: sweet\n  dim: 7\n"
    (finding,) = _findings(text, backbone)
    assert (finding.code, finding.path, str(finding.place)) == ("TTT106", "backbone.dim", "c.yaml:3:8")
    assert (finding.message, finding.fix, finding.replacement) == (NOISE, "keep heads at 2; write dim: 8", None)
    (first,) = _findings("backbone: {dim: 7, heads: 3}", backbone)
    assert first.path == "backbone.heads"  # the first that it names, not the first of the file
    follows = _findings("backbone: {dmi: 8}", backbone)
    assert [finding.path for finding in follows] == ["backbone.dmi"]


def test_a_plain_error_is_shown_as_it_is_and_blames_its_section_once() -> None:
    backbone = _with_options(_raising(ValueError(NOISE)))
    findings = _findings("backbone:\n  dim: 7\n  weights: x\ntrain: {lr: x, max_norm: 0}\n", backbone)
    told = [(finding.code, finding.path, finding.message, finding.fix) for finding in findings]
    assert told[0] == ("TTT106", "backbone", NOISE, "")
    assert [path for _, path, _, _ in told] == ["backbone", "train.lr", "train.max_norm"]
    # It may be about any key of the section, so that one which is misspelt may be its cause.
    assert [finding.path for finding in _findings("backbone: {dmi: 8}", backbone)] == ["backbone.dmi"]
    assert {finding.path for finding in _findings("backbone: {zzz: 8}", backbone)} == {"backbone.zzz", "backbone"}
    (unsaid,) = _findings("backbone: {dim: 7}", _with_options(_raising(ValueError())))
    assert unsaid.message == "`backbone` does not fit"


def test_a_plain_error_about_the_data_leaves_the_rest_to_be_checked() -> None:
    class Data(ToyData):
        @model_validator(mode="after")
        def _own(self) -> Data:
            assert self.window_tokens != 63, "window_tokens; write 5"
            return self

    findings = _findings("{data: {window_tokens: 63}, train: {warmup_steps: 2000}}", _with(data_options=Data))
    assert [finding.path for finding in findings] == ["data", "train.warmup_steps"]
    assert "window_tokens; write 5" in findings[0].message


def test_an_error_about_one_key_stands_at_it_whatever_it_says() -> None:
    class Options(ToyOptions):
        depth: int = 4

        @field_validator("depth")
        @classmethod
        def _even(cls, depth: int) -> int:
            if depth % 2:
                raise ValueError(NOISE)
            return depth

        @field_validator("flavour")
        @classmethod
        def _beside(cls, flavour: str, info: Any) -> str:
            if flavour == "sour" and info.data["dim"] != 32:
                raise Misfit(NOISE, keys=("dim", "flavour"), fix="write dim: 32")
            return flavour

    backbone = _with(options=Options)
    (finding,) = _findings("backbone: {depth: 3}", backbone)
    assert (finding.code, finding.path, finding.fix) == ("TTT103", "backbone.depth", "")
    assert finding.message == f"`backbone.depth`: {NOISE}"
    (two,) = _findings("backbone: {depth: 2, flavour: sour, dim: 5}", backbone)
    assert (two.code, two.path, two.fix, two.message) == ("TTT106", "backbone.dim", "write dim: 32", NOISE)


def test_keys_that_the_section_does_not_have_blame_it_as_a_whole() -> None:
    (finding,) = _findings("backbone: {dim: 7}", _with_options(_raising(Misfit("no", keys=("lr", "zzz")))))
    assert (finding.code, finding.path) == ("TTT106", "backbone")
    (finding,) = _findings("backbone: {dim: 7}", _with_options(_raising(Misfit(keys="dim"))))
    assert (finding.path, finding.message) == ("backbone.dim", "`backbone.dim` does not fit")


class _Colour(Enum):
    RED = "red"
    DARK_BLUE = "dark blue"


class _Source(Section):
    kind: Literal["file", "folder"] = "file"
    share: Annotated[float, Field(ge=0)] = 1.0

    @model_validator(mode="after")
    def _fits(self) -> _Source:
        if self.kind == "folder" and self.share > 2:
            raise Misfit("too much", keys=("share",), fix="write 1")
        return self


def _custom(value: str) -> str:
    raise PydanticCustomError("no_such_thing", NOISE)


class _Options(ToyOptions):
    colour: Annotated[_Colour, Field(strict=False)] = _Colour.RED
    size: Literal[8, "auto", None] = 8
    tastes: list[Literal["salty", "bitter"]] | None = None
    steps: Annotated[int, Field(multiple_of=8)] = 8
    strange: Annotated[str, AfterValidator(_custom)] = "a"
    sources: list[_Source] | None = None
    either: int | Annotated[str, AfterValidator(_custom)] = 1
    text: Annotated[str, Field(pattern="^a+$")] = "a"
    shares: dict[str, Literal["few", "many"]] | None = None


OTHERS = [
    ("colour: dark-blue", "colour", "must be one of `red`, `dark blue`, not 'dark-blue'", "write `dark blue`"),
    ("size: 9", "size", "must be one of `8`, `auto`, `null`, not 9", "write one of `8`, `auto`, `null` (default: 8)"),
    ("size: Auto", "size", "must be one of", "write `auto`"),
    ("tastes: [salty, biter]", "tastes.1", "must be one of `salty`, `bitter`, not 'biter'", "write `bitter`"),
    ("shares: {a: mny}", "shares.a", "must be one of `few`, `many`", "write `many`"),
    ("steps: 9", "steps", "must be a multiple of 8, not 9", "write a multiple of 8 (default: 8)"),
    ("text: b", "text", "must be text that matches `^a+$`, not 'b'", "write text that matches `^a+$` (default: a)"),
    ("strange: b", "strange", f"`backbone.strange`: {NOISE}", "write another value (default: a)"),
    ("sources: [{kind: flie}]", "sources.0.kind", "must be one of `file`, `folder`", "write `file`"),
    ("sources: [{share: -1}]", "sources.0.share", "must be at least 0, not -1", "write a number of at least 0"),
    ("sources: [{kind: folder, share: 3}]", "sources.0.share", "too much", "write 1"),
    ("sources: [{}, {knd: file}]", "sources.1.knd", "unknown key `knd`", "write `kind`"),
    ("sources: [[]]", "sources.0", "must be a section", "write its keys below it, indented: `kind`, `share`"),
]


@pytest.mark.parametrize(("written", "path", "message", "fix"), OTHERS)
def test_what_a_key_takes_is_read_off_its_type(written: str, path: str, message: str, fix: str) -> None:
    findings = _findings(f"{{backbone: {{{written}}}, train: {{warmup_steps: 2000}}}}", _with(options=_Options))
    assert [finding.path for finding in findings] == [f"backbone.{path}", "train.warmup_steps"]
    assert message in findings[0].message
    assert findings[0].fix.startswith(fix)


# --- what a plugin refuses beside its validators ---


def _refusing(error: TTTError) -> Finding:
    (finding,) = _findings("backbone: {name: toy, dim: 32}", _with(facts=lambda self, config: _raising(error)(None)))
    return finding


def test_an_error_of_a_plugin_carries_its_key_and_fix() -> None:
    error = UsageError(NOISE, key="backbone.dim", fix="write 4; or leave it out", details=["one", "two"])
    assert str(error) == f"backbone.dim: {NOISE}; write 4; or leave it out\n  one\n  two"
    finding = _refusing(error)
    assert (finding.code, finding.path, finding.fix) == ("TTT106", "backbone.dim", "write 4; or leave it out")
    assert finding.message == f"backbone.dim: {NOISE}\n  one\n  two"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.told, again.key, again.fix) == (str(error), error.told, error.key, error.fix)


def test_an_error_of_a_plugin_without_them_is_not_read() -> None:
    finding = _refusing(EnvironmentProblem("ttt.layers: no number; write 4"))
    assert (finding.code, finding.path, finding.fix) == ("TTT605", "backbone", "")
    assert finding.message == "ttt.layers: no number; write 4"
    assert _refusing(UsageError("no", key="nowhere.at_all")).path == "backbone"
    assert _refusing(PluginError("broken; write 4", key="backbone.dim")).path == "backbone.name"


@pytest.mark.parametrize("content", ["not JSON", '{"num_layers": -1}'])
@pytest.mark.parametrize(
    ("backbone", "options", "key", "fix"),
    [
        (MoshiBackbone, "preset: 7b, config_path: FOLDER/config.json", "config_path", "write the path of a Moshi"),
        (
            VideoDiTBackbone,
            "preset: 5b, pretrained: FOLDER",
            "pretrained",
            "name a folder with CogVideoX's transformer",
        ),
    ],
)
def test_plugins_say_which_key_names_a_file_that_is_none(
    backbone: type[Backbone], options: str, key: str, fix: str, content: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(content)
    findings = _findings(f"backbone: {{{options.replace('FOLDER', str(tmp_path))}}}", backbone())
    (finding,) = (finding for finding in findings if finding.code == "TTT605")
    assert finding.path == f"backbone.{key}"
    assert finding.fix.startswith(fix)
    assert finding.message.startswith(f"backbone.{key}: {tmp_path}")
    assert fix not in finding.message


# --- what a group size costs ---


def test_only_who_writes_the_settings_is_warned_of_their_cost() -> None:
    costly = {"scan_checkpoint_group_size": 1}
    with pytest.warns(NestedCheckpointWarning, match="Write 16, as the literature trained with, or 0") as told:
        mine = TTTConfig(**costly)
    assert [warning.filename for warning in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = TTTConfig.model_validate(costly)
        RunConfig.model_validate({"backbone": {"name": "toy"}, "ttt": costly})
        RunConfig.model_validate({"backbone": {"name": "toy"}, "ttt": mine})
        run_config_model(TOY_BACKBONE).model_validate({"backbone": {"name": "toy"}, "ttt": mine})
        pickle.loads(pickle.dumps(mine)).model_copy()
        with pytest.raises(ValidationError, match="greater than or equal to 0"):
            TTTConfig(scan_checkpoint_group_size=-1)
    assert read == mine


def test_nobody_mutes_the_warning() -> None:
    """Whoever would need to has a source of it that does not know whether a user wrote the settings."""
    names = [
        str(file.relative_to(ROOT))
        for folder in ("ttt", "cli", "plugins", "benchmarks")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if "NestedCheckpointWarning" in file.read_text(encoding="utf-8")
    ]
    assert names == ["ttt/__init__.py", "ttt/config/schema.py", "ttt/errors.py"]


# --- nothing reads a message ---

_READING = {
    *("search", "match", "fullmatch", "findall", "finditer", "sub", "split", "partition", "rpartition"),
    *("startswith", "endswith", "removeprefix", "removesuffix", "find", "index"),
}
_SENTENCES = {"message", "msg", "fix", "told", "words", "asked", "sentence", "error", "complaint"}
_OF_YAML = "complaints.py"
"""It explains what YAML's parser says, which has nothing but words for it."""


def _is_sentence(node: ast.expr) -> bool:
    """Whether an expression is a message by its name, or the text of an error."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "str" and node.args:
        return _is_sentence(node.args[0])
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name in _SENTENCES


def _read_sentences(source: str) -> Iterator[str]:
    """Where code looks into the words of a message."""
    for node in ast.walk(ast.parse(source)):
        read: list[ast.expr] = []
        if isinstance(node, ast.Compare) and any(isinstance(op, ast.In | ast.NotIn) for op in node.ops):
            read = node.comparators
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _READING:
            read = [node.func.value, *node.args]
        if any(map(_is_sentence, read)):
            yield ast.unparse(node)


@pytest.mark.parametrize(
    "wrong",
    [
        're.findall(r"\\w+", misfit.message)',
        're.sub(r"^Input should be ", "", misfit.message)',
        "_WRITE.search(str(error))",
        'str(error).partition(": ")',
        '"number" in asked',
        'asked.startswith("at ")',
        'problem.msg.split("; write ")',
    ],
)
def test_the_search_finds_a_message_that_is_read(wrong: str) -> None:
    assert list(_read_sentences(wrong))


def test_nothing_about_configs_reads_a_message() -> None:
    found = {
        f"{file.relative_to(ROOT / 'ttt')}: {read}"
        for folder in ("check", "config")
        for file in sorted((ROOT / "ttt" / folder).rglob("*.py"))
        if file.name != _OF_YAML
        for read in _read_sentences(file.read_text(encoding="utf-8"))
    }
    assert found <= {
        "config/explanation.py: str(error).split()",  # put on one line
        "check/whole_data.py: error.told.removeprefix(f'{key}: ')",  # the finding has the key itself
        "check/whole_data.py: sentence.removeprefix(f'{path}: ')",
    }
