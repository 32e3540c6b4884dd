"""diffusers without bitsandbytes; to be imported before anything of diffusers.

diffusers imports bitsandbytes wherever it is installed, which moshi asks for, to be ready for quantised weights. Those
are refused here (`ttt_videodit.variants`). The import takes a third of the time of diffusers' own, asks the hub for a
kernel if the package `kernels` is installed, and warns of it on processors with AVX512-BF16 if it is not, before
the first word of ours. diffusers looks once, when it is imported; bitsandbytes itself stays as it is for all others.
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
