"""What this machine computes with: its processor and accelerators as PyTorch sees them, and installed versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from ttt.machine import device_memory
from ttt.plugins.listing import installed_plugins


@dataclass(frozen=True)
class Device:
    """A processor or an accelerator that tensors can be on."""

    name: str
    """Its PyTorch name: `cpu`, `cuda:0`, `mps`."""
    model: str
    """Its maker's name for it."""
    memory_bytes: int | None
    """Its total memory in bytes; None if the system does not say."""
    free_bytes: int | None
    """Its free memory in bytes at the moment; None if the system does not say."""
    detail: str
    """The threads of a CPU, or the compute capability of a GPU."""


def versions() -> dict[str, str | None]:
    """Installed versions by name: `Report.versions`; None if something is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "triton": version_of("triton"),
        "ttt-adapters": version_of("ttt-adapters"),
    }
    for plugin in installed_plugins():
        found[plugin.distribution] = plugin.version
        for name in requirements_of(plugin.distribution):
            found.setdefault(name, version_of(name))
    return found


def version_of(distribution: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def requirements_of(distribution: str) -> list[str]:
    """Names of the distributions that a distribution requires; requirements under a condition are left out."""
    try:
        declared = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return []
    return [re.split(r"[\s\[(<>=!~;]", line, maxsplit=1)[0] for line in declared if ";" not in line]


def devices() -> tuple[Device, ...]:
    """The processor, and every accelerator that PyTorch can use."""
    threads = f"{torch.get_num_threads()} threads on {cores()} cores"
    found = [Device("cpu", processor(), device_memory("cpu"), _available_memory(), threads)]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        detail = f"compute capability {properties.major}.{properties.minor}"
        found.append(Device(f"cuda:{index}", properties.name, total, free, detail))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Metal", None, None, "float32 only"))
    return tuple(found)


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's model name, or its architecture if the system does not say."""
    name = ""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    elif sys.platform == "darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        name = asked.stdout.strip()
    return name or platform.processor() or platform.machine()


def _available_memory() -> int | None:
    """Bytes of memory that a process could still take; None if the system is not Linux."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
