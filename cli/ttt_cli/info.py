"""`ttt info`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttt.printable import json_text, shortened
from ttt_cli.options import Verify
from ttt_cli.terminal import show

if TYPE_CHECKING:
    from ttt.adapter_file import AdapterInfo

_KEYS, _KEY, _VALUE = 100, 80, 4000
"""How much of a header is shown, since anybody may have written it: keys of a section, letters of a key, of a value."""


_KINDS = {"ttt": "a TTT adapter", "lora": "a LoRA adapter", "ttt+lora": "an adapter of TTT and LoRA"}


def info(
    path: Annotated[str, typer.Argument(metavar="PATH", help="An adapter file, its folder, or a run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="As a JSON object.")] = False,
    verify: Verify = True,
) -> None:
    """Tell what an adapter file is and belongs to, and whether it is what was written.

    Of a run or a checkpoint, every file that would be read again is compared with its checksum.
    """
    from ttt.adapter_file import read_info

    adapter = read_info(path)
    if verify:
        from ttt.train.verification import verify_files

        verify_files(adapter, Path(path))
    facts = _facts(adapter, verified=verify)
    if as_json:
        print(json_text(facts))
    else:
        _print_facts(facts)


def _facts(adapter: AdapterInfo, *, verified: bool) -> dict[str, Any]:
    return {
        "path": str(adapter.path),
        "written_by": f"ttt {adapter.ttt_version}",
        "checksum": adapter.checksum,
        "verified": verified and adapter.checksum is not None,
        "parameters": adapter.parameters,
        "backbone": dict(adapter.backbone),
        "backbone_trained": adapter.backbone_trained is not None,
        "sites": [
            {"layer": site.layer, "name": site.name, "dim": site.dim, "num_heads": site.num_heads}
            for site in adapter.sites
        ],
        "model": _measured(adapter),
        "adapter": adapter.kind,
        "ttt": adapter.ttt.model_dump(mode="json"),
        "lora": None if adapter.lora is None else asdict(adapter.lora),
        "training": {key: value for key, value in adapter.training.items() if key != "model"},
    }


def _measured(adapter: AdapterInfo) -> list[str]:
    """What the run measured on its model (`Backbone.describe_model`)."""
    told = adapter.training.get("model")
    return [sentence for sentence in told if isinstance(sentence, str)][:_KEYS] if isinstance(told, list) else []


def _print_facts(facts: dict[str, Any]) -> None:
    show(f"{facts['path']}: {_KINDS[facts['adapter']]}, written by {facts['written_by']}")
    trained = "trained along, in backbone_model.safetensors" if facts["backbone_trained"] else "frozen"
    show(f"  parameters  {facts['parameters']:,}")
    show(f"  checksum    {_checksum_in_words(facts)}")
    show(f"  backbone    {trained}")
    _print_section("backbone", facts["backbone"])
    if facts["model"]:
        print("\nmodel, as measured when it was built")
        for sentence in facts["model"]:
            show(f"  {shortened(sentence, _VALUE)}")
    if facts["adapter"] != "lora":
        print("\nsites")
        for site in facts["sites"]:
            show(f"  {site['name']}  layer {site['layer']}, width {site['dim']}, {site['num_heads']} heads")
        _print_section("ttt", facts["ttt"])
    if facts["lora"] is not None:
        _print_section("lora", facts["lora"])
    if facts["training"]:
        _print_section("training", facts["training"])


def _checksum_in_words(facts: dict[str, Any]) -> str:
    if facts["checksum"] is None:
        return "none: written before files carried one, so damage to its values could not be told"
    return f"sha256 {facts['checksum']}, {'its content is that' if facts['verified'] else 'not compared'}"


def _print_section(name: str, content: dict[str, Any]) -> None:
    print(f"\n{name}")
    keys = {key: shortened(key, _KEY) for key in list(content)[:_KEYS]}
    width = max(map(len, keys.values()), default=0)
    for key, shown in keys.items():
        value = content[key]
        text = value if isinstance(value, str) else json_text(value, indent=None)
        show(f"  {shown:{width}}  {shortened(text, _VALUE)}")
    if len(content) > len(keys):
        show(f"  and {len(content) - len(keys):,} keys more; --json shows all")
