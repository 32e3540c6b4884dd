"""Adapter files: `adapter_model.safetensors` and `adapter_config.json`, which alone say what they belong to.

The safetensors header holds the same settings as the JSON beside it, so that file is enough; the JSON is for people
and tools. A folder may also hold `backbone_model.safetensors`, the backbone's own parameters that were trained along
with the adapter; then the adapter's header says so, and the two load together or not at all.

Reading what a file is needs no torch.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ttt import __version__
from ttt.checksums import no_duplicates
from ttt.config.schema import BackboneOptions, TTTConfig, with_its_target_eps
from ttt.errors import (
    AdapterFileError,
    AdapterMismatchError,
    DamagedFileWarning,
    EnvironmentProblem,
    InjectionError,
    NestedCheckpointWarning,
)
from ttt.files import (
    DAMAGED,
    Header,
    TensorFacts,
    read_header,
    read_json,
    read_tensors,
    verify_tensors,
    write_tensors,
    write_text,
    writing,
)
from ttt.printable import json_text, shell_word
from ttt.words import first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ttt.backbone import Backbone
    from ttt.inject import Injection, Site

MODEL = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
BACKBONE = "backbone_model.safetensors"

FORMAT = "ttt-adapter"
VERSION = 3
"""Of the files' layout; a file with a greater one is refused. From 2 on each file carries a checksum, and from 3 on the
normalised target has an ε of its own (`with_its_target_eps`)."""
MAX_HEADER = 8_000_000
"""Bytes of a header's JSON: settings, and some 60,000 tensors."""
MAX_SITES = 10_000
"""Adapters in one file."""

_SETTINGS = "adapter_config"
"""Key of the settings in the safetensors header, which holds text only."""
_FREE_SETTINGS = frozenset({"preset", "layers", "num_heads", "scan_checkpoint_group_size", "skip_nonfinite_tokens"})
"""Settings that need not agree: a name, memory alone, two that the sites say exactly, what no finite token meets."""
_FREE_AT_START = _FREE_SETTINGS | {"mini_batch_size", "base_lr", "initial_gating_alpha", "persistent_states"}
"""Settings that a run may change of what it starts from: no tensor hangs on them."""
_COMPUTED_WITH = ("mini_batch_size", "base_lr")
"""Those of them by which the same tensors compute something else."""
_SAMPLES = 8
"""Values of each backbone parameter that an adapter file keeps, to know the backbone again."""


@dataclass(frozen=True)
class SiteInfo:
    """Where one adapter sits."""

    layer: int
    name: str
    """Dotted path of the adapter in the model."""
    dim: int
    """Model width D there."""
    num_heads: int
    """Heads of the TTT layer."""


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter file says of itself."""

    path: Path
    """The safetensors file."""
    version: int
    """Of the files' layout."""
    checksum: str | None
    """Of the safetensors file's content, as it was written; None in files of version 1."""
    ttt_version: str
    """The version of `ttt-adapters` that wrote it."""
    backbone: Mapping[str, Any]
    """Name and options of the backbone that it was trained on."""
    backbone_weights: str | None
    """Fingerprint of that backbone's weights (`weights_fingerprint`); None where they were not known."""
    backbone_trained: str | None
    """Ties it to the `backbone_model.safetensors` that it needs; None where the backbone was frozen."""
    ttt: TTTConfig
    """Every TTT setting."""
    sites: tuple[SiteInfo, ...]
    training: Mapping[str, Any]
    """How it was trained, as far as the writer said."""
    tensors: Mapping[str, TensorFacts]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(math.prod(facts.shape) for facts in self.tensors.values())


def backbone_identity(backbone: Backbone, options: BackboneOptions) -> dict[str, Any]:
    """Name and options of a backbone as an adapter file keeps them: those that say which model it is."""
    kept = {
        key: value for key, value in options.model_dump(mode="json").items() if key not in backbone.non_identity_options
    }
    return {**kept, "name": backbone.name}


def save_adapter(
    folder: str | Path,
    injection: Injection,
    *,
    backbone: Mapping[str, Any],
    backbone_tensors: Mapping[str, Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter's files into a folder, each whole or not at all.

    Args:
        folder: made if need be.
        injection: what `ttt.inject.apply` returned.
        backbone: name and options of the backbone, as `backbone_identity` gives them.
        backbone_tensors: the backbone's parameters that were trained too, by name in the model.
        training: anything worth knowing about how it was trained, as JSON.

    Returns:
        The safetensors file.

    Raises:
        EnvironmentProblem: the disk is full or cannot be written.
    """
    folder = Path(folder)
    trained = set(backbone_tensors or ())
    pair = uuid.uuid4().hex if trained else None
    settings = {
        "format": FORMAT,
        "version": VERSION,
        "ttt_version": __version__,
        "backbone": dict(backbone),
        "backbone_weights": weights_fingerprint(injection, without=trained),
        "backbone_trained": pair,
        "ttt": injection.config.model_dump(mode="json"),
        "sites": [vars(site) for site in _site_infos(injection.sites, injection.config)],
        "training": dict(training or {}),
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if backbone_tensors:
        write_tensors(folder / BACKBONE, backbone_tensors, {"format": "ttt-backbone", "pair": str(pair)})
    write_tensors(folder / MODEL, injection.state_dict(), {"format": FORMAT, _SETTINGS: json.dumps(settings)})
    write_text(folder / CONFIG, json_text(settings) + "\n")
    return folder / MODEL


def read_info(path: str | Path, *, verify: bool = False) -> AdapterInfo:
    """What an adapter file is, from its header; needs no torch.

    Of a run's folder, checkpoints that are not whole are passed over with a `DamagedFileWarning`.

    Args:
        path: the safetensors file, its folder, or a run's folder (then its last checkpoint).
        verify: compare the files' content with their checksums, which reads them; else no tensor is read.

    Raises:
        AdapterFileError: it is missing, damaged, from a newer version, or no adapter file; one sentence says which.
    """
    try:
        file, verified = _find(Path(path), verify=verify)
        header = read_header(file, most_bytes=MAX_HEADER)
        if header.metadata.get("format") != FORMAT or _SETTINGS not in header.metadata:
            raise AdapterFileError(f"{file}: no adapter of ttt: its header holds no adapter settings")
        info = _parse(file, header.metadata[_SETTINGS], header)
        _require_same_json(file, header.metadata[_SETTINGS])
        if verify and not verified:
            verify_adapter(info)
    except AdapterFileError:
        raise
    except EnvironmentProblem as problem:
        raise AdapterFileError(str(problem)) from None
    return info


def verify_adapter(info: AdapterInfo) -> None:
    """Compare an adapter's file, and that of the backbone parameters trained along, with their checksums.

    Needs no torch. Files of version 1 carry none, and pass.

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


def load_adapter(
    path: str | Path,
    model: nn.Module,
    *,
    sites: Sequence[Site] | None = None,
    injection: Injection | None = None,
    backbone: Mapping[str, Any] | None = None,
    causal: bool = True,
    check_weights: bool = True,
    as_start: bool = False,
    verify: bool = True,
) -> Injection:
    """Load an adapter into a model: into its injection, or, given the backbone's sites, by the file's own settings.

    Where the file came with trained backbone parameters, they are loaded too. Nothing is changed unless all fits.

    Args:
        path: the safetensors file, its folder, or a run's folder (then its last checkpoint).
        model: the backbone, plain or injected.
        sites: what the backbone offers, for a plain model.
        injection: of an injected model, instead of `sites`.
        backbone: name and options, as `backbone_identity` gives them; None leaves them unchecked.
        causal: whether the backbone is, for a plain model.
        check_weights: compare the backbone's weights with those that the adapter was trained on.
        as_start: for a run that goes on from there: settings that change no tensor, such as `mini_batch_size` and
            `base_lr`, may differ from those of the injection.
        verify: compare the files with their checksums.

    Returns:
        The injection, given or made.

    Raises:
        AdapterFileError: the file is missing or damaged.
        AdapterMismatchError: it belongs to something else; the message names each difference.
    """
    if (sites is None) == (injection is None):
        raise TypeError("load_adapter takes either sites, for a plain model, or injection")
    info = read_info(path, verify=verify)
    differences = [] if backbone is None else _option_differences(info.backbone, backbone)
    if injection is not None:
        free = _FREE_AT_START if as_start else _FREE_SETTINGS
        differences += _setting_differences(info.ttt, injection.config, free)
        differences += _site_differences(info.sites, _site_infos(injection.sites, injection.config))
        _finish(info, model, injection, differences, check_weights=check_weights, free=free)
        return injection
    assert sites is not None
    _require_fit(info, sites, causal, differences)  # before memory is taken that the settings alone ask for
    made = _inject(info, model, sites, causal, differences)
    try:
        differences += _site_differences(info.sites, _site_infos(made.sites, made.config))
        _finish(info, model, made, differences, check_weights=check_weights, free=_FREE_SETTINGS)
    except BaseException:
        made.eject()
        raise
    return made


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


def config_differences(
    info: AdapterInfo, ttt: TTTConfig, *, backbone: Mapping[str, Any], layers: Sequence[int], as_start: bool = False
) -> list[str]:
    """What keeps an adapter from being loaded into a config's model, as far as settings say; needs no torch.

    Args:
        info: of the adapter.
        ttt: the config's settings.
        backbone: name and options of its backbone, as `backbone_identity` gives them.
        layers: its TTT layers.
        as_start: as in `load_adapter`.

    Returns:
        A sentence for each difference that matters; none where it can be loaded, if its tensors are what it says.
    """
    before, here = sorted(site.layer for site in info.sites), sorted(layers)
    return [
        *_option_differences(info.backbone, backbone),
        *_setting_differences(info.ttt, ttt, _FREE_AT_START if as_start else _FREE_SETTINGS),
        *([] if before == here else [_difference("ttt.layers", before, here)]),
    ]


def way_to_fit(info: AdapterInfo, ttt: TTTConfig, *, as_start: bool = False) -> str:
    """What to write so that a config's settings are those of an adapter; empty where they are."""
    return _way_out(_differing(info.ttt, ttt, _FREE_AT_START if as_start else _FREE_SETTINGS))


@dataclass(frozen=True)
class ChangedSetting:
    """A setting that may change at the start of a run, and by which the same tensors then compute something else."""

    key: str
    """In the config, dotted."""
    theirs: Any
    """In the adapter's file."""
    ours: Any
    """In the config."""

    def __str__(self) -> str:
        return _difference(self.key, self.theirs, self.ours)

    @property
    def way_out(self) -> str:
        """What to give a command to compute as the file says."""
        return f"--set {self.key}={json.dumps(self.theirs)}"


def changed_at_start(info: AdapterInfo, ttt: TTTConfig) -> list[ChangedSetting]:
    """What a run that starts from an adapter computes otherwise than the adapter's file says, its tensors unchanged."""
    return [
        ChangedSetting(f"ttt.{key}", getattr(info.ttt, key), getattr(ttt, key))
        for key in _COMPUTED_WITH
        if getattr(info.ttt, key) != getattr(ttt, key)
    ]


def weights_fingerprint(injection: Injection, *, without: set[str] | frozenset[str] = frozenset()) -> str | None:
    """Some values of each backbone parameter in bfloat16, the same from float32 and bfloat16, on every device.

    Values, not a hash of them: a model that is drawn at random has another last place on another processor, and now
    and then rounds to the neighbour. `same_weights` compares.

    Args:
        injection: of the model; its adapters are left out.
        without: names of parameters to leave out.

    Returns:
        `bf16:NAMES:VALUES`, a hash of names and shapes, and the values in base64; None where the model has no values
        (device `meta`).
    """
    names, samples = hashlib.sha256(), []
    for name, parameter in _backbone_parameters(injection, without):
        if parameter.is_meta:
            return None
        names.update(f"{name} {list(parameter.shape)}\n".encode())
        values = _sampled(parameter, _SAMPLES).tolist()
        samples.append(struct.pack(f"<{len(values)}h", *values))
    return f"bf16:{names.hexdigest()[:16]}:{base64.b64encode(b''.join(samples)).decode()}"


def same_weights(fingerprint: str, injection: Injection, *, without: set[str] | frozenset[str] = frozenset()) -> bool:
    """Whether a fingerprint is of this backbone's weights.

    Of values drawn on another processor about 1 in 14,000 rounds to the neighbour in bfloat16 (measured); of values
    that a training moved by a thousandth, every fifth or so. So 1 in 1,000 may be a neighbour, and 2 of a small model.

    Args:
        fingerprint: as an adapter file has it; `sha256:…` is that of format 1, equal or not.
        injection: of the model.
        without: names of parameters to leave out.

    Returns:
        True, too, where either has no values.
    """
    if fingerprint.startswith("sha256:"):
        here = _hash_of_weights(injection, without)
        return here is None or here == fingerprint
    here = weights_fingerprint(injection, without=without)
    if here is None:
        return True
    head, _, values = here.rpartition(":")
    other_head, _, other_values = fingerprint.rpartition(":")
    one, other = _ranks(values), _ranks(other_values)
    if head != other_head or len(one) != len(other):
        return False
    away = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return max(away, default=0) <= 1 and sum(away) <= max(2, len(away) // 1000)


def _ranks(values: str) -> list[int]:
    """Whole numbers in the order of the bfloat16 values, neighbours one apart; none where the text holds none."""
    try:
        content = base64.b64decode(values, validate=True)
        bits = [number for (number,) in struct.iter_unpack("<h", content)]
    except (ValueError, struct.error):
        return []
    return [-32768 - number if number < 0 else number for number in bits]


def _backbone_parameters(
    injection: Injection, without: set[str] | frozenset[str]
) -> Iterator[tuple[str, nn.Parameter]]:
    adapters = tuple(f"{name}." for name in injection.adapters)
    for name, parameter in injection.model.named_parameters():
        if name not in without and not name.startswith(adapters):
            yield name, parameter


def _sampled(parameter: Tensor, count: int) -> Tensor:
    import torch

    flat = parameter.detach().flatten()
    return flat[:: max(1, flat.numel() // count)][:count].to(torch.bfloat16).view(torch.int16).cpu()


def _hash_of_weights(injection: Injection, without: set[str] | frozenset[str]) -> str | None:
    """The fingerprint of format 1."""
    digest = hashlib.sha256()
    for name, parameter in _backbone_parameters(injection, without):
        if parameter.is_meta:
            return None
        digest.update(f"{name} {list(parameter.shape)} {_sampled(parameter, 16).tolist()}\n".encode())
    return f"sha256:{digest.hexdigest()}"


# --- reading ---


def _find(path: Path, *, verify: bool) -> tuple[Path, bool]:
    """The adapter's safetensors file of a file, an adapter folder or a run, and whether its checksum was compared."""
    if not path.is_dir():
        return path, False
    if (path / MODEL).exists():
        return path / MODEL, False
    from ttt.train.rundir import RunDir

    checkpoint, passed_over = RunDir(path).latest(verify=verify, only=(MODEL, BACKBONE))
    if checkpoint is None:
        detail = f" ({'; '.join(passed_over)})" if passed_over else ""
        raise AdapterFileError(f"{path}: holds no {MODEL}, and is no run with a complete checkpoint{detail}")
    for problem in passed_over:
        warnings.warn(
            f"passed over a checkpoint that is not whole: {problem}; {checkpoint.path} is taken instead",
            DamagedFileWarning,
            stacklevel=3,
        )
    return checkpoint.path / MODEL, verify


def _parse(file: Path, text: str, header: Header) -> AdapterInfo:
    try:
        settings = json.loads(text, object_pairs_hook=no_duplicates)
        version = settings["version"]
        if type(version) is not int or version < 1 or len(settings["sites"]) > MAX_SITES:
            raise ValueError(version)
        if not all(isinstance(settings[key], str | None) for key in ("backbone_weights", "backbone_trained")):
            raise ValueError("backbone")
        if version > VERSION:
            raise AdapterFileError(
                f"{file}: adapter format {version}, but this ttt ({__version__}) reads up to {VERSION}; install "
                f"ttt-adapters {settings.get('ttt_version', '')} or newer".replace("  ", " ")
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NestedCheckpointWarning)  # said when it was trained
            config = TTTConfig.model_validate(with_its_target_eps(settings["ttt"]))
        return AdapterInfo(
            path=file,
            version=version,
            checksum=header.checksum,
            ttt_version=str(settings["ttt_version"]),
            backbone=dict(settings["backbone"]),
            backbone_weights=settings["backbone_weights"],
            backbone_trained=settings["backbone_trained"],
            ttt=config,
            sites=tuple(
                SiteInfo(int(site["layer"]), str(site["name"]), int(site["dim"]), int(site["num_heads"]))
                for site in settings["sites"]
            ),
            training=dict(settings["training"]),
            tensors=header.tensors,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("ttt", *first["loc"])))
        raise AdapterFileError(f"{file}: the settings in its header do not hold: {where}: {first['msg']}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise AdapterFileError(f"{file}: the settings in its header do not parse") from None


def _require_same_json(file: Path, text: str) -> None:
    """Refuse a JSON beside the file that says something else: an edit of it would silently do nothing."""
    beside = file.with_name(CONFIG)
    if file.name != MODEL or not beside.exists():
        return
    header, read = json.loads(text), read_json(beside)
    if json.dumps(header, sort_keys=True) != json.dumps(read, sort_keys=True):
        here, there = _flat(header), _flat(read)
        keys = here.keys() ^ there.keys() | {key for key in here.keys() & there.keys() if here[key] != there[key]}
        named = ", ".join(sorted(keys)[:5]) or "empty sections"
        raise AdapterFileError(
            f"{beside}: does not say what the header of {file.name} says ({named}); the header was "
            f"written with the tensors and counts: delete or restore the JSON"
        )


# --- comparing ---


def _inject(
    info: AdapterInfo, model: nn.Module, sites: Sequence[Site], causal: bool, differences: Sequence[str]
) -> Injection:
    from ttt import inject

    try:
        return inject.apply(model, sites, info.ttt, causal=causal)
    except InjectionError as error:
        _raise(info.path, [*differences, str(error)])
        raise


def _require_fit(info: AdapterInfo, sites: Sequence[Site], causal: bool, differences: Sequence[str]) -> None:
    """Hold the file's tensors against what its settings would make here, without memory for any of it.

    Raises:
        AdapterMismatchError: they differ, or the settings ask for what no machine has.
    """
    import torch

    from ttt import inject

    found = list(differences)
    try:
        planned = inject.plan(sites, info.ttt, causal=causal)
        found += _site_differences(info.sites, _site_infos(planned.sites, planned.config))
        if not found:
            with torch.device("meta"):
                made = {
                    f"{site.name}.{name}": tuple(tensor.shape)
                    for site in planned.sites
                    for name, tensor in inject.bare_adapter(site, info.ttt).state_dict().items()
                }
            found = _tensor_differences(_shapes(info.tensors), made, complete=True)
    except InjectionError as error:
        found.append(str(error))
    except (RuntimeError, OverflowError, MemoryError, TypeError, ValueError) as error:
        found.append(f"its settings make no layer: {first_line(error, otherwise='out of memory')}")
    _raise(info.path, found)


def _finish(
    info: AdapterInfo,
    model: nn.Module,
    injection: Injection,
    differences: list[str],
    *,
    check_weights: bool,
    free: frozenset[str],
) -> None:
    """Check what is left to check, and then copy everything."""
    import torch

    own = dict(model.named_parameters())
    trained = trained_backbone(info)
    here = {name: tuple(tensor.shape) for name, tensor in injection.state_dict().items()}
    differences += _tensor_differences(_shapes(info.tensors), here, complete=True)
    differences += _tensor_differences(
        _shapes(trained), {name: tuple(tensor.shape) for name, tensor in own.items()}, complete=False
    )
    known = info.backbone_weights if check_weights and not differences else None
    if known and not same_weights(known, injection, without=set(trained)):
        differences.append("the backbone's weights: other values here than those that it was trained on")
    _raise(info.path, differences, way_out=_way_out(_differing(info.ttt, injection.config, free)))
    try:
        tensors = read_tensors(info.path, verify=False)  # done, where it is asked for
        of_backbone = read_tensors(info.path.with_name(BACKBONE), verify=False) if trained else {}
    except EnvironmentProblem as problem:
        raise AdapterFileError(str(problem)) from None
    injection.load_state_dict(tensors)
    with torch.no_grad():
        for name, tensor in of_backbone.items():
            own[name].copy_(tensor)


def _raise(path: Path, differences: Sequence[str], *, way_out: str = "") -> None:
    if differences:
        raise AdapterMismatchError(
            f"{path}: belongs to something else: {'; '.join(differences)}{way_out and f'; {way_out}'}; "
            f"`ttt info {shell_word(path)}` prints what it needs"
        )


def _option_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    before, here = _flat(theirs), _flat(ours)
    return [
        _difference(f"backbone.{key}", before.get(key), here.get(key))
        for key in sorted(before.keys() | here.keys(), key=lambda key: (key != "name", key))
        if before.get(key) != here.get(key)
    ]


def _setting_differences(theirs: TTTConfig, ours: TTTConfig, free: frozenset[str]) -> list[str]:
    here = ours.model_dump(mode="json")
    return [_difference(f"ttt.{key}", before, here[key]) for key, before in _differing(theirs, ours, free).items()]


def _differing(theirs: TTTConfig, ours: TTTConfig, free: frozenset[str]) -> dict[str, Any]:
    """The settings that differ, as the file has them."""
    before, here = theirs.model_dump(mode="json"), ours.model_dump(mode="json")
    return {key: value for key, value in before.items() if value != here[key] and key not in free}


def _way_out(settings: Mapping[str, Any]) -> str:
    """What to write, or to give a command, so that a config's settings are those of a file."""
    given = (f"--set {shell_word(f'ttt.{key}={json.dumps(value)}')}" for key, value in settings.items())
    return f"give the config the file's: {' '.join(given)}" if settings else ""


def _site_infos(sites: Sequence[Site], config: TTTConfig) -> list[SiteInfo]:
    return [SiteInfo(site.layer, site.name, site.dim, config.num_heads or site.num_heads) for site in sites]


def _site_differences(theirs: Sequence[SiteInfo], ours: Sequence[SiteInfo]) -> list[str]:
    layers, here = sorted(site.layer for site in theirs), sorted(site.layer for site in ours)
    if layers != here:
        return [_difference("ttt.layers", layers, here)]
    found = []
    for before, now in zip(sorted(theirs, key=lambda s: s.layer), sorted(ours, key=lambda s: s.layer), strict=True):
        for key in ("name", "dim", "num_heads"):
            if getattr(before, key) != getattr(now, key):
                found.append(_difference(f"layer {now.layer}: {key}", getattr(before, key), getattr(now, key)))
    return found


def _shapes(tensors: Mapping[str, TensorFacts]) -> dict[str, tuple[int, ...]]:
    return {name: facts.shape for name, facts in tensors.items()}


def _tensor_differences(
    theirs: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]], *, complete: bool
) -> list[str]:
    """What differs in names and shapes."""
    found = [f"tensor {name}: not in the file" for name in ours if complete and name not in theirs]
    for name, shape in theirs.items():
        if name not in ours:
            found.append(f"tensor {name}: in the file, not here")
        elif shape != ours[name]:
            found.append(_difference(f"tensor {name}: shape", list(shape), list(ours[name])))
    return found if len(found) <= 8 else [*found[:8], f"and {len(found) - 8} tensors more"]


def _difference(what: str, theirs: Any, ours: Any) -> str:
    return f"{what}: {json.dumps(theirs)} in the file, {json.dumps(ours)} here"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + str(key)] = value
    return flat
