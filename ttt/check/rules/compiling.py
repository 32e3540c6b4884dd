"""What `train.compile` needs of the machine (TTT603, TTT604)."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ttt.check.rules.rule import Context, rule
from ttt.config.findings import Finding, Severity
from ttt.machine import missing_compiler, wrong_implementation
from ttt.ops.constants import VARIABLE


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
