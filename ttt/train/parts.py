"""The parts of a run, built once before its first step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from rich.console import Console
from torch import Tensor, nn

from ttt.adapter_file import AdapterInfo, backbone_identity, load_adapter, read_info, trained_backbone
from ttt.checkpoint_folder import Checkpoint
from ttt.config.schema import RunConfig
from ttt.inject import Injection
from ttt.interrupt import stop_if_asked
from ttt.parallel.world import World
from ttt.plugins import Backbone, WindowDataset
from ttt.plugins.installed_tasks import ChosenTask, chosen_tasks
from ttt.printable import say
from ttt.train.compiling import compile_layers
from ttt.train.lora import load_lora_start
from ttt.train.optim import Learnable, Optimizer, choose_learnable
from ttt.train.rundir import RunDir
from ttt.train.setup import Order, build, order


@dataclass(frozen=True)
class Parts:
    """The parts of a run. None of them is replaced during the run; `Progress` holds how far the run is."""

    config: RunConfig
    backbone: Backbone
    device: torch.device
    directory: RunDir
    console: Console
    dataset: WindowDataset
    eval_dataset: WindowDataset
    eval_split: str
    """`eval`, or `train` if there is no held-out data."""
    order: Order
    model: nn.Module
    injection: Injection
    learnable: list[Learnable]
    optimizer: Optimizer
    start: AdapterInfo | None
    """The adapter that the run starts from; None if it starts with fresh weights, or is resumed."""
    inherited: frozenset[str]
    """Backbone parameters that learned before this run; checkpoints hold them too, even if they are frozen."""
    tasks: tuple[ChosenTask, ...] = ()
    """Tasks to measure at each evaluation, besides the outer loss."""
    world: World = field(default_factory=World)
    """The processes of the run, and the place of this one among them."""

    def say(self, text: str) -> None:
        """Print a line."""
        say(self.console, text)

    @property
    def learned_parameters(self) -> int:
        """How many numbers learn."""
        return sum(entry.parameter.numel() for entry in self.learnable)

    def trained_tensors(self) -> dict[str, Tensor]:
        """Backbone parameters, by name, that differ from what the backbone was built with."""
        learn = {entry.name for entry in self.learnable if entry.role == "backbone"}
        return {name: value for name, value in self.model.named_parameters() if name in learn | self.inherited}


def build_parts(
    config: RunConfig,
    backbone: Backbone,
    device: torch.device,
    directory: RunDir,
    console: Console,
    *,
    start: AdapterInfo | None = None,
    resumed: Checkpoint | None = None,
    world: World | None = None,
) -> Parts:
    """Build the parts of a run, with the weights that it starts from. Writes nothing.

    Args:
        config: the resolved config, of the class that has the backbone's options.
        backbone: the plugin.
        device: the device to train on.
        directory: the run's folder.
        console: the console for reports.
        start: the adapter to start from.
        resumed: the checkpoint to go on from; its tensors are not loaded here.
        world: the processes of the run; None is this one alone.

    Raises:
        StopRequested: somebody asked to stop between two stages.
        AdapterMismatchError: `start` belongs to something else.
        ConfigError: `eval.tasks` names a task that is not installed.
    """
    tasks = chosen_tasks(config)
    dataset = backbone.dataset(config, split="train", device=device)
    eval_split = "eval" if backbone.has_eval_data(config) else "train"
    eval_dataset = dataset if eval_split == "train" else backbone.dataset(config, split=eval_split, device=device)
    reading_order = order(config, dataset)
    stop_if_asked()
    model, injection = build(config, backbone, device)
    stop_if_asked()
    if config.train.compile:
        compile_layers(injection, device)
    learnable = choose_learnable(model, injection, config.train, is_attention=backbone.is_attention)
    if start is not None:  # before the optimiser, which copies parameters in half precision
        _load_start(start, model, injection, backbone, config)
    if resumed is None:
        load_lora_start(injection, backbone, config)
    before = start if resumed is None else read_info(resumed.path)
    return Parts(
        config=config,
        backbone=backbone,
        device=device,
        directory=directory,
        console=console,
        dataset=dataset,
        eval_dataset=eval_dataset,
        eval_split=eval_split,
        order=reading_order,
        model=model,
        injection=injection,
        learnable=learnable,
        optimizer=Optimizer(learnable, config.train),
        start=start,
        inherited=frozenset(() if before is None else trained_backbone(before)),
        tasks=tasks,
        world=world or World(),
    )


def _load_start(
    start: AdapterInfo, model: nn.Module, injection: Injection, backbone: Backbone, config: RunConfig
) -> None:
    load_adapter(
        start.path,
        model,
        injection=injection,
        backbone=backbone_identity(backbone, config.backbone),
        as_start=True,
        verify=False,  # it was compared when it was found, if that was wanted
    )
