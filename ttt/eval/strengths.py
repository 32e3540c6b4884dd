"""What follows from pairwise ratings: how often arms beat each other, and Bradley–Terry strengths on the scale of Elo.

    win_shares(ratings)      # how often each arm beat each other one
    bradley_terry(ratings)   # strengths and Elo numbers of all arms

In the model of Bradley & Terry (1952, "Rank analysis of incomplete block designs") arm i beats arm j with probability
`1 / (1 + exp(θ_j − θ_i))`; a tie is half a win of either. The strengths θ, with mean 0, are fitted by `choix`. On the
scale of Elo they are `1000 + 400 / ln(10) · θ`: 400 points are odds of 10 to 1. Errors are clustered by prompt (a
sandwich estimator; see `ttt.eval.statistics`), since ratings of one prompt are not independent. This module imports no
torch; NumPy and `choix` only when strengths are fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ttt.errors import EnvironmentProblem, UsageError
from ttt.eval.ratings import Rating
from ttt.eval.statistics import Estimate, estimate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ELO_MEAN = 1000.0
"""The mean of all arms on the scale of Elo."""
ELO_SCALE = 400 / math.log(10)
"""Points of Elo in a unit of strength."""
_MOST_STEPS = 10_000
"""Of `choix`'s iteration; it ends after some ten unless arms were hardly compared."""


@dataclass(frozen=True)
class BradleyTerry:
    """Strengths of arms."""

    strengths: Mapping[str, float]
    """θ of each arm, with mean 0; strongest first."""
    covariance: Mapping[tuple[str, str], float] | None
    """Of the strengths, by pairs of arms; None if all ratings are of one prompt, which says nothing about the next."""
    ratings: int
    """How many ratings they were fitted to."""
    prompts: int
    """How many prompts these are of."""

    def elo(self, arm: str) -> float:
        """An arm's strength on the scale of Elo."""
        return ELO_MEAN + ELO_SCALE * self.strengths[arm]

    def elo_stderr(self, arm: str) -> float | None:
        """The standard error of `elo`, relative to the mean of the arms; None if it is unknown."""
        return None if self.covariance is None else ELO_SCALE * math.sqrt(max(self.covariance[arm, arm], 0.0))

    def elo_difference(self, arm: str, other: str) -> tuple[float, float | None]:
        """By how many points of Elo an arm is ahead of another, and the standard error of that."""
        ahead = ELO_SCALE * (self.strengths[arm] - self.strengths[other])
        if self.covariance is None:
            return ahead, None
        c = self.covariance
        variance = c[arm, arm] + c[other, other] - 2 * c[arm, other]
        return ahead, ELO_SCALE * math.sqrt(max(variance, 0.0))


def win_shares(ratings: Sequence[Rating]) -> dict[tuple[str, str], Estimate]:
    """For each pair of arms that was compared, how often the first one won, a tie being half a win.

    The ratings of a comparison are averaged over raters first; the error is clustered by prompt. The share of the pair
    the other way round is 1 minus this one.
    """
    grouped: dict[tuple[str, str], list[tuple[float, str, str]]] = {}
    for one in ratings:
        turned = one.left > one.right
        arms = (one.right, one.left) if turned else (one.left, one.right)
        score = 1 - one.score if turned else one.score
        grouped.setdefault(arms, []).append((score, f"{one.prompt}\n{one.comparison}", one.prompt))
    return {arms: estimate(*map(list, zip(*grouped[arms], strict=True))) for arms in sorted(grouped)}


def bradley_terry(ratings: Sequence[Rating]) -> BradleyTerry:
    """Fit strengths of all arms.

    Raises:
        EnvironmentProblem: `choix` is not installed.
        UsageError: there are no ratings, or some arms lost to others without a single win or tie, so that no finite
            strengths fit; the message names them.
    """
    if not ratings:
        raise UsageError("there are no ratings to fit strengths to")
    arms = sorted({arm for one in ratings for arm in (one.left, one.right)})
    _require_finite_strengths(arms, ratings)
    strengths = _fitted(arms, ratings)
    covariance = _covariance(arms, ratings, strengths)
    ranked = sorted(range(len(arms)), key=lambda place: -strengths[place])
    return BradleyTerry(
        {arms[place]: float(strengths[place]) for place in ranked},
        None
        if covariance is None
        else {(a, b): float(covariance[i, j]) for i, a in enumerate(arms) for j, b in enumerate(arms)},
        len(ratings),
        len({one.prompt for one in ratings}),
    )


def _require_finite_strengths(arms: Sequence[str], ratings: Sequence[Rating]) -> None:
    """Refuse what no finite strengths fit: every arm must reach every other one by wins and ties (Ford 1957)."""
    beaten: dict[str, set[str]] = {arm: set() for arm in arms}
    for one in ratings:
        if one.score > 0:
            beaten[one.left].add(one.right)
        if one.score < 1:
            beaten[one.right].add(one.left)
    for arm in arms:
        reached, ahead = {arm}, [arm]
        while ahead:
            new = beaten[ahead.pop()] - reached
            reached |= new
            ahead += new
        if len(reached) < len(arms):
            others = ", ".join(other for other in arms if other not in reached)
            raise UsageError(
                f"{', '.join(sorted(reached))} never won or tied against {others}, so that strengths have no finite "
                f"value; gather more ratings, or report the shares of wins"
            )


def _fitted(arms: Sequence[str], ratings: Sequence[Rating]) -> NDArray[np.float64]:
    """Strengths of largest likelihood, with mean 0."""
    try:
        import choix
    except ImportError as error:
        if error.name not in ("choix", "scipy"):
            raise
        raise EnvironmentProblem(
            f"Bradley–Terry strengths need {error.name}, which is not installed",
            fix="pip install 'ttt-adapters[ratings]'",
        ) from None

    place = {arm: number for number, arm in enumerate(arms)}
    wins = []
    for one in ratings:  # each twice, so that a tie is one win of either
        left, right = place[one.left], place[one.right]
        wins += [(left, right)] * round(2 * one.score) + [(right, left)] * round(2 - 2 * one.score)
    try:
        strengths: NDArray[np.float64] = choix.ilsr_pairwise(len(arms), wins, alpha=0.0, max_iter=_MOST_STEPS)
    except RuntimeError:
        raise UsageError(
            f"the strengths of {', '.join(arms)} do not settle in {_MOST_STEPS:,} steps: some were hardly compared; "
            f"gather more ratings, or report the shares of wins"
        ) from None
    return strengths - strengths.mean()


def _covariance(
    arms: Sequence[str], ratings: Sequence[Rating], strengths: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """The sandwich `H⁺ (Σ_g s_g s_gᵀ) H⁺ · G/(G−1)` over G prompts; None for one.

    H is the information of the likelihood, s_g a prompt's summed gradient of it. H itself has no inverse, since only
    differences of strengths matter.
    """
    import numpy as np

    prompts = {prompt: number for number, prompt in enumerate(sorted({one.prompt for one in ratings}))}
    if len(prompts) < 2:
        return None
    sides = np.array([[(one.left == arm) - (one.right == arm) for arm in arms] for one in ratings], dtype=float)
    expected = 1 / (1 + np.exp(-(sides @ strengths)))
    information = sides.T @ (sides * (expected * (1 - expected))[:, None])
    gradients = np.zeros((len(prompts), len(arms)))
    scores = np.array([one.score for one in ratings])
    np.add.at(gradients, [prompts[one.prompt] for one in ratings], sides * (scores - expected)[:, None])
    # a constant on top changes nothing for gradients, whose sum over arms is 0, and makes H invertible
    moved = np.linalg.solve(information + information.trace() / len(arms) ** 2, gradients.T)
    return np.asarray(moved @ moved.T * (len(prompts) / (len(prompts) - 1)))
