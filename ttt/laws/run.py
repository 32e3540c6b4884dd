"""Checks of a plugin's data and loss as `ttt train` uses them, on the demo's own windows; see `ttt.laws.plugin`."""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ttt.adapter import TTTAdapter, carried, gates_closed
from ttt.adapter_file import backbone_identity, load_adapter
from ttt.config import RunConfig
from ttt.inject import Injection
from ttt.laws.bench import Bench, running
from ttt.laws.parts import layers_of
from ttt.laws.plugin import MethodBrokenError, demo_config, method_of, same, tensors_in
from ttt.plugins import Batch, LossOutput, WindowDataset
from ttt.plugins.rows import StepRows
from ttt.train.means import means_of, weights_of
from ttt.train.passes import drawing_for, load_batch, seed_pass, states_to_carry
from ttt.train.setup import build, threads

_ITEMS = 4
"""How many windows of the demo's data are read."""
_AGREES = 1e-3
"""The largest relative difference between the loss of some windows and the loss of the same windows twice."""
_SAME = 1e-6
"""The largest difference between two sums of the same numbers in a model of float64, whose loss may be float32."""


def dataset_keeps_its_protocol(bench: Bench) -> None:
    """The demo's data: files cover the windows in order, windows do not change, and `describe` tells them apart.

    Raises:
        MethodBrokenError: naming the method of `ttt.plugins.backbone.WindowDataset` that breaks this.
    """
    config = demo_config(bench)
    with method_of(bench, "has_eval_data"):
        splits = ("train", "eval") if bench.backbone.has_eval_data(config) else ("train",)
    for split in splits:
        with method_of(bench, "dataset") as method:
            data = bench.backbone.dataset(config, split=split, device=bench.device)
            method = f"{method}({split!r})"
            _require_members(method, data)
            _require_files(method, data)
            picked = _picked(data)
            _require_windows(method, data, picked)
            if split == "train":
                again = bench.backbone.dataset(config, split=split, device=bench.device)
                if len(again) != len(data) or not same(again[picked[0]], data[picked[0]]):
                    raise MethodBrokenError(method, "made a second time it holds other windows")


def _require_members(method: str, data: WindowDataset) -> None:
    for name in ("__len__", "__getitem__", "collate", "files", "describe", "notice"):
        if not hasattr(data, name):
            raise MethodBrokenError(method, f"the {type(data).__name__} has no `{name}`")
    if data.notice is not None and not isinstance(data.notice, str):
        raise MethodBrokenError(method, f"`notice` is {type(data.notice).__name__}, neither text nor None")
    if len(data) < 1:
        raise MethodBrokenError(method, "it has no windows")


def _require_files(method: str, data: WindowDataset) -> None:
    start = 0
    for number, file in enumerate(data.files):
        if not isinstance(file, range) or file.step != 1 or len(file) < 1:
            raise MethodBrokenError(method, f"`files[{number}]` is {file!r}, not the range of a file's windows")
        if file.start != start:
            kind = "overlap" if file.start < start else "leave a gap"
            raise MethodBrokenError(
                method,
                f"`files` {kind}: file {number} starts at window {file.start}, the one before ends before {start}",
            )
        start = file.stop
    if start != len(data):
        raise MethodBrokenError(method, f"`files` cover {start} windows of {len(data)}")


def _picked(data: WindowDataset) -> list[int]:
    """A few windows: the first, the last, and the first ones of files."""
    starts = [file.start for file in data.files]
    return list(dict.fromkeys([0, len(data) - 1, *starts[1 : _ITEMS - 1], min(1, len(data) - 1)]))[:_ITEMS]


def _require_windows(method: str, data: WindowDataset, picked: Sequence[int]) -> None:
    told: dict[str, int] = {}
    samples, kept = [], []
    for window in picked:
        seed_pass(window, "law", 0)
        samples.append(data[window])
        kept.append(_copied(samples[-1]))
        seed_pass(window, "law", 1)  # a window must not depend on the global generators
        if not same(samples[-1], data[window]):
            raise MethodBrokenError(method, f"window {window} is another one when it is read again")
        text = data.describe(window)
        if not isinstance(text, str) or not text.strip():
            raise MethodBrokenError(method, f"`describe({window})` is {text!r}, not a window in the user's words")
        if text in told:
            raise MethodBrokenError(method, f"`describe` says {text!r} of windows {told[text]} and {window} alike")
        told[text] = window
    if not same(samples, kept):
        raise MethodBrokenError(
            method, "reading a window changes one that was read before: each needs memory of its own"
        )
    tensors = list(tensors_in(data.collate(samples)))
    if not tensors:
        raise MethodBrokenError(method, "`collate` makes a batch without a tensor")
    others = len(samples) > 1 and not same(samples[0], samples[1])
    if others and same(data.collate(samples[:2]), data.collate([samples[0], samples[0]])):
        raise MethodBrokenError(method, "`collate` makes the same batch whatever its second window is")
    if not same(data.collate(samples), data.collate(samples)):
        raise MethodBrokenError(method, "`collate` makes another batch of the same windows")


def loss_trains(bench: Bench) -> None:
    """The loss of the demo's first windows is a differentiable scalar that TTT changes, and says what it has read.

    Raises:
        MethodBrokenError: it does not keep to `ttt.plugins.backbone.LossOutput`; the message says how.
    """
    config = demo_config(bench, "train.param_dtype=float32")
    device = torch.device(bench.device)
    with threads(config.train.cpu_threads), method_of(bench, "loss") as method:
        model, injection = build(config, bench.backbone, device)
        data = bench.backbone.dataset(config, split="train", device=device)
        windows = [window % len(data) for window in range(config.train.batch_size)]
        batch = load_batch(data, windows, device)
        before = _copied(batch)
        with running(model, training=True), _lengths(injection) as lengths:
            output = bench.backbone.loss(model, batch, config)
            _require_loss(method, output)
            if not all(module.training for module in model.modules()):
                raise MethodBrokenError(method, "it switches the model to evaluation mode")
            output.loss.backward()
        if not same(batch, before):
            raise MethodBrokenError(method, "it writes to the batch that it is given")
        _require_tokens(bench, config, output, lengths, rows=len(windows))
        one, two = (load_batch(data, [0] * count, device) for count in (1, 2))
        _require_effect(method, bench, model, one, config)
        _require_mean(method, bench, model, once=one, twice=two, config=config)
        _require_states(bench, injection, one, config)
        _require_weights(method, bench, model.double(), data, config)


def _require_loss(method: str, output: LossOutput) -> None:
    if not isinstance(output, LossOutput):
        raise MethodBrokenError(method, f"it returned {type(output).__name__}, not ttt.plugins.backbone.LossOutput")
    loss = output.loss
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        told = f"{list(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise MethodBrokenError(method, f"`loss` is {told}, not a floating-point scalar")
    if not loss.requires_grad:
        raise MethodBrokenError(method, "`loss` is detached: no gradient can go back from it")
    if not math.isfinite(loss.item()):
        raise MethodBrokenError(method, f"`loss` is {loss.item()} on the demo's first windows")
    if isinstance(output.tokens, bool) or not isinstance(output.tokens, int) or output.tokens < 1:
        raise MethodBrokenError(method, f"`tokens` is {output.tokens!r}, not the number of positions that were read")
    for name, value in output.metrics.items():
        if not isinstance(value, Tensor) or value.numel() != 1 or value.requires_grad:
            raise MethodBrokenError(method, f"`metrics[{name!r}]` is not a detached scalar")
    if output.means is not None and not _agree(loss.item(), output.means.sum().item()):
        raise MethodBrokenError(method, f"`means` are {output.means.tolist()}, but `loss`, their sum, is {loss.item()}")


def _require_tokens(
    bench: Bench, config: RunConfig, output: LossOutput, lengths: Mapping[str, set[int]], *, rows: int
) -> None:
    """Require that the loss and the TTT layers read as many tokens of a window as the facts say."""
    facts = bench.backbone.facts(config)
    wanted = facts.tokens_per_window
    if wanted is None:
        return
    method = f"{type(bench.backbone).__name__}.facts"
    for name, found in lengths.items():
        if found != {wanted}:
            told = ", ".join(map(str, sorted(found)))
            raise MethodBrokenError(
                method, f"it says tokens_per_window {wanted}, but {name} reads {told} of a window of the demo"
            )
    if output.tokens != rows * wanted:
        raise MethodBrokenError(
            f"{type(bench.backbone).__name__}.loss",
            f"`tokens` is {output.tokens} of {rows} windows, but the facts say {wanted} tokens each",
        )


def _evaluated(bench: Bench, model: nn.Module, batch: Batch, config: RunConfig, *, seed: int = 0) -> float:
    with running(model, training=False), torch.no_grad():
        seed_pass(seed, "law", 0)
        loss = float(bench.backbone.loss(model, batch, config).loss)
        if any(module.training for module in model.modules()):
            raise MethodBrokenError(
                f"{type(bench.backbone).__name__}.loss", "it switches the model to training mode, in evaluations too"
            )
        return loss


def _require_effect(method: str, bench: Bench, model: nn.Module, batch: Batch, config: RunConfig) -> None:
    open_gates = _evaluated(bench, model, batch, config)
    with gates_closed(model):
        closed = _evaluated(bench, model, batch, config)
    if open_gates == closed:
        raise MethodBrokenError(method, f"it is {closed:g} with open and with closed gates: TTT makes no difference")


def _require_mean(method: str, bench: Bench, model: nn.Module, twice: Batch, once: Batch, config: RunConfig) -> None:
    """Require that windows given twice have the same loss as given once, unless the loss is random."""
    first, repeated, again = (_evaluated(bench, model, once, config, seed=seed) for seed in (0, 0, 1))
    if first != repeated:
        raise MethodBrokenError(
            method, f"of one batch under one seed it is {first:g}, then {repeated:g}: a resumed run would be another"
        )
    if first != again:
        return
    doubled = _evaluated(bench, model, twice, config)
    if abs(doubled - first) > _AGREES * abs(first):
        raise MethodBrokenError(
            method,
            f"`loss` is {first:.4g}, and {doubled:.4g} for the same windows twice: it is not a mean over the batch",
        )


def _require_weights(method: str, bench: Bench, model: nn.Module, data: WindowDataset, config: RunConfig) -> None:
    """Require that some windows at once have the loss and the metrics of their parts, weighed by `loss_weights`.

    A loss that draws from the global generators draws otherwise for each part; nothing is required of it.
    """
    windows = _picked(data)
    parts = [slice(0, 1), slice(1, len(windows))] if len(windows) > 1 else []
    whole, *found = [_measured(bench, model, data, windows, rows, config) for rows in [slice(0, len(windows)), *parts]]
    if not found or whole != _measured(bench, model, data, windows, slice(0, len(windows)), config, generators=1):
        return
    names = [sorted(each.metrics) for each in (whole, *found)]
    if any(each != names[0] for each in names):
        raise MethodBrokenError(method, f"its metrics are {names[0]} of some windows and {names[1]} of others")
    totals = [sum(of_parts) for of_parts in zip(*(each.weights for each in found), strict=True)]
    method = f"{type(bench.backbone).__name__}.loss_weights"
    for name, one in {
        "the loss": whole.loss,
        **{f"the metric {name}": value for name, value in whole.metrics.items()},
    }.items():
        combined = sum(each.part(name, totals) for each in found)
        if not _agree(one, combined):
            raise MethodBrokenError(
                method,
                f"{name} of {len(windows)} windows is {one:.6g} read at once, but {combined:.6g} read in two passes "
                f"that it weighs: it must say over how much each mean is taken",
            )


@dataclass(frozen=True)
class _Measured:
    """The loss of some windows, and over what it is a mean."""

    loss: float
    means: tuple[float, ...]
    weights: tuple[float, ...]
    metrics: Mapping[str, float]
    over: Mapping[str, int]

    def part(self, name: str, totals: Sequence[float]) -> float:
        """What the windows add to the loss or a metric of all."""
        shares = [own / total if total else 0.0 for own, total in zip(self.weights, totals, strict=True)]
        metric = name.removeprefix("the metric ")
        if metric in self.metrics:
            return self.metrics[metric] * shares[self.over.get(metric, 0)]
        return sum(mean * share for mean, share in zip(self.means, shares, strict=True))


def _measured(
    bench: Bench,
    model: nn.Module,
    data: WindowDataset,
    windows: Sequence[int],
    rows: slice,
    config: RunConfig,
    *,
    generators: int = 0,
) -> _Measured:
    """What some rows of a step that reads all windows give, with other global generators if that is wanted."""
    own = range(len(windows))[rows]
    of_step = StepRows(own.start, len(own), len(windows), seed=1, seeds=tuple(own))
    batch = load_batch(data, windows[rows], torch.device(bench.device))
    weights = weights_of(bench.backbone, config, batch, torch.device(bench.device))
    with running(model, training=False), torch.no_grad(), drawing_for(of_step):
        seed_pass(generators, "law", 0)
        output = bench.backbone.loss(model, batch, config)
    means = means_of(output, weights, bench.backbone).tolist()
    metrics = {name: float(value) for name, value in output.metrics.items()}
    return _Measured(float(output.loss), tuple(means), tuple(weights.tolist()), metrics, output.metrics_over)


def _agree(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_SAME, abs_tol=_SAME)


def _require_states(bench: Bench, injection: Injection, batch: Batch, config: RunConfig) -> None:
    """Require that adapters that pass their states on in `outputs` (law 8) do so in the loss too."""
    if not all(isinstance(adapter, TTTAdapter) for adapter in injection.adapters.values()):
        return
    model = injection.model
    with carried(injection) as of_outputs:
        bench.outputs(model, bench.batch(model), training=True)
    with carried(injection) as of_loss, running(model, training=True), torch.no_grad():
        bench.backbone.loss(model, batch, config)
    if of_outputs.states.keys() == injection.adapters.keys():
        states_to_carry(of_loss, injection, backbone=bench.backbone.name)


# --- a run ---


def demo_trains(bench: Bench) -> None:
    """The demo runs for two steps as in `ttt train`: it trains, evaluates with closed gates too, saves and loads again.

    Raises:
        MethodBrokenError: with the error of the run.
    """
    from ttt.train import train  # imported here: the loop draws pictures, which laws do not need

    with tempfile.TemporaryDirectory() as folder:
        config = demo_config(bench, "train.max_steps=2", "eval.max_batches=1", "train.num_microbatches=1")
        config = config.model_copy(update={"run_dir": str(Path(folder) / "run")})
        with method_of(bench, "loss and dataset, in a run of two steps of the demo") as method:
            result = train(config, bench.backbone, console=Console(file=io.StringIO(), width=120))
            evaluation = result.evaluation
            if evaluation is None or not math.isfinite(evaluation.loss):
                raise MethodBrokenError(method, "the run ended without a finite evaluation")
            if evaluation.loss == evaluation.loss_gates_closed:
                raise MethodBrokenError(method, "closing the gates changes nothing in the evaluation")
        with method_of(bench, "sites") as method, threads(config.train.cpu_threads):
            model = bench.backbone.build(config.backbone, device=bench.device, dtype=torch.float32)
            assert result.checkpoint is not None
            injection = load_adapter(
                result.checkpoint,
                model,
                sites=bench.backbone.sites(model),
                backbone=backbone_identity(bench.backbone, config.backbone),
                causal=bench.backbone.causal,
            )
            if list(injection.adapters) != [site.name for site in injection.sites]:
                raise MethodBrokenError(method, "the adapter of a run is loaded into other layers")


# --- helpers of several checks ---


@contextlib.contextmanager
def _lengths(injection: Injection) -> Iterator[dict[str, set[int]]]:
    """A context that records how many tokens the calls of each TTT layer read."""
    found: dict[str, set[int]] = {}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.setdefault(name, set()).add((args[0] if args else kwargs["x"]).shape[1])

        return keep

    handles = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers_of(injection).items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _copied(batch: Any) -> Any:
    """A copy of a nested structure, its tensors included."""
    copies = iter([tensor.clone() for tensor in tensors_in(batch)])

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return next(copies)
        if isinstance(value, Mapping):
            return {key: copy(item) for key, item in value.items()}
        return [copy(item) for item in value] if isinstance(value, (tuple, list)) else value

    return copy(batch)
