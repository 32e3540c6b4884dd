"""The keys in which the configs of several runs differ, whatever their backbones and however old they are."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ttt.config.schema import RunConfig, with_its_target_eps
from ttt.dotted import dotted
from ttt.errors import TTTError
from ttt.plugins.run_config import default_values

_OWN = "run_dir"
"""Every run has its own, and the table names it."""


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys that differ, by dotted name in the order of a config, each with every config's value.

    A key that a config lacks counts with its default if that is known: a ttt of before the key did what the default
    does. If it is not known, as of a backbone that is not installed, the value is `ABSENT`. What only another backbone
    has is no difference.

    Args:
        configs: plain data, as runs wrote it.
    """
    names = [str(config.get("backbone", {}).get("name")) for config in configs]
    flat = [dotted(_with_later_keys(config)) for config in configs]
    keys = list(dict.fromkeys(key for config in flat for key in config if key != _OWN))
    found = {key: [_value(config, key, name) for config, name in zip(flat, names, strict=True)] for key in keys}
    return {key: found[key] for key in sorted(keys, key=_section) if _differs(key, found[key], names)}


class _Absent:
    def __repr__(self) -> str:
        return "-"


ABSENT = _Absent()
"""Stands for the value of a key that a config does not have."""


def _with_later_keys(config: Mapping[str, Any]) -> Mapping[str, Any]:
    ttt = config.get("ttt")
    config = {**config, "ttt": with_its_target_eps(ttt)} if isinstance(ttt, Mapping) else config
    return {key: value for key, value in config.items() if key != "lora" or _has_lora(config)}


def _has_lora(config: Mapping[str, Any]) -> bool:
    return "lora" in str(config.get("adapter"))


def _value(config: Mapping[str, Any], key: str, backbone: str) -> Any:
    if key in config:
        return config[key]
    return ABSENT if key.startswith("lora.") and not _has_lora(config) else _defaults(backbone).get(key, ABSENT)


def _section(key: str) -> int:
    """Keys in the order of a config's sections; a section that this ttt does not know stands last."""
    sections = list(RunConfig.model_fields)
    name = key.partition(".")[0]
    return sections.index(name) if name in sections else len(sections)


def _differs(key: str, values: Sequence[Any], names: Sequence[str]) -> bool:
    """Whether two runs have different values, or one of two runs of the same backbone has none."""
    known = [value for value in values if value is not ABSENT]
    if any(not _same(known[0], value) for value in known[1:]):
        return True
    if key.startswith("lora."):  # what a run without LoRA lacks, `adapter` says
        return False
    with_it = {name for value, name in zip(values, names, strict=True) if value is not ABSENT}
    return any(value is ABSENT and name in with_it for value, name in zip(values, names, strict=True))


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


@functools.cache
def _defaults(backbone: str) -> Mapping[str, Any]:
    """The defaults of this ttt's keys and, if it is installed, of the backbone's, by dotted name."""
    from ttt.plugins import get_backbone
    from ttt.plugins.run_config import run_config_model

    try:
        model: type[RunConfig] = run_config_model(get_backbone(backbone))
    except TTTError:
        model = RunConfig
    found = default_values(model)
    found.pop("backbone.name", None)
    return found
