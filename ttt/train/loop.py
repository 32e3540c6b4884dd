"""The training loop.

Each step reads `num_microbatches` batches, sums their gradients, and makes one optimiser step. Everything that it
draws at random is a function of the seed and the number of the forward pass, and everything else is in the
checkpoint, so a resumed run goes on as if it had not stopped.

The adapter that a run ends with is the one of its last checkpoint; `summary.json` names it (see `ttt.train.rundir`).
"""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ttt.adapter import carried, gates_closed
from ttt.adapter_file import (
    AdapterInfo,
    backbone_identity,
    changed_at_start,
    load_adapter,
    read_info,
    trained_backbone,
)
from ttt.checkpoint_folder import Checkpoint
from ttt.config.schema import RunConfig
from ttt.errors import InactiveLayerError, NonFiniteError, TTTError
from ttt.evidence import observe
from ttt.files import require_space, writing
from ttt.interrupt import FINISHING, STEPPING, Interrupt, StopRequested, interruptible, stop_if_asked
from ttt.plugins import Backbone, Batch, LossOutput, WindowDataset
from ttt.plugins.asking import WrongAnswer, asked
from ttt.plugins.rows import StepRows, reading_rows
from ttt.printable import say
from ttt.state import TTTState
from ttt.train import rundir
from ttt.train.checkpoint import content_bytes, read_content, write_content
from ttt.train.claim import METRICS, SUMMARY
from ttt.train.compiling import compile_errors, compile_layers
from ttt.train.display import Display, duration_in_words
from ttt.train.divergence import (
    Diagnosis,
    Examination,
    StepNotFiniteError,
    examined,
    listed,
    lowered,
    not_finite,
    tensors_of,
    way_on,
)
from ttt.train.evaluation import Evaluation, evaluate
from ttt.train.metrics import MetricsFile, finite, read_metrics
from ttt.train.optim import Optimizer, choose_learnable
from ttt.train.order import Reading
from ttt.train.passes import (
    describe,
    load_batch,
    mixed_precision,
    reset_rows,
    seed_pass,
    states_to_carry,
    training_rows,
)
from ttt.train.pictures import draw_run, pictures_are_due
from ttt.train.result import TrainResult, finished, write_summary
from ttt.train.rundir import RunDir
from ttt.train.setup import (
    build,
    choose_device,
    device_in_words,
    memory_errors,
    narrowed,
    order,
    peak_memory_bytes,
    require_one_process,
    threads,
    ways_to_less_memory,
)
from ttt.train.stored_config import CONFIG
from ttt.train.tensorboard import TensorBoard
from ttt.train.terminal import lasting, survived

_DRAW_SECONDS = 60.0
"""How old the pictures may be when a checkpoint is written."""


def train(
    config: RunConfig,
    backbone: Backbone,
    *,
    resume: bool = False,
    console: Console | None = None,
    verify: bool = True,
) -> TrainResult:
    """Train TTT layers in a backbone.

    In the main thread, signals that ask to stop (`ttt.interrupt`) are heeded: before the first step nothing is
    written, from then on the step is finished and saved, and the pictures are drawn. An output that is gone does not
    end a run.

    Args:
        config: the resolved config.
        backbone: the plugin that `config.backbone` names.
        resume: continue the run in `config.run_dir`; where it has no checkpoint yet, start it there.
        console: where to report; standard output by default.
        verify: compare what is resumed or started from with its checksums, which reads it once more.

    Raises:
        ConfigError: the config cannot be honoured with this data and backbone.
        UsageError: the run directory is in use, or there is nothing to resume.
        EnvironmentProblem: something is missing, a device, a file, memory, disk space; or this is one of several
            processes of a distributed launch.
        AdapterMismatchError: `train.init_from` belongs to something else; nothing was written.
        NonFiniteError: a loss or gradient was not finite; the weights are those before that step.
        InactiveLayerError: on the first step, a TTT layer was not reached, did not learn, or got no gradient.
    """
    require_one_process()
    console = console or Console()
    with interruptible(), lasting(console):
        return _train(narrowed(config, backbone), backbone, resume=resume, console=console, verify=verify)


def _train(config: RunConfig, backbone: Backbone, *, resume: bool, console: Console, verify: bool) -> TrainResult:
    run = rundir.choose(config, resume=resume)
    with run.held():
        checkpoint = _standing(run, config, backbone, console, resume=resume, verify=verify)
        ended = None if checkpoint is None else finished(run, checkpoint, config)
        if ended is not None:
            return _tidied(run, ended, config, console)
        init_from = config.train.init_from if checkpoint is None else None
        start = None if init_from is None else read_info(init_from, verify=verify)
        device = choose_device(config.train.device)
        with (
            memory_errors(ways_to_less_memory(config)),
            compile_errors(config.train.compile),
            threads(config.train.cpu_threads),
        ):
            try:
                trainer = Trainer(config, backbone, device, run, console, start=start)
                if checkpoint is not None:
                    trainer.restore(checkpoint)
                stop_if_asked()
            except StopRequested:
                return _not_begun(run, checkpoint, console)
            if checkpoint is None:
                run.create(config)
                _say_taken_over(run, console)
            return trainer.run()


def _standing(
    run: RunDir, config: RunConfig, backbone: Backbone, console: Console, *, resume: bool, verify: bool
) -> Checkpoint | None:
    """The checkpoint to go on from, or None where the run starts; says what is not as it was left."""
    if not resume:
        run.require_unused()
        return None
    checkpoint, notes = run.reopen(config, backbone, verify=verify)
    for note in notes:
        say(console, note)
    if checkpoint is None:
        say(console, f"{run.path}: no checkpoint yet to resume from; the run starts")
        if run.stored_config.is_as_written() is False:
            say(console, f"{run / CONFIG} was changed since a run wrote it; look at it, if that was not you")
    return checkpoint


def _say_taken_over(run: RunDir, console: Console) -> None:
    lines = read_metrics(run / METRICS) if (run / METRICS).is_file() else []
    if lines:
        say(
            console,
            f"{run.path}: a run ended there after step {lines[-1]['step']}, before its first checkpoint; its folder is "
            f"taken over",
        )


def _tidied(run: RunDir, ended: TrainResult, config: RunConfig, console: Console) -> TrainResult:
    """Do what a process that was killed at the very end left undone, and say that the run is done."""
    run.tidy(config.train.ckpt_keep)
    if pictures_are_due(run.path):
        _draw(run.path, lambda text: say(console, text))
    say(console, f"{run.path}: done already, {ended.steps} steps; raise train.max_steps to go on")
    return ended


def _draw(run: Path, warn: Callable[[str], None]) -> list[Path]:
    """A run's pictures; one that cannot be drawn is never the end of a run."""
    made: list[Path] = []
    with survived(f"the pictures in {run} cannot be drawn", warn):
        made += draw_run(run)
    return made


def _not_begun(run: RunDir, checkpoint: Checkpoint | None, console: Console) -> TrainResult:
    """Tell that a run was interrupted before it began, or went on."""
    say(console, "interrupted before the run began; nothing was written: the same command starts it again")
    return TrainResult(
        run_dir=run.path,
        steps=0 if checkpoint is None else checkpoint.step,
        interrupted=True,
        loss=None,
        evaluation=None,
        checkpoint=None if checkpoint is None else checkpoint.path,
        resume_command=run.resume_command(),
    )


class Trainer:
    """One run: built whole, with the weights that it starts from, then restored where it resumes, then run.

    Building writes nothing, and is given up between its stages where somebody asks to stop.
    """

    def __init__(
        self,
        config: RunConfig,
        backbone: Backbone,
        device: torch.device,
        run: RunDir,
        console: Console,
        *,
        start: AdapterInfo | None = None,
    ) -> None:
        self.config = config
        self.backbone = backbone
        self.device = device
        self.directory = run
        self.console = console
        self.dataset: WindowDataset = backbone.dataset(config, split="train", device=device)
        self.eval_split = "eval" if backbone.has_eval_data(config) else "train"
        self.eval_dataset: WindowDataset = (
            self.dataset
            if self.eval_split == "train"
            else backbone.dataset(config, split=self.eval_split, device=device)
        )
        self.order = order(config, self.dataset)
        stop_if_asked()
        self.model, self.injection = build(config, backbone, device)
        stop_if_asked()
        if config.train.compile:
            compile_layers(self.injection, device)
        self.learnable = choose_learnable(
            self.model, self.injection.adapters, config.train, is_attention=backbone.is_attention
        )
        self.start = start
        if start is not None:  # before the optimiser, which copies parameters in half precision
            load_adapter(
                start.path,
                self.model,
                injection=self.injection,
                backbone=backbone_identity(backbone, config.backbone),
                as_start=True,
                verify=False,  # done, or not asked for, where it was found
            )
        self.inherited = frozenset(trained_backbone(start) if start is not None else ())
        """Backbone parameters that learned before this run: its files hold them too, frozen or not."""
        self.optimizer = Optimizer(self.learnable, config.train)
        self.states: dict[str, TTTState] = {}
        self.done = 0
        self.seconds = 0.0
        self.tokens = 0
        self.saved: tuple[int, Path] | None = None
        self.line: dict[str, Any] = {}
        """Metrics of the last step done."""
        self._updating = False
        self._proven = True
        """Whether the weights of the last checkpoint have been read, and gave finite numbers."""
        self._drawn = time.monotonic()
        self._require_space()

    def _trained(self) -> dict[str, Tensor]:
        """Backbone parameters that are not what the backbone was built with, by name."""
        learn = {entry.name for entry in self.learnable if entry.role == "backbone"}
        return {name: value for name, value in self.model.named_parameters() if name in learn | self.inherited}

    def _require_space(self) -> None:
        needed = content_bytes(self.injection, self._trained(), self.optimizer)
        require_space(self.directory.path, needed, what="one checkpoint of this run")

    # --- the run ---

    def run(self) -> TrainResult:
        """Train to the last step, or to the step in which somebody asks to stop; evaluate; sum up."""
        with interruptible() as interrupt:
            interrupt.told = STEPPING
            return self._run(interrupt)

    def _run(self, interrupt: Interrupt) -> TrainResult:
        total = self.config.train.max_steps
        self._announce()
        with contextlib.ExitStack() as stack:
            # a run that lacks nothing but its closing evaluation writes its last line anew
            keep = self.done - 1 if self.done == total else self.done
            self.metrics = stack.enter_context(
                contextlib.closing(MetricsFile(self.directory / METRICS, last_step=keep))
            )
            for problem in self.metrics.dropped:
                say(self.console, problem)
            self.directory.stored_config.keep_comments()
            self.directory.stored_config.write(self.config)
            with writing(self.directory / SUMMARY):
                self.directory.remove_unfinished()
                (self.directory / SUMMARY).unlink(missing_ok=True)  # of an end that is one no more
            self.board = stack.enter_context(
                contextlib.closing(TensorBoard(self.directory / "tensorboard", first_step=keep + 1, warn=self._say))
            )
            self.display = stack.enter_context(
                Display(self.console, total=total, done=self.done, log_freq=self.config.train.log_freq)
            )
            evaluation = None
            if self.metrics.last_step < self.done:
                evaluation = self._settle(interrupt)
            while self.done < total and not interrupt.requested:
                evaluation = self._one_step(interrupt)
            if self.done < total or evaluation is None:
                self._save()
                evaluation = None
        interrupt.told = FINISHING
        if evaluation is None:
            return self._interrupted()
        result = self._finish(evaluation)
        if interrupt.requested:
            say(self.console, "asked to stop when all steps were done: nothing is left to do")
        return result

    def _one_step(self, interrupt: Interrupt) -> Evaluation | None:
        """A step, its checkpoint, its evaluation and its line, where they are due."""
        config = self.config.train
        before = self.states
        try:
            self.line = self._step(self.done)
        except Exception as error:
            self.states = before
            self._rescue(error)
            raise
        self._prove()
        self.done += 1
        self.display.step(self.line)
        if self.done == config.max_steps or (config.ckpt_freq and self.done % config.ckpt_freq == 0):
            self._save()
        return self._settle(interrupt)

    def _settle(self, interrupt: Interrupt) -> Evaluation | None:
        """Evaluate after a step where it is due, and write the step's line.

        An evaluation that is cut short leaves the line unwritten: the resumed run settles the step anew.
        """
        evaluation = None
        line = self.line
        if self._evaluates(self.done):
            evaluation = self._evaluate(interrupt)
            if evaluation is None:
                return None
            line = {**line, **evaluation.as_line()}
            if self.done < self.config.train.max_steps:
                self.display.say(f"step {self.done}: {evaluation.in_words()}")
                if not evaluation.is_finite:
                    self.display.say(f"WARNING: {self._evaluation_not_finite(evaluation)}; training goes on")
        if evaluation or "layers" in line or self._logs(self.done):
            with interrupt.held():
                self.metrics.write(line)
                self.board.write(line)
        return evaluation

    def _logs(self, step: int) -> bool:
        return step % self.config.train.log_freq == 0 or step in (1, self.config.train.max_steps)

    def _evaluates(self, step: int) -> bool:
        frequency = self.config.eval.eval_freq
        return step == self.config.train.max_steps or bool(frequency and step % frequency == 0)

    def _measures(self, step: int) -> bool:
        return step % self.config.train.evidence_freq == 0 or step in (1, self.config.train.max_steps)

    # --- one step ---

    def _step(self, step: int) -> dict[str, Any]:
        """Optimiser step `step` (from 0); its metrics."""
        passes = self.config.train.num_microbatches
        started = time.monotonic()
        self.model.train()
        losses: list[float] = []
        metrics: dict[str, float] = {}
        tokens = 0
        evidence = observe(self.injection) if self._measures(step + 1) else None
        read: list[Reading] = []
        for number in range(step * passes, (step + 1) * passes):
            reading = self.order.at(number)
            read.append(reading)
            watched = evidence if len(read) == 1 else None
            with watched or contextlib.nullcontext():
                loss, count, told = self._pass(number, reading, watched)
            losses.append(loss)
            tokens += count
            for name, value in told.items():
                metrics[name] = metrics.get(name, 0.0) + value / passes
        if step == 0 and evidence:
            self._require_active(evidence)
        norm = self.optimizer.clip()
        if not math.isfinite(norm):
            first = step * passes
            batch = load_batch(self.dataset, read[0].windows, self.device)
            message = self._not_finite("the gradient", norm, read)
            raise StepNotFiniteError(message, of_gradient=True, number=first, batch=batch, states=self.states)
        self._updating = True
        rates = self.optimizer.step(step)
        self._updating = False
        seconds = time.monotonic() - started
        self.seconds += seconds
        self.tokens += tokens
        line: dict[str, Any] = {
            **metrics,
            "step": step + 1,
            "loss": math.fsum(losses) / passes,
            **rates,
            "grad_norm": norm,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        if evidence:
            line["layers"] = {name: vars(layer) for name, layer in evidence.layers().items()}
        checked: dict[str, Any] = finite(line)
        return checked

    def _pass(self, number: int, reading: Reading, evidence: observe | None) -> tuple[float, int, dict[str, float]]:
        """Forward and backward over one batch: its loss, the positions it read, the backbone's metrics."""
        batch = load_batch(self.dataset, reading.windows, self.device)
        states = reset_rows(self.injection, self.states, reading.starts)
        seed_pass(self.config.train.seed, "train", number)
        persistent = self.config.ttt.persistent_states
        # states are an input of a recomputation too, so backward runs while they are there
        with carried(self.injection, states) if persistent else contextlib.nullcontext() as carry:
            with (
                mixed_precision(self.config.train, self.device),
                reading_rows(training_rows(self.config.train, number)),
            ):
                output = self.backbone.loss(self.model, batch, self.config)
            if evidence and self.done == 0:
                self._require_reached(evidence)
            self._require_gradient(output)
            loss = float(output.loss.detach())
            if not math.isfinite(loss):
                message = self._not_finite("the loss", loss, [reading])
                raise StepNotFiniteError(message, of_gradient=False, number=number, batch=batch, states=states)
            (output.loss / self.config.train.num_microbatches).backward()
            if carry is not None:
                self.states = states_to_carry(carry, self.injection, backbone=self.backbone.name)
        self.optimizer.collect()
        return loss, output.tokens, {name: float(value) for name, value in output.metrics.items()}

    def _not_finite(self, what: str, value: float, read: list[Reading]) -> str:
        windows = list(dict.fromkeys(window for reading in read for window in reading.windows))
        return (
            f"step {self.done + 1}: {what} is {value} on {describe(self.dataset, windows)}; stopped before the "
            f"optimiser step, weights unchanged"
        )

    def _examination(
        self, purpose: str, number: int, rows: StepRows, batch: Batch, states: dict[str, TTTState]
    ) -> Examination:
        """A look for what makes a pass not finite."""

        def measure(read: Batch, closed: bool) -> float:
            seed_pass(self.config.train.seed, purpose, number)
            carry = carried(self.injection, states if read is batch else {})
            persistent = self.config.ttt.persistent_states
            with (
                torch.no_grad(),
                reading_rows(rows),
                carry if persistent else contextlib.nullcontext(),
                gates_closed(self.model) if closed else contextlib.nullcontext(),
                mixed_precision(self.config.train, self.device),
            ):
                return float(self.backbone.loss(self.model, read, self.config).loss)

        def before() -> tuple[Batch, float | None]:
            first = self.order.at((self.done - 1) * self.config.train.num_microbatches)
            return load_batch(self.dataset, first.windows, self.device), self.line.get("loss")

        return Examination(
            self.config,
            self.model,
            self.injection,
            done=self.done,
            batch=batch,
            states=states,
            measure=measure,
            before=before if self.done else None,
        )

    def _diagnose(self, error: StepNotFiniteError) -> Diagnosis:
        traceback.clear_frames(error.__traceback__)  # the graph of the pass that failed holds most of the memory
        rows = training_rows(self.config.train, error.number)
        examination = self._examination("train", error.number, rows, error.batch, dict(error.states))
        return (examination.of_gradient if error.of_gradient else examination.of_loss)()

    def _require_reached(self, evidence: observe) -> None:
        """The first forward pass must call every adapter; backward would only say that there is no gradient."""
        for site in self.injection.adapters:
            if site not in evidence.reached:
                raise InactiveLayerError(
                    f"{site}: the TTT layer was injected, but the backbone's forward pass never reached it; the site "
                    f"that the backbone {self.backbone.name} offers there is not on its path"
                )

    def _require_gradient(self, output: LossOutput) -> None:
        """Backward must have somewhere to go."""
        if not output.loss.requires_grad:
            with asked(self.backbone, "`loss`", type(self.backbone).loss):
                raise WrongAnswer(
                    "a loss that no gradient leads back from to what learns; it was detached, or computed without "
                    "gradients, on the way"
                )

    def _require_active(self, evidence: observe) -> None:
        """On the first step, every adapter must act: its fast weights moved, a gradient for it."""
        layers = evidence.layers()
        touched: dict[str, bool] = {}
        for name, gradient in self.optimizer.gradients():
            for site in self.injection.adapters:
                if name.startswith(f"{site}."):
                    arrived = gradient is not None and bool(gradient.count_nonzero())
                    touched[site] = touched.get(site, False) or arrived
        for site in self.injection.adapters:
            if not layers[site].movement > 0:
                raise InactiveLayerError(
                    f"{site}: the fast weights of the TTT layer did not move (‖W_T − W_0‖ / ‖W_0‖ = "
                    f"{layers[site].movement}) over a whole batch; its inner learning rate or its tokens are zero"
                )
            if not touched.get(site, True):
                raise InactiveLayerError(
                    f"{site}: no gradient reaches the TTT layer or its gate, so neither could learn; with "
                    f"ttt.initial_gating_alpha: 0 the gate must learn first (train.alpha_lr_multiplier above 0)"
                )

    def _evaluate(self, interrupt: Interrupt) -> Evaluation | None:
        return evaluate(
            self.model,
            self.injection,
            self.backbone,
            self.config,
            self.eval_dataset,
            split=self.eval_split,
            device=self.device,
            stop=lambda: interrupt.requested,
            tell=self.display.evaluating,
        )

    def _evaluation_not_finite(self, evaluation: Evaluation) -> str:
        where = describe(self.eval_dataset, evaluation.first_not_finite)
        return (
            f"step {self.done}: the evaluation is not finite (loss {evaluation.loss}, with the gates closed "
            f"{evaluation.loss_gates_closed}), first on {where}"
        )

    def _require_finite_evaluation(self, evaluation: Evaluation) -> None:
        """A run whose closing evaluation is no number has not come to its end.

        Raises:
            NonFiniteError: it is none; the message names the cause and the checkpoint.
        """
        if evaluation.is_finite:
            return
        self._draw()

        def look() -> Diagnosis:
            assert evaluation.not_finite_pass is not None
            batch = load_batch(self.eval_dataset, evaluation.first_not_finite, self.device)
            return self._examination("eval", *evaluation.not_finite_pass, batch, {}).of_loss()

        diagnosis = examined(look)
        assert self.saved is not None
        notes = [
            f"{self._evaluation_not_finite(evaluation)}. {diagnosis.cause}",
            f"all steps are saved in {self.saved[1]}, and `{self.directory.resume_command()}` evaluates them again",
        ]
        if not diagnosis.sound and diagnosis.changes:
            notes.append(way_on(self.directory, self.config, diagnosis.changes, before=self.done))
        raise NonFiniteError("; ".join(notes))

    # --- checkpoints ---

    def _save(self, *, rescuing: bool = False) -> None:
        """Write the checkpoint of the steps done, unless it is there already.

        Weights are good once a step or an evaluation that read them was finite (`_prove`). Until then, the checkpoint
        before is not pruned; and where a run is rescued, none is.

        Raises:
            NonFiniteError: what would be saved is not finite; nothing was written.
            EnvironmentProblem: the disk is full or cannot be written.
        """
        if self.done == 0 or (self.saved and self.saved[0] == self.done):
            return
        self._require_finite()
        state = {
            "seconds": self.seconds,
            "tokens": self.tokens,
            "line": self.line,
            "config": self.config.model_dump(mode="json"),
        }
        training = {
            "steps": self.done,
            "tokens": self.tokens,
            "trainable": self.config.train.trainable,
            "config": self.config.model_dump(mode="json"),
            "provenance": dict(self.backbone.provenance(self.config.backbone)),
        }

        def write(folder: Path) -> None:
            write_content(
                folder,
                self.injection,
                self._trained(),
                self.optimizer,
                self.states if self.config.ttt.persistent_states else None,
                backbone=backbone_identity(self.backbone, self.config.backbone),
                training=training,
            )

        keep = self.config.train.ckpt_keep
        unproven = None if keep is None or rescuing else max(keep, 2)
        self.metrics.sync()  # first: a power cut never leaves a checkpoint that is ahead of its lines
        path = self.directory.save_checkpoint(self.done, state, write, keep=unproven)
        self.saved = (self.done, path)
        self._proven = unproven == keep
        if time.monotonic() - self._drawn > _DRAW_SECONDS and self.metrics.last_step:
            self._draw()
            self._drawn = time.monotonic()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over everything that a checkpoint holds.

        Raises:
            EnvironmentProblem: a file of it is damaged.
            AdapterMismatchError: the backbone is not the one that the run was started with.
        """
        self.states = read_content(
            checkpoint.path,
            self.injection,
            self.optimizer,
            backbone=backbone_identity(self.backbone, self.config.backbone),
            persistent=self.config.ttt.persistent_states,
            device=self.device,
            verify=False,  # done, or not asked for, where it was found
        )
        self.inherited = frozenset(trained_backbone(read_info(checkpoint.path)))
        self._require_space()
        self.done = checkpoint.step
        self.saved = (checkpoint.step, checkpoint.path)
        self._proven = False
        self.seconds = float(checkpoint.state["seconds"])
        self.tokens = int(checkpoint.state["tokens"])
        self.line = dict(checkpoint.state["line"])

    def _require_finite(self) -> None:
        weights = [*self.injection.state_dict().items(), *self._trained().items(), *self.optimizer.tensors().items()]
        names = not_finite(weights)
        key = "train.lr" if names else "ttt.base_lr"
        names = names or not_finite(tensors_of(self.states))
        if names:
            on = way_on(self.directory, self.config, lowered(self.config, key), before=self.done)
            raise NonFiniteError(
                f"step {self.done}: what the step left is not finite ({listed(names)}), so it is not saved; lower "
                f"{key}; {on}"
            )

    def _prove(self) -> None:
        """Take the last checkpoint for good, now that its weights gave finite numbers, and drop the oldest."""
        if not self._proven:
            self.directory.prune(self.config.train.ckpt_keep)
            self._proven = True

    def _rescue(self, error: Exception) -> None:
        """Save the steps before one that failed, if their weights are good; say so in the error, and how to go on."""
        notes = []
        if isinstance(error, StepNotFiniteError):
            diagnosis = examined(lambda: self._diagnose(error))
            error.args = (f"{error}. {diagnosis.cause}",)
            before = self.done + 1 if diagnosis.sound else self.done
            if diagnosis.sound:
                notes += self._saved_in_words()
            if diagnosis.changes:
                notes.append(way_on(self.directory, self.config, diagnosis.changes, before=before))
            elif diagnosis.sound and self.saved is not None:
                notes.append(f"then go on with `{self.directory.resume_command()}`")
        elif not self._updating:
            notes += self._saved_in_words()
        if isinstance(error, TTTError):
            error.args = ("; ".join([str(error), *notes]),)
        else:
            for note in notes:
                say(self.console, note)

    def _saved_in_words(self) -> list[str]:
        """Save the steps done; a sentence about it, unless there are none."""
        if self.done == 0:
            return []
        self.optimizer.clear()
        try:
            self._save(rescuing=True)
        except TTTError as problem:
            return [f"the steps before it could not be saved: {problem}"]
        assert self.saved is not None
        return [f"the {self.done} {'step' if self.done == 1 else 'steps'} before it are saved in {self.saved[1]}"]

    # --- what is told ---

    def _say(self, text: str) -> None:
        say(self.console, text)

    def _draw(self) -> list[Path]:
        return _draw(self.directory.path, self._say)

    def _announce(self) -> None:
        config = self.config
        of_ttt = sum(tensor.numel() for tensor in self.injection.state_dict().values())
        of_backbone = sum(parameter.numel() for parameter in self.model.parameters()) - of_ttt
        layers = ", ".join(str(site.layer) for site in self.injection.sites) or "none"
        learns = sum(entry.parameter.numel() for entry in self.learnable)
        files = len(self.dataset.files)
        accumulated = f" × {config.train.num_microbatches}" if config.train.num_microbatches > 1 else ""
        for text in (
            f"backbone {self.backbone.name}: {of_backbone:,} parameters ({config.train.param_dtype}); "
            f"TTT-{config.ttt.layer_type} in layers {layers}: {of_ttt:,}; learning: {learns:,}",
            f"data: {len(self.dataset)} windows in {files} {'file' if files == 1 else 'files'}; "
            f"batches of {config.train.batch_size}{accumulated}; on {device_in_words(self.device)}",
            f"run: {self.directory.path}"
            + (f", resumed after step {self.done} of {config.train.max_steps}" if self.done else ""),
        ):
            say(self.console, text)
        if self.start is not None:
            along = sum(math.prod(facts.shape) for facts in trained_backbone(self.start).values())
            say(
                self.console,
                f"starts from {self.start.path}"
                + (f", {along:,} parameters of the backbone included" if along else ""),
            )
            for setting in changed_at_start(self.start, config.ttt):
                say(self.console, f"changed at its start: {setting}")
        if self.dataset.notice:
            say(self.console, self.dataset.notice)

    def _result(self, evaluation: Evaluation | None) -> TrainResult:
        return TrainResult(
            run_dir=self.directory.path,
            steps=self.done,
            interrupted=evaluation is None,
            loss=self.line.get("loss"),
            evaluation=evaluation,
            checkpoint=self.saved[1] if self.saved else None,
            resume_command=self.directory.resume_command(),
        )

    def _interrupted(self) -> TrainResult:
        """Tell how to go on."""
        result = self._result(None)
        if result.checkpoint is None:
            say(self.console, "interrupted before the first step was done; nothing to save: start it again as it was")
            return result
        self._draw()
        say(self.console, f"interrupted after step {self.done} of {self.config.train.max_steps}, saved")
        say(self.console, f"resume with: {result.resume_command}")
        return result

    def _finish(self, evaluation: Evaluation) -> TrainResult:
        """Draw, sum up, and tell how it ended."""
        self._require_finite_evaluation(evaluation)
        self._prove()
        result = self._result(evaluation)
        write_summary(
            result,
            {
                "layers": self.line.get("layers", {}),
                "tokens": self.tokens,
                "seconds": round(self.seconds, 3),
                "peak_memory_bytes": peak_memory_bytes(self.device),
                "device": device_in_words(self.device),
            },
        )
        pictures = self._draw()
        for site, layer in self.line.get("layers", {}).items():
            say(
                self.console,
                f"{site}: inner loss {layer['inner_loss_before']:.4f} before its step, "
                f"{layer['inner_loss_after']:.4f} after; fast weights moved {layer['movement']:.3g} of their norm; "
                f"gate {layer['gate']:.4f}",
            )
        say(self.console, evaluation.in_words())
        say(self.console, f"{self.done} steps in {duration_in_words(self.seconds)}; adapter: {result.checkpoint}")
        if pictures:
            say(self.console, f"pictures: {', '.join(map(str, pictures))}")
        return result
