"""Explanations of codes, for `ttt check --explain`. They are data, in a YAML file beside the module of the rules.

`rules.yaml` beside `rules.py` explains each code that `rules.py` declares with `home=__name__`:

```yaml
ABC101:
  what: A batch has one row.
  why: Its gradient is noisy, so that the run needs a smaller learning rate.
  bad: |
    train: {batch_size: 1}
  good: |
    train: {batch_size: 8}
  source: somebody's paper
```

The keys are the fields of `Explanation`, without severity and title, which the code has. Contents that are hard to
write as text have other forms. An entry of `files` may be `safetensors: {metadata: {…}, zeros: {name: [2, 3]}}`, a file
of zeros in float16; with `cut: 100` beside it, only its first 100 letters; or `silence: {channels: 2, seconds: 1}`, a
WAV file. `bad_bytes` is a text whose letters are
bytes, or a list of pieces, in which `{"#": 1000}` repeats a piece 1000 times.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ttt.config.findings import Code


@dataclass(frozen=True)
class Explanation:
    """What a code means."""

    severity: str
    """error, warning or note."""
    what: str
    """What is found, and what will happen."""
    why: str
    """Why that harms a run."""
    bad: str
    """A whole config that triggers the code."""
    good: str
    """A similar config that triggers nothing."""
    source: str
    """The paper, documentation or module that says so."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Files beside the configs that they refer to, by name."""
    options: tuple[str, ...] = ()
    """Options of `ttt check` for the bad config; also for the good one, unless `good_options` has others."""
    good_options: tuple[str, ...] | None = None
    environment: tuple[str, ...] = ()
    """Environment variables, `NAME=value`, that are set for the bad config but not for the good one."""
    bad_bytes: bytes | None = None
    """The bytes of the bad config, if `bad` can only describe it."""
    needs: str = ""
    """What must be installed to trigger it."""
    title: str = ""
    """What is found, in a few words."""
    fix: str = ""
    """The fix in one clause, for laws: their `bad` and `good` are code of a model, not configs."""


def read_explanations(codes: Iterable[Code]) -> dict[str, Explanation]:
    """What codes mean, by number, from the files beside the modules that declare them.

    Args:
        codes: every code that those modules declare. A code without a home is left out.

    Raises:
        ValueError: a file is missing or damaged, does not explain one of the codes, or explains a code that is not
            given. The message names file and code.
    """
    by_home: dict[str, dict[str, Code]] = {}
    for code in codes:
        if code.home:
            by_home.setdefault(code.home, {})[code.number] = code
    return {
        number: explanation
        for home, declared in by_home.items()
        for number, explanation in _read(_beside(home), declared).items()
    }


def _beside(home: str) -> Path:
    """The file that explains the codes of a module. The module is imported already, since it declared them."""
    file = getattr(sys.modules.get(home), "__file__", None)
    if file is None:
        raise ValueError(f"the home {home!r} of a code is no module; write home=__name__")
    return Path(file).with_suffix(".yaml")


def _read(file: Path, codes: Mapping[str, Code]) -> dict[str, Explanation]:
    try:
        entries = yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{file}: it must hold a section for each code")
    for number in sorted(codes.keys() - entries.keys()):
        raise ValueError(f"{file}: {number} is not explained")
    for number in sorted(map(str, entries.keys() - codes.keys())):
        raise ValueError(f"{file}: {number} is explained, and no rule declares it")
    return {number: _explanation(file, code, entries[number]) for number, code in codes.items()}


def _explanation(file: Path, code: Code, entry: Mapping[str, Any]) -> Explanation:
    known = {each.name for each in fields(Explanation)} - {"severity", "title"}
    for key in sorted(map(str, entry.keys() - known)):
        raise ValueError(f"{file}: {code.number}: no explanation has {key!r}")
    for key in ("what", "why", "bad", "good", "source"):
        if not isinstance(entry.get(key), str):
            raise ValueError(f"{file}: {code.number}: {key} must be text")
    read = dict(entry)
    for key in _READERS.keys() & read.keys():
        try:
            read[key] = _READERS[key](read[key])
        except (TypeError, AttributeError, LookupError, ValueError) as error:
            told = f"{code.number}: {key} is not in the form that ttt.config.explanation describes"
            raise ValueError(f"{file}: {told}") from error
    return Explanation(severity=code.severity.value, title=code.title, **read)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is wanted")
    return value


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError("a list is wanted")
    return tuple(map(str, value))


def _files(value: Mapping[str, Any]) -> dict[str, str]:
    return {_text(name): _file(content) for name, content in value.items()}


def _file(content: str | Mapping[str, Any]) -> str:
    """A file's text: the text itself, or that of a safetensors file of zeros with the given metadata and shapes."""
    if isinstance(content, str):
        return content
    if "silence" in content:
        return _silence(**content["silence"])
    said, end = content["safetensors"], 0
    header: dict[str, Any] = {}
    if "metadata" in said:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in said["metadata"].items()}
        header["__metadata__"] = texts
    for name, shape in said.get("zeros", {}).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header)
    text += " " * (-len(text) % 256)  # with this length, the length's own bytes are ASCII, so the file is a text
    return (len(text).to_bytes(8, "little").decode("ascii") + text + "\0" * end)[: content.get("cut")]


def _silence(channels: int, seconds: int) -> str:
    """The text of a WAV file of 16-bit zeros, at a rate with which all bytes of its header are ASCII."""
    rate, frame = 4096, 2 * channels
    head = struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * frame, frame, 16)
    size = rate * frame * seconds
    file = b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + head + b"data" + struct.pack("<I", size) + bytes(size)
    return file.decode("ascii")


def _bytes(pieces: str | list[str | dict[str, int]]) -> bytes:
    """Bytes from text in Latin-1, or from a list of pieces."""
    if isinstance(pieces, str):
        return pieces.encode("latin-1")
    repeated = ({piece: 1} if isinstance(piece, str) else piece for piece in pieces)
    return b"".join(text.encode("latin-1") * times for piece in repeated for text, times in piece.items())


_READERS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("options", "good_options", "environment"), _texts),
    **dict.fromkeys(("needs", "fix"), _text),
    **{"files": _files, "bad_bytes": _bytes},
}
"""What makes a field of an entry's key, where the key may be left out."""
