"""docs/tour.md leads to files and names that exist, and each walk is in the order in which they are called or named."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]
"""What a newcomer reads."""


def _stops(text: str) -> list[tuple[str, str]]:
    """The file and the name of every line of a walk."""
    return re.findall(r"^\| `([^`]+\.py)` \| `([^`]+)` \|", text, re.MULTILINE)


def _names(body: list[ast.stmt], within: str = "") -> Iterator[str]:
    """What a file or a class defines, a method as `Class.method`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield f"{within}{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from _names(node.body, f"{within}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (f"{within}{target.id}" for target in targets if isinstance(target, ast.Name))


def _gone(stops: list[tuple[str, str]], root: Path = ROOT) -> list[str]:
    """The stops that lead nowhere."""
    gone = []
    for file, name in stops:
        path = root / file
        if not path.is_file():
            gone.append(file)
        elif name not in _names(ast.parse(path.read_text(encoding="utf-8")).body):
            gone.append(f"{file}: {name}")
    return gone


def test_every_stop_of_the_tour_exists() -> None:
    assert _gone(_stops(TOUR)) == []


@pytest.mark.parametrize("walk", ["token", "batch", "config", "plugin", "checkpoint"])
def test_the_tour_has_every_walk(walk: str) -> None:
    section = TOUR.partition(f"\n## One {walk}\n")[2].partition("\n## ")[0]
    assert len(_stops(section)) >= 6


def _paths(text: str) -> set[str]:
    """What a page names as a file or folder of this repository."""
    return set(re.findall(r"`((?:ttt|cli|plugins|tests|benchmarks|docs)/[\w./-]*)`", text))


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_as_a_file_is_one(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [path for path in sorted(_paths(text)) if not (ROOT / path).exists()] == []


def test_a_stop_that_is_gone_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("class A:\n    x: int = 1\n    def f(self): ...\nB = 2\n")
    named = [("a.py", "A.f"), ("a.py", "A.x"), ("a.py", "B"), ("a.py", "f"), ("b.py", "B")]
    stops = _stops("".join(f"| `{file}` | `{name}` | x |\n" for file, name in named))
    assert stops == named
    assert _gone(stops, tmp_path) == ["a.py: f", "b.py"]
    assert _paths("see `ttt/nowhere.py`, `ttt/` and `data.jsonl`") == {"ttt/nowhere.py", "ttt/"}
