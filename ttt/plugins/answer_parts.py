"""What checks of answers are made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ttt.plugins.asking import WrongAnswer
from ttt.plugins.asking import with_article as _a
from ttt.plugins.asking import with_its_type as _named

Check = Callable[[Any, Any], Any]
"""Takes the backbone and its answer, and returns the answer or raises `WrongAnswer`."""


def instance(of: Callable[[Any], type], *, name: str = "") -> Check:
    """The check for an instance of a class. `of` gives the class when it is needed, to import nothing heavy before."""

    def check(backbone: Any, answer: Any) -> Any:
        kind = of(backbone)
        if not isinstance(answer, kind):
            raise WrongAnswer(f"{_named(answer)}, not {_a(name or kind.__name__)}")
        return answer

    return check


def is_whole(value: Any, *, least: int) -> bool:
    """Whether it is a whole number from `least` on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def require_whole(answer: Any, name: str, *, least: int) -> None:
    """Refuse an answer whose attribute is no whole number from `least` on."""
    value = getattr(answer, name)
    if not is_whole(value, least=least):
        raise WrongAnswer(f"{_a(type(answer).__name__)} whose {name} is {value!r}, not a whole number ≥ {least}")


def paths(backbone: Any, answer: Any) -> Any:
    """The check for files that were made, at least one."""
    good = isinstance(answer, Sequence) and not isinstance(answer, str) and all(isinstance(p, Path) for p in answer)
    if not good or not answer:
        raise WrongAnswer(f"{in_short(answer)}, not the files that it made, a sequence of Path")
    return answer


def in_short(value: Any) -> str:
    """A value with its type, or that it is empty."""
    return "an empty sequence" if isinstance(value, Collection) and not value else _named(value)
