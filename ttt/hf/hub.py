"""What can go wrong when `transformers` reads a model or a tokenizer from a folder or the hub, each in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ttt.errors import EnvironmentProblem, TTTError
from ttt.files import NEVER_MEANT, kind_of_file
from ttt.hf.facts import as_folder
from ttt.words import first_line


@contextmanager
def loading(name: str, revision: str | None = None, *, key: str = "backbone.model") -> Iterator[None]:
    """A context in which something of that name is loaded, without bars of progress.

    Raises:
        EnvironmentProblem: it cannot be; the message says why, and what to do.
    """
    require_transformers()
    try:
        with _without_bars():
            yield
    except TTTError:
        raise
    except Exception as error:  # transformers, the hub, safetensors and the file system raise errors of many kinds
        folder = as_folder(name)
        why, fix = _stand_in(folder) or why_not_loaded(error, revision, is_folder=folder is not None)
        raise EnvironmentProblem(f"{name} cannot be loaded: {why}", key=key, fix=fix) from error


def _stand_in(folder: Path | None) -> tuple[str, str] | None:
    """What stands in a folder for a file of the model, such as a pointer of git-lfs, and the way out; None if nothing.

    Whoever loads such a file tells that it is no JSON, or that its header is too long.
    """
    for file in () if folder is None else sorted(folder.iterdir()):
        with suppress(OSError):  # a folder, a FIFO, or not to be read
            kind = kind_of_file(file)
            if kind is not None and kind.name in NEVER_MEANT and file.suffix in _OF_A_MODEL:
                return f"its {file.name} is {kind.words}", kind.way_out
    return None


_OF_A_MODEL = frozenset({".safetensors", ".json", ".model", ".gguf"})
"""Suffixes of the files that a model is loaded from."""


def require_transformers() -> None:
    """Refuse to go on without the package.

    Raises:
        EnvironmentProblem: it is not installed, or cannot be imported.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(
            f"the package transformers cannot be imported: {first_line(error)}", fix="pip install transformers"
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


_UNREACHABLE = frozenset(
    {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "TransportError"}
    | {"TimeoutError"}
)


def why_not_loaded(error: BaseException, revision: str | None, *, is_folder: bool = False) -> tuple[str, str]:
    """Why something could not be had from the hub, brought there, or read from a folder, and the way out.

    Args:
        error: what was raised.
        revision: which one was asked for.
        is_folder: it is a folder on the disk, so that no network is to blame.
    """
    causes = list(_causes(error))
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    status = next((found for cause in causes if (found := _status(cause)) is not None), None)
    if "GatedRepoError" in kinds:
        return "its authors want to know who downloads it", "accept its terms on its page, and run `hf auth login`"
    if "RevisionNotFoundError" in kinds:
        return f"it has no branch, tag or commit {revision!r}", "name another revision"
    if status in (401, 403):
        return "the hub does not let you", "run `hf auth login`, or give a token that may do that"
    if "RepositoryNotFoundError" in kinds or "HFValidationError" in kinds:
        told = "there is no folder of that name here, and no such repository on the hub that you may read"
        return told, "correct the name, or run `hf auth login` if it is private"
    if not is_folder and status is None and kinds & _UNREACHABLE:
        told = "it is no folder here and not in the hub's cache, and the hub cannot be reached"
        return told, "connect to a network, or name a folder"
    return first_line(error), ""


def _status(error: BaseException) -> int | None:
    """What the hub answered, if it did."""
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
