"""Imports run one way, what checks a config needs no torch, and nothing is installed under somebody else's name."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from ttt.plugins import discover
from ttt.plugins.hookspecs import KINDS as HOOKS

ROOT = Path(__file__).parent.parent
PLUGINS = {file.parent.name: file.parent for file in sorted((ROOT / "plugins").glob("*/ttt_*/plugin.py"))}
"""The packages of the plugins in this repository."""
PLUGIN_PACKAGES = {folder.name for folder in PLUGINS.values()}
NOT_INSTALLED = {"ttt_example"}
"""What `make setup` leaves out: an example for authors. `tests/test_example.py` installs it, for itself alone."""
TAKEN = {"cli", "plugins", "moshi", "tests", "benchmarks", "docs", "scripts"}
"""Names that are not ours to install: kyutai's package is `moshi`, and the others are anybody's."""


def _imports(file: Path, package_root: Path) -> Iterator[tuple[str, bool]]:
    """Every absolute module that a file imports, and whether only a type checker sees it."""
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    package = file.relative_to(package_root).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        hidden = id(node) in typing_only
        if isinstance(node, ast.Import):
            yield from ((alias.name, hidden) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            outer = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [outer, node.module]))
            yield module, hidden
            yield from ((f"{module}.{alias.name}", hidden) for alias in node.names)


@functools.cache
def _imported(folder: Path, *, package_root: Path) -> dict[str, set[str]]:
    """What each file of a package imports, types included."""
    files = sorted(folder.rglob("*.py"))
    assert files
    return {str(file.relative_to(ROOT)): {name for name, _ in _imports(file, package_root)} for file in files}


ROOMS = (
    # what knows nothing of the rest: errors, words, files, a process
    *("ttt.words", "ttt.errors", "ttt.version", "ttt.printable", "ttt.amounts", "ttt.progress", "ttt.checksums"),
    *(
        "ttt.file_kinds",
        "ttt.foreign",
        "ttt.reading",
        "ttt.jsonl",
        "ttt.files",
        "ttt.packaged",
        "ttt.checkpoint_folder",
        "ttt.dotted",
        "ttt.interrupt",
        "ttt.slurm",
    ),
    *("ttt.prompts", "ttt.drawing"),
    # the mathematics, this machine, what a run is and costs, what a plugin provides
    *(
        "ttt.ops",
        "ttt.seeds",
        "ttt.machine",
        "ttt.config",
        "ttt.costs",
        "ttt.communication",
        "ttt.plugins",
        "ttt.devices",
        "ttt.lora_file",
    ),
    # several processes on one run
    "ttt.parallel",
    # the layer, and putting it into a model
    *(
        "ttt.state",
        "ttt.layer_inputs",
        "ttt.layer_sharing",
        "ttt.layer_held",
        "ttt.layer_tokens",
        "ttt.layer_step",
        "ttt.layer",
        "ttt.lora",
        "ttt.adapter",
        "ttt.inject",
        "ttt.parallel.heads",
        "ttt.parallel.sequence",
        "ttt.evidence",
        "ttt.inner_curves",
        "ttt.adapter_file",
    ),
    # what the language models of a library have in common
    "ttt.hf",
    # what a run was worth
    "ttt.eval",
    # what is said about a run before it starts, the run, and what it learned in use
    *("ttt.check", "ttt.train", "ttt.cluster", "ttt.runs", "ttt.learned", "ttt.samples", "ttt.sample", "ttt.evaluate"),
    "ttt.indexing",
    # the library in a notebook
    "ttt.facade",
    # what all of it is held to
    *("ttt.laws", "ttt.testing", "ttt.check.probe", "ttt.check.doctor"),
    # the library by its public names
    "ttt",
)
"""Every room of the library, a module or a package, lowest first. A file imports its own room and those before it.

Of two rooms that hold a file the one with the longer name is meant.
"""
TORCHLESS = (
    "ttt.errors",
    "ttt.amounts",
    "ttt.slurm",
    "ttt.machine",
    "ttt.config",
    "ttt.costs",
    "ttt.communication",
    "ttt.plugins",
    "ttt.check",
    "ttt.cluster",
)
PACKAGES = {"ttt": ROOT / "ttt", "ttt_cli": ROOT / "cli" / "ttt_cli", **PLUGINS}
KINDS = ("module", "type", "function")
"""When an import is made: with its module, for a type checker alone, or once a function is called."""

Arrows = dict[tuple[str, str], set[str]]
"""Who imports whom, and of which kinds; both ends are files."""


def _modules(folder: Path) -> dict[str, Path]:
    """The modules of a package, by name."""
    named = ((".".join((folder.name, *f.relative_to(folder).with_suffix("").parts)), f) for f in folder.rglob("*.py"))
    return {name.removesuffix(".__init__"): file for name, file in sorted(named)}


def _kinds_of_nodes(tree: ast.AST, kind: str = "module") -> Iterator[tuple[ast.AST, str]]:
    """Every node of a file with the kind that an import there would be of."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for part, inner in ((node.body, "type"), (node.orelse, kind)):
                yield from _kinds_of_nodes(ast.Module(part, []), inner)
            continue
        inside = "function" if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) else kind
        yield node, kind
        yield from _kinds_of_nodes(node, inside)


def _arrows(modules: dict[str, Path]) -> Arrows:
    """Who imports whom among the modules. Of `from a import b` the module `a.b` is meant, where there is one."""
    arrows: Arrows = {}
    for name, file in modules.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for node, kind in _kinds_of_nodes(ast.parse(file.read_text(encoding="utf-8"), str(file))):
            for target in _targets(node, package, modules):
                if target != name:
                    arrows.setdefault((name, target), set()).add(kind)
    return arrows


@functools.cache
def _arrows_in(package: str) -> Arrows:
    """Who imports whom in one of our packages."""
    return _arrows(_modules(PACKAGES[package]))


def _targets(node: ast.AST, package: str, modules: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
    elif isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        outer = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
        module = ".".join(filter(None, [outer, node.module]))
        for alias in node.names:
            yield from [name for name in (f"{module}.{alias.name}", module) if name in modules][:1]


def _room(module: str, rooms: tuple[str, ...] = ROOMS) -> str | None:
    """The room that a module is in; None where it is in none."""
    holding = [room for room in rooms if module == room or (room != "ttt" and module.startswith(f"{room}."))]
    return max(holding, key=len, default=None)


def _upward(arrows: Arrows) -> list[str]:
    """The arrows from a room to one that stands above it."""
    return [
        f"{source} imports {target} ({', '.join(sorted(kinds))}): {_room(target)} stands above {_room(source)}"
        for (source, target), kinds in arrows.items()
        if ROOMS.index(_room(target) or "") > ROOMS.index(_room(source) or "")
    ]


def _circles(arrows: Arrows) -> list[list[str]]:
    """Files of which each reaches each other one by imports, of whatever kind, in groups."""
    beyond: dict[str, set[str]] = {}
    for source, target in arrows:
        beyond.setdefault(source, set()).add(target)

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        ahead = [start]
        while ahead:
            new = beyond.get(ahead.pop(), set()) - found
            found |= new
            ahead += new
        return found

    reach = {name: reached(name) for name in beyond}
    circles = {
        frozenset(other for other in far if name in reach.get(other, ())) for name, far in reach.items() if name in far
    }
    return sorted(map(sorted, circles))


def _inside(name: str, packages: set[str]) -> bool:
    return name.split(".")[0] in packages


def test_the_reader_of_imports_reads_them_all(tmp_path: Path) -> None:
    file = tmp_path / "ttt" / "ops" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import a.b\nfrom c import d\nfrom . import e\nfrom .. import f\nfrom ..g import h\n"
        "def late():\n    import i\n"
        "if TYPE_CHECKING:\n    import j\nelse:\n    import k\n"
    )
    found = list(_imports(file, tmp_path))
    assert {name for name, hidden in found if not hidden} == {
        *("a.b", "c", "c.d", "ttt.ops", "ttt.ops.e", "ttt", "ttt.f", "ttt.g", "ttt.g.h", "i", "k")
    }
    assert [name for name, hidden in found if hidden] == ["j"]


def test_every_file_is_in_a_room() -> None:
    modules = _modules(PACKAGES["ttt"])
    assert [name for name in modules if _room(name) is None] == []
    assert [room for room in ROOMS if room not in modules] == []  # a room that is gone


def test_no_room_imports_one_above_it() -> None:
    arrows = _arrows_in("ttt")
    assert len(arrows) > 300
    assert _upward(arrows) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_files_import_each_other_in_a_circle(package: str) -> None:
    arrows = _arrows_in(package)
    assert arrows
    assert _circles(arrows) == []


def _written(folder: Path, files: dict[str, str]) -> Arrows:
    for name, text in files.items():
        file = folder / "ttt" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return _arrows(_modules(folder / "ttt"))


HARMLESS = {
    "__init__.py": "",
    "errors.py": "",
    "config/__init__.py": "from ttt.config.schema import Options\n",
    "config/schema.py": "from .. import errors\n",
    "check/__init__.py": "",
    "check/load.py": "import ttt.config.schema\nfrom ttt.config import Options\n",
    "check/probe.py": "from ttt.laws import checks\n",
    "laws/__init__.py": "",
    "laws/checks.py": "from ttt.check import load\n",
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_arrow_up_of_each_kind_is_told(tmp_path: Path, kind: str) -> None:
    assert _upward(_written(tmp_path, HARMLESS)) == []
    wrong = {
        "module": "try:\n    from ttt.check import load\nexcept ImportError:\n    pass\n",
        "type": "if TYPE_CHECKING:\n    from ttt.check.load import Loaded\n",
        "function": "class Options:\n    def late(self):\n        from ..check.load import Loaded\n",
    }
    arrows = _written(tmp_path, {"config/schema.py": wrong[kind]})
    assert arrows["ttt.config.schema", "ttt.check.load"] == {kind}
    told = f"ttt.config.schema imports ttt.check.load ({kind}): ttt.check stands above ttt.config"
    assert _upward(arrows) == [told]


def test_a_room_inside_another_has_its_own_height(tmp_path: Path) -> None:
    arrows = _written(tmp_path, {**HARMLESS, "check/load.py": "def late():\n    from ttt.check.probe import probe\n"})
    assert _upward(arrows) == [
        "ttt.check.load imports ttt.check.probe (function): ttt.check.probe stands above ttt.check"
    ]
    arrows = _written(tmp_path, {"config/schema.py": "from ttt import Backbone\n"})
    assert "ttt.config.schema imports ttt (module): ttt stands above ttt.config" in _upward(arrows)


def test_a_circle_is_told_whatever_its_arrows_are_made_of(tmp_path: Path) -> None:
    assert _circles(_written(tmp_path, HARMLESS)) == []
    circle = {
        "config/one.py": "from ttt.config import two\n",
        "config/two.py": "if TYPE_CHECKING:\n    from ttt.config.three import Three\n",
        "config/three.py": "def late():\n    from .one import One\n",
        "config/four.py": "from ttt.config import one\n",
    }
    assert _circles(_written(tmp_path, circle)) == [["ttt.config.one", "ttt.config.three", "ttt.config.two"]]


def test_a_file_in_no_room_is_told(tmp_path: Path) -> None:
    _written(tmp_path, {**HARMLESS, "attic.py": ""})
    assert [name for name in _modules(tmp_path / "ttt") if _room(name) is None] == ["ttt.attic"]


def test_the_core_imports_no_plugin_and_no_command_line() -> None:
    for file, names in _imported(ROOT / "ttt", package_root=ROOT).items():
        foreign = {name for name in names if _inside(name, PLUGIN_PACKAGES | {"ttt_cli", "cli", "plugins", "moshi"})}
        assert not foreign, file


def test_the_command_line_imports_no_plugin() -> None:
    for file, names in _imported(ROOT / "cli" / "ttt_cli", package_root=ROOT / "cli").items():
        assert not {name for name in names if _inside(name, PLUGIN_PACKAGES | {"moshi"})}, file


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_imports_no_other_and_no_command_line(plugin: str) -> None:
    folder = PLUGINS[plugin]
    others = PLUGIN_PACKAGES - {plugin} | {"ttt_cli"}
    for file, names in _imported(folder, package_root=folder.parent).items():
        assert not {name for name in names if _inside(name, others)}, file


def _public_modules() -> set[str]:
    """What CONTRIBUTING says that a plugin may rely on."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## What a plugin may rely on\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}


def _module_of(name: str) -> str:
    """The module of ours in which an imported name is: `ttt.files` of `ttt.files.read_json`."""
    path = ROOT.joinpath(*name.split("."))
    there = path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
    return name if there else _module_of(name.rpartition(".")[0])


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_relies_on_public_modules_and_names_alone(plugin: str) -> None:
    folder, public = PLUGINS[plugin], _public_modules()
    assert {"ttt", "ttt.plugins", "ttt.testing"} <= public
    assert {_module_of(name) for name in public} == public
    for file, names in _imported(folder, package_root=folder.parent).items():
        ours = {name for name in names if _inside(name, {"ttt"})}
        assert {_module_of(name) for name in ours} <= public, file
        assert not {name for name in ours if re.search(r"\._[a-z]", name)}, file


@pytest.mark.parametrize("plugin", PLUGINS)
def test_the_plugin_is_on_top_of_its_package(plugin: str) -> None:
    arrows = _arrows_in(plugin)
    assert (f"{plugin}.plugin", f"{plugin}.options") in arrows
    assert [source for source, target in arrows if target == f"{plugin}.plugin"] == []


def test_what_a_run_is_rests_on_errors_and_what_a_file_is_alone() -> None:
    arrows = _arrows_in("ttt")
    below = {target for source, target in arrows if _room(source) == "ttt.config" and _room(target) != "ttt.config"}
    assert below == {"ttt.errors", "ttt.foreign"}


def test_the_mathematics_rests_on_torch_alone() -> None:
    for file, names in _imported(ROOT / "ttt" / "ops", package_root=ROOT).items():
        for name in names:
            top = name.split(".")[0]
            ours = name == "ttt.ops" or name.startswith("ttt.ops.")
            kernels = top == "triton" and "triton" in Path(file).parts[:-1]
            assert ours or kernels or top == "torch" or top in sys.stdlib_module_names, (file, name)


def _heavy_after(modules: list[str]) -> str:
    """Which heavy packages a fresh process has once it has imported the modules."""
    program = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
print(sorted({{"torch", "numpy", "moshi", "matplotlib", "safetensors", "sphn"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return result.stdout.strip()


RUNS_MODELS = ("ttt.check.probe", "ttt.check.doctor")


def test_what_checks_a_config_imports_no_torch() -> None:
    modules = _modules(PACKAGES["ttt"])
    static = [module for module in modules if _room(module, TORCHLESS) and not _room(module, RUNS_MODELS)]
    assert {"ttt.config.schema", "ttt.plugins.backbone", "ttt.check.load", "ttt.check.rules.memory"} <= set(static)
    assert _heavy_after(["ttt", *static, "ttt.ops.constants", "ttt_cli.main", "ttt_cli.app"]) == "[]"


def test_statistics_need_no_torch() -> None:
    """A check that counts pairs may draw them, and a table is made from files alone."""
    modules = [f"ttt.eval.{name}" for name in ("statistics", "by_position", "ratings", "strengths", "compare")]
    assert _heavy_after(["ttt.eval", *modules]) == "[]"


NOT_FOR_A_CHECK = {
    # what runs models, draws and tells of training
    *("torch", "numpy", "matplotlib", "rich", "safetensors", "moshi", "sphn", "diffusers", "transformers"),
    # what parses options that are not there, and the commands that are not asked for
    *("typer", "click", "ttt_cli.app", "ttt_cli.check", "ttt_cli.train", "ttt_cli.diff", "ttt_cli.import_config"),
    # backbones that the config does not name
    *PLUGIN_PACKAGES - {"ttt_moshi"},
    # other formats, fixes, explanations and the like
    *("ttt.check.explain", "ttt.check.catalogue", "ttt.check.fixes", "ttt.check.sarif", "ttt.check.diff"),
    *(
        "ttt.check.importing",
        "ttt.check.json_schema",
        "ttt.check.probe",
        "ttt.check.probe_codes",
        "ttt.train",
        "ttt.layer",
    ),
    # what a plugin may bring, and this check does not ask for; what is said of a file that does not parse
    *("ttt.plugins.imported", "ttt.plugins.sampling", "ttt.plugins.capable", "ttt.plugins.site", "ttt.plugins.rows"),
    *("ttt.plugins.loggers", "ttt.plugins.eval_tasks"),
    *("ttt.config.explanation", "ttt.config.complaints", "ttt.config.dumping", "ttt.devices"),
    # of the standard library, what only the above want
    *("asyncio", "http.client", "ssl", "difflib", "traceback", "subprocess", "multiprocessing", "logging", "runpy"),
}


def test_a_plain_check_imports_what_it_needs_and_no_more(tmp_path: Path) -> None:
    config = tmp_path / "moshi.yaml"
    config.write_text("backbone: {name: moshi}\nttt: {layers: [1]}\n", encoding="utf-8")
    program = f"""
import sys
from ttt_cli.main import main
code = main(["check", {str(config)!r}])
print(sorted({NOT_FOR_A_CHECK!r} & set(sys.modules)), "ttt_moshi" in sys.modules, code)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[] True 0"


def test_a_plugins_entry_point_imports_no_torch() -> None:
    ours = [plugin.module for plugin in discover() if plugin.module.split(".")[0] in PLUGIN_PACKAGES]
    assert ours
    assert _heavy_after(ours) == "[]"


def test_ttt_gives_what_it_lists() -> None:
    import ttt
    import ttt.check
    import ttt.config
    import ttt.plugins

    for module in (ttt, ttt.config, ttt.plugins, ttt.check):
        assert set(module.__all__) <= set(dir(module))
        for name in module.__all__:
            assert getattr(module, name) is not None
        with pytest.raises(AttributeError, match="no_such_name"):
            module.no_such_name  # noqa: B018


def test_our_distributions_install_our_names_alone() -> None:
    wheels = {"ttt-adapters": (ROOT, {"ttt", "ttt_cli"})}
    for package, folder in PLUGINS.items():
        wheels[package.replace("_", "-")] = (folder.parent, {package})
    for distribution, (folder, packages) in wheels.items():
        config = (folder / "pyproject.toml").read_text(encoding="utf-8")
        line = next(line for line in config.splitlines() if line.startswith("packages = "))
        built = {Path(path).name for path in ast.literal_eval(line.partition("=")[2].strip())}
        assert built == packages
        assert not built & TAKEN
        if packages <= NOT_INSTALLED:
            continue
        installed = metadata.distribution(distribution)
        assert {path.parts[0].removesuffix(".py") for path in installed.files or []}.isdisjoint(TAKEN)
        for entry_point in installed.entry_points:
            assert entry_point.group in ("console_scripts", *(hook.group for hook in HOOKS))
            assert entry_point.module.split(".")[0] in packages


def test_kyutais_package_is_the_one_that_is_imported() -> None:
    program = "import importlib.util; print(importlib.util.find_spec('moshi').origin)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT / "plugins"
    )
    assert "site-packages" in result.stdout
