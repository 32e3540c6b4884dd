"""Checks of what a backbone's methods return about data, the loss of a batch, and what a model says of one.

See `ttt.plugins.answers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ttt.plugins.answer_parts import Check, instance, is_whole, paths, require_whole
from ttt.plugins.asking import AskedDataset, WrongAnswer
from ttt.plugins.asking import with_its_type as _named

_OF_A_LINE = frozenset(
    {"step", "loss", "layers", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes", "lora_share"}
)
"""Names in a line of `metrics.jsonl` that a backbone must not use."""
_OF_A_DATASET = ("__len__", "__getitem__", "collate", "files", "describe", "notice")


def _dataset(backbone: Any, answer: Any) -> Any:
    missing = [name for name in _OF_A_DATASET if not hasattr(type(answer), name) and not hasattr(answer, name)]
    if missing:
        raise WrongAnswer(f"{_named(answer)} without `{missing[0]}`, which a WindowDataset has")
    for name in ("collate", "describe"):
        if not callable(getattr(answer, name)):
            raise WrongAnswer(f"{_named(answer)} whose `{name}` is not a method")
    _require_files(answer)
    _require_sources(answer)
    if not isinstance(answer.notice, str | None):
        raise WrongAnswer(f"{_named(answer)} whose `notice` is {_named(answer.notice)}, not text or None")
    return AskedDataset(backbone, answer)


def _require_files(dataset: Any) -> None:
    """Refuse `files` unless they are ranges that follow each other and cover every window."""
    files, end = dataset.files, 0
    if callable(files) or not isinstance(files, Sequence):
        raise WrongAnswer(f"{_named(dataset)} whose `files` is {_named(files)}, not a sequence of ranges")
    for number, file in enumerate(files):
        if not isinstance(file, range) or file.step != 1 or (len(file) and file.start != end):
            raise WrongAnswer(
                f"{_named(dataset)} whose `files` has {file!r:.80} as number {number}, not the range of windows that "
                f"begins with {end}"
            )
        end = file.stop if len(file) else end
    if end != len(dataset):
        raise WrongAnswer(f"{_named(dataset)} of {len(dataset)} windows whose `files` cover {end}")


def _require_sources(dataset: Any) -> None:
    """Refuse `sources` unless they are ranges of files that follow each other and cover every file, with weights."""
    from ttt.plugins.data import SourceFiles, source_files

    end = 0
    for number, source in enumerate(source_files(dataset)):
        if not isinstance(source, SourceFiles):
            raise WrongAnswer(f"{_named(dataset)} whose `sources` has {_named(source)}, not a SourceFiles")
        if not isinstance(source.files, range) or source.files.step != 1 or source.files.start != end:
            raise WrongAnswer(
                f"{_named(dataset)} whose `sources` has the files {source.files!r:.80} as number {number}, not the "
                f"range of files that begins with {end}"
            )
        weight = source.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 1e-6 <= weight < float("inf"):
            raise WrongAnswer(f"{_named(dataset)} whose source {source.name!r:.80} has the weight {weight!r:.40}")
        end = source.files.stop
    if end != len(dataset.files):
        raise WrongAnswer(f"{_named(dataset)} of {len(dataset.files)} files whose `sources` cover {end}")


def _recordings(backbone: Any, answer: Any) -> Any:
    return paths(backbone, answer) if answer else ()


def _seconds(backbone: Any, answer: Any) -> Any:
    if isinstance(answer, bool) or not isinstance(answer, int | float) or not 0 < answer < 1e9:
        raise WrongAnswer(f"{answer!r:.40}, not a length in seconds")
    return answer


def _loss(backbone: Any, answer: Any) -> Any:
    import numpy as np
    from torch import Tensor

    from ttt.plugins.data import LossOutput

    instance(lambda _: LossOutput)(backbone, answer)
    loss = answer.loss
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        shown = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else _named(loss)
        raise WrongAnswer(
            f"a LossOutput whose loss is {shown}, not one number as a tensor of floating point and shape []"
        )
    require_whole(answer, "tokens", least=1)
    _require_means(answer)
    if not isinstance(answer.metrics, Mapping):
        raise WrongAnswer(f"a LossOutput whose metrics are {_named(answer.metrics)}, not a mapping of names to numbers")
    for name, value in answer.metrics.items():
        if not isinstance(name, str) or name in _OF_A_LINE or name.startswith("eval_"):
            raise WrongAnswer(
                f"a metric of the name {name!r}, which a line of metrics.jsonl has already, or cannot have"
            )
        if not (value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float, np.number))):
            raise WrongAnswer(f"a metric {name} that is {_named(value)}, not one number")
    for name, entry in answer.metrics_over.items():
        if name not in answer.metrics or not is_whole(entry, least=0):
            raise WrongAnswer(
                f"a LossOutput whose metrics_over has {name!r}: {entry!r}, not a metric and a whole number"
            )
    return answer


def _require_means(answer: Any) -> None:
    """Refuse `means` unless they are numbers `[K]` of floating point, or None."""
    from torch import Tensor

    means = answer.means
    if means is None:
        return
    if not isinstance(means, Tensor) or means.dim() != 1 or not len(means) or not means.is_floating_point():
        shown = f"{means.dtype} {list(means.shape)}" if isinstance(means, Tensor) else _named(means)
        raise WrongAnswer(f"a LossOutput whose means are {shown}, not a tensor [K] of floating point")


def _loss_weights(backbone: Any, answer: Any) -> Any:
    from torch import Tensor

    if not isinstance(answer, Tensor) or answer.dim() != 1 or not len(answer) or answer.is_complex():
        shown = f"{answer.dtype} {list(answer.shape)}" if isinstance(answer, Tensor) else _named(answer)
        raise WrongAnswer(f"{shown}, not a tensor [K] of sums of weights")
    return answer


def _outputs(backbone: Any, answer: Any) -> Any:
    from torch import Tensor

    if not isinstance(answer, Tensor) or answer.dim() < 2 or not answer.is_floating_point():
        shown = f"{answer.dtype} {list(answer.shape)}" if isinstance(answer, Tensor) else _named(answer)
        raise WrongAnswer(f"{shown}, not a tensor [B, T, …] of floating point")
    return answer


def _batch(backbone: Any, answer: Any) -> Any:
    if answer is None:
        raise WrongAnswer("None, not a batch")
    return answer


DATA_ANSWERS: Mapping[str, Check] = {
    "dataset": _dataset,
    "find_recordings": _recordings,
    "measure_recording": _seconds,
    "example_batch": _batch,
    "perturb": _batch,
    "loss": _loss,
    "loss_weights": _loss_weights,
    "outputs": _outputs,
    "stream": _outputs,
}
"""The check of each method's answer, by the method's name."""
