"""The two tokens in texts by which TTT-Video tells T5 that a scene ends and another begins.

TTT-Video adds `<end_scene>` and `<start_scene>` to T5's tokenizer, for the captions of training and for prompts, and
resizes T5's embedding to the tokenizer's length. This adds no random rows: T5's embedding has 32128 rows for the 32100
tokens of its tokenizer, so the two tokens get rows 32100 and 32101 of the published weights, the same each time T5 is
loaded. An embedding without spare rows has none for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

END_SCENE: Final = "<end_scene>"
START_SCENE: Final = "<start_scene>"
SCENE_TOKENS: Final = (END_SCENE, START_SCENE)
"""In the order in which TTT-Video adds them."""

NO_SCENES: Final = "this text encoder has no embeddings for <start_scene> and <end_scene>"


def with_scene_tokens(prompts: Sequence[str], new_scenes: Sequence[bool]) -> tuple[str, ...]:
    """Prompts with the tokens: if a segment begins a scene, the segment before ends one.

    Args:
        prompts: one for each segment.
        new_scenes: whether each begins a scene; empty if none does. The first ends none.
    """
    texts = list(prompts)
    for number, begins in enumerate(new_scenes):
        if begins and number:
            texts[number - 1] += END_SCENE
            texts[number] = START_SCENE + texts[number]
    return tuple(texts)


def add_scene_tokens(tokenizer: Any, rows: int) -> bool:
    """Add the tokens to T5's tokenizer if its model's embedding has two rows to spare; returns whether it has."""
    from transformers import AddedToken

    missing = [token for token in SCENE_TOKENS if token not in tokenizer.get_vocab()]
    if len(tokenizer) + len(missing) > rows:
        return False
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True)
    return True


def names_scenes(text: str) -> bool:
    """Whether a text holds one of the tokens."""
    return any(token in text for token in SCENE_TOKENS)
