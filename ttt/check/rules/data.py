"""The data of a run, its evaluation, and the weights that it starts from (TTT5xx)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ttt.check.recordings import Lines
from ttt.check.rules.rule import FACTS, NEEDED, Context, rule
from ttt.config.findings import Blame, Code, Family, Finding, Severity
from ttt.config.schema import select_layers
from ttt.errors import EnvironmentProblem
from ttt.files import NEVER_MEANT, FileKind, kind_of_file
from ttt.reading import open_file, other_kind, unreadable
from ttt.words import first_few

if TYPE_CHECKING:
    from ttt.adapter_file import AdapterInfo, ChangedSetting
    from ttt.config.schema import TTTConfig
    from ttt.plugins import NeededFile


_code = partial(Code, family=Family.DATA, of_training=True, home=__name__)
TTT501 = _code("TTT501", "data that is not there", Severity.ERROR, blames=Blame.MACHINE)
TTT502 = _code("TTT502", "evaluation on the training data", Severity.NOTE)
TTT503 = _code("TTT503", "an evaluation that never comes", Severity.WARNING)
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
    for key in ("train_data", "eval_data"):
        written = getattr(context.config.data, key)
        if written is None:
            continue
        kind = other_kind(written)
        if kind not in (None, "a folder"):
            yield TTT501.at(
                f"data.{key}",
                message=f"{written!r} is {kind}, not a file; data are read more than once",
                fix="write the path of a file or of a folder of them",
                value=written,
            )
        if _exists(written):
            continue
        where = "" if Path(written).is_absolute() else f" in {Path.cwd()}, from where relative paths are read"
        home = "; ~ is not expanded" if written.startswith("~") else ""
        yield TTT501.at(
            f"data.{key}",
            message=f"{written!r} does not exist{where}{home}",
            fix=(
                f"write the path of the data{_way_to_make(context)}, or null"
                + (" for the demo data" if key == "train_data" else "")
            ),
            value=written,
        )


@rule(TTT501, TTT520, reads=("backbone",))
def files_of_the_model_can_be_read(context: Context) -> Iterator[Finding]:
    """Each file that the backbone's options name is there, can be read, and is what it should be."""
    for name, needed in context.needed_files.items():
        path, fix = f"backbone.{name}", f"write the path of the {needed.what}"
        missing = _not_there(needed.path)
        if missing is not None:
            yield TTT501.at(path, message=f"{needed.path!r} {missing}", fix=fix, value=needed.path)
            continue
        kind = _other_kind_than(needed)
        if kind is not None:
            told = f"{needed.path!r} is {kind.words}"
            yield TTT520.at(path, message=told, fix=kind.way_out or fix, value=needed.path)


def _not_there(written: str) -> str | None:
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


def _way_to_make(context: Context) -> str:
    """The command that makes a backbone's data, if it has one, as the rest of a sentence."""
    from ttt.plugins import Precomputing, has_capability

    return ", make it with `ttt precompute`" if has_capability(context.known_backbone, Precomputing) else ""


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


@rule(TTT502, reads=("data.train_data", "data.eval_data"))
def measures_unseen_data(context: Context) -> Iterator[Finding]:
    """A config with its own training data has its own held-out data."""
    data = context.config.data
    same = data.eval_data is not None and data.eval_data == data.train_data
    if data.train_data is not None and _exists(data.train_data) and (data.eval_data is None or same):
        yield TTT502.at(
            "data.eval_data" if same else "data.train_data",
            message="the evaluation reads the training data, so it does not tell learning from memorising",
            fix="write data.eval_data with data that is held out",
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
    for key in ("train_data", "eval_data"):
        lines = context.lines(key)
        if lines is None:
            continue
        if not lines.count:
            source = getattr(context.config.data, key)
            yield TTT501.at(
                f"data.{key}",
                message=f"{source!r} holds no line of data; the run stops before its first step",
                fix=f"write a .jsonl with lines such as {form.example}",
            )
        for code, kind, words, fix in _BROKEN:
            places = getattr(lines, kind, ())
            if places:
                told = f"{_share(places, lines)} {words.format(beside=beside, lacking=form.lacking)}"
                yield code.at(
                    f"data.{key}",
                    message=f"{told}: {first_few(places)}; the run stops before its first step",
                    fix=fix.replace("{example}", form.example).replace("{beside}", beside or ""),
                    value=len(places),
                )


@rule(TTT507, reads=("data", FACTS))
def recordings_fill_windows(context: Context) -> Iterator[Finding]:
    """More than half of the recordings are at least as long as a window."""
    form = context.facts.recordings
    if form is None:
        return
    for key in ("train_data", "eval_data"):
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
    layers = select_layers(config.ttt.layers, context.facts.num_layers)
    identity = backbone_identity(backbone, config.backbone)
    differences = config_differences(start, config.ttt, backbone=identity, layers=layers, as_start=True)
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
            fix=_as_in_the_file(start, config.ttt, changed)
            or "write these as they are in the file, or another init_from",
            value=len(differences),
        )


def _as_in_the_file(start: AdapterInfo, ttt: TTTConfig, changed: Sequence[ChangedSetting]) -> str:
    """The fix if settings differ from the file's; empty if none does."""
    from ttt.adapter_file import way_to_fit

    given = " ".join(setting.way_out for setting in changed)
    way_out = way_to_fit(start, ttt, as_start=True) or ("give the config the file's:" if changed else "")
    return f"{way_out} {given}".strip() + (", or another init_from" if way_out else "")


def _share(places: Sequence[str], lines: Lines) -> str:
    count = f"{len(places)} of {lines.count}" + ("" if lines.complete else " (the first that were read)")
    return f"{count} lines {'is' if len(places) == 1 else 'are'}"
