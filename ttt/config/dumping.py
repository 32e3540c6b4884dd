"""Values and configs as YAML that reads back equal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from ttt.config.scalars import BOOLEAN, FLOAT, INTEGER, NULL
from ttt.config.schema import RunConfig

# --- writing ---


class _Dumper(yaml.SafeDumper):
    """Writes YAML that reads back the same under YAML 1.2. Texts that look like numbers do so under 1.1 too."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value in full, without anchors and aliases."""
        return True


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    written = repr(value).replace("inf", ".inf").replace("nan", ".nan")
    return dumper.represent_scalar("tag:yaml.org,2002:float", written)


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # only double quotes keep line separators and the like unchanged
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


def _represent_list(dumper: yaml.SafeDumper, value: Iterable[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


# Ours come first: the first one that matches decides what a scalar without quotes means.
_Dumper.yaml_implicit_resolvers = {
    first: [
        ("tag:yaml.org,2002:null", NULL),
        ("tag:yaml.org,2002:bool", BOOLEAN),
        ("tag:yaml.org,2002:int", INTEGER),
        ("tag:yaml.org,2002:float", FLOAT),
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
    ]
    for first in ["", *map(chr, range(33, 127))]
}
_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)


def dump_value(value: Any) -> str:
    """A value as YAML on one line, to write after a key. It reads back equal."""
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=1 << 30)
    return text.removesuffix("\n").removesuffix("...").rstrip("\n")


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML, with every key, sections in order. It loads back equal."""
    content = config.model_dump(mode="json")
    parts = [
        yaml.dump({key: content[key]}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 30)
        for key in RunConfig.model_fields
    ]
    return "\n".join(parts)
