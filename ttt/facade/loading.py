"""Reading the files of a model with TTT into its backbone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ttt.adapter_file import CONFIG, FORMAT, MODEL, AdapterInfo, load_adapter, read_info, trained_backbone
from ttt.errors import AdapterMismatchError, DamagedFileWarning, EnvironmentProblem, UsageError
from ttt.eval.unchanged import weight_versions
from ttt.facade.attached import Attached, Loaded, beside_peft, is_attached
from ttt.facade.figures import figures
from ttt.facade.injecting import frozen
from ttt.facade.recognising import (
    Recognised,
    architecture,
    inner_model,
    is_peft_model,
    require_a_plain_model,
)
from ttt.facade.saving import BESIDE_PEFT
from ttt.files import read_header
from ttt.hf import attention_limit


def holds_ttt(folder: Path) -> bool:
    """Whether a folder holds an adapter of TTT; PEFT's are in files of the same names."""
    try:
        return (folder / MODEL).is_file() and read_header(folder / MODEL).metadata.get("format") == FORMAT
    except EnvironmentProblem:
        return False


def place_of(folder: Path) -> tuple[Path, Path | None]:
    """Where TTT's files are, and where PEFT's are beside them, if there are any."""
    if not holds_ttt(folder / BESIDE_PEFT):
        return folder, None
    return folder / BESIDE_PEFT, folder if (folder / CONFIG).is_file() else None


def load_into(attached: Attached, folder: Path) -> None:
    """Load an adapter's files into the TTT that is there already.

    Raises:
        AdapterMismatchError: they belong to something else; nothing was copied.
    """
    load_adapter(folder, attached.model, injection=attached.injection)


def load(base: nn.Module, folder: Path, found: Recognised, *, is_trainable: bool) -> Attached:
    """Inject what the files say into a plain model, and freeze the rest.

    Raises:
        AdapterMismatchError: it belongs to another model; the message names each difference. The model is unchanged.
        AdapterFileError: it is missing or damaged.
    """
    inner = inner_model(base)
    info = read_info(folder)
    _require_same_kind(info, inner)
    before = _values(inner, info)
    injection = load_adapter(info.path, inner, sites=found.sites, causal=found.causal)
    attached = frozen(inner, injection, found, wrapped=is_peft_model(base))
    attached.is_trainable = is_trainable
    attached.replaced = before
    attached.backbone = {key: value for key, value in info.backbone.items() if key != "peft"}
    if info.backbone_trained is not None and is_trainable:
        for name, parameter in inner.named_parameters():
            if name in before:
                parameter.requires_grad_(True)
    attached.train_adapters()
    attached.training |= {key: info.training[key] for key in attached.training.keys() & info.training.keys()}
    attached.loaded = Loaded(info.training, _figures(info), weight_versions(inner))
    return attached


def require_nothing_attached(base: object) -> nn.Module:
    """Refuse a model that has TTT already.

    Raises:
        UsageError: it has, or is no model.
    """
    model = require_a_plain_model(base)
    if is_attached(inner_model(model)):
        raise UsageError("there is TTT in this model already; call model.unload() first, or load into the plain model")
    return model


def _require_same_kind(info: AdapterInfo, model: nn.Module) -> None:
    """Refuse another architecture, attention that sees more or less, and other company of PEFT's.

    Raises:
        AdapterMismatchError: naming the difference.
    """
    window, sinks = attention_limit(model)
    limit = (info.backbone.get("attention_window", window), info.backbone.get("attention_sinks", sinks))
    kind, peft = info.training.get("architecture", architecture(model)), info.backbone.get("peft")
    for what, there, here, way_out in (
        ("architecture", kind, architecture(model), ""),
        (
            "attention_window, attention_sinks",
            limit,
            (window, sinks),
            f"; call ttt.hf.limit_attention(model, window={limit[0]}, sinks={limit[1]}) first",
        ),
        (
            "what PEFT put into the backbone",
            peft or "nothing",
            beside_peft(model) or "nothing",
            "; give the model that it was trained in, as PeftModel.from_pretrained or get_peft_model makes it",
        ),
    ):
        if there != here:
            raise AdapterMismatchError(
                f"{info.path}: belongs to something else: {what}: {there} in the file, {here} here{way_out}"
            )


def _values(model: nn.Module, info: AdapterInfo) -> dict[str, Tensor]:
    """The values of those backbone parameters that the file brings too."""
    own: Mapping[str, nn.Parameter] = dict(model.named_parameters())
    return {name: own[name].detach().clone() for name in trained_backbone(info) if name in own}


def _figures(info: AdapterInfo) -> tuple[str, ...]:
    try:
        return tuple(figures(info))
    except EnvironmentProblem as problem:
        warnings.warn(f"{problem} (its figures are left out of the model card)", DamagedFileWarning, stacklevel=4)
        return ()
