"""Where the weights of CogVideoX are: a repository on the hub or a folder in diffusers' layout."""

from __future__ import annotations

from pathlib import Path

from ttt.amounts import show_bytes
from ttt.checksums import file_digest
from ttt.errors import EnvironmentProblem, UsageError
from ttt.files import read_header, read_json, verify_tensors, write_json
from ttt.reading import MAX_JSON, other_kind
from ttt_videodit.options import DEFAULT_PRETRAINED, VideoDiTOptions

VAE = "vae"
"""Folder of the VAE."""
TEXT_PARTS = ("text_encoder", "tokenizer")
"""Folders of T5."""
RECORD = "checksums.json"
"""The file with the checksums of the files beside it, in a folder that `ttt import-weights` wrote."""
_SMALL = (".json", ".txt", ".model")
"""What settings and tokenizers end in."""


def source_of(options: VideoDiTOptions, *parts: str) -> str:
    """The folder or the repository that the options name; a folder is checked to hold its parts.

    Args:
        options: of the backbone, preset 5b.
        parts: folders in diffusers' layout, such as `vae`; those of a repository are looked for when they are loaded.

    Raises:
        EnvironmentProblem: there is no such folder, or it lacks a part.
    """
    source = options.pretrained or DEFAULT_PRETRAINED
    local = Path(source)
    kind = other_kind(local)
    if kind not in (None, "a folder"):
        raise EnvironmentProblem(f"backbone.pretrained: {source} is {kind}, not a folder")
    if options.pretrained is not None and not local.is_dir() and (local.is_absolute() or source.startswith(".")):
        raise EnvironmentProblem(f"backbone.pretrained: no folder {source}")
    if options.revision is not None and local.is_dir():
        raise UsageError(f"backbone.revision: is of a repository, and {source} is a local folder; leave it out")
    missing = next((part for part in parts if local.is_dir() and not (local / part).is_dir()), None)
    if missing is not None:
        raise EnvironmentProblem(
            f"backbone.pretrained: {source} holds no {missing}/; name a folder in diffusers' layout, with vae/, "
            f"text_encoder/ and tokenizer/ beside transformer/"
        )
    if local.is_dir():
        for part in ("", "transformer", "scheduler", *parts):
            require_files(local / part)
    return source


def require_files(folder: Path) -> None:
    """Refuse a folder of weights if something in it would keep a library waiting, or fill the memory.

    Raises:
        EnvironmentProblem: an entry is a FIFO, a socket or a device, or a file of settings is too large.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        kind = other_kind(path)
        if (kind == "a folder" and path.suffix not in _SMALL) or (kind is None and not path.exists()):
            continue
        if kind is not None:
            raise EnvironmentProblem(f"backbone.pretrained: {path} is {kind}, not a file")
        if path.suffix in _SMALL and path.stat().st_size > MAX_JSON:
            raise EnvironmentProblem(f"backbone.pretrained: {path} is larger than {show_bytes(MAX_JSON)}")


def provenance(options: VideoDiTOptions) -> dict[str, str]:
    """The repository of the transformer's weights, and its commit if the hub's cache knows it."""
    source = options.pretrained or DEFAULT_PRETRAINED
    if options.preset == "demo" or options.random_weights or Path(source).is_dir():
        return {}
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, "transformer/config.json", revision=options.revision)
    commit = {"commit": Path(cached).parents[1].name} if isinstance(cached, str) else {}
    return {"repository": source, **commit}


def write_record(folder: Path) -> None:
    """Record the checksums of what is in a folder of weights."""
    write_json(folder / RECORD, {"files": {file.name: _checksum(file) for file in sorted(folder.iterdir())}})


def verify_record(folder: Path, *, tensors: bool) -> None:
    """Compare a folder of weights with its record, if it has one.

    Args:
        folder: of the weights.
        tensors: read the weights too; if not, only the small files are compared.

    Raises:
        EnvironmentProblem: a file is not what was written; the message names it.
    """
    if not (folder / RECORD).is_file():
        return
    for name, digest in read_json(folder / RECORD, sealed=True)["files"].items():
        file = folder / name
        try:
            found = _checksum(file)
        except OSError as error:
            raise EnvironmentProblem(f"{file}: cannot be read: {error.strerror or error}") from error
        if found != digest:
            raise EnvironmentProblem(
                f"{file}: damaged: its checksum is not the one that was recorded; import the weights anew, or delete "
                f"{folder / RECORD} if you have changed the file yourself"
            )
        if tensors and file.suffix == ".safetensors":
            verify_tensors(file)


def _checksum(file: Path) -> str | None:
    return read_header(file).checksum if file.suffix == ".safetensors" else file_digest(file)
