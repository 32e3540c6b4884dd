"""From `ttt new-backbone` to green laws and a trained demo: how long each part takes, and what is left to write.

    python benchmarks/new_backbone.py [--name demo] [--kinds hf backbone] [--out results.json]

Each kind of distribution is written, installed offline into a folder of its own, held to the laws by its own tests and
trained by its demo, as its README says. Each part is a process, so its time holds Python's start and the imports; the
CPU time beside it says how busy the machine was. What an author has to write is counted at the marks `# CHANGE`: the
code behind each, without comments and docstrings.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS = {"hf": ["--hf"], "backbone": []}
"""Options of `ttt new-backbone` for each kind of distribution."""
TTT = [sys.executable, "-m", "ttt_cli"]
MARK = re.compile(r"^\s*# CHANGE (\d)")


# --- how long it takes ---


def commands(name: str, kind: str) -> dict[str, list[str]]:
    """The parts, in order; all run in one folder."""
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--offline", "--no-config"]
    into = ["--python", sys.executable, "--no-deps", "--no-build-isolation", "--target", "site"]
    return {
        "written": [*TTT, "new-backbone", name, "--out", "source", *KINDS[kind]],
        "installed": [*uv, *into, "./source"],
        "laws": [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "source/tests"],
        "trained": [*TTT, "train", "--backbone", name, "--set", "run_dir=run"],
    }


def run(command: list[str], folder: Path) -> tuple[dict[str, float], str]:
    """Run a part; returns its seconds, `wall` and `cpu`, and what it printed. Exits if it fails."""
    start, before = time.perf_counter(), _cpu()
    environment = {**os.environ, "PYTHONPATH": str(folder / "site")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # without bytecode each part would compile torch anew
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return {"wall": round(time.perf_counter() - start, 1), "cpu": round(_cpu() - before, 1)}, done.stdout


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(name: str, kind: str) -> dict[str, Any]:
    """All parts for one kind."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        seconds, printed = {}, {}
        for part, command in commands(name, kind).items():
            seconds[part], printed[part] = run(command, folder)
        summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
        return {
            "seconds": seconds,
            "laws": printed["laws"].splitlines()[-1],
            "trained": {
                key: summary[key] for key in ("steps", "loss", "eval_loss", "eval_loss_gates_closed") if key in summary
            },
            "lines_to_change": lines_to_change(folder / "source"),
            "lines_of_code": code_lines((folder / "source").glob("ttt_*/*.py")),
        }


# --- what is left to write ---


def lines_to_change(source: Path) -> dict[str, int]:
    """Lines of code behind the marks of each step."""
    found: Counter[str] = Counter()
    for file in sorted(source.rglob("*")):
        if file.suffix in (".py", ".yaml", ".toml") and "build" not in file.relative_to(source).parts:
            for step, lines in marked(file):
                found[step] += len(lines)
    return dict(sorted(found.items()))


def marked(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Each mark in a file: its step, and the lines of code that it is about.

    These are the class or function that follows, or else the lines up to the next blank one.
    """
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    code = _code(text) if file.suffix == ".py" else set(range(1, len(lines) + 1))
    blocks = _blocks(text) if file.suffix == ".py" else {}
    for number, line in enumerate(lines, start=1):
        mark = MARK.match(line)
        if mark:
            blank = next((n for n in range(number + 1, len(lines) + 1) if not lines[n - 1].strip()), len(lines) + 1)
            last = blocks.get(number + 1, blank - 1)
            about = [lines[n - 1] for n in range(number + 1, last + 1) if n in code]
            yield mark[1], [one for one in about if one.strip() and not one.lstrip().startswith("#")]


def _blocks(text: str) -> dict[int, int]:
    """First and last line of every class and function."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {node.lineno: node.end_lineno or 0 for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)}


def _code(text: str) -> set[int]:
    """Numbers of the lines that are neither blank nor a docstring's; one below an attribute is a docstring too."""
    statements = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr))
    strings = [node for node in statements if isinstance(node.value, ast.Constant)]
    described = {number for node in strings for number in range(node.lineno, (node.end_lineno or 0) + 1)}
    return {number for number, line in enumerate(text.splitlines(), start=1) if line.strip()} - described


def code_lines(files: Iterator[Path]) -> dict[str, int]:
    """Lines of code of each file that has any, without imports, comments and docstrings."""
    found = {}
    for file in sorted(files):
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        imported = {number for node in imports for number in range(node.lineno, (node.end_lineno or 0) + 1)}
        lines = [line for n, line in enumerate(text.splitlines(), start=1) if n in _code(text) - imported]
        found[file.name] = sum(not line.lstrip().startswith("#") for line in lines)
    return {name: count for name, count in found.items() if count}


# --- the report ---


def report(name: str, kind: str, found: dict[str, Any]) -> str:
    options = " ".join(["ttt new-backbone", name, *KINDS[kind]])
    parts = found["seconds"]
    seconds = ", ".join(f"{part} {took['wall']:.1f} s" for part, took in parts.items())
    wall, cpu = (sum(took[clock] for took in parts.values()) for clock in ("wall", "cpu"))
    changed = ", ".join(f"step {step}: {count}" for step, count in found["lines_to_change"].items())
    code = ", ".join(f"{file} {count}" for file, count in found["lines_of_code"].items())
    return "\n".join(
        [
            f"{options}: {wall:.1f} s in all, {cpu:.1f} s of CPU ({seconds})",
            f"  laws: {found['laws']}",
            f"  trained: {found['trained']}",
            f"  lines to change: {sum(found['lines_to_change'].values())} ({changed})",
            f"  lines of code in the package: {code}",
        ]
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="demo", help="the backbone's")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path, help="a JSON file for the measurements")
    given = parser.parse_args(arguments)
    found = {}
    for kind in given.kinds:
        found[kind] = measure(given.name, kind)
        print(report(given.name, kind, found[kind]), flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
