"""Writing adapter files."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ttt.adapter_file.fingerprint import BackboneWeights
from ttt.adapter_file.format import BACKBONE, CONFIG, FORMAT, MODEL, SETTINGS, VERSION, VERSION_WITHOUT_LORA, site_infos
from ttt.files import write_tensors, write_text, writing
from ttt.inject import Injection
from ttt.printable import json_text
from ttt.version import __version__


def save_adapter(
    folder: str | Path,
    injection: Injection,
    *,
    backbone: Mapping[str, Any],
    backbone_tensors: Mapping[str, Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    weights: BackboneWeights | None = None,
) -> Path:
    """Write an adapter's files into a folder, each whole or not at all.

    Args:
        folder: made if need be.
        injection: what `ttt.inject.apply` returned.
        backbone: name and options of the backbone, as `backbone_identity` gives them.
        backbone_tensors: the backbone's parameters that were trained too, by name in the model.
        training: anything worth knowing about how it was trained, as JSON.
        tensors: values to write instead of the adapters' own, under the same names, as gathered from several processes.
        weights: by what the backbone is known again; None looks at it now, without the parameters that were trained.

    Returns:
        The safetensors file.

    Raises:
        EnvironmentProblem: the disk is full or cannot be written.
        UsageError: the adapters were rounded by `Injection.for_inference`.
    """
    injection.require_masters()
    folder = Path(folder)
    trained = set(backbone_tensors or ())
    weights = weights or BackboneWeights.of(injection, without=trained)
    pair = uuid.uuid4().hex if trained else None
    settings: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION_WITHOUT_LORA if injection.lora is None else VERSION,
        "ttt_version": __version__,
        "backbone": dict(backbone),
        "backbone_weights": weights.fingerprint,
        "backbone_dtype": weights.dtype,
        "backbone_trained": pair,
        "ttt": injection.config.model_dump(mode="json"),
        "sites": [vars(site) for site in site_infos(injection.sites, injection.config)],
        "training": dict(training or {}),
    }
    if injection.lora is not None:
        settings["lora"] = asdict(injection.lora.settings)
    if injection.prepared:
        settings["prepared"] = list(injection.prepared)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if backbone_tensors:
        write_tensors(folder / BACKBONE, backbone_tensors, {"format": "ttt-backbone", "pair": str(pair)})
    write_tensors(folder / MODEL, tensors or injection.state_dict(), {"format": FORMAT, SETTINGS: json.dumps(settings)})
    write_text(folder / CONFIG, json_text(settings) + "\n")
    return folder / MODEL
