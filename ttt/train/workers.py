"""What runs in a worker process that reads batches ahead (`ttt.train.loading`), and how such processes are started."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import pickletools
import re
import signal
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from ttt.errors import EnvironmentProblem, TTTError
from ttt.interrupt import SIGNALS
from ttt.plugins.asking import in_one_line
from ttt.seeds import seed_pass

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
"""How workers are started: never forked from a process with threads, a GPU and locked files."""
_MOST_LOOKED_AT = 64 << 20
KEY = "data.num_workers"
FEWER = f"write a smaller {KEY}, or 0, which reads in the process that trains"


def read_window(dataset: Any, window: int) -> Any:
    """One window. What its dataset draws is drawn for the window, whichever process reads it, and whenever."""
    seed_pass(0, "window", window)
    return dataset[window]


@contextlib.contextmanager
def starting(pickled: bytes) -> Iterator[None]:
    """A context for starting workers: signals wait, and the program's main module is not imported in them.

    Whatever a terminal or a batch system sends to all processes of a program is for the main one to heed: signals that
    are blocked here stay blocked in the processes that are started. And `DataLoader` neither advises a number of
    workers nor keeps its handler of dead children, which raises wherever the program is.

    Args:
        pickled: what the workers get; if it is of a class of the main module, they need that.
    """
    multiprocessing.set_forkserver_preload([__name__, *_modules_of(pickled)])
    main = sys.modules["__main__"]
    in_main_thread = threading.current_thread() is threading.main_thread()
    of_children = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if hasattr(signal, "pthread_sigmask") else None
    if b"__main__" not in pickled:
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
            yield
    finally:
        sys.modules["__main__"] = main
        if in_main_thread and of_children is not None:
            signal.signal(signal.SIGCHLD, of_children)
        if blocked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _modules_of(pickled: bytes) -> list[str]:
    """The modules that workers will import, which the server had better import once for all of them."""
    if len(pickled) > _MOST_LOOKED_AT:
        return []
    texts = {text for _, text, _ in pickletools.genops(pickled) if isinstance(text, str)}
    return sorted(text for text in texts & sys.modules.keys() if text != "__main__")


# --- in a worker ---


class Beginning:
    """What a worker does first.

    Args:
        threads: of PyTorch's operations; as many as in the process that trains, sums are rounded in the same way.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def __call__(self, number: int) -> None:
        """Prepare worker `number`."""
        torch.set_num_threads(self._threads)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that trains ends, killed or not: the server that forked it would live on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(0)


class Reads(Dataset[Any]):
    """The windows of a pass in a worker. An error of theirs is an answer, too.

    Args:
        pickled: a dataset, or its reader.
        collates: whether its windows are collated to a batch.
    """

    def __init__(self, pickled: bytes, *, collates: bool) -> None:
        self._pickled: bytes | None = pickled
        self._collates = collates
        self._source: Any = None

    def forget(self) -> None:
        """Free what was sent to the workers."""
        self._pickled = None

    def __getitems__(self, windows: Sequence[int]) -> Packed:
        """The windows, or their batch, packed to be sent."""
        try:
            return Packed.of(self._read(windows))
        except Exception as error:
            return Packed.of(Failed(error))

    def _read(self, windows: Sequence[int]) -> Any:
        if self._source is None:
            assert self._pickled is not None
            self._source = pickle.loads(self._pickled)
            self._pickled = None
        read = [read_window(self._source, window) for window in windows]
        return self._source.collate(read) if self._collates else read


class Packed:
    """An answer of a worker, its tensors in shared memory. Packed here, errors of packing are answers as well."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    @classmethod
    def of(cls, answer: Any) -> Packed:
        """Pack an answer."""
        return cls(bytes(ForkingPickler.dumps(answer)))

    def opened(self) -> Any:
        """The answer."""
        return ForkingPickler.loads(self._content)

    def pin_memory(self) -> Pinned:
        """The answer in memory from which a GPU copies by itself; called in a thread of its own."""
        try:
            opened = self.opened()
            return Pinned(opened if isinstance(opened, Failed) else pin_memory(opened))
        except Exception as error:
            return Pinned(Failed(error))


class Pinned:
    """An answer that is opened already."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def opened(self) -> Any:
        """The answer."""
        return self._answer


class Failed:
    """An error in a worker, to be raised where the batch is asked for."""

    def __init__(self, error: Exception) -> None:
        try:
            pickle.loads(pickle.dumps(error))
            self._error: Exception = error
        except Exception:  # an error that cannot be sent
            self._error = RuntimeError(in_one_line(error))
        self._trace = "".join(traceback.format_exception(error))

    def error(self) -> Exception:
        """The error as it would have been without workers."""
        if isinstance(self._error, TTTError):
            return self._error
        if re.search("shared memory|file </torch_", str(self._error)):  # as PyTorch tells of it
            return EnvironmentProblem(
                f"no shared memory (/dev/shm) for a batch of a worker process: {in_one_line(self._error)}",
                key=KEY,
                fix=f"{FEWER}; or give the machine or container more, as docker run --shm-size=8g does",
            )
        self._error.__cause__ = _RemoteError(self._trace)
        return self._error


class _RemoteError(Exception):
    """Shows the traceback of a worker below that of its error."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def as_it_is(answer: Any) -> Any:
    """The `collate_fn` of answers, which hold batches already."""
    return answer
