"""Imports diffusers without bitsandbytes; import this module before any of diffusers.

diffusers imports bitsandbytes, which moshi requires, if it is installed, to support quantised weights; this project
refuses those (`ttt_videodit.variants`). The import of bitsandbytes takes a third of the time of diffusers' own. If the
package `kernels` is installed, it asks the hub for a kernel; if not, it prints a warning on processors with
AVX512-BF16. diffusers looks for bitsandbytes once, at its own import; other users of bitsandbytes are not affected. One
of them is PEFT: where it is installed, diffusers imports it, and it imports bitsandbytes.
"""

from __future__ import annotations

import sys
from typing import Any, Final, cast

_KEPT_OUT: Final = "bitsandbytes"


def _import_alone() -> None:
    modules = cast("dict[str, Any]", sys.modules)
    if _KEPT_OUT in modules or "diffusers" in modules:
        return
    modules[_KEPT_OUT] = None  # how Python's import system marks a module that cannot be imported
    try:
        import diffusers  # noqa: F401
    finally:
        del modules[_KEPT_OUT]


_import_alone()
