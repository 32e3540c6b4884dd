"""What filled-in ratings amount to, in words, for `ttt eval --ratings`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ttt.errors import EnvironmentProblem
from ttt.eval.items import key_of
from ttt.eval.ratings import read_ratings
from ttt.eval.report import in_words
from ttt.eval.strengths import bradley_terry, win_shares


def rating_lines(sheets: Sequence[Path]) -> Iterator[str]:
    """Lines with the share of wins of each pair of arms, and the strength of each arm on the scale of Elo.

    Args:
        sheets: a sheet that was filled in for each rater, in the folder that the task `samples` wrote, whose key is
            beside it.

    Raises:
        UsageError: a file is not what it should be, or no finite strengths fit.
        EnvironmentProblem: a file is missing, or `choix` is not installed.
    """
    by_key: dict[Path, list[Path]] = {}
    for sheet in sheets:
        by_key.setdefault(_key_of(sheet), []).append(sheet)
    ratings = [rating for key, sheets in by_key.items() for rating in read_ratings(key, sheets)]
    for (arm, other), share in win_shares(ratings).items():
        yield f"{arm} against {other}: preferred in {in_words(share)} of {share.items} ratings (a tie is half)"
    fitted = bradley_terry(ratings)
    for arm in fitted.strengths:
        error = fitted.elo_stderr(arm)
        told = "?" if error is None else f"{error:.0f}"
        yield f"{arm}: Elo {fitted.elo(arm):.0f} ± {told} (Bradley–Terry; errors clustered by {fitted.prompts} prompts)"


def _key_of(sheet: Path) -> Path:
    """The key of a sheet, beside the folder that holds the sheet.

    Raises:
        EnvironmentProblem: it is not there.
    """
    key = key_of(sheet.absolute().parent)
    if not key.is_file():
        raise EnvironmentProblem(
            f"{sheet}: there is no key {key}; put the sheet into the folder raters-… in which the rater got it"
        )
    return key
