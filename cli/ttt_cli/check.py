"""`ttt check`: its options. `ttt_cli.check_files` does the work."""

from __future__ import annotations

from typing import Annotated

import typer

from ttt_cli.check_files import Format, check_files
from ttt_cli.options import BackboneName, Overrides
from ttt_cli.terminal import show

Codes = list[str] | None


def check(
    configs: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG", help="Config files; - is standard input.", show_default=False),
    ] = None,
    backbone: BackboneName = None,
    overrides: Overrides = None,
    output: Annotated[
        Format,
        typer.Option(
            "--format",
            help="text for people; json; sarif (2.1.0) for code scanning; github for annotations in Actions.",
        ),
    ] = Format.TEXT,
    select: Annotated[
        Codes,
        typer.Option(
            "--select", metavar="CODES", help="Only findings whose codes begin so: TTT2,TTT301. Can be repeated."
        ),
    ] = None,
    ignore: Annotated[
        Codes,
        typer.Option(
            "--ignore", metavar="CODES", help="No findings whose codes begin so; wins over --select. Can be repeated."
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if there are warnings, too.")] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="80GiB",
            help="Memory of the device that the run is for. [default: this machine's, if the config asks for it]",
            show_default=False,
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            "--devices",
            metavar="8",
            min=1,
            max=65536,
            help="How many devices of --memory the run is for: say what each layout of replicate, shard and tensor "
            "needs on them and sends, and the lines to write for the least sharded that fits.",
            show_default=False,
        ),
    ] = None,
    cost: Annotated[
        bool,
        typer.Option(
            "--cost", help="Also say what the run costs: arithmetic, memory, disk, items of tasks; in JSON as numbers."
        ),
    ] = False,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="Also build the backbone, so small that it runs in seconds, and prove the laws on it. Needs torch.",
        ),
    ] = False,
    data: Annotated[
        bool,
        typer.Option(
            "--data",
            help="Also read all data wholly, as a run would: each recording is decoded, each window made. It takes "
            "some seconds for an hour of sound. Without it lists, headers and transcripts are looked at.",
        ),
    ] = False,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain", metavar="CODE", help="Say what a code means, why, and what to write; checks nothing."
        ),
    ] = None,
    list_codes: Annotated[bool, typer.Option("--list", help="List every code; checks nothing.")] = False,
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Show, as a diff, the fixes that need no thought: misspelt keys, quoted numbers, …"),
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="With --fix: write them into the files.")] = False,
) -> None:
    """Say what is wrong with a config before it costs a run.

    Exit codes: 0 no errors, 1 errors (with --strict also warnings), 2 wrong usage, 3 a file that cannot be read or a
    model that cannot be built. With --fix they are about the files as they are afterwards.
    """
    if explain is not None or list_codes:
        from ttt.check import explain as explanations

        for line in (explanations.catalogue() if explain is None else explanations.explain(explain)).split("\n"):
            show(line)
        return
    code = check_files(
        configs or [],
        backbone=backbone,
        overrides=overrides or [],
        output=output,
        select=select or [],
        ignore=ignore or [],
        strict=strict,
        memory=memory,
        devices=devices,
        cost=cost,
        probe=probe,
        data=data,
        fix=fix,
        write=write,
    )
    if code:
        raise typer.Exit(code)
