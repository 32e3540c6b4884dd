"""Codes explained: `ttt check --explain`, `--list`, and the page docs/rules.md, all from `ttt.check.explanations`.

`python -m ttt.check.explain` prints that page.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Mapping

from ttt.check.explanations import EXPLANATIONS
from ttt.check.plugin_rules import house_explanations
from ttt.check.probe_codes import LAW_EXPLANATIONS
from ttt.config.explanation import Explanation
from ttt.config.findings import CODES
from ttt.config.spelling import nearest
from ttt.errors import TTTError, UsageError
from ttt.plugins import discover

FAMILIES = {
    "TTT0": "File and syntax",
    "TTT1": "Schema and shape",
    "TTT2": "Checkpointing",
    "TTT3": "Causality and state",
    "TTT4": "Memory and disk",
    "TTT5": "Data and evaluation",
    "TTT6": "Environment",
    "TTT7": "Optimisation",
    "TTT8": "Plugins",
    "TTT9": "Laws, broken",
}
"""Titles by the beginning of a code."""

_WIDTH = 80
_INTRODUCTION = """\
# Rules

What `ttt check` can find, by code. Codes are stable: a code that goes is never given to anything else. The same text is
in the command: `ttt check --explain TTT201`, `ttt check --list`.

An **error** means that the run cannot start, or would not be what the config says; a **warning** that it starts and
most likely should not; a **note** is worth knowing. Plugins have rules of their own, with codes of their own prefix.

This page is made by `make rules`. Each pair of configs is run by the tests.

## Limits

A check takes about a second at most, two with thousands of findings, and 150 MB, for any file of up to 1 MiB, whatever
is in it (with libyaml, which PyYAML's wheels have); `benchmarks/hostile_configs.py` measures it. So there are limits,
and each is told in one sentence:

| what | at most | else |
| --- | --- | --- |
| a config | 1 MiB, 32 levels, 10,000 values with aliases expanded | TTT005, TTT006, TTT007 |
| a number written out | 400 digits; a longer one is text | TTT102 |
| `--set` | 256 of them, 128 Ki characters together, 32 levels | TTT108 |
| a config for `import-config` | the same; TTT-Video's TOML 64 KiB, 400 characters in a key or number | exit code 2 |
| findings of one code in one file that are shown | 100; the others are counted, and count for the exit code | |
| a text in a finding | 1,000 characters; the middle of a longer one is left out | |
| unknown keys whose meaning is guessed | those among the first 100 findings | |
| `--fix`, which may take 5 seconds | 32 rounds of edits, 32 readings in each; the rest is left to you | |
"""


def explain(code: str) -> str:
    """What a code means, for a terminal: what, why, a bad and a good config, the source.

    Raises:
        UsageError: there is no such code.
    """
    code = code.strip().upper()
    if code not in CODES:
        for explanations in _of_plugins().values():
            if code in explanations:
                return "\n".join(_sections(code, explanations[code].title, explanations[code]))
        close = nearest(code, CODES)
        hint = f"did you mean {close}? " if close else ""
        raise UsageError(f"no rule has the code {code!r}; {hint}`ttt check --list` lists them")
    return "\n".join(_sections(code, CODES[code], EXPLANATIONS.get(code)))


def catalogue() -> str:
    """Every code with its severity and title, by family, those of plugins after the core's."""
    blocks = []
    for prefix, family in FAMILIES.items():
        lines = [f"{code}  {_severity(code):<7}  {title}" for code, title in _family(prefix)]
        blocks.append("\n".join([f"{prefix}xx  {family}", *(f"  {line}" for line in lines)]))
    for name, explanations in _of_plugins().items():
        lines = [f"{code}  {entry.severity:<7}  {entry.title}" for code, entry in sorted(explanations.items())]
        blocks.append("\n".join([f"The plugin {name}", *(f"  {line}" for line in lines)]))
    return "\n\n".join(blocks)


def _of_plugins() -> dict[str, Mapping[str, Explanation]]:
    """What the codes of installed plugins mean, by plugin; one that fails when it is asked explains nothing."""
    found: dict[str, Mapping[str, Explanation]] = {}
    for plugin in discover():
        if plugin.backbone is not None:
            with contextlib.suppress(TTTError):  # `ttt plugins` says what is wrong
                found[plugin.name] = plugin.backbone.explanations()
    for name, explanations in house_explanations().items():
        found[name] = {**found.get(name, {}), **explanations}
    return {name: explanations for name, explanations in found.items() if explanations}


def page() -> str:
    """docs/rules.md."""
    parts = [_INTRODUCTION]
    for prefix, family in FAMILIES.items():
        parts.append(f"## {prefix}xx: {family}\n")
        parts += [_markdown(code, title) for code, title in _family(prefix)]
    return "\n".join(parts)


def _family(prefix: str) -> list[tuple[str, str]]:
    return sorted((code, title) for code, title in CODES.items() if code.startswith(prefix))


def _severity(code: str) -> str:
    return EXPLANATIONS[code].severity if code in EXPLANATIONS else "error"


def _sections(code: str, title: str, entry: Explanation | None) -> Iterator[str]:
    yield f"{code}  {entry.severity if entry is not None else _severity(code)}  {title}"
    yield ""
    if entry is None:
        law = LAW_EXPLANATIONS[code]
        yield from _wrapped(law.what)
        yield from ("", *_wrapped(law.why))
        yield from ("", "bad:", *_block(law.bad), "", "good:", *_block(law.good))
        yield from ("", *_wrapped(f"fix: {law.fix}"), *_wrapped(f"source: {law.source}"))
        return
    yield from _wrapped(entry.what)
    yield from ("", *_wrapped(entry.why))
    yield from ("", f"bad:{_beside(entry.environment + entry.options)}", *_block(entry.bad))
    good_options = entry.options if entry.good_options is None else entry.good_options
    yield from ("", f"good:{_beside(good_options)}", *_block(entry.good))
    for name, content in _shown_files(entry):
        yield from ("", f"{name}:", *_block(content))
    yield from ("", *_wrapped(f"source: {entry.source}"))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _block(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()]


def _beside(options: tuple[str, ...]) -> str:
    return f" with {' '.join(options)}" if options else ""


def _shown_files(entry: Explanation) -> list[tuple[str, str]]:
    """The `.jsonl` files that one of the configs names; what else must be there can be told from them."""
    named = entry.bad + entry.good
    return [(name, text) for name, text in entry.files.items() if name.endswith(".jsonl") and name in named]


def _markdown(code: str, title: str) -> str:
    law = LAW_EXPLANATIONS.get(code)
    if law is not None:
        return (
            f"### {code}: {title}\n\n*{_severity(code)}, with `--probe`.* {law.what}\n\n{law.why}\n\n"
            f"Bad:\n\n{_fenced(law.bad, 'python')}\nGood:\n\n{_fenced(law.good, 'python')}\n"
            f"Fix: {law.fix}.\n\nSource: {law.source}.\n"
        )
    entry = EXPLANATIONS[code]
    good_options = entry.options if entry.good_options is None else entry.good_options
    files = "".join(f"`{name}`:\n\n{_fenced(text, 'json')}\n" for name, text in _shown_files(entry))
    return (
        f"### {code}: {title}\n\n*{entry.severity}.* {entry.what}\n\n{entry.why}\n\n"
        f"Bad{_code_beside(entry.environment + entry.options)}:\n\n{_fenced(entry.bad, 'yaml')}\n"
        f"Good{_code_beside(good_options)}:\n\n{_fenced(entry.good, 'yaml')}\n"
        f"{files}Source: {entry.source}.\n"
    )


def _code_beside(options: tuple[str, ...]) -> str:
    return f", with `{' '.join(options)}`" if options else ""


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"


if __name__ == "__main__":
    print(page(), end="")
