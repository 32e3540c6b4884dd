"""Make the demo's data anew: `python plugins/moshi/scripts/make_demo.py SOURCE_DIR`.

SOURCE_DIR holds the recordings that ttt_moshi/demo/NOTICE.md names and their transcripts.json: a list of
`{"file", "voice": "male" | "female", "segments": [{"start", "end", "text"}, …]}`. Everything is deterministic:
the same recordings give the same files, byte for byte, on one machine with the same versions of torch, soundfile and
sentencepiece.
"""

from __future__ import annotations

import argparse
import io
import json
import string
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import soundfile
import sphn
import torch
from torch import Tensor

from ttt_moshi import demo
from ttt_moshi.codec import CodecSettings, DemoCodec

SAMPLE_RATE = 16000
PAUSE_SEC = 0.4
FADE_SEC = 0.01
MALE = "sense_and_sensibility_{}.flac"
FEMALE = "sonnet_1.flac"
# A turn is a male recording, or lines of the sonnet, first and last (line 0 is its number, read aloud).
TRAIN_TURNS: tuple[str | tuple[int, int], ...] = ("0870", (1, 3), "0880", (4, 6), "0890", (7, 9), "0930", (10, 12))
EVAL_TURNS: tuple[str | tuple[int, int], ...] = ("0920", (13, 14))
CODEBOOKS, CARDINALITY, KMEANS_STEPS = 8, 64, 30
VOCABULARY = 300
# Letters that the transcripts lack still have to be spelt in somebody's own data.
CHARACTERS = string.ascii_letters + string.digits + ".,:;!?'\"-()&"


@dataclass(frozen=True)
class Turn:
    """Lines that one voice reads without a break: `(first sample, end, text)`, and the sound around them."""

    main: bool
    sound: np.ndarray
    lines: tuple[tuple[int, int, str], ...]


def read_turns(source: Path, chosen: Sequence[str | tuple[int, int]]) -> Iterator[Turn]:
    transcripts = {Path(entry["file"]).name: entry["segments"] for entry in _read_json(source / "transcripts.json")}
    for choice in chosen:
        name = FEMALE if isinstance(choice, tuple) else MALE.format(choice)
        segments = transcripts[name]
        if isinstance(choice, tuple):
            segments = segments[choice[0] : choice[1] + 1]
        sound, rate = soundfile.read(source / name)
        if rate != SAMPLE_RATE or sound.ndim != 1:
            raise SystemExit(f"{source / name}: expected mono at {SAMPLE_RATE} Hz")
        begin, end = (round(segments[i][key] * SAMPLE_RATE) for i, key in ((0, "start"), (-1, "end")))
        lines = tuple(
            (round(s["start"] * SAMPLE_RATE) - begin, round(s["end"] * SAMPLE_RATE) - begin, s["text"])
            for s in segments
        )
        yield Turn(not isinstance(choice, tuple), _fade(sound[begin:end]), lines)


def build_dialogue(turns: Sequence[Turn]) -> tuple[np.ndarray, list[list[Any]]]:
    """The sound `[samples, 2]`, Moshi left and the user right, and `[word, [start, end], speaker]` in order."""
    pause = round(PAUSE_SEC * SAMPLE_RATE)
    sound = np.zeros((sum(len(turn.sound) + pause for turn in turns) + pause, 2))
    alignments: list[list[Any]] = []
    at = pause
    for turn in turns:
        sound[at : at + len(turn.sound), 0 if turn.main else 1] = turn.sound
        speaker = "SPEAKER_MAIN" if turn.main else "SPEAKER_OTHER"
        for begin, end, text in turn.lines:
            first, last = sounding_part(turn.sound[begin:end])
            words = spread_words(text, (at + begin + first) / SAMPLE_RATE, (at + begin + last) / SAMPLE_RATE)
            alignments += [[word, [round(a, 3), round(b, 3)], speaker] for word, a, b in words]
        at += len(turn.sound) + pause
    return sound, alignments


def sounding_part(sound: np.ndarray) -> tuple[int, int]:
    """Samples from the first to the last 20 ms within 24 dB of the loudest."""
    piece = SAMPLE_RATE // 50
    power = np.square(sound[: len(sound) // piece * piece]).reshape(-1, piece).mean(1)
    loud = np.flatnonzero(power > power.max() * 10**-2.4)
    return int(loud[0]) * piece, int(loud[-1] + 1) * piece


def spread_words(text: str, start: float, end: float) -> list[tuple[str, float, float]]:
    """Words one after another, each as long as its share of the letters (and one for the gap)."""
    words = text.split()
    edges = np.cumsum([0] + [len(word) + 1 for word in words])
    times = start + edges / edges[-1] * (end - start)
    return list(zip(words, times[:-1].tolist(), times[1:].tolist(), strict=True))


def write_dialogue(index: Path, sound: np.ndarray, alignments: list[list[Any]]) -> None:
    audio = index.with_suffix(".flac")
    soundfile.write(audio, sound, SAMPLE_RATE, subtype="PCM_16", compression_level=1.0)
    lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in alignments)
    index.with_suffix(".json").write_text(f'{{"alignments": [\n{lines}\n]}}\n', encoding="utf-8")
    entry = {"path": audio.name, "duration": len(sound) / SAMPLE_RATE}
    index.write_text(json.dumps(entry) + "\n", encoding="utf-8")


def fit_codec(audio: Path) -> DemoCodec:
    """Fit each codebook, by k-means, to what the ones before it leave of the speech in `audio`.

    Frames may begin anywhere in a sound, so each channel is framed at every hop: eight times the frames.
    """
    settings = CodecSettings()
    width = settings.spectra_per_frame * settings.mels
    blank = DemoCodec(settings, torch.zeros(CODEBOOKS, CARDINALITY, width))
    sound, _ = sphn.read(str(audio), sample_rate=SAMPLE_RATE)
    shifts = range(0, settings.frame_size, settings.hop_size)
    views = [blank.log_mels(torch.from_numpy(sound[:, None, shift:])).flatten(0, 1) for shift in shifts]
    residual = torch.cat(views).flatten(1).double()
    residual = residual[(residual > 1).any(1)]
    generator = torch.Generator().manual_seed(0)
    codebooks = []
    for _ in range(CODEBOOKS):
        codebook = fit_codebook(residual, generator).half().double()
        residual = residual - codebook[nearest(residual, codebook)]
        codebooks.append(codebook)
    return DemoCodec(settings, torch.stack(codebooks))


def fit_codebook(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """k-means++ and Lloyd's steps, entry 0 held at zero."""
    entries = vectors.new_zeros(1, vectors.shape[1])
    distance = vectors.square().sum(1)
    for _ in range(CARDINALITY - 1):
        chosen = vectors[torch.multinomial(distance, 1, generator=generator)]
        entries = torch.cat([entries, chosen])
        distance = torch.minimum(distance, (vectors - chosen).square().sum(1))
    for _ in range(KMEANS_STEPS):
        owner = nearest(vectors, entries)
        count = torch.bincount(owner, minlength=CARDINALITY)[:, None]
        total = torch.zeros_like(entries).index_add_(0, owner, vectors)
        entries = torch.where(count > 0, total / count.clamp_min(1), entries)
        entries[0] = 0
    return entries


def nearest(vectors: Tensor, entries: Tensor) -> Tensor:
    return (entries.square().sum(1) - 2 * vectors @ entries.T).argmin(1)


def fit_tokenizer(texts: Sequence[str]) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        required_chars=CHARACTERS,
        character_coverage=1.0,
        normalization_rule_name="identity",
        # as in kyutai's tokenizer: Moshi's text padding is 3, the end of it 0
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def report(codec: DemoCodec, audio: Path) -> str:
    sound, _ = sphn.read(str(audio), sample_rate=SAMPLE_RATE)
    wav = torch.from_numpy(sound[:, None])
    truth, codes = codec.log_mels(wav), codec.encode(wav)
    loud = (truth > 1).flatten(2).any(-1)
    errors = [
        (codec.decode_log_mels(codes[:, :k]) - truth)[loud].square().mean().sqrt().item()
        for k in range(1, codec.num_codebooks + 1)
    ]
    return " ".join(f"{error:.2f}" for error in errors)


def _fade(sound: np.ndarray) -> np.ndarray:
    ramp = np.linspace(0, 1, round(FADE_SEC * SAMPLE_RATE))
    faded = sound.copy()
    faded[: len(ramp)] *= ramp
    faded[-len(ramp) :] *= ramp[::-1]
    return faded


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE_DIR")
    source: Path = parser.parse_args(arguments).source
    torch.set_num_threads(1)  # sums in one order
    texts = []
    for index, chosen in ((demo.TRAIN_DATA, TRAIN_TURNS), (demo.EVAL_DATA, EVAL_TURNS)):
        turns = list(read_turns(source, chosen))
        sound, alignments = build_dialogue(turns)
        write_dialogue(index, sound, alignments)
        if index == demo.TRAIN_DATA:
            texts = [text for turn in turns for _, _, text in turn.lines]
        print(f"{index.name}: {len(sound) / SAMPLE_RATE:.2f} s, {len(alignments)} words")
    demo.TOKENIZER.write_bytes(fit_tokenizer(texts))
    fit_codec(demo.TRAIN_DATA.with_suffix(".flac")).save(demo.CODEC)
    codec = DemoCodec.load()
    print("error of log-mels in dB with 1 to 8 codebooks")
    for index in (demo.TRAIN_DATA, demo.EVAL_DATA):
        print(f"  {index.name}: {report(codec, index.with_suffix('.flac'))}")


if __name__ == "__main__":
    main(sys.argv[1:])
