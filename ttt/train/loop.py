"""The training loop.

Each step reads `num_microbatches` batches, sums their gradients, and makes one optimiser step (`ttt.train.step`).
All random draws are a function of the seed, the step and a row's place in it, and everything else is in the
checkpoint, so a resumed run goes on as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ttt.checkpoint_folder import Checkpoint
from ttt.interrupt import FINISHING, STEPPING, Interrupt, interruptible
from ttt.parallel.board import noticing_losses
from ttt.parallel.launching import launcher_is_gone
from ttt.train.ema import with_averages
from ttt.train.ending import finish, followed, tell_interrupted
from ttt.train.evaluation import Evaluation, evaluate
from ttt.train.failure import recorded
from ttt.train.loading import Loader
from ttt.train.log import RunLog, shared_log
from ttt.train.parts import Parts
from ttt.train.pictures import Pictures, Undrawn
from ttt.train.profiling import profiled
from ttt.train.progress import Progress
from ttt.train.rescue import Rescue
from ttt.train.result import TrainResult
from ttt.train.saving import Saver
from ttt.train.step import Stepper
from ttt.train.tasks import measure
from ttt.train.telling import announce


def run(parts: Parts, progress: Progress, *, resumed: Checkpoint | None, profile: bool = False) -> TrainResult:
    """Train to the last step, evaluate and write the summary; a request to stop ends the run after its current step.

    Args:
        parts: the run's parts.
        progress: how far the run already is.
        resumed: the checkpoint from which the run goes on.
        profile: say where the time of ten steps goes.
    """
    with interruptible() as interrupt:
        interrupt.told = STEPPING
        announce(parts, progress)
        pictures = Pictures(parts.directory, parts.say) if parts.world.first else Undrawn()
        with (
            shared_log(parts, progress) as log,
            recorded(parts, lambda: progress.done),
            noticing_losses(parts.world, lambda: f"after step {progress.done}"),
            training_loader(parts) as loader,
            profiled(parts, wanted=profile and parts.world.first) as step_done,
        ):
            saver = Saver(parts, progress, log=log, pictures=pictures, resumed=resumed)
            rescue = Rescue(parts, progress, saver)
            evaluation = Loop(parts, progress, loader, log, saver, rescue, interrupt).run(step_done)
        interrupt.told = FINISHING
        if not parts.world.first:
            return followed(parts, progress, saver.saved, evaluation)
        if evaluation is None:
            return tell_interrupted(parts, progress, saver.saved, pictures)
        with recorded(parts, lambda: progress.done):
            result = finish(parts, progress, saver, rescue, pictures, evaluation)
        if interrupt.requested:
            parts.say("asked to stop when all steps were done: nothing is left to do")
        return result


def training_loader(parts: Parts) -> Loader:
    """What reads this process's rows of all forward passes of a run."""
    train = parts.config.train
    own = parts.world.rows(train.batch_size)
    return Loader(
        parts.dataset,
        lambda number: parts.order.at(number).part(own).windows,
        passes=train.max_steps * train.num_microbatches,
        device=parts.device,
        workers=parts.config.data.num_workers,
    )


class Loop:
    """Steps, checkpoints and evaluations in turn."""

    def __init__(
        self,
        parts: Parts,
        progress: Progress,
        loader: Loader,
        log: RunLog,
        saver: Saver,
        rescue: Rescue,
        interrupt: Interrupt,
    ) -> None:
        self._parts = parts
        self._progress = progress
        self._log = log
        self._saver = saver
        self._rescue = rescue
        self._interrupt = interrupt
        self._stepper = Stepper(parts, progress, loader)
        self._train = parts.config.train

    def run(self, step_done: Callable[[], None] = lambda: None) -> Evaluation | None:
        """Train until all steps are done or somebody asks to stop, and save what is done.

        Args:
            step_done: called after each step, and what is due after it.

        Returns:
            The closing evaluation; None if the run was interrupted before it.
        """
        try:
            return self._run(step_done)
        except Exception:
            self._saver.keep_begun()
            raise

    def _run(self, step_done: Callable[[], None]) -> Evaluation | None:
        evaluation = None
        if self._log.metrics.last_step < self._progress.done:
            evaluation = self._settle()
        while self._progress.done < self._train.max_steps and not self._ends():
            evaluation = self._one_step()
            step_done()
        if self._progress.done < self._train.max_steps or evaluation is None:
            self._saver.save()
            self._saver.settle()
            return None
        self._saver.settle()
        return evaluation

    def _ends(self) -> bool:
        """Whether to stop: somebody asked, and there is a step to save. A run without one would leave half a folder."""
        return self._is_asked() and self._progress.done > 0

    def _is_asked(self) -> bool:
        """Whether somebody asked one of the processes to stop; all of them call it at the same places."""
        return self._parts.world.any(self._interrupt.requested or launcher_is_gone())

    def _one_step(self) -> Evaluation | None:
        """Make a step and, if they are due, its checkpoint, its evaluation and its line."""
        try:
            self._stepper.advance()
        except Exception as error:
            self._rescue.of_step(error, updating=self._stepper.updating)
            raise
        self._saver.prove()
        self._log.display.step(self._progress.line)
        if self._saves(self._progress.done):
            self._saver.save()
        return self._settle()

    def _settle(self) -> Evaluation | None:
        """Evaluate after a step if that is due, and write the step's line.

        If the evaluation is interrupted, the line is not written: the resumed run evaluates and writes it.
        """
        done, line = self._progress.done, self._progress.line
        evaluation = None
        if self._evaluates(done):
            evaluation = self._evaluate()
            if evaluation is None:
                return None
            line = {**line, **evaluation.as_line()}
            if done < self._train.max_steps:
                self._tell(evaluation)
        if evaluation or "layers" in line or self._logs(done):
            with self._interrupt.held():
                self._log.write(line)
        return evaluation

    def _evaluate(self) -> Evaluation | None:
        """The outer loss with open and closed gates, and the tasks; None if somebody asked to stop."""
        parts = self._parts
        evaluation = with_averages(parts, self._losses)
        if evaluation is None:
            return None
        measured = measure(parts, self._progress.done, stop=self._is_asked, display=self._log.display)
        return None if measured is None else replace(evaluation, tasks=measured)

    def _losses(self) -> Evaluation | None:
        """The outer loss with open and closed gates; None if somebody asked to stop."""
        parts = self._parts
        return evaluate(
            parts.model,
            parts.injection,
            parts.backbone,
            parts.config,
            parts.eval_dataset,
            split=parts.eval_split,
            device=parts.device,
            world=parts.world,
            loss=parts.engine.loss,
            stop=self._is_asked,
            tell=self._log.display.evaluating,
        )

    def _tell(self, evaluation: Evaluation) -> None:
        display = self._log.display
        for told in (evaluation.in_words(), *evaluation.tasks_in_words()):
            display.say(f"step {self._progress.done}: {told}")
        if not evaluation.is_finite:
            display.say(f"WARNING: {self._rescue.not_finite_in_words(evaluation)}; training goes on")

    def _saves(self, step: int) -> bool:
        frequency = self._train.ckpt_freq
        return step == self._train.max_steps or bool(frequency and step % frequency == 0)

    def _evaluates(self, step: int) -> bool:
        frequency = self._parts.config.eval.eval_freq
        return step == self._train.max_steps or bool(frequency and step % frequency == 0)

    def _logs(self, step: int) -> bool:
        return step % self._train.log_freq == 0 or step in (1, self._train.max_steps)
