"""Checks of what a backbone's methods return, so that a wrong answer is reported at once and not where it fails later.

Each check takes the backbone and its answer, and returns the answer or raises `WrongAnswer`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt.plugins.asking import AskedDataset, AskedScoring, WrongAnswer, asked
from ttt.plugins.asking import with_article as _a
from ttt.plugins.asking import with_its_type as _named

Check = Callable[[Any, Any], Any]

_OF_A_LINE = frozenset({"step", "loss", "layers", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes"})
"""Names in a line of `metrics.jsonl` that a backbone must not use."""
_OF_A_DATASET = ("__len__", "__getitem__", "collate", "files", "describe", "notice")


def _instance(of: Callable[[Any], type], *, name: str = "") -> Check:
    """The check for an instance of a class. `of` gives the class when it is needed, to import nothing heavy before."""

    def check(backbone: Any, answer: Any) -> Any:
        kind = of(backbone)
        if not isinstance(answer, kind):
            raise WrongAnswer(f"{_named(answer)}, not {_a(name or kind.__name__)}")
        return answer

    return check


def _is_whole(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


# --- without torch ---


def _presets(backbone: Any, answer: Any) -> Any:
    if not isinstance(answer, Mapping):
        raise WrongAnswer(f"{_named(answer)}, not a mapping of names to YAML texts")
    for name, text in answer.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise WrongAnswer(f"a preset {name!r} that is {_named(text)}, not text")
    if "demo" not in answer:
        raise WrongAnswer(f"no preset `demo`, which `ttt train --backbone {backbone.name}` runs")
    return answer


def _explanations(backbone: Any, answer: Any) -> Any:
    from ttt.config.explanation import Explanation

    if not isinstance(answer, Mapping):
        raise WrongAnswer(f"{_named(answer)}, not a mapping of codes to explanations")
    for code, entry in answer.items():
        if not isinstance(code, str) or not isinstance(entry, Explanation):
            raise WrongAnswer(f"for the code {code!r} {_named(entry)}, not an Explanation")
    return answer


def _facts(backbone: Any, answer: Any) -> Any:
    from ttt.plugins.facts import BackboneFacts

    _instance(lambda _: BackboneFacts)(backbone, answer)
    for name in ("dim", "num_heads", "num_layers", "gates", "layers_per_checkpoint"):
        _require_whole(answer, name, least=1)
    for name in ("tokens_per_window", "parameters", "attention_parameters"):
        if getattr(answer, name) is not None:
            _require_whole(answer, name, least=0)
    for name in ("layer_activation_bytes", "head_activation_bytes"):
        value = getattr(answer, name)
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value < 1e30):
            raise WrongAnswer(f"facts whose {name} is {value!r}, not a number of bytes")
    if not isinstance(answer.window, str):
        raise WrongAnswer(f"facts whose window is {_named(answer.window)}, not text")
    scans = answer.checkpoints_around_scans
    if scans is not None and not (isinstance(scans, tuple) and scans and all(_is_whole(n, least=0) for n in scans)):
        raise WrongAnswer(f"facts whose checkpoints_around_scans are {scans!r}, not a count for each scan")
    return answer


def _require_whole(answer: Any, name: str, *, least: int) -> None:
    value = getattr(answer, name)
    if not _is_whole(value, least=least):
        raise WrongAnswer(f"{_a(type(answer).__name__)} whose {name} is {value!r}, not a whole number ≥ {least}")


def _truth(backbone: Any, answer: Any) -> Any:
    if not isinstance(answer, bool):
        raise WrongAnswer(f"{_named(answer)}, not True or False")
    return answer


def _plan(backbone: Any, answer: Any) -> Any:
    from ttt.plugins.sampling import SamplePlan

    _instance(lambda _: SamplePlan)(backbone, answer)
    _require_whole(answer, "prompts", least=0)
    _paths(backbone, answer.files)
    if not isinstance(answer.scenes, bool):
        raise WrongAnswer(f"a SamplePlan whose scenes is {answer.scenes!r:.80}, not True or False")
    return answer


def _paths(backbone: Any, answer: Any) -> Any:
    good = isinstance(answer, Sequence) and not isinstance(answer, str) and all(isinstance(p, Path) for p in answer)
    if not good or not answer:
        raise WrongAnswer(f"{_in_short(answer)}, not the files that it made, a sequence of Path")
    return answer


def _sampler(backbone: Any, answer: Any) -> Any:
    if not callable(answer):
        raise WrongAnswer(f"{_named(answer)}, not a function of a SampleRequest")

    def make(request: Any) -> Any:
        with asked(backbone, "what `prepare_samples` returned", answer):
            return _paths(backbone, answer(request))

    return make


def _in_short(value: Any) -> str:
    return "an empty sequence" if isinstance(value, Collection) and not value else _named(value)


def _provenance(backbone: Any, answer: Any) -> Any:
    if not isinstance(answer, Mapping) or not all(isinstance(text, str) for pair in answer.items() for text in pair):
        raise WrongAnswer(f"{_named(answer)}, not a mapping of texts to texts")
    return answer


def _identity(backbone: Any, answer: Any) -> Any:
    if not isinstance(answer, Mapping) or not all(isinstance(key, str) for key in answer):
        raise WrongAnswer(f"{_named(answer)}, not a mapping of options' names to their values")
    return answer


def _options(backbone: Any, answer: Any) -> Any:
    if not isinstance(answer, backbone.options):
        raise WrongAnswer(f"{_named(answer)}, not the plugin's own {backbone.options.__name__}")
    return answer


# --- with torch ---


def _module(backbone: Any, answer: Any) -> Any:
    from torch import nn

    return _instance(lambda _: nn.Module, name="model (torch.nn.Module)")(backbone, answer)


def _sites(backbone: Any, answer: Any) -> Any:
    from ttt.plugins.site import Site

    if not isinstance(answer, Sequence) or not answer:
        raise WrongAnswer(f"{_in_short(answer)}, not a sequence of Site, one for each layer that TTT can go into")
    for number, site in enumerate(answer):
        if not isinstance(site, Site):
            raise WrongAnswer(f"{_named(site)} as number {number}, not a Site")
        wrong = next(iter(_wrong_in(site)), None)
        if wrong is not None:
            raise WrongAnswer(f"a Site, number {number}, whose {wrong}")
    layers = [site.layer for site in answer]
    if sorted(layers) != list(range(len(layers))):
        told = ", ".join(map(str, layers[:8])) + ", …" * (len(layers) > 8)
        raise WrongAnswer(f"sites of the layers {told}, where each of 0 to {len(layers) - 1} is wanted once")
    return answer


def _wrong_in(site: Any) -> Iterable[str]:
    """What is wrong with the fields of a site, a clause each."""
    from torch import nn

    for name in ("dim", "num_heads"):
        if not _is_whole(getattr(site, name), least=1):
            yield f"{name} is {getattr(site, name)!r}, not a whole number ≥ 1"
    if not _is_whole(site.layer, least=0):
        yield f"layer is {site.layer!r}, not the number of a layer"
    if not isinstance(site.path, str):
        yield f"path is {_named(site.path)}, not text"
    if not isinstance(site.module, nn.Module):
        yield f"module is {_named(site.module)}, not a torch.nn.Module"
    if not (isinstance(site.subclass, type) and issubclass(site.subclass, nn.Module)):
        yield f"subclass is {site.subclass!r:.80}, not a subclass of torch.nn.Module"
    if site.adapter is not None and not callable(site.adapter):
        yield f"adapter is {_named(site.adapter)}, which cannot be called"
    if not (isinstance(site.attribute, str) and site.attribute.isidentifier()):
        yield f"attribute is {site.attribute!r}, not the name of a child module"


def _dataset(backbone: Any, answer: Any) -> Any:
    missing = [name for name in _OF_A_DATASET if not hasattr(type(answer), name) and not hasattr(answer, name)]
    if missing:
        raise WrongAnswer(f"{_named(answer)} without `{missing[0]}`, which a WindowDataset has")
    for name in ("collate", "describe"):
        if not callable(getattr(answer, name)):
            raise WrongAnswer(f"{_named(answer)} whose `{name}` is not a method")
    _require_files(answer)
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


def _loss(backbone: Any, answer: Any) -> Any:
    import numpy as np
    from torch import Tensor

    from ttt.plugins.data import LossOutput

    _instance(lambda _: LossOutput)(backbone, answer)
    loss = answer.loss
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        shown = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else _named(loss)
        raise WrongAnswer(
            f"a LossOutput whose loss is {shown}, not one number as a tensor of floating point and shape []"
        )
    _require_whole(answer, "tokens", least=1)
    if not isinstance(answer.metrics, Mapping):
        raise WrongAnswer(f"a LossOutput whose metrics are {_named(answer.metrics)}, not a mapping of names to numbers")
    for name, value in answer.metrics.items():
        if not isinstance(name, str) or name in _OF_A_LINE or name.startswith("eval_"):
            raise WrongAnswer(
                f"a metric of the name {name!r}, which a line of metrics.jsonl has already, or cannot have"
            )
        if not (value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float, np.number))):
            raise WrongAnswer(f"a metric {name} that is {_named(value)}, not one number")
    return answer


def _score_facts(backbone: Any, answer: Any) -> Any:
    from ttt.plugins.scoring import ScoreFacts

    _instance(lambda _: ScoreFacts)(backbone, answer)
    count = len(answer.streams)
    if not count:
        raise WrongAnswer("ScoreFacts without a stream that the model predicts")
    _require_whole(answer, "piece", least=1)
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

    _instance(lambda _: Scores)(backbone, answer)
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
    if not _is_whole(answer, least=1):
        raise WrongAnswer(f"{answer!r:.80}, not a number of timesteps")
    return answer


def _source(backbone: Any, answer: Any) -> Any:
    from ttt.plugins.denoising import WindowSource

    _instance(lambda _: WindowSource)(backbone, answer)
    if not isinstance(answer.name, str) or not answer.name:
        raise WrongAnswer(f"a WindowSource whose name is {answer.name!r:.80}, not the name of a recording")
    if answer.files != ():
        _paths(backbone, answer.files)
    return answer


def _segment_losses(backbone: Any, answer: Any) -> Any:
    from torch import Tensor

    from ttt.plugins.denoising import SegmentLosses

    _instance(lambda _: SegmentLosses)(backbone, answer)
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


def _context_manager(backbone: Any, answer: Any) -> Any:
    if not hasattr(answer, "__enter__") or not hasattr(answer, "__exit__"):
        raise WrongAnswer(f"{_named(answer)}, not a context manager")
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


ANSWERS: Mapping[str, Check] = {
    "explanations": _explanations,
    "presets": _presets,
    "facts": _facts,
    "identity": _identity,
    "has_eval_data": _truth,
    "has_own_eval_data": _truth,
    "plan_sample": _plan,
    "build": _module,
    "provenance": _provenance,
    "sites": _sites,
    "dataset": _dataset,
    "loss": _loss,
    "is_attention": _truth,
    "sample": _paths,
    "prepare_samples": _sampler,
    "import_weights": _paths,
    "tiny": _options,
    "tiny_like": _options,
    "example_batch": _batch,
    "outputs": _outputs,
    "perturb": _batch,
    "stream": _outputs,
    "score_facts": _score_facts,
    "own_tasks_data": _own_data,
    "clip_reader": _reader,
    "score": _scores,
    "score_stream": _score_stream,
    "example_clips": _clips,
    "num_timesteps": _timesteps,
    "window_source": _source,
    "diffusion_losses": _segment_losses,
    "reset_at_segments": _context_manager,
}
"""The check of each method's answer, by the method's name. The other methods return nothing."""
