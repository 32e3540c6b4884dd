"""The evaluation of moshi-finetune's forks with TTT: the four benchmarks of pairs, LibriLight, the inner losses.

Their keys stand in the section `paper_metrics`, or flat in the file. Here each benchmark is an entry of `eval.tasks`,
measured by `ttt eval` and at every evaluation of a run. Numbers of the two are not comparable, and the notes say why.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from ttt.plugins import Import
from ttt.plugins.imported import number
from ttt_moshi.importing_values import figure, flag, is_on, move_figure

SECTION = "paper_metrics"
"""Where the keys stand, if not flat in the file."""
PREFIXES = ("paper_metrics_", "sblimp_", "swuggy_", "tstory_", "sstory_", "librilight_", "ttt_fig5_")
"""What the keys of the forks' evaluation begin with."""
SEQUENCES = 16
"""How many files the inner losses are averaged over, if the fork's config asks for them."""
MOST_BATCHES = 40
"""How many batches an evaluation of moshi-finetune reads at most."""

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
_PIECES = "streams are always read piece by piece, in memory that does not grow with their length"
_UNREAD = "the fork's code reads it nowhere"
_STREAMS = f"{_UNREAD}; eval.score.user_stream is what Moshi hears, its own streams are scored"
_DROPPED = {
    "paper_metrics_freq": "there is no task to measure; eval.eval_freq says how often a run is evaluated",
    "paper_metrics_use_user_stream": "Moshi's own streams are scored; eval.score.user_stream is what it hears",
    "paper_metrics_use_silence": "nothing is measured that would hear it",
    "use_silence_codes": f"{_UNREAD}, but paper_metrics_use_silence; here eval.score.user_stream",
    "sblimp_stream_config": _STREAMS,
    "swuggy_stream_config": _STREAMS,
    "tstory_stream_config": _STREAMS,
    "sstory_stream_config": _STREAMS,
    "results_dir": f"{_UNREAD}; results lie in the run's folder, and where `ttt eval --out` says",
    "save_results_json": f"{_UNREAD}; results.json is always written",
    "librilight_evaluation_mode": "every book of the folder is read; `limit` draws some",
    "librilight_speaker_id": _ONE_BOOK,
    "librilight_book_id": _ONE_BOOK,
    "librilight_book_name": _ONE_BOOK,
    "librilight_num_sequences": "one book was read, whatever it said; `limit` says how many books",
    "librilight_max_chapters": "a book is read up to `hours`, however many chapters that takes",
    "librilight_max_sequences": "a book is one stream; `limit` says how many books",
    "librilight_max_files": f"{_UNREAD}; the task librilight's `limit` says how many books",
    "librilight_max_tokens": f"{_UNREAD}; the task librilight's `hours` says how much of a book",
    "librilight_concatenated": "the chapters of a book are always one stream",
    "librilight_concatenated_dir": f"{_UNREAD}; the task librilight reads a folder of reader/book/*.flac",
    "long_context_audio_dir": f"{_UNREAD}; the task librilight measures the loss by position",
    "long_context_max_files": f"{_UNREAD}; the task librilight's `limit` says how many books",
    "librilight_streaming.enabled": "LibriLight is always streamed",
    "librilight_streaming.memory_check": _PIECES,
    "librilight_streaming.cache_clear_interval": _PIECES,
    "librilight_streaming.memory_log_interval": _PIECES,
    "librilight_streaming.max_sequence_length": "the task librilight's `hours` says how much of a book is read",
    "librilight_streaming.ttt_verification": "every evaluation compares open gates with closed ones",
    "librilight_streaming.use_fixed_method": "streaming gives the losses of the whole sequence (law 4)",
    "librilight_streaming.verify_loss_computation": "streaming gives the losses of the whole sequence (law 4)",
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
    "": "`ttt eval` has --tasks, --arms, --limit and --out",
}


def move_evaluation(moving: Import) -> None:
    """Move `eval_freq` and everything that the forks measure."""
    keys = _Keys(moving)
    measured = is_on(moving, keys.place("paper_metrics_eval"), default=not keys.is_section)
    tasks = _Tasks(moving)
    if measured:
        for name in _PAIRS:
            _move_pairs(keys, tasks, name)
        _move_librilight(keys, tasks)
        _move_inner_losses(keys, tasks)
    _move_frequency(moving, keys, measured=measured and tasks.count > 0)
    _move_score(keys, measured=measured)
    keys.drop(
        "paper_metrics_eval",
        "the tasks of eval.tasks are measured at every evaluation" if measured else "false: nothing of it was measured",
    )
    _drop_the_rest(moving, keys, measured=measured)


class _Keys:
    """The keys of the evaluation by their names, wherever they stand."""

    def __init__(self, moving: Import) -> None:
        self._moving = moving
        self.is_section = isinstance(moving.source.data.get(SECTION), dict)
        """Whether the file has the section, so that the keys of it count."""

    @property
    def adds_ttt(self) -> bool:
        """Whether the file's run has TTT layers: it switches them on, or has neither TTT nor LoRA of its own."""
        if self._moving.source.data.get("ttt"):
            return is_on(self._moving, "ttt.enable", default=True)
        return not is_on(self._moving, "lora.enable", default=False)

    def place(self, name: str) -> str:
        """The dotted key of a name."""
        return f"{SECTION}.{name}" if self.is_section else name

    def has(self, name: str) -> bool:
        """Whether the file has it."""
        return self._moving.has(self.place(name))

    def get(self, name: str) -> Any:
        """Its value; None if the file does not have it."""
        return self._moving.get(self.place(name))

    def move(self, name: str, new: str, *, note: str = "", **changed: Any) -> None:
        """As `Import.move`."""
        self._moving.move(self.place(name), new, note=note, **changed)

    def add(self, new: str, value: Any, why: str) -> None:
        """As `Import.add`."""
        self._moving.add(new, value, why)

    def drop(self, name: str, why: str) -> None:
        """As `Import.drop`."""
        self._moving.drop(self.place(name), why)


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


def _is_off(keys: _Keys, prefix: str) -> bool:
    return any(flag(keys.get(f"{prefix}{switch}")) is False for switch in _SWITCHES)


def _move_pairs(keys: _Keys, tasks: _Tasks, name: str) -> None:
    """A benchmark of pairs, if it has a folder."""
    folder = keys.get(f"{name}_audio_dir")
    if not folder or _is_off(keys, f"{name}_"):
        return
    place = tasks.begin(name, "a task here" if tasks.count else _PAIRS_NOTE)
    keys.move(f"{name}_audio_dir", f"{place}.data")
    if name in _TABLES:
        if keys.get(f"{name}_gold_csv"):
            keys.move(f"{name}_gold_csv", f"{place}.gold", note="rows are paired by their key, not by their order")
        else:
            keys.drop(f"{name}_gold_csv", "it names none; the gold.csv beside the recordings is read")
        if isinstance(folder, str) and PurePath(folder).name == "test":
            keys.add(f"{place}.split", "test", f"the folder of {name}_audio_dir")
    _move_limit(keys, f"{name}_max_pairs", place)


def _move_limit(keys: _Keys, old: str, place: str) -> None:
    """A number of pairs; none, 0 and less are all of them."""
    value = figure(keys.get(old))
    limit = number(value, whole=True)
    if value is None or (limit is not None and limit < 1):
        keys.drop(old, "no limit: all pairs are measured")
    else:
        keys.move(old, f"{place}.limit", value=value if limit is None else limit, note=_LIMIT_NOTE)


def _move_librilight(keys: _Keys, tasks: _Tasks) -> None:
    if not keys.get("librilight_audio_dir") or _is_off(keys, "librilight_"):
        return
    place = tasks.begin("librilight", "the loss by position, with gates closed and with fast weights started anew too")
    keys.move("librilight_audio_dir", f"{place}.data", note=_LIBRILIGHT_NOTE)
    mode = keys.get("librilight_evaluation_mode")
    if mode == "multi_book" and number(figure(keys.get("librilight_num_sequences")), whole=True):
        value = figure(keys.get("librilight_num_sequences"))
        keys.move("librilight_num_sequences", f"{place}.limit", value=value, note="books, drawn by `seed`")
    elif mode in ("single_book", "random", "random_book"):
        note = "one book, drawn by `seed`; without a limit every book is read"
        keys.move("librilight_evaluation_mode", f"{place}.limit", value=1, note=note)


def _move_inner_losses(keys: _Keys, tasks: _Tasks) -> None:
    """The figure of inner losses, if it is switched on and there are recordings for it."""
    if flag(keys.get("ttt_fig5_enable")) is not True:
        return
    if not keys.adds_ttt:
        keys.drop("ttt_fig5_enable", "no layer has TTT, so there are no inner losses")
        return
    folder = keys.get("librilight_audio_dir")
    if not folder:
        keys.drop(
            "ttt_fig5_enable",
            "it read the run's own data; here write {name: inner_loss, data: FOLDER} with a folder of recordings",
        )
        return
    place = f"eval.tasks.{tasks.count}"
    tasks.count += 1
    keys.move("ttt_fig5_enable", f"{place}.name", value="inner_loss", note=_INNER_NOTE)
    keys.add(f"{place}.data", folder, "recordings are what it reads; there it read the run's own data")
    keys.add(f"{place}.limit", SEQUENCES, "files that it is averaged over")
    keys.move("ttt_fig5_max_T", f"{place}.positions", value=figure(keys.get("ttt_fig5_max_T")), note=_POSITIONS_NOTE)


def _move_frequency(moving: Import, keys: _Keys, *, measured: bool) -> None:
    """One number says how often a run is evaluated; its tasks are measured then too."""
    evaluates = is_on(moving, "do_eval", default=False)
    told = "a run always evaluates at its end"
    moving.drop("do_eval", f"{told}; eval_freq says how often before" if evaluates else told)
    if measured and keys.get("paper_metrics_freq") is not None:
        place = keys.place("paper_metrics_freq")
        _move_how_often(moving, place, note="the loss is measured with the tasks")
        moving.drop("eval_freq", "paper_metrics_freq says how often: the loss is measured with the tasks")
    elif evaluates:
        _move_how_often(moving, "eval_freq")
    else:
        moving.move("eval_freq", "eval.eval_freq", value=0, note="without do_eval: true it was not read")
    if evaluates:
        moving.add("eval.max_batches", MOST_BATCHES, "as many as an evaluation of moshi-finetune reads at most")


def _move_how_often(moving: Import, old: str, *, note: str = "") -> None:
    """A number of steps between evaluations; less than one is none before the end."""
    often = number(figure(moving.get(old)))
    if often is not None and often < 1:
        moving.move(old, "eval.eval_freq", value=0, note="; ".join(filter(None, (f"{often:g}: at the end only", note))))
    else:
        move_figure(moving, old, "eval.eval_freq", note=note)


def _move_score(keys: _Keys, *, measured: bool) -> None:
    silence = flag(keys.get("paper_metrics_use_silence"))
    if measured and isinstance(silence, bool):
        heard = "silence" if silence else "zeros"
        note = "the codes of digital silence" if silence else "no input"
        keys.move("paper_metrics_use_silence", "eval.score.user_stream", value=heard, note=note)


def _drop_the_rest(moving: Import, keys: _Keys, *, measured: bool) -> None:
    """Say of every other key of the forks' evaluation why it has no counterpart."""
    for name in _flat(moving.source.data):
        if not moving.is_accounted(name):
            told = f"{SECTION} has a section, which is what was read" if keys.is_section else _why(keys, name, measured)
            moving.drop(name, told)
    if keys.is_section:
        for name in _names(moving.source.data[SECTION]):
            if not moving.is_accounted(keys.place(name)):
                keys.drop(name, _why(keys, name, measured))


def _flat(data: Mapping[str, Any]) -> list[str]:
    """The names of the evaluation that stand flat in the file."""
    return [str(key) for key in data if str(key).startswith(PREFIXES)]


def _names(section: dict[str, Any], above: str = "") -> list[str]:
    """The names of a section, dotted where there are sections in it."""
    names = []
    for key, value in section.items():
        inner = isinstance(value, dict) and value
        names += _names(value, f"{above}{key}.") if inner else [f"{above}{key}"]
    return names


def _why(keys: _Keys, name: str, measured: bool) -> str:
    """Why a key has no counterpart."""
    if not measured:
        return "paper_metrics_eval: false: not measured"
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    if prefix and _is_off(keys, prefix):
        return f"{prefix.rstrip('_')} is switched off: nothing of it was measured"
    if prefix == "ttt_fig5_" and not keys.has("ttt_fig5_enable"):
        return "without ttt_fig5_enable: true it was not read"
    if name in _DROPPED and (prefix in ("", "paper_metrics_") or name.endswith(("_stream_config", "_dir"))):
        return _DROPPED[name]
    if prefix not in ("", "paper_metrics_", "ttt_fig5_") and not keys.get(f"{prefix}audio_dir"):
        return f"without {prefix}audio_dir nothing of it was measured"
    known = _OPTIONS.get(prefix, f"the task {prefix.rstrip('_')} has data, limit and seed")
    return _DROPPED.get(name) or f"not known here: {known}"
