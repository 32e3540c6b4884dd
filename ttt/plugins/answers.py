"""Checks of what a backbone's methods return, so that a wrong answer is reported at once and not where it fails later.

Each check takes the backbone and its answer, and returns the answer or raises `WrongAnswer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ttt.plugins.answer_parts import Check, in_short, instance, is_whole, paths, require_whole
from ttt.plugins.asking import WrongAnswer, asked
from ttt.plugins.asking import with_its_type as _named
from ttt.plugins.data_answers import DATA_ANSWERS
from ttt.plugins.scoring_answers import SCORING_ANSWERS

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


def _context_manager(backbone: Any, answer: Any) -> Any:
    if not hasattr(answer, "__enter__") or not hasattr(answer, "__exit__"):
        raise WrongAnswer(f"{_named(answer)}, not a context manager")
    return answer


ANSWERS: Mapping[str, Check] = {
    **SCORING_ANSWERS,
    **DATA_ANSWERS,
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
    "is_attention": _truth,
    "read_data": _sentences,
    "sample": paths,
    "prepare_samples": _maker("prepare_samples", "a SampleRequest"),
    "plan_answer": paths,
    "prepare_answers": _maker("prepare_answers", "an AnswerRequest"),
    "import_weights": paths,
    "tiny": _options,
    "tiny_like": _options,
    "lora_sites": _lora_sites,
    "lora_shapes": _lora_shapes,
    "read_lora": _lora_tensors,
    "reset_at_segments": _context_manager,
}
"""The check of each method's answer, by the method's name. The other methods return nothing."""
