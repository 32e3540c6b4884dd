"""What `train.compile` needs of the machine (TTT603, TTT604)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from typing import NamedTuple

from ttt.check.rules.rule import Context, rule
from ttt.config.findings import Finding, Severity

VARIABLE = "TTT_OPS"
"""`ttt.ops.select.VARIABLE`."""


class Obstacle(NamedTuple):
    """Why nothing can be compiled."""

    problem: str
    """What is wrong, as the rest of a sentence."""
    fix: str
    """The way out."""


def wrong_implementation() -> Obstacle | None:
    """What `TTT_OPS` forces, where that is an implementation of the scan that cannot be compiled whole."""
    forced = os.environ.get(VARIABLE)
    if forced not in ("generic", "reference"):
        return None
    return Obstacle(
        f"{VARIABLE}={forced} asks for an implementation of the scan that torch.compile cannot take whole",
        f"unset {VARIABLE}, or write compile: false",
    )


def missing_compiler(device: str) -> Obstacle | None:
    """What is missing to compile for `cpu` or `cuda`; None where everything is there, or for another device.

    Source: PyTorch's `torch/_inductor/config.py`, `cpp.cxx`; Triton's `triton/runtime/build.py`, which builds what
    launches its kernels in C.
    """
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


_CXX = {"darwin": "clang++", "win32": "cl"}
"""What PyTorch looks for where CXX names nothing, by system; g++ on the others."""


@rule("train.compile", "ttt.layers")
def scan_can_be_compiled(context: Context) -> Iterator[Finding]:
    """`TTT_OPS` leaves the scan that compiles."""
    refused = wrong_implementation()
    if context.config.train.compile and context.has_layers and refused is not None:
        yield Finding(
            code="TTT603",
            severity=Severity.ERROR,
            path="train.compile",
            message=refused.problem,
            fix=refused.fix,
            value=os.environ[VARIABLE],
        )


@rule("train.compile", "train.device", "ttt.layers")
def compiler_is_there(context: Context) -> Iterator[Finding]:
    """There is a compiler for the run's device; where that is still to be chosen, for one of those that it may be."""
    train = context.config.train
    if not train.compile or not context.has_layers or wrong_implementation() is not None:
        return
    found = [missing_compiler(kind) for kind in (("cpu", "cuda") if train.device == "auto" else (train.device,))]
    missing = [obstacle for obstacle in found if obstacle is not None]
    if len(missing) == len(found):
        yield Finding(
            code="TTT604",
            severity=Severity.ERROR,
            path="train.compile",
            message="; ".join(obstacle.problem for obstacle in missing),
            fix=missing[0].fix,
            value=train.device,
        )


RULES = (scan_can_be_compiled, compiler_is_there)
