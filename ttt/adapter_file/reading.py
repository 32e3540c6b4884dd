"""Reading what an adapter file is, without torch and without its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ttt.adapter_file.format import (
    BACKBONE,
    CONFIG,
    FORMAT,
    MAX_HEADER,
    MAX_SITES,
    MODEL,
    SETTINGS,
    VERSION,
    AdapterInfo,
    SiteInfo,
)
from ttt.checkpoint_folder import newest_checkpoint
from ttt.checksums import no_duplicates
from ttt.config.lora import LoraConfig, LoraSettings
from ttt.config.schema import TTTConfig, with_its_target_eps
from ttt.dotted import dotted
from ttt.errors import AdapterFileError, EnvironmentProblem
from ttt.files import DAMAGED, Header, TensorFacts, read_header, read_json, verify_tensors
from ttt.version import __version__


def read_info(path: str | Path, *, verify: bool = False) -> AdapterInfo:
    """What an adapter file is, from its header; needs no torch.

    In a run's folder, checkpoints that are not whole are passed over with a `DamagedFileWarning`.

    Args:
        path: the safetensors file, its folder, or a run's folder (then its last checkpoint).
        verify: compare the files' content with their checksums, which reads them; else no tensor is read.

    Raises:
        AdapterFileError: it is missing, damaged, from a newer version, or not an adapter file; one sentence says which.
    """
    try:
        file, verified = _find(Path(path), verify=verify)
        header = read_header(file, most_bytes=MAX_HEADER)
        if header.metadata.get("format") != FORMAT or SETTINGS not in header.metadata:
            raise AdapterFileError(f"{file}: no adapter of ttt: its header holds no adapter settings")
        info = _parse(file, header.metadata[SETTINGS], header)
        _require_same_json(file, header.metadata[SETTINGS])
        if verify and not verified:
            verify_adapter(info)
    except AdapterFileError:
        raise
    except EnvironmentProblem as problem:
        raise AdapterFileError(str(problem)) from None
    return info


def _find(path: Path, *, verify: bool) -> tuple[Path, bool]:
    """The safetensors file of an adapter's file, folder or run, and whether its checksum was compared."""
    if not path.is_dir():
        return path, False
    if (path / MODEL).exists():
        return path / MODEL, False
    newest = newest_checkpoint(path, verify=verify, only=(MODEL, BACKBONE))
    if newest.checkpoint is None:
        raise AdapterFileError(
            f"{path}: holds no {MODEL}, and is not a run with a complete checkpoint{newest.why_none}"
        )
    newest.warn_of_passed_over(stacklevel=3)
    return newest.checkpoint.path / MODEL, verify


def _parse(file: Path, text: str, header: Header) -> AdapterInfo:
    try:
        settings = json.loads(text, object_pairs_hook=no_duplicates)
        version = settings["version"]
        if type(version) is not int or version < 1 or len(settings["sites"]) > MAX_SITES:
            raise ValueError(version)
        if not all(isinstance(settings[key], str | None) for key in ("backbone_weights", "backbone_trained")):
            raise ValueError("backbone")
        if not isinstance(settings.get("backbone_dtype"), str | None):  # older files have none
            raise ValueError("backbone_dtype")
        if version > VERSION:
            raise AdapterFileError(
                f"{file}: adapter format {version}, but this ttt ({__version__}) reads up to {VERSION}; install "
                f"ttt-adapters {settings.get('ttt_version', '')} or newer".replace("  ", " ")
            )
        config = TTTConfig.model_validate(with_its_target_eps(settings["ttt"]))
        return AdapterInfo(
            path=file,
            version=version,
            checksum=header.checksum,
            ttt_version=str(settings["ttt_version"]),
            backbone=dict(settings["backbone"]),
            backbone_weights=settings["backbone_weights"],
            backbone_trained=settings["backbone_trained"],
            backbone_dtype=settings.get("backbone_dtype"),
            ttt=config,
            sites=tuple(
                SiteInfo(int(site["layer"]), str(site["name"]), int(site["dim"]), int(site["num_heads"]))
                for site in settings["sites"]
            ),
            lora=_lora(settings.get("lora")),
            prepared=tuple(int(layer) for layer in settings.get("prepared", ())),
            training=dict(settings["training"]),
            tensors=header.tensors,
        )
    except ValidationError as error:
        first = error.errors()[0]
        section = "lora" if error.title == LoraConfig.__name__ else "ttt"
        where = ".".join(map(str, (section, *first["loc"])))
        raise AdapterFileError(f"{file}: the settings in its header do not hold: {where}: {first['msg']}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise AdapterFileError(f"{file}: the settings in its header do not parse") from None


def _lora(settings: Mapping[str, Any] | None) -> LoraSettings | None:
    """The settings of LoRA, if a header has some."""
    if settings is None:
        return None
    checked = LoraConfig.model_validate(settings)
    if checked.rank == "match":
        raise ValueError("rank")
    return LoraSettings(checked.rank, checked.scaling, checked.linears)


def _require_same_json(file: Path, text: str) -> None:
    """Refuse a JSON beside the file that says something else: an edit of it would silently do nothing."""
    beside = file.with_name(CONFIG)
    if file.name != MODEL or not beside.exists():
        return
    header, read = json.loads(text), read_json(beside)
    if json.dumps(header, sort_keys=True) != json.dumps(read, sort_keys=True):
        here, there = dotted(header), dotted(read)
        keys = here.keys() ^ there.keys() | {key for key in here.keys() & there.keys() if here[key] != there[key]}
        named = ", ".join(sorted(keys)[:5]) or "empty sections"
        raise AdapterFileError(
            f"{beside}: does not say what the header of {file.name} says ({named}); the header was "
            f"written with the tensors and counts: delete or restore the JSON"
        )


def verify_adapter(info: AdapterInfo) -> None:
    """Compare an adapter's file, and that of the backbone parameters trained along, with their checksums.

    Needs no torch. Files of version 1 carry no checksum, and pass.

    Raises:
        AdapterFileError: a file is not what was written; the message names it.
    """
    try:
        _require_checksum(info, info.path, verify_tensors(info.path))
        if info.backbone_trained is not None:
            trained_backbone(info)
            beside = info.path.with_name(BACKBONE)
            _require_checksum(info, beside, verify_tensors(beside))
    except AdapterFileError:
        raise
    except EnvironmentProblem as problem:
        raise AdapterFileError(str(problem)) from None


def _require_checksum(info: AdapterInfo, file: Path, checksum: str | None) -> None:
    if checksum is None and info.version > 1:
        raise AdapterFileError(f"{file}: damaged: its checksum is gone; {DAMAGED}")


def trained_backbone(info: AdapterInfo) -> Mapping[str, TensorFacts]:
    """The backbone parameters that were trained along with an adapter, from their file's header; reads no tensor.

    Raises:
        AdapterFileError: they are missing, damaged, or another adapter's.
    """
    if info.backbone_trained is None:
        return {}
    file = info.path.with_name(BACKBONE)
    if not file.exists():
        raise AdapterFileError(f"{file}: missing; the adapter was trained together with the backbone parameters in it")
    try:
        header = read_header(file, most_bytes=MAX_HEADER)
    except EnvironmentProblem as problem:
        raise AdapterFileError(str(problem)) from None
    if header.metadata.get("pair") != info.backbone_trained:
        raise AdapterFileError(f"{file}: does not belong to the {info.path.name} beside it")
    return header.tensors
