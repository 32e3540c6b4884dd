"""The evaluation of moshi-finetune's forks with TTT: the four benchmarks of pairs, LibriLight, the inner losses.

Their keys stand flat in the file. Here each benchmark is an entry of `eval.tasks`, measured by `ttt eval` and at every
evaluation of a run. Numbers of the two are not comparable, and the notes say why.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from ttt.plugins import Import
from ttt.plugins.imported import number

PREFIXES = ("paper_metrics_", "sblimp_", "swuggy_", "tstory_", "sstory_", "librilight_", "ttt_fig5_")
"""What the keys of the forks' evaluation begin with."""
SEQUENCES = 16
"""How many files the inner losses are averaged over, if the fork's config asks for them."""

_TABLES = ("sblimp", "swuggy")
_PAIRS = (*_TABLES, "tstory", "sstory")
_SWITCHES = ("enable", "enabled", "eval", "evaluation")
"""The ends of the keys that switch a part off."""
_PAIRS_NOTE = (
    "there an average passed over tasks that were missing or zero, an item that failed counted as right, and codes "
    "were two frames off the logits; here failures are counted apart, and without all tasks there is no average"
)
_LIMIT_NOTE = "there it counted files, two of each pair; here pairs, each with all its voices, drawn by a seed"
_LIBRILIGHT_NOTE = (
    "speaker/book/*.flac; there a stream was cut off at 33 minutes; here chapters are joined up to `hours` of each "
    "book, 3 if it is not written"
)
_INNER_NOTE = "there the carried weights stood for W₀ in streaming, so that two curves fell together"
_POSITIONS_NOTE = "there it counted mini-batches as positions; here it counts positions"

_ONE_BOOK = "every book of the folder is read; to read one, link it into a folder of its own"
_DROPPED = {
    "paper_metrics_freq": "there is no task to measure; eval.eval_freq says how often a run is evaluated",
    "paper_metrics_use_user_stream": "Moshi's own streams are scored; eval.score.user_stream is what it hears",
    "librilight_evaluation_mode": "every book of the folder is read; `limit` draws some",
    "librilight_speaker_id": _ONE_BOOK,
    "librilight_book_id": _ONE_BOOK,
    "librilight_max_chapters": "a book is read up to `hours`, however many chapters that takes",
    "librilight_max_sequences": "a book is one stream; `limit` says how many books",
    "librilight_concatenated": "the chapters of a book are always one stream",
    "ttt_fig5_layers": "the picture has a panel for every layer with TTT",
    "ttt_fig5_max_T": f"`positions` of the task inner_loss says it; {_POSITIONS_NOTE}",
    "ttt_fig5_smooth": "curves are moving averages over 10 positions, as in the paper",
}
_OPTIONS = {
    "paper_metrics_": "`ttt eval` has --tasks, --arms and --limit",
    "sblimp_": "the task sblimp has data, gold, split, limit and seed",
    "swuggy_": "the task swuggy has data, gold, split, limit and seed",
    "librilight_": "the task librilight has data, hours, limit and seed",
    "ttt_fig5_": "the task inner_loss has data, positions, limit and seed",
}


def move_evaluation(moving: Import) -> None:
    """Move `eval_freq` and everything that the forks measure."""
    measured = flag(moving.get("paper_metrics_eval", True)) is not False
    tasks = _Tasks(moving)
    if measured:
        for name in _PAIRS:
            _move_pairs(moving, tasks, name)
        _move_librilight(moving, tasks)
        _move_inner_losses(moving, tasks)
    _move_frequency(moving, measured=measured and tasks.count > 0)
    _move_score(moving, measured=measured)
    moving.drop(
        "paper_metrics_eval",
        "the tasks of eval.tasks are measured at every evaluation" if measured else "false: nothing of it was measured",
    )
    _drop_the_rest(moving, measured=measured)


def flag(value: Any) -> Any:
    """A boolean of YAML 1.1, which moshi-finetune reads, as one of YAML 1.2."""
    words = {**dict.fromkeys(("yes", "on", "y"), True), **dict.fromkeys(("no", "off", "n"), False)}
    return words.get(value.casefold(), value) if isinstance(value, str) else value


class _Tasks:
    """The entries of `eval.tasks`, written one after another."""

    def __init__(self, moving: Import) -> None:
        self._moving = moving
        self.count = 0

    def begin(self, name: str, why: str) -> str:
        """Write the name of a further task. Returns where its options stand."""
        place = f"eval.tasks.{self.count}"
        self._moving.add(f"{place}.name", name, why)
        self.count += 1
        return place


def _is_off(moving: Import, prefix: str) -> bool:
    return any(flag(moving.get(f"{prefix}{switch}")) is False for switch in _SWITCHES)


def _move_pairs(moving: Import, tasks: _Tasks, name: str) -> None:
    """A benchmark of pairs, if it has a folder."""
    folder = moving.get(f"{name}_audio_dir")
    if not folder or _is_off(moving, f"{name}_"):
        return
    place = tasks.begin(name, "a task here" if tasks.count else _PAIRS_NOTE)
    moving.move(f"{name}_audio_dir", f"{place}.data")
    if name in _TABLES:
        if moving.get(f"{name}_gold_csv"):
            moving.move(f"{name}_gold_csv", f"{place}.gold", note="rows are paired by their key, not by their order")
        else:
            moving.drop(f"{name}_gold_csv", "it names none; the gold.csv beside the recordings is read")
        if isinstance(folder, str) and PurePath(folder).name == "test":
            moving.add(f"{place}.split", "test", f"the folder of {name}_audio_dir")
    _move_limit(moving, f"{name}_max_pairs", place)


def _move_limit(moving: Import, old: str, place: str) -> None:
    """A number of pairs; none, 0 and less are all of them."""
    value = moving.get(old)
    limit = number(value, whole=True)
    if value is None or (limit is not None and limit < 1):
        moving.drop(old, "no limit: all pairs are measured")
    else:
        moving.move(old, f"{place}.limit", value=value if limit is None else limit, note=_LIMIT_NOTE)


def _move_librilight(moving: Import, tasks: _Tasks) -> None:
    if not moving.get("librilight_audio_dir") or _is_off(moving, "librilight_"):
        return
    place = tasks.begin("librilight", "the loss by position, with gates closed and with fast weights started anew too")
    moving.move("librilight_audio_dir", f"{place}.data", note=_LIBRILIGHT_NOTE)
    if moving.get("librilight_evaluation_mode") == "single_book":
        note = "one book, drawn by `seed`; without a limit every book is read"
        moving.move("librilight_evaluation_mode", f"{place}.limit", value=1, note=note)


def _move_inner_losses(moving: Import, tasks: _Tasks) -> None:
    """The figure of inner losses, if it is switched on and there are recordings for it."""
    if flag(moving.get("ttt_fig5_enable")) is not True:
        return
    folder = moving.get("librilight_audio_dir")
    if not folder:
        moving.drop(
            "ttt_fig5_enable",
            "it read the run's own data; here write {name: inner_loss, data: FOLDER} with a folder of recordings",
        )
        return
    place = f"eval.tasks.{tasks.count}"
    tasks.count += 1
    moving.move("ttt_fig5_enable", f"{place}.name", value="inner_loss", note=_INNER_NOTE)
    moving.add(f"{place}.data", folder, "recordings are what it reads; there it read the run's own data")
    moving.add(f"{place}.limit", SEQUENCES, "files that it is averaged over")
    moving.move("ttt_fig5_max_T", f"{place}.positions", note=_POSITIONS_NOTE)


def _move_frequency(moving: Import, *, measured: bool) -> None:
    """One number says how often a run is evaluated; its tasks are measured then too."""
    evaluates = flag(moving.get("do_eval", False)) is True
    often = measured and moving.get("paper_metrics_freq") is not None
    told = "a run always evaluates at its end"
    moving.drop("do_eval", f"{told}; eval_freq says how often before" if evaluates else told)
    if often:
        moving.move("paper_metrics_freq", "eval.eval_freq", note="the loss is measured with the tasks")
        moving.drop("eval_freq", "paper_metrics_freq says how often: the loss is measured with the tasks")
    elif evaluates:
        moving.move("eval_freq", "eval.eval_freq")
    else:
        moving.move("eval_freq", "eval.eval_freq", value=0, note="without do_eval: true it was not read")


def _move_score(moving: Import, *, measured: bool) -> None:
    silence = flag(moving.get("paper_metrics_use_silence"))
    if measured and isinstance(silence, bool):
        heard = "silence" if silence else "zeros"
        note = "the codes of digital silence" if silence else "no input"
        moving.move("paper_metrics_use_silence", "eval.score.user_stream", value=heard, note=note)


def _drop_the_rest(moving: Import, *, measured: bool) -> None:
    """Say of every other key of the forks' evaluation why it has no counterpart."""
    for key in map(str, moving.source.data):
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
        if prefix is not None and not moving.is_accounted(key):
            moving.drop(key, _why_not(moving, prefix, key) if measured else "paper_metrics_eval: false: not measured")


def _why_not(moving: Import, prefix: str, key: str) -> str:
    """Why a key has no counterpart."""
    name = prefix.rstrip("_")
    if _is_off(moving, prefix):
        return f"{name} is switched off: nothing of it was measured"
    if prefix == "ttt_fig5_" and not moving.has("ttt_fig5_enable"):
        return "without ttt_fig5_enable: true it was not read"
    if prefix not in ("paper_metrics_", "ttt_fig5_") and not moving.get(f"{prefix}audio_dir"):
        return f"without {prefix}audio_dir nothing of it was measured"
    return _DROPPED.get(key) or f"not known here: {_OPTIONS.get(prefix, f'the task {name} has data, limit and seed')}"
