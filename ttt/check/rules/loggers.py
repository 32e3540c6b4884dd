"""Whether the packages of `train.loggers` are installed (TTT607)."""

from __future__ import annotations

from collections.abc import Iterator

from ttt.check.rules.rule import Context, rule
from ttt.config.findings import Blame, Code, Family, Finding, Severity
from ttt.machine import is_installed

TTT607 = Code(
    "TTT607",
    "a logger whose package is not installed",
    Severity.ERROR,
    family=Family.ENVIRONMENT,
    blames=Blame.MACHINE,
    of_training=True,
    home=__name__,
)


@rule(TTT607, reads=("train.loggers",))
def packages_of_loggers_are_there(context: Context) -> Iterator[Finding]:
    """Each logger that the config names can be imported."""
    for name in dict.fromkeys(context.config.train.loggers or ()):
        if not is_installed(name):
            yield TTT607.at(
                "train.loggers",
                message=f"train.loggers names {name}, and there is no package of that name here",
                fix=f"pip install {name}, or leave it out",
                value=name,
            )
