"""Every law on every architecture of language models that `docs/transformers.md` names.

    python benchmarks/architectures.py            # three minutes
    python benchmarks/architectures.py llama gpt2

Small random models of `transformers`, made on the spot. The suite runs all laws on one architecture, and what differs
between them on eighteen (`tests/test_hf_families.py`); this runs all on all, for both inner models. Results go to
`benchmarks/results/architectures.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ttt.errors import TTTError
from ttt.files import write_text
from ttt.laws import LAWS, Bench
from ttt.plugins import get_backbone
from ttt.testing.suite import INNER_MODELS

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 5},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "olmo2": {},
    "gpt_neox": {},
    "gpt2": {},
}
"""What each needs beside its sizes; GPT-2's are translated by `ttt.hf`."""
RESULTS = Path(__file__).parent / "results" / "architectures.json"


def held(model_type: str, settings: dict[str, Any]) -> dict[str, str]:
    """What each law says of one architecture: `holds`, or why not; by law and inner model."""
    plugin = get_backbone("transformers")
    tiny: Any = plugin.tiny()
    config = {**tiny.config, "model_type": model_type, **settings}
    options = tiny.model_copy(update={"config": config})
    said = {}
    for inner, ttt in INNER_MODELS.items():
        for number, law in LAWS.items():
            try:
                law(Bench(plugin, options=options, ttt=dict(ttt)))
                said[f"law {number}, {inner}"] = "holds"
            except TTTError as error:
                said[f"law {number}, {inner}"] = str(error)
    return said


def main(arguments: list[str] | None = None) -> int:
    """Run the laws, print a line for each architecture, write the results; returns 1 if one is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help="of those above; all if none")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    unknown = sorted(set(chosen.architectures) - set(ARCHITECTURES))
    if unknown:
        parser.error(f"{', '.join(unknown)}: not among {', '.join(ARCHITECTURES)}")
    found: dict[str, dict[str, str]] = {}
    for name in chosen.architectures or ARCHITECTURES:
        started = time.monotonic()
        found[name] = said = held(name, ARCHITECTURES[name])
        broken = {law: why for law, why in said.items() if why != "holds"}
        print(
            f"{name:12} {len(said) - len(broken)} of {len(said)} hold, {time.monotonic() - started:.0f} s", flush=True
        )
        for law, why in broken.items():
            print(f"  {law}: {why}", flush=True)
    report = {"torch": torch.__version__, "transformers": version("transformers"), "laws": found}
    write_text(chosen.out, json.dumps(report, indent=1) + "\n")
    return any(why != "holds" for said in found.values() for why in said.values())


if __name__ == "__main__":
    sys.exit(main())
