"""`failure.json`: why a run ended with an error, until it goes on. Whoever looks at many runs finds it there.

A run that somebody interrupted, or whose process was killed, leaves none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ttt.errors import TTTError
from ttt.files import write_json
from ttt.printable import printable, shortened
from ttt.words import first_line

if TYPE_CHECKING:
    from ttt.train.parts import Parts

FAILURE = "failure.json"
_MOST = 2000  # letters of an error


@contextlib.contextmanager
def recorded(parts: Parts, done: Callable[[], int]) -> Iterator[None]:
    """A context whose error is recorded in the run's folder. Enter it only while the run is locked.

    Of several processes the first records its error, also if that is only that another is gone.

    Args:
        parts: the run's parts.
        done: how many optimiser steps are done by then.
    """
    try:
        yield
    except Exception as error:
        if not parts.world.first:
            raise
        told = shortened(printable(first_line(error)), _MOST)
        with contextlib.suppress(TTTError):  # the disk is full, say: the error itself is what has to be told
            write_json(parts.directory / FAILURE, {"step": done(), "error": told, "type": type(error).__name__})
        raise
