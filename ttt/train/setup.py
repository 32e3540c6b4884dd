"""Builds what a run needs: the device, the model with its adapters, the order of its data."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

import torch
from pydantic import ValidationError
from torch import nn

from ttt import inject
from ttt.adapter import TTTAdapter
from ttt.config.evaluation import EvalConfig
from ttt.config.schema import RunConfig, TrainConfig, inner_widths
from ttt.errors import ConfigError, EnvironmentProblem
from ttt.inject import Injection
from ttt.layer import TTTLayer
from ttt.machine import (
    exact_implementation,
    local_rank_launched,
    missing_for_8bit,
    missing_precision,
    processes_launched,
)
from ttt.ops import select
from ttt.ops.constants import Precision
from ttt.plugins import Backbone, WindowDataset, run_config_model
from ttt.plugins.asking import asked, is_out_of_memory
from ttt.plugins.data import source_files
from ttt.train.lora import lora_plan
from ttt.train.order import FileLaneOrder, Group, LaneOrder, WindowOrder
from ttt.train.passes import seed_pass
from ttt.words import first_line

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(wanted: str) -> torch.device:
    """The device of `train.device`: `auto` is CUDA if there is a CUDA device.

    Raises:
        EnvironmentProblem: the config says `cuda` and there is no CUDA device.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"train.device: cuda, but PyTorch {torch.__version__} sees no CUDA device; write auto or cpu, or install a "
            f"CUDA build of PyTorch and its driver"
        )
    return torch.device("cuda", _own_gpu())


def require_optimizer(train: TrainConfig) -> None:
    """Refuse to begin a run whose `train.optimizer` cannot run on its device.

    Raises:
        EnvironmentProblem: 8-bit AdamW lacks its package, or a GPU.
    """
    if train.optimizer != "adamw_8bit":
        return
    missing = missing_for_8bit(choose_device(train.device).type)
    if missing is not None:
        raise EnvironmentProblem(f"train.{missing.problem}; {missing.fix}")


def _own_gpu() -> int:
    """The number of this process's GPU: the current one, or of several processes that of its local rank.

    Raises:
        EnvironmentProblem: there are fewer GPUs than processes on this machine.
    """
    if processes_launched() == 1:
        return torch.cuda.current_device()
    local, there = local_rank_launched(), torch.cuda.device_count()
    if local >= there:
        raise EnvironmentProblem(
            f"train.device: cuda, but there {'is 1 GPU' if there == 1 else f'are {there} GPUs'} for the process of "
            f"local rank {local}; start at most {there} processes on this machine"
        )
    torch.cuda.set_device(local)
    return local


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far in bytes: of PyTorch's allocator on CUDA, else of the process (0 if it is not known)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_in_words(device: torch.device) -> str:
    """The device in words, with the number of threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} {'thread' if threads == 1 else 'threads'}"


def with_backbone_options(config: RunConfig, backbone: Backbone) -> RunConfig:
    """The config as an instance of the class with the backbone's own options, so that none is lost when it is written.

    Raises:
        ConfigError: the config does not fit the backbone.
    """
    model = run_config_model(backbone)
    if isinstance(config, model):
        return config
    try:
        sections = {name: getattr(config, name) for name in RunConfig.model_fields}
        # this section has the plugin's own class too, and pydantic takes no instance of its base
        sections["eval"] = {name: getattr(config.eval, name) for name in EvalConfig.model_fields}
        sections["eval"]["score"] = config.eval.score.model_dump()
        return model.model_validate(sections)
    except ValidationError as error:
        raise ConfigError(f"the config does not fit the backbone {backbone.name}: {error.errors()[0]['msg']}") from None


def build(config: RunConfig, backbone: Backbone, device: torch.device) -> tuple[nn.Module, Injection]:
    """Build the model with its adapters; the backbone's random draws come from the run's seed."""
    seed_pass(config.train.seed, "build", 0)
    model = backbone.build(config.backbone, device=device, dtype=_DTYPES[config.train.param_dtype])
    sites = backbone.sites(model)
    with asked(backbone, "its sites"):  # a site may bring its own adapter and its own way to attach it
        # with TTT, attaching prepares a site, so that ejecting undoes it
        prepared = inject.prepare(sites, config.ttt, causal=backbone.causal) if config.adapter == "lora" else {}
        lora = lora_plan(config, backbone, model, sites)
        injection = inject.apply(
            model, sites, config.injected, causal=backbone.causal, seed=config.train.seed, lora=lora
        )
        injection.takes_over(prepared)
    if config.ttt.persistent_states and not all(
        isinstance(adapter, TTTAdapter) for adapter in injection.adapters.values()
    ):
        raise ConfigError(
            f"ttt.persistent_states: true: the adapters of {backbone.name} carry no state from window to window; "
            f"write false"
        )
    backbone.set_gradient_checkpointing(model, config.train.gradient_checkpointing)
    _set_precision(injection, config.train.ttt_precision, device)
    return model, injection


def _set_precision(injection: Injection, precision: Precision, device: torch.device) -> None:
    """Let the TTT layers multiply in the run's precision.

    Raises:
        EnvironmentProblem: the device or the implementation of the scan cannot.
    """
    layers = [m for adapter in injection.adapters.values() for m in adapter.modules() if isinstance(m, TTTLayer)]
    obstacle = exact_implementation(precision) or missing_precision(precision, device.type, _capability(device))
    if layers and obstacle is not None:
        raise EnvironmentProblem(f"train.ttt_precision: {precision}, but {obstacle.problem}; {obstacle.fix}")
    for layer in layers:
        _require_implementation(layer, device)
        layer.precision = precision


def _require_implementation(layer: TTTLayer, device: torch.device) -> None:
    """Refuse a forced implementation of the scan (`TTT_OPS`) that cannot run the layer on the run's device.

    Raises:
        EnvironmentProblem: it cannot, or there is none of its name.
    """
    widths, size = inner_widths(layer.head_width, layer.config), layer.config.mini_batch_size
    try:
        select.implementation(device_type=device.type, dtypes=(torch.float32,), widths=widths, size=size)
    except ValueError as error:
        raise EnvironmentProblem(str(error)) from None


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


Order = WindowOrder | LaneOrder | FileLaneOrder
"""What training reads, pass by pass."""


def order(config: RunConfig, dataset: WindowDataset) -> Order:
    """The order in which training reads its windows.

    Raises:
        ConfigError: states are carried, but windows are shuffled or there are too few files.
    """
    size, seed, shuffle = config.train.batch_size, config.train.seed, config.data.shuffle
    groups = [Group(source.files, source.weight, source.name) for source in source_files(dataset)]
    if not config.ttt.persistent_states:
        return WindowOrder(dataset.files, batch_size=size, shuffle=shuffle, seed=seed, groups=groups)
    if shuffle is True:
        raise ConfigError(
            "ttt.persistent_states: true needs windows in order; write data.shuffle: false, or files for files in a "
            "random order"
        )
    if shuffle == "files" or len(groups) > 1:
        random = shuffle == "files"
        return FileLaneOrder(dataset.files, batch_size=size, shuffle=random, seed=seed, groups=groups)
    return LaneOrder(dataset.files, batch_size=size)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """A context with this number of CPU threads in PyTorch; None does not change it."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ways_to_less_memory(config: RunConfig) -> list[str]:
    """Changes to the config with which training takes less memory."""
    ways = ["a smaller train.batch_size (with more train.num_microbatches)", "shorter windows"]
    if not config.train.gradient_checkpointing:
        ways.append("train.gradient_checkpointing: true")
    if config.train.param_dtype == "float32":
        ways.append("train.param_dtype: bfloat16")
    return ways


@contextlib.contextmanager
def memory_errors(ways: Sequence[str]) -> Iterator[None]:
    """Turn an out-of-memory error into a sentence that says what takes less memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise EnvironmentProblem(f"out of memory: {first_line(error)} What takes less: {', '.join(ways)}") from error
