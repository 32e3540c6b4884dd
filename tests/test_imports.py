"""Imports run one way, what checks a config needs no torch, and nothing is installed under somebody else's name."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from ttt.plugins import GROUP, discover

ROOT = Path(__file__).parent.parent
PLUGINS = {folder.name: folder for folder in sorted((ROOT / "plugins").glob("*/ttt_*"))}
"""The packages of the plugins in this repository."""
PLUGIN_PACKAGES = {folder.name for folder in PLUGINS.values()}
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


def _imported(folder: Path, *, package_root: Path) -> dict[str, set[str]]:
    """What each file of a package imports, types included."""
    files = sorted(folder.rglob("*.py"))
    assert files
    return {str(file.relative_to(ROOT)): {name for name, _ in _imports(file, package_root)} for file in files}


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
    assert {"ttt", "ttt.backbone", "ttt.testing"} <= public
    assert {_module_of(name) for name in public} == public
    for file, names in _imported(folder, package_root=folder.parent).items():
        ours = {name for name in names if _inside(name, {"ttt"})}
        assert {_module_of(name) for name in ours} <= public, file
        assert not {name for name in ours if re.search(r"\._[a-z]", name)}, file


def _arrows(folder: Path) -> dict[str, set[str]]:
    """Which modules of a package each of its modules imports: at module level, in functions and for types alike."""
    root = folder.parent
    files = {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for file in sorted(folder.rglob("*.py"))
    }
    return {
        name: {other for other, _ in _imports(file, root) if other in files and other != name}
        for name, file in files.items()
    }


def _circle(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first again at the end; none if there is no circle."""
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize(
    "late", ["import p.b.c", "def f():\n    from p.b import c", "if TYPE_CHECKING:\n    from .b import c"]
)
def test_a_circle_of_any_kind_is_found(late: str, tmp_path: Path) -> None:
    (tmp_path / "p" / "b").mkdir(parents=True)
    for file, text in {
        "__init__": "",
        "a": late,
        "b/__init__": "",
        "b/c": "from p import d",
        "d": "import p.a",
    }.items():
        (tmp_path / "p" / f"{file}.py").write_text(text)
    assert set(_circle(_arrows(tmp_path / "p"))) == {"p.a", "p.b.c", "p.d"}
    (tmp_path / "p" / "d.py").write_text("import os")
    assert _circle(_arrows(tmp_path / "p")) == []


@pytest.mark.parametrize("plugin", PLUGINS)
def test_files_of_a_plugin_import_each_other_in_one_direction(plugin: str) -> None:
    """And `plugin.py` is on top."""
    arrows = _arrows(PLUGINS[plugin])
    assert f"{plugin}.options" in arrows[f"{plugin}.plugin"]
    assert not [name for name, below in arrows.items() if f"{plugin}.plugin" in below]
    assert _circle(arrows) == []


def test_the_mathematics_rests_on_torch_alone() -> None:
    for file, names in _imported(ROOT / "ttt" / "ops", package_root=ROOT).items():
        for name in names:
            top = name.split(".")[0]
            ours = name == "ttt.ops" or name.startswith("ttt.ops.")
            assert ours or top == "torch" or top in sys.stdlib_module_names, (file, name)


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


def test_what_checks_a_config_imports_no_torch() -> None:
    config = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in sorted((ROOT / "ttt" / "config").rglob("*.py"))
    ]
    assert "ttt.config.load" in config
    others = ["ttt.plugins", "ttt.backbone", "ttt.hookspecs", "ttt_cli.main", "ttt_cli.app"]
    assert _heavy_after(["ttt", *config, *others]) == "[]"


NOT_FOR_A_CHECK = {
    # what runs models, draws and tells of training
    *("torch", "numpy", "matplotlib", "rich", "safetensors", "moshi", "sphn", "diffusers", "transformers"),
    # what parses options that are not there, and the commands that are not asked for
    *("typer", "click", "ttt_cli.app", "ttt_cli.check", "ttt_cli.train", "ttt_cli.diff", "ttt_cli.import_config"),
    # backbones that the config does not name
    *PLUGIN_PACKAGES - {"ttt_moshi"},
    # other formats, fixes, explanations and the like
    *("ttt.config.explain", "ttt.config.explanations", "ttt.config.fixes", "ttt.config.sarif", "ttt.config.diff"),
    *("ttt.config.importing", "ttt.config.json_schema", "ttt.probe", "ttt.probe_codes", "ttt.train", "ttt.layer"),
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
    import ttt.config

    for module in (ttt, ttt.config):
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
        installed = metadata.distribution(distribution)
        assert {path.parts[0].removesuffix(".py") for path in installed.files or []}.isdisjoint(TAKEN)
        for entry_point in installed.entry_points:
            assert entry_point.group in ("console_scripts", GROUP)
            assert entry_point.module.split(".")[0] in packages


def test_kyutais_package_is_the_one_that_is_imported() -> None:
    program = "import importlib.util; print(importlib.util.find_spec('moshi').origin)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT / "plugins"
    )
    assert "site-packages" in result.stdout
