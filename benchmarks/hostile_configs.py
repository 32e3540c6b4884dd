"""What `ttt check` and `ttt import-config` do with hostile files: seconds, memory, and the sentence.

    python benchmarks/hostile_configs.py [--only WORDS] [--seconds 1.0] [--megabytes 150] [--timeout 30]

Each case is a process of its own under a limit of address space and of time. Exits with 1 if one takes more CPU time
or memory than the docs promise for files of up to 1 MiB, ends by a signal, or shows a traceback.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MIB = 1 << 20
DEEP = 200_000
ADDRESS_SPACE = 8 << 30
VIDEO = "backbone: {name: videodit, preset: 5b}\n"
MOSHI = "backbone: {name: moshi, preset: demo}\n"
TOML = '[model]\nssm_layer = "ttt_mlp"\nvideo_length = "3sec"\n'
HUGE = "1" + "0" * 22


class Case(NamedTuple):
    """One file and what is done with it."""

    name: str
    content: bytes
    arguments: tuple[str, ...] = ("check", "FILE")
    file: str = "hostile.yaml"


class Outcome(NamedTuple):
    """What came of it."""

    wall: float
    cpu: float
    megabytes: float
    code: int
    output_bytes: int
    sentence: str
    problem: str


def full(piece: str, *, before: str = "", after: str = "") -> bytes:
    """A file of 1 MiB of one piece over and over."""
    room = MIB - len((before + after).encode())
    return (before + piece * (room // len(piece.encode())) + after).encode()


def numbered(line: str, *, before: str = "", size: int = MIB) -> bytes:
    """A file of 1 MiB of a line with its number in it, over and over."""
    lines, length, number = [before], len(before), 0
    while length < size - 100:
        lines.append(line.format(number))
        length += len(lines[-1].encode())
        number += 1
    return "".join(lines).encode()


def syntax_cases() -> Iterator[Case]:
    """What a parser has to do with."""
    for piece in (
        "[",
        "{",
        "- ",
        "? ",
        "a: ",
        "&a ",
        "*a ",
        "!!a ",
        "!",
        "'",
        '"',
        "|\n",
        ">",
        "\n",
        "#",
        "# x\n",
        "%a\n",
    ):
        yield Case(f"1 MiB of {piece!r}", full(piece))
    for piece in (
        "---\n",
        "...\n",
        ": ",
        ",",
        "{a: ",
        "[1, ",
        "[]\n",
        "\t",
        " ",
        "x",
        "\u2028",
        "\x85",
        "é",
        "漢",
        "🎉",
        "<<: ",
    ):
        yield Case(f"1 MiB of {piece!r}", full(piece))
    yield Case("flow list of numbers", full("1,", before="a: [", after="]"))
    yield Case("flow list in a section", full("1,", before=MOSHI + "ttt: {layers: [", after="]}"))
    yield Case("list of numbers, block", full("- 1\n", before=MOSHI + "run_dir:\n"))
    yield Case("lists in lists, 1 MiB", full("[],", before="a: [", after="]"))
    yield Case("500k keys in braces", full("a,", before="{", after="}"))
    yield Case("keys by the line", numbered("k{}:\n", before=MOSHI))
    yield Case("duplicate keys", full("a:\n", before=MOSHI))
    yield Case("duplicate keys in ttt", full(" a: 1\n", before=MOSHI + "ttt:\n"))
    yield Case("one long key", full("k", before=MOSHI, after=": 1\n"))
    yield Case("one long value", full("k", before=MOSHI + "run_dir: ", after="\n"))
    yield Case("one long quoted value", full("k", before=MOSHI + 'run_dir: "', after='"\n'))
    yield Case("escapes in quotes", full("\\x41", before=MOSHI + 'run_dir: "', after='"\n'))
    yield Case("surrogates in quotes", full("\\ud800", before=MOSHI + 'run_dir: "', after='"\n'))
    yield Case("NULs in quotes", full("\\0", before=MOSHI + 'run_dir: "', after='"\n'))
    yield Case("block text", full("  word word\n", before=MOSHI + "run_dir: |\n"))
    yield Case("folded text", full("  word word\n", before=MOSHI + "run_dir: >\n"))
    yield Case("plain text over lines", full("  word\n", before=MOSHI + "run_dir: a\n"))
    yield Case("long comment", full("x", before=MOSHI + "# "))
    yield Case("long comments", full("# " + "x" * 1000 + "\n", before=MOSHI))
    yield Case("documents", full("---\na: 1\n"))
    yield Case("lines that continue nothing", full("x\n"))
    yield Case(
        "bomb of aliases",
        b"".join(
            [b"a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n"]
            + [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n".encode() for n in range(1, 30)]
        ),
    )
    yield Case("anchors by the line", numbered("k{0}: &a{0} 1\n", before=MOSHI))
    yield Case("aliases by the line", full("- *a\n", before="b: &a [1]\nc:\n"))
    yield Case("aliases of a long text", full("- *a\n", before="b: &a " + "x" * 100_000 + "\nc:\n"))
    yield Case("merge keys", full("  <<: *a\n", before="b: &a {c: 1}\nd:\n"))
    yield Case("tags of Python", full("- !!python/object/apply:os.system [ls]\n", before="a:\n"))
    yield Case("numbers in base 60", full("1:2:3,", before="a: [", after="]"))
    yield Case("dates", full("2024-01-01 10:00:00,", before="a: [", after="]"))
    yield Case("a number of 1 MiB", full("1", before=MOSHI + "train: {max_steps: ", after="}\n"))
    yield Case("a number with _ of 1 MiB", full("1_", before=MOSHI + "train: {max_steps: ", after="0}\n"))
    yield Case("a hexadecimal number", full("f", before=MOSHI + "train: {max_steps: 0x", after="}\n"))
    yield Case("a number with commas", full("000,", before=MOSHI + "train: {max_steps: '1,", after="000'}\n"))
    yield Case("no UTF-8", b"\xff" * MIB)
    yield Case("NULs", b"\0" * MIB)
    yield Case("control characters", full("a: \x1b\n"))
    yield Case("line separators", full("a\u2028", before=MOSHI + "run_dir: 'x", after="'\n"))
    yield Case("deep by indentation", "".join(" " * n + "a:\n" for n in range(1400)).encode())
    yield Case("an error in a line of 1 MiB", full("x: 1, ", before="{", after="}}"))
    yield Case("2 MiB", full("#") * 2)


def finding_cases() -> Iterator[Case]:
    """Files with nothing but things to be found."""
    many = "".join(f"  key{n}: 1\n" for n in range(9000))
    long = "ttt: {" + ", ".join(f"key{n}: 1" for n in range(9000)) + "}\n"
    near = "ttt: {" + ", ".join(f"mini_batch_siz{n}: 1" for n in range(9000)) + "}\n"
    layers = MOSHI + "ttt: {layers: [" + ", ".join(str(n) for n in range(100, 9100)) + "]}\n"
    wrong = MOSHI + "ttt: {layers: [" + ", ".join(f"'{n}'" for n in range(100, 9100)) + "]}\n"
    texts = MOSHI + "train: {betas: [" + ", ".join("x" for n in range(9000)) + "]}\n"
    twice = MOSHI + "ttt: {" + ", ".join("layers: all" for n in range(9000)) + "}\n"
    moved = MOSHI + "".join(f"s{n}: {{lr: 1}}\n" for n in range(3000))
    lengthy = MOSHI + "ttt: {" + ", ".join(f"{'k' * 100}{n}: 1" for n in range(9000)) + "}\n"
    files = {
        "9,000 unknown keys by the line": MOSHI + "ttt:\n" + many,
        "9,000 unknown keys in a line": MOSHI + long,
        "9,000 misspelt keys in a line": MOSHI + near,
        "9,000 long keys in a line": lengthy,
        "9,000 unknown keys at the top": MOSHI + many.replace("  ", ""),
        "9,000 layers that are not there": layers,
        "9,000 layers in quotes": wrong,
        "9,000 texts for two numbers": texts,
        "9,000 keys written twice": twice,
        "3,000 unknown sections": moved,
    }
    for name, text in files.items():
        yield Case(name, text.encode())
        for form in ("json", "sarif", "github"):
            yield Case(f"{name}, {form}", text.encode(), ("check", "FILE", "--format", form))
        yield Case(f"{name}, --fix", text.encode(), ("check", "FILE", "--fix"))


def number_cases() -> Iterator[Case]:
    """Numbers that nobody means."""
    yield Case("videodit 5b, width 16·10^21", (VIDEO + f"data: {{width: 16{HUGE[1:]}}}\n").encode())
    yield Case(
        "videodit demo, width 16·10^21", (VIDEO.replace("5b", "demo") + f"data: {{width: 16{HUGE[1:]}}}\n").encode()
    )
    yield Case("num_heads 10^22", (MOSHI + f"ttt: {{num_heads: {HUGE}}}\n").encode())
    yield Case("batch_size 10^300", (MOSHI + f"train: {{batch_size: 1{'0' * 300}}}\n").encode())
    yield Case("lr 1e38", (MOSHI + "train: {lr: 1e38}\n").encode())
    yield Case("group of 10^300", (MOSHI + f"ttt: {{scan_checkpoint_group_size: 1{'0' * 300}}}\n").encode())
    yield Case("layers 0-99999999999", (MOSHI + "ttt: {layers: 0-99999999999}\n").encode())
    yield Case(
        "layers, a text of 10^5", (MOSHI + f"ttt: {{layers: '{','.join(map(str, range(100_000)))}'}}\n").encode()
    )
    yield Case("layers, a text of 5,000 digits", (MOSHI + f"ttt: {{layers: '{'9' * 5000}'}}\n").encode())
    yield Case("mlp_hidden_dims of 9,000", (MOSHI + f"ttt: {{mlp_hidden_dims: [{'9,' * 9000}]}}\n").encode())


def override_cases() -> Iterator[Case]:
    """Overrides; Linux takes at most 128 KiB in one argument."""
    config = MOSHI.encode()
    overrides = {
        "50,000 levels": [".".join("a" * 50_000) + "=1"],
        "50,000 levels in ttt": ["ttt." + ".".join("a" * 50_000) + "=1"],
        "60,000 lists in lists": ["ttt.layers=" + "[" * 60_000],
        "a text of 120,000": ["run_dir=" + "x" * 120_000],
        "a key of 120,000": ["x" * 120_000 + "=1"],
        "no = in 120,000": ["x" * 120_000],
        "a list of 60,000": ["ttt.layers=[" + "1," * 59_000 + "]"],
        "a number of 120,000 digits": ["train.max_steps=" + "9" * 120_000],
        "9,000 of them": [f"ttt.key{n}=1" for n in range(9000)],
        "9,000 of one key": [f"train.lr={n}" for n in range(1, 9001)],
        "9,000 that are none": ["x"] * 9000,
    }
    for name, words in overrides.items():
        given = [part for word in words for part in ("--set", word)]
        yield Case(f"--set: {name}", config, ("check", "FILE", *given))


def import_cases() -> Iterator[Case]:
    """Configs of other programs."""
    files = {
        "dotted levels": TOML.encode() + b"x." * DEEP + b"x = 1\n",
        "1 MiB of dotted levels": full("x.", before=TOML, after="x = 1\n"),
        "a table of dotted levels": TOML.encode() + b"[" + b"x." * DEEP + b"x]\n",
        "quoted dotted levels": full('"x".', before=TOML, after="x = 1\n"),
        "spaced dotted levels": full("x . ", before=TOML, after="x = 1\n"),
        "tables": numbered("[t{}]\n", before=TOML),
        "tables in tables": numbered("[model.t{}]\na.b.c.d = 1\n", before=TOML),
        "arrays of tables": full("[[t]]\n", before=TOML),
        "arrays of tables in them": full("[[t]]\n[[t.u]]\n", before=TOML),
        "keys": numbered("k{} = 1\n", before=TOML),
        "64 KiB of tables": numbered("[t{}]\n", before=TOML, size=65_000),
        "64 KiB of tables of 32 levels": numbered("[k{}." + "x." * 30 + "y]\n", before=TOML, size=65_000),
        "64 KiB of keys of 32 levels": numbered("k{}." + "x." * 30 + "y = 1\n", before=TOML, size=65_000),
        "dotted keys": numbered("a.b.c.k{} = 1\n", before=TOML),
        "a number of 5,000 digits": TOML.encode() + b"x = " + b"9" * 5000 + b"\n",
        "a number of 1 MiB": full("9", before=TOML + "x = ", after="\n"),
        "a hexadecimal number of 1 MiB": full("f", before=TOML + "x = 0x", after="\n"),
        "a number with _ of 5,000 digits": TOML.encode() + b"x = " + b"9_" * 5000 + b"9\n",
        "a time of day": TOML.encode() + b"x = 07:32:00\n",
        "a date": TOML.encode() + b"x = 1979-05-27\n",
        "a moment": TOML.encode() + b"x = 1979-05-27T07:32:00Z\n",
        "a time of day for a key": TOML.encode() + b"mini_batch_size = 07:32:00\n",
        "a list of moments for a key": TOML.encode() + b"mini_batch_size = [1979-05-27T07:32:00Z, {x = 1979-05-27}]\n",
        "not a number for a key": TOML.encode() + b"mini_batch_size = nan\nttt_base_lr = -inf\n",
        "deep lists": TOML.encode() + b"x = " + b"[" * 100_000 + b"]" * 100_000 + b"\n",
        "deep lists, 1 MiB": full("[", before=TOML + "x = "),
        "deep inline tables": TOML.encode() + b"x = " + b"{a=" * 100_000 + b"1" + b"}" * 100_000 + b"\n",
        "a list of numbers": full("1,", before=TOML + "x = [", after="]\n"),
        "a text of 1 MiB": full("x", before=TOML + 'x = "', after='"\n'),
        "a text over lines": full("x\n", before=TOML + 'x = """', after='"""\n'),
        "a key of 1 MiB": full("x", before=TOML, after=" = 1\n"),
        "an inline table of keys": TOML.encode() + b"x = {" + b",".join(b"k%d=1" % n for n in range(90_000)) + b"}\n",
        "1 MiB of =": full("=", before=TOML),
        "1 MiB of TODO": full("a = TODO\n", before=TOML),
        "1 MiB of spaces": full(" ", before=TOML),
        "1 MiB of spaces by the line": full(" " * 1000 + "\n", before=TOML),
        "1 MiB of words": full("a", before=TOML),
        "1 MiB of dashes and spaces": full("- ", before=TOML),
        "huge numbers everywhere": (
            TOML
            + f"mini_batch_size = {HUGE}\nttt_base_lr = 1e308\n[training]\nsteps = {HUGE}\nglobal_batch_size = {HUGE}\n"
            f"grad_accum_steps = {HUGE}\n[optimizer]\nlr = 1e308\nlr_ssm = 1e-308\nlr_end = 1e308\n"
            f"[parallelism]\ndp_sharding = {HUGE}\n"
        ).encode(),
        "integers that no float holds": (TOML + f"[optimizer]\nlr = 1{'0' * 400}\nlr_ssm = 1\n").encode(),
        "a length of 5,000 digits": f'[model]\nssm_layer = "ttt_mlp"\nvideo_length = "{"9" * 5000}sec"\n'.encode(),
    }
    for name, content in files.items():
        yield Case(f"TOML: {name}", content, ("import-config", "FILE"), "hostile.toml")
    yield Case(
        "TOML: dotted levels, named otherwise", files["dotted levels"], ("import-config", "FILE"), "hostile.conf"
    )
    yaml = {
        "unknown keys": numbered("k{}: 1\n", before="full_finetuning: false\n", size=90_000),
        "keys in sections": numbered("s{}: {{a: 1}}\n", before="full_finetuning: false\n", size=90_000),
        "infinite steps": b"full_finetuning: false\nmax_steps: .inf\n",
        "steps that are no number": b"full_finetuning: false\nmax_steps: .nan\n",
        "steps beyond a float": b"full_finetuning: false\nmax_steps: 1" + b"0" * 390 + b"\n",
        "a share that is infinite": b"full_finetuning: false\noptim: {pct_start: .inf}\n",
        "a share beyond a float": b"full_finetuning: false\nmax_steps: 1"
        + b"0" * 390
        + b"\noptim: {pct_start: 1e308}\n",
        "1 MiB of lists": full("[", before="full_finetuning: "),
        "dotted keys that collide": b"optim.lr: 3\noptim: {lr: 4}\nfull_finetuning: true\nlora: {a.b: 1}\n",
    }
    for name, content in yaml.items():
        yield Case(f"YAML import: {name}", content, ("import-config", "FILE"))
    hostile = "x\nbackbone: {name: evil}\r# y\u2028z\x85w.yaml"
    yield Case("YAML import: a name with newlines", b"full_finetuning: false\n", ("import-config", "FILE"), hostile)


def cases() -> Iterator[Case]:
    """All of them."""
    yield from syntax_cases()
    yield from finding_cases()
    yield from number_cases()
    yield from override_cases()
    yield from import_cases()


def _limit(seconds: float) -> None:
    """What a child may take before the system ends it."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CPU, (round(seconds), round(seconds)))


def run(case: Case, folder: Path, timeout: float) -> Outcome:
    """Do with one file what its case says."""
    file = folder / case.file
    file.write_bytes(case.content)
    words = [case.file if word == "FILE" else word for word in case.arguments]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "NO_COLOR": "1"}
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "ttt_cli", *words],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: _limit(timeout),
        )
        killer = threading.Timer(60 * timeout, child.kill)
        killer.start()
        _, status, usage = os.wait4(child.pid, 0)
        killer.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - start
        size = output.seek(0, os.SEEK_END)
        output.seek(0)
        beginning = output.read(1 << 16).decode(errors="replace")
        output.seek(max(size - (1 << 16), 0))
        text = beginning + output.read().decode(errors="replace")
    file.unlink()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("Traceback")]
    told = next((line for line in lines if "error" in line), lines[0] if lines else "")
    problem = ""
    if child.returncode < 0:
        problem = f"ended by signal {-child.returncode}"
    elif "Traceback (most recent call last)" in text or "tell who made" in text:
        problem, told = "traceback", lines[-1]
    return Outcome(
        wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000, child.returncode, size, told.strip(), problem
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="cases with these words in their name")
    parser.add_argument("--seconds", type=float, default=1.0, help="of CPU time that a case may take")
    parser.add_argument("--megabytes", type=float, default=150.0, help="that it may have at its peak")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds of CPU time after which it is ended")
    parser.add_argument("--width", type=int, default=100, help="columns of the sentence")
    arguments = parser.parse_args()
    print(f"{'case':46} {'wall s':>7} {'CPU s':>7} {'MB':>6} {'exit':>4} {'output':>10}  first sentence")
    failed = count = 0
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            if arguments.only not in case.name:
                continue
            count += 1
            outcome = run(case, Path(folder), arguments.timeout)
            problem = outcome.problem
            if not problem and outcome.cpu > arguments.seconds:
                problem = "slow"
            if not problem and outcome.megabytes > arguments.megabytes:
                problem = "large"
            failed += bool(problem)
            print(
                f"{case.name.encode('unicode_escape').decode()[:46]:46} {outcome.wall:7.2f} {outcome.cpu:7.2f} "
                f"{outcome.megabytes:6.0f} {outcome.code:4} {outcome.output_bytes:10,}  "
                f"{f'[{problem}] ' if problem else ''}{outcome.sentence[: arguments.width]}",
                flush=True,
            )
    print(f"{failed} of {count} cases failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
