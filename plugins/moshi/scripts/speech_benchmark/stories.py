"""Short stories from own templates: a beginning, and its ending or that of another story.

Every ending is the right one of its own story and may be the wrong one of others. In a topic story the wrong ending
is of another topic; in a story of the same topic it is of another story there.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

# topic: (beginning, ending) with {name} and {they} for who it is about
TEXTS: Mapping[str, Sequence[tuple[str, str]]] = {
    "cooking": (
        ("{name} wanted to bake a cake. There were no eggs in the kitchen.", "So {they} went to buy eggs."),
        ("{name} left the soup on the fire. A friend called and they talked for an hour.", "The soup was burned."),
        ("{name} cut the onions for dinner. They were very strong.", "Soon {they} had tears in both eyes."),
        ("{name} made fresh bread. The neighbors smelled it and came over.", "They all ate bread together."),
    ),
    "school": (
        ("{name} forgot to study for the test. All the questions were hard.", "The grade was very low."),
        ("{name} was new in class. Another child shared a desk.", "At noon the two were friends."),
        ("{name} raised a hand in class. The teacher nodded.", "So {they} gave the right answer."),
        ("{name} lost the homework on the way. The wind had taken it.", "So {they} wrote it all again."),
    ),
    "garden": (
        ("{name} planted seeds in spring. It rained nearly every day.", "In summer the flowers were tall."),
        ("{name} went away for a month. Nobody watered the plants.", "They were all dry and brown."),
        ("{name} saw a rabbit near the lettuce. It ate leaf after leaf.", "So {they} built a small fence."),
        ("{name} picked ripe apples all day. The basket was full.", "It was too heavy to carry home."),
    ),
    "travel": (
        ("{name} woke up late. The train left at eight.", "The platform was empty."),
        ("{name} drove through the desert. The tank was nearly empty.", "The car stopped far from any town."),
        ("{name} took the boat to the island. The waves were high.", "On the shore {they} felt better."),
        ("{name} lost the map in the woods. Night was falling.", "The stars showed the way back."),
    ),
    "music": (
        ("{name} practiced the piano for weeks. The concert was today.", "Every note was perfect."),
        ("{name} broke a string of the violin. The show was about to start.", "A friend lent another violin."),
        ("{name} sang loudly at night. The neighbors could not sleep.", "They asked for silence."),
        ("{name} heard a song in the street. It was beautiful.", "So {they} hummed it all day."),
    ),
    "animals": (
        ("{name} opened the cage. The bird looked at the window.", "It flew away at once."),
        ("{name} found a hungry cat. There was milk in the house.", "The cat drank all of it."),
        ("{name} threw a stick for the dog. It landed in the lake.", "The dog jumped in after it."),
        ("{name} sat still by the river. A deer came to drink.", "One sound, and it ran off."),
    ),
}
NAMES = (("Anna", "she"), ("Peter", "he"), ("Mary", "she"), ("David", "he"), ("Susan", "she"), ("John", "he"))
Kind = Literal["tstory", "sstory"]


@dataclass(frozen=True)
class Story:
    """A beginning with its own ending and another's."""

    topic: str
    wrong_topic: str
    """The topic of the story that the wrong ending is from."""
    beginning: str
    ending: str
    wrong_ending: str

    @property
    def correct(self) -> str:
        """The whole story."""
        return f"{self.beginning} {self.ending}"

    @property
    def incorrect(self) -> str:
        """The story with the wrong ending."""
        return f"{self.beginning} {self.wrong_ending}"


def stories(kind: Kind, *, seed: int) -> list[list[Story]]:
    """For each beginning and each name all stories with a wrong ending; the outer list in an order by chance."""
    made = []
    for name, pronoun in NAMES:
        for topic, texts in TEXTS.items():
            made += [_with_endings(kind, topic, i, name, pronoun) for i in range(len(texts))]
    random.Random(f"{seed} {kind}").shuffle(made)
    return made


def _with_endings(kind: Kind, topic: str, place: int, name: str, pronoun: str) -> list[Story]:
    beginning, ending = (text.format(name=name, they=pronoun) for text in TEXTS[topic][place])
    return [
        Story(topic, other, beginning, ending, wrong.format(name=name, they=pronoun))
        for other, texts in TEXTS.items()
        for i, (_, wrong) in enumerate(texts)
        if (other != topic if kind == "tstory" else other == topic and i != place)
    ]
