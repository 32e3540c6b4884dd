"""Processes of a group for tests: forked from the nursery, so that they import nothing, and joined by gloo.

A test module starts one group and lets it make all its checks; each is reported by name, with what went wrong in it.
"""

from __future__ import annotations

import datetime
import json
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import forking
import several

Check = Callable[[], None]


def reports(module: str, function: str, count: int, folder: Path, timeout: float = 240) -> dict[str, str]:
    """What each check of a group of `count` processes reports: nothing, or what is wrong and in which rank.

    Args:
        module: where `function` is.
        function: called in each process; returns its checks by name, the same in each.
        count: how many processes.
        folder: an empty folder.
        timeout: seconds for all of them.
    """
    with forking.start(_group, module, function, count, str(folder)) as process:
        out, err = process.communicate(timeout)
    assert process.returncode == 0, out + err
    found: dict[str, str] = {}
    for rank in range(count):
        for name, text in json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")).items():
            found[name] = found.get(name, "") + (f"rank {rank}: {text}" if text else "")
    return found


def _group(module: str, function: str, count: int, folder: str) -> int:
    """Be the parent of the group: returns 0 if every process ended well."""
    return several.together(count, _member, module, function, Path(folder))


def _member(rank: int, module: str, function: str, folder: Path) -> None:
    import importlib

    from torch import distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    checks: Mapping[str, Check] = getattr(importlib.import_module(module), function)()
    found = {}
    for name, check in checks.items():
        try:
            check()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
