"""What a task measures with: a model under one arm, the scores of clips, and streams of any length."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttt.adapter import gates_closed
from ttt.config.schema import RunConfig
from ttt.errors import UsageError
from ttt.eval.items import Item, made_by
from ttt.plugins.backbone import Backbone
from ttt.plugins.capabilities import Scoring, SegmentReset
from ttt.plugins.capability_base import has_capability
from ttt.plugins.capable import capability
from ttt.plugins.eval_tasks import EvalContext
from ttt.plugins.scoring import ClipReader, ScoreFacts, Scores, ScoreStream

RESET_SEC = 15.0
"""After how many seconds the arm `reset` starts fast weights anew, if the config does not say."""
RESET_TOKENS = 512
"""The same for backbones whose positions are not of sound."""
_CLIPS_KEPT = 256


class Bench:
    """A model under an arm, with what its backbone offers for measuring it.

    Args:
        context: the model, its backbone and config.
        options: those of the task.
    """

    def __init__(self, context: EvalContext, options: Any) -> None:
        self.context = context
        self.options = options
        self.arm = "ttt"
        """The arm now: `ttt`, `closed` or `reset`."""
        self.items_left: Sequence[Item] = ()
        """The items that are to be measured, in order; for a task that prepares what several of them need."""
        self.kept: dict[str, Any] = {}
        """What a task keeps from one call to the next, by names of its own."""
        self.tell: Callable[[str], None] = lambda text: None
        """Told how far an item is that takes long."""
        most = max(_CLIPS_KEPT, 2 * context.config.eval.eval_batch_size)  # both clips of each pair of a batch
        self._read = functools.lru_cache(maxsize=most)(lambda path: self.reader.read(path))

    @property
    def model(self) -> nn.Module:
        """Injected, in eval mode. Under the arm `closed` it is the plain backbone."""
        return self.context.model

    @property
    def backbone(self) -> Backbone:
        """The model's backbone."""
        return self.context.backbone

    @property
    def config(self) -> RunConfig:
        """Resolved."""
        return self.context.config

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.context.device

    @property
    def folder(self) -> Path:
        """Where the task's own files go, the folder `TASK_made` of the evaluation. It may have to be made.

        Raises:
            UsageError: a run is being trained, whose evaluations keep numbers alone.
        """
        if self.context.folder is None:
            raise UsageError(f"the task {self.options.name} writes files; measure it with `ttt eval`, not in training")
        return made_by(self.context.folder, self.options.name)

    @functools.cached_property
    def scoring(self) -> Scoring:
        """The backbone as what scores clips.

        Raises:
            UsageError: it cannot.
        """
        return capability(self.backbone, Scoring)

    @functools.cached_property
    def facts(self) -> ScoreFacts:
        """What the scores are of."""
        return self.scoring.score_facts(self.config)

    @functools.cached_property
    def reader(self) -> ClipReader:
        """What turns files into clips. The codec is loaded when it is first asked for."""
        return self.scoring.clip_reader(self.config, device=self.device)

    def clip(self, path: Path) -> Tensor:
        """A file's clip `[S,T]`; the last ones are kept, so that every arm reads the same without encoding it again."""
        clip: Tensor = self._read(path)
        return clip

    @property
    def reset_every(self) -> int:
        """After how many positions the arm `reset` starts fast weights anew."""
        config, rate = self.config.eval, self.facts.positions_per_second
        if config.reset_tokens is not None:
            return config.reset_tokens
        if rate is None:
            return RESET_TOKENS
        return max(1, round((config.reset_sec or RESET_SEC) * rate))

    @contextlib.contextmanager
    def under(self, arm: str) -> Iterator[Bench]:
        """A context in which the model is under an arm.

        Raises:
            UsageError: the backbone knows no way to start fast weights anew.
        """
        before, self.arm = self.arm, arm
        try:
            with self._gates_and_resets(arm):
                yield self
        finally:
            self.arm = before

    def _gates_and_resets(self, arm: str) -> contextlib.AbstractContextManager[None]:
        if arm == "closed":
            return gates_closed(self.model)
        if arm == "reset" and (
            has_capability(self.backbone, SegmentReset) or not has_capability(self.backbone, Scoring)
        ):
            return capability(self.backbone, SegmentReset).reset_at_segments(self.model)
        return contextlib.nullcontext()  # streams of clips are cut where they are read

    @torch.no_grad()
    def scores(self, clips: Sequence[Tensor]) -> list[Scores]:
        """The scores of each clip `[S,T]`, as `[1,K,T]` on the CPU. Each starts with fresh fast weights.

        The clips are read side by side in batches of `eval.eval_batch_size`, shorter ones padded at their end.
        """
        size = self.config.eval.eval_batch_size
        found: list[Scores] = []
        for start in range(0, len(clips), size):
            part = clips[start : start + size]
            if self.arm == "reset" and max(clip.shape[-1] for clip in part) > self.reset_every:
                found += [self._streamed(clip) for clip in part]
            else:
                found += self._scored(part)
        return found

    def _scored(self, clips: Sequence[Tensor]) -> list[Scores]:
        longest = max(clip.shape[-1] for clip in clips)
        padded = [F.pad(clip, (0, longest - clip.shape[-1]), value=self.facts.padding) for clip in clips]
        scores = self.scoring.score(self.model, torch.stack(padded).to(self.device))
        nll, mask = scores.nll.cpu(), scores.mask.cpu()
        lengths = [clip.shape[-1] for clip in clips]
        return [Scores(nll[i : i + 1, :, :n], mask[i : i + 1, :, :n]) for i, n in enumerate(lengths)]

    def _streamed(self, clip: Tensor) -> Scores:
        with self.stream() as stream:
            parts = [stream.read(clip[None].to(self.device)), stream.finish()]
        return Scores(*(torch.cat([getattr(part, name).cpu() for part in parts], -1) for name in ("nll", "mask")))

    @contextlib.contextmanager
    def stream(self, batch_size: int = 1) -> Iterator[ScoreStream]:
        """A context in which the model reads B streams in pieces; under the arm `reset` it learns anew now and then."""
        with torch.no_grad(), self.scoring.score_stream(self.model, batch_size=batch_size) as stream:
            yield Restarting(stream, every=self.reset_every) if self.arm == "reset" else stream


class Restarting:
    """A stream that starts its fast weights anew after every so many positions, however they come in pieces.

    Args:
        stream: the stream.
        every: positions between two starts.
    """

    def __init__(self, stream: ScoreStream, *, every: int) -> None:
        self._stream = stream
        self._every = every
        self._read = 0

    def read(self, piece: Tensor) -> Scores:
        """Read the next piece; see `ScoreStream`."""
        parts: list[Scores] = []
        while piece.shape[-1]:
            room = self._every - self._read % self._every
            if self._read and room == self._every:
                self._stream.learn_anew()
            parts.append(self._stream.read(piece[..., :room]))
            self._read += min(room, piece.shape[-1])
            piece = piece[..., room:]
        return Scores(torch.cat([part.nll for part in parts], -1), torch.cat([part.mask for part in parts], -1))

    def finish(self) -> Scores:
        """What was held back."""
        return self._stream.finish()

    def learn_anew(self) -> None:
        """Start fast weights anew now, too."""
        self._stream.learn_anew()
