"""The codes of `ttt check --probe`, one for each law that it proves. Imports no torch."""

from __future__ import annotations

from functools import partial

from ttt.config.findings import Blame, Code, Family, Severity

_code = partial(Code, severity=Severity.ERROR, blames=Blame.PLUGIN, family=Family.LAWS, home=__name__)
LAWS = {
    1: _code("TTT901", "a forward pass that writes"),
    2: _code("TTT902", "gradients that depend on rematerialisation"),
    3: _code("TTT903", "the future reaches the past"),
    4: _code("TTT904", "a stream in pieces is not the whole"),
    5: _code("TTT905", "rows of a batch that see each other"),
    6: _code("TTT906", "a closed gate that is not the plain backbone"),
    10: _code("TTT910", "a TTT layer that does nothing"),
}
"""The codes by the number of their law."""
