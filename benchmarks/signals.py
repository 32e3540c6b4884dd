"""Each signal that asks a run to stop, at each moment of a run: the exit code, what is left, and that it goes on.

While it imports or reads its data, a run leaves nothing and says so; from its first step on it finishes the step, saves
and says how it goes on; while it draws its pictures it finishes them. The exit code is 130. Then the same command runs
undisturbed, and what is left is compared as in `kills.py`.

    python benchmarks/signals.py --jobs 2             20 tries for each signal and moment, 720 in all
    python benchmarks/signals.py --runs 1 --moments imports,step
"""

from __future__ import annotations

import random
import signal
import threading
from pathlib import Path

import disturbed
import tracing
from disturbed import COMMAND, MOMENTS, RUN, Ended, Outcome

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
NOTHING, CHECKPOINT, EVERYTHING = "nothing left", "a checkpoint left", "all done"
_LEFT = {"imports": (NOTHING,), "data": (NOTHING,), "pictures": (EVERYTHING,)}


class At:
    """Sends a signal at a moment: at one of the calls that mark it, or shortly afterwards."""

    def __init__(self, run: Path, number: int, moment: str, *, occasion: int, delay: float) -> None:
        self._run = str(run)
        self._number = number
        self._moment = moment
        self._occasion = occasion
        self._delay = delay
        self._handled = False
        self._count = 0
        self.place = ""

    def __call__(self, tracer: tracing.Tracer, call: tracing.Call) -> None:
        """Count the call if it marks the moment; send the signal if its turn has come."""
        if self.place or not self._marks(call):
            return
        self._count += 1
        if self._count == self._occasion:
            self.place = f"{call.name} {call.path or ''}, call {self._count}, {1000 * self._delay:.0f} ms later"
            if self._delay:
                threading.Timer(self._delay, tracer.send, [self._number]).start()
            else:
                tracer.send(self._number)

    def _marks(self, call: tracing.Call) -> bool:
        if self._moment != "imports":
            return disturbed.marks(call, self._run, self._moment)
        self._handled = self._handled or disturbed.marks(call, self._run, "handled")
        return self._handled


def one(task: tuple[int, str, int, int]) -> Outcome:
    """One try: signal, moment, number of the try, seed."""
    number, moment, repeat, seed = task
    drawn = random.Random(f"{seed} {number} {moment} {repeat}")
    folder = disturbed.fresh()
    last = disturbed.world().last(moment)
    occasion = drawn.randint(1, last)
    delay = drawn.choice((0.0, drawn.uniform(0, 0.003)))
    if moment == "imports" or (moment == "pictures" and occasion > last - 2):
        delay = 0.0  # milliseconds after the last picture's last calls the run is over: too late to be heard
    at = At(folder / RUN, number, moment, occasion=occasion, delay=delay)
    run = disturbed.started if moment == "imports" else disturbed.forked
    watched = tracing.CHANGING | tracing.READING if moment != "imports" else None
    ended = run(folder, COMMAND, at, names=watched)
    left = _left(folder)
    problems = _problems(ended, moment, left)
    again = disturbed.forked(folder, COMMAND)
    if again.code:
        problems.append(f"the same command ended with {again.code}: {(again.err or again.out).strip()[-400:]}")
    else:
        problems += disturbed.differences(disturbed.world().expected, disturbed.whole(folder))
    disturbed.forget(folder)
    kind = f"{signal.Signals(number).name} in {moment}"
    return Outcome(kind, f"exit {ended.code}, {left}", problems, at.place)


def _left(folder: Path) -> str:
    run = folder / RUN
    if not run.exists():
        return NOTHING
    if (run / "inner_loss.png").exists() and (run / "summary.json").exists():
        return EVERYTHING
    return CHECKPOINT if disturbed.newest_checkpoint(folder) is None and any(run.glob("checkpoints/step_*")) else "part"


def _problems(ended: Ended, moment: str, left: str) -> list[str]:
    """What is wrong with how it ended, and with what is left."""
    problems = []
    expected = _LEFT.get(moment, (CHECKPOINT, EVERYTHING))  # sent in the last call, it may come when all is done
    if ended.code != 130 or ended.traceback:
        problems.append(f"exit {ended.code}: {(ended.err + ended.out).strip()[-600:]}")
    if left not in expected:
        problems.append(f"left: {left}, not {' or '.join(expected)}: {ended.out.strip()[-300:]}")
    if left == CHECKPOINT and "resume with: ttt train" not in ended.out:
        problems.append(f"does not say how it goes on: {ended.out.strip()[-300:]}")
    if left == NOTHING and "nothing was written" not in ended.err + ended.out:
        problems.append(f"does not say that nothing is left: {(ended.err + ended.out).strip()[-300:]}")
    return problems


def main(words: list[str] | None = None) -> int:
    """Make the tries; 1 if one ended otherwise than it should."""
    parser = disturbed.arguments(__doc__.splitlines()[0], runs=20)
    parser.add_argument("--moments", default=",".join(MOMENTS), help="which moments, with commas between")
    parser.add_argument("--signals", default=",".join(number.name for number in SIGNALS), help="which signals")
    options = parser.parse_args(words)
    tasks = [
        (int(signal.Signals[name]), moment, repeat, options.seed)
        for moment in options.moments.split(",")
        for name in options.signals.split(",")
        for repeat in range(options.runs)
    ]
    if hasattr(signal, "SIGHUP"):  # tries inherit what this process ignores, as under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with disturbed.tries(options.jobs) as make:
        return disturbed.report(make(one, tasks), total=len(tasks), first="signal", file=options.json)


if __name__ == "__main__":
    raise SystemExit(main())
