"""How likely a model finds what it reads: what the capability `Scoring` takes and returns. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class ScoreFacts:
    """What a backbone's scores are of. It is known without a model."""

    medium: Literal["speech", "text"]
    """What a clip is read from. Tasks on sound ask for `speech`."""
    streams: tuple[str, ...]
    """Names of the K streams that the model predicts, in the order of `Scores`; the first K streams of a clip."""
    weights: Mapping[str, tuple[float, ...]]
    """The ways to weigh the K streams into one score, each by its name, as `semantic`. Scores of all are kept."""
    chosen: str
    """The way that the config chooses, a name in `weights`."""
    positions_per_second: float | None = None
    """Positions in a second of sound; None if positions are tokens of text."""
    attention_span: int | None = None
    """How many positions the backbone's own attention sees; None if it sees all."""
    padding: int = 0
    """Fills the end of a clip that is shorter than the others of its batch. What is predicted there is left out."""
    piece: int = 256
    """Positions that `ScoreStream.read` is best given at once: more take memory, fewer take time."""


@dataclass(frozen=True)
class Scores:
    """What a model finds likely, position by position."""

    nll: Tensor
    """`−log p(what stands there | everything before)` in nats, `[B,K,T]` float32 or float64; 0 where `mask` is false.

    It is aligned with the clip: entry t is about what the clip holds at t, whatever the model delays.
    """
    mask: Tensor
    """Where the model predicts something that the clip really holds, `[B,K,T]` bool."""


class ClipReader(Protocol):
    """Turns files into clips: what a model reads, `[S,T]` int64 on the CPU, S its input streams, T positions."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What makes the same clip of the same file: codec and tokenizer by their hashes, and options."""
        ...

    @property
    def notice(self) -> str | None:
        """What a user must know of these clips, for example that a stand-in made them."""
        ...

    def positions(self, path: Path) -> int:
        """T of a file, by its header alone.

        Raises:
            ttt.errors.EnvironmentProblem: the file is missing or broken; the message names it.
        """
        ...

    def read(self, path: Path) -> Tensor:
        """A file's clip, `[S,T]`. The file is encoded by itself, from its first sample.

        Raises:
            ttt.errors.EnvironmentProblem: the file is missing or broken; the message names it.
        """
        ...

    def stream(self, path: Path) -> Iterator[Tensor]:
        """The pieces `[S,t]` of `read`, in order, in memory that does not grow with the file.

        Raises:
            ttt.errors.EnvironmentProblem: the file is missing or broken; the message names it.
        """
        ...


@runtime_checkable
class SoundReader(ClipReader, Protocol):
    """A reader of sound files, which also gives the sound itself: what a clip could be told by without any model."""

    def sound(self, path: Path) -> NDArray[np.float32]:
        """The samples of a file, its channels averaged, `[samples]`.

        Raises:
            ttt.errors.EnvironmentProblem: the file is missing or broken; the message names it.
        """
        ...


class ScoreStream(Protocol):
    """Reads arbitrarily long streams side by side, in memory that does not grow."""

    def read(self, piece: Tensor) -> Scores:
        """Read the next piece `[B,S,t]` of each stream, on the model's device.

        A model that predicts some streams later than others may hold positions back. The scores of all pieces and of
        `finish`, one after another, are those of `Scoring.score` on the whole.
        """
        ...

    def finish(self) -> Scores:
        """The scores that were held back; of length 0 if none were."""
        ...

    def learn_anew(self) -> None:
        """Start the fast weights of every TTT layer anew. Everything else that the model remembers stays."""
        ...
