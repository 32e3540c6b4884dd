"""Make a small synthetic speech benchmark in the published layouts, or see what gates score on one.

    python plugins/moshi/scripts/make_speech_benchmark.py OUT              the whole set: minutes, some 100 MB an hour
    python plugins/moshi/scripts/make_speech_benchmark.py OUT --subset     the subset that ships with ttt-moshi
    python plugins/moshi/scripts/make_speech_benchmark.py OUT --only librilight --hours 3 --books 1
    python plugins/moshi/scripts/make_speech_benchmark.py --gates FOLDER   what length, energy, unigrams score

It needs espeak-ng (`apt-get install espeak-ng`) and the Python package soundfile. Everything is deterministic: the
same version of espeak-ng and the same seed give the same files, byte for byte, on one machine with the same versions
of torch and soundfile. `manifest.json` has the versions. All speech in it is synthetic.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from speech_benchmark import gating, layouts, making, speaking
from speech_benchmark.making import FULL, SUBSET, TASKS, Benchmark

NOTICE = """# A synthetic speech benchmark

All speech here is synthetic: espeak-ng {version} says it. It was made from nothing but the texts in
`plugins/moshi/scripts/speech_benchmark`, by

    python plugins/moshi/scripts/make_speech_benchmark.py {arguments}

It has the file layouts of sWUGGY and sBLIMP (ZeroSpeech 2021), tStory and sStory (SpokenStoryCloze) and Libri-Light,
so that an evaluation of it and of the published sets is the same code. It is none of them and holds nothing of them:
accuracies on it compare with no published number.

Texts: words, sentences and stories are this project's own, under its licence. What is read aloud is made from this
project's templates, but for passages of works in the public domain: {passages}.
espeak-ng is free software under the GPL, version 3 or later, which does not extend to the sound it makes. Keep this
notice beside any copy.

`manifest.json` has versions, seed, pronunciations, planted repeats, SHA-256 of every file, and what length, loudness,
energy and unigrams of codec codes score on the pairs.
"""


def make(out: Path, arguments: Sequence[str], size: making.Size, tasks: Sequence[str], seed: int) -> None:
    benchmark = Benchmark(out, size, seed, say=print)
    content: dict[str, object] = {
        "synthetic": True,
        "espeak_ng": speaking.version(),
        "torch": torch.__version__,
        "seed": seed,
        "size": dataclasses.asdict(size),
    }
    content |= {task: TASKS[task](benchmark) for task in tasks}
    found = gating.gate_folder(out)
    print(gating.table(found))
    content["gates"] = {
        name: {gate: dataclasses.asdict(accuracy) for gate, accuracy in gates.items()} for name, gates in found.items()
    }
    passages = "; ".join(making.PASSAGES)
    shown = " ".join(["OUT", *arguments])
    notice = NOTICE.format(version=speaking.version(), arguments=shown, passages=passages)
    (out / "NOTICE.md").write_text(notice, encoding="utf-8")
    files = sorted(file for file in out.rglob("*") if file.is_file() and file.name != "manifest.json")
    content["sha256"] = {file.relative_to(out).as_posix(): _digest(file) for file in files}
    layouts.write_json(out / "manifest.json", content)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="a new or empty folder")
    parser.add_argument("--gates", type=Path, metavar="FOLDER", help="only score this folder by gates")
    parser.add_argument("--subset", action="store_true", help="the small set that ships with ttt-moshi")
    parser.add_argument("--only", choices=TASKS, action="append", help="only this task; may be given again")
    parser.add_argument("--hours", type=float, help="of speech to read as Libri-Light's, all books together")
    parser.add_argument("--books", type=int, help="how many books these are")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # sums in one order
    if given.gates is not None:
        found = gating.gate_folder(given.gates)
        if not found:
            raise SystemExit(f"{given.gates} holds none of {', '.join((*layouts.ZEROSPEECH, *layouts.STORIES))}")
        print(gating.table(found))
        return
    if given.out is None:
        parser.error("give a folder to write, or --gates FOLDER")
    if given.out.exists() and any(given.out.iterdir()):
        raise SystemExit(f"{given.out} is not empty; give a new folder")
    if given.books is not None and given.books < 1:
        parser.error("--books is 1 or more")
    if given.hours is not None and not 0 < given.hours < math.inf:
        parser.error("--hours is above 0")
    changed = {name: getattr(given, name) for name in ("hours", "books") if getattr(given, name) is not None}
    size = dataclasses.replace(SUBSET if given.subset else FULL, **changed)
    make(given.out, [a for a in arguments if a != str(given.out)], size, given.only or list(TASKS), given.seed)


if __name__ == "__main__":
    main(sys.argv[1:])
