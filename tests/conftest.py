"""What every test needs before torch and moshi are imported."""

import gc
import os
import signal
import sys
from collections.abc import Iterator

import pytest
from undrawn import undraw

# On a CPU, kyutai's package would spend 20 s compiling its norm.
os.environ.setdefault("NO_TORCH_COMPILE", "1")

# Where Python may keep no bytecode, every process that a test starts would compile torch anew: 5 s and more.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
import torch

# Without a GPU, Triton's interpreter runs the kernels; it must be set before a module with kernels is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests run in processes side by side on small tensors: more threads would only wait for each other.
torch.set_num_threads(1)

# Under nohup SIGHUP is ignored, here and in every process that a test starts; a run means to hear it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Round as another maker's processor might: see `other_rounding.py`.
if os.environ.get("TTT_OTHER_ROUNDING"):
    import other_rounding

    other_rounding.install()


def pytest_collection() -> None:
    """Import what is tested without looking for garbage in it."""
    gc.disable()


LONGEST = {
    *("test_example.py", "test_benchmarks.py", "test_faults.py", "test_train_compile.py", "test_probe.py"),
    *("test_videodit_published.py", "test_videodit_model.py", "test_doctor.py", "test_moshi_model.py"),
}
"""They come first: who is left with one of their tests at the end would be waited for."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with the longest tests first, in their own order."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep collections of garbage from walking the million objects that were imported: a second for each full one.

    What is imported by then, processes that tests start need not import again.
    """
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)  # and what tests make is seldom garbage that only a collection finds
    gc.enable()
    if session.items and not session.config.option.collectonly:
        import forking

        forking.begin()


def pytest_unconfigure() -> None:
    """End the process from which tests fork others."""
    if "forking" in sys.modules:
        sys.modules["forking"].end()


UNDRAWN = {
    "test_asking.py",
    "test_checksums.py",
    "test_cli.py",
    "test_cli_eval.py",
    "test_cli_sample.py",
    "test_config_estimate.py",
    "test_facade.py",
    "test_facade_hub.py",
    "test_hooks.py",
    "test_inject.py",
    "test_interrupts.py",
    "test_laws.py",
    "test_lora.py",
    "test_moshi_contexts.py",
    "test_moshi_data.py",
    "test_moshi_files.py",
    "test_moshi_import_fork.py",
    "test_moshi_model.py",
    "test_moshi_recordings.py",
    "test_moshi_sample.py",
    "test_moshi_scoring.py",
    "test_moshi_sources.py",
    "test_moshi_weights.py",
    "test_printable.py",
    "test_relative_paths.py",
    "test_saboteurs.py",
    "test_train_compile.py",
    "test_train_start.py",
    "test_transformers_laws.py",
    "test_transformers_model.py",
    "test_videodit_model.py",
    "test_videodit_published.py",
    "test_videodit_weights.py",
}
"""Whose runs nobody looks at."""


@pytest.fixture(scope="module", autouse=True)
def empty_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pictures are made, but not drawn, where no test looks at them: that takes longer than small runs."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name in UNDRAWN:
            undraw(patch)
        yield


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton is chosen, its interpreter runs the kernels, and what is allocated holds NaN until it is written."""
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("compares in the interpreter; benchmarks compare on a GPU")
    import quick_interpreter

    quick_interpreter.install()
    monkeypatch.setenv("TTT_OPS", "triton")
    torch.set_deterministic_debug_mode("error")  # without the compiler, which the other call imports
    yield
    torch.set_deterministic_debug_mode("default")
