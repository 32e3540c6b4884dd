"""What this machine has, which implementation of the scan runs on it, and what is wrong with it: `ttt doctor`.

Every problem comes with what to do about it. Each implementation of the scan is run on each device, on a few tokens,
and compared with the reference.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from ttt.amounts import show_bytes
from ttt.config.findings import Blame, Severity
from ttt.config.schema import TTTConfig, inner_widths
from ttt.costs import scan_cost
from ttt.devices import Device, cores, devices, requirements_of, version_of, versions
from ttt.files import free_bytes
from ttt.layer import TTTLayer
from ttt.ops import select
from ttt.ops.triton.available import obstacle
from ttt.plugins.listing import InstalledPlugin, installed_plugins, without_backbones
from ttt.plugins.registry import unreadable_metadata
from ttt.train.graphs import why_not_recorded

if TYPE_CHECKING:
    from ttt.check.load import CheckedConfig

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_LITTLE_DISK = 1 << 30
_TOLERANCE = 1e-4
"""Largest difference from the reference in float32, relative to the largest number, with which one passes."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with the environment, and what to do about it."""

    severity: Severity
    message: str
    """One sentence without a full stop."""
    fix: str


@dataclass(frozen=True)
class ScanChoice:
    """Which implementation runs, for a config or for the default settings."""

    implementation: str | None
    """None if `TTT_OPS` names none that exists."""
    forced: bool
    """Whether `TTT_OPS` chose it."""
    device: str
    inner_model: str
    """`linear` or `mlp`, and the widths of its layers if the config fixes them."""
    mini_batch_size: int
    mini_batches: int | None
    """Mini-batches in a training window; None if the config does not fix its length."""
    group_size: int | None
    """`scan_checkpoint_group_size`; None if it is `auto` and the config does not fix the length of a window."""
    auto: bool
    """Whether the config says `scan_checkpoint_group_size: auto`."""


@dataclass(frozen=True)
class Trial:
    """One implementation, run forward and backward on one device and compared with the reference."""

    device: str
    implementation: str
    error: float | None
    """Largest difference of outputs and gradients from the reference, relative to their largest; None if it failed."""
    cause: str | None
    """Why it failed, in one line."""

    @property
    def works(self) -> bool:
        """Whether it ran and agrees with the reference."""
        return self.error is not None and self.error <= _TOLERANCE


@dataclass(frozen=True)
class Report:
    """Everything that `ttt doctor` prints."""

    versions: Mapping[str, str | None]
    """Versions by name: Python, PyTorch and what it brings, this library, plugins and their dependencies. None means
    not installed."""
    devices: tuple[Device, ...]
    plugins: tuple[InstalledPlugin, ...]
    scan: ScanChoice
    trials: tuple[Trial, ...]
    problems: tuple[Problem, ...]

    @property
    def healthy(self) -> bool:
        """Whether a run can start: no problem is an error."""
        return not any(problem.severity is Severity.ERROR for problem in self.problems)


def examine(path: str | Path | None = None, *, backbone: str | None = None, overrides: Sequence[str] = ()) -> Report:
    """Examine the machine, for one config or in general.

    Args:
        path: a config; None examines for the settings of `TTTConfig()`.
        backbone: as `ttt check --backbone`.
        overrides: as `ttt check --set`.

    Raises:
        ConfigError: the config itself is wrong, on any machine.
        EnvironmentProblem: the config cannot be read.
    """
    checked = None if path is None else _readable(path, backbone, overrides)
    found = installed_plugins()
    scan, unknown = _choice(checked)
    trials = () if unknown else tuple(_trials())
    problems = [
        *([unknown] if unknown else []),
        *_problems_of_trials(trials),
        *_problems_of_graphs(checked),
        *_problems_of_packages(found),
        *_problems_of_cuda(checked),
        *_problems_of_python(),
        *_problems_of_threads(),
        *(_problems_of_config(checked) if checked else _problems_of_disk(Path("runs"))),
    ]
    order = list(Severity)
    problems.sort(key=lambda problem: order.index(problem.severity))
    return Report(versions(), devices(), found, scan, trials, tuple(problems))


def _readable(path: str | Path, backbone: str | None, overrides: Sequence[str]) -> CheckedConfig:
    from ttt.check.load import check_config
    from ttt.check.render import render_text
    from ttt.config.findings import blames_environment, summary
    from ttt.errors import ConfigError
    from ttt.printable import printable

    checked = check_config(path, backbone=backbone, overrides=overrides)
    wrong = [f for f in checked.findings if f.severity is Severity.ERROR and not blames_environment(f)]
    if wrong:
        raise ConfigError(f"{render_text(wrong)}\n{printable(checked.source.file)}: {summary(wrong)}", wrong)
    return checked


# --- the scan ---


def _choice(checked: CheckedConfig | None) -> tuple[ScanChoice, Problem | None]:
    """Which implementation runs, and a problem if `TTT_OPS` names an unknown one."""
    config, tokens, widths, group_size = TTTConfig(), None, "", None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if checked is not None and checked.config is not None:
        run = checked.config
        config = run.ttt
        device = device if run.train.device == "auto" else run.train.device
        with contextlib.suppress(Exception):  # third-party code may raise anything; the finding TTT803 reports it
            assert checked.backbone is not None
            facts = checked.backbone.facts(run)
            tokens = facts.tokens_per_window
            widths = " ".join(map(str, inner_widths(facts.dim // (config.num_heads or facts.num_heads), config)))
            if tokens is not None:
                shape = {"dim": facts.dim, "num_heads": facts.num_heads, "tokens": tokens}
                group_size = scan_cost(config, **shape, batch_size=run.train.batch_size).group_size
    if config.scan_checkpoint_group_size != "auto":
        group_size = config.scan_checkpoint_group_size
    problem, chosen, forced = None, None, None
    mini_batches = None if tokens is None else tokens // config.mini_batch_size
    try:
        forced = select.forced_implementation()
        # Fast weights are float32, whatever the backbone's dtype.
        chosen = select.implementation(device_type=device, dtypes=(torch.float32,), mini_batches=mini_batches or 1)
    except select.CannotRunError as error:
        problem = Problem(Severity.ERROR, error.problem, error.fix)
    except ValueError:
        known = ", ".join(get_args(select.Implementation))
        what = f"{select.VARIABLE}={os.environ.get(select.VARIABLE)} names no implementation of the scan"
        problem = Problem(Severity.ERROR, what, f"write one of {known}, or unset it")
    choice = ScanChoice(
        chosen,
        forced is not None,
        device,
        f"{config.layer_type} {widths}".rstrip(),
        config.mini_batch_size,
        mini_batches,
        group_size,
        config.scan_checkpoint_group_size == "auto",
    )
    return choice, problem


@contextlib.contextmanager
def forced(implementation: str | None) -> Iterator[None]:
    """`TTT_OPS` set to an implementation, or unset for None, while the block runs."""
    before = os.environ.pop(select.VARIABLE, None)
    if implementation is not None:
        os.environ[select.VARIABLE] = implementation
    try:
        yield
    finally:
        os.environ.pop(select.VARIABLE, None)
        if before is not None:
            os.environ[select.VARIABLE] = before


def _trials() -> Iterator[Trial]:
    """Run every implementation on every device that has it, on a tiny layer and tokens that end in a mini-batch."""
    config = TTTConfig(layer_type="mlp", mini_batch_size=4, scan_checkpoint_group_size=2)
    generator = torch.Generator().manual_seed(0)
    layer = TTTLayer(32, 2, config)
    with torch.no_grad():
        for parameter in layer.parameters():  # with weights as small as at the start, rounding errors would be large
            parameter.normal_(0, 0.3, generator=generator)
    x = torch.randn(2, 23, 32, generator=generator)
    right = _pass(copy.deepcopy(layer).double(), x.double(), "reference")
    for device in devices():
        for name in _implementations(device.name):
            try:
                found = _pass(copy.deepcopy(layer).to(device.name), x.to(device.name), name)
            except Exception as error:  # a driver or a kernel may raise anything; report it
                yield Trial(device.name, name, None, " ".join(f"{type(error).__name__}: {error}".split()))
                continue
            distances = [
                ((f.cpu().double() - r).abs().max() / r.abs().max()).item() for f, r in zip(found, right, strict=True)
            ]
            yield Trial(device.name, name, max(distances), None)


def _implementations(device: str) -> tuple[select.Implementation, ...]:
    """Those to try on a device. The kernels are tried on GPUs alone: their interpreter would say nothing of one."""
    kernels = device.startswith("cuda") and obstacle(device_type="cuda", dtypes=(torch.float32,)) is None
    return (*select.PORTABLE, "triton") if kernels else select.PORTABLE


def _pass(layer: TTTLayer, x: Tensor, implementation: str) -> tuple[Tensor, ...]:
    """The outputs of the layer and the gradient of every parameter."""
    with forced(implementation):
        y, _ = layer(x)
        return y.detach(), *torch.autograd.grad(y.square().sum(), list(layer.parameters()))


def _problems_of_trials(trials: Sequence[Trial]) -> Iterator[Problem]:
    for trial in trials:
        if not trial.works:
            what = trial.cause or f"it is {trial.error:.1e} away from the reference, more than {_TOLERANCE:g}"
            yield Problem(
                # The kernels are never chosen by themselves.
                Severity.ERROR if trial.implementation in select.PORTABLE else Severity.WARNING,
                f"the implementation {trial.implementation} fails on {trial.device}: {what}",
                "install another version of PyTorch for this device, or set "
                f"{select.VARIABLE} to an implementation that works",
            )


def _problems_of_graphs(checked: CheckedConfig | None) -> Iterator[Problem]:
    """What is wrong with CUDA graphs, where a run would have them."""
    if checked is not None and checked.config is not None and checked.config.train.cuda_graphs == "off":
        return
    for device in devices():
        try:
            with forced("fused"):
                cause = why_not_recorded(torch.device(device.name))
        except Exception as error:  # as for the implementations
            cause = " ".join(f"{type(error).__name__}: {error}".split())
        if cause is not None:
            what = f"CUDA graphs of the scan fail on {device.name}: {cause}"
            yield Problem(Severity.WARNING, what, "write train.cuda_graphs: off")


# --- what is wrong ---


def _problems_of_packages(found: tuple[InstalledPlugin, ...]) -> Iterator[Problem]:
    if without_backbones(found):
        yield Problem(Severity.WARNING, "no backbone is installed", "install one, as `pip install ttt-moshi`")
    for plugin in {plugin.distribution: plugin for plugin in found}.values():
        missing = [name for name in requirements_of(plugin.distribution) if version_of(name) is None]
        if missing:
            yield Problem(
                Severity.ERROR,
                f"{plugin.distribution} {plugin.version} needs {', '.join(missing)}, not installed",
                f"run `pip install {' '.join(missing)}`",
            )
    for problem in unreadable_metadata():
        yield Problem(Severity.ERROR, f"{problem}, so that none of its plugins is found", "install it again")
    for plugin in found:
        if plugin.error is not None:
            yield Problem(
                Severity.ERROR,
                f"the plugin {plugin.name} of {plugin.distribution} {plugin.version} is broken: {plugin.error}",
                f"install a {plugin.distribution} that works, or uninstall it",
            )


def _problems_of_cuda(checked: CheckedConfig | None) -> Iterator[Problem]:
    if torch.cuda.is_available() or torch.version.hip:
        return
    config = checked.config if checked is not None else None
    wanted = config is not None and config.train.device == "cuda"
    severity = Severity.ERROR if wanted else Severity.WARNING
    because = "train.device: cuda needs a GPU, but " if wanted else ""
    driver = _NVIDIA_DRIVER.exists()
    instead = ", or write train.device: auto" if wanted else ""
    if torch.version.cuda is None and (driver or wanted):
        yield Problem(
            severity,
            f"{because}PyTorch {torch.__version__} is built without CUDA" + (", and a GPU is here" if driver else ""),
            f"install a CUDA build of PyTorch (https://pytorch.org/get-started/locally){instead}",
        )
    elif torch.version.cuda is not None:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None and driver:
            fix = f"unset CUDA_VISIBLE_DEVICES, which is {hidden!r}"
        elif driver:
            fix = f"install a driver for CUDA {torch.version.cuda}, or a PyTorch built for an older CUDA"
        else:
            fix = "install NVIDIA's driver; for a machine without a GPU a CPU build of PyTorch is smaller"
        missing = "no GPU can be used" if driver else "there is no NVIDIA driver"
        yield Problem(
            severity,
            f"{because}PyTorch {torch.__version__} is built for CUDA {torch.version.cuda}, and {missing}",
            fix + instead,
        )


def _problems_of_python() -> Iterator[Problem]:
    cached = importlib.util.cache_from_source(__file__) if sys.implementation.cache_tag else None
    if sys.dont_write_bytecode and (cached is None or not Path(cached).exists()):
        yield Problem(
            Severity.WARNING,
            "Python writes no bytecode (PYTHONDONTWRITEBYTECODE), so that every start compiles everything anew",
            "unset PYTHONDONTWRITEBYTECODE, or run `python -m compileall` over what is installed",
        )


def _problems_of_threads() -> Iterator[Problem]:
    threads, available = torch.get_num_threads(), cores()
    if threads > available:
        yield Problem(
            Severity.WARNING,
            f"PyTorch runs {threads} threads on {available} cores, where they wait for each other",
            f"set OMP_NUM_THREADS={available}, or write train.cpu_threads: {available}",
        )


def _problems_of_disk(folder: Path) -> Iterator[Problem]:
    free = free_bytes(folder)
    if free is not None and free < _LITTLE_DISK:
        yield Problem(
            Severity.WARNING,
            f"{show_bytes(free)} are free where run folders are made, in {folder}/",
            "free some, or write a run_dir on a larger disk",
        )


def _problems_of_config(checked: CheckedConfig) -> Iterator[Problem]:
    """What `ttt check` finds wrong with this machine, for this config."""
    for finding in checked.findings:
        if finding.blames is not Blame.CONFIG:  # too little memory or disk may be the machine's fault, too
            place = f"{finding.place}: " if finding.place else ""
            yield Problem(finding.severity, f"{place}{finding.message} ({finding.code})", finding.fix)


# --- what each implementation supports ---

_ALL = {"fused": "yes", "generic": "yes", "reference": "yes"}
SUPPORT: Mapping[str, Mapping[str, str]] = {
    "linear inner models, MLPs of any depth": _ALL,
    "causal and non-causal updates": _ALL,
    "mini-batches that a piece leaves or finds open": _ALL,
    "tokens that a mask leaves out": _ALL,
    "tokens in float64, float32, bfloat16, float16": _ALL,
    "groups recomputed in backward": {"fused": "yes", "generic": "yes", "reference": "no"},
    "second derivatives": {"fused": "no", "generic": "group size 0", "reference": "yes"},
    "`torch.compile(fullgraph=True)`": {"fused": "yes", "generic": "group size 0", "reference": "no"},
    "chosen where `TTT_OPS` is not set": {"fused": "yes", "generic": "small pieces", "reference": "no"},
}
"""What each implementation of the scan supports. tests/test_doctor.py runs every claim."""


def support_table() -> str:
    """`SUPPORT` as the Markdown table of docs/ops.md."""
    names = select.PORTABLE[::-1]
    lines = [f"| | {' | '.join(f'`{name}`' for name in names)} |", "| --- |" + " --- |" * len(names)]
    lines += [f"| {claim} | {' | '.join(answers[name] for name in names)} |" for claim, answers in SUPPORT.items()]
    return "\n".join(lines) + "\n"
