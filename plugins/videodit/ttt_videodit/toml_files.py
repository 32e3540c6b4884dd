"""TTT-Video's TOML as it is written: looked at before it is parsed, with the places of its keys."""

from __future__ import annotations

import re
import sys
from datetime import date, time
from typing import Any

from ttt.amounts import show_bytes
from ttt.config.findings import Place
from ttt.config.source import KeyPath, Located
from ttt.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT = "TTT-Video"
_LATER = "TODO"
_UNQUOTED = re.compile(rf"^([^\S\n]*[\w.\-]+[^\S\n]*=[^\S\n]*){_LATER}([^\S\n]*(?:#.*)?)$", re.MULTILINE)
"""What the published files have in place of a path that is to be filled in, which is not TOML."""
_TOML_PLACE = re.compile(r"\s*\(at (?:line (\d+), column (\d+)|end of document)\)")

MAX_BYTES = 1 << 16
"""The largest file that is read; TTT-Video's own have 2 KiB."""
MAX_LEVELS = 32
MAX_VALUES = 10_000
MAX_WORD = 400
"""Characters of a key or number without quotes."""
_TOKEN = re.compile(
    r'''"""(?:\\.|[^\\])*?"""|\'{3}.*?\'{3}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|#[^\n]*'''
    r"|(?P<word>[\w+\-]+)|[^\S\n]+|.",
    re.DOTALL,
)
"""Strings and comments whole, words, spaces, and every other character."""
_OVERRIDE = re.compile(r"--([a-z]+\.\w{1,60})")
_SECTION_LINE = re.compile(r"\s*\[\s*([\w.\- ]+?)\s*\]")
_KEY_LINE = re.compile(r"\s*([\w\-]+)\s*=")


def refuse_script(text: str, file: str) -> None:
    """Refuse a script that starts TTT-Video, and say which file to import, and what the script changes of it."""
    lines = "\n".join(line for line in text[:MAX_BYTES].splitlines() if not line.lstrip().startswith("#"))
    if not text.startswith("#!") or "--job.config_file" not in lines:
        return
    changed = [key for key in dict.fromkeys(_OVERRIDE.findall(lines)) if key != "job.config_file"]
    told = f", with what it changes written into it: {', '.join(changed)}" if changed else ""
    raise UsageError(
        f"{file}: is a script that starts {FORMAT}; import the TOML that its --job.config_file names{told}"
    )


def read_toml(text: str, file: str) -> dict[str, Any]:
    """The file's data, null for a path that is still to be filled in; empty if it is not TOML."""
    named = file.casefold().endswith(".toml")
    excess = _excess(text)
    if excess is not None:
        if not named:
            return {}
        line, cause = excess
        raise UsageError(f"{file}:{line}: not TOML: {cause}; no config is, so name one of TTT-Video's")
    try:
        data = tomllib.loads(_UNQUOTED.sub(rf'\1"{_LATER}"\2', text))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, or a number that Python does not read
        if not named:
            return {}
        cause = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        found = _TOML_PLACE.search(cause)
        place = f":{found[1]}:{found[2]}" if found and found[1] else ""
        raise UsageError(f"{file}{place}: not TOML: {_TOML_PLACE.sub('', cause)}") from None
    return {section: _plain(values, levels=1) for section, values in data.items()}


def _excess(text: str) -> tuple[int, str] | None:
    """In which line a text has more than any config, and of what; a TOML parser can take for ever with it."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return 1, f"larger than {show_bytes(MAX_BYTES)}"
    line, depth, dots, values = 1, 0, 0, 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token == ".":
            dots += 1
        elif token in ("[", "{"):
            depth, dots = depth + 1, 0
        elif token in ("]", "}"):
            depth = max(depth - 1, 0)
        elif token in ("\n", ",", "="):
            dots = 0
        values += token in ("=", ",", "[")
        if max(depth, dots) > MAX_LEVELS:
            return line, f"nested more than {MAX_LEVELS} levels deep"
        if values > MAX_VALUES:
            return line, f"more than {MAX_VALUES:,} values"
        if match["word"] and len(token) > MAX_WORD:
            return line, f"a key or number of more than {MAX_WORD} characters"
        line += token.count("\n")
    return None


def _plain(value: Any, *, levels: int) -> Any:
    """A value of TOML as one of a config: times as text; null for a path that is still to be filled in."""
    if isinstance(value, dict):
        return {key: _plain(item, levels=levels - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, levels=-1) for item in value]
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    return None if value == _LATER and levels == 0 else value


def places_in(text: str, file: str) -> dict[KeyPath, Located]:
    """The places of keys, if each has a line of its own: TOML's reader does not give them."""
    section: KeyPath = ()
    found: dict[KeyPath, Located] = {}
    for line, written in enumerate(text.splitlines(), 1):
        if match := _SECTION_LINE.match(written):
            section = tuple(part.strip() for part in match[1].split("."))
        elif match := _KEY_LINE.match(written):
            key = Place(file, line, match.start(1) + 1, written, len(match[1]))
            found.setdefault((*section, match[1]), Located(key, key))
    return found
