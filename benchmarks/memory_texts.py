"""Long real documents for `memory_beyond_attention.py`: source files of published packages, read from their wheels.

A work is one distribution at one version. The works of training, of choosing settings and of the held-out documents are
different ones. Nothing of them is kept in this repository: wheels are fetched into a folder when they are needed.
"""

from __future__ import annotations

import email
import hashlib
import itertools
import random
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TRAIN = [
    "sympy==1.14.0",
    "networkx==3.6.1",
    "transformers==5.24.0",
    "diffusers==0.42.1",
    "mpmath==1.3.0",
    "pytest==9.2.0",
    "pyparsing==3.3.3",
    "fonttools==4.68.0",
    "huggingface_hub==2.4.0",
    "tensorboard==2.21.0",
    "accelerate==1.15.0",
    "peft==0.21.2",
]
DEV = ["rich==15.0.0", "hypothesis==6.170.17", "werkzeug==3.1.9", "sortedcontainers==2.4.0"]
"""The works on which settings were chosen; nothing here reads them."""
HELD_OUT = [
    "jinja2==3.1.6",
    "setuptools==84.2.1",
    "requests==2.34.2",
    "urllib3==2.8.0",
    "attrs==26.1.0",
    "anyio==4.16.0",
    "einops==0.8.2",
    "packaging==26.4",
    "fsspec==2026.9.0",
    "tqdm==4.70.1",
    "markdown==3.11.3",
    "pycparser==3.0",
    "pip==23.2.1",
    "typer==0.29.2",
    "execnet==2.1.2",
    "h11==0.16.0",
    "markdown-it-py==4.3.0",
    "referencing==0.37.0",
    "pathspec==1.1.1",
    "absl-py==2.5.1",
]

Tokens = tuple[int, ...]
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Document:
    """The beginning of one file of a work, as tokens."""

    work: str
    """The distribution and its version; documents of one work are not independent of each other."""
    file: str
    licence: str
    """As the work's own metadata name it."""
    tokens: Tokens


@dataclass(frozen=True)
class Recall:
    """A passage that comes again after other text: the second time, every token of it can be known."""

    tokens: Tokens
    works: str
    """The works of the passage and of the text between."""
    spans: tuple[tuple[int, int], ...]
    """From where to where each repetition goes; it begins farther from the last one than attention sees."""


def fetch(requirement: str, folder: Path) -> Path:
    """The wheel of `name==version`; downloaded into the folder if it is not there.

    Raises:
        SystemExit: it cannot be had.
    """
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_').lower()}-{version}-"

    def found() -> Path | None:
        return next(
            (p for p in folder.glob("*.whl") if p.name.lower().replace("-", "_").startswith(pattern.replace("-", "_"))),
            None,
        )

    if found() is None:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*command, "--only-binary", ":all:", "--dest", str(folder), requirement], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{requirement} cannot be fetched from the package index: {done.stderr.strip()[-300:]}")
    wheel = found()
    if wheel is None:
        raise SystemExit(f"{requirement}: what was fetched into {folder} holds no such wheel")
    return wheel


def documents(
    requirement: str, folder: Path, encode: Encode, *, length: int, at_most: int, seed: int = 0
) -> Iterator[Document]:
    """The first `length` tokens of up to so many source files of a work, drawn by a hash of their names."""
    with zipfile.ZipFile(fetch(requirement, folder)) as wheel:
        licence = _licence(wheel)
        names = [
            one.filename for one in wheel.infolist() if one.filename.endswith(".py") and one.file_size > 3 * length
        ]
        texts = ((name, wheel.read(name).decode("utf-8", "replace")) for name in sorted(names, key=_rank(seed)))
        fitting = ((name, tuple(encode(text[: 12 * length]))[:length]) for name, text in texts)
        long_enough = ((name, tokens) for name, tokens in fitting if len(tokens) == length)
        for name, tokens in itertools.islice(long_enough, at_most):
            yield Document(requirement, name, licence, tokens)


def own_documents(encode: Encode, *, length: int, at_most: int, skip: int = 0) -> Iterator[Document]:
    """The same of Python's own standard library, each of its modules a work: for a smoke test without network."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    texts = ((path, path.read_text(encoding="utf-8", errors="replace")[: 12 * length]) for path in paths)
    fitting = ((path, tuple(encode(text))[:length]) for path, text in texts)
    long_enough = ((path, tokens) for path, tokens in fitting if len(tokens) == length)
    for path, tokens in itertools.islice(long_enough, skip, skip + at_most):
        yield Document(path.stem, path.name, "PSF-2.0", tokens)


def recalls(documents: Sequence[Document], count: int, *, window: int, length: int, seed: int) -> list[Recall]:
    """Documents in which a passage of another one comes two or three times, too far apart for attention."""
    draw = random.Random(seed)
    return [_recall(*draw.sample(documents, 2), window, length, draw) for _ in range(count)]


def _recall(passage: Document, between: Document, window: int, length: int, draw: random.Random) -> Recall:
    size = draw.choice((window * 3 // 4, window, window * 3 // 2))
    gap = draw.choice((window * 3 // 2, 2 * window, window * 5 // 2))
    begin = draw.randrange(length - size)
    again = passage.tokens[begin : begin + size]
    tokens, spans, read = again, [], 0
    while len(tokens) < length:
        tokens += between.tokens[read : read + gap]
        read += gap
        if length - len(tokens) >= window // 2:  # else what is left of it says too little
            spans.append((len(tokens), min(len(tokens) + size, length)))
        tokens += again
    return Recall(tokens[:length], f"{passage.work}, {between.work}", tuple(spans))


def _rank(seed: int) -> Callable[[str], str]:
    return lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def _licence(wheel: zipfile.ZipFile) -> str:
    name = next(one for one in wheel.namelist() if one.endswith(".dist-info/METADATA"))
    facts = email.message_from_string(wheel.read(name).decode("utf-8", "replace"))
    named = facts.get("License-Expression") or facts.get("License")
    if named and len(named) < 60:
        return str(named)
    classified = [one.rpartition(":: ")[2] for one in facts.get_all("Classifier", []) if one.startswith("License ::")]
    return ", ".join(classified) or "named in its own files"
