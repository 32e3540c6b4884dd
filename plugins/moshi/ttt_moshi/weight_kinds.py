"""Which kind of weights a safetensors file holds, by the names of its tensors, and how many of them a model has.

It is asked for messages: weights in another program's format, of another part of Moshi or of another model would else
end in a list of a thousand missing keys. This module imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from ttt.errors import EnvironmentProblem
from ttt.files import Header, kind_of_file, read_header
from ttt.plugins import NeededFile
from ttt.words import first_few
from ttt_moshi.model_config import ModelConfig

FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
"""The types of weights that are not quantised, in safetensors' words."""

_OLD_NAMES: Final = re.compile(r"(.*self_attn)\.(in|out)_proj(?:_weight|\.weight)$")
"""kyutai's older names of attention, whose weights are stacked; `LMModel` still loads them."""


class WeightKind(NamedTuple):
    """A kind of weights."""

    words: str
    """With its article."""
    fix: str
    """What to write instead."""
    option: str | None = None
    """The option that names such a file, if it is kyutai's own format."""


def kind_of_weights(header: Header) -> WeightKind | None:
    """What the tensors are of, as far as their names tell."""
    return next((kind for is_it, kind in _KINDS if is_it(header)), None)


def require_weights(file: Path, expected: Mapping[str, tuple[int, ...]], *, option: str, key: str, fix: str) -> None:
    """Compare the tensors of a file with those of the model that it is loaded into; reads no tensor.

    Args:
        file: the safetensors file.
        expected: the model's tensors, shapes by name.
        option: what the file should be, `moshi_path` or `mimi_path`.
        key: the config's key that is to blame: that option's, or the repository's.
        fix: what to write, if the kind of the file does not tell.

    Raises:
        EnvironmentProblem: it is no safetensors file, or holds something else.
    """
    try:
        header = read_header(file)
    except EnvironmentProblem as problem:
        raise EnvironmentProblem(str(problem), key=key, fix=_AGAIN) from None
    shapes = {name: facts.shape for name, facts in header.tensors.items()}
    odd = [f"{name} is not in the model" for name in shapes if not _has_place(name, expected)]
    lacking = [f"{name} is missing" for name in expected if name not in shapes and not _is_stacked(name, shapes)]
    other = [
        f"{name} has the shape {list(shapes[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    quantised = {name: facts.dtype for name, facts in header.tensors.items() if facts.dtype not in FLOATS}
    if not (odd or lacking or other or quantised):
        return
    kind = kind_of_weights(header)
    if quantised and (kind is None or kind.option == option):
        kind = WeightKind(f"quantised weights ({', '.join(sorted(set(quantised.values())))})", _PLAIN)
    whole = shapes.keys() - quantised.keys()
    fitting = sum(shapes[name] == expected.get(name) or _has_old_name(name, expected) for name in whole)
    told = f"{file}: {fitting} of its {len(shapes)} tensors fit {_MODELS[option]}, which has {len(expected)}"
    if kind is None or kind.option == option:  # then the differences tell more than the name of the kind
        raise EnvironmentProblem(f"{told}: {first_few([*other, *odd, *lacking])}", key=key, fix=fix)
    raise EnvironmentProblem(f"{told}; it looks like {kind.words}", key=key, fix=kind.fix)


_MODELS: Final = {
    "moshi_path": "the language model",
    "mimi_path": "the codec Mimi",
    "lora_path": "a LoRA by moshi-finetune",
}


def look_at_weights(files: Mapping[str, NeededFile], config: ModelConfig) -> None:
    """What the headers of local weights tell before torch is imported: their kind, and the sizes of the language model.

    Files that are missing or no safetensors files are left to the rules of `ttt check`.

    Args:
        files: by option, as `needed_files` gives them.
        config: of the model.

    Raises:
        EnvironmentProblem: one is cut short, or of another kind or size.
    """
    for option in _MODELS:
        file = None if option not in files else Path(files[option].path)
        if file is None or not _is_safetensors(file):
            continue
        key = f"backbone.{option}"
        try:
            header = read_header(file)
        except EnvironmentProblem as problem:
            raise EnvironmentProblem(str(problem), key=key, fix=_AGAIN) from None
        kind = kind_of_weights(header)
        if kind is not None and kind.option != option:
            raise EnvironmentProblem(f"{file} looks like {kind.words}, not {_MODELS[option]}", key=key, fix=kind.fix)
        odd = list(_other_sizes(header, config)) if option == "moshi_path" else []
        if odd:
            raise EnvironmentProblem(
                f"{file} is not of the model that the config.json describes: {first_few(odd)}", key=key, fix=SAME_MODEL
            )


_AGAIN: Final = "fetch it again, or write the path of another"
SAME_MODEL: Final = "write the weights and, as backbone.config_path, the config.json of the same model"


def _is_safetensors(file: Path) -> bool:
    try:
        kind = kind_of_file(file)
    except (OSError, ValueError):
        return False
    return kind is not None and kind.name == "safetensors file"


def _other_sizes(header: Header, config: ModelConfig) -> Iterator[str]:
    """The sizes in which weights of a language model are not those of its config."""
    numbers = dict.fromkeys(("emb", "transformer.layers", "linears"), -1)
    for name in header.tensors:
        found = _NUMBERED.match(name)
        if found is not None:
            numbers[found[1]] = max(numbers[found[1]], int(found[2]))
    wanted = {"emb": config.n_q, "transformer.layers": config.num_layers, "linears": config.dep_q}
    for part, name in (("emb", "n_q"), ("transformer.layers", "num_layers"), ("linears", "dep_q")):
        if numbers[part] + 1 != wanted[part]:
            yield f"{name} is {wanted[part]} there, but the weights have {numbers[part] + 1}"
    text = header.tensors.get("text_emb.weight")
    shape = (config.text_card + 1, config.dim)
    if text is not None and text.shape != shape:
        yield f"text_emb.weight has the shape {list(text.shape)}, not {list(shape)}"


_NUMBERED: Final = re.compile(r"(emb|transformer\.layers|linears)\.(\d+)\.")


def _has_place(name: str, expected: Mapping[str, tuple[int, ...]]) -> bool:
    return name in expected or _has_old_name(name, expected)


def _has_old_name(name: str, expected: Mapping[str, tuple[int, ...]]) -> bool:
    found = _OLD_NAMES.match(name)
    return found is not None and f"{found[1]}.{found[2]}_projs.0.weight" in expected


def _is_stacked(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a weight of attention is in the file under its older name, together with its neighbours."""
    found = re.match(r"(.*self_attn)\.(in|out)_projs\.\d+\.weight$", name)
    return found is not None and any(f"{found[1]}.{found[2]}_proj{end}" in shapes for end in ("_weight", ".weight"))


# --- kinds ---

_PLAIN: Final = "write the bfloat16 weights, as of kyutai/moshiko-pytorch-bf16"
_Test = Callable[[Header], bool]


def _has(*parts: str) -> _Test:
    """Whether each part is in the name of some tensor."""
    return lambda header: all(any(part in name for name in header.tensors) for part in parts)


def _starts(*starts: str) -> _Test:
    """Whether some tensor's name starts with each."""
    return lambda header: all(any(name.startswith(start) for name in header.tensors) for start in starts)


def _says(form: str) -> _Test:
    return lambda header: header.metadata.get("format") == form


def _all(*tests: _Test) -> _Test:
    return lambda header: all(test(header) for test in tests)


_OWN_NAME: Final = "write it as backbone.{}, and {} here"
_KINDS: Final[tuple[tuple[_Test, WeightKind], ...]] = (
    (
        _says("ttt-adapter"),
        WeightKind(
            "an adapter by ttt", "write the backbone's own weights; train.init_from and `ttt eval` take an adapter"
        ),
    ),
    (_says("ttt-backbone"), WeightKind("backbone parameters that were trained beside an adapter", _PLAIN)),
    (
        _starts("base_model.model."),
        WeightKind("a LoRA by PEFT", "merge it with PEFT first; backbone.lora_path takes those by moshi-finetune"),
    ),
    (
        _has(".lora_A.weight", ".lora_B.weight"),
        WeightKind(
            "a LoRA by moshi-finetune", _OWN_NAME.format("lora_path", "the weights that it was trained on"), "lora_path"
        ),
    ),
    (_has("_scb"), WeightKind("weights of kyutai's that are quantised to 8 bits", _PLAIN)),
    (_has(".scales", ".biases"), WeightKind("quantised weights for MLX", _PLAIN)),
    (_starts("depformer.slices."), WeightKind("weights for MLX", _PLAIN)),
    (
        _has("depth_decoder.", "decoder."),
        WeightKind("Moshi's weights in the format of transformers (MoshiForConditionalGeneration)", _PLAIN),
    ),
    (
        _has("semantic_residual_vector_quantizer"),
        WeightKind(
            "Mimi's weights in the format of transformers (MimiModel)",
            "write kyutai's file, tokenizer-e351c8d8-checkpoint125.safetensors of kyutai/moshiko-pytorch-bf16",
        ),
    ),
    (
        _has("quantizer.rvq_first.", "encoder.model."),
        WeightKind("weights of the codec Mimi", _OWN_NAME.format("mimi_path", "the language model's"), "mimi_path"),
    ),
    (
        _starts("text_emb.", "transformer.layers.", "linears."),
        WeightKind("weights of a Moshi language model", _OWN_NAME.format("moshi_path", "Mimi's"), "moshi_path"),
    ),
    (
        lambda header: header.tensors.keys() == {"codebooks"},
        WeightKind("the codec of the demo", "write the weights of kyutai's Mimi"),
    ),
    (_has("model.layers.", "embed_tokens"), WeightKind("a language model of transformers", _PLAIN)),
)
"""Tests in the order in which they are made."""
