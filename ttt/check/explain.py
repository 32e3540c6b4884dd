"""Explanations of codes for `ttt check --explain`, `--list` and the page docs/rules.md, from `ttt.check.catalogue`.

`python -m ttt.check.explain` prints the page. `explain.md` is its beginning.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

from ttt.check.catalogue import DECLARED, explanations, explanations_of, house_explanations
from ttt.config.explanation import Explanation
from ttt.config.findings import Code, Family
from ttt.config.spelling import nearest
from ttt.errors import TTTError, UsageError
from ttt.plugins import discover

_WIDTH = 80


def explain(code: str) -> str:
    """What a code means, for a terminal: what is found, why it matters, a bad and a good config, the source.

    Raises:
        UsageError: there is no such code.
    """
    code = code.strip().upper()
    for explained in [explanations()] if code in DECLARED else _of_plugins().values():
        if code in explained:
            return "\n".join(_sections(code, explained[code]))
    close = nearest(code, DECLARED)
    hint = f"did you mean {close}? " if close else ""
    raise UsageError(f"no rule has the code {code!r}; {hint}`ttt check --list` lists them")


def catalogue() -> str:
    """Every code with its severity and title, by family: first the core's, then those of plugins."""
    blocks = []
    for family in Family:
        codes = [code for code in DECLARED.values() if code.family is family]
        lines = [f"  {code.number}  {code.severity.value:<7}  {code.title}" for code in codes]
        blocks.append("\n".join([f"{family.prefix}xx  {family.title}", *lines]))
    for name, told in _of_plugins().items():
        lines = [f"  {code}  {entry.severity:<7}  {entry.title}" for code, entry in sorted(told.items())]
        blocks.append("\n".join([f"The plugin {name}", *lines]))
    return "\n\n".join(blocks)


def _of_plugins() -> dict[str, Mapping[str, Explanation]]:
    """What the codes of installed plugins mean, by plugin. A plugin that fails when it is asked is left out."""
    found: dict[str, Mapping[str, Explanation]] = {}
    for plugin in discover():
        if plugin.backbone is not None:
            with contextlib.suppress(TTTError):  # `ttt plugins` says what is wrong
                found[plugin.name] = explanations_of(plugin.backbone)
    for name, told in house_explanations().items():
        found[name] = {**found.get(name, {}), **told}
    return {name: told for name, told in found.items() if told}


def page() -> str:
    """The text of docs/rules.md."""
    parts = [Path(__file__).with_suffix(".md").read_text(encoding="utf-8")]
    for family in Family:
        parts.append(f"## {family.prefix}xx: {family.title}\n")
        parts += [_markdown(code, explanations()[code.number]) for code in DECLARED.values() if code.family is family]
    return "\n".join(parts)


def _sections(code: str, entry: Explanation) -> Iterator[str]:
    yield f"{code}  {entry.severity}  {entry.title}"
    yield ""
    yield from _wrapped(entry.what)
    yield from ("", *_wrapped(entry.why))
    yield from ("", f"bad:{_beside(entry.environment + entry.options)}", *_block(entry.bad))
    good_options = entry.options if entry.good_options is None else entry.good_options
    yield from ("", f"good:{_beside(good_options)}", *_block(entry.good))
    for name, content in _shown_files(entry):
        yield from ("", f"{name}:", *_block(content))
    yield ""
    if entry.fix:
        yield from _wrapped(f"fix: {entry.fix}")
    yield from _wrapped(f"source: {entry.source}")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _block(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()]


def _beside(options: tuple[str, ...]) -> str:
    return f" with {' '.join(options)}" if options else ""


def _shown_files(entry: Explanation) -> list[tuple[str, str]]:
    """Name and text of each `.jsonl` file that a config names; a reader can tell the other files from them."""
    named = entry.bad + entry.good
    return [(name, text) for name, text in entry.files.items() if name.endswith(".jsonl") and name in named]


def _markdown(code: Code, entry: Explanation) -> str:
    of_a_law = code.family is Family.LAWS
    language, how = ("python", ", with `--probe`") if of_a_law else ("yaml", "")
    good_options = entry.options if entry.good_options is None else entry.good_options
    fix = f"Fix: {entry.fix}.\n\n" if entry.fix else ""
    files = "".join(f"`{name}`:\n\n{_fenced(text, 'json')}\n" for name, text in _shown_files(entry))
    return (
        f"### {code.number}: {entry.title}\n\n*{entry.severity}{how}.* {entry.what}\n\n{entry.why}\n\n"
        f"Bad{_code_beside(entry.environment + entry.options)}:\n\n{_fenced(entry.bad, language)}\n"
        f"Good{_code_beside(good_options)}:\n\n{_fenced(entry.good, language)}\n"
        f"{files}{fix}Source: {entry.source}.\n"
    )


def _code_beside(options: tuple[str, ...]) -> str:
    return f", with `{' '.join(options)}`" if options else ""


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"


if __name__ == "__main__":
    print(page(), end="")
