"""The hub of Hugging Face: adapters brought there, and fetched from it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ttt.errors import AdapterFileError, EnvironmentProblem, TTTError, UsageError
from ttt.hf.hub import why_not_loaded
from ttt.words import first_line

_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_WANTED = ("*adapter_model.safetensors", "*adapter_config.json", "*backbone_model.safetensors", "README.md")


def fetched(name: str | Path, revision: str | None) -> Path:
    """The folder that is meant: one that is here, or a repository on the hub, which is downloaded if it is not yet.

    Raises:
        EnvironmentProblem: there is no such folder and no such repository, or the hub cannot be reached.
        UsageError: a revision of a folder is asked for.
    """
    if not isinstance(name, (str, os.PathLike)) or not str(name):
        raise UsageError(f"an adapter is named by its folder or its repository on the hub, not by {name!r:.60}")
    path = Path(name)
    if path.exists():
        if revision is not None:
            raise UsageError(f"{path}: is here on the disk, where there is no revision; leave revision out")
        return path
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise EnvironmentProblem(f"{name}: no such file or folder, and no name of a repository on the hub")
    with _in_words(name, revision, to="fetched"):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(_WANTED)))
    if not any(folder.glob("**/adapter_model.safetensors")):
        raise AdapterFileError(f"{name}: this repository of the hub holds no adapter_model.safetensors")
    return folder


def pushed(folder: Path, repo_id: str, options: Mapping[str, Any]) -> str:
    """Upload a folder; returns where it is.

    Raises:
        EnvironmentProblem: the hub cannot be reached, or does not take it.
    """
    given = {key: value for key, value in options.items() if value is not None}
    made = {key: given.pop(key) for key in ("private",) if key in given}
    token = given.get("token")
    with _in_words(repo_id, given.get("revision"), to="pushed to"):
        from huggingface_hub import HfApi

        api = HfApi()
        repository = api.create_repo(repo_id, exist_ok=True, token=token, **made).repo_id
        given.setdefault("commit_message", "Upload a TTT adapter")
        commit = api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=["checkpoint-*"], **given)
        return str(getattr(commit, "commit_url", "") or commit)


@contextmanager
def _in_words(name: str, revision: str | None, *, to: str) -> Iterator[None]:
    """A context in which what fails becomes one sentence."""
    try:
        yield
    except TTTError:
        raise
    except ImportError as error:
        raise EnvironmentProblem(
            f"{name} cannot be {to} without the package huggingface_hub: {first_line(error)}",
            fix="pip install huggingface_hub",
        ) from error
    except Exception as error:  # the hub's client, what it speaks HTTP with and the file system raise many kinds
        why, fix = why_not_loaded(error, revision)
        raise EnvironmentProblem(f"{name} cannot be {to}: {why}", fix=fix) from error
