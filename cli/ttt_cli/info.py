"""`ttt info`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttt_cli.options import Verify

if TYPE_CHECKING:
    from ttt.adapter_file import AdapterInfo


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
        from ttt.train.rundir import verify_files

        verify_files(adapter, Path(path))
    facts = _facts(adapter, verified=verify)
    if as_json:
        import json

        print(json.dumps(facts, indent=2, ensure_ascii=False))
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
        "ttt": adapter.ttt.model_dump(mode="json"),
        "training": dict(adapter.training),
    }


def _print_facts(facts: dict[str, Any]) -> None:
    print(f"{facts['path']}: a TTT adapter, written by {facts['written_by']}")
    trained = "trained along, in backbone_model.safetensors" if facts["backbone_trained"] else "frozen"
    print(f"  parameters  {facts['parameters']:,}")
    print(f"  checksum    {_checksum_in_words(facts)}")
    print(f"  backbone    {trained}")
    _print_section("backbone", facts["backbone"])
    print("\nsites")
    for site in facts["sites"]:
        print(f"  {site['name']}  layer {site['layer']}, width {site['dim']}, {site['num_heads']} heads")
    _print_section("ttt", facts["ttt"])
    if facts["training"]:
        _print_section("training", facts["training"])


def _checksum_in_words(facts: dict[str, Any]) -> str:
    if facts["checksum"] is None:
        return "none: written before files carried one, so damage to its values could not be told"
    return f"sha256 {facts['checksum']}, {'its content is that' if facts['verified'] else 'not compared'}"


def _print_section(name: str, content: dict[str, Any]) -> None:
    import json

    print(f"\n{name}")
    width = max(map(len, content), default=0)
    for key, value in content.items():
        print(f"  {key:{width}}  {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
