"""A dataset in files: each holds a number, or the word for what goes wrong when a worker process reads it."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Sequence
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt.errors import EnvironmentProblem


class Plugin:
    """Whose dataset it is."""

    name = "numbers"


class NumberFiles:
    """Windows `[2]`: the number in a file, and a random one."""

    notice = None

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.files = [range(count)]

    def __len__(self) -> int:
        return len(self.files[0])

    def __getitem__(self, index: int) -> Tensor:
        file = self.folder / str(index)
        if not file.exists():
            raise EnvironmentProblem(f"{file}: gone", key="data.train_data", fix="bring it back")
        word = file.read_text()
        if word == "full":
            raise MemoryError("no more")
        if word == "bug":
            return torch.tensor([{}["key"]])
        if word == "kill" and parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "huge":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # of this process; shared memory is a file, too
            return torch.zeros(1000)
        if word == "unsendable":
            return threading.Lock()  # type: ignore[return-value]
        return torch.tensor([float(word), float(torch.rand(()))])

    def collate(self, samples: Sequence[Any]) -> Any:
        if not all(isinstance(sample, Tensor) and len(sample) == 2 for sample in samples):
            return list(samples)
        return {"numbers": torch.stack(list(samples)), "process": os.getpid()}

    def describe(self, index: int) -> str:
        return f"file {index}"


class Halved(NumberFiles):
    """The same read in two stages; what the second one makes is kept."""

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(folder, count)
        self.device = threading.Lock()
        """Cannot go to another process, like what is on a GPU."""
        self.made: dict[int, Tensor] = {}

    @property
    def reader(self) -> NumberFiles:
        return NumberFiles(self.folder, len(self))

    def kept(self, index: int) -> bool:
        return index in self.made

    def finish(self, index: int, read: Tensor) -> Tensor:
        with self.device:
            self.made[index] = read / 2
        return self.made[index]

    def __getitem__(self, index: int) -> Tensor:
        return self.made[index] if index in self.made else self.finish(index, super().__getitem__(index))
