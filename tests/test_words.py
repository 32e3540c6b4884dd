"""What sentences are put together from, and how far a piece of work is."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from ttt.progress import Steps
from ttt.words import duration_in_words, first_entries, first_few, first_line


def test_the_first_few_and_how_many_more() -> None:
    assert first_few([]) == ""
    assert first_few(["a", 2, "c"]) == "a, 2, c"
    assert first_few(["a", "b", "c", "d"]) == "a, b, c and 1 more"
    assert first_few(list("abcdef"), 2, separator="; ") == "a; b and 4 more"
    assert first_entries(["a", "b"], 2) == ["a", "b"]
    assert first_entries(["a", "b", "c", "d"], 2) == ["a", "b", "and 2 more"]


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n  no such thing\nand much more")) == "no such thing"
    assert first_line(KeyError("a\nb")) == r"'a\nb'"
    assert first_line(ValueError()) == first_line(ValueError(" \n ")) == "ValueError"
    assert first_line(MemoryError(), otherwise="out of memory") == "out of memory"
    assert first_line(MemoryError(), otherwise="") == ""


@pytest.mark.parametrize(("seconds", "words"), [(59.4, "59 s"), (60, "1 min 00 s"), (7500, "2 h 05 min")])
def test_a_duration(seconds: float, words: str) -> None:
    assert duration_in_words(seconds) == words


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None, _environ={"TERM": "xterm"})


def told(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def test_a_terminal_has_a_bar_and_no_lines() -> None:
    shown = console(terminal=True)
    with Steps(shown, "frames", total=4, tenths=True) as steps:
        assert list(steps.counted("abc")) == ["a", "b", "c"]
        steps.line("a.mp4 is done")
        steps.advance()
    assert steps.completed == 4
    assert "frames" in told(shown)
    assert "4/4" in told(shown)
    assert "a.mp4" not in told(shown)
    assert "step" not in told(shown)


@pytest.mark.parametrize(
    ("total", "pieces", "steps"),
    [
        (3, [1, 1, 1], [1, 2, 3]),
        (25, [1] * 25, [1, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25]),
        (25, [10, 2, 10, 3], [10, 22, 25]),
    ],
)
def test_elsewhere_a_line_for_each_tenth(total: int, pieces: list[int], steps: list[int]) -> None:
    shown = console(terminal=False)
    with Steps(shown, "sample", total=total, tenths=True) as counted:
        for piece in pieces:
            counted.advance(piece)
    lines = told(shown).splitlines()
    assert [line.partition(",")[0] for line in lines] == [f"sample: step {step}/{total}" for step in steps]
    assert lines[-1] == f"sample: step {total}/{total}, 0 s left"


def test_elsewhere_only_lines_that_are_said() -> None:
    shown = console(terminal=False)
    with Steps(shown, "frames", total=2) as steps:
        steps.advance(2)
        steps.line("a.mp4 [bold] is done")
    assert told(shown) == "a.mp4 [bold] is done\n"


def test_a_rate_stands_in_the_bar_and_in_lines() -> None:
    for terminal in (True, False):
        shown = console(terminal=terminal)
        with Steps(shown, "words", total=4, done=1, tenths=True, rated="item") as steps:
            steps.advance(2)
            time.sleep(0.01)
            steps.advance()
        assert " items a second" in told(shown)
        assert "4/4" in told(shown)


def test_a_long_step_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = console(terminal=False)
    with Steps(shown, "books", total=2) as steps:
        for second in range(25):
            now[0] = 100.0 + second
            steps.within(f"[a]/b, {second} of 25")
    assert told(shown).splitlines() == ["books: [a]/b, 10 of 25", "books: [a]/b, 20 of 25"]  # one for ten seconds
    shown = console(terminal=True)
    with Steps(shown, "books", total=2) as steps:
        steps.within("[a]/b, 3 of 25")
        steps.advance()
    assert "books, [a]/b, 3 of 25" in told(shown)
