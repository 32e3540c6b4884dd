"""Checks of what the methods of `Scoring` and `DiffusionScoring` return; see `ttt.plugins.answers`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt.plugins.answer_parts import Check, instance, is_whole, paths, require_whole
from ttt.plugins.asking import AskedScoring, WrongAnswer
from ttt.plugins.asking import with_its_type as _named


def _score_facts(backbone: Any, answer: Any) -> Any:
    from ttt.plugins.scoring import ScoreFacts

    instance(lambda _: ScoreFacts)(backbone, answer)
    count = len(answer.streams)
    if not count:
        raise WrongAnswer("ScoreFacts without a stream that the model predicts")
    require_whole(answer, "piece", least=1)
    for name, weights in answer.weights.items():
        if len(weights) != count or not all(w >= 0 for w in weights) or not any(weights):
            raise WrongAnswer(
                f"ScoreFacts whose weights {name!r} are {weights!r:.80}, not one for each of {count} streams"
            )
    if answer.chosen not in answer.weights:
        raise WrongAnswer(f"ScoreFacts whose chosen is {answer.chosen!r:.80}, which is no name in its weights")
    return answer


def _scores(backbone: Any, answer: Any) -> Any:
    from torch import Tensor
    from torch import bool as bool_type

    from ttt.plugins.scoring import Scores

    instance(lambda _: Scores)(backbone, answer)
    for name in ("nll", "mask"):
        value = getattr(answer, name)
        if not isinstance(value, Tensor) or value.dim() != 3:
            shown = f"{list(value.shape)}" if isinstance(value, Tensor) else _named(value)
            raise WrongAnswer(f"Scores whose {name} is {shown}, not a tensor [B, K, T]")
    if answer.nll.shape != answer.mask.shape:
        raise WrongAnswer(f"Scores whose nll is {list(answer.nll.shape)}, and whose mask {list(answer.mask.shape)}")
    if not answer.nll.is_floating_point() or answer.mask.dtype != bool_type:
        raise WrongAnswer(f"Scores whose nll is {answer.nll.dtype}, and whose mask {answer.mask.dtype}, not bool")
    return answer


def _score_stream(backbone: Any, answer: Any) -> Any:
    if not hasattr(type(answer), "__enter__") or not hasattr(type(answer), "__exit__"):
        raise WrongAnswer(f"{_named(answer)}, not a context that gives a ScoreStream")
    return AskedScoring(backbone, answer, _scores)


def _clips(backbone: Any, answer: Any) -> Any:
    from torch import Tensor

    if not isinstance(answer, Tensor) or answer.dim() != 3 or answer.is_floating_point():
        shown = f"{answer.dtype} {list(answer.shape)}" if isinstance(answer, Tensor) else _named(answer)
        raise WrongAnswer(f"{shown}, not clips, a tensor [B, S, T] of whole numbers")
    return answer


def _own_data(backbone: Any, answer: Any) -> Any:
    if answer is not None and not isinstance(answer, Path):
        raise WrongAnswer(f"{_named(answer)}, not a folder (Path) or None")
    return answer


def _reader(backbone: Any, answer: Any) -> Any:
    missing = [name for name in ("identity", "notice", "positions", "read", "stream") if not hasattr(answer, name)]
    if missing:
        raise WrongAnswer(f"{_named(answer)} without `{missing[0]}`, which a ClipReader has")
    return answer


def _timesteps(backbone: Any, answer: Any) -> Any:
    if not is_whole(answer, least=1):
        raise WrongAnswer(f"{answer!r:.80}, not a number of timesteps")
    return answer


def _source(backbone: Any, answer: Any) -> Any:
    from ttt.plugins.denoising import WindowSource

    instance(lambda _: WindowSource)(backbone, answer)
    if not isinstance(answer.name, str) or not answer.name:
        raise WrongAnswer(f"a WindowSource whose name is {answer.name!r:.80}, not the name of a recording")
    if answer.files != ():
        paths(backbone, answer.files)
    return answer


def _segment_losses(backbone: Any, answer: Any) -> Any:
    from torch import Tensor

    from ttt.plugins.denoising import SegmentLosses

    instance(lambda _: SegmentLosses)(backbone, answer)
    loss, weights = answer.loss, answer.weights
    if not isinstance(loss, Tensor) or loss.dim() != 3 or not loss.is_floating_point():
        shown = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else _named(loss)
        raise WrongAnswer(f"SegmentLosses whose loss is {shown}, not a tensor [B, N, S] of floating point")
    if len(weights) != loss.shape[2] or not all(w > 0 for w in weights) or abs(sum(weights) - 1) > 1e-6:
        raise WrongAnswer(
            f"SegmentLosses whose weights are {weights!r:.80}, not a share for each of {loss.shape[2]} segments with "
            f"the sum 1"
        )
    return answer


SCORING_ANSWERS: Mapping[str, Check] = {
    "score_facts": _score_facts,
    "own_tasks_data": _own_data,
    "clip_reader": _reader,
    "score": _scores,
    "score_stream": _score_stream,
    "example_clips": _clips,
    "num_timesteps": _timesteps,
    "window_source": _source,
    "diffusion_losses": _segment_losses,
}
"""The check of each method's answer, by the method's name."""
