"""Processes of a test's own that need not import anything: they are forked from one that has.

A program that trains spends seconds on imports. `start` runs a function in a process that is otherwise one like any
other: it has its own streams, hears signals, can be killed, and has an exit code. All are forked from a nursery, which
`begin` forks before the first test. Tests themselves cannot be forked: by then a backward pass may have started threads
that a fork would not have.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

_NUMBER = struct.Struct("<q")
_SOON_NEEDED = ("torch._dynamo", "torch.utils.tensorboard", "matplotlib.backends.backend_agg")
"""What every run imports while it runs."""

_nursery: socket.socket | None = None
_newest: Forked | None = None


def begin() -> None:
    """Fork the nursery, with everything that is imported by now; it ends when the tests do."""
    global _nursery
    ours, theirs = socket.socketpair()
    with warnings.catch_warnings():  # newer Pythons warn of forks beside threads; those of xdist hold no lock for long
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        if os.fork():  # no child of ours, which would be among those that a test waits for
            os._exit(0)
        ours.close()
        _guard(lambda: _serve(theirs))
    os.waitpid(process, 0)
    theirs.close()
    _nursery = ours


def end() -> None:
    """End the nursery."""
    if _nursery is not None:
        _nursery.close()


class Forked:
    """A process that runs a function, to be used as a `subprocess.Popen` with pipes for its output as text."""

    def __init__(self, pid: int, nursery: socket.socket, stdout: TextIO, stderr: TextIO) -> None:
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | None = None
        self._nursery = nursery

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait(60)
        self.stdout.close()
        self.stderr.close()

    def poll(self) -> int | None:
        """Its exit code, the negative number of the signal that ended it; None while it runs."""
        with contextlib.suppress(TimeoutError):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Its exit code, once it has ended; TimeoutError if it does not in so many seconds."""
        if self.returncode is None:
            if not select.select([self._nursery], [], [], timeout)[0]:
                raise TimeoutError(f"process {self.pid} runs on after {timeout:g} s")
            self.returncode = _receive(self._nursery)
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it has written, little enough for a pipe to hold, once it has ended; nothing can be read afterwards."""
        self.wait(timeout)
        with self.stdout, self.stderr:
            return self.stdout.read(), self.stderr.read()

    def send_signal(self, number: int) -> None:
        """Send it a signal if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self.send_signal(signal.SIGKILL)


def start(function: Callable[..., int | None], *arguments: Any) -> Forked:
    """Run a function of a module in a process of its own, here and in this environment; it returns the exit code.

    There is one such process at a time: one that is still there, because its test has failed, is killed.
    """
    global _newest
    assert _nursery is not None, "conftest.py begins"
    if _newest is not None:
        _newest.kill()
        _newest.wait(60)
    (out, their_out), (err, their_err) = os.pipe(), os.pipe()
    socket.send_fds(_nursery, [b"."], [their_out, their_err])
    os.close(their_out)
    os.close(their_err)
    request = pickle.dumps((os.getcwd(), dict(os.environ), function, arguments))
    _nursery.sendall(_NUMBER.pack(len(request)) + request)
    _newest = Forked(_receive(_nursery), _nursery, os.fdopen(out, encoding="utf-8"), os.fdopen(err, encoding="utf-8"))
    return _newest


def end_with(parent: int) -> None:
    """Let this process be killed as soon as its parent ends, where the system can do so (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, in linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before
            os._exit(1)


# --- in the nursery ---


def _serve(tests: socket.socket) -> NoReturn:
    """Fork a process for each request, and say its number, then its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the tests
    while True:
        told, streams, _, _ = socket.recv_fds(tests, 1, 2)
        if not told:
            os._exit(0)
        request = _exactly(tests, _receive(tests))
        for name in _SOON_NEEDED:
            importlib.import_module(name)
        nursery, process = os.getpid(), os.fork()
        if process == 0:
            end_with(nursery)
            tests.close()
            _guard(lambda request=request, streams=streams: _run(request, streams))
        for stream in streams:
            os.close(stream)
        tests.sendall(_NUMBER.pack(process))
        _end_with_tests(tests, process)
        _, status = os.waitpid(process, 0)
        tests.sendall(_NUMBER.pack(os.waitstatus_to_exitcode(status)))


def _end_with_tests(tests: socket.socket, process: int) -> None:
    """Wait for the end of a process; kill it if the tests end first, as by `kill -9`."""
    if not hasattr(os, "pidfd_open"):  # no Linux
        return
    ended = os.pidfd_open(process)
    try:
        if ended not in select.select([ended, tests], [], [])[0]:
            os.kill(process, signal.SIGKILL)
            os._exit(0)
    finally:
        os.close(ended)


def _run(request: bytes, streams: list[int]) -> NoReturn:
    """Be the process that was asked for."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0)
    sys.stdout, sys.stderr = os.fdopen(1, "w", encoding="utf-8"), os.fdopen(2, "w", 1, encoding="utf-8")
    folder, environment, function, arguments = pickle.loads(request)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = function(*arguments)
    sys.stdout.flush()
    os._exit(code or 0)


def _guard(function: Callable[[], NoReturn]) -> NoReturn:
    """Run it and nothing of what this process was forked from, whatever it raises."""
    try:
        function()
    except BaseException:
        traceback.print_exc()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
    os._exit(1)


def _receive(channel: socket.socket) -> int:
    number: int = _NUMBER.unpack(_exactly(channel, _NUMBER.size))[0]
    return number


def _exactly(channel: socket.socket, length: int) -> bytes:
    content = bytearray()
    while len(content) < length:
        piece = channel.recv(length - len(content))
        if not piece:
            raise EOFError("the other side is gone")
        content += piece
    return bytes(content)
