"""`ttt sample --audio`: answers to recordings."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ttt.words import first_few
from ttt_cli.model import find_model, warn_of_changes
from ttt_cli.options import require_free
from ttt_cli.terminal import show

if TYPE_CHECKING:
    from ttt.plugins import AnswerRequest

Gates = Literal["open", "closed"]
Channel = Literal["left", "right", "mean"]


@dataclass(frozen=True)
class AskedAnswers:
    """What the command line asks of answers."""

    audio: tuple[Path, ...]
    out: str
    seconds: float
    seed: int
    stereo: bool
    user_channel: Channel | None
    gates: Gates
    temperature: float | None
    text_temperature: float | None
    top_k: int | None
    text_top_k: int | None

    @property
    def count(self) -> int:
        """How many answers, each with a seed of its own."""
        return len(self.audio)

    def make(self, model: str, *, adapter: str | None, overrides: list[str], overwrite: bool, verify: bool) -> None:
        """Answer the recordings with what a run has learned."""
        from ttt.check import load_config
        from ttt.plugins import Answering, capability

        config_file, learned, told = find_model(Path(model), adapter, verify=verify)
        loaded = load_config(config_file, overrides=overrides, training=False)
        answering = capability(loaded.backbone, Answering)
        warn_of_changes(Path(model), learned, loaded.config)
        requests = self._requests()
        for request in requests:
            for file in answering.plan_answer(loaded.config, request):
                require_free(file, overwrite=overwrite)
        show(told)
        if self.gates == "closed":
            show("gates closed: the plain backbone, without TTT and LoRA")
        sys.stdout.flush()  # importing torch and the backbone's libraries takes seconds

        from rich.console import Console

        from ttt.sample import answer
        from ttt.train.terminal import lasting

        console = Console()
        with lasting(console):
            answer(
                loaded.config,
                loaded.backbone,
                requests,
                adapter=learned,
                console=console,
                # if a run's folder is named, its checkpoint is compared already
                verify=verify and (adapter is not None or not Path(model).is_dir()),
            )

    def _requests(self) -> list[AnswerRequest]:
        """A request for each recording; several with seeds one after another."""
        from ttt.plugins import AnswerRequest

        same: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("seconds", "stereo", "user_channel", "gates", "temperature", "text_temperature", "top_k")
        }
        places = self._places()
        return [
            AnswerRequest(audio=audio, out=place, seed=self.seed + number, text_top_k=self.text_top_k, **same)
            for number, (audio, place) in enumerate(zip(self.audio, places, strict=True))
        ]

    def _places(self) -> list[Path]:
        """The file of each answer: `--out`, or the recording's name in the folder `--out`.

        Raises:
            UsageError: `--out` must name a folder and does not, or two recordings have the same name.
        """
        from ttt.errors import UsageError

        path = Path(self.out)
        if len(self.audio) == 1 and not (self.out.endswith("/") or path.is_dir()):
            return [path]
        if (os.path.lexists(path) and not path.is_dir()) or path.suffix.lower() == ".wav":
            raise UsageError(
                f"--out {path}: names one file, but there are {len(self.audio)} recordings; name a folder for them"
            )
        places = [path / f"{audio.stem}.wav" for audio in self.audio]
        twice = sorted({place.name for place in places if places.count(place) > 1})
        if twice:
            raise UsageError(
                f"--out {path}: several recordings would be answered in {first_few(twice)}; answer them apart"
            )
        return places
