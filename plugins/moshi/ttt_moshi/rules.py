"""What `ttt check` finds in a config for Moshi (MSH…), without torch; what it finds in data is in `data_rules`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ttt.config import Code, Finding, Severity
from ttt.config.schema import select_layers
from ttt.errors import EnvironmentProblem
from ttt.plugins import rule
from ttt_moshi.codes_rules import CODES_RULES
from ttt_moshi.data_rules import DATA_RULES
from ttt_moshi.interleave import frames_in
from ttt_moshi.options import FRAME_RATE, MoshiRun, reads_with_the_demos, sizes

_code = partial(Code, of_training=True, home=__name__)
MSH201 = Code("MSH201", "a context that no layer has", Severity.ERROR, home=__name__)
MSH302 = _code("MSH302", "a limit of attention that limits nothing", Severity.NOTE)
MSH505 = _code("MSH505", "a pretrained model without data", Severity.ERROR)

_WAY_OUT = "write ttt.layers that leave it some layers, or leave it out"
_CONTEXTS = ("context", "ttt_layer_context", "non_ttt_layer_context")


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


@rule(MSH302, reads=("backbone", "data.duration_sec"))
def contexts_limit_something(config: MoshiRun) -> Iterator[Finding]:
    """Where a config limits what attention sees, a window is longer than that, so that TTT has more to remember."""
    options, frames = config.backbone, frames_in(config.data.duration_sec, FRAME_RATE)
    for key in _CONTEXTS:
        limit = getattr(options, key)
        if limit is not None and limit >= frames:
            yield MSH302.at(
                f"backbone.{key}",
                f"{key}: {limit:,} limits nothing in windows of {frames:,} frames: attention sees all of them, and TTT "
                f"need not remember what it sees",
                f"write less than {frames:,}, or a longer data.duration_sec",
                value=limit,
            )


@rule(MSH505, reads=("backbone", "data.train_data"))
def data_are_named(config: MoshiRun) -> Iterator[Finding]:
    """If Moshi itself is trained, the config names data: only the demo has a dialogue of its own."""
    if config.data.train_data is None and not reads_with_the_demos(config.backbone):
        yield MSH505.at(
            "data.train_data",
            "the preset 7b has no data of its own, and none are named; the run stops before its first step",
            "write the path of a .jsonl file in moshi-finetune's format, or of a folder of them",
        )


RULES = (contexts_have_layers, contexts_limit_something, data_are_named, *DATA_RULES, *CODES_RULES)
