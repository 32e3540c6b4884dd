"""What `ttt check` finds in a config for Moshi (MSH…), without torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ttt.config import Code, Finding, Severity
from ttt.plugins import rule
from ttt_moshi.interleave import frames_in
from ttt_moshi.options import FRAME_RATE, MoshiRun, reads_with_the_demos

_code = partial(Code, of_training=True, home=__name__)
MSH302 = _code("MSH302", "a limit of attention that limits nothing", Severity.NOTE)
MSH505 = _code("MSH505", "a pretrained model without data", Severity.ERROR)

_CONTEXTS = ("context", "ttt_layer_context", "non_ttt_layer_context")


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


RULES = (contexts_limit_something, data_are_named)
