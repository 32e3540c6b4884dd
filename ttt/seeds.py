"""Seeding the global generators for a piece of work, by the seed of a run or a sample and what the work is."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_pass(seed: int, purpose: str, number: int) -> None:
    """Seed every global generator for one forward pass.

    The numbers that the pass draws then depend only on the run's seed and the pass. So no generator state needs to be
    saved, and an evaluation between two passes changes nothing.
    """
    seed_generators(pass_seed(seed, purpose, number))


def seed_generators(seed: int) -> None:
    """Seed every global generator with a `pass_seed`."""
    seed_torch(seed)
    random.seed(seed)
    np.random.seed(seed >> 32)


def seed_torch(seed: int) -> None:
    """Seed torch's generators on every device there is.

    Where there is only a CPU, `torch.manual_seed` would keep the seed for each kind of device that may come, three
    times with the stack of its call: milliseconds for every pass of a run.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def pass_seed(seed: int, purpose: str, number: int) -> int:
    """A seed of 64 bits, a function of the run's seed, the purpose and the number."""
    words = words_of(seed, purpose, number)
    return words[0] << 32 | words[1]


def words_of(seed: int, purpose: str, number: int) -> tuple[int, int]:
    """Two 32-bit words, a function of the run's seed, the purpose and the number."""
    first, second = np.random.SeedSequence([seed, *purpose.encode(), number]).generate_state(2, np.uint32)
    return int(first), int(second)


def generator_states() -> tuple[Any, ...]:
    """The states of every global generator: of Python, NumPy and torch, on the CPU and on each CUDA device."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices


def restore_generators(states: tuple[Any, ...]) -> None:
    """Set every global generator to what `generator_states` returned."""
    python, numbers, cpu, devices = states
    random.setstate(python)
    np.random.set_state(numbers)
    torch.set_rng_state(cpu)
    if devices:
        torch.cuda.set_rng_state_all(devices)
