"""A rule has one home: its codes, what it reads, whom it blames, and a file that explains it; plugins' rules too."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fake_distributions import importable, install
from toy_config import ToyBackbone

from ttt.check import check_config, load_config
from ttt.check.catalogue import DECLARED, explanations, explanations_of
from ttt.check.examined import examined
from ttt.check.explain import catalogue, explain
from ttt.check.rules import RULES
from ttt.config import Blame, Code, Finding, RunConfig, Severity
from ttt.config.explanation import Explanation, read_explanations
from ttt.errors import ConfigError, PluginError
from ttt.plugins import Rule, find, rule, run_config_model
from ttt_cli.main import main

ROOT = Path(__file__).parent.parent
HOMES = {name: Path(str(sys.modules[name].__file__)) for name in sorted({code.home for code in DECLARED.values()})}
"""The modules that declare the core's codes."""

# --- the core's own ---


def _declared_and_used(text: str) -> dict[str, tuple[set[str], set[str]]]:
    """The codes that each rule of a module declares, and those that it or what it uses there names."""
    tree = ast.parse(text)
    names: dict[str, set[str]] = {}
    rules: dict[str, set[str]] = {}
    for node in tree.body:
        used = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        if isinstance(node, ast.FunctionDef):
            names[node.name] = {
                inner.id for part in node.body for inner in ast.walk(part) if isinstance(inner, ast.Name)
            }
            for made in node.decorator_list:
                if isinstance(made, ast.Call) and ast.unparse(made.func) == "rule":
                    rules[node.name] = {argument.id for argument in made.args if isinstance(argument, ast.Name)}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = used
    codes = {name for name, used in names.items() if used & {"_code", "Code"} and name != "_code"}

    def reached(name: str) -> set[str]:
        found, ahead = set[str](), [name]
        while ahead:
            new = names.get(ahead.pop(), set()) - found - rules.keys()
            found |= new
            ahead += new
        return found & codes

    return {name: (declared, reached(name)) for name, declared in rules.items()}


def test_each_rule_finds_what_it_declares_and_no_other_code() -> None:
    checked = 0
    for home in HOMES.values():
        for name, (declared, used) in _declared_and_used(home.read_text(encoding="utf-8")).items():
            assert declared == used, f"{home.name}: {name}"
            checked += 1
    assert checked == len(RULES)


def test_a_rule_that_finds_another_code_is_seen() -> None:
    source = (
        "TTT1 = _code('TTT1')\nTTT2 = _code('TTT2')\nTTT3 = _code('TTT3')\n_TABLE = (TTT2, 'x')\n"
        "def _helper(x):\n    return _TABLE[0].at(x)\n"
        "@rule({codes}, reads=())\ndef one(context):\n    yield TTT1.at('')\n    yield _helper('')\n"
    )
    assert _declared_and_used(source.replace("{codes}", "TTT1, TTT2")) == {"one": ({"TTT1", "TTT2"}, {"TTT1", "TTT2"})}
    for codes in ("TTT1", "TTT1, TTT2, TTT3"):
        declared, used = _declared_and_used(source.replace("{codes}", codes))["one"]
        assert declared != used


def test_every_key_that_a_rule_reads_is_one_of_a_config() -> None:
    for each in RULES:
        assert each.reads is not None
        for key in set(each.reads) - {"facts", "needs"}:
            model: Any = run_config_model(ToyBackbone())
            for part in key.split("."):
                assert part in model.model_fields, f"{each.name}: {key}"
                model = model.model_fields[part].annotation
                model = getattr(model, "__bound__", model)  # a section that the backbone narrows


def test_every_finding_of_the_core_is_made_by_its_code() -> None:
    """One that is made by hand has no title, and blames nobody."""
    by_hand = set()
    for file in sorted((ROOT / "ttt").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)] if "Finding(" in text else []
        if any(isinstance(call.func, ast.Name) and call.func.id == "Finding" for call in calls):
            by_hand.add(file.relative_to(ROOT).as_posix())
    assert by_hand == {"ttt/config/findings.py", "ttt/check/render.py"}


def test_nothing_is_decided_by_how_a_code_begins() -> None:
    for folder in ("ttt", "cli", "plugins"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            text = file.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(text)) if "TTT" in text or "VDT" in text else ():
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    words = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
                    asks = node.func.attr in ("startswith", "match", "fullmatch", "compile", "search", "removeprefix")
                    assert not (asks and any(str(word).startswith(("TTT", "VDT")) for word in words)), (
                        file,
                        node.lineno,
                    )


def test_no_number_is_declared_twice_and_each_lies_where_its_home_says() -> None:
    for home, file in HOMES.items():
        own = [code for code in vars(sys.modules[home]).values() if isinstance(code, Code) and code.home == home]
        tables = [vars(sys.modules[home]).get(name, {}) for name in ("LAWS",)]
        own += [code for table in tables for code in table.values()]
        assert {code.number for code in own} == {code.number for code in DECLARED.values() if code.home == home}
        assert all(DECLARED[code.number] is code for code in own), f"{file.name} declares a number of another module's"
        assert file.with_suffix(".yaml").is_file()


# --- explanations as data ---


_ENTRY = "{what: It is., why: It costs., bad: 'a: 1', good: 'a: 2', source: somebody}"


def _home(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str | bytes | None) -> str:
    """A module with a file beside it that explains its codes."""
    module = ModuleType("a_home")
    module.__file__ = str(folder / "a_home.py")
    monkeypatch.setitem(sys.modules, "a_home", module)
    if text is not None:
        (folder / "a_home.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return "a_home"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "a_home.yaml"),
        (f"TOY1: {_ENTRY}\n", "TOY2 is not explained"),
        (f"TOY1: {_ENTRY}\nTOY2: {_ENTRY}\nTOY3: {_ENTRY}\n", "TOY3 is explained, and no rule declares it"),
        (f"TOY1: {_ENTRY}\nTOY2: {{what: It is.}}\n", "TOY2: why must be text"),
        (f"TOY1: {_ENTRY}\nTOY2: {_ENTRY.replace('source', 'sauce')}\n", "TOY2: no explanation has 'sauce'"),
        (
            f"TOY1: {_ENTRY}\nTOY2: {_ENTRY.replace('source', 'severity: note, source')}\n",
            "no explanation has 'severity'",
        ),
        *(
            (
                f"TOY1: {_ENTRY}\nTOY2: {_ENTRY[:-1]}, {key}: {value}}}\n",
                f"TOY2: {key} is not in the form that ttt.config.explanation describes",
            )
            for key, value in (
                *(("options", "3"), ("options", "--cost"), ("good_options", "null"), ("environment", "{A: 1}")),
                *(("files", "[a]"), ("files", "{a.jsonl: null}"), ("files", "{3: x}"), ("files", "{a: {zeros: 3}}")),
                *(("files", "{a: {safetensors: 3}}"), ("bad_bytes", "3"), ("bad_bytes", "[3]"), ("bad_bytes", "€")),
                *(("fix", "3"), ("needs", "[torch]")),
            )
        ),
        (f"TOY1: {_ENTRY}\nTOY2: a text\n", "a section for each code"),
        ("", "a section for each code"),
        ("TOY1: {\n", "a_home.yaml"),
        (b"TOY1: \xff\n", "a_home.yaml"),
    ],
)
def test_codes_and_explanations_are_the_same_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | bytes | None, words: str
) -> None:
    home = _home(tmp_path, monkeypatch, text)
    codes = [Code(number, "a toy", Severity.NOTE, home=home) for number in ("TOY1", "TOY2")]
    with pytest.raises(ValueError, match=r"a_home\.yaml") as caught:
        read_explanations(codes)
    assert words in str(caught.value)


def test_a_code_of_the_core_without_an_explanation_is_seen() -> None:
    more = Code("TTT799", "new and unexplained", Severity.NOTE, home="ttt.check.rules.optimisation")
    with pytest.raises(ValueError, match=r"optimisation\.yaml: TTT799 is not explained"):
        read_explanations([*DECLARED.values(), more])
    with pytest.raises(ValueError, match=r"optimisation\.yaml: TTT706 is explained, and no rule declares it"):
        read_explanations([code for code in DECLARED.values() if code.number != "TTT706"])


def test_severity_and_title_of_an_explanation_are_those_of_its_code() -> None:
    for number, entry in explanations().items():
        assert (entry.severity, entry.title) == (DECLARED[number].severity.value, DECLARED[number].title)


def test_what_no_text_can_hold_is_written_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        f"TOY1: {_ENTRY[:-1]}, options: [--set, 1], bad_bytes: [{{'#': 3}}, \"\\xfc\\0\"],"
        " files: {a.safetensors: {safetensors: {metadata: {format: toy, config: {layers: [1]}}, zeros: {w: [2, 3]}}},"
        " b.safetensors: {safetensors: {zeros: {w: [2]}}, cut: 20}}}\n"
    )
    (entry,) = read_explanations(
        [Code("TOY1", "a toy", Severity.NOTE, home=_home(tmp_path, monkeypatch, text))]
    ).values()
    assert entry.bad_bytes == b"###\xfc\0"
    assert entry.options == ("--set", "1")
    written = entry.files["a.safetensors"]
    size = int.from_bytes(written[:8].encode("ascii"), "little")
    assert len(written) == 8 + size + 12
    header = json.loads(written[8 : 8 + size])
    assert header["w"] == {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}
    assert len(entry.files["b.safetensors"]) == 20
    said = header["__metadata__"]
    assert (said["format"], json.loads(said["config"])) == ("toy", {"layers": [1]})


def test_a_home_that_is_no_module_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="write home=__name__"):
        read_explanations([Code("TOY1", "a toy", Severity.NOTE, home="no_such_module")])


# --- rules of plugins ---


def _with(*rules: Any, **more: Any) -> ToyBackbone:
    return type("Toy", (ToyBackbone,), {"__module__": __name__, "rules": rules, **more})()


XYZ401 = Code("XYZ401", "a lonely batch", Severity.WARNING)
XYZ402 = Code("XYZ402", "a toy without data", Severity.ERROR, blames=Blame.MACHINE, of_training=True)


@rule(XYZ401, reads=("train.batch_size",))
def lonely(config: RunConfig) -> Iterator[Finding]:
    if config.train.batch_size == 1:
        yield XYZ401.at("train.batch_size", "a batch of one", "write 2", value=1)


@rule(XYZ402)
def dataless(config: RunConfig) -> Iterator[Finding]:
    yield XYZ402.at("data", "there is none")


@rule(XYZ401)
def wrong(config: RunConfig) -> list[Finding]:
    return [XYZ402.at("data", "there is none")]


@rule(XYZ401, XYZ402)
def by_hand(config: RunConfig) -> list[Finding]:
    return [Finding(code="XYZ402", severity=Severity.NOTE, path="data", message="there is none")]


def _codes(text: str, *rules: Any) -> list[str]:
    return [finding.code for finding in check_config("c.yaml", text=text, backbone=_with(*rules)).findings]


def test_a_rule_of_a_plugin_gives_what_its_code_says() -> None:
    checked = check_config("c.yaml", text="train: {batch_size: 1}", backbone=_with(lonely, dataless))
    data, batch = sorted(checked.findings, key=lambda finding: finding.path)
    assert (batch.code, batch.severity, batch.title, str(batch.place)) == (
        *("XYZ401", Severity.WARNING, "a lonely batch", "c.yaml:1:21"),
    )
    assert (data.blames, data.only_for_training) == (Blame.MACHINE, True)


def test_a_finding_of_a_code_that_the_rule_does_not_declare_is_the_plugins_failure() -> None:
    (finding,) = check_config("c.yaml", text="run_dir: null", backbone=_with(wrong)).findings
    assert finding.code == "TTT803"
    line = wrong.check.__code__.co_firstlineno
    assert finding.message == (
        f"the plugin toy ({__name__}) failed in its rule wrong, {__file__}:{line}: "
        f"it returned a Finding of the code XYZ402, and declares XYZ401 alone"
    )


def test_a_finding_made_by_hand_gets_what_the_rule_declares() -> None:
    (finding,) = check_config("c.yaml", text="run_dir: null", backbone=_with(by_hand)).findings
    assert (finding.declared, finding.severity, finding.title) == (XYZ402, Severity.NOTE, "a toy without data")


def test_a_rule_is_asked_where_what_it_reads_is_as_the_user_meant_it() -> None:
    assert _codes("train: {batch_size: 1}", lonely, dataless) == ["XYZ402", "XYZ401"]
    assert _codes("train: {batch_size: 1, max_steps: many}", lonely, dataless) == ["XYZ401", "TTT102"]
    assert _codes("train: {batch_size: one}", lonely, dataless) == ["TTT102"]
    assert _codes("train: 1", lonely) == ["TTT102"]


def test_nothing_is_left_out_for_its_number_where_nothing_is_trained() -> None:
    """XYZ401 looks like the core's codes of memory, and is about something else."""

    def plain(config: RunConfig) -> list[Finding]:
        of_training = {"XYZ501": False, "XYZ502": True}
        return [
            Finding(code=code, severity=Severity.NOTE, path="", message="m", of_training=left_out)
            for code, left_out in of_training.items()
        ]

    def found(training: bool) -> set[str]:
        text = "train: {batch_size: 1, max_steps: 5, warmup_steps: 6}\ndata: {train_data: nowhere.jsonl}"
        backbone = _with(lonely, dataless, plain)
        try:
            return {f.code for f in load_config("c.yaml", text=text, backbone=backbone, training=training).findings}
        except ConfigError as error:
            return {finding.code for finding in error.findings}

    assert found(training=True) == {"XYZ401", "XYZ402", "XYZ501", "XYZ502", "TTT501", "TTT701"}
    assert found(training=False) == {"XYZ401", "XYZ501"}


@pytest.mark.parametrize(("codes", "more"), [((), {}), ((len,), {}), ((XYZ401,), {"reads": "train.lr"})])
def test_a_rule_that_is_declared_wrongly_says_how_it_is_done(codes: tuple[Any, ...], more: Mapping[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"write @rule\(ABC101\)|write reads=\('train.lr',\)"):
        rule(*codes, **more)


_PLUGIN = (
    "from toy_config import *\n"
    "from ttt.config import Code, Severity\n"
    "from ttt.plugins import rule\n"
    "OWN101 = Code('{number}', 'of its own', Severity.WARNING, home=__name__)\n"
    "@rule(OWN101)\n"
    "def ours(config):\n"
    "    yield OWN101.at('ttt', 'it is owned', 'write nothing')\n"
    "class Own(ToyBackbone):\n"
    "    name = 'own'\n"
    "    rules = (ours,)\n"
    "    def presets(self):\n        return {'demo': 'backbone: {name: own}'}\n"
    "@hookimpl\ndef ttt_backbone():\n    return Own()\n"
)


def _installed(folder: Path, *, number: str = "OWN101", entry: str | None = f"OWN101: {_ENTRY}\n") -> None:
    install(folder, "own", "own_plugin", _PLUGIN.replace("{number}", number))
    if entry is not None:
        (folder / "own_plugin.yaml").write_text(entry, encoding="utf-8")


def test_a_plugins_rule_and_its_explanation_stand_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("backbone: {name: own}\n", encoding="utf-8")
    with importable(tmp_path):
        assert explain("own101").startswith("OWN101  warning  of its own\n\nIt is.\n\nIt costs.\n\nbad:\n    a: 1")
        assert "The plugin own\n  OWN101  warning  of its own" in catalogue()
        assert main(["check", "c.yaml", "--format", "json"]) == 0
        (finding,) = json.loads(capsys.readouterr().out)
        assert (finding["code"], finding["title"]) == ("OWN101", "of its own")
        assert main(["check", "c.yaml", "--format", "sarif"]) == 0
        (told,) = json.loads(capsys.readouterr().out)["runs"][0]["tool"]["driver"]["rules"]
        assert told == {"id": "OWN101", "shortDescription": {"text": "of its own"}}
        assert main(["plugins"]) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"entry": None}, "own_plugin.yaml"),
        ({"entry": f"OWN102: {_ENTRY}\n"}, "OWN101 is not explained"),
        ({"number": "TTT101", "entry": f"TTT101: {_ENTRY}\n"}, "TTT101, which is the core's"),
    ],
)
def test_a_plugin_that_does_not_explain_its_codes_is_broken(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    _installed(tmp_path, **more)
    with importable(tmp_path):
        plugin = find("own")
        assert plugin is not None
        told = str(examined(plugin).error)
        assert "the plugin own (ttt-own 1.2)" in told
        assert words in told
        assert "TTT101" in catalogue()  # and the others are listed


def test_a_code_without_a_home_is_explained_by_the_backbone() -> None:
    entry = Explanation("note", "It is.", "It costs.", "a: 1", "a: 2", "somebody", title="another title")
    told = explanations_of(_with(lonely, explanations=lambda self: {"XYZ401": entry, "XYZ1": entry}))
    assert told["XYZ401"] == replace(entry, severity="warning", title="a lonely batch")  # the code's own
    assert told["XYZ1"] == entry
    with pytest.raises(PluginError, match="does not explain its code XYZ401"):
        explanations_of(_with(lonely))
    assert explanations_of(_with(lambda config: [])) == {}


def test_a_rule_is_a_function_with_what_it_declares() -> None:
    assert isinstance(lonely, Rule)
    assert (lonely.name, lonely.codes, lonely.reads, dataless.reads) == (
        "lonely",
        (XYZ401,),
        ("train.batch_size",),
        None,
    )
