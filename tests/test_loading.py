"""Batches read ahead by worker processes: what is read, what goes wrong, and that nothing is left of them."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import forking
import pytest
import torch
from number_files import Halved, NumberFiles, Plugin
from toy import ToyBackbone, ToyData, ToyOptions

from ttt.config import RunConfig, TrainConfig, TTTConfig
from ttt.errors import EnvironmentProblem, PluginError
from ttt.plugins.asking import AskedDataset, is_out_of_memory
from ttt.train import train
from ttt.train.loading import Loader
from ttt.train.metrics import read_metrics

COUNT = 6


@pytest.fixture
def folder(tmp_path):
    for number in range(COUNT):
        (tmp_path / str(number)).write_text(str(number))
    return tmp_path


def loader(dataset, workers, *, passes=8):
    return Loader(
        AskedDataset(Plugin(), dataset),
        lambda number: [number % COUNT, (3 * number + 1) % COUNT],
        passes=passes,
        device=torch.device("cpu"),
        workers=workers,
    )


def read(dataset, workers, *, first=0, passes=8):
    with loader(dataset, workers, passes=passes) as batches:
        return [batches.batch(number) for number in range(first, passes)]


def numbers(batches):
    return [batch["numbers"].tolist() for batch in batches]


def failure(folder, word, workers):
    """The error at the pass that reads file 3, and what was read before."""
    (folder / "3").write_text(word)
    with loader(NumberFiles(folder, COUNT), workers) as batches:
        assert batches.batch(0)["numbers"].shape == (2, 2)
        try:
            for number in (1, 2, 3):
                batches.batch(number)
        except Exception as error:
            return error
    raise AssertionError(f"{word}: nothing went wrong")


# --- what is read ---


@pytest.mark.parametrize("kind", [NumberFiles, Halved])
def test_workers_read_what_is_read_without_them_from_any_pass_on(folder, kind):
    before = torch.get_rng_state()
    whole = numbers(read(kind(folder, COUNT), 0))
    assert len({drawn for batch in whole for _, drawn in batch}) == COUNT  # one draw for each window
    torch.set_rng_state(before)
    ahead = read(kind(folder, COUNT), 2)
    assert numbers(ahead) == whole
    assert numbers(read(kind(folder, COUNT), 2, first=3)) == whole[3:]
    assert torch.equal(torch.get_rng_state(), before) or kind is Halved  # Halved draws for the windows that it kept
    processes = {batch["process"] for batch in ahead}
    assert (os.getpid() in processes) == (kind is Halved)
    assert len(processes) == (1 if kind is Halved else 2)
    assert multiprocessing.active_children() == []


def test_a_window_that_is_kept_is_not_read_again(folder):
    dataset = Halved(folder, COUNT)
    with loader(dataset, 2, passes=40) as batches:
        first = [batches.batch(number)["numbers"] for number in range(12)]
        for file in folder.iterdir():
            file.unlink()
        again = [batches.batch(number)["numbers"] for number in range(12, 40)]
    assert torch.equal(torch.stack(first[:6]), torch.stack(again[:6]))


def test_passes_out_of_turn_are_read_too(folder):
    with loader(NumberFiles(folder, COUNT), 1) as batches:
        assert [batches.batch(number)["numbers"][0, 0].item() for number in (0, 1, 5, 2)] == [0, 1, 5, 2]


def test_signals_are_handled_as_before_and_workers_leave_them_alone(folder):
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with loader(NumberFiles(folder, COUNT), 1) as batches:
        batches.batch(0)
        assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
        (worker,) = multiprocessing.active_children()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(worker.pid, number)
        assert batches.batch(1)["process"] == worker.pid


# --- what goes wrong ---


def test_a_file_that_vanished_is_the_same_sentence_as_without_workers(folder):
    (folder / "3").unlink()
    told = []
    for workers in (0, 1):
        with loader(NumberFiles(folder, COUNT), workers) as batches:
            batches.batch(0)
            with pytest.raises(EnvironmentProblem) as caught:
                batches.batch(3)
            told.append((str(caught.value), caught.value.key, caught.value.fix))
    assert told[0] == told[1]
    assert told[0][0] == f"data.train_data: {folder / '3'}: gone; bring it back"


def test_an_error_of_the_plugin_is_the_same_sentence_as_without_workers(folder):
    told = [str(failure(folder, "bug", workers)) for workers in (0, 1)]
    assert told[0] == told[1]
    assert "number_files.py:" in told[0]
    assert "KeyError: 'key'" in told[0]


def test_memory_that_ran_out_in_a_worker_is_known_as_that(folder):
    assert all(is_out_of_memory(failure(folder, "full", workers)) for workers in (0, 1))


def test_a_killed_worker_is_one_sentence(folder):
    error = failure(folder, "kill", 2)
    assert isinstance(error, EnvironmentProblem)
    assert str(error) == (
        "data.num_workers: a worker process that reads data ended by SIGKILL, with which a system also ends processes "
        "if memory runs out; write a smaller data.num_workers, or 0, which reads in the process that trains"
    )
    assert multiprocessing.active_children() == []


def test_an_answer_that_cannot_be_sent_is_an_error_and_not_waited_for(folder):
    assert "cannot pickle '_thread.lock'" in str(failure(folder, "unsendable", 1))


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="it is where Linux has shared memory")
def test_a_batch_that_shared_memory_cannot_hold_is_one_sentence(folder):
    error = failure(folder, "huge", 1)
    assert isinstance(error, EnvironmentProblem)
    assert str(error).startswith("data.num_workers: no shared memory (/dev/shm) for a batch of a worker process: ")
    assert str(error).endswith("or give the machine or container more, as docker run --shm-size=8g does")


def test_a_dataset_that_cannot_go_to_a_worker_is_one_sentence(folder):
    dataset = NumberFiles(folder, COUNT)
    dataset.lock = threading.Lock()
    with pytest.raises(
        PluginError, match=r"data.num_workers: the dataset of the plugin numbers .* cannot be handed to"
    ):
        read(dataset, 1)


# --- a run ---


def settings(run_dir, workers):
    return RunConfig(
        backbone=ToyOptions(num_layers=2, dim=16, num_heads=2, dropout=0.1),
        ttt=TTTConfig(mini_batch_size=4, persistent_states=True),
        data=ToyData(window=12, shuffle="files", num_workers=workers),
        train=TrainConfig(
            max_steps=12, batch_size=2, num_microbatches=2, lr=3e-3, device="cpu", cpu_threads=1, ckpt_freq=3
        ),
        run_dir=str(run_dir),
    )


class Slow(ToyBackbone):
    """The toy, each pass of which takes so many seconds longer."""

    def loss(self, model, batch, config):
        time.sleep(0.05)
        return super().loss(model, batch, config)


def go_on(run_dir, workers, resume):
    return 130 if train(settings(run_dir, workers), Slow(), resume=resume).interrupted else 0


def start(run_dir, workers, *, resume=False, until):
    """The run in a process of its own, as soon as that many lines are written."""
    process = forking.start(go_on, run_dir, workers, resume)
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < until:
        assert process.poll() is None, process.communicate(120)
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def descendants(pid):
    """The processes that a process has started, and those that they have."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(each for child in children for each in descendants(child))]


def assert_ended(pids):
    deadline = time.monotonic() + 60
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
        time.sleep(0.01)


def lines(run_dir):
    varying = {"tokens_per_second", "peak_memory_bytes"}
    return [
        {key: value for key, value in line.items() if key not in varying}
        for line in read_metrics(run_dir / "metrics.jsonl")
    ]


def test_a_run_with_workers_resumes_after_ctrl_c_and_after_a_kill_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("ttt.train.pictures.draw_run", lambda run: [])
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(settings(whole, 0), ToyBackbone())

    process = start(stopped, 2, until=2)
    others = descendants(process.pid)
    assert len(others) >= 3  # two workers, and the server that forked them
    for pid in (*others, process.pid):  # as a terminal does
        os.kill(pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.split("\n")[1:] == ["stopping after this step, then saving; once more stops at once", ""]
    assert_ended(others)

    with start(stopped, 2, resume=True, until=8) as process:  # which kills it
        others = descendants(process.pid)
    assert_ended(others)

    train(settings(stopped, 0), ToyBackbone(), resume=True)
    assert lines(stopped) == lines(whole)
    assert [line["step"] for line in lines(whole)] == list(range(1, 13))
