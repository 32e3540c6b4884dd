"""What turns texts into tokens: a model's own tokenizer, or one token for each byte."""

from __future__ import annotations

import functools
import hashlib
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ttt.errors import EnvironmentProblem, UsageError
from ttt.hf.facts import BYTE_VOCABULARY
from ttt.hf.hub import loading
from ttt.hf.options import CausalLMOptions, TextData
from ttt.words import first_line

Ids = NDArray[np.uint32]
_PADDING, _BEGINNING, _END = range(256, BYTE_VOCABULARY)


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    @property
    def name(self) -> str:
        """What a user calls it."""
        ...

    @property
    def beginning(self) -> int | None:
        """The token that begins a sequence."""
        ...

    @property
    def end(self) -> int | None:
        """The token that ends one."""
        ...

    @property
    def adds(self) -> tuple[bool, bool]:
        """Whether it begins and ends a sequence by itself."""
        ...

    @property
    def identity(self) -> str:
        """What makes the same tokens of the same text."""
        ...

    def encode(self, text: str) -> Ids:
        """The tokens of a text, nothing added."""
        ...


class ByteTokenizer:
    """One token for each byte of a text in UTF-8; then padding, beginning and end."""

    name = identity = "bytes"
    beginning: int | None = _BEGINNING
    end: int | None = _END
    adds = (False, False)

    def encode(self, text: str) -> Ids:
        """The bytes."""
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.uint32)


class PretrainedTokenizer:
    """A tokenizer of `transformers`.

    Args:
        tokenizer: the tokenizer.
        name: the repository or folder that it is from.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        self.name = name
        self.beginning: int | None = tokenizer.bos_token_id
        self.end: int | None = tokenizer.eos_token_id

    @functools.cached_property
    def adds(self) -> tuple[bool, bool]:
        """Whether it begins and ends a sequence by itself."""
        ids = self._tokenizer("a")["input_ids"]
        begins = bool(ids) and ids[0] == self.beginning
        return begins, len(ids) > begins and ids[-1] == self.end

    @functools.cached_property
    def identity(self) -> str:
        """The hash of all that it is made of."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        made_of = backend.to_str() if backend is not None else repr(sorted(self._tokenizer.get_vocab().items()))
        return f"sha256:{hashlib.sha256(made_of.encode('utf-8', 'surrogatepass')).hexdigest()}"

    def encode(self, text: str) -> Ids:
        """Its tokens."""
        found = self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return np.asarray(found["input_ids"], dtype=np.uint32)


def load_tokenizer(options: CausalLMOptions) -> Tokenizer:
    """The tokenizer that the options name: the model's own, bytes, or another's.

    Raises:
        EnvironmentProblem: it cannot be loaded.
    """
    named = options.tokenizer
    if named == "bytes" or (named is None and options.model is None):
        return ByteTokenizer()
    name = named or str(options.model)
    own = {"revision": options.revision, "gguf_file": options.gguf_file} if named is None else {}
    with loading(name, own.get("revision"), key="backbone.model" if named is None else "backbone.tokenizer"):
        from transformers import AutoTokenizer

        return PretrainedTokenizer(
            AutoTokenizer.from_pretrained(name, **{key: value for key, value in own.items() if value is not None}), name
        )


class DocumentTokens:
    """The tokens of documents, begun and ended as the config says.

    Args:
        tokenizer: the tokenizer.
        data: the config's section.

    Raises:
        UsageError: a token is to be added that the tokenizer does not have.
    """

    def __init__(self, tokenizer: Tokenizer, data: TextData) -> None:
        self.tokenizer = tokenizer
        begins, ends = tokenizer.adds
        self._begin = self._added("add_bos", data.add_bos, begins, tokenizer.beginning)
        self._end = self._added("add_eos", data.add_eos, ends, tokenizer.end)

    def _added(self, key: str, asked: bool | None, usual: bool, token: int | None) -> list[int]:
        if asked and token is None:
            raise UsageError(
                f"the tokenizer {self.tokenizer.name} has no such token", key=f"data.{key}", fix=f"write {key}: null"
            )
        return [token] if token is not None and (usual if asked is None else asked) else []

    @property
    def identity(self) -> dict[str, str]:
        """What makes the same tokens of the same text."""
        added = f"{len(self._begin)} at the beginning, {len(self._end)} at the end"
        return {"tokenizer": self.tokenizer.identity, "added": added}

    def encode(self, text: str) -> Ids:
        """The tokens of a document."""
        try:
            ids = self.tokenizer.encode(text)
        except (EnvironmentProblem, MemoryError):
            raise
        except Exception as error:  # of the tokenizer's own code, for half a character, say
            raise EnvironmentProblem(f"the tokenizer {self.tokenizer.name} fails: {first_line(error)}") from error
        if not self._begin and not self._end:
            return ids
        added = [np.asarray(part, dtype=np.uint32) for part in (self._begin, self._end)]
        return np.concatenate([added[0], ids, added[1]])
