"""What this machine has, found without torch: memory, compilers, writable folders, how many processes were launched."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from ttt.ops.constants import VARIABLE, Precision
from ttt.reading import other_kind

_NVIDIA = Path("/proc/driver/nvidia/version")


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without doing so."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # something of its name is in the way
        return False


def device_memory(device: str) -> int | None:
    """Memory in bytes of the device that `train.device` names on this machine; None if it is not known.

    For `auto` without a GPU it is None, not the CPU's memory: such a config will most likely run on another machine.
    """
    if device == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):  # no POSIX system
            return None
    return _cuda_memory() if _NVIDIA.exists() else None


def _cuda_memory() -> int | None:
    """Memory in bytes of the first GPU that CUDA would see, from the driver's library; needs no torch and no process.

    Source: NVIDIA's NVML API reference, `nvmlDeviceGetMemoryInfo`.
    """
    import ctypes

    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if not first.isdecimal():  # no device, or a device given by name
        return None
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        if library.nvmlInit_v2() != 0:
            return None
        try:
            device, sizes = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # total, free, used
            if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(first)), ctypes.byref(device)) != 0:
                return None
            return int(sizes[0]) if library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(sizes)) == 0 else None
        finally:
            library.nvmlShutdown()
    except (OSError, AttributeError):  # no such library, or it lacks the functions
        return None


class Obstacle(NamedTuple):
    """Why this machine cannot run what a config asks for."""

    problem: str
    """What is wrong."""
    fix: str
    """What to do about it."""


def missing_for_8bit(device: str) -> Obstacle | None:
    """What AdamW with moments of 8 bits lacks on `cpu` or `cuda`; None if nothing is known to be, as for `auto`.

    Source: bitsandbytes' `functional.py`, `optimizer_update_8bit_blockwise`, which takes tensors on a GPU alone.
    """
    if not is_installed("bitsandbytes"):
        return Obstacle(
            "optimizer: adamw_8bit is that of bitsandbytes, and there is no package of that name here",
            "pip install bitsandbytes, or write optimizer: adamw",
        )
    if device == "cpu":
        return Obstacle(
            "optimizer: adamw_8bit runs on a GPU alone, and the run is on the CPU",
            "write device: cuda, or optimizer: adamw",
        )
    return None


def wrong_implementation() -> Obstacle | None:
    """The obstacle if `TTT_OPS` forces an implementation of the scan that cannot be compiled whole."""
    forced = os.environ.get(VARIABLE)
    if forced not in ("generic", "reference"):
        return None
    return Obstacle(
        f"{VARIABLE}={forced} asks for an implementation of the scan that torch.compile cannot take whole",
        f"unset {VARIABLE}, or write compile: false",
    )


_COMPILES = 2, 11
"""The oldest PyTorch whose compiler takes a TTT layer whole; tried were 2.9, 2.10, 2.11 and 2.13."""


def missing_compiler(device: str) -> Obstacle | None:
    """What is missing to compile for a device, be it a newer PyTorch; None if nothing is known to be.

    Source: PyTorch's `torch/_inductor/config.py`, `cpp.cxx`; Triton's `triton/runtime/build.py`, which compiles the C
    code that launches its kernels.
    """
    found = importlib.metadata.version("torch")
    if tuple(int(part) for part in found.split(".")[:2]) < _COMPILES:
        oldest = ".".join(map(str, _COMPILES))
        return Obstacle(
            f"torch.compile of PyTorch {found} cannot take a TTT layer whole",
            f"upgrade torch to {oldest} or newer, or write compile: false",
        )
    if device == "cpu":
        program = os.environ.get("CXX") or _CXX.get(sys.platform, "g++")
        if shutil.which(program) is not None:
            return None
        return Obstacle(
            f"torch.compile makes C++ for a CPU, and there is no {program}",
            "install a C++ compiler (g++ on Linux), name one in the variable CXX, or write compile: false",
        )
    if device == "cuda":
        if importlib.util.find_spec("triton") is None:
            return Obstacle(
                "torch.compile makes Triton kernels for a GPU, and triton is not installed",
                "install triton, or write compile: false",
            )
        programs = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
        if sys.platform == "linux" and not any(map(shutil.which, programs)):
            return Obstacle(
                f"Triton needs a C compiler, and there is no {' or '.join(programs)}",
                "install gcc, name a C compiler in the variable CC, or write compile: false",
            )
    return None


def exact_implementation(precision: Precision) -> Obstacle | None:
    """The obstacle if `TTT_OPS` forces the implementation that rounds no operands, and some are to be rounded."""
    if precision == "ieee" or os.environ.get(VARIABLE) != "reference":
        return None
    return Obstacle(
        f"{VARIABLE}=reference computes from the definition and rounds no operands",
        f"unset {VARIABLE}, or write ttt_precision: ieee",
    )


def missing_precision(precision: Precision, device: str, capability: tuple[int, int] | None = None) -> Obstacle | None:
    """What keeps a device from multiplying in a precision; None if nothing does, as far as is known.

    Args:
        precision: of the inner products.
        device: `cpu`, `cuda`, …
        capability: of the GPU, if it is known.

    Source: NVIDIA's A100 whitepaper, which introduces TF32 with compute capability 8.0.
    """
    if precision != "tf32" or (device == "cuda" and (capability is None or capability >= (8, 0))):
        return None
    where = "this GPU has " + ".".join(map(str, capability)) if capability else f"the run is on {device}"
    return Obstacle(
        f"TF32 needs an NVIDIA GPU of compute capability 8.0 or later, and {where}",
        "write ttt_precision: ieee, or bf16, which rounds on any device",
    )


_CXX = {"darwin": "clang++", "win32": "cl"}
"""The compiler that PyTorch looks for if CXX is not set, by system; g++ on the others."""


_LEVELS = 100
_BYTES = 3_800
"""The most bytes of a run's path. Linux takes 4,096, and the paths of a checkpoint's unfinished files are up to 200
longer."""


def why_unusable(path: str) -> str | None:
    """Say why a folder cannot be made or written at a path; None if it can."""
    if "\0" in path:
        return "a name with a null character"
    try:
        target = Path(path).absolute()
        if len(target.parts) > _LEVELS or len(os.fsencode(target)) > _BYTES:
            return (
                f"{len(target.parts):,} levels and {len(os.fsencode(target)):,} bytes; a run's path has at most "
                f"{_LEVELS} levels and {_BYTES:,} bytes"
            )
        nearest = next(folder for folder in (target, *target.parents) if folder.exists())
        if not nearest.is_dir():
            return f"{nearest} is {other_kind(nearest) or 'a file'}"
        return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} is not writable"
    except (OSError, ValueError) as error:  # a name that no folder can have
        return str(getattr(error, "strerror", None) or error)


def processes_launched() -> int:
    """How many processes a distributed launcher started, this one included; 1 if there was no launcher.

    Source: torchrun's documentation, "Environment Variables": `WORLD_SIZE`.
    """
    return _number("WORLD_SIZE") or 1


def rank_launched() -> int:
    """Which of the processes of a distributed launch this one is, from 0; 0 if there was no launcher."""
    return (_number("RANK") or 0) if processes_launched() > 1 else 0


def local_rank_launched() -> int:
    """Which of those on this machine this one is, from 0; it takes the GPU of that number."""
    local = _number("LOCAL_RANK")
    return rank_launched() if local is None else local


def launch_is_incomplete() -> str | None:
    """What a launcher of several processes has not told this one, so that they cannot find each other; None if nothing.

    Source: torch.distributed's documentation, "Environment variable initialization"; Open MPI's, for its variables.
    """
    count = processes_launched()
    if count == 1:
        others = _number("OMPI_COMM_WORLD_SIZE") or _number("PMI_SIZE") or 1
        if others > 1 and not os.environ.get("WORLD_SIZE"):
            return f"mpirun started {others} processes, but there is no WORLD_SIZE"
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name, "").strip()]
    if missing:
        return f"WORLD_SIZE={count}, but there is no {', no '.join(missing)}"
    for name in ("RANK", "MASTER_PORT"):
        if _number(name) is None:
            return f"WORLD_SIZE={count}, but {name}={os.environ[name]} is not a whole number"
    if rank_launched() >= count:
        return f"WORLD_SIZE={count}, but RANK={rank_launched()}: ranks count from 0 to {count - 1}"
    return None


def _number(variable: str) -> int | None:
    """A whole number in the environment; None if there is none."""
    text = os.environ.get(variable, "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
