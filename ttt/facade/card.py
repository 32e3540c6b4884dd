"""The model card of an adapter: what it is, what was measured, and how it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ttt.adapter_file import AdapterInfo, read_info
from ttt.facade.figures import figures
from ttt.files import write_text
from ttt.printable import printable
from ttt.reading import read_file
from ttt.version import __version__

CARD = "README.md"
_OURS = "<!-- written by ttt; without this line it is yours, and is not written again -->"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_card(path: str | Path) -> str:
    """The model card of an adapter, as the hub reads it: YAML in front, then Markdown.

    Args:
        path: an adapter's file or folder, or a run's folder; then with what the run and its evaluations measured.

    Raises:
        AdapterFileError: there is no adapter, or it is damaged.
        EnvironmentProblem: a file of figures is damaged.
    """
    info = read_info(path)
    return card_text(info, figures(info))


def write_card(file: Path, measured: Sequence[str]) -> None:
    """Write the card beside an adapter's file, unless somebody has written their own there.

    Args:
        file: the adapter's safetensors file.
        measured: lines of figures that hold for it.
    """
    card = file.with_name(CARD)
    if card.exists() and _OURS not in read_file(card, limit=1 << 20).decode("utf-8", "replace"):
        return
    write_text(card, card_text(read_info(file), measured))


def card_text(info: AdapterInfo, measured: Sequence[str]) -> str:
    """The text of a card.

    Args:
        info: of the adapter.
        measured: lines of figures.
    """
    return "\n".join([*_front(info), _OURS, "", *_what(info), *_how_to_load(info), *_settings(info), *measured])


def _base(info: AdapterInfo) -> str | None:
    """The name of the backbone that the adapter was trained on, if the file says it."""
    provenance = info.training.get("provenance")
    named = provenance.get("repository") if isinstance(provenance, dict) else None
    return named if isinstance(named, str) and named else None


def _front(info: AdapterInfo) -> list[str]:
    base, of_language = _base(info), info.backbone.get("name") == "transformers"
    facts: dict[str, Any] = {
        "library_name": "ttt-adapters",
        "tags": ["ttt", "test-time-training", "fast-weights", "adapter", *(["lora"] if _has_lora(info) else [])],
    }
    if base is not None and _HUB_ID.fullmatch(base):  # the hub takes no path for it
        facts = {"base_model": base, "base_model_relation": "adapter", **facts}
    if of_language:
        facts["pipeline_tag"] = "text-generation"
    return ["---", yaml.safe_dump(facts, sort_keys=False, allow_unicode=True).rstrip(), "---"]


def _has_lora(info: AdapterInfo) -> bool:
    return "LORA" in str(info.backbone.get("peft", ""))


def _what(info: AdapterInfo) -> list[str]:
    base = _base(info)
    layers = ", ".join(str(site.layer) for site in info.sites)
    name = f"`{_line(base)}`" if base else f"the backbone {_line(info.backbone.get('name', '?'))}"
    commit = info.training.get("provenance", {}).get("commit") if base else None
    at = f" (commit `{_line(commit)}`)" if commit else ""
    beside = (
        f" It was trained beside {_line(info.backbone['peft'])}, whose files are in the folder above."
        if ("peft" in info.backbone)
        else ""
    )
    own = (
        " Backbone parameters that were trained along are in `backbone_model.safetensors`."
        if (info.backbone_trained)
        else ""
    )
    return [
        f"# TTT adapter for {name}",
        "",
        f"Test-time training (TTT) for {name}{at}: fast weights that take a step of self-supervised learning with "
        f"every {info.ttt.mini_batch_size} tokens that they read, at inference too. {info.parameters:,} parameters, in "
        f"{'layer' if len(info.sites) == 1 else 'layers'} {layers}; the backbone is not in these files.{beside}{own}",
        "",
    ]


def _how_to_load(info: AdapterInfo) -> list[str]:
    if info.backbone.get("name") != "transformers":
        return [
            "## How to load",
            "",
            "```python",
            "import ttt",
            "",
            'model = ttt.TTTModel.from_pretrained(backbone, "this folder or repository")',
            "```",
            "",
            f"`backbone` is a model of `{_line(info.backbone.get('name'))}`; `ttt info` prints its options.",
            "",
        ]
    base = _base(info) or "the base model"
    return [
        "## How to load",
        "",
        "```python",
        "import ttt",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(_line(base), ensure_ascii=False)})",
        'model = ttt.TTTModel.from_pretrained(base, "this folder or repository")',
        "```",
        "",
        "`pip install ttt-adapters transformers`. A base with other weights is refused.",
        "",
    ]


def _settings(info: AdapterInfo) -> list[str]:
    settings = {key: value for key, value in info.ttt.model_dump(mode="json").items() if value is not None}
    lines = [f"| `{key}` | {_line(value)} |" for key, value in settings.items()]
    return ["## Settings", "", "| | |", "|---|---|", *lines, "", f"Written by ttt {__version__}.", ""]


def _line(value: Any) -> str:
    """Text from a file, safe in a line of Markdown."""
    return printable(str(value)).replace("|", "\\|").replace("<", "&lt;").replace("`", "")
