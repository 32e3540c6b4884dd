"""A backbone whose scores are planted: what an evaluation makes of them is known in advance.

Its clips are the bytes of files. The loss of a byte is what a function says of the clip. A stream learns: it remembers
all that it has read since its fast weights started anew; with closed gates it remembers nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from toy import ToyBackbone

from ttt.adapter import Gate
from ttt.config import RunConfig
from ttt.errors import EnvironmentProblem
from ttt.plugins import ClipReader, EvalContext, ScoreFacts, Scores, Scoring, run_config_model

Loss = Callable[[Tensor], Tensor]
"""The losses `[T]` of a clip `[T]`."""


class PlantedReader:
    """Reads the bytes of files."""

    identity: Mapping[str, str] = {"codec": "bytes"}
    notice: str | None = None

    def positions(self, path: Path) -> int:
        return len(self.read(path)[0])

    def read(self, path: Path) -> Tensor:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise EnvironmentProblem(f"{path}: {error}") from None
        if content.startswith(b"broken"):
            raise EnvironmentProblem(f"{path}: cannot be decoded")
        return torch.tensor(list(content), dtype=torch.int64)[None]

    def sound(self, path: Path) -> NDArray[np.float32]:
        return (self.read(path)[0] * 37 % 101).float().numpy()

    def stream(self, path: Path) -> Iterator[Tensor]:
        yield from self.read(path).split(3, dim=1)


class PlantedBackbone(ToyBackbone, Scoring):
    """A backbone that finds likely what it is told to."""

    span: int | None = None
    loss_of: Loss = staticmethod(lambda clip: torch.ones(len(clip)))

    def score_facts(self, config: RunConfig) -> ScoreFacts:
        return ScoreFacts(
            "speech",
            ("semantic", "acoustic 1"),
            {"semantic": (1.0, 0.0), "all": (1.0, 1.0)},
            "semantic",
            10.0,
            self.span,
            -1,
        )

    def clip_reader(self, config: RunConfig, *, device: torch.device | str) -> ClipReader:
        return PlantedReader()

    def score(self, model: nn.Module, clips: Tensor) -> Scores:
        rows = [self.loss_of(clip[0][clip[0] != -1]) for clip in clips]
        length = clips.shape[-1]
        nll = torch.stack([torch.nn.functional.pad(row, (0, length - len(row))) for row in rows])
        mask = clips[:, 0] != -1
        return Scores(torch.stack([nll, 2 * nll], 1), torch.stack([mask, mask], 1))

    @contextmanager
    def score_stream(self, model: nn.Module, *, batch_size: int) -> Iterator[PlantedStream]:
        yield PlantedStream(model)


class PlantedStream:
    """Loss 1 for a byte whose last four have been read before, in this order; else 2. Closed gates: 2, always."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._heard: set[tuple[int, ...]] = set()
        self._last: tuple[int, ...] = ()

    def read(self, piece: Tensor) -> Scores:
        losses = []
        closed = any(module.closed for module in self._model.modules() if isinstance(module, Gate))
        for byte in piece[0, 0].tolist():
            self._last = (*self._last, byte)[-4:]
            losses.append(1.0 if self._last in self._heard and not closed else 2.0)
            self._heard.add(self._last)
        nll = torch.tensor(losses)[None, None].expand(1, 2, -1)
        return Scores(nll, torch.ones_like(nll, dtype=torch.bool))

    def finish(self) -> Scores:
        return Scores(torch.zeros(1, 2, 0), torch.zeros(1, 2, 0, dtype=torch.bool))

    def learn_anew(self) -> None:
        self._heard = set()


def planted(loss: Loss | None = None, *, span: int | None = None, **evaluation: Any) -> EvalContext:
    """What a task measures with, on a planted backbone."""
    backbone = PlantedBackbone()
    if loss is not None:
        backbone.loss_of = loss  # type: ignore[method-assign]
    backbone.span = span
    config = run_config_model(backbone).model_validate({"backbone": {"name": "toy"}, "eval": evaluation})
    model = nn.ModuleList([Gate(4, 0.1)])
    return EvalContext(
        model,
        backbone,
        config,
        None,
        torch.device("cpu"),
        step=0,
        stop=lambda: False,  # type: ignore[arg-type]
    )
