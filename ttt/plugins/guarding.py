"""The guard around every method of a plugin's `Backbone` or capability: it reports errors and checks answers.

The guard is added when the class is created, so that no caller can forget it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ttt.plugins.answers import ANSWERS
from ttt.plugins.asking import asked, is_asked


def guard(cls: type, base: type) -> None:
    """Guard every method of `base` that a class, or one of its bases, overrides."""
    for name in methods_of(base):
        written = inspect.getattr_static(cls, name, None)
        if written is not vars(base)[name] and _is_method(written) and not hasattr(written, "_ttt_guards"):
            setattr(cls, name, _guarded(name, written))


def methods_of(base: type) -> list[str]:
    """The public methods that a class defines itself."""
    return [name for name, value in vars(base).items() if inspect.isfunction(value) and not name.startswith("_")]


def _is_method(written: Any) -> bool:
    return callable(written) or isinstance(written, (staticmethod, classmethod))


def _guarded(name: str, written: Any) -> Callable[..., Any]:
    @functools.wraps(written)
    def ask(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = written.__get__(self, type(self)) if hasattr(type(written), "__get__") else written
        if is_asked():
            return method(*args, **kwargs)
        with asked(self, f"`{name}`", written):
            answer = method(*args, **kwargs)
            check = ANSWERS.get(name)
            return answer if check is None else check(self, answer)

    ask._ttt_guards = written  # type: ignore[attr-defined]
    return ask
