"""`ttt eval`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ttt.words import first_few
from ttt_cli.model import find_model, warn_of_changes
from ttt_cli.options import Overrides, Verify
from ttt_cli.terminal import show, show_note

if TYPE_CHECKING:
    from ttt.check import LoadedConfig
    from ttt.evaluate import EvalOutcome
    from ttt.plugins.installed_tasks import ChosenTask


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|ADAPTER|CONFIG", help="A run's folder, an adapter, or a config file.", show_default=False
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="A,B",
            help="Which tasks. [default: those of the config's eval.tasks; if it has none, those that the backbone "
            "brings data for]",
        ),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            "--arms",
            metavar="ttt,closed,reset",
            help="As trained; with gates closed; with fast weights started anew every now and then. [default: the "
            "tasks' own]",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, metavar="N", help="Only N units of each task (pairs, stories, books), drawn by its seed."
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where the results go. [default: RUN/eval/CHECKPOINT; of an adapter, eval beside it]",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what was interrupted.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure anew what is there.")] = False,
    list_tasks: Annotated[bool, typer.Option("--list", help="List the installed tasks and end.")] = False,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option("--compare", metavar="A B", help="Compare two results, item by item, and end."),
    ] = None,
    ratings: Annotated[
        list[str] | None,
        typer.Option(
            "--ratings",
            metavar="SHEET.csv",
            help="Tell how people rated samples, and end: a sheet that a rater filled in, in the folder `raters-…` of "
            "the task `samples`. Repeat it for each rater.",
        ),
    ] = None,
    overrides: Overrides = None,
    verify: Verify = True,
) -> None:
    """Measure what a run was worth: tasks, with the standard error of every number, beside the plain backbone.

    A run's folder gives its config and its last complete checkpoint. An adapter gives its own settings; a config alone
    the model as training would start it.

    Interrupted (Ctrl-C), it keeps every item that is measured; the same command with --resume goes on. It ends with 1
    if more than 1 % of a task's items failed.
    """
    from ttt.errors import UsageError

    if model is not None and (list_tasks or compare or ratings):
        raise UsageError(f"ttt eval {model}: --list, --compare and --ratings evaluate nothing; leave {model} out")
    if list_tasks:
        _list()
        return
    if compare is not None:
        _compare(*compare)
        return
    if ratings:
        _rated(ratings)
        return
    if model is None:
        raise UsageError("ttt eval: name a run, an adapter or a config; `ttt eval --list` lists the tasks")
    if resume and overwrite:
        raise UsageError("--resume keeps what is there, and --overwrite forgets it; leave one of them out")
    loaded, learned, told, place = _loaded(Path(model), overrides or [], verify=verify)
    chosen = _chosen(loaded, tasks, limit)
    wanted = _arms(arms)
    target = _target(out, place)
    show(told)
    sys.stdout.flush()  # importing torch and the backbone's libraries takes seconds
    outcome = _evaluated(loaded, chosen, target, learned, wanted, resume=resume, overwrite=overwrite, verify=verify)
    _tell(outcome)
    if outcome.failed:
        raise typer.Exit(1)


def _loaded(path: Path, overrides: list[str], *, verify: bool) -> tuple[LoadedConfig, Path | None, str, Path | None]:
    """The config, what was learned, a sentence about it, and the folder for results; None if there is no place for it.

    Raises:
        UsageError: the path names nothing that can be evaluated.
    """
    from ttt.adapter_file import MODEL
    from ttt.check import load_config
    from ttt.train.stored_config import CONFIG

    is_adapter = path.suffix == ".safetensors" or ((path / MODEL).is_file() and not (path / CONFIG).is_file())
    checkpoint = _checkpoint_of(path)
    if checkpoint is not None:
        run = checkpoint.parent.parent
        file, learned, told = find_model(run, str(checkpoint), verify=verify, command="eval")
        loaded = load_config(file, overrides=overrides, training=False, tasks=True)
        return loaded, learned, told, run / "eval" / checkpoint.name
    if is_adapter:
        text, folder = _config_of(path)
        loaded = load_config(str(path), text=text, overrides=overrides, training=False, tasks=True)
        return loaded, path, f"{path}: an adapter, with its own settings", folder / "eval"
    file, learned, told = find_model(path, None, verify=verify, command="eval")
    loaded = load_config(file, overrides=overrides, training=False, tasks=True)
    warn_of_changes(path, learned, loaded.config)
    return loaded, learned, told, None if learned is None else path / "eval" / learned.name


def _checkpoint_of(path: Path) -> Path | None:
    """The checkpoint of a run that a path means; None if it means none. Results in it would be dropped with it."""
    from ttt.checkpoint_folder import CHECKPOINTS
    from ttt.train.stored_config import CONFIG

    folder = (path if path.is_dir() else path.parent).absolute()
    of_a_run = folder.parent.name == CHECKPOINTS and (folder.parent.parent / CONFIG).is_file()
    return folder if of_a_run and path.exists() else None


def _config_of(path: Path) -> tuple[str, Path]:
    """The config that an adapter's own settings make, and the adapter's folder."""
    import json

    from ttt.adapter_file import read_info

    info = read_info(path)
    settings = {"backbone": dict(info.backbone), "ttt": info.ttt.model_dump(mode="json")}
    return json.dumps(settings), info.path.parent


def _chosen(loaded: LoadedConfig, names: str | None, limit: int | None) -> list[ChosenTask]:
    """The tasks that the command or the config names, each with its options.

    Raises:
        UsageError: there are none.
    """
    from dataclasses import replace

    from ttt.errors import UsageError
    from ttt.eval.choosing import chosen_for

    chosen = chosen_for(loaded.config, loaded.backbone, None if names is None else _listed(names, "--tasks"))
    if not chosen:
        raise UsageError(
            f"ttt eval: there is nothing to measure: the config has no eval.tasks, and {loaded.backbone.name} "
            f"brings no data for a task; write eval.tasks: [{{name: …, data: …}}] (`ttt eval --list` lists them)"
        )
    if limit is None:
        return chosen
    whole = [each.task.name for each in chosen if "limit" not in type(each.options).model_fields]
    if whole:
        raise UsageError(f"--limit {limit}: the task {first_few(whole)} has no units to draw from; leave --limit out")
    return [replace(each, options=each.options.model_copy(update={"limit": limit})) for each in chosen]


def _listed(text: str, option: str) -> list[str]:
    from ttt.errors import UsageError

    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UsageError(f"{option} {text}: names separated by commas, as a,b")
    return names


def _arms(text: str | None) -> list[str] | None:
    """The arms that are asked for.

    Raises:
        UsageError: there is no such arm.
    """
    from ttt.errors import UsageError
    from ttt.eval.tasks import ARMS

    if text is None:
        return None
    names = list(dict.fromkeys(_listed(text, "--arms")))
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise UsageError(f"--arms {text}: there is no arm {unknown[0]}; the arms are {', '.join(ARMS)}")
    return sorted(names, key=ARMS.index)


def _target(out: str | None, place: Path | None) -> Path:
    """Where results go.

    Raises:
        UsageError: nobody says.
    """
    from ttt.errors import UsageError
    from ttt.reading import other_kind

    if out is not None and not out:
        raise UsageError("--out: is empty; name a folder")
    target = place if out is None else Path(out)
    if target is None:
        raise UsageError("ttt eval: the untrained model of a config has no folder; say where results go with --out DIR")
    if target.exists() and other_kind(target) != "a folder":
        raise UsageError(f"--out {target}: is not a folder")
    return target


def _evaluated(
    loaded: LoadedConfig,
    chosen: Sequence[ChosenTask],
    target: Path,
    learned: Path | None,
    arms: Sequence[str] | None,
    *,
    resume: bool,
    overwrite: bool,
    verify: bool,
) -> EvalOutcome:
    from rich.console import Console

    from ttt.evaluate import evaluate as run
    from ttt.train.terminal import lasting

    console = Console()
    with lasting(console):
        try:
            return run(
                loaded.config,
                loaded.backbone,
                chosen,
                out=target,
                adapter=learned,
                arms=arms,
                resume=resume,
                overwrite=overwrite,
                console=console,
                verify=verify,
            )
        except KeyboardInterrupt:
            show_note("interrupted; every item that is measured stays: the same command with --resume goes on")
            raise


def _tell(outcome: EvalOutcome) -> None:
    """Print the table, what was written, and what failed."""
    from ttt.eval.report import in_words

    for name, summary in outcome.summaries.items():
        if summary.main is None:
            show(f"{name}: {summary.items - summary.failed} items" if summary.has_result else f"{name}: no result")
            continue
        told = [f"{arm} {in_words(found)}" for arm, found in summary.metrics[summary.main].items()]
        show(f"{name}: {summary.main}: {', '.join(told)}")
    show(f"wrote {first_few([str(file) for file in outcome.files], 6)}")
    for sentence in outcome.failed:
        show(f"error: {sentence}", stream=sys.stderr)


def _list() -> None:
    """List the installed tasks."""
    from ttt.eval.choosing import task_lines

    for line in task_lines():
        show(line)


def _compare(one: str, other: str) -> None:
    """Compare two results."""
    from ttt.eval.comparing import comparison

    for line in comparison(Path(one), Path(other)):
        show(line)


def _rated(sheets: Sequence[str]) -> None:
    """Tell how often arms were preferred, and their strengths."""
    from ttt.eval.rated import rating_lines

    for line in rating_lines([Path(sheet) for sheet in sheets]):
        show(line)
