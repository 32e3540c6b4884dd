"""Windows of a text: T bytes, and the byte that follows each of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ttt.errors import EnvironmentProblem
from ttt.reading import read_file, unreadable

DEMO = Path(__file__).parent / "demo.txt"
LARGEST = 1 << 30
"""The size in bytes of the largest text that is read."""


class TextWindows:
    """The windows of a text file, in order; `ttt.plugins.WindowDataset` describes the methods.

    Raises:
        ttt.errors.EnvironmentProblem: the file cannot be read, or is too short for a window.
    """

    notice = None

    def __init__(self, file: Path, length: int) -> None:
        self._file, self._length = file, length
        try:
            self._text = read_file(file, limit=LARGEST)
        except OSError as error:
            raise EnvironmentProblem(f"{file}: cannot be read: {unreadable(error)}") from None
        self._count = (len(self._text) - 1) // length
        if self._count < 1:
            raise EnvironmentProblem(
                f"{file}: has {len(self._text)} bytes, and a window takes {length + 1}; name a longer text, or write a "
                f"smaller data.window_bytes"
            )
        self.files = [range(self._count)]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        start = index * self._length
        return torch.tensor(list(self._text[start : start + self._length + 1]))

    def collate(self, samples: Sequence[Tensor]) -> Tensor:
        """Collate windows to a batch, `[B, T+1]`."""
        return torch.stack(list(samples))

    def describe(self, index: int) -> str:
        """The window in words, such as `book.txt, bytes 64-128`."""
        return f"{self._file.name}, bytes {index * self._length}-{(index + 1) * self._length}"
