"""Do our accuracies of pairs agree with those of ZeroSpeech's own scoring package, `zerospeech-benchmarks`?

    python3 -m venv zerospeech && zerospeech/bin/pip install zerospeech-benchmarks==0.9.4 'pandas<3'
    python benchmarks/zerospeech_agreement.py --python zerospeech/bin/python            # pairs that are made up here
    python benchmarks/zerospeech_agreement.py --python … --folder SLM21 --scores SCORES # a data set, and scores of it

The package needs pydantic 1, so that it cannot be installed beside ttt, and pandas 2: it takes columns by number, which
pandas 3 counts differently. It looks for news on the network when it is imported; here it finds a folder that says that
there are none. SLM21 holds `lexical/dev/gold.csv` and `syntactic/dev/gold.csv`, SCORES `lexical/dev.txt` and
`syntactic/dev.txt` with lines `stem score`, as ZeroSpeech takes them for submission.

What the package computes: a pair of a voice is 1, ½ or 0; the mean over voices of an id (of a type, subtype and id);
then over ids. `std` is the spread over ids, so that our standard error is `std / √n`. Its bands of frequency are 0,
1 to 4, 5 to 19, 20 to 99 and 100 or more, whatever their labels say. It pairs sentences by their order in `gold.csv`,
so that shuffled rows give it other numbers: the last column shows that ours stay. The exit code is 1 if a figure
differs. With `--record FILE` its figures are written, for tests without the package.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ttt.eval.statistics import estimate

SETS = ("lexical", "syntactic")
BANDS = {"oov": (0, 1), "1-5": (1, 5), "6-20": (5, 20), "21-100": (20, 100), ">100": (100, math.inf)}
"""Frequencies by the package's labels: from the first number up to below the second."""
RECORDED = Path(__file__).parent / "results" / "zerospeech.json"
COLUMNS = {
    "lexical": ("filename", "id", "voice", "frequency", "word", "phones", "length", "correct"),
    "syntactic": ("filename", "id", "voice", "type", "subtype", "transcription", "correct"),
}
THEIRS = """
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import numpy, pandas
from importlib.metadata import version
from zerospeech.generics import FileItem
from zerospeech.tasks.lm.lexical import LexicalTask
from zerospeech.tasks.lm.syntactic import SyntacticTask

def groups(prefix, frame, key):
    rows = frame.dropna(subset=["score"]).to_dict("records")
    return {f"{prefix}{row[key]}": {"n": row["n"], "score": row["score"], "std": row["std"]} for row in rows}

def items(name):
    return [FileItem.from_file(Path(folder) / file) for folder, file in
            ((sys.argv[2], f"{name}/dev.txt"), (sys.argv[1], f"{name}/dev/gold.csv"))]

found = {}
scores, gold = items("lexical")
pairs, bands, lengths = LexicalTask(quiet=True).run_lexical_eval(scores, gold)
known = bands[(bands["frequency"] != "oov") & (bands["n"] > 0)]
found["lexical"] = {
    "all": {"n": len(pairs), "score": pairs["score"].mean(), "std": pairs["score"].std()},
    "in vocabulary": {"n": int(known["n"].sum()), "score": numpy.average(known["score"], weights=known["n"])},
    **groups("frequency ", bands, "frequency"), **groups("length ", lengths, "length"),
}
scores, gold = items("syntactic")
pairs, types = SyntacticTask(quiet=True).run_syntactic_comparison(gold, scores)
found["syntactic"] = {
    "all": {"n": len(pairs), "score": pairs["score"].mean(), "std": pairs["score"].std()},
    **groups("type ", types, "type"),
}
found["versions"] = {name: version(name) for name in ("zerospeech-benchmarks", "pandas", "numpy")}
print("FIGURES" + json.dumps(found, default=float))
"""

Row = dict[str, str]
Figures = dict[str, dict[str, float]]
"""Of a set: `n`, `score` and `std` of all, and of each group."""


class Data(NamedTuple):
    """A data set in the published layout, without its sound."""

    gold: Mapping[str, Sequence[Row]]
    """The rows of `gold.csv` by set."""
    scores: Mapping[str, Mapping[str, float]]
    """Scores by set and stem."""


# --- what is scored ---


def made_up(seed: int = 0) -> Data:
    """Words that some voices lack, of all bands of frequency, and sentences of several types, with scores that tie."""
    generator = random.Random(seed)
    rows: dict[str, list[Row]] = {name: [] for name in SETS}
    for number in range(120):
        for voice in "ABCD"[: 4 if number % 5 else 2]:
            for correct in "10":
                frequency = str([0, 1, 4, 5, 6, 19, 20, 21, 99, 100, 5000][number % 11])
                word = f"word{number}" if correct == "1" else ""
                cells = (number, voice, frequency, word, f"W{number}{correct}", str(3 + number % 7), correct)
                rows["lexical"].append(_row("lexical", len(rows["lexical"]), cells))
    for kind, subtype in (("agreement", "simple"), ("agreement", "long"), ("islands", "wh"), ("npi", "only")):
        for number in range(20):  # ids begin again with each subtype
            for voice in "AB":
                for correct in "10":
                    cells = (number, voice, kind, subtype, f"sentence {number} {correct}", correct)
                    rows["syntactic"].append(_row("syntactic", len(rows["syntactic"]), cells))
    scores = {
        name: {row["filename"]: round(generator.random() + 0.3 * int(row["correct"]), 1) for row in rows[name]}
        for name in SETS
    }
    return Data(rows, scores)


def _row(name: str, number: int, cells: Sequence[object]) -> Row:
    return dict(zip(COLUMNS[name], map(str, (f"{name}{number:04d}", *cells)), strict=True))


def shuffled(data: Data, seed: int = 0) -> Data:
    """The same rows in another order."""
    gold = {name: random.Random(seed).sample(list(rows), len(rows)) for name, rows in data.gold.items()}
    return Data(gold, data.scores)


def read(folder: Path, scores: Path) -> Data:
    gold: dict[str, list[Row]] = {}
    found: dict[str, dict[str, float]] = {}
    for name in SETS:
        with (folder / name / "dev" / "gold.csv").open(encoding="utf-8", newline="") as file:
            gold[name] = list(csv.DictReader(file))
        lines = (scores / name / "dev.txt").read_text(encoding="utf-8").splitlines()
        found[name] = {stem: float(score) for stem, score in (line.split() for line in lines if line.strip())}
    return Data(gold, found)


def write(data: Data, folder: Path) -> None:
    for name in SETS:
        (folder / name / "dev").mkdir(parents=True, exist_ok=True)
        with (folder / name / "dev" / "gold.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, data.gold[name][0])
            writer.writeheader()
            writer.writerows(data.gold[name])
        lines = [f"{stem} {score!r}\n" for stem, score in data.scores[name].items()]
        (folder / name / "dev.txt").write_text("".join(lines), encoding="utf-8")


# --- figures ---


def ours(data: Data) -> dict[str, Figures]:
    """What `ttt.eval.statistics` gives."""
    return {name: _figures(name, data) for name in SETS}


def _figures(name: str, data: Data) -> Figures:
    pairs: dict[tuple[str, str], dict[str, float]] = {}
    facts: dict[str, Row] = {}
    for row in data.gold[name]:
        unit = row["id"] if name == "lexical" else f"{row['type']}/{row['subtype']}/{row['id']}"
        pairs.setdefault((unit, row["voice"]), {})[row["correct"]] = data.scores[name][row["filename"]]
        if row["correct"] == "1":
            facts[unit] = row
    outcomes = [(unit, 0.5 if p["1"] == p["0"] else float(p["1"] > p["0"])) for (unit, _), p in pairs.items()]
    groups: dict[str, list[tuple[str, float]]] = {}
    for unit, value in outcomes:
        for group in _groups(name, facts[unit]):
            groups.setdefault(group, []).append((unit, value))
    return {group: _of_group(members) for group, members in groups.items()}


def _groups(name: str, row: Row) -> Iterator[str]:
    yield "all"
    if name == "syntactic":
        yield f"type {row['type']}"
        return
    band = next(label for label, (first, end) in BANDS.items() if first <= int(row["frequency"]) < end)
    yield f"frequency {band}"
    yield f"length {row['length']}"
    if band != "oov":
        yield "in vocabulary"


def _of_group(members: Sequence[tuple[str, float]]) -> dict[str, float]:
    units = [unit for unit, _ in members]
    found = estimate([value for _, value in members], units, units)
    std = {} if found.stderr is None else {"std": found.stderr * math.sqrt(found.units)}
    return {"n": found.units, "score": found.mean, **std}


def theirs(python: Path, data: Data) -> dict[str, Any]:
    """What the package gives, in its own Python."""
    with tempfile.TemporaryDirectory() as folder:
        write(data, Path(folder))
        index = Path(folder) / "app" / "repo.json"
        index.parent.mkdir()
        index.write_text("{}")
        os.utime(index, (0, 0))  # an index of long ago is not looked up anew
        command = [str(python), "-c", THEIRS, folder, folder]
        environment = {**os.environ, "APP_DIR": str(index.parent)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"the package failed:\n{result.stderr}")
    found: dict[str, Any] = json.loads(result.stdout.partition("FIGURES")[2])
    return found


def differences(mine: Mapping[str, Figures], other: Mapping[str, Any]) -> list[str]:
    """Where two sets of figures differ; the package gives no `std` for what is in vocabulary."""
    found = []
    for name in SETS:
        for group in sorted({*mine[name], *other[name]}):
            a, b = mine[name].get(group, {}), other[name].get(group, {})
            for key in sorted({*a, *b} - ({"std"} if group == "in vocabulary" else set())):
                if not math.isclose(a.get(key, math.nan), b.get(key, math.nan), rel_tol=1e-9, abs_tol=1e-12):
                    found.append(f"{name} {group}: {key} is {a.get(key)} here, {b.get(key)} there")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--python", type=Path, required=True, help="a Python that has the package")
    parser.add_argument("--folder", type=Path, help="a data set in ZeroSpeech's layout")
    parser.add_argument("--scores", type=Path, help="scores of it, as for submission")
    parser.add_argument("--record", type=Path, help="write the package's figures to this file")
    arguments = parser.parse_args()
    if (arguments.folder is None) != (arguments.scores is None):
        parser.error("--folder and --scores go together")
    data = made_up() if arguments.folder is None else read(arguments.folder, arguments.scores)
    mine, again, other = ours(data), ours(shuffled(data)), theirs(arguments.python, data)
    other_again = theirs(arguments.python, shuffled(data))
    print("| set | group | pairs | ZeroSpeech | ttt | ZeroSpeech, shuffled | ttt, shuffled |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for name in SETS:
        for group in sorted(other[name]):
            four = [100 * figures[name][group]["score"] for figures in (other, mine, other_again, again)]
            print(f"| {name} | {group} | {mine[name][group]['n']} | {' | '.join(f'{one:.4f}' for one in four)} |")
    wrong = [*differences(mine, other), *(f"shuffled: {one}" for one in differences(mine, again))]
    print("\n".join(wrong) or f"\nall figures agree; {other['versions']}")
    if arguments.record:
        arguments.record.write_text(json.dumps(other, indent=2) + "\n", encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
