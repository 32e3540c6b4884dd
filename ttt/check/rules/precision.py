"""What `train.ttt_precision` needs on this machine (TTT608)."""

from __future__ import annotations

from collections.abc import Iterator

from ttt.check.rules.rule import Context, rule
from ttt.config.findings import Blame, Code, Family, Finding, Severity
from ttt.machine import exact_implementation, missing_precision

TTT608 = Code(
    "TTT608",
    "a precision that the run cannot have",
    Severity.ERROR,
    family=Family.ENVIRONMENT,
    blames=Blame.MACHINE,
    of_training=True,
    home=__name__,
)


@rule(TTT608, reads=("train.ttt_precision", "train.device", "ttt.layers"))
def precision_can_be_had(context: Context) -> Iterator[Finding]:
    """The run's device multiplies in its precision; of `auto` that is known when the run starts."""
    train = context.config.train
    device = "cuda" if train.device == "auto" else train.device
    refused = exact_implementation(train.ttt_precision) or missing_precision(train.ttt_precision, device)
    if context.has_layers and refused is not None:
        yield TTT608.at("train.ttt_precision", message=refused.problem, fix=refused.fix, value=train.ttt_precision)
