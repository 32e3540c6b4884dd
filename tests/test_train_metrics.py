"""`metrics.jsonl` without doubles or half lines, the bar, plain lines, and the pictures drawn from it alone."""

import contextlib
import io
import json
import math
import os
import resource
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ttt.amounts import show_bytes
from ttt.config import RunConfig
from ttt.errors import DamagedFileWarning, EnvironmentProblem, UsageError
from ttt.train.display import Display, duration_in_words
from ttt.train.loggers import Loggers
from ttt.train.metrics import MetricsFile, metrics_lines, read_metrics
from ttt.train.pictures import draw_run, inner_figure, loss_figure, smoothed
from ttt.train.setup import peak_memory_bytes
from ttt.train.tensorboard import TensorBoard


def line(step, **more):
    return {
        "step": step,
        "loss": 3.0 / step,
        "lr": 1e-4,
        "grad_norm": 1.0,
        "tokens_per_second": 1234.5,
        "peak_memory_bytes": 2_500_000_000,
        **more,
    }


def write(path, steps):
    file = MetricsFile(path)
    for step in steps:
        file.write(line(step))
    file.close()


# --- the file ---


def test_lines_past_the_checkpoint_and_half_lines_are_taken_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 4, 6])
    with open(path, "a") as half:
        half.write('{"step": 8, "lo')
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 4, 6]
    resumed = MetricsFile(path, last_step=5)
    assert resumed.last_step == 4
    resumed.write(line(6))
    resumed.close()
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 4, 6]
    assert path.read_bytes().endswith(b"\n")


def test_lines_that_are_gone_are_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for last_step, told in ((0, 0), (3, 1)):
        file = MetricsFile(path, last_step=last_step)
        assert len(file.dropped) == told
        file.close()
    assert file.dropped == [f"{path}: the lines of the steps up to 3 are gone; it begins anew"]
    write(path, [1, 2, 4])
    with contextlib.closing(MetricsFile(path, last_step=3)) as file:
        assert file.dropped == []


def test_damage_in_the_middle_costs_that_line_alone_and_is_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3, 4, 5])
    content = path.read_bytes()
    whole = content.splitlines(keepends=True)
    path.write_bytes(whole[0] + whole[1].replace(b"1.5", b"1.7") + b"garbage\n" + b"".join(whole[2:]) + whole[3])
    with pytest.warns(DamagedFileWarning, match=r"metrics\.jsonl:[23]: .* is left out") as told:
        read_metrics(path)
    assert len(told) == 2
    resumed = MetricsFile(path, last_step=4)
    assert resumed.last_step == 4
    assert [problem.partition("metrics.jsonl")[2] for problem in resumed.dropped] == [
        ":2: damaged: its checksum is not that of its content; the line is left out",
        ":3: not JSON: Expecting value (column 1); the line is left out",
    ]
    resumed.write(line(5))  # into the file that took the damaged one's place
    with pytest.raises(UsageError, match="another process"):
        MetricsFile(path)
    resumed.close()
    assert path.read_bytes() == whole[0] + whole[2] + whole[3] + whole[4]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_newline_that_is_damaged_costs_no_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    content = path.read_bytes()
    path.write_bytes(content.replace(b"}\n{", b"}z{", 1))
    resumed = MetricsFile(path, last_step=3)
    resumed.close()
    assert resumed.last_step == 3
    assert ":1: damaged" in resumed.dropped[0]
    assert "what stands whole in it is kept" in resumed.dropped[0]
    assert path.read_bytes() == content


def test_every_changed_byte_of_a_line_is_told_or_is_space(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    first, second = path.read_bytes().splitlines(keepends=True)
    for at in range(len(first)):
        for change in (0x01, 0x20, 0xFF, first[at] ^ 0x5C):  # the last makes it a backslash
            path.write_bytes(first[:at] + bytes([first[at] ^ change]) + first[at + 1 :] + second)
            lines = metrics_lines(path)
            assert any(each.problem for each in lines), (at, change)
            assert line(2) in [entry for each in lines for entry, _ in each.entries]


def test_lines_from_before_there_were_checksums_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(line(1)) + "\n" + json.dumps(line(2)) + "\n")
    resumed = MetricsFile(path, last_step=1)
    resumed.write(line(2))
    resumed.close()
    assert read_metrics(path) == [line(1), line(2)]


def test_a_new_run_starts_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    MetricsFile(path).close()
    assert path.read_bytes() == b""


def test_numbers_that_are_not_finite_become_null(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(line(1, odd=math.nan, layers={"a": {"movement": math.inf}}))
    file.close()
    entry = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert entry["odd"] is None
    assert entry["layers"] == {"a": {"movement": None}}


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_two_processes_cannot_write_one_run(tmp_path):
    first = MetricsFile(tmp_path / "metrics.jsonl")
    first.write(line(1))
    with pytest.raises(UsageError, match="another process is training in"):
        MetricsFile(tmp_path / "metrics.jsonl")
    first.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    MetricsFile(tmp_path / "metrics.jsonl").close()


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(EnvironmentProblem, match="metrics"):
        MetricsFile(tmp_path / "missing" / "metrics.jsonl")


def test_metrics_that_cannot_be_read_are_told(tmp_path):
    with pytest.raises(EnvironmentProblem, match=r"metrics\.jsonl: cannot be read"):
        read_metrics(tmp_path / "metrics.jsonl")


# --- TensorBoard ---

RUN = RunConfig.model_validate({"backbone": {"name": "toy"}, "data": {}})


def test_tensorboard_gets_every_number(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard(tmp_path, first_step=1)
    board.log(line(1, layers={"layers.0.ttt": {"movement": 0.5}}, eval_split="train"))
    board.close()
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes", "layers.0.ttt/movement",
    }  # fmt: skip


def test_without_tensorboard_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    loggers = Loggers(RUN, tmp_path, first_step=1, warn=pytest.fail)
    loggers.log(line(1))
    loggers.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_cut_run_wrote_is_purged_by_its_resumption(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, steps in ((1, (1, 2, 3)), (3, (3,))):
        board = TensorBoard(tmp_path, first_step=first)
        for step in steps:
            board.log(line(step, loss=float(first)))
        board.close()
        (file,) = [file for file in tmp_path.iterdir() if not file.name.endswith("of_run")]
        file.rename(tmp_path / f"events.out.tfevents.{first:010}.of_run")  # files are read in order of their names
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 3.0)]


def _folder_is_a_file(folder, monkeypatch):
    folder.write_text("")


def _folder_is_in_a_file(folder, monkeypatch):
    folder.parent.rmdir()
    folder.parent.write_text("")


def _package_is_broken(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", types.ModuleType("of_another_protobuf"))


def _package_lacks_another(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_folder_is_a_file, "File exists"),
        (_folder_is_in_a_file, "Not a directory"),
        (_package_is_broken, "ImportError: cannot import name 'SessionLog'"),
        (_package_lacks_another, "ModuleNotFoundError: import of tensorboard.summary.writer.record_writer halted"),
    ],
)
def test_a_board_that_cannot_be_opened_is_warned_of_once(tmp_path, monkeypatch, spoil, told):
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run" / "tensorboard"
    folder.parent.mkdir()
    spoil(folder, monkeypatch)
    warnings = []
    loggers = Loggers(RUN, folder.parent, first_step=1, warn=warnings.append)
    loggers.log(line(1))
    loggers.close()
    (warning,) = warnings
    assert warning.startswith(f"warning: nothing more is written for TensorBoard in {folder} ({told}")
    assert warning.endswith("; the run goes on")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_board_on_a_disk_that_fills_up_is_warned_of_once(tmp_path, capfd):
    pytest.importorskip("tensorboard")
    warnings = []
    loggers = Loggers(RUN, tmp_path, first_step=1, warn=warnings.append)
    loggers.log(line(1))
    (file,) = (tmp_path / "tensorboard").iterdir()
    (held,) = [fd for fd in os.listdir("/proc/self/fd") if _points_to(fd, file)]
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, int(held))
    os.close(full)
    for step in (2, 3):
        loggers.log(line(step))
    loggers.close()
    assert warnings == [
        f"warning: nothing more is written for TensorBoard in {tmp_path / 'tensorboard'} (No space left on device); "
        "the run goes on"
    ]
    assert capfd.readouterr() == ("", "")  # no thread has a traceback of its own


def _points_to(descriptor, file):
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}") == str(file)
    except OSError:
        return False


# --- the display ---


def shown(*, terminal, log_freq=1, steps=(1, 2, 3)):
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=terminal, color_system=None, _environ={"TERM": "xterm"})
    with Display(console, total=3, done=0, log_freq=log_freq) as display:
        for step in steps:
            display.step(line(step))
        if terminal:
            display._bar.refresh()
    return text.getvalue()


def test_a_terminal_gets_a_bar_with_loss_speed_memory_and_time_left():
    text = shown(terminal=True, steps=(1, 2))
    for part in ("2/3", "loss 1.5000", "1,234 tok/s", "2.33 GiB", "s left"):
        assert part in text
    assert "step 1/3" not in text


def test_elsewhere_plain_lines_come():
    text = shown(terminal=False, log_freq=2)
    assert [entry.split("  ")[0] for entry in text.splitlines()] == ["step 1/3", "step 2/3", "step 3/3"]
    assert "\x1b" not in text
    assert "loss 1.5000  lr 1.00e-04  1,234 tokens/s  peak 2.33 GiB  0 s left" in text


def test_time_left_counts_from_where_the_run_resumed(monkeypatch):
    from ttt.train import display as shown

    now = iter([100.0, 110.0])
    monkeypatch.setattr(shown.time, "monotonic", lambda: next(now))
    text = io.StringIO()
    display = Display(Console(file=text, width=200), total=100, done=50, log_freq=1)
    display.step(line(60))
    assert "40 s left" in text.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_in_words(seconds, words):
    assert duration_in_words(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.46 KiB"), (2.5e9, "2.33 GiB"), (3e12, "2.73 TiB")],
)
def test_sizes_in_words(count, words):
    assert show_bytes(count) == words


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no other source to compare with")
def test_peak_memory_of_the_process_is_what_the_system_says():
    status = Path("/proc/self/status").read_text().splitlines()
    kilobytes = int(next(entry for entry in status if entry.startswith("VmHWM:")).split()[1])
    assert peak_memory_bytes(torch.device("cpu")) == pytest.approx(kilobytes * 1024, rel=0.1)


# --- the pictures ---


def evidence(step):
    return {
        f"layers.{layer}.ttt": {
            "inner_loss_before": 2.0 - layer,
            "inner_loss_after": 1.0 / step,
            "movement": 0.1 * step,
            "gate": 0.1,
            "gate_max": 0.2,
        }
        for layer in (0, 1)
    }


def lines_of(axes):
    return {artist.get_label(): list(artist.get_ydata()) for artist in axes.get_lines()}


def test_the_loss_picture_shows_the_loss_and_the_control():
    entries = [line(step) for step in range(1, 11)]
    entries[-1] |= {"eval_loss": 1.25, "eval_loss_gates_closed": 1.5, "eval_split": "eval", "eval_windows": 3}
    (axes,) = loss_figure(entries).axes
    drawn = lines_of(axes)
    assert drawn["training loss"] == [3.0 / step for step in range(1, 11)]
    assert drawn["held-out windows, as trained: 1.2500"] == [1.25]
    assert drawn["the same, plain backbone: 1.5000"] == [1.5]


def test_a_long_run_is_smoothed_beside_the_raw_loss():
    (axes,) = loss_figure([line(step) for step in range(1, 101)]).axes
    assert set(lines_of(axes)) == {"training loss", "mean of 9 logged steps"}


def test_smoothing_is_the_mean_of_neighbours():
    assert smoothed([1.0, 2.0, 6.0, 3.0], 1) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])


def test_the_inner_picture_shows_each_layer_before_and_after_and_its_movement_and_gate():
    entries = [line(step, **({"layers": evidence(step)} if step % 2 else {})) for step in range(1, 6)]
    figure = inner_figure(entries)
    by_title = {axes.get_title(loc="left"): lines_of(axes) for axes in figure.axes}
    assert by_title["layers.1.ttt"] == {"before its step": [1.0] * 3, "after": [1.0, 1 / 3, 1 / 5]}
    movement = next(drawn for title, drawn in by_title.items() if "moved" in title)
    assert movement["layers.0.ttt"] == pytest.approx([0.1, 0.3, 0.5])
    assert next(drawn for title, drawn in by_title.items() if "gate" in title)["layers.0.ttt"] == [0.1] * 3


def test_pictures_come_from_the_metrics_alone_and_need_no_window_system(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 4):
        file.write(line(step, layers=evidence(step)))
    file.close()
    made = draw_run(tmp_path)
    assert [path.name for path in made] == ["loss.png", "inner_loss.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


def test_a_run_without_evidence_has_one_picture_and_one_without_steps_none(tmp_path):
    write(tmp_path / "metrics.jsonl", [])
    assert draw_run(tmp_path) == []
    write(tmp_path / "metrics.jsonl", [1])
    assert [path.name for path in draw_run(tmp_path)] == ["loss.png"]


def test_gaps_in_the_numbers_can_be_drawn(tmp_path):
    layers = {"layers.0.ttt": dict.fromkeys(evidence(1)["layers.0.ttt"])}
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(line(1, layers=layers, eval_loss=None, eval_loss_gates_closed=None))
    file.close()
    assert len(draw_run(tmp_path)) == 2


def test_a_line_that_cannot_be_written_is_told_once(tmp_path):
    """Closing the file writes what is left in its buffer anew; that error would stand in the place of the sentence."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write() -> None:
        with contextlib.closing(MetricsFile(tmp_path / "metrics.jsonl")) as file:
            file.write({"step": 1, "loss": 1.0})
            resource.setrlimit(resource.RLIMIT_FSIZE, (40, unlimited[1]))
            file.write({"step": 2, "loss": 1.0})

    try:
        with pytest.raises(EnvironmentProblem, match=r"metrics\.jsonl: cannot be written: File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
