"""CogVideoX's other releases, recognised by config.json or repository before any weight is read; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ttt.errors import EnvironmentProblem
from ttt.files import read_json
from ttt_videodit.geometry import LATENT_CHANNELS, PATCH_SIZE

WAY_OUT: Final = "name the text-to-video model CogVideoX-5b (THUDM/CogVideoX-5b), or weights trained from it"

_OWNERS: Final = frozenset({"thudm", "zai-org", "zhipuai", "alibaba-pai"})
"""Owners on the hub that publish CogVideoX and its variants, under names that say which is which."""
_NAMES: Final = (
    (re.compile(r"cogvideox-?1\.5.*i2v"), "CogVideoX 1.5 for images to video, whose patches span several frames"),
    (re.compile(r"cogvideox.*-fun\b"), "CogVideoX-Fun, which reads a second video beside the noise"),
    (re.compile(r"cogvideox-?1\.5"), "CogVideoX 1.5, whose patches span several frames"),
    (re.compile(r"cogvideox.*i2v"), "CogVideoX for images to video, which reads an image beside the noise"),
    (re.compile(r"cogvideox-2b"), "CogVideoX 2b, whose positions are not rotary"),
    (re.compile(r"cogvideox.*sat$"), "CogVideoX in SAT's layout, not diffusers'"),
)
_CLASSES: Final = (None, "CogVideoXTransformer3DModel", "VideoDiT")


def wrong_variant(config: Mapping[str, Any]) -> str | None:
    """Why a transformer's `config.json` cannot be used, and which release it is of; None if it can.

    Keys that are left out have the defaults of diffusers' class.
    """
    name = config.get("_class_name")
    if name not in _CLASSES:
        return f"is a {name!r:.60}, not CogVideoX's transformer"
    channels = config.get("in_channels", LATENT_CHANNELS)
    image = (
        "" if channels == LATENT_CHANNELS else f", which reads {channels!r:.20} channels (an image beside the noise)"
    )
    if any(config.get(key) is not None for key in ("patch_size_t", "ofs_embed_dim")):
        return f"is CogVideoX 1.5, whose patches span several frames{image}"
    if image:
        kind = (
            "CogVideoX for images to video" if channels == 2 * LATENT_CHANNELS else "CogVideoX-Fun or another variant"
        )
        return f"is {kind}{image}"
    if config.get("use_rotary_positional_embeddings") is not True:
        return "is CogVideoX 2b, whose positions are learned or sinusoidal, not rotary"
    if config.get("use_learned_positional_embeddings"):
        return "has learned positions, which end with the videos that it was trained on"
    outputs = config.get("out_channels", LATENT_CHANNELS)
    if outputs not in (None, LATENT_CHANNELS):
        return f"predicts {outputs!r:.20} channels, not the {LATENT_CHANNELS} of CogVideoX's latents"
    if config.get("patch_size", PATCH_SIZE) != PATCH_SIZE:
        return f"has patches of {config['patch_size']!r:.20} latents, not CogVideoX's {PATCH_SIZE}"
    if config.get("quantization_config") is not None:
        return "has quantised weights, in which nothing is trained here"
    return None


def wrong_repository(name: str) -> str | None:
    """The same, by the name of a repository on the hub; None too if the name says nothing."""
    owner, _, repository = name.casefold().partition("/")
    if owner not in _OWNERS:
        return None
    return next((f"is {what}" for pattern, what in _NAMES if pattern.match(repository)), None)


def wrong_source(source: str) -> str | None:
    """The same, of what `backbone.pretrained` names: a folder by its config.json, else a repository by its name.

    A folder without one, or with one that cannot be read, is None.
    """
    try:
        folder = Path(source)
        if not folder.is_dir():
            return wrong_repository(source)
        files = (folder / "config.json", folder / "transformer" / "config.json")
        file = next((file for file in files if file.is_file()), None)
        return None if file is None else wrong_variant(read_json(file))
    except (EnvironmentProblem, OSError, ValueError):
        return None
