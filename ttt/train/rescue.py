"""When a step or the closing evaluation fails: find the cause, save what is good, and say how to go on."""

from __future__ import annotations

import contextlib
import traceback

import torch

from ttt.adapter import carried, gates_closed
from ttt.errors import NonFiniteError, TTTError
from ttt.plugins import Batch
from ttt.plugins.rows import StepRows
from ttt.state import TTTState
from ttt.train.divergence import Diagnosis, Examination, StepNotFiniteError, examined, way_on
from ttt.train.evaluation import Evaluation
from ttt.train.parts import Parts
from ttt.train.passes import describe, drawing_for, load_batch, mixed_precision, rows_of_process
from ttt.train.progress import Progress
from ttt.train.saving import Saver


class Rescue:
    """Saves what is good when a run fails, and says in the error how to go on."""

    def __init__(self, parts: Parts, progress: Progress, saver: Saver) -> None:
        self._parts = parts
        self._progress = progress
        self._saver = saver

    @property
    def _is_split(self) -> bool:
        """Whether no process can run the model alone: parameters are split, or heads are shared out."""
        return self._parts.engine.is_sharded or self._parts.world.tensor > 1

    def of_step(self, error: Exception, *, updating: bool) -> None:
        """Save the steps before a failed one if their weights are good, and add to the error what to do next.

        Args:
            error: the error of the step.
            updating: whether the weights may be half updated; then they are not saved.
        """
        parts, done = self._parts, self._progress.done
        notes = []
        if parts.world.alone:  # several settle it together, if they save
            self._saver.keep_begun()
        if not parts.world.alone and (self._is_split or not isinstance(error, StepNotFiniteError)):
            notes += self._of_processes(error)
        elif isinstance(error, StepNotFiniteError):
            diagnosis = examined(lambda: self._diagnose(error))
            error.args = (f"{error}. {diagnosis.cause}",)
            if diagnosis.sound:
                notes += self._saved_in_words()
            if diagnosis.changes:
                before = done + 1 if diagnosis.sound else done
                notes.append(way_on(parts.directory, parts.config, diagnosis.changes, before=before))
            elif diagnosis.sound and self._saver.saved is not None:
                notes.append(f"then go on with `{parts.directory.resume_command()}`")
        elif not updating:
            notes += self._saved_in_words()
        if isinstance(error, TTTError):
            error.args = ("; ".join([str(error), *notes]),)
        else:
            for note in notes:
                parts.say(note)

    def _of_processes(self, error: Exception) -> list[str]:
        """Save the steps before a failed one if all processes have failed alike; what one has met alone is not saved.

        The cause is not searched for if parameters or heads are split: no process has all of them.
        """
        if not isinstance(error, StepNotFiniteError):
            return []
        saved = self._saved_in_words()
        on = f"; then go on with `{self._parts.directory.resume_command()}`" if self._saver.saved is not None else ""
        return [*saved, f"lower train.lr, or look for the cause in one process{on}"]

    def of_evaluation(self, evaluation: Evaluation) -> NonFiniteError:
        """The error for a closing evaluation that is not finite: with the cause, the checkpoint and what to do next."""
        parts, done = self._parts, self._progress.done
        if self._is_split:
            return NonFiniteError(
                f"{self.not_finite_in_words(evaluation)}; all steps are saved in {self._saver.saved}, and "
                f"`{parts.directory.resume_command()}` in one process says why"
            )

        def look() -> Diagnosis:
            assert evaluation.not_finite_pass is not None
            batch = load_batch(parts.eval_dataset, evaluation.first_not_finite, parts.device)
            return self._examination(evaluation.not_finite_pass, batch, {}).of_loss()

        diagnosis = examined(look)
        notes = [
            f"{self.not_finite_in_words(evaluation)}. {diagnosis.cause}",
            f"all steps are saved in {self._saver.saved}, and `{parts.directory.resume_command()}` evaluates them "
            f"again",
        ]
        if not diagnosis.sound and diagnosis.changes:
            notes.append(way_on(parts.directory, parts.config, diagnosis.changes, before=done))
        return NonFiniteError("; ".join(notes))

    def not_finite_in_words(self, evaluation: Evaluation) -> str:
        """A sentence that says which windows of an evaluation are not finite."""
        where = describe(self._parts.eval_dataset, evaluation.first_not_finite)
        return (
            f"step {self._progress.done}: the evaluation is not finite (loss {evaluation.loss}, with the gates closed "
            f"{evaluation.loss_gates_closed}), first on {where}"
        )

    def _saved_in_words(self) -> list[str]:
        """Save the steps done; returns a sentence about it, or nothing if no step is done."""
        done = self._progress.done
        if done == 0:
            return []
        self._parts.optimizer.clear()
        try:
            self._saver.save(rescuing=True)
        except TTTError as problem:
            return [f"the steps before it could not be saved: {problem}"]
        return [f"the {done} {'step' if done == 1 else 'steps'} before it are saved in {self._saver.saved}"]

    def _diagnose(self, error: StepNotFiniteError) -> Diagnosis:
        traceback.clear_frames(error.__traceback__)  # frees the graph of the failed pass, most of the memory
        examination = self._examination(error.rows, error.batch, dict(error.states))
        return (examination.of_gradient if error.of_gradient else examination.of_loss)()

    def _examination(self, rows: StepRows, batch: Batch, states: dict[str, TTTState]) -> Examination:
        """Prepare the search for what makes a pass not finite."""
        parts, progress, config = self._parts, self._progress, self._parts.config

        def measure(read: Batch, closed: bool) -> float:
            carry = carried(parts.injection, states if read is batch else {})
            with (
                torch.no_grad(),
                drawing_for(rows),
                carry if config.ttt.persistent_states else contextlib.nullcontext(),
                gates_closed(parts.model) if closed else contextlib.nullcontext(),
                mixed_precision(config.train, parts.device),
            ):
                return float(parts.engine.loss(read).loss)

        def before() -> tuple[Batch, float | None]:
            rows = rows_of_process(parts.world, config.train.batch_size, 0)  # the same in every process
            first = parts.order.at((progress.done - 1) * config.train.num_microbatches).part(rows)
            return load_batch(parts.dataset, first.windows, parts.device), progress.line.get("loss")

        return Examination(
            config,
            parts.model,
            parts.injection,
            done=progress.done,
            batch=batch,
            states=states,
            measure=measure,
            before=before if progress.done else None,
        )
