"""The laws of TTT layers as functions: each takes a `Bench`, returns what it measured, raises `LawBrokenError`.

`ttt.testing` runs them as a pytest suite over a backbone plugin, `ttt.check.probe` over one config. `CHECKS` check the
plugin's other methods; they raise `MethodBrokenError`.
"""

from ttt.laws import checks, lora, plugin, run
from ttt.laws.bench import Bench, LawBrokenError
from ttt.laws.plugin import MethodBrokenError

LAWS = {
    1: checks.purity,
    2: checks.remat_invariance,
    3: checks.causality,
    4: checks.chunk_invariance,
    5: checks.stream_independence,
    6: checks.identity,
    7: checks.reversibility,
    8: checks.no_dead_field,
    9: checks.self_describing_files,
    10: checks.evidence,
}
"""The laws by number, each with settings that suit a small model."""

CHECKS = {
    "imports": plugin.module_imports_no_torch,
    "presets": plugin.presets_load,
    "facts": plugin.facts_agree,
    "model": plugin.model_and_batches,
    "dataset": run.dataset_keeps_its_protocol,
    "loss": run.loss_trains,
    "run": run.demo_trains,
    "lora": lora.lora_acts,
}
"""The checks of a plugin's other methods by name."""

__all__ = ["CHECKS", "LAWS", "Bench", "LawBrokenError", "MethodBrokenError"]
