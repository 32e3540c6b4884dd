"""The work of `ttt check`, without its options: it imports no typer, and only what a plain check needs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from ttt_cli.terminal import has_color, show, show_diff, show_error, show_findings, show_note

if TYPE_CHECKING:
    from rich.console import Console

    from ttt.check import CheckedConfig
    from ttt.config import Finding
    from ttt.config.schema import RunConfig
    from ttt.plugins import Backbone

STANDARD_INPUT = "-"
STANDARD_INPUT_NAME = "<stdin>"


class Format(str, Enum):
    """How findings are printed."""

    TEXT = "text"
    JSON = "json"
    SARIF = "sarif"
    GITHUB = "github"


def check_files(
    names: Sequence[str],
    *,
    backbone: str | None = None,
    overrides: Sequence[str] = (),
    output: Format = Format.TEXT,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    strict: bool = False,
    memory: str | None = None,
    devices: int | None = None,
    cost: bool = False,
    probe: bool = False,
    data: bool = False,
    fix: bool = False,
    write: bool = False,
) -> int:
    """Check configs and show what is found; the arguments are `ttt check`'s.

    Returns:
        The exit code: 0 no errors, 1 errors, 3 a file that cannot be read or a model that cannot be built.

    Raises:
        UsageError: arguments contradict each other.
    """
    from ttt.config.findings import has_errors
    from ttt.errors import TTTError

    _require_consistent(names, output=output, probe=probe, data=data, fix=fix, write=write)
    size = None if memory is None else parse_memory(memory)
    checker = _Checker(backbone, list(overrides), size, devices, cost, _Filter.of(select, ignore), probe, data)

    everything: list[Finding] = []
    problems: list[TTTError] = []
    for name in names:
        try:
            content = _read(name)
            file = STANDARD_INPUT_NAME if name == STANDARD_INPUT else name
            if fix:
                everything += checker.fix(file, content, write=write)
            else:
                everything += checker.check(file, content, show=output is Format.TEXT)
        except TTTError as problem:
            show_error(problem)
            problems.append(problem)
    if output is not Format.TEXT:
        _print_data(output, everything, [str(problem) for problem in problems])
    failed = has_errors(everything) or (strict and any(finding.severity.value == "warning" for finding in everything))
    return problems[-1].exit_code if problems else int(failed)


def _require_consistent(
    names: Sequence[str], *, output: Format, probe: bool, data: bool, fix: bool, write: bool
) -> None:
    """Refuse arguments that contradict each other.

    Raises:
        UsageError: the message says which, and what to write instead.
    """
    from ttt.errors import UsageError
    from ttt.reading import is_stream

    if not names:
        raise UsageError("ttt check: name a config, or - for standard input")
    if names.count(STANDARD_INPUT) > 1:
        raise UsageError("ttt check: standard input can be read once only")
    if write and not fix:
        raise UsageError("ttt check: --write writes what --fix shows; write both")
    if write and STANDARD_INPUT in names:
        raise UsageError("ttt check: standard input cannot be written to; leave --write out, or name a file")
    stream = next((name for name in names if write and is_stream(name)), None)
    if stream is not None:
        raise UsageError(f"ttt check: {stream} is a stream, which cannot be written to; leave --write out")
    if fix and probe:
        raise UsageError("ttt check: --fix and --probe are two steps; fix first")
    if fix and data:
        raise UsageError("ttt check: --fix and --data are two steps; fix first")
    if fix and output is not Format.TEXT:
        raise UsageError(f"ttt check: --fix shows a diff; leave --format {output.value} out")


def parse_memory(text: str) -> int:
    """Parse `--memory`; returns bytes.

    Raises:
        UsageError: the text is not a size.
    """
    from ttt.amounts import parse_bytes
    from ttt.errors import UsageError

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"--memory: {error}") from None


def _read(name: str) -> bytes:
    from ttt.check.reading import read_bytes
    from ttt.config.nodes import MAX_BYTES

    return sys.stdin.buffer.read(MAX_BYTES + 1) if name == STANDARD_INPUT else read_bytes(name)


def _print_data(output: Format, findings: Sequence[Finding], problems: Sequence[str]) -> None:
    if output is Format.SARIF:
        from ttt import __version__
        from ttt.check.sarif import render_sarif

        print(render_sarif(findings, version=__version__, problems=problems))
    elif output is Format.JSON:
        from ttt.check import render_json

        print(render_json(findings))
    elif findings:
        from ttt.check.render import render_github

        print(render_github(findings))


@dataclass(frozen=True)
class _Filter:
    """The codes that a user selects and ignores."""

    select: tuple[str, ...]
    ignore: tuple[str, ...]

    @classmethod
    def of(cls, select: Iterable[str], ignore: Iterable[str]) -> _Filter:
        return cls(_prefixes("--select", select), _prefixes("--ignore", ignore))

    def __call__(self, findings: Iterable[Finding]) -> tuple[Finding, ...]:
        """The findings that are selected and not ignored."""
        return tuple(
            finding
            for finding in findings
            if finding.code.startswith(self.select or "") and not (self.ignore and finding.code.startswith(self.ignore))
        )


def _prefixes(option: str, given: Iterable[str]) -> tuple[str, ...]:
    """The prefixes of codes that an option names.

    Raises:
        UsageError: no code begins with the prefix, so that it would silently do nothing.
    """
    prefixes = [word.strip() for words in given for word in words.split(",")]
    if not prefixes:
        return ()
    from ttt.check.catalogue import CODES, PREFIX
    from ttt.errors import UsageError

    for prefix in prefixes:
        known = any(code.startswith(prefix) for code in CODES)
        of_a_plugin = not prefix.startswith(PREFIX)  # a plugin's codes are known only once it finds something
        if not re.fullmatch(r"[A-Z]+[0-9]*", prefix) or not (known or of_a_plugin):
            raise UsageError(
                f"ttt check: {option} {prefix}: no code begins so; codes are TTT101, or families like TTT2"
            )
    return tuple(prefixes)


@dataclass(frozen=True)
class _Checker:
    """Checks files one by one and shows the findings."""

    backbone: str | None
    overrides: list[str]
    memory: int | None
    devices: int | None
    cost: bool
    filter: _Filter
    probe: bool
    data: bool

    def check(self, file: str, content: bytes, *, show: bool) -> Sequence[Finding]:
        """The findings of a file, including those of its data and of the probe."""
        checked = self._check(file, content)
        findings = checked.findings
        if self.data:
            findings = (*findings, *self.filter(_read_data(checked, show=show)))
        if self.probe:
            findings = (*findings, *self.filter(_probe(checked, show=show)))
        if show:
            if self.devices is not None:
                _show_layouts(findings)
            _show(file, findings)
        return findings

    def fix(self, file: str, content: bytes, *, write: bool) -> Sequence[Finding]:
        """Show the fixes of a file, or write them, then the findings of the file after the fixes."""
        from ttt.check.fixes import fix_text, unified_diff

        before = self._check(file, content)
        if not before.source.complete:  # nothing in it has a place
            _show(file, before.findings)
            return before.findings
        text = content.decode("utf-8")
        fixed = fix_text(text, lambda text: self._check(file, text))
        if fixed.text != text:
            show_diff(unified_diff(text, fixed.text, file=file))
        if write and fixed.text != text:
            _replace(file, fixed.text)
        count = len(fixed.fixed)
        told = f"{count} fixed" if write else f"{count} can be fixed: add --write"
        _show(file, fixed.checked.findings, also=f"{told}; left: " if count else "")
        return fixed.checked.findings if write else before.findings

    def _check(self, file: str, text: str | bytes) -> CheckedConfig:
        from ttt.check import check_config

        checked = check_config(
            file,
            text=text,
            backbone=self.backbone,
            overrides=self.overrides,
            memory=self.memory,
            devices=self.devices,
            cost=self.cost,
        )
        return replace(checked, findings=self.filter(checked.findings))


def _read_data(checked: CheckedConfig, *, show: bool) -> list[Finding]:
    """Read all data; returns what is wrong or odd. Tells how far it is, away from the output if that is data.

    Raises:
        TTTError: the plugin failed, or hidden errors are in the way.
    """
    ready = _ready(
        checked, hidden="its data are not read: errors that --ignore hides come first", not_now="its data are not read"
    )
    if ready is None:
        return []
    from ttt.check.whole_data import read_all_data

    return _placed(checked, read_all_data(*ready, console=_console(show)))


def _probe(checked: CheckedConfig, *, show: bool) -> list[Finding]:
    """Try the laws; returns a finding for each that is broken. Prints each law, away from the output if that is data.

    Raises:
        TTTError: the model cannot be built, or hidden errors are in the way.
    """
    ready = _ready(
        checked, hidden="cannot be probed: errors that --ignore hides stand in the way", not_now="not probed"
    )
    if ready is None:
        return []
    from ttt.check.probe import probe

    return _placed(checked, probe(*ready, console=_console(show)))


def _ready(checked: CheckedConfig, *, hidden: str, not_now: str) -> tuple[RunConfig, Backbone] | None:
    """The config and its backbone, if the config has no errors of its own; else None, and a note says so.

    Raises:
        UsageError: the errors are hidden.
    """
    from ttt.config.findings import blames_environment, has_errors
    from ttt.errors import UsageError

    own = [finding for finding in checked.findings if not blames_environment(finding)]
    if checked.config is not None and checked.backbone is not None and not has_errors(own):
        return checked.config, checked.backbone
    if not has_errors(own):
        raise UsageError(f"{checked.source.file}: {hidden}")
    show_note(f"{checked.source.file}: {not_now}: its errors come first")
    return None


def _placed(checked: CheckedConfig, found: Sequence[Finding]) -> list[Finding]:
    from ttt.check.placing import placed

    return [placed(finding, checked.source) for finding in found]


def _console(show: bool) -> Console:
    from rich.console import Console

    return Console(file=sys.stdout if show else sys.stderr, no_color=not has_color(sys.stdout), soft_wrap=False)


def _show(file: str, findings: Sequence[Finding], *, also: str = "") -> None:
    from ttt.config.findings import summary

    show_findings(findings, stream=sys.stdout)
    show(f"{file}: {also}{summary(findings)}")


def _show_layouts(findings: Sequence[Finding]) -> None:
    """Show what each layout needs as a table, if that could be said."""
    from ttt.check.layout_table import layout_tables

    for table in layout_tables(findings):
        for line in table:
            show(line)


def _replace(name: str, text: str) -> None:
    """Replace a file's content, whole or not at all; a link still points to the file."""
    from pathlib import Path

    from ttt.files import replaced_file, write_bytes

    path = replaced_file(Path(name))
    mode = path.stat().st_mode
    write_bytes(path, text.encode("utf-8"))
    path.chmod(mode)
