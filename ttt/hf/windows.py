"""What training reads: windows of documents, in order, each of one document alone."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ttt.config import RunConfig
from ttt.config.sources import DataSource, places_of_split
from ttt.errors import EnvironmentProblem, UsageError
from ttt.hf.demo import require_whole
from ttt.hf.documents import Document, Source, find_source, place_of, read_documents
from ttt.hf.facts import known_config, size_in
from ttt.hf.options import CausalLMOptions, TextData
from ttt.hf.running import IGNORED
from ttt.hf.tokens import DocumentTokens, Ids, load_tokenizer
from ttt.plugins.data import SourceFiles, files_of_sources
from ttt.words import first_few

_FEWEST = 2
"""Tokens of a document: one to read, and one to predict."""


def text_windows(config: RunConfig[Any, Any], *, split: str, own: Path | None) -> TextWindows:
    """The windows of a split, `train` or `eval`; `eval` is the training data if there is no other.

    Args:
        config: of a causal language model.
        split: which.
        own: the backbone's own text; None if it has none.

    Raises:
        EnvironmentProblem: a file or the tokenizer cannot be read.
        UsageError: the config names no data, and the backbone has none of its own.
    """
    options: CausalLMOptions = config.backbone
    data: TextData = config.data
    named = places_of_split(data, split)
    if not named and own is None:
        raise UsageError(
            "a pretrained model has no data of its own",
            key="data.train_data",
            fix="name a text file, a .jsonl, a .parquet, or a folder of them",
        )
    if not named:
        require_whole()
        named = {"data.train_data": DataSource(path=str(own))}
    found = {place: find_source(source.path, field=place) for place, source in named.items()}
    tokens = DocumentTokens(load_tokenizer(options), data)
    corpus, counts = Corpus(), []
    for place, files in found.items():
        counts.append(read_corpus(corpus, files, tokens, data, field=place))
    corpus.require_in_vocabulary(size_in(known_config(options), "vocab_size"), tokens.tokenizer.name)
    return TextWindows(
        corpus,
        data.window_tokens,
        files_of_sources(
            (source.path, source.weight, count) for source, count in zip(named.values(), counts, strict=True)
        ),
    )


class Corpus:
    """The tokens of documents one after another, 4 bytes each, and where each document begins."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        """What a user must know of it."""
        self._files: list[str] = []
        self._numbers: dict[str, int] = {}
        self._tokens = array("I")
        self._begin = array("q", [0])
        self._file, self._place = array("l"), array("q")
        self._before = 0
        self._short: list[str] = []
        self._left_out = 0

    def start(self, source: Source) -> None:
        """Begin with a source of documents."""
        if source.notice:
            self.notices.append(source.notice)
        for file in source.files:
            if self._numbers.setdefault(str(file), len(self._files)) == len(self._files):
                self._files.append(str(file))
        self._before, self._short, self._left_out = len(self), [], 0

    def add(self, document: Document, ids: Ids) -> None:
        """Add a document; one in which there is nothing to predict is left out."""
        if len(ids) < _FEWEST:
            self._left_out += 1
            if len(self._short) <= 3:
                self._short.append(document.place)
            return
        self._tokens.frombytes(ids.astype(np.dtype(f"u{self._tokens.itemsize}")).tobytes())
        self._begin.append(len(self._tokens))
        self._file.append(self._numbers[str(document.file)])
        self._place.append(document.number or 0)

    def finish(self, source: Source, field: str) -> int:
        """Tell what was left out of a source; returns how many documents are left.

        Raises:
            EnvironmentProblem: none is.
        """
        if len(self) == self._before:
            if self._left_out == 1 and len(source.files) == 1:
                told = f"{self._short[0]} is empty, or a single token"
            elif self._left_out:
                told = f"none of the {self._left_out} documents has two tokens: {first_few(self._short)}"
            else:
                told = f"{first_few(source.files)} holds no document"
            raise EnvironmentProblem(
                f"{told}, so that there is nothing to predict", key=field, fix="name texts that are longer"
            )
        if self._left_out:
            are = "document is" if self._left_out == 1 else "documents are"
            self.notices.append(
                f"{self._left_out} {are} empty or a single token, and not read: {first_few(self._short)}"
            )
        return len(self) - self._before

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._file)

    @property
    def begin(self) -> NDArray[np.int64]:
        """Where each document begins, and the end of the last, `[documents + 1]`."""
        return np.frombuffer(self._begin, dtype=np.int64)

    def slice(self, start: int, stop: int) -> NDArray[np.int64]:
        """Some of the tokens."""
        return np.asarray(self._tokens[start:stop], dtype=np.int64)

    def place(self, number: int) -> str:
        """A document's file, and its line or row there."""
        return place_of(self._files[self._file[number]], self._place[number] or None)

    def require_in_vocabulary(self, size: int | None, tokenizer: str) -> None:
        """Refuse tokens that a model of so many does not have.

        Raises:
            UsageError: there is one.
        """
        largest = int(np.frombuffer(self._tokens, dtype=f"u{self._tokens.itemsize}").max())
        if size is not None and largest >= size:
            raise UsageError(
                f"the tokenizer {tokenizer} makes a token {largest:,}, and the model has {size:,} of them",
                key="backbone.tokenizer",
                fix="write tokenizer: null for the model's own, or a larger config.vocab_size for a random model",
            )


def read_corpus(corpus: Corpus, source: Source, tokens: DocumentTokens, data: TextData, *, field: str) -> int:
    """Read the documents of a source and keep their tokens; returns how many documents.

    Raises:
        EnvironmentProblem: a document cannot be read, or there are none.
    """
    corpus.start(source)
    for document in read_documents(source, text_key=data.text_key, field=field):
        try:
            corpus.add(document, tokens.encode(document.text))
        except EnvironmentProblem as error:
            raise EnvironmentProblem(f"{field}: {document.place}: {error}") from error.__cause__
    return corpus.finish(source, field)


class TextWindows:
    """Windows of `length` tokens of each document, one after another; `ttt.plugins.WindowDataset` has the methods.

    A window is what is read, `input_ids [T]`, and the token that follows each, `shift_labels [T]`. So a document of n
    tokens has n − 1 to predict, in ceil((n − 1) / T) windows. The last is filled up at its end: `attention_mask` is 0
    there, and labels are −100.
    """

    def __init__(self, corpus: Corpus, length: int, sources: Sequence[SourceFiles] = ()) -> None:
        self._corpus = corpus
        self._length = length
        predicted = np.diff(corpus.begin) - 1
        self._first: NDArray[np.int64] = np.concatenate([[0], np.cumsum(-(-predicted // length))])
        self.files: Sequence[range] = _Ranges(self._first)
        """The windows of each document."""
        self.sources = sources
        """Which documents are of which source."""
        self.notice: str | None = "; ".join(corpus.notices) or None
        """What a user must know of these documents."""

    def __len__(self) -> int:
        """Number of windows."""
        return int(self._first[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One window, int64 on the CPU."""
        _, start, stop = self._locate(index)
        held = torch.from_numpy(self._corpus.slice(start, stop + 1))
        count = stop - start
        window = {
            "input_ids": torch.zeros(self._length, dtype=torch.int64),
            "attention_mask": torch.zeros(self._length, dtype=torch.int64),
            "shift_labels": torch.full((self._length,), IGNORED),
        }
        window["input_ids"][:count] = held[:-1]
        window["attention_mask"][:count] = 1
        window["shift_labels"][:count] = held[1:]
        return window

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Windows to a batch, `[B,T]` each."""
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def describe(self, index: int) -> str:
        """A window in the user's words, "corpus.jsonl:3, tokens 1,024-2,048"."""
        number, start, stop = self._locate(index)
        begin = int(self._corpus.begin[number])
        return f"{self._corpus.place(number)}, tokens {start - begin:,}-{stop - begin:,}"

    def _locate(self, index: int) -> tuple[int, int, int]:
        """The document of a window, and where in the corpus the tokens that it reads begin and end."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        begin, end = (int(place) for place in self._corpus.begin[number : number + 2])
        start = begin + (index - int(self._first[number])) * self._length
        return number, start, min(start + self._length, end - 1)


class _Ranges(Sequence[range]):
    """Ranges that follow one another, by their beginnings and the last one's end: 8 bytes each."""

    def __init__(self, first: NDArray[np.int64]) -> None:
        self._first = first

    def __len__(self) -> int:
        return len(self._first) - 1

    @overload
    def __getitem__(self, index: int) -> range: ...

    @overload
    def __getitem__(self, index: slice) -> list[range]: ...

    def __getitem__(self, index: int | slice) -> range | list[range]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return range(int(self._first[place]), int(self._first[place + 1]))
