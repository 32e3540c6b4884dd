"""JSON objects with a checksum among their keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ttt import checksums
from ttt.checksums import DAMAGED
from ttt.errors import EnvironmentProblem, UnreadableError
from ttt.file_kinds import ENOUGH
from ttt.files.atomic import write_text
from ttt.files.kinds import kind_of_content
from ttt.reading import MAX_JSON, as_text, read_file, unreadable


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, whole or not at all; see `write_bytes`."""
    write_text(path, json.dumps(checksums.sealed(content), indent=2, allow_nan=False) + "\n")


def read_json(path: Path, *, sealed: bool = False) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: of the file.
        sealed: compare it with its checksum, if it has one, and leave that out.

    Raises:
        EnvironmentProblem: the file is missing, holds no JSON object, or another one than was written.
    """
    try:
        content = read_file(path, limit=MAX_JSON)
    except FileNotFoundError:
        raise EnvironmentProblem(f"{path}: no such file") from None
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {unreadable(error)}") from error
    found = _parsed(path, content, checksums.no_duplicates if sealed else None)
    if not isinstance(found, dict):
        raise EnvironmentProblem(f"{path}: not a JSON object")
    if sealed:
        if checksums.holds(found) is False:
            raise EnvironmentProblem(f"{path}: damaged: its checksum is not that of its content; {DAMAGED}")
        found.pop(checksums.KEY, None)
    return found


def _parsed(path: Path, content: bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None) -> Any:
    """The content of a file of JSON.

    Raises:
        EnvironmentProblem: it is none. What it is instead is said, if its first bytes tell that.
    """
    kind = kind_of_content(content[:ENOUGH], len(content), path)
    if kind is not None and kind.name != "JSON text":
        raise EnvironmentProblem(f"{path}: not JSON, but {kind.words}; {kind.way_to_text}")
    try:
        return json.loads(as_text(content, path), object_pairs_hook=pairs)
    except OSError as error:
        raise EnvironmentProblem(f"{path}: not JSON: {unreadable(error)}") from None
    except json.JSONDecodeError as error:
        raise EnvironmentProblem(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError):  # a number of too many digits, a key that stands twice
        raise EnvironmentProblem(f"{path}: not JSON") from None
