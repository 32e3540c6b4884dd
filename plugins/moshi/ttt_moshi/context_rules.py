"""What `ttt check` finds in the contexts that a config gives Moshi's layers (MSH2xx), without torch."""

from __future__ import annotations

from collections.abc import Iterator

from ttt.config import Code, Finding, Severity
from ttt.config.schema import select_layers
from ttt.errors import EnvironmentProblem
from ttt.plugins import rule
from ttt_moshi.options import MoshiRun, sizes

MSH201 = Code("MSH201", "a context that no layer has", Severity.ERROR, home=__name__)

_WAY_OUT = "write ttt.layers that leave it some layers, or leave it out"


@rule(MSH201, reads=("backbone", "ttt.layers"))
def contexts_have_layers(config: MoshiRun) -> Iterator[Finding]:
    """Each context that is written is that of some layer."""
    options = config.backbone
    try:
        count = sizes(options)["num_layers"]
        named = select_layers(config.ttt.layers, count)
    except (ValueError, EnvironmentProblem):  # both are told by other rules
        return
    of_ttt, of_others = options.ttt_layer_context, options.non_ttt_layer_context
    for key, layers, which in (
        ("ttt_layer_context", len(named), "names none"),
        ("non_ttt_layer_context", count - len(named), f"names all {count}"),
    ):
        if getattr(options, key) is not None and not layers:
            yield MSH201.at(
                f"backbone.{key}",
                f"{key}: {getattr(options, key)} is of no layer, because ttt.layers {which}",
                _WAY_OUT,
                value=getattr(options, key),
            )
    alone = (of_ttt is not None and len(named) == count) or (of_others is not None and not named)
    if options.context is not None and alone:
        other = "ttt_layer_context" if of_ttt is not None else "non_ttt_layer_context"
        yield MSH201.at(
            "backbone.context",
            f"context: {options.context} is of no layer, because {other} is of all {count}",
            "leave it out",
            value=options.context,
        )


RULES = (contexts_have_layers,)
