"""Files whose SHA-256 is known from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ttt import checksums
from ttt.errors import EnvironmentProblem
from ttt.file_kinds import NEVER_MEANT
from ttt.files.kinds import kind_of_file


def require_digests(folder: Path, digests: Mapping[str, str], *, way_out: str) -> None:
    """Compare files whose SHA-256 is known, such as a package's own, with it.

    Args:
        folder: where they are.
        digests: by file name, in hexadecimal.
        way_out: ends the message.

    Raises:
        EnvironmentProblem: a file is missing, or is not the one that is meant; the message names it.
    """
    for name, digest in digests.items():
        try:
            found = checksums.file_digest(folder / name)
        except OSError as error:
            raise EnvironmentProblem(
                f"{folder / name}: cannot be read: {error.strerror or error}; {way_out}"
            ) from error
        if found != digest:
            kind = kind_of_file(folder / name)
            told = f"it is {kind.words}" if kind is not None and kind.name in NEVER_MEANT else "its SHA-256 is another"
            raise EnvironmentProblem(f"{folder / name}: damaged: {told}; {way_out}")
