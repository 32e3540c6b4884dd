"""How a run ends: interrupted, or finished and summed up."""

from __future__ import annotations

from pathlib import Path

from ttt.errors import NonFiniteError, OtherProcessError, TTTError
from ttt.eval.choosing import chosen_for
from ttt.printable import shell_word
from ttt.train.display import duration_in_words
from ttt.train.evaluation import Evaluation
from ttt.train.parts import Parts
from ttt.train.pictures import Pictures
from ttt.train.progress import Progress
from ttt.train.rescue import Rescue
from ttt.train.result import TrainResult, write_summary
from ttt.train.saving import Saver
from ttt.train.setup import device_in_words, peak_memory_bytes


def tell_interrupted(parts: Parts, progress: Progress, saved: Path | None, pictures: Pictures) -> TrainResult:
    """Report that a run was interrupted and how to go on with it."""
    result = _result(parts, progress, saved, None)
    pictures.draw()
    parts.say(f"interrupted after step {progress.done} of {parts.config.train.max_steps}, saved")
    parts.say(f"resume with: {result.resume_command}")
    return result


def followed(parts: Parts, progress: Progress, saved: Path | None, evaluation: Evaluation | None) -> TrainResult:
    """The result of a run in a process that neither writes nor prints.

    Raises:
        OtherProcessError: the closing evaluation is not finite, which the first process says.
    """
    if evaluation is not None and not evaluation.is_finite:
        raise OtherProcessError("the closing evaluation is not finite", NonFiniteError.exit_code)
    return _result(parts, progress, saved, evaluation)


def finish(
    parts: Parts, progress: Progress, saver: Saver, rescue: Rescue, pictures: Pictures, evaluation: Evaluation
) -> TrainResult:
    """Draw the pictures, write the summary and report how the run ended.

    Raises:
        NonFiniteError: the closing evaluation is not finite, so the run is not finished; the message names the cause
            and the checkpoint.
    """
    if not evaluation.is_finite:
        pictures.draw()
        raise rescue.of_evaluation(evaluation)
    saver.prove()
    result = _result(parts, progress, saver.saved, evaluation)
    layers = progress.line.get("layers", {})
    write_summary(
        result,
        {
            "layers": layers,
            **{key: progress.line[key] for key in ("lora_share",) if key in progress.line},
            "tokens": progress.tokens,
            "learned_parameters": parts.learned_parameters,
            "seconds": round(progress.seconds, 3),
            "peak_memory_bytes": peak_memory_bytes(parts.device),
            "device": device_in_words(parts.device),
        },
    )
    drawn = pictures.draw()
    for site, layer in layers.items():
        parts.say(
            f"{site}: inner loss {layer['inner_loss_before']:.4f} before its step, "
            f"{layer['inner_loss_after']:.4f} after; fast weights moved {layer['movement']:.3g} of their norm; "
            f"gate {layer['gate']:.4f}"
        )
    if (share := progress.line.get("lora_share")) is not None:
        parts.say(f"LoRA moved its linears by {share:.3g} of their norm")
    for told in (evaluation.in_words(), *evaluation.tasks_in_words()):
        parts.say(told)
    parts.say(f"{progress.done} steps in {duration_in_words(progress.seconds)}; adapter: {result.checkpoint}")
    if drawn:
        parts.say(f"pictures: {', '.join(map(str, drawn))}")
    if _can_be_evaluated(parts):
        parts.say(f"what it was worth: ttt eval {shell_word(parts.directory.path)}")
    return result


def _can_be_evaluated(parts: Parts) -> bool:
    """Whether `ttt eval` finds tasks to measure without being told any."""
    try:
        return bool(chosen_for(parts.config, parts.backbone, None))
    except TTTError:  # of a plugin; the run is done
        return False


def _result(parts: Parts, progress: Progress, saved: Path | None, evaluation: Evaluation | None) -> TrainResult:
    return TrainResult(
        run_dir=parts.directory.path,
        steps=progress.done,
        interrupted=evaluation is None,
        loss=progress.line.get("loss"),
        evaluation=evaluation,
        checkpoint=saved,
        resume_command=parts.directory.resume_command(),
    )
