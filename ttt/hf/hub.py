"""What can go wrong when `transformers` reads a model or a tokenizer from a folder or the hub, each in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ttt.errors import EnvironmentProblem, TTTError
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
        why, fix = _why(error, name, revision)
        raise EnvironmentProblem(f"{name} cannot be loaded: {why}", key=key, fix=fix) from error


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


def _why(error: BaseException, name: str, revision: str | None) -> tuple[str, str]:
    """Why something cannot be loaded, and the way out."""
    kinds = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    here = as_folder(name) is not None
    if "GatedRepoError" in kinds:
        return "its authors want to know who downloads it", "accept its terms on its page, and run `hf auth login`"
    if "RevisionNotFoundError" in kinds:
        return f"it has no branch, tag or commit {revision!r}", "write another revision, or null"
    if "RepositoryNotFoundError" in kinds or "HFValidationError" in kinds:
        told = "there is no folder of that name here, and the hub has no such repository that you may read"
        return told, "correct the name, or run `hf auth login` if it is private"
    if not here and kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError"}:
        told = "it is no folder here and not in the hub's cache, and the hub cannot be reached"
        return told, "download it where there is a network, or write the path of a folder"
    return first_line(error), ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
