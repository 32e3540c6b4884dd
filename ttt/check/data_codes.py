"""The codes of `ttt check --data`, which reads all data as a run would. Imports no torch."""

from __future__ import annotations

from functools import partial

from ttt.config.findings import Blame, Code, Family, Severity

_code = partial(Code, family=Family.DATA, of_training=True, blames=Blame.MACHINE, home=__name__)
TTT521 = _code("TTT521", "data that cannot be read to their end", Severity.ERROR)
TTT522 = _code("TTT522", "data that are hardly what was meant", Severity.WARNING)
