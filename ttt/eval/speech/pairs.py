"""Pairs of recordings of which a model should find one likelier: sWUGGY, sBLIMP, tStory and sStory. Imports no torch.

A pair scores 1 if the model finds the correct recording likelier, ½ if both are as likely, and 0 otherwise.

Sources: ZeroSpeech 2021 (Nguyen et al., arXiv 2011.11588) for sWUGGY and sBLIMP; Hassid et al., "Textually pretrained
speech language models" (arXiv 2305.13009) for the spoken StoryCloze sets.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from ttt.config.paths import LocalPath
from ttt.config.tasks import TaskOptions
from ttt.eval.items import Item, Measured, Row
from ttt.eval.speech.layouts import Pair, lexical_pairs, story_pairs, syntactic_pairs
from ttt.eval.tasks import SUBMISSION, ItemOptions, ItemTask, Setup
from ttt.plugins.capabilities import Scoring
from ttt.plugins.capable import capability

if TYPE_CHECKING:
    from ttt.eval.bench import Bench

MEMBERS = ("correct", "incorrect")


class PairTask(ItemTask):
    """A task of pairs of recordings, the correct one first."""

    medium: ClassVar[str | None] = "speech"
    chance: ClassVar[float | None] = 0.5

    @abstractmethod
    def pairs(self, setup: Setup) -> Iterable[Pair]:
        """The pairs of the task's folder."""

    def items(self, setup: Setup) -> Sequence[Item]:
        """An item for each pair, in the order of their names."""
        found = [
            Item(pair.id, pair.unit, pair.cluster, pair.tags, (pair.correct, pair.incorrect))
            for pair in self.pairs(setup)
        ]
        return sorted(found, key=lambda item: item.id)

    def measure(self, bench: Bench, items: Sequence[Item]) -> Sequence[Measured]:
        """Every score of both recordings of each pair."""
        from ttt.eval.speech.gates import codes_of
        from ttt.eval.variants import clip_scores, first_difference

        clips = [[bench.clip(file) for file in item.files] for item in items]
        for item in items:
            for file in item.files:
                codes_of(bench, file)  # while its clip is at hand
        scores = iter(bench.scores([clip for pair in clips for clip in pair]))
        found = []
        for pair in clips:
            begin = first_difference(*pair)
            numbers: dict[str, float] = {}
            for member in MEMBERS:
                told = clip_scores(next(scores), bench.facts, begin=begin)
                numbers |= {f"{member}.{variant}": score for variant, score in told.items()}
            found.append(Measured(numbers))
        return found

    def values(self, setup: Setup, item: Item, numbers: Mapping[str, float]) -> Mapping[str, float]:
        """`acc` by the score that the config chooses, and `acc/STREAMS.NORMALISE` by every other."""
        variants = [name.removeprefix("correct.") for name in numbers if name.startswith("correct.")]
        by_variant = {
            f"acc/{variant}": preferred(numbers[f"correct.{variant}"], numbers[f"incorrect.{variant}"])
            for variant in variants
        }
        return {"acc": by_variant[f"acc/{chosen_score(setup)}"], **by_variant}

    def references(self, bench: Bench, rows: Sequence[Row]) -> Mapping[str, Sequence[float]]:
        """How often a pair is told by its length, its energy, or the frequencies of its codes alone; ½ is honest."""
        from ttt.eval.speech.gates import ALIKE, gate_scores

        found = gate_scores(bench, [file for row in rows for file in row.item.files])
        return {
            name: [
                0.5 if math.isclose(right, wrong, rel_tol=ALIKE.get(name, 0.0)) else preferred(right, wrong)
                for right, wrong in zip(scores[::2], scores[1::2], strict=True)
            ]
            for name, scores in found.items()
        }


def preferred(right: float, wrong: float) -> float:
    """Whether the right clip of a pair has the higher score: 1; 0 if the wrong one has; ½ if neither has."""
    return 1.0 if right > wrong else 0.0 if right < wrong else 0.5


def chosen_score(setup: Setup) -> str:
    """The score by which the config tells which recording is likelier, as `weighted.mean`."""
    facts = capability(setup.backbone, Scoring).score_facts(setup.config)
    return f"{facts.chosen}.{setup.config.eval.score.normalise}"


class ZeroSpeechOptions(ItemOptions):
    """Options of sWUGGY and sBLIMP."""

    split: Literal["dev", "test"] = "dev"
    """Which folder of the set."""
    gold: Annotated[str | None, LocalPath()] = None
    """The table of the pairs; null is the `gold.csv` beside the recordings."""


class ZeroSpeechTask(PairTask):
    """A task of ZeroSpeech 2021, which has an official file of scores for submission."""

    options: ClassVar[type[TaskOptions]] = ZeroSpeechOptions
    part: ClassVar[str]
    """Its folder in the published set, and its name in a submission."""

    def texts(self, setup: Setup, rows: Sequence[Row]) -> Mapping[str, str]:
        """ZeroSpeech's submission file for each arm: a line `stem score` for each recording."""
        chosen, found = chosen_score(setup), {}
        for arm in dict.fromkeys(arm for row in rows for arm in row.arms):
            scores = {
                file.stem: row.arms[arm][f"{member}.{chosen}"]
                for row in rows
                for member, file in zip(MEMBERS, row.item.files, strict=True)
            }
            lines = [f"{stem} {score!r}\n" for stem, score in sorted(scores.items())]
            found[f"{SUBMISSION}/{arm}/{self.part}/{setup.options.split}.txt"] = "".join(lines)
        return found


class SWuggy(ZeroSpeechTask):
    """Words against non-words that sound alike: is the word likelier?"""

    name = "swuggy"
    part = "lexical"

    def pairs(self, setup: Setup) -> Iterable[Pair]:
        """Pairs of a word and a non-word of one id and voice."""
        return lexical_pairs(setup.data, setup.options.split, setup.options.gold)


class SBlimp(ZeroSpeechTask):
    """Sentences against ungrammatical ones: is the grammatical one likelier?"""

    name = "sblimp"
    part = "syntactic"

    def pairs(self, setup: Setup) -> Iterable[Pair]:
        """Pairs of two sentences of one type, subtype, id and voice."""
        return syntactic_pairs(setup.data, setup.options.split, setup.options.gold)


class StoryTask(PairTask):
    """Stories with a right and a wrong ending, in one file each: is the right ending likelier?"""

    def pairs(self, setup: Setup) -> Iterable[Pair]:
        """Pairs of two recordings of one story."""
        return story_pairs(setup.data)


class TStory(StoryTask):
    """Spoken StoryCloze, topic: the wrong ending is of another story."""

    name = "tstory"


class SStory(StoryTask):
    """Spoken StoryCloze: the wrong ending is of the same story."""

    name = "sstory"


def pair_tasks() -> list[Any]:
    """The four tasks."""
    return [SWuggy(), SBlimp(), TStory(), SStory()]
