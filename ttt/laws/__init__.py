"""The laws of TTT layers as functions: each takes a `Bench`, returns what it measured, raises `LawBrokenError`.

`ttt.testing` runs them as a pytest suite over a backbone plugin, `ttt.probe` over one config.
"""

from ttt.laws import checks
from ttt.laws.bench import Bench, LawBrokenError

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

__all__ = ["LAWS", "Bench", "LawBrokenError"]
