"""The texts of the demo: eight harbour books, two of them held out; NOTICE.md says what they are. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from ttt.packaged import PackagedFiles

FOLDER = Path(__file__).parent
_FILES = PackagedFiles(
    FOLDER,
    {
        "train.jsonl": "0fd93a11fa39c6245a30266c42756a6be42748cb18a0ec05b662398def0beef8",
        "eval.jsonl": "138afde6b2a89a4c4e06b79d9c3ab38bc195f3cff8dcef532366226d18da681f",
    },
    "ttt-adapters",
)


def text_of(split: str) -> Path:
    """The file of a split, `train` or `eval`."""
    return FOLDER / f"{split}.jsonl"


def require_whole() -> None:
    """See that the texts are those that were shipped.

    Raises:
        EnvironmentProblem: one is not; the message names it.
    """
    _FILES.require_whole()
