"""Reading the files of a model with TTT into its backbone."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ttt.adapter_file import load_adapter, read_info
from ttt.errors import UsageError
from ttt.facade.attached import Attached, is_attached
from ttt.facade.injecting import frozen
from ttt.facade.recognising import inner_model, recognise, require_a_plain_model


def load(base: nn.Module, name: str | Path, *, revision: str | None, is_trainable: bool) -> Attached:
    """Inject what the files say into a plain model, and freeze the rest."""
    inner = inner_model(require_a_plain_model(base))
    if is_attached(inner):
        raise UsageError("there is TTT in this model already; call model.unload() first, or load into the plain model")
    folder = Path(name)
    info = read_info(folder)
    found = recognise(inner, None)
    injection = load_adapter(folder, inner, sites=found.sites, causal=found.causal)
    attached = frozen(inner, injection, found)
    attached.training = dict(info.training)
    if not is_trainable:
        for parameter in attached.adapter_parameters().values():
            parameter.requires_grad_(False)
    return attached
