"""Pictures that are made and written, but not drawn: drawing takes longer than the small runs of the tests."""

from __future__ import annotations

from typing import BinaryIO

import pytest

AGG = "matplotlib.backends.backend_agg.FigureCanvasAgg.print_png"


def print_png(canvas: object, file: BinaryIO) -> None:
    """Write what every PNG file begins with."""
    file.write(b"\x89PNG\r\n\x1a\n")


def undraw(patch: pytest.MonkeyPatch) -> None:
    """Draw nothing until the patch is undone."""
    patch.setattr(AGG, print_png)
