"""Checks of what a backbone's methods return, so that a wrong answer is reported at once and not where it fails later.

Each check takes the backbone and its answer, and returns the answer or raises `WrongAnswer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ttt.plugins.answer_parts import Check, in_short, instance, is_whole, paths, require_whole
from ttt.plugins.asking import AskedDataset, WrongAnswer, asked
from ttt.plugins.asking import with_its_type as _named
from ttt.plugins.scoring_answers import SCORING_ANSWERS

_OF_A_LINE = frozenset(
    {"step", "loss", "layers", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes", "lora_share"}
)
"""Names in a line of `metrics.jsonl` that a backbone must not use."""
_OF_A_DATASET = ("__len__", "__getitem__", "collate", "files", "describe", "notice")


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

    instance(lambda _: BackboneFacts)(backbone, answer)
    for name in ("dim", "num_heads", "num_layers", "gates", "layers_per_checkpoint"):
        require_whole(answer, name, least=1)
    for name in ("tokens_per_window", "parameters", "attention_parameters"):
        if getattr(answer, name) is not None:
            require_whole(answer, name, least=0)
    for name in ("layer_activation_bytes", "head_activation_bytes"):
        value = getattr(answer, name)
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value < 1e30):
            raise WrongAnswer(f"facts whose {name} is {value!r}, not a number of bytes")
    if not isinstance(answer.window, str):
        raise WrongAnswer(f"facts whose window is {_named(answer.window)}, not text")
    scans = answer.checkpoints_around_scans
    if scans is not None and not (isinstance(scans, tuple) and scans and all(is_whole(n, least=0) for n in scans)):
        raise WrongAnswer(f"facts whose checkpoints_around_scans are {scans!r}, not a count for each scan")
    return answer


def _files(backbone: Any, answer: Any) -> Any:
    from ttt.plugins.facts import NeededFile

    _mapping(NeededFile, "options' names to NeededFiles")(backbone, answer)
    for name in answer:
        if name not in backbone.options.model_fields:
            raise WrongAnswer(f"a file for {name!r}, which is none of its options")
    return answer


def _truth(backbone: Any, answer: Any) -> Any:
    if not isinstance(answer, bool):
        raise WrongAnswer(f"{_named(answer)}, not True or False")
    return answer


def _plan(backbone: Any, answer: Any) -> Any:
    from ttt.plugins.sampling import SamplePlan

    instance(lambda _: SamplePlan)(backbone, answer)
    require_whole(answer, "prompts", least=0)
    paths(backbone, answer.files)
    if not isinstance(answer.scenes, bool):
        raise WrongAnswer(f"a SamplePlan whose scenes is {answer.scenes!r:.80}, not True or False")
    return answer


def _maker(method: str, of: str) -> Check:
    """The check for a function that makes files of a request."""

    def check(backbone: Any, answer: Any) -> Any:
        if not callable(answer):
            raise WrongAnswer(f"{_named(answer)}, not a function of {of}")

        def make(request: Any) -> Any:
            with asked(backbone, f"what `{method}` returned", answer):
                return paths(backbone, answer(request))

        return make

    return check


def _mapping(values: type, what: str) -> Check:
    def check(backbone: Any, answer: Any) -> Any:
        if not isinstance(answer, Mapping) or not all(
            isinstance(key, str) and isinstance(value, values) for key, value in answer.items()
        ):
            raise WrongAnswer(f"{_named(answer)}, not a mapping of {what}")
        return answer

    return check


def _options(backbone: Any, answer: Any) -> Any:
    if not isinstance(answer, backbone.options):
        raise WrongAnswer(f"{_named(answer)}, not the plugin's own {backbone.options.__name__}")
    return answer


# --- with torch ---


def _module(backbone: Any, answer: Any) -> Any:
    from torch import nn

    return instance(lambda _: nn.Module, name="model (torch.nn.Module)")(backbone, answer)


def _sentences(backbone: Any, answer: Any) -> Any:
    if isinstance(answer, str) or not isinstance(answer, Sequence):
        raise WrongAnswer(f"{_named(answer)}, not a sequence of sentences")
    for number, sentence in enumerate(answer):
        if not isinstance(sentence, str) or not sentence.strip() or "\n" in sentence:
            raise WrongAnswer(f"{sentence!r:.80} as number {number}, not a sentence on one line")
    return tuple(answer)


def _sites(backbone: Any, answer: Any) -> Any:
    from ttt.plugins.site import Site

    if not isinstance(answer, Sequence) or not answer:
        raise WrongAnswer(f"{in_short(answer)}, not a sequence of Site, one for each layer that TTT can go into")
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


def _blocks(backbone: Any, answer: Any) -> Any:
    from torch import nn

    if not isinstance(answer, Sequence) or not all(isinstance(block, nn.Module) for block in answer):
        raise WrongAnswer(f"{in_short(answer)}, not a sequence of modules")
    return answer


def _wrong_in(site: Any) -> Iterable[str]:
    """What is wrong with the fields of a site, a clause each."""
    from torch import nn

    for name in ("dim", "num_heads"):
        if not is_whole(getattr(site, name), least=1):
            yield f"{name} is {getattr(site, name)!r}, not a whole number ≥ 1"
    if not is_whole(site.layer, least=0):
        yield f"layer is {site.layer!r}, not the number of a layer"
    if not isinstance(site.path, str):
        yield f"path is {_named(site.path)}, not text"
    known = site.known_options
    if not isinstance(known, Mapping) or not all(isinstance(key, str) for key in known):
        yield f"known_options are {in_short(known)}, not a mapping of options' names to their values"
    if not isinstance(site.module, nn.Module):
        yield f"module is {_named(site.module)}, not a torch.nn.Module"
    if not (isinstance(site.subclass, type) and issubclass(site.subclass, nn.Module)):
        yield f"subclass is {site.subclass!r:.80}, not a subclass of torch.nn.Module"
    if site.adapter is not None and not callable(site.adapter):
        yield f"adapter is {_named(site.adapter)}, which cannot be called"
    if not (isinstance(site.attribute, str) and site.attribute.isidentifier()):
        yield f"attribute is {site.attribute!r}, not the name of a child module"


def _lora_sites(backbone: Any, answer: Any) -> Any:
    from ttt.plugins.lora_site import LoraSite

    if not isinstance(answer, Sequence) or not answer:
        raise WrongAnswer(f"{in_short(answer)}, not a sequence of LoraSite, one for each linear layer")
    for number, site in enumerate(answer):
        if not isinstance(site, LoraSite):
            raise WrongAnswer(f"{_named(site)} as number {number}, not a LoraSite")
        wrong = next(iter(_wrong_in_lora(site)), None)
        if wrong is not None:
            raise WrongAnswer(f"a LoraSite, number {number}, whose {wrong}")
    return answer


def _wrong_in_lora(site: Any) -> Iterable[str]:
    """What is wrong with the fields of a place for LoRA, a clause each."""
    from torch import nn

    if not isinstance(site.path, str) or not site.path:
        yield f"path is {_named(site.path)}, not the name of a module"
    if not isinstance(site.linear, nn.Linear):
        yield f"linear is {_named(site.linear)}, not a torch.nn.Linear"
    if (site.host is None) != (site.host_class is None):
        yield "host and host_class are not given together"
    if site.host is not None and not isinstance(site.host, nn.Module):
        yield f"host is {_named(site.host)}, not a torch.nn.Module"
    if site.host_class is not None and not (
        isinstance(site.host_class, type) and issubclass(site.host_class, nn.Module)
    ):
        yield f"host_class is {site.host_class!r:.80}, not a subclass of torch.nn.Module"


def _lora_shapes(backbone: Any, answer: Any) -> Any:
    if answer is None:
        return answer
    if not isinstance(answer, Mapping) or not answer:
        raise WrongAnswer(f"{_named(answer)}, not a mapping of (input width, output width) to how many there are")
    for shape, count in answer.items():
        pair = isinstance(shape, tuple) and len(shape) == 2 and all(is_whole(width, least=1) for width in shape)
        if not pair or not is_whole(count, least=1):
            raise WrongAnswer(f"the shape {shape!r:.80} {count!r:.80} times, not a pair of widths and a count")
    return answer


def _lora_tensors(backbone: Any, answer: Any) -> Any:
    from torch import Tensor

    return _mapping(Tensor, "names to tensors")(backbone, answer)


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
    **SCORING_ANSWERS,
    "explanations": _explanations,
    "presets": _presets,
    "facts": _facts,
    "files": _files,
    "identity": _mapping(object, "options' names to their values"),
    "has_eval_data": _truth,
    "has_own_data": _truth,
    "has_own_eval_data": _truth,
    "plan_sample": _plan,
    "build": _module,
    "provenance": _mapping(str, "texts to texts"),
    "describe_model": _sentences,
    "sites": _sites,
    "blocks": _blocks,
    "dataset": _dataset,
    "loss": _loss,
    "loss_weights": _loss_weights,
    "is_attention": _truth,
    "read_data": _sentences,
    "sample": paths,
    "prepare_samples": _maker("prepare_samples", "a SampleRequest"),
    "plan_answer": paths,
    "prepare_answers": _maker("prepare_answers", "an AnswerRequest"),
    "import_weights": paths,
    "tiny": _options,
    "tiny_like": _options,
    "example_batch": _batch,
    "outputs": _outputs,
    "perturb": _batch,
    "stream": _outputs,
    "lora_sites": _lora_sites,
    "lora_shapes": _lora_shapes,
    "read_lora": _lora_tensors,
    "reset_at_segments": _context_manager,
    "find_recordings": _recordings,
    "measure_recording": _seconds,
}
"""The check of each method's answer, by the method's name. The other methods return nothing."""
