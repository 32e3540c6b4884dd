"""What `ttt` does with files that are none, never end, or hold something else: seconds, memory, exit code, sentence.

    python benchmarks/hostile_files.py [--only WORDS] [--seconds 60] [--megabytes 1500] [--path FOLDER…]

Each kind is made in a folder of its own (a FIFO that nobody writes to, a device without end, a folder, a socket, a
sparse file of 10 GB, a zip that unpacks to 4 GB, a pickle that holds itself, headers that lie, texts that are none) and
given to the command itself, in a process with a limit on its time and its memory. Exits with 1 if one of them ended in
a traceback, in no sentence, beyond a limit, or if a device node was replaced.

Devices are made by root alone; without it `/dev/zero` itself is read, and none is written to. `--path` puts folders
before this checkout in what is imported, to measure an older one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import pickle
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

SPARSE = 10 << 30
ADDRESS_SPACE = 24 << 30
"""Bytes that a process may map; libraries map gigabytes that they never touch."""
TRACES = ("Traceback (most recent call last)", "panicked at", "stack backtrace", "Segmentation fault", "Warning:")


class Outcome(NamedTuple):
    """How a process ended."""

    seconds: float
    megabytes: float
    code: int | None
    """None: it was killed for its time."""
    said: str


class Case(NamedTuple):
    """A command, run in a folder that `make` fills."""

    name: str
    command: list[str]
    make: Callable[[], object]
    ends: tuple[int, ...] = (1, 2, 3)


# --- things that are no files ---


def fifo(path: str) -> None:
    os.mkfifo(path)


def endless(path: str) -> None:
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
        os.symlink("/dev/zero", path)


def folder(path: str) -> None:
    os.mkdir(path)


def listening(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


def sparse(path: str) -> None:
    with open(path, "wb") as file:
        file.truncate(SPARSE)


KINDS = {"a FIFO": fifo, "/dev/zero": endless, "a folder": folder, "a socket": listening, "10 GB": sparse}


# --- what else a folder needs ---


def write(path: str, content: str | bytes) -> None:
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def wav(path: str, *, rate: int = 24000, channels: int = 2, data: bytes | None = None, **other: int) -> None:
    """A WAV file whose header says what it is told."""
    sound = bytes(24000 * 4) if data is None else data
    bits, form, length = other.get("bits", 16), other.get("form", 1), other.get("length", len(sound))
    per = channels * bits // 8
    head = struct.pack("<IHHIIHH", 16, form, channels, rate, rate * per & 0xFFFFFFFF, per & 0xFFFF, bits)
    write(path, b"RIFF" + struct.pack("<I", (36 + length) & 0xFFFFFFFF) + b"WAVEfmt " + head + b"data"
          + struct.pack("<I", length) + sound)  # fmt: skip


def recording(**entry: object) -> None:
    """A dialogue of a second, whose line, sound or words the caller has replaced or will."""
    write("data.jsonl", json.dumps({"path": "a.wav", "duration": 1.0, **entry}) + "\n")
    if not os.path.lexists("a.wav"):
        wav("a.wav")
    if not os.path.lexists("a.json"):
        write("a.json", json.dumps({"alignments": [["hello", [0.1, 0.4], "SPEAKER_MAIN"]]}))
    write("c.yaml", "backbone: {name: moshi}\ndata: {train_data: data.jsonl, duration_sec: 1}\n"
          "train: {max_steps: 1}\nrun_dir: run\n")  # fmt: skip


def words(*alignments: object) -> None:
    write("a.json", json.dumps({"alignments": alignments}))
    recording()


def line(text: str | bytes) -> None:
    recording()
    write("data.jsonl", text)


def videodit(data: str) -> None:
    write("c.yaml", f"backbone: {{name: videodit}}\ndata: {data}\ntrain: {{max_steps: 1}}\nrun_dir: run\n")


def listed(**entry: object) -> None:
    """A list of one video for `ttt precompute`."""
    write("list.jsonl", json.dumps({"path": "a.mp4", "captions": ["waves"], **entry}) + "\n")
    videodit("{videos: list.jsonl, train_data: index.jsonl, duration_sec: 3}")


def encoded() -> None:
    """An index of one video, whose latents are the caller's."""
    entry = {"video": "a.mp4", "start_sec": 0, "latents": "x", "frames": 13, "height": 64, "width": 64,
             "text_length": 8, "segments": [{"caption": "waves", "text": "x"}]}  # fmt: skip
    write("index.jsonl", json.dumps(entry) + "\n")
    videodit("{train_data: index.jsonl, duration_sec: 3}")


def moshi(option: str) -> None:
    """A 7B model from four local files, of which only one is the caller's."""
    for name in ("moshi_path", "mimi_path", "tokenizer_path", "config_path"):
        if name != option:
            write(name, "{}")
    names = ", ".join(f"{name}: {'x' if name == option else name}" for name in ("moshi_path", "mimi_path"))
    others = ", ".join(f"{name}: {'x' if name == option else name}" for name in ("tokenizer_path",))
    config = ", config_path: x" if option == "config_path" else ""
    recording()
    write("c.yaml", f"backbone: {{name: moshi, preset: 7b, {names}, {others}{config}}}\n"
          "data: {train_data: data.jsonl, duration_sec: 1}\nttt: {layers: [1]}\nrun_dir: run\n")  # fmt: skip


def start_from() -> None:
    write("c.yaml", "backbone: {name: moshi}\ntrain: {init_from: x, max_steps: 1}\nrun_dir: run\n")


def plain() -> None:
    write("c.yaml", "backbone: {name: videodit}\n")


def in_folder(make: Callable[[str], None]) -> None:
    """A folder in diffusers' layout whose config.json is the caller's."""
    os.makedirs("model/transformer")
    make("model/transformer/config.json")
    write("c.yaml", "backbone: {name: videodit, preset: 5b, pretrained: model, random_weights: false}\n"
          "data: {train_data: index.jsonl}\nrun_dir: run\n")  # fmt: skip


def of_a_finetune() -> None:
    write("old.yaml", "moshi_paths: {hf_repo_id: kyutai/moshiko-pytorch-bf16}\nduration_sec: 10\nmax_steps: 10\n")


TRAIN, CHECK, PRECOMPUTE = ["train", "c.yaml"], ["check", "c.yaml"], ["precompute", "c.yaml"]
SAMPLE = ["sample", "c.yaml", "--seconds", "3", "--steps", "1"]
WEIGHTS = ["import-weights", "x", "--backbone", "videodit", "--out", "out"]
READERS: dict[str, tuple[list[str], str, Callable[[], None]]] = {
    "config": (["check", "x"], "x", lambda: None),
    "config, to train": (["train", "x"], "x", lambda: None),
    "foreign config": (["import-config", "x"], "x", lambda: None),
    "data": (TRAIN, "data.jsonl", lambda: videodit_or_moshi_data()),
    "data, checked": (CHECK, "data.jsonl", lambda: videodit_or_moshi_data()),
    "audio": (TRAIN, "a.wav", recording),
    "transcript": (TRAIN, "a.json", recording),
    "index": (TRAIN, "x", lambda: videodit("{train_data: x, duration_sec: 3}")),
    "index, checked": (CHECK, "x", lambda: videodit("{train_data: x, duration_sec: 3}")),
    "latents": (TRAIN, "x", encoded),
    "videos": (PRECOMPUTE, "x", lambda: videodit("{videos: x, train_data: index.jsonl, duration_sec: 3}")),
    "videos, checked": (CHECK, "x", lambda: videodit("{videos: x, train_data: index.jsonl, duration_sec: 3}")),
    "video": (PRECOMPUTE, "a.mp4", listed),
    "index to write": (PRECOMPUTE, "index.jsonl", lambda: (clip("a.mp4"), listed())),
    "init_from": (TRAIN, "x", start_from),
    "init_from, checked": (CHECK, "x", start_from),
    "adapter": (["info", "x"], "x", lambda: None),
    "adapter, to sample": ([*SAMPLE, "--prompt", "waves", "--adapter", "x", "--out", "a.mp4"], "x", plain),
    "prompts": ([*SAMPLE, "--prompts", "x", "--out", "a.mp4"], "x", plain),
    "weights": (WEIGHTS, "x", lambda: None),
    "moshi_path": (TRAIN, "x", functools.partial(moshi, "moshi_path")),
    "mimi_path": (TRAIN, "x", functools.partial(moshi, "mimi_path")),
    "tokenizer_path": (TRAIN, "x", functools.partial(moshi, "tokenizer_path")),
    "config_path": (CHECK, "x", functools.partial(moshi, "config_path")),
}
"""What is read: the command, the name under which it finds the thing, and what else lies there."""
WRITERS: dict[str, tuple[list[str], Callable[[], None]]] = {
    "init --out": (["init", "--backbone", "moshi", "--force", "--out", "x.mp4"], lambda: None),
    "import-config --out": (["import-config", "old.yaml", "--force", "--out", "x.mp4"], of_a_finetune),
    "schema --out": (["schema", "--out", "x.mp4"], lambda: None),
    "sample --out": ([*SAMPLE, "--prompt", "waves", "--overwrite", "--out", "x.mp4"], plain),
    "run_dir": ([*TRAIN, "--set", "run_dir=x.mp4", "--set", "train.max_steps=1"], plain),
    "import-weights --out": (["import-weights", "w.pt", "--backbone", "videodit", "--out", "x.mp4"],
                             lambda: write("w.pt", b"PK\x03\x04")),
}  # fmt: skip


def videodit_or_moshi_data() -> None:
    write("c.yaml", "backbone: {name: moshi}\ndata: {train_data: data.jsonl, duration_sec: 1}\nrun_dir: run\n")


def clip(path: str) -> None:
    from ttt_videodit import demo

    write(path, demo.CLIP.read_bytes())


# --- pickles and zips ---


def holds_itself(path: str) -> None:
    content: dict[str, object] = {}
    content["model"] = content
    archive(path, pickle.dumps(content, 2))


def holds_itself_in_turns(path: str) -> None:
    content: dict[str, dict[str, object]] = {"model": {}}
    content["model"]["state_dict"] = content
    write(path, torch_header() + pickle.dumps(content, 2))


def key_of_pairs(path: str) -> None:
    pair: tuple[object, ...] = ()
    for _ in range(60):
        pair = (pair, pair)
    built = io.BytesIO()
    pickler = pickle.Pickler(built, 2)
    pickler.dump([pair])  # hashed where it is a key, which takes 2**60 steps
    archive(path, built.getvalue().replace(b"]", b"}", 1).removesuffix(b"a.") + b"K\x01s.")


def torch_header() -> bytes:
    """What stands before the content in a file of torch.save's older format."""
    return b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))


def archive(path: str, content: bytes, *, packed: bool = False) -> None:
    """A file of torch.save's newer format."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as made:
        made.writestr("x/data.pkl", content)
        made.writestr("x/version", "3\n")


def zip_bomb(path: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
        with made.open("x/data.pkl", "w", force_zip64=True) as content:
            content.write(b"\x80\x02X" + struct.pack("<I", 0xFFFFFFFF))
            for _ in range(1 << 10):
                content.write(bytes(4 << 20))
        made.writestr("x/version", "3\n")


def many_entries(path: str) -> None:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/data.pkl", pickle.dumps({}, 2))
        for number in range(100_000):
            made.writestr(f"x/data/{number}", b"")


def runs_code(path: str) -> None:
    archive(path, b"cos\nsystem\n(S'touch ran'\ntR.")


def deep(path: str) -> None:
    archive(path, b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".")


def long_text(path: str) -> None:
    with open(path, "wb") as file:
        file.write(torch_header() + b"\x80\x02X" + struct.pack("<I", 0xFFFFFFFF))
        file.truncate(5 << 30)


def long_header(path: str) -> None:
    names = ",".join(f'"{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(1_400_000))
    write(path, struct.pack("<Q", len(names) + 2) + f"{{{names}}}".encode())


CONTENTS = {
    "a pickle that holds itself": holds_itself,
    "a pickle that holds itself in turns": holds_itself_in_turns,
    "a pickle whose key is 2^60 pairs": key_of_pairs,
    "a pickle of a million levels": deep,
    "a pickle with a text of 4 GB": long_text,
    "a pickle that runs code": runs_code,
    "a zip that unpacks to 4 GB": zip_bomb,
    "a zip of 100,000 entries": many_entries,
    "a zip that is cut": lambda path: write(path, b"PK\x03\x04" + bytes(100)),
    "a text": lambda path: write(path, "hello\n" * 1000),
    "nothing": lambda path: write(path, ""),
}


# --- sound, pictures and texts ---


def floats(value: float) -> bytes:
    return struct.pack("<f", value) * 48_000


SOUNDS: dict[str, Callable[[], None]] = {
    "of rate 0": lambda: wav("a.wav", rate=0),
    "of rate 1": lambda: wav("a.wav", rate=1),
    "of rate 4294967295": lambda: wav("a.wav", rate=0xFFFFFFFF),
    "of 0 channels": lambda: wav("a.wav", channels=0),
    "of 65535 channels": lambda: wav("a.wav", channels=65535),
    "of 0 bits": lambda: wav("a.wav", bits=0),
    "of 4 GB, says its header": lambda: wav("a.wav", length=0xFFFFFFF0),
    "that is NaN": lambda: wav("a.wav", bits=32, form=3, data=floats(float("nan"))),
    "that is infinite": lambda: wav("a.wav", bits=32, form=3, data=floats(float("inf"))),
    "that is text": lambda: write("a.wav", "hello\n" * 1000),
    "that is empty": lambda: write("a.wav", ""),
}
WORDS: dict[str, Callable[[], None]] = {
    "half a character": lambda: words(["\ud800", [0.1, 0.4], "SPEAKER_MAIN"]),
    "a word of 5 MB": lambda: words(["a" * 5_000_000, [0.1, 0.4], "SPEAKER_MAIN"]),
    "a time of NaN": lambda: words(["a", [float("nan"), 0.4], "SPEAKER_MAIN"]),
    "a time of 1e300": lambda: words(["a", [0.1, 1e300], "SPEAKER_MAIN"]),
    "a word of another shape": lambda: words(["a", [0.1], "SPEAKER_MAIN"]),
    "100,000 levels": lambda: (write("a.json", "[" * 100_000), recording()),  # type: ignore[func-returns-value]
}
LINES: dict[str, Callable[[], None]] = {
    "of 1 GB": lambda: (recording(), big_line()),  # type: ignore[func-returns-value]
    "of a million": lambda: line('{"path": "b.wav", "duration": 1}\n' * 1_000_000),
    "with a duration of 1e300": lambda: recording(duration=1e300),
    "with a duration of NaN": lambda: recording(duration=float("nan")),
    "with a negative duration": lambda: recording(duration=-1),
    "with a path of half a character": lambda: recording(path="\ud800.wav"),
    "with a path with NUL": lambda: recording(path="a\0.wav"),
    "with a path with a line break": lambda: recording(path="a\n::error::.wav"),
    "with a path to /dev/zero": lambda: recording(path="/dev/zero"),
    "with a path of 100,000 characters": lambda: recording(path="a" * 100_000),
    "of 100,000 levels": lambda: line("[" * 100_000),
}


def big_line() -> None:
    with open("data.jsonl", "wb") as file:
        file.truncate(1 << 30)


def prompts(content: object) -> None:
    plain()
    write("x", content if isinstance(content, str) else json.dumps(content))


PROMPTS: dict[str, object] = {
    "half a character": ["\ud800"],
    "NUL": ["a\0b"],
    "900,000 characters": ["wave " * 180_000],
    "100,000 levels": "[" * 100_000,
    "300,000 prompts": json.dumps(["a"] * 170_000),
    "numbers": [1, 2],
    "nothing": "",
}


def cases() -> Iterator[Case]:
    """All of them."""
    for what, (command, name, around) in READERS.items():
        for kind, make in KINDS.items():
            yield Case(f"{what}: {kind}", command, functools.partial(_both, functools.partial(make, name), around))
    for kind, make in KINDS.items():
        yield Case(f"pretrained: {kind} as its config.json", TRAIN, functools.partial(in_folder, make))
        for what, (command, around) in WRITERS.items():
            if kind != "10 GB" and not (kind == "a folder" and what in ("run_dir", "import-weights --out")):
                make_it = functools.partial(make, "x.mp4")
                yield Case(f"{what} {kind}", command, functools.partial(_both, make_it, around))
    for kind, content in CONTENTS.items():
        yield Case(f"weights: {kind}", WEIGHTS, functools.partial(content, "x"))
    for kind in ("a text", "nothing"):
        yield Case(f"adapter: {kind}", ["info", "x"], functools.partial(CONTENTS[kind], "x"))
    yield Case("adapter: a header of 90 MB", ["info", "x"], functools.partial(long_header, "x"))
    for kind, sound in SOUNDS.items():
        yield Case(f"audio {kind}", TRAIN, functools.partial(_both, sound, recording))
    for kind, spoken in WORDS.items():
        yield Case(f"transcript with {kind}", TRAIN, spoken)
    for kind, lines in LINES.items():
        yield Case(f"line {kind}", TRAIN, lines)
        yield Case(f"line {kind}, checked", CHECK, lines, ends=(0, 1, 2, 3))
    for kind, asked in PROMPTS.items():
        yield Case(f"prompts: {kind}", [*SAMPLE, "--prompts", "x", "--out", "a.mp4"], functools.partial(prompts, asked))
    byte = os.fsdecode(b"\xff")
    yield Case("--prompt with a byte that is no text", [*SAMPLE, "--prompt", byte, "--out", "a.mp4"], plain)
    yield Case("--prompt of 100,000 characters", [*SAMPLE, "--prompt", "wave " * 20_000, "--out", "a.mp4"], plain)
    for kind, caption in (("half a character", "\ud800"), ("900,000 characters", "wave " * 180_000)):
        make_it = functools.partial(listed, captions=[caption])
        yield Case(f"caption: {kind}", PRECOMPUTE, functools.partial(_both, lambda: clip("a.mp4"), make_it))


def _both(first: Callable[[], object], second: Callable[[], object]) -> None:
    first()
    second()


# --- running them ---


def run(command: list[str], *, seconds: float, paths: list[str]) -> Outcome:
    """A command in this folder, with a limit on its time and on what it may map."""
    environment = {**os.environ, "NO_TORCH_COMPILE": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    environment["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    started = time.monotonic()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-m", "ttt_cli", *command],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE)),
        )
        code: int | None = None
        usage = None
        while usage is None:
            ended, status, used = os.wait4(child.pid, os.WNOHANG)
            if ended:
                usage, code = used, os.waitstatus_to_exitcode(status)
                child.returncode = code
            elif time.monotonic() - started > seconds:
                child.send_signal(signal.SIGKILL)
                _, _, usage = os.wait4(child.pid, 0)
                child.returncode, code = -signal.SIGKILL, None
            else:
                time.sleep(0.02)
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    return Outcome(time.monotonic() - started, usage.ru_maxrss / 1000, code, text)


def fault(case: Case, outcome: Outcome, *, megabytes: float) -> str | None:
    """What is wrong with how a case ended."""
    if outcome.code is None:
        return "hangs"
    traces = [trace for trace in TRACES if trace in outcome.said]
    if traces:
        return f"says {traces[0]}"
    if outcome.code not in case.ends:
        return f"exit code {outcome.code}"
    if outcome.megabytes > megabytes:
        return "memory"
    if outcome.code and not outcome.said.strip():
        return "says nothing"
    return None


@contextlib.contextmanager
def inside(place: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name begins with one of these")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--megabytes", type=float, default=1500)
    parser.add_argument("--path", nargs="*", default=[], help="what to import instead of this checkout")
    arguments = parser.parse_args()
    wrong = 0
    print(f"{'':45} seconds     MB  exit  said")
    for case in cases():
        if arguments.only and not case.name.startswith(tuple(arguments.only)):
            continue
        with tempfile.TemporaryDirectory() as place, inside(place):
            case.make()
            devices = [name for name in os.listdir() if stat.S_ISCHR(os.stat(name).st_mode)]
            outcome = run(case.command, seconds=arguments.seconds, paths=arguments.path)
            found = fault(case, outcome, megabytes=arguments.megabytes)
            if not all(os.path.lexists(name) and stat.S_ISCHR(os.stat(name).st_mode) for name in devices):
                found = "the device is gone"
            if os.path.lexists("ran"):
                found = "code was run"
        wrong += found is not None
        told = [line for line in outcome.said.strip().splitlines() if line.strip()] or [""]
        shown = next((line for line in told if line.startswith("error")), told[-1])
        print(
            f"{case.name:45} {outcome.seconds:7.1f} {outcome.megabytes:6.0f}  {outcome.code!s:>4}  "
            f"{f'[{found}] ' if found else ''}{shown[:160]}",
            flush=True,
        )
    print(f"{wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
