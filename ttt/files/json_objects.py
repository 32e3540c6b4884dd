"""JSON objects with a checksum among their keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt import checksums
from ttt.checksums import DAMAGED
from ttt.errors import EnvironmentProblem, UnreadableError
from ttt.files.atomic import write_text
from ttt.reading import MAX_JSON, read_text


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
        text = read_text(path, limit=MAX_JSON)
        content = json.loads(text, object_pairs_hook=checksums.no_duplicates if sealed else None)
    except FileNotFoundError:
        raise EnvironmentProblem(f"{path}: no such file") from None
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise EnvironmentProblem(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError):  # a number of too many digits, a key that stands twice
        raise EnvironmentProblem(f"{path}: not JSON") from None
    if not isinstance(content, dict):
        raise EnvironmentProblem(f"{path}: not a JSON object")
    if sealed:
        if checksums.holds(content) is False:
            raise EnvironmentProblem(f"{path}: damaged: its checksum is not that of its content; {DAMAGED}")
        content.pop(checksums.KEY, None)
    return content
