"""What `train.compile` needs on this machine (TTT603, TTT604)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

from ttt.check.rules.rule import Context, rule
from ttt.config.findings import Blame, Code, Family, Finding, Severity
from ttt.machine import missing_compiler, wrong_implementation
from ttt.ops.constants import VARIABLE

_code = partial(Code, family=Family.ENVIRONMENT, blames=Blame.MACHINE, of_training=True, home=__name__)
TTT603 = _code("TTT603", "an implementation of the scan that cannot be compiled", Severity.ERROR)
TTT604 = _code("TTT604", "compiling without a compiler that can", Severity.ERROR)


@rule(TTT603, reads=("train.compile", "ttt.layers"))
def scan_can_be_compiled(context: Context) -> Iterator[Finding]:
    """`TTT_OPS` does not force an implementation that cannot be compiled."""
    refused = wrong_implementation()
    if context.config.train.compile and context.has_layers and refused is not None:
        yield TTT603.at(
            "train.compile",
            message=refused.problem,
            fix=refused.fix,
            value=os.environ[VARIABLE],
        )


@rule(TTT604, reads=("train.compile", "train.device", "ttt.layers"))
def compiler_is_there(context: Context) -> Iterator[Finding]:
    """PyTorch is new enough, and there is a compiler for the device; for the CPU or for CUDA if that is `auto`."""
    train = context.config.train
    if not train.compile or not context.has_layers or wrong_implementation() is not None:
        return
    found = [missing_compiler(kind) for kind in (("cpu", "cuda") if train.device == "auto" else (train.device,))]
    missing = [obstacle for obstacle in found if obstacle is not None]
    if len(missing) == len(found):
        yield TTT604.at(
            "train.compile",
            message="; ".join(dict.fromkeys(obstacle.problem for obstacle in missing)),
            fix=missing[0].fix,
            value=train.device,
        )
