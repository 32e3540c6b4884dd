"""The bench on which laws are checked: it builds a backbone's tiny model, injects TTT, runs it and compares."""

from __future__ import annotations

import contextlib
import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ttt import inject
from ttt.check.load import check_config
from ttt.config import BackboneOptions, RunConfig, TTTConfig
from ttt.errors import TTTError, UsageError
from ttt.inject import Injection
from ttt.layer import TTTLayer
from ttt.plugins import Backbone, Batch, run_config_model
from ttt.train.passes import seed_pass


class LawBrokenError(TTTError):
    """A law does not hold; `law` is its number, the message says where and by how much."""

    def __init__(self, law: int, message: str, measured: float | None = None) -> None:
        super().__init__(f"law {law}: {message}")
        self.law = law
        self.what = message
        """The message without the law's number."""
        self.measured = measured
        """The measured number that breaks the law, if there is one."""


def distance(a: Tensor, b: Tensor) -> float:
    """`‖a − b‖ / ‖b‖`, or `‖a − b‖` if b is zero; infinite if a or b is not finite."""
    if a.shape != b.shape:
        return float("inf")
    difference, size = torch.linalg.vector_norm((a - b).double()).item(), torch.linalg.vector_norm(b.double()).item()
    found = difference / size if size else difference
    return found if found == found else float("inf")


@contextlib.contextmanager
def running(model: nn.Module, *, training: bool) -> Iterator[None]:
    """A context with the model in training or evaluation mode and all generators seeded; both are restored at the end.

    Dropout is then the same in every pass, so that passes can be compared.
    """
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        seed_pass(0, "law", 0)
        model.train(training)
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            random.setstate(states[0])
            np.random.set_state(states[1])


Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def reentrant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Reentrant activation checkpointing around a function."""
    return lambda *args, **keywords: checkpoint(functools.partial(function, **keywords), *args, use_reentrant=True)


def non_reentrant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Non-reentrant activation checkpointing around a function."""
    return lambda *args, **keywords: checkpoint(functools.partial(function, **keywords), *args, use_reentrant=False)


@dataclass
class Bench:
    """A backbone under test.

    Args:
        backbone: the plugin.
        options: the model's options; None takes the plugin's `tiny()`.
        ttt: settings of the `ttt` section, over the plugin's defaults. The mini-batch size is 4 unless they change it,
            so that short sequences have several mini-batches.
        tokens: length of the sequences; by default not a multiple of the mini-batch size.
        batch_size: how many streams.
        device: the device to run on.
        tolerance: the largest `distance` of two results that a law says are equal. Backbones that compute in float32
            even in float64, as Moshi's norms do, determine it.
        dtype: type of the backbone's parameters, if a law does not choose its own.
        gradient_checkpointing: whether the backbone's own activation checkpointing is on, if a law does not choose.
        bare: if `options` recompute something, the options of the same model without recomputation.
    """

    backbone: Backbone
    options: BackboneOptions | None = None
    ttt: dict[str, Any] | None = None
    tokens: int = 14
    batch_size: int = 3
    device: str = "cpu"
    tolerance: float = 1e-5
    dtype: torch.dtype = torch.float32
    gradient_checkpointing: bool = False
    bare: BackboneOptions | None = None

    def config(self, **changes: Any) -> TTTConfig:
        """The `ttt` section with changes."""
        own = {} if "preset" in changes or "preset" in (self.ttt or {}) else dict(self.backbone.ttt_defaults)
        return TTTConfig.model_validate({**own, "mini_batch_size": 4, **(self.ttt or {}), **changes})

    def model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Build the plain tiny model, with the same values at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.backbone.build(
                self.options or self.backbone.tiny(), device=self.device, dtype=dtype or self.dtype
            )
        if self.gradient_checkpointing:
            self.backbone.set_gradient_checkpointing(model, True)
        return model

    def prepared(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The plain tiny model with what its layers have beside TTT, where the config names them (`Site.prepare`)."""
        model = self.model(dtype)
        inject.prepare(self.backbone.sites(model), self.config(), causal=self.backbone.causal)
        return model

    def inject(self, model: nn.Module, config: TTTConfig | None = None) -> Injection:
        """Inject TTT into the model."""
        return inject.apply(
            model, self.backbone.sites(model), config or self.config(), causal=self.backbone.causal, seed=1
        )

    def injected(self, dtype: torch.dtype | None = None, **changes: Any) -> Injection:
        """A fresh tiny model with TTT."""
        return self.inject(self.model(dtype), self.config(**changes))

    def batch(self, model: nn.Module, *, seed: int = 0) -> Batch:
        """A random batch."""
        return self.backbone.example_batch(model, batch_size=self.batch_size, tokens=self.tokens, seed=seed)

    def outputs(self, model: nn.Module, batch: Batch, *, training: bool = False) -> Tensor:
        """The model's outputs, without gradient, in evaluation mode or in training mode."""
        with torch.no_grad(), running(model, training=training):
            return self.backbone.outputs(model, batch)

    def gradients(self, model: nn.Module, batch: Batch, *, training: bool = True) -> dict[str, Tensor]:
        """The outputs, and the gradients of every parameter for a sum that weighs every output differently.

        By default in training mode, since many models recompute activations only there.
        """
        for parameter in model.parameters():
            parameter.grad = None
        with running(model, training=training):
            outputs = self.backbone.outputs(model, batch)
            weights = torch.linspace(0.5, 1.5, outputs.numel(), device=outputs.device).view_as(outputs)
            (outputs.float() * weights).square().mean().backward()
        found = {"outputs": outputs.detach()}
        found |= {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            for name, parameter in model.named_parameters()
        }
        return found

    @contextlib.contextmanager
    def wrapped(self, injection: Injection, wrappers: Sequence[Wrapper]) -> Iterator[None]:
        """A context with activation checkpointing around every adapter; the first wrapper is the outermost."""
        originals = {name: adapter.forward for name, adapter in injection.adapters.items()}
        try:
            for name, adapter in injection.adapters.items():
                function = originals[name]
                for wrapper in reversed(wrappers):
                    function = wrapper(function)
                adapter.forward = function
            yield
        finally:
            for adapter in injection.adapters.values():
                adapter.__dict__.pop("forward", None)

    def checkpointed(self, model: nn.Module, enabled: bool = True) -> bool:
        """Switch the backbone's own activation checkpointing on or off; False if it has none to switch on."""
        try:
            self.backbone.set_gradient_checkpointing(model, enabled)
        except UsageError:
            return False
        return True

    @contextlib.contextmanager
    def counted(self, injection: Injection) -> Iterator[Counter[str]]:
        """A context that counts how often each adapter's TTT layer runs forward, by site name.

        It runs once for each of its scans, and again each time that a checkpoint recomputes one.
        """
        counts: Counter[str] = Counter()

        def hook(name: str) -> Callable[..., None]:
            return lambda *_: counts.update([name])

        handles = [
            module.register_forward_pre_hook(hook(name))
            for name, adapter in injection.adapters.items()
            for module in adapter.modules()
            if isinstance(module, TTTLayer)
        ]
        try:
            yield counts
        finally:
            for handle in handles:
                handle.remove()

    def run_config(self, **train: Any) -> RunConfig:
        """A whole config for the bench's model, with these settings of the `train` section.

        Raises:
            ValueError: keys of the plugin's `data` section have no default, and its demo does not set them.
        """
        model = run_config_model(self.backbone)
        sections = {"backbone": self.options or self.backbone.tiny(), "ttt": self.config(), "train": train}
        try:
            return model.model_validate(sections)
        except ValidationError:  # keys of the `data` section without a default
            text = self.backbone.presets()["demo"]
            demo = check_config("demo", text=text, backbone=self.backbone, training=False).config
            if demo is None:
                raise
            return model.model_validate({**sections, "data": demo.data})
