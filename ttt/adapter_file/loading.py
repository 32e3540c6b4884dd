"""Loading adapter files into a model, wholly or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ttt import inject
from ttt.adapter_file.differences import (
    adapter_differences,
    free_settings,
    option_differences,
    prepared_differences,
    says_of_ttt,
    setting_differences,
    shapes,
    site_differences,
    tensor_differences,
    way_to_fit,
)
from ttt.adapter_file.fingerprint import backbone_dtype, other_weights, same_weights
from ttt.adapter_file.format import BACKBONE, AdapterInfo, site_infos
from ttt.adapter_file.reading import read_info, trained_backbone
from ttt.config.lora import Linears
from ttt.errors import AdapterFileError, AdapterMismatchError, EnvironmentProblem, InjectionError
from ttt.files import read_tensors
from ttt.inject import Injection
from ttt.lora import LoraPlan
from ttt.plugins import LoraSite, Site
from ttt.printable import shell_word
from ttt.words import first_line


def load_adapter(
    path: str | Path,
    model: nn.Module,
    *,
    sites: Sequence[Site] | None = None,
    lora_sites: LoraSites | None = None,
    injection: Injection | None = None,
    backbone: Mapping[str, Any] | None = None,
    causal: bool = True,
    check_weights: bool = True,
    as_start: bool = False,
    verify: bool = True,
) -> Injection:
    """Load an adapter into a model: into its injection or, given the backbone's sites, by the file's own settings.

    If the file came with trained backbone parameters, they are loaded too. Nothing is changed unless all fits.

    Args:
        path: the safetensors file, its folder, or a run's folder (then its last checkpoint).
        model: the backbone, plain or injected.
        sites: what the backbone offers, for a plain model.
        lora_sites: the backbone's `lora_sites`, for a plain model and a file with LoRA.
        injection: of an injected model, instead of `sites`.
        backbone: name and options, as `backbone_identity` gives them; of None, those are checked that can be read off
            the model (`Site.known_options`).
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
    differences = _backbone_differences(info, sites if injection is None else injection.sites, backbone)
    if injection is not None:
        free = free_settings(as_start=as_start)
        differences += adapter_differences(info, bool(injection.sites), injection.lora_settings)
        differences += setting_differences(info.ttt, injection.config, free) if says_of_ttt(info) else []
        differences += site_differences(info.sites, site_infos(injection.sites, injection.config))
        differences += prepared_differences(info.prepared, injection.prepared)
        _check_and_copy(info, model, injection, differences, check_weights=check_weights, as_start=as_start)
        return injection
    assert sites is not None
    plan = _plan_of_lora(info, model, lora_sites)
    _require_fit(info, sites, plan, causal, differences)  # before memory is taken that the settings alone ask for
    made = _inject(info, model, sites, plan, causal, differences)
    try:
        differences += site_differences(info.sites, site_infos(made.sites, made.config))
        _check_and_copy(info, model, made, differences, check_weights=check_weights)
    except BaseException:
        made.eject()
        raise
    made.takes_over(inject.prepared_of([site for site in sites if site.layer in info.prepared]))
    return made


def _backbone_differences(
    info: AdapterInfo, sites: Sequence[Site] | None, backbone: Mapping[str, Any] | None
) -> list[str]:
    """How the file's backbone differs from this one, as far as its options are given or can be read off the model."""
    known = dict(sites[0].known_options) if sites else {}
    theirs = {key: info.backbone.get(key) for key in known}
    given = [] if backbone is None else option_differences(info.backbone, backbone)
    return list(dict.fromkeys([*given, *option_differences(theirs, known)]))


LoraSites = Callable[[nn.Module, Linears], Sequence[LoraSite]]
"""`LowRank.lora_sites` of a backbone."""


def _plan_of_lora(info: AdapterInfo, model: nn.Module, lora_sites: LoraSites | None) -> LoraPlan | None:
    """Where the LoRA of a file goes; None if it has none.

    Raises:
        AdapterMismatchError: nobody says which linear layers it is of.
    """
    if info.lora is None:
        return None
    if lora_sites is None:
        way_out = "load it by ttt.load_adapter(…, lora_sites=backbone.lora_sites)"
        _refuse(info.path, ["it holds LoRA, and no lora_sites are given"], way_out=way_out)
    assert lora_sites is not None
    return LoraPlan(tuple(lora_sites(model, info.lora.linears)), info.lora)


def _inject(
    info: AdapterInfo,
    model: nn.Module,
    sites: Sequence[Site],
    lora: LoraPlan | None,
    causal: bool,
    differences: Sequence[str],
) -> Injection:
    try:
        return inject.apply(model, sites, info.ttt, causal=causal, lora=lora)
    except InjectionError as error:
        _refuse(info.path, [*differences, str(error)])
        raise


def _require_fit(
    info: AdapterInfo, sites: Sequence[Site], lora: LoraPlan | None, causal: bool, differences: Sequence[str]
) -> None:
    """Compare the file's tensors with those that its settings would make here, without memory for any of them.

    Raises:
        AdapterMismatchError: they differ, or the settings ask for what no machine has.
    """
    found = list(differences)
    try:
        planned = inject.plan(sites, info.ttt, causal=causal)
        found += site_differences(info.sites, site_infos(planned.sites, planned.config))
        if not found:
            with torch.device("meta"):
                made = {
                    f"{site.name}.{name}": tuple(tensor.shape)
                    for site in planned.sites
                    for name, tensor in inject.bare_adapter(site, info.ttt).state_dict().items()
                }
            made |= {} if lora is None else lora.shapes()
            found = tensor_differences(shapes(info.tensors), made, complete=True)
    except InjectionError as error:
        found.append(str(error))
    except (RuntimeError, OverflowError, MemoryError, TypeError, ValueError) as error:
        found.append(f"its settings make no layer: {first_line(error, otherwise='out of memory')}")
    _refuse(info.path, found)


def _check_and_copy(
    info: AdapterInfo,
    model: nn.Module,
    injection: Injection,
    differences: list[str],
    *,
    check_weights: bool,
    as_start: bool = False,
) -> None:
    """Check what is left to check, then copy every tensor.

    Raises:
        AdapterMismatchError: something differs; nothing was copied.
        AdapterFileError: the tensors cannot be read.
    """
    own = dict(model.named_parameters())
    trained = trained_backbone(info)
    here = {name: tuple(tensor.shape) for name, tensor in injection.state_dict().items()}
    differences += tensor_differences(shapes(info.tensors), here, complete=True)
    differences += tensor_differences(
        shapes(trained), {name: tuple(tensor.shape) for name, tensor in own.items()}, complete=False
    )
    known = info.backbone_weights if check_weights and not differences else None
    if known and not same_weights(known, injection, without=set(trained)):
        differences.append(other_weights(info.backbone_dtype, backbone_dtype(injection, without=set(trained))))
    way_out = way_to_fit(
        info, injection.config, has_ttt=bool(injection.sites), lora=injection.lora_settings, as_start=as_start
    )
    _refuse(info.path, differences, way_out=way_out)
    try:
        tensors = read_tensors(info.path, verify=False)  # done, if it is asked for
        of_backbone = read_tensors(info.path.with_name(BACKBONE), verify=False) if trained else {}
    except EnvironmentProblem as problem:
        raise AdapterFileError(str(problem)) from None
    injection.load_state_dict(tensors)
    with torch.no_grad():
        for name, tensor in of_backbone.items():
            own[name].copy_(tensor)


def _refuse(path: Path, differences: Sequence[str], *, way_out: str = "") -> None:
    """Raise if there are differences."""
    if differences:
        raise AdapterMismatchError(
            f"{path}: belongs to something else: {'; '.join(differences)}{way_out and f'; {way_out}'}; "
            f"`ttt info {shell_word(path)}` prints what it needs"
        )
