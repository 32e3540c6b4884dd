"""`ttt doctor`."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttt.printable import json_text
from ttt_cli.options import BackboneName, Overrides
from ttt_cli.terminal import show

if TYPE_CHECKING:
    from ttt.check.doctor import Report

ENVIRONMENT = 3


class Format(str, Enum):
    """How a report is printed."""

    TEXT = "text"
    JSON = "json"


def doctor(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="A config that this machine is to run.", show_default=False),
    ] = None,
    backbone: BackboneName = None,
    overrides: Overrides = None,
    output: Annotated[Format, typer.Option("--format", help="text for people; json.")] = Format.TEXT,
) -> None:
    """Say what this machine has, how the scan runs on it, and what is wrong with it.

    Every implementation of the scan is run on every device and compared with the reference. With CONFIG it is about
    that run. Exit codes: 0 nothing that keeps a run from starting, 2 a config that is wrong anywhere, 3 an environment
    that is wrong.
    """
    from ttt.check.doctor import examine
    from ttt.errors import UsageError

    if config is None and (backbone or overrides):
        raise UsageError("ttt doctor: --backbone and --set are about a config; name one")
    report = examine(config, backbone=backbone, overrides=overrides or [])
    if output is Format.JSON:
        print(json_text(_facts(report)))
    else:
        _print_report(report)
    if not report.healthy:
        raise typer.Exit(ENVIRONMENT)


def _facts(report: Report) -> dict[str, Any]:
    from dataclasses import asdict

    from ttt.check.doctor import SUPPORT
    from ttt_cli.plugins import facts_of_plugin

    return {
        "healthy": report.healthy,
        "versions": dict(report.versions),
        "devices": [asdict(device) for device in report.devices],
        "plugins": [facts_of_plugin(plugin) for plugin in report.plugins],
        "scan": asdict(report.scan),
        "trials": [{**asdict(trial), "works": trial.works} for trial in report.trials],
        "supports": {claim: dict(answers) for claim, answers in SUPPORT.items()},
        "problems": [{**asdict(problem), "severity": problem.severity.value} for problem in report.problems],
    }


def _print_report(report: Report) -> None:
    from ttt.amounts import show_bytes
    from ttt.check.doctor import SUPPORT

    print("versions")
    _print_rows([(name, "not installed" if value is None else value) for name, value in report.versions.items()])
    print("\ndevices")
    _print_rows(
        [
            (
                device.name,
                device.model,
                "?" if device.memory_bytes is None else show_bytes(device.memory_bytes),
                "" if device.free_bytes is None else f"{show_bytes(device.free_bytes)} free",
                device.detail,
            )
            for device in report.devices
        ]
    )
    print("\nplugins")
    _print_rows(
        [
            (plugin.name, f"{plugin.distribution} {plugin.version}", "BROKEN" if plugin.error else "works")
            for plugin in report.plugins
        ]
        or [("none",)]
    )
    scan = report.scan
    why = ", because TTT_OPS says so" if scan.forced else ""
    print(f"\nscan: {scan.implementation or 'none'}{why}")
    cells = "" if scan.mini_batches is None else f", {scan.mini_batches} in a window"
    group = "by the length" if scan.group_size is None else str(scan.group_size)
    _print_rows(
        [
            ("device", scan.device),
            ("inner model", scan.inner_model),
            ("mini-batches", f"of {scan.mini_batch_size} tokens{cells}"),
            ("group size", f"auto: {group}" if scan.auto else group),
        ]
    )
    names = list(next(iter(SUPPORT.values())))
    print("\nimplementations")
    rows = [("", *names)]
    rows += [(claim.replace("`", ""), *(answers[name] for name in names)) for claim, answers in SUPPORT.items()]
    for device in dict.fromkeys(trial.device for trial in report.trials):
        tried = {trial.implementation: trial for trial in report.trials if trial.device == device}
        rows.append((f"tried on {device}", *("works" if tried[name].works else "FAILS" for name in names)))
    _print_rows(rows)
    print()
    show(_summary(report))
    for problem in report.problems:
        show(f"  {problem.severity}: {problem.message}")
        show(f"    fix: {problem.fix}")


def _summary(report: Report) -> str:
    count = len(report.problems)
    return "nothing is wrong" if not count else f"{count} problem{'s' if count > 1 else ''}"


def _print_rows(rows: list[tuple[str, ...]]) -> None:
    """Print rows in columns, each as wide as its widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        show("  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
