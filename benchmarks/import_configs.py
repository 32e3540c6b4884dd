"""What `ttt import-config` makes of a folder of configs: a table, and if asked, some of them trained on the demo.

    python benchmarks/import_configs.py FOLDER              # a Markdown table of every .yaml below it
    python benchmarks/import_configs.py FOLDER --train 3    # ten of them, three steps each, on Moshi's demo

For each file: the keys that were mapped to one of this project's, those that are explained instead, and those that
nothing is known of; or what the file is if it is no config. `errors` are what `ttt check` finds in the result,
without files that are not on this machine.

`--train` takes configs that differ in what learns, in their layers, windows and order of data. Their data are replaced
by the demo's (speech without transcripts by the demo's recordings for LibriLight), the model by the demo's four layers:
of the layers with TTT each keeps its distance from the top, so 31 of 32 becomes 3 of 4. Parameters are float32, quick
on a CPU. All else is the config's own.
The exit code is 1 if a file could not be read, a key is not accounted for, or a run failed.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import ttt_moshi
from ttt.check import check_config, load_config
from ttt.check.importing import import_config, write_imported
from ttt.config.dumping import dump_value
from ttt.config.findings import Blame, Finding, Severity
from ttt.errors import ConfigError, TTTError, UsageError
from ttt.plugins import ImportedConfig, get_backbone
from ttt.train import train

_DEMO = Path(str(ttt_moshi.__file__)).parent / "demo" / "tasks" / "librilight"
_LAYERS, _THEIRS = 4, 32
_MODELS = ("hf_repo", "revision", "moshi_path", "mimi_path", "tokenizer_path", "config_path", "lora_path")


@dataclass(frozen=True, eq=False)
class Row:
    """One file."""

    file: str
    imported: ImportedConfig | None
    told: str
    """What the file is if it is no config; else the codes of errors in the result."""

    @property
    def mapped(self) -> int:
        """Keys of the old file that have one of this project's."""
        return len(self._kept(True))

    @property
    def explained(self) -> int:
        """Keys that have none, and a reason."""
        return len(self._kept(False)) - len(self.unknown)

    @property
    def unknown(self) -> list[str]:
        """Keys that are none of the old program's, so that nothing can be said of them."""
        keys = self.imported.keys if self.imported else ()
        return [key.old for key in keys if key.new is None and key.old and "known here" in key.note]

    def _kept(self, mapped: bool) -> set[str]:
        keys = self.imported.keys if self.imported else ()
        moved = {key.old for key in keys if key.old and key.new is not None}
        return moved if mapped else {key.old for key in keys if key.old} - moved


def read(file: Path, root: Path) -> Row:
    """Import a file and check the result."""
    name = file.relative_to(root).as_posix()
    try:
        imported = import_config(file.read_text(encoding="utf-8-sig"), file=name)
    except ConfigError as error:
        return Row(name, None, f"not read: {error.findings[0].message if error.findings else error}")
    except UsageError as error:
        return Row(name, None, error.told.removeprefix(f"{name}: "))
    if imported is None:
        return Row(name, None, "nothing that a plugin reads")
    found = check_config("new.yaml", text=write_imported(imported, origin=name)).findings
    codes = Counter(
        finding.code for finding in found if finding.severity is Severity.ERROR and not _is_missing(finding)
    )
    return Row(name, imported, ", ".join(f"{count} {code}" for code, count in sorted(codes.items())))


def _is_missing(finding: Finding) -> bool:
    """Whether a finding is about something that is not on this machine."""
    return finding.of_environment or (finding.declared is not None and finding.declared.blames is Blame.MACHINE)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The rows and their sums, as Markdown."""
    yield "| config | keys | mapped | explained | unknown | errors |"
    yield "| --- | ---: | ---: | ---: | ---: | --- |"
    configs = [row for row in rows if row.imported is not None]
    for row in configs:
        counts = (row.mapped + row.explained + len(row.unknown), row.mapped, row.explained, len(row.unknown))
        yield f"| {row.file} | {' | '.join(map(str, counts))} | {row.told} |"
    mapped, explained = (sum(getattr(row, name) for row in configs) for name in ("mapped", "explained"))
    unknown = sum(len(row.unknown) for row in configs)
    total = f"{mapped + explained + unknown:,} | {mapped:,} | {explained:,} | {unknown:,}"
    yield f"| **{len(configs)} of {len(rows)}** | {total} | |"
    for row in rows:
        if row.imported is None:
            yield f"\n- {row.file}: {row.told}"


# --- training ---


def chosen(rows: Sequence[Row], most: int) -> list[Row]:
    """Configs that differ: one by one that with most that none before it has, then those of another kind."""
    kinds = {row: _kind(row.imported.values) for row in rows if row.imported is not None and not row.told}
    seen: set[Any] = set()
    picked: list[Row] = []
    while kinds and len(picked) < most:
        row = max(kinds, key=lambda each: (len(set(enumerate(kinds[each])) - seen), kinds[each] not in seen))
        seen |= {kinds[row], *enumerate(kinds.pop(row))}
        picked.append(row)
    return picked


def _kind(values: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("adapter", "data.shuffle", "train.trainable", "ttt.persistent_states", "ttt.mlp_layers", "ttt.rope")
    audio = "audio" in str([values.get("data.format"), values.get("data.train_data")])
    context = values.get("backbone.ttt_layer_context") is not None
    long = sum(values.get("data.duration_sec", 0) >= seconds for seconds in (20, 60, 300))
    return (*(values.get(name) for name in names), audio, context, long)


def on_the_demo(row: Row, *, steps: int, run_dir: Path) -> tuple[str, list[str]]:
    """The imported config as text, and the overrides that put the demo in place of Moshi and of its data."""
    assert row.imported is not None
    values = row.imported.values
    audio = "audio" in str([values.get("data.format"), values.get("data.train_data")])
    source: Any = None
    if audio:
        source = str(_DEMO) if values.get("data.format") == "audio" else [{"path": str(_DEMO), "format": "audio"}]
    settings: dict[str, Any] = {
        "backbone.preset": "demo",
        "backbone.dim": 32,  # so that ten runs take minutes on one core
        "backbone.num_heads": 2,
        "train.param_dtype": "float32",  # with which a CPU is many times faster than with bfloat16
        **{f"backbone.{name}": None for name in _MODELS if f"backbone.{name}" in values},
        "data.train_data": source,
        "data.eval_data": None,
        "ttt.layers": demo_layers(values.get("ttt.layers", "all")),
        "train.batch_size": 1,  # the demo's dialogue is one file, of which carried states read one row
        "train.max_steps": steps,
        "train.ckpt_freq": 0,
        "train.log_freq": 1,
        "train.warmup_steps": 0,
        "train.device": "cpu",
        "train.cpu_threads": 1,
        "train.init_from": None,
        "eval.eval_freq": 0,
        "eval.max_batches": 1,
        "eval.tasks": [],
        "run_dir": str(run_dir),
    }
    return write_imported(row.imported, origin=row.file), [
        f"{key}={dump_value(value)}" for key, value in settings.items()
    ]


def demo_layers(layers: Any) -> Any:
    """Layers of the demo for those of Moshi, each as far from the top; words as they are."""
    if layers in ("all", "middle", "none"):
        return layers
    numbers = [int(part) for part in layers.split(",")] if isinstance(layers, str) else list(layers)
    return sorted({max(0, number - _THEIRS + _LAYERS) for number in numbers})


def run(row: Row, *, steps: int) -> str:
    """Train a config on the demo. Returns a row of Markdown.

    Raises:
        TTTError: it cannot be trained.
    """
    with tempfile.TemporaryDirectory() as folder:
        text, overrides = on_the_demo(row, steps=steps, run_dir=Path(folder) / "run")
        config = load_config("imported.yaml", text=text, overrides=overrides).config
        began = time.perf_counter()
        result = train(config, get_backbone("moshi"), console=Console(file=io.StringIO()))
        seconds = time.perf_counter() - began
        if result.evaluation is None:
            raise UsageError("the run was interrupted")
        what = f"{config.adapter}; layers {config.ttt.layers}; shuffle {config.data.shuffle}"
        what += f"; {config.data.duration_sec:g} s; {config.train.trainable}".replace("True", "true")
    losses = f"{result.loss:.3f} | {result.evaluation.loss:.3f} | {result.evaluation.loss_gates_closed:.3f}"
    return f"| {row.file} | {what} | {result.steps} | {losses} | {seconds:.0f} |"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="What ttt import-config makes of a folder of configs.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=0, metavar="STEPS", help="train some of them on the demo")
    parser.add_argument("--most", type=int, default=10, help="how many to train")
    options = parser.parse_args()
    files = sorted(file for ending in ("*.yaml", "*.yml") for file in options.folder.rglob(ending))
    rows = [read(file, options.folder) for file in files]
    print("\n".join(table(rows)))
    failed = any(row.unknown or row.told.startswith(("not read", "nothing")) for row in rows)
    if options.train:
        print(
            "\n| config | what | steps | loss | held out | gates closed | seconds |\n| --- | --- | ---: "
            + "| ---: " * 4
            + "|"
        )
        for row in chosen(rows, options.most):
            try:
                print(run(row, steps=options.train), flush=True)
            except TTTError as error:
                failed = True
                print(f"| {row.file} | {error} | | | | | |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
