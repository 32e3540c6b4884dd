"""What `ttt check` finds in the config of a causal language model (HF…), without torch or `transformers`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ttt.config import Blame, Code, Finding, RunConfig, Severity
from ttt.config.sources import DATA_KEYS, places_of
from ttt.config.spelling import nearest
from ttt.errors import EnvironmentProblem
from ttt.foreign import ENOUGH, foreign
from ttt.hf.documents import LINES, ROWS, Source, find_source
from ttt.hf.facts import BYTE_VOCABULARY, OTHER_NAMES, known_config, loaded_config, size_in, small_config
from ttt.hf.options import CausalLMOptions, TextData
from ttt.plugins.rules import rule
from ttt.reading import read_start, unreadable

_code = partial(Code, home=__name__)
_data = partial(_code, of_training=True, blames=Blame.MACHINE)
HF101 = _code("HF101", "a key that no config of a model has", Severity.WARNING)
HF102 = _code("HF102", "a config that is not the model's", Severity.ERROR)
HF103 = _code("HF103", "more tokens than the model knows", Severity.ERROR)
HF301 = _code("HF301", "windows longer than the model's positions", Severity.WARNING, of_training=True)
HF302 = _code("HF302", "a limit of attention that limits nothing", Severity.WARNING, of_training=True)
HF501 = _code("HF501", "a pretrained model without data", Severity.ERROR, of_training=True)
HF502 = _data("HF502", "texts that cannot be read", Severity.ERROR)
HF601 = _code("HF601", "a package that is missing", Severity.ERROR, blames=Blame.MACHINE)

_PARQUET = b"PAR1"
"""What such a file begins with."""
_START = 1 << 16
"""Bytes of a text file that a check reads, to stay instant."""
_MOST_FILES = 500
_MOST_READ = 20
_SPECIAL = ("rope_theta", "tie_word_embeddings", "rms_norm_eps", "layer_norm_eps", "hidden_act", "initializer_range")
"""Keys that many configs have, beside the sizes."""


@rule(HF101, reads=("backbone.config", "backbone.model"))
def keys_are_spelt(config: RunConfig[CausalLMOptions, TextData]) -> Iterator[Finding]:
    """A key of the config is not nearly one that models have."""
    written = config.backbone.config or {}
    known = {*small_config({}), *OTHER_NAMES, *_SPECIAL, "model_type"}
    real = known | {name for names in OTHER_NAMES.values() for name in names}
    for key in written:
        close = None if key in real else nearest(key, sorted(known))
        if close is not None and close not in written:
            yield HF101.at(
                "backbone.config", f"{key!r} looks like a misspelling of {close}", f"write {close}", value=key
            )


@rule(HF102, reads=("backbone",))
def config_is_the_models(config: RunConfig[CausalLMOptions, TextData]) -> Iterator[Finding]:
    """What is written is what the model's own `config.json` says, if that is on this machine."""
    options = config.backbone
    theirs = None if options.config is None else loaded_config(options)
    for key, value in (options.config or {}).items() if theirs is not None else ():
        other = size_in(theirs or {}, key) if key in OTHER_NAMES else (theirs or {}).get(key, value)
        if other is not None and other != value:
            yield HF102.at(
                "backbone.config",
                f"{key} is {value!r}, and {options.model} has {other!r}; the run stops when the model is loaded",
                f"write {key}: {other}, or leave it out",
                value=value,
            )


@rule(HF103, reads=("backbone",))
def bytes_fit(config: RunConfig[CausalLMOptions, TextData]) -> Iterator[Finding]:
    """A model that reads bytes has a token for each."""
    options = config.backbone
    size = size_in(known_config(options), "vocab_size")
    bytewise = options.tokenizer == "bytes" or (options.tokenizer is None and options.model is None)
    if bytewise and size is not None and size < BYTE_VOCABULARY:
        yield HF103.at(
            "backbone.config",
            f"vocab_size is {size}, and the byte-level tokenizer has {BYTE_VOCABULARY} tokens",
            f"write vocab_size: {BYTE_VOCABULARY} or more, or leave it out",
            value=size,
        )


@rule(HF301, HF302, reads=("backbone", "data.window_tokens"))
def windows_fit(config: RunConfig[CausalLMOptions, TextData]) -> Iterator[Finding]:
    """A window is not longer than the model's positions, and longer than what attention sees if that is limited."""
    options, length = config.backbone, config.data.window_tokens
    most = size_in(known_config(options), "max_position_embeddings")
    if most is not None and length > most:
        yield HF301.at(
            "data.window_tokens",
            f"a window is {length:,} tokens, and the model was made for {most:,} positions: those beyond are new to "
            f"it, or refused if it has learned a vector for each",
            f"write window_tokens: {most} or less",
            value=length,
        )
    limit = options.attention_window
    if limit is not None and limit >= length:
        yield HF302.at(
            "backbone.attention_window",
            f"attention_window: {limit:,} limits nothing in windows of {length:,} tokens: attention sees all of them",
            "write a smaller attention_window, or longer windows",
            value=limit,
        )


@rule(HF501, reads=("backbone.model", "data.train_data"))
def data_is_named(config: RunConfig[CausalLMOptions, TextData]) -> Iterator[Finding]:
    """If a pretrained model is trained, the config names data."""
    if config.backbone.model is not None and config.data.train_data is None:
        yield HF501.at(
            "data.train_data",
            "a pretrained model has no data of its own, and none are named",
            "write a text file, a .jsonl, a .parquet, or a folder of them",
        )


@rule(HF502, HF601, reads=("data.train_data", "data.eval_data"))
def texts_can_be_read(config: RunConfig[CausalLMOptions, TextData]) -> Iterator[Finding]:
    """The data are text files, or folders with some; what is not there is told by a rule of the core."""
    for key in DATA_KEYS:
        for place, source in places_of(config.data, key).items():
            if _exists(source.path):
                yield from _text_can_be_read(source.path, place)


def _text_can_be_read(written: str, place: str) -> Iterator[Finding]:
    try:
        source = find_source(written, field=place, most=_MOST_FILES)
        problem = _wrong_with(source)
    except EnvironmentProblem as error:
        yield HF502.at(error.key or place, error.told.removeprefix(f"{error.key}: "), error.fix)
        return
    if problem is not None:
        told, fix = problem
        yield HF502.at(place, f"{told}; the run stops before its first step", fix)
    if any(file.suffix.lower() == ROWS for file in source.files) and find_spec("datasets") is None:
        yield _missing(place, "Parquet", ("datasets",))


@rule(HF601, reads=("backbone.gguf_file",))
def packages_are_there(config: RunConfig[CausalLMOptions, TextData]) -> Iterator[Finding]:
    """What reads a model, and a GGUF file, is installed."""
    needed: dict[str, tuple[str, ...]] = {"backbone.name": ("transformers",)}
    if config.backbone.gguf_file is not None:
        needed["backbone.gguf_file"] = ("gguf", "accelerate")
    for key, packages in needed.items():
        missing = tuple(package for package in packages if find_spec(package) is None)
        if missing:
            yield _missing(key, "a GGUF file" if key == "backbone.gguf_file" else "the model", missing)


RULES = (
    *(keys_are_spelt, config_is_the_models, bytes_fit, windows_fit),
    *(data_is_named, texts_can_be_read, packages_are_there),
)


def _missing(key: str, what: str, packages: tuple[str, ...]) -> Finding:
    told = f"reading {what} needs the package {' and '.join(packages)}, which is not installed"
    return HF601.at(key, told, f"pip install {' '.join(packages)}")


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _wrong_with(source: Source) -> tuple[str, str] | None:
    """What is wrong with the first of the files, and what to do; None if nothing is. A rule of the core reads lines."""
    files = [file for file in source.files if file.suffix.lower() != LINES]
    for file in files[:_MOST_READ]:
        try:
            start = read_start(file, _START)
        except OSError as error:
            return f"{file} cannot be read: {unreadable(error)}", "make it readable, or name others"
        if file.suffix.lower() == ROWS:
            if not start.startswith(_PARQUET):
                return f"{file} is no Parquet file", "write it anew, or give it the ending of what it is"
        elif (kind := foreign(start[:ENOUGH], file)) is not None:
            return f"{file} is {kind.words}, not a text", kind.way_to_text
        elif (place := _not_utf8(start)) is not None:
            return f"{file} is not text in UTF-8 (byte {place:,})", "save it as text in UTF-8"
        elif not start and len(source.files) == 1:
            return f"{file} is empty", "name a text file, a .jsonl, a .parquet, or a folder of them"
    return None


def _not_utf8(start: bytes) -> int | None:
    """The number of the first byte that is not; None if all are, but for a letter that the end cuts."""
    try:
        start.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(start) < _START or error.start < len(start) - 4:
            return error.start + 1
    return None
