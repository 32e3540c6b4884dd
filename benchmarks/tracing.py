"""A program's system calls, seen and altered from outside: what kills it, or lets a call fail, at a place of choice.

`Tracer.run` starts a function in a forked process (which may `exec` a program) and hands each of its system calls, of
every thread and child, to a callback before it happens. The callback may end the process, send it a signal, or name
the error that the call shall fail with. A filter in the kernel (seccomp) stops only the calls asked for, so all others
run at full speed. Linux on x86-64 and ARM64; no compiler and no other program is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass

_TRACEME, _CONT, _SETOPTIONS, _SYSCALL_INFO = 0, 7, 0x4200, 0x420E
_POKEUSER, _GETREGSET, _SETREGSET = 6, 0x4204, 0x4205
_PRSTATUS, _ARM_SYSTEM_CALL = 1, 0x404
_FORK, _VFORK, _CLONE, _EXEC, _SECCOMP = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 7
_EXITKILL = 1 << 20
_EVENT_SECCOMP = 7
_WALL = 0x40000000
_ALLOW, _TRACE = 0x7FFF0000, 0x7FF00000

_TABLE: dict[str, tuple[int, int | None]] = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "mmap": (9, 222), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65),
    "writev": (20, 66), "sendfile": (40, 71), "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83),
    "truncate": (76, 45), "ftruncate": (77, 46), "getdents64": (217, 61), "rename": (82, None), "mkdir": (83, None),
    "rmdir": (84, None), "creat": (85, None), "link": (86, None), "unlink": (87, None), "symlink": (88, None),
    "readlink": (89, None), "chmod": (90, None), "fchmod": (91, 52), "chown": (92, None), "fchown": (93, 55),
    "openat": (257, 56), "mkdirat": (258, 34), "fchownat": (260, 54), "newfstatat": (262, 79), "unlinkat": (263, 35),
    "renameat": (264, 38), "linkat": (265, 37), "symlinkat": (266, 36), "readlinkat": (267, 78),
    "fchmodat": (268, 53), "faccessat": (269, 48), "utimensat": (280, 88), "fallocate": (285, 47),
    "pwritev": (296, 70), "preadv": (295, 69), "renameat2": (316, 276), "statx": (332, 291),
    "copy_file_range": (326, 285), "openat2": (437, 437), "faccessat2": (439, 439), "fchmodat2": (452, 452),
    "access": (21, None),
}  # fmt: skip
"""Number of each call that can be named here, on x86-64 and on ARM64."""
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}.get(platform.machine(), 0)
_COLUMN = int(platform.machine() == "aarch64")
NUMBERS = {name: number for name, numbers in _TABLE.items() if (number := numbers[_COLUMN]) is not None}
"""Number of each on this machine."""

_BY_NUMBER = {number: name for name, number in NUMBERS.items()}

_BY_PATH = {
    "open": 0, "stat": 0, "lstat": 0, "truncate": 0, "rename": 0, "mkdir": 0, "rmdir": 0, "creat": 0, "link": 1,
    "unlink": 0, "symlink": 1, "readlink": 0, "chmod": 0, "chown": 0, "access": 0,
}  # fmt: skip
"""Which argument is the path that a call is about."""
_BY_FOLDER_AND_PATH = {
    "openat": 0, "openat2": 0, "mkdirat": 0, "fchownat": 0, "newfstatat": 0, "unlinkat": 0, "renameat": 0,
    "renameat2": 0, "linkat": 2, "symlinkat": 1, "readlinkat": 0, "fchmodat": 0, "fchmodat2": 0, "faccessat": 0,
    "faccessat2": 0, "utimensat": 0, "statx": 0,
}  # fmt: skip
"""Which argument is the open folder that the path in the next one begins at."""
_BY_FILE = {
    "read": 0, "write": 0, "close": 0, "fstat": 0, "mmap": 4, "pread64": 0, "pwrite64": 0, "readv": 0, "writev": 0,
    "sendfile": 0, "flock": 0, "fsync": 0, "fdatasync": 0, "ftruncate": 0, "getdents64": 0, "fchmod": 0, "fchown": 0,
    "fallocate": 0, "pwritev": 0, "preadv": 0, "copy_file_range": 2,
}  # fmt: skip
"""Which argument is the open file that a call is about."""

CHANGING = frozenset({
    "write", "pwrite64", "writev", "pwritev", "sendfile", "fsync", "fdatasync", "truncate", "ftruncate", "rename",
    "renameat", "renameat2", "mkdir", "mkdirat", "rmdir", "creat", "link", "linkat", "unlink", "unlinkat", "symlink",
    "symlinkat", "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "fchownat", "utimensat", "fallocate",
    "copy_file_range", "open", "openat", "openat2",
})  # fmt: skip
"""Calls that may change a file; an `open` only if it says so (`Call.changes`)."""
READING = frozenset({
    "open", "openat", "openat2", "read", "pread64", "readv", "preadv", "stat", "newfstatat", "statx", "fstat",
    "getdents64",
})  # fmt: skip
"""Calls that look at a file."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction)))


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _ptrace(request: int, pid: int, address: object = None, data: object = None) -> int:
    result: int = _libc.ptrace(request, pid, address, data)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


@dataclass
class Call:
    """A system call that is about to happen."""

    process: int
    """The process."""
    thread: int
    number: int
    arguments: tuple[int, ...]

    @property
    def name(self) -> str:
        """`openat`, say; the number if it has no name here."""
        return _BY_NUMBER.get(self.number, str(self.number))

    @functools.cached_property
    def path(self) -> str | None:
        """The file that it is about, as an absolute path; None if there is none."""
        name = self.name
        if name in _BY_FILE:
            return self._link(f"fd/{ctypes.c_int(self.arguments[_BY_FILE[name]]).value}")
        if name in _BY_PATH:
            return self._absolute("cwd", self._text(self.arguments[_BY_PATH[name]]))
        if name in _BY_FOLDER_AND_PATH:
            first = _BY_FOLDER_AND_PATH[name]
            folder = ctypes.c_int(self.arguments[first]).value
            text = self._text(self.arguments[first + 1])
            return self._absolute("cwd" if folder < 0 else f"fd/{folder}", text)
        return None

    @property
    def changes(self) -> bool:
        """Whether it may change a file."""
        if self.name in ("open", "openat"):
            flags = self.arguments[1 if self.name == "open" else 2]
            return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        return self.name in CHANGING

    def _link(self, name: str) -> str | None:
        try:
            return os.readlink(f"/proc/{self.thread}/{name}")
        except OSError:
            return None

    def _text(self, address: int) -> str:
        try:
            with open(f"/proc/{self.thread}/mem", "rb", buffering=0) as memory:
                return os.pread(memory.fileno(), 4096, address).split(b"\0", 1)[0].decode(errors="replace")
        except (OSError, OverflowError):
            return ""

    def _absolute(self, start: str, text: str) -> str | None:
        base = self._link(start)
        return text if base is None else os.path.normpath(os.path.join(base, text))


def obstacle() -> str | None:
    """Why nothing can be traced here; None if it can."""
    if not sys.platform.startswith("linux") or not _AUDIT:
        return f"system calls are traced on Linux (x86-64 and ARM64) only, not on {sys.platform} {platform.machine()}"
    seen: list[str] = []
    try:
        status = Tracer(lambda call: seen.append(call.name), names=["fsync"]).run(lambda: os._exit(_tries_fsync()))
    except OSError as error:
        return f"this system lets no process trace its own child: {error}"
    return None if status == 0 and seen == ["fsync"] else "this system lets no process trace its own child"


def _tries_fsync() -> int:
    _libc.fsync(-1)
    return 0


class Tracer:
    """Starts one process and watches it until it ends.

    Args:
        on_call: is asked before each call; returns a number of `errno` that the call shall fail with instead of
            happening, or None.
        names: which calls, by name; None for every one.
    """

    def __init__(self, on_call: Callable[[Call], int | None], *, names: Collection[str] | None = None) -> None:
        self._on_call = on_call
        self._numbers = None if names is None else sorted(NUMBERS[name] for name in names if name in NUMBERS)
        self.process = 0

    def run(self, start: Callable[[], None]) -> int:
        """Run `start` in a new process, which it ends or turns into a program; returns as `waitstatus_to_exitcode`."""
        pid = os.fork()
        if pid == 0:
            try:
                self._follow()
                start()
            finally:
                os._exit(127)
        self.process = pid
        os.waitpid(pid, 0)
        _ptrace(_SETOPTIONS, pid, None, _FORK | _VFORK | _CLONE | _EXEC | _SECCOMP | _EXITKILL)
        _ptrace(_CONT, pid)
        try:
            return self._watch(pid)
        except BaseException:
            self.kill()
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.waitpid(-1, _WALL)
            raise

    def kill(self) -> None:
        """End the process as `kill -9` does."""
        self.send(signal.SIGKILL)

    def send(self, number: int) -> None:
        """Send the process a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, number)

    def _follow(self) -> None:
        """In the new process: be traced, and stop at the calls asked for."""
        _ptrace(_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        code = [_Instruction(0x20, 0, 0, 4), _Instruction(0x15, 1, 0, _AUDIT), _Instruction(0x06, 0, 0, _ALLOW)]
        if self._numbers is not None:
            code.append(_Instruction(0x20, 0, 0, 0))
            count = len(self._numbers)
            code += [_Instruction(0x15, count - index, 0, number) for index, number in enumerate(self._numbers)]
            code.append(_Instruction(0x06, 0, 0, _ALLOW))
        code.append(_Instruction(0x06, 0, 0, _TRACE))
        program = _Program(len(code), (_Instruction * len(code))(*code))
        _libc.prctl(38, 1, 0, 0, 0)  # no new privileges, as a filter asks for
        if _libc.prctl(22, 2, ctypes.byref(program), 0, 0):
            os._exit(126)

    def _watch(self, first: int) -> int:
        known = {first}
        while True:
            thread, status = os.waitpid(-1, _WALL)
            if not os.WIFSTOPPED(status):
                known.discard(thread)
                if thread == first:
                    self._reap(known)
                    return os.waitstatus_to_exitcode(status)
                continue
            stopped, event = os.WSTOPSIG(status), status >> 16
            passed_on = 0
            try:
                if event == _EVENT_SECCOMP:
                    self._at_call(thread)
                elif event == 0 and not (thread not in known and stopped == signal.SIGSTOP):
                    passed_on = 0 if stopped == signal.SIGTRAP else stopped
                known.add(thread)
                _ptrace(_CONT, thread, None, passed_on)
            except ProcessLookupError:  # killed in the meantime; its end is waited for
                continue

    def _reap(self, known: Collection[int]) -> None:
        """End what the process left behind."""
        while True:
            try:
                thread, status = os.waitpid(-1, _WALL | os.WNOHANG)
            except ChildProcessError:
                return
            if thread == 0:
                for left in known:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(left, signal.SIGKILL)
                os.waitpid(-1, _WALL)
            elif os.WIFSTOPPED(status):
                os.kill(thread, signal.SIGKILL)

    def _at_call(self, thread: int) -> None:
        buffer = ctypes.create_string_buffer(88)
        _ptrace(_SYSCALL_INFO, thread, len(buffer), ctypes.addressof(buffer))
        number, *arguments = struct.unpack_from("<7Q", buffer.raw, 24)
        error = self._on_call(Call(self.process, thread, number, tuple(arguments)))
        if error:
            _fail(thread, error)


def _fail(thread: int, error: int) -> None:
    """Have the call not happen and return `-error`."""
    if platform.machine() == "x86_64":
        _ptrace(_POKEUSER, thread, 15 * 8, ctypes.c_void_p(-1 & (1 << 64) - 1))
        _ptrace(_POKEUSER, thread, 10 * 8, ctypes.c_void_p(-error & (1 << 64) - 1))
        return
    nothing = ctypes.c_int(-1)
    vector = _Vector(ctypes.addressof(nothing), ctypes.sizeof(nothing))
    _ptrace(_SETREGSET, thread, _ARM_SYSTEM_CALL, ctypes.addressof(vector))
    registers = (ctypes.c_uint64 * 34)()
    vector = _Vector(ctypes.addressof(registers), ctypes.sizeof(registers))
    _ptrace(_GETREGSET, thread, _PRSTATUS, ctypes.addressof(vector))
    registers[0] = -error & (1 << 64) - 1
    _ptrace(_SETREGSET, thread, _PRSTATUS, ctypes.addressof(vector))
