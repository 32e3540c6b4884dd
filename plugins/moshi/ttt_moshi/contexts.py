"""What Moshi's attention sees: the frames that a config gives each layer of the main transformer; imports no torch.

A context is kyutai's: with 50, a frame attends to itself and to the 49 before it. It is an attribute of each layer's
attention, which both the mask and the streaming cache are made of. The depformer sees all codebooks of its frame, and
has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final

from ttt.config.schema import select_layers
from ttt.errors import EnvironmentProblem
from ttt_moshi.options import FRAME_RATE, MoshiOptions, MoshiRun, context_and_codebooks, sizes

if TYPE_CHECKING:
    from moshi.models import LMModel
    from moshi.modules.transformer import StreamingTransformerLayer
    from torch import nn

_KEY: Final = "ttt_layer_contexts"
"""The attribute under which a built model keeps its `LayerContexts`."""
_BEFORE: Final = "context_before"
"""The attribute under which an adapter keeps the context that its layer had without it."""


@dataclass(frozen=True)
class LayerContexts:
    """Frames that attention sees, None if all."""

    with_ttt: int | None
    """In layers with TTT."""
    without: int | None
    """In the others."""

    @property
    def differ(self) -> bool:
        """Whether it matters which layers have TTT."""
        return self.with_ttt != self.without


# --- of a config ---


def wanted_contexts(options: MoshiOptions, own: int | None) -> LayerContexts:
    """What the options say, for a model whose own context is `own`."""
    general = own if options.context is None else options.context
    return LayerContexts(
        general if options.ttt_layer_context is None else options.ttt_layer_context,
        general if options.non_ttt_layer_context is None else options.non_ttt_layer_context,
    )


def identifying(options: MoshiOptions) -> dict[str, int | None]:
    """The three keys as adapter files keep them: written in one way, and null if they are the model's own."""
    own = None
    if (options.context, options.ttt_layer_context, options.non_ttt_layer_context) != (None, None, None):
        with contextlib.suppress(EnvironmentProblem):  # the build tells it
            own = context_and_codebooks(options)[0]
    return _as_options(wanted_contexts(options, own), own)


def _as_options(contexts: LayerContexts, own: int | None) -> dict[str, int | None]:
    with_ttt, without = (None if each == own else each for each in (contexts.with_ttt, contexts.without))
    if with_ttt == without:
        return {"context": with_ttt, "ttt_layer_context": None, "non_ttt_layer_context": None}
    return {"context": None, "ttt_layer_context": with_ttt, "non_ttt_layer_context": without}


def layers_contexts(config: MoshiRun) -> list[int | None]:
    """What each layer's attention sees, in order of layers.

    Raises:
        EnvironmentProblem: the model's `config.json` cannot be read.
    """
    options = config.backbone
    wanted = wanted_contexts(options, context_and_codebooks(options)[0])
    count = sizes(options)["num_layers"]
    chosen: tuple[int, ...] = ()
    with contextlib.suppress(ValueError):  # a layer that does not exist; a rule of the core tells it
        chosen = select_layers(config.ttt.layers, count)
    return [wanted.with_ttt if layer in chosen else wanted.without for layer in range(count)]


def attention_span(config: MoshiRun) -> int | None:
    """The most that a layer's attention sees, None if all."""
    options = config.backbone
    wanted = wanted_contexts(options, context_and_codebooks(options)[0])
    return widest(layers_contexts(config)) if wanted.differ else wanted.without


def widest(contexts: Sequence[int | None]) -> int | None:
    """The most that a layer sees, None if one sees all."""
    known = [context for context in contexts if context is not None]
    return max(known) if len(known) == len(contexts) else None


# --- of a built model ---


def set_contexts(model: LMModel, options: MoshiOptions) -> LMModel:
    """Give each layer of a built, plain model the context of a layer without TTT, and remember those with TTT.

    The model is changed in place. `LMModel.context` stays what the model was made with.
    """
    wanted = wanted_contexts(options, model.context)
    setattr(model, _KEY, wanted)
    for layer in model.transformer.layers:
        layer.self_attn.context = wanted.without
    return model


def give_ttt_context(model: LMModel, layer: StreamingTransformerLayer) -> None:
    """Give a layer the context of layers with TTT, if that is another one; else it keeps what it has, by hand too."""
    wanted: LayerContexts | None = getattr(model, _KEY, None)
    if wanted is not None and wanted.differ:
        layer.self_attn.context = wanted.with_ttt


def note_context(adapter: nn.Module, layer: StreamingTransformerLayer) -> None:
    """Let an adapter that is about to be attached remember what its layer sees without it."""
    setattr(adapter, _BEFORE, layer.self_attn.context)


def take_back_context(adapter: nn.Module | None, layer: StreamingTransformerLayer) -> None:
    """Let a layer see what it saw before an adapter was attached."""
    if hasattr(adapter, _BEFORE):
        layer.self_attn.context = getattr(adapter, _BEFORE)


def known_contexts(model: LMModel) -> dict[str, int | None]:
    """The three keys as far as they can be read off a model.

    Of one that was built elsewhere, or whose contexts were set by hand, they are the most that a layer sees.
    """
    wanted: LayerContexts | None = getattr(model, _KEY, None)
    each = [layer.self_attn.context for layer in model.transformer.layers]
    if wanted is None or not {wanted.with_ttt, wanted.without}.issuperset(each):
        wanted = LayerContexts(widest(each), widest(each))
    return _as_options(wanted, model.context)


def describe(model: LMModel) -> list[str]:
    """What each layer's attention sees, measured on the model: a sentence.

    "attention sees 50 frames (4 s) in layers 1, 2 (TTT), 100 frames (8 s) in layers 0, 3"
    """
    groups: dict[tuple[int | None, bool], list[int]] = {}
    for number, layer in enumerate(model.transformer.layers):
        groups.setdefault((layer.self_attn.context, hasattr(layer, "ttt")), []).append(number)
    every = len({context for context, _ in groups}) == 1
    if every:
        return [f"attention sees {_frames(next(iter(groups))[0])} in every layer"]
    ordered = sorted(groups.items(), key=lambda group: not group[0][1])
    told = (f"{_frames(context)} in {_layers(numbers)}{' (TTT)' * ttt}" for (context, ttt), numbers in ordered)
    return [f"attention sees {', '.join(told)}"]


def _frames(context: int | None) -> str:
    if context is None:
        return "all frames"
    return f"{context:,} frame{'s' * (context != 1)} ({context / FRAME_RATE:g} s)"


def _layers(numbers: Sequence[int]) -> str:
    """`layer 3`, `layers 0, 3`, `layers 0 to 28, 30`."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    shown = [str(n) for run in runs for n in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else run)]
    return f"layer{'s' * (len(numbers) != 1)} {', '.join(shown)}"
