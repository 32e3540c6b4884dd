"""The parts of a run, built once before its first step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from ttt.adapter_file import AdapterInfo, BackboneWeights, backbone_identity, load_adapter, read_info, trained_backbone
from ttt.checkpoint_folder import Checkpoint
from ttt.config.schema import RunConfig
from ttt.errors import ConfigError
from ttt.inject import Injection
from ttt.interrupt import stop_if_asked
from ttt.parallel.engine import Engine, splits_parameters
from ttt.parallel.gradients import TENSOR
from ttt.parallel.heads import shard_injection
from ttt.parallel.layout import NOT_COMPILED
from ttt.parallel.world import World
from ttt.plugins import Backbone, WindowDataset
from ttt.plugins.installed_tasks import ChosenTask, chosen_tasks
from ttt.printable import say
from ttt.train.compiling import compile_layers
from ttt.train.learnable import Learnable, choose_learnable
from ttt.train.lora import load_lora_start
from ttt.train.optim import Optimizer
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
    engine: Engine
    """Computes the loss, as the layout of the processes says; `engine.loss(batch)` is the backbone's."""
    start: AdapterInfo | None
    """The adapter that the run starts from; None if it starts with fresh weights, or is resumed."""
    inherited: frozenset[str]
    """Backbone parameters that learned before this run; checkpoints hold them too, even if they are frozen."""
    backbone_weights: BackboneWeights | None = None
    """By what an adapter file knows the backbone again, if its parameters are split; None if they can be looked at."""
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
        """Backbone parameters, by name, that differ from what the backbone was built with, as they are used."""
        self.engine.settle()
        names, used_in = self.trained_names(), self.engine.used_in
        return {
            name: value.to(used_in[name]) if name in used_in else value
            for name, value in self.model.named_parameters()
            if name in names
        }

    def trained_names(self) -> set[str]:
        """The names of the backbone parameters that learn, or learned before."""
        return {entry.name for entry in self.learnable if entry.role == "backbone"} | self.inherited


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
        resumed: the checkpoint to go on from; its weights are loaded here, the rest by `ttt.train.saving.restored`.
        world: the processes of the run; None is this one alone.

    Raises:
        StopRequested: somebody asked to stop between two stages.
        AdapterMismatchError: `start` belongs to something else.
        ConfigError: `eval.tasks` names a task that is not installed.
    """
    world = world or World()
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
    learnable = choose_learnable(
        model, injection, config.train, is_attention=backbone.is_attention, blocks=backbone.blocks(model)
    )
    # before parameters are split, and before the optimiser, which copies those in half precision
    inherited = _load_weights(model, injection, backbone, config, start, resumed)
    trained = inherited | {entry.name for entry in learnable if entry.role == "backbone"}
    weights = BackboneWeights.of(injection, without=trained) if splits_parameters(world) else None
    if world.mesh is not None and world.tensor > 1:
        if config.train.compile:
            raise ConfigError(f"train.compile: true: {NOT_COMPILED}; write compile: false, or parallel: {{tensor: 1}}")
        shard_injection(injection, world.mesh[TENSOR])
    engine = _engine(config, backbone, model, injection, world)
    learnable = _as_they_are_now(learnable, model)
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
        optimizer=Optimizer(learnable, config.train, used_in=engine.used_in),
        engine=engine,
        start=start,
        inherited=inherited,
        backbone_weights=weights,
        tasks=tasks,
        world=world,
    )


def _load_weights(
    model: nn.Module,
    injection: Injection,
    backbone: Backbone,
    config: RunConfig,
    start: AdapterInfo | None,
    resumed: Checkpoint | None,
) -> frozenset[str]:
    """Load what a run starts from or goes on from; the names of backbone parameters that learned before."""
    if start is not None:
        _load(start.path, model, injection, backbone, config, as_start=True)
    if resumed is None:
        load_lora_start(injection, backbone, config)
    else:
        _load(resumed.path, model, injection, backbone, config, as_start=False)
    before = start if resumed is None else read_info(resumed.path)
    return frozenset(() if before is None else trained_backbone(before))


def _engine(config: RunConfig, backbone: Backbone, model: nn.Module, injection: Injection, world: World) -> Engine:
    units: list[nn.Module] = []
    if splits_parameters(world):
        units = [*injection.adapters.values(), *backbone.blocks(model)]
    return Engine(model, lambda adapted, batch: backbone.loss(adapted, batch, config), world, units)


def _as_they_are_now(learnable: list[Learnable], model: nn.Module) -> list[Learnable]:
    """The parameters of the same names: those that were split are other objects now."""
    now = dict(model.named_parameters())
    return [replace(entry, parameter=now[entry.name]) for entry in learnable]


def _load(
    path: Path, model: nn.Module, injection: Injection, backbone: Backbone, config: RunConfig, *, as_start: bool
) -> None:
    load_adapter(
        path,
        model,
        injection=injection,
        backbone=backbone_identity(backbone, config.backbone),
        as_start=as_start,
        verify=False,  # it was compared when it was found, if that was wanted
    )
