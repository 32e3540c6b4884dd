"""The data of a run, its evaluation, and the weights that it starts from (TTT5xx)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_origin

from ttt.check.model_keys import types_at
from ttt.check.overlap import overlap, shared
from ttt.check.recordings import Lines
from ttt.check.rules.rule import FACTS, NEEDED, Context, rule
from ttt.config.findings import Blame, Code, Family, Finding, Severity
from ttt.config.schema import select_layers
from ttt.config.sources import DATA_KEYS, places_of, sources_of
from ttt.errors import EnvironmentProblem
from ttt.files import NEVER_MEANT, FileKind, kind_of_file
from ttt.reading import open_file, other_kind, unreadable
from ttt.words import first_few

if TYPE_CHECKING:
    from ttt.adapter_file import AdapterInfo, ChangedSetting
    from ttt.config.schema import RunConfig
    from ttt.plugins import NeededFile


_WEIGHT = re.compile(r"[0-9]*\.?[0-9]+")
_code = partial(Code, family=Family.DATA, of_training=True, home=__name__)
TTT501 = _code("TTT501", "data that is not there", Severity.ERROR, blames=Blame.MACHINE)
TTT502 = _code("TTT502", "evaluation on the training data", Severity.NOTE)
TTT503 = _code("TTT503", "an evaluation that never comes", Severity.WARNING)
TTT517 = _code("TTT517", "a number of steps that the run does not have", Severity.WARNING)
TTT504 = _code("TTT504", "lines of data that are not JSON", Severity.ERROR, blames=Blame.MACHINE)
TTT505 = _code("TTT505", "lines of data without their keys", Severity.ERROR, blames=Blame.MACHINE)
TTT506 = _code("TTT506", "recordings that are not there", Severity.ERROR, blames=Blame.MACHINE)
TTT507 = _code("TTT507", "recordings shorter than a window", Severity.NOTE)
TTT508 = _code("TTT508", "recordings without what lies beside them", Severity.ERROR, blames=Blame.MACHINE)
TTT509 = _code("TTT509", "weights to start from that are not there", Severity.ERROR, blames=Blame.MACHINE)
TTT510 = _code("TTT510", "weights to start from that belong to something else", Severity.ERROR)
TTT511 = _code("TTT511", "a run that goes on with other settings than what it starts from", Severity.NOTE)
TTT520 = _code("TTT520", "a file of the model that is something else", Severity.ERROR, blames=Blame.MACHINE)


@rule(TTT501, reads=("data.train_data", "data.eval_data"))
def files_exist(context: Context) -> Iterator[Finding]:
    """The data that a config names exists."""
    data = context.config.data
    for key in DATA_KEYS:
        for place, source in places_of(data, key).items():
            yield from _not_there(context, key, place, source.path)


def _not_there(context: Context, key: str, place: str, written: str) -> Iterator[Finding]:
    kind = other_kind(written)
    if kind not in (None, "a folder"):
        yield TTT501.at(
            place,
            message=f"{written!r} is {kind}, not a file; data are read more than once",
            fix="write the path of a file or of a folder of them",
            value=written,
        )
    if _exists(written):
        return
    where = "" if Path(written).is_absolute() else f" in {Path.cwd()}, from where relative paths are read"
    home = "; ~ is not expanded" if written.startswith("~") else ""
    alone = place == f"data.{key}"
    several = _several(written) if alone and _takes_several(context, key) else ""
    yield TTT501.at(
        place,
        message=f"{written!r} does not exist{where}{home}",
        fix=several or f"write the path of the data{_way_to_make(context)}{_or_null(context, key) if alone else ''}",
        value=written,
    )


@rule(TTT501, TTT520, reads=("backbone",))
def files_of_the_model_can_be_read(context: Context) -> Iterator[Finding]:
    """Each file that the backbone's options name is there, can be read, and is what it should be."""
    for name, needed in context.needed_files.items():
        path, fix = f"backbone.{name}", f"write the path of the {needed.what}"
        missing = _unreadable(needed.path)
        if missing is not None:
            yield TTT501.at(path, message=f"{needed.path!r} {missing}", fix=fix, value=needed.path)
            continue
        kind = _other_kind_than(needed)
        if kind is not None:
            told = f"{needed.path!r} is {kind.words}"
            yield TTT520.at(path, message=told, fix=kind.way_out or fix, value=needed.path)


def _unreadable(written: str) -> str | None:
    """Why a file cannot be read, as the rest of a sentence; None if it can."""
    try:
        open_file(written).close()
    except FileNotFoundError:
        where = "" if Path(written).is_absolute() else f" in {Path.cwd()}, from where relative paths are read"
        home = "; ~ is not expanded" if written.startswith("~") else ""
        return f"does not exist{where}{home}"
    except OSError as error:
        kind = other_kind(written)
        return f"is {kind}, not a file" if kind else f"cannot be read: {unreadable(error)}"
    return None


def _other_kind_than(needed: NeededFile) -> FileKind | None:
    """What a file is if it is not what is needed; None if it may be that."""
    kind = kind_of_file(needed.path)
    if kind is None or kind.name in needed.kinds or (not needed.kinds and kind.name not in NEVER_MEANT):
        return None
    return kind


def _takes_several(context: Context, key: str) -> bool:
    """Whether the backbone's data may be a list of sources."""
    return any(get_origin(kind) is tuple for kind in types_at(type(context.config), ("data", key)))


def _several(written: str) -> str:
    """The fix for what moshi-finetune takes as several sources, `a.jsonl:2,b.jsonl`; empty if it is one path."""
    parts = [part.strip().rpartition(":") for part in written.split(",") if part.strip()]
    named = [
        (path, weight) if path and _WEIGHT.fullmatch(weight) else (path + colon + weight, "1")
        for path, colon, weight in parts
    ]
    if len(named) < 2 and named == [(written, "1")]:
        return ""
    return "write a list, [" + ", ".join(f"{{path: {path}, weight: {weight}}}" for path, weight in named) + "]"


def _or_null(context: Context, key: str) -> str:
    """What null means for data, as the rest of a sentence; empty for training data that the backbone does not have."""
    if key == "eval_data":
        return ", or null"
    backbone = context.known_backbone
    own = backbone is not None and backbone.has_own_data(context.config.backbone)
    return ", or null for the demo data" if own else ""


def _way_to_make(context: Context) -> str:
    """The command that makes a backbone's data, if it has one, as the rest of a sentence."""
    from ttt.plugins import Precomputing, has_capability

    backbone = context.known_backbone
    made = has_capability(backbone, Precomputing) and backbone.precomputed_data == "train_data"
    return ", make it with `ttt precompute`" if made else ""


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


@rule(TTT502, reads=("data.train_data", "data.eval_data"))
def measures_unseen_data(context: Context) -> Iterator[Finding]:
    """A config with its own training data has its own held-out data, and training does not read these."""
    data = context.config.data
    if data.eval_data is not None:
        for place, (path, how) in _read_by_training(context).items():
            yield _seen(place, f"the held-out data {path!r} {how} training data", Severity.WARNING)
    elif any(_exists(source.path) for source in sources_of(data, "train_data")):
        yield _seen("data.train_data", "the evaluation reads the training data", Severity.NOTE)


@rule(TTT502, reads=("data", FACTS))
def measures_unseen_recordings(context: Context) -> Iterator[Finding]:
    """No recording of the held-out data is in the lists of training too, whatever lists name it."""
    if context.config.data.eval_data is None or _read_by_training(context):
        return
    of_training, of_evaluation = (context.recordings(key) for key in DATA_KEYS)
    if of_training is not None and of_evaluation is not None:
        count, known = shared(of_evaluation.files, of_training.files), len(of_evaluation.files)
        if count:
            told = f"{count} of {known} recordings of the held-out data {'is' if count == 1 else 'are'} training data"
            yield _seen("data.eval_data", told, Severity.WARNING)


def _read_by_training(context: Context) -> dict[str, tuple[str, str]]:
    """The sources of held-out data that training reads, by their keys: the path, and what it is to training."""
    data = context.config.data
    trained = [source.path for source in sources_of(data, "train_data")]
    found = {
        place: (source.path, overlap(source.path, trained)) for place, source in places_of(data, "eval_data").items()
    }
    return {place: (path, how) for place, (path, how) in found.items() if how is not None}


def _seen(place: str, what: str, severity: Severity) -> Finding:
    subject = "it" if severity is Severity.NOTE else "the evaluation"
    return TTT502.at(
        place,
        message=f"{what}, so {subject} does not tell learning from memorising",
        fix="write data.eval_data with data that is held out",
        severity=severity,
    )


@rule(TTT503, reads=("eval.eval_freq", "train.max_steps"))
def evaluates(context: Context) -> Iterator[Finding]:
    """The first evaluation comes before the run ends."""
    freq, steps = context.config.eval.eval_freq, context.config.train.max_steps
    if freq > steps:
        yield TTT503.at(
            "eval.eval_freq",
            message=f"an evaluation every {freq} steps never comes in a run of {steps}; only the one at the end does",
            fix=f"write eval_freq: 0 for the end alone, or at most {steps}",
            value=freq,
            replacement="0",
        )


_EVERY = {
    "ckpt_freq": (
        Severity.WARNING,
        "a checkpoint",
        "the one at the end does",
        "write ckpt_freq: 0 for the end alone, or at most",
    ),
    "log_freq": (Severity.NOTE, "a line of metrics.jsonl", "the first step and the last have one", "write at most"),
    "evidence_freq": (
        Severity.NOTE,
        "a measurement of the layers",
        "the first step and the last have one",
        "write at most",
    ),
}
"""Keys of `train` that count steps between two of something: what that is, what comes all the same, what to write."""


@rule(TTT517, reads=("train",))
def counts_steps_of_the_run(context: Context) -> Iterator[Finding]:
    """What a run does every so many steps, it does before its end."""
    train = context.config.train
    for key, (severity, what, anyway, instead) in _EVERY.items():
        freq, default = getattr(train, key), type(train).model_fields[key].default
        if freq > train.max_steps and freq != default:  # a default is nobody's mistake, also if a stored config has it
            yield TTT517.at(
                f"train.{key}",
                message=f"{what} every {freq} steps never comes in a run of {train.max_steps}; only {anyway}",
                fix=f"{instead} {train.max_steps}",
                value=freq,
                severity=severity,
                replacement="0" if key == "ckpt_freq" else None,
            )


_BROKEN = (
    (TTT504, "unparsed", "not a JSON object", "write one JSON object on each line, such as {example}"),
    (TTT505, "lacking", "{lacking}", "write lines such as {example}"),
    (TTT506, "missing", "of a file that is not there", "correct the paths; they start at the folder of the .jsonl"),
    (
        TTT508,
        "alone",
        "of a file without its {beside} beside it",
        "write the {beside} of each, or leave the line out",
    ),
)
"""Code, the field of `Lines` or `Recordings`, the words for a line ("1 of 2 lines is …"), and the fix."""


@rule(TTT501, TTT504, TTT505, TTT506, TTT508, reads=("data", FACTS))
def lines_can_be_read(context: Context) -> Iterator[Finding]:
    """Every line of the data is what training reads, or names a recording that it can open."""
    form = context.facts.recordings or context.facts.lines
    if form is None:
        return
    beside = getattr(form, "beside", None)
    for key in DATA_KEYS:
        for place, lines in context.lines(key).items():
            if lines.foreign:
                yield TTT504.at(
                    place,
                    message=f"{first_few(lines.foreign)}; the run stops before its first step",
                    fix=f"a list is text, with lines such as {form.example}",
                    value=len(lines.foreign),
                )
            elif not lines.count:
                source = places_of(context.config.data, key)[place]
                bare = source in getattr(form, "bare", ())
                yield TTT501.at(
                    place,
                    message=(
                        f"{source.path!r} holds no line of data{', and no recording' if bare else ''}; the run stops "
                        f"before its first step"
                    ),
                    fix=f"write a .jsonl with lines such as {form.example}"
                    + (f", or put recordings there ({', '.join(getattr(form, 'suffixes', ()))})" if bare else ""),
                )
            yield from _broken(lines, place, form.example, beside=beside, lacking=form.lacking)


def _broken(lines: Lines, place: str, example: str, *, beside: str | None, lacking: str) -> Iterator[Finding]:
    for code, kind, words, fix in _BROKEN:
        places = getattr(lines, kind, ())
        if places:
            told = f"{_share(places, lines)} {words.format(beside=beside, lacking=lacking)}"
            yield code.at(
                place,
                message=f"{told}: {first_few(places)}; the run stops before its first step",
                fix=fix.replace("{example}", example).replace("{beside}", beside or ""),
                value=len(places),
            )


@rule(TTT507, reads=("data", FACTS))
def recordings_fill_windows(context: Context) -> Iterator[Finding]:
    """More than half of the recordings are at least as long as a window."""
    form = context.facts.recordings
    if form is None:
        return
    for key in DATA_KEYS:
        lines = context.recordings(key)
        if lines is None or not lines.seconds:
            continue
        short = [place for place, seconds in zip(lines.places, lines.seconds, strict=True) if seconds < form.window_sec]
        windows = sum(math.ceil(seconds / form.window_sec) for seconds in lines.seconds)
        padding = 1 - sum(lines.seconds) / (windows * form.window_sec)
        if len(short) * 2 >= len(lines.seconds):
            yield TTT507.at(
                f"data.{key}",
                message=(
                    f"{_share(short, lines)} shorter than {context.facts.window}: {first_few(short)}; {padding:.0%} "
                    f"of what is computed is padding"
                ),
                fix="write a window as long as most recordings, or join short ones",
                value=len(short),
            )


@rule(TTT509, reads=("train.init_from",))
def start_can_be_read(context: Context) -> Iterator[Finding]:
    """What a run starts from exists, is complete, and is an adapter."""
    start, written = context.start, context.config.train.init_from
    if not isinstance(start, EnvironmentProblem) or written is None:
        return
    there = _exists(written)
    where = "" if there or Path(written).is_absolute() else f" (relative paths are read from {Path.cwd()})"
    yield TTT509.at(
        "train.init_from",
        message=f"nothing can be started from {written!r}: {start}{where}",
        fix="write the folder of a run with a complete checkpoint, or of an adapter; or null to start anew",
        value=written,
    )


@rule(TTT510, TTT511, reads=("train.init_from", "backbone", "ttt", FACTS, NEEDED))
def start_fits(context: Context) -> Iterator[Finding]:
    """What a run starts from belongs to the same backbone and layers."""
    start = context.start
    if start is None or isinstance(start, EnvironmentProblem):
        return
    from ttt.adapter_file import backbone_identity, changed_at_start, config_differences

    config, backbone = context.config, context.backbone
    layers = select_layers(config.injected.layers, context.facts.num_layers)
    identity = backbone_identity(backbone, config.backbone)
    lora = config.lora if config.has_lora else None
    differences = config_differences(start, config.ttt, backbone=identity, layers=layers, lora=lora, as_start=True)
    changed = changed_at_start(start, config.ttt)
    # A setting that the user writes may change on purpose; a default may not.
    differences += [str(setting) for setting in changed if not context.is_written(setting.key)]
    for setting in changed if not differences else ():
        yield TTT511.at(
            setting.key,
            message=f"{setting}: the same tensors compute something else than where {config.train.init_from!r} learned",
            fix=f"give {setting.way_out} to go on as it was, unless the change is meant",
            value=setting.ours,
        )
    if differences:
        yield TTT510.at(
            "train.init_from",
            message=f"{config.train.init_from!r} belongs to something else: {'; '.join(differences)}",
            fix=_as_in_the_file(start, config, changed) or "write these as they are in the file, or another init_from",
            value=len(differences),
        )


def _as_in_the_file(start: AdapterInfo, config: RunConfig, changed: Sequence[ChangedSetting]) -> str:
    """The fix if settings differ from the file's; empty if none does."""
    from ttt.adapter_file import way_to_fit

    given = " ".join(setting.way_out for setting in changed)
    lora = config.lora if config.has_lora else None
    has_ttt = config.injected.layers not in ("none", ())
    way_out = way_to_fit(start, config.ttt, has_ttt=has_ttt, lora=lora, as_start=True)
    way_out = way_out or ("give the config the file's:" if changed else "")
    return f"{way_out} {given}".strip() + (", or another init_from" if way_out else "")


def _share(places: Sequence[str], lines: Lines) -> str:
    count = f"{len(places)} of {lines.count}" + ("" if lines.complete else " (the first that were read)")
    return f"{count} lines {'is' if len(places) == 1 else 'are'}"
