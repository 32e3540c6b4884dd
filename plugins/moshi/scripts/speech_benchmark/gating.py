"""What length, loudness, energy and the codes' own frequencies score on a folder of pairs.

Codes are those of the demo's codec, first codebook. On a set that is any use, each gate is near 50 %.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch

from speech_benchmark import balance, layouts
from ttt.eval.speech import gates
from ttt_moshi.audio import UnreadableAudioError, inspect_audio, read_audio, resample
from ttt_moshi.codec import DemoCodec


class Ear:
    """Hears clips as the gates do."""

    def __init__(self) -> None:
        self.codec = DemoCodec.load()

    def hear(self, sound: np.ndarray, rate: int) -> balance.Heard:
        """A clip from its samples, `[samples]` float32."""
        wav = resample(torch.from_numpy(sound)[None], rate, self.codec.sample_rate)
        codes = self.codec.encode(wav[None])[0, 0].numpy()
        return balance.Heard({name: gate(sound) for name, gate in gates.SOUND_GATES.items()}, codes)

    def hear_file(self, file: Path) -> balance.Heard:
        """A clip from its file, read as a run reads it."""
        try:
            info = inspect_audio(file)
            sound = read_audio(file, info, 0, info.samples)[0].numpy()
        except (OSError, UnreadableAudioError) as error:
            raise SystemExit(f"{file}: {getattr(error, 'strerror', None) or error}") from None
        if not sound.size:
            raise SystemExit(f"{file}: holds no sound")
        return self.hear(sound, info.sample_rate)


def gate_folder(root: Path) -> dict[str, dict[str, balance.Accuracy]]:
    """The accuracy of each gate on each set below a folder."""
    ear = Ear()
    found = {}
    for name, pairs in layouts.pairs_of(root):
        grouped = itertools.groupby(pairs, key=lambda pair: pair.unit)
        found[name] = balance.accuracies(
            [[(ear.hear_file(p.correct), ear.hear_file(p.incorrect)) for p in voices] for _, voices in grouped]
        )
    return found


def table(found: dict[str, dict[str, balance.Accuracy]]) -> str:
    """The accuracies as text, each with its standard error beside 50 %."""
    width = max(len(gate) for gate in balance.GATES)
    lines = []
    for name, by_gate in found.items():
        lines.append(f"{name}, {next(iter(by_gate.values())).pairs} pairs (chance is 50 %)")
        for gate, accuracy in by_gate.items():
            off = "" if accuracy.honest else "   more than two standard errors from 50 %"
            lines.append(f"  {gate:<{width}}  {100 * accuracy.mean:5.1f} % ± {100 * accuracy.stderr:.1f}{off}")
    return "\n".join(lines)
