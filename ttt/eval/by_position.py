"""Curves against position: a mean for each log-spaced bin of positions, its error over books, and smoothing.

Positions count from 1, so that they can be drawn on a logarithmic axis. Edges do not depend on a stream's length, so
that bins of streams of different length are the same bins. Sums can be added up, so that a stream of 135,000 positions
is binned piece by piece as it is read. This module imports no torch; NumPy only once something is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ttt.eval.statistics import Estimate, estimate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]
    Integers = NDArray[np.int64]

WINDOW = 10
"""Over how many positions the paper's figure of inner losses is averaged (Sun et al. 2024, arXiv:2407.04620)."""


def log_edges(length: int, per_octave: int = 2) -> Integers:
    """Edges of log-spaced bins for positions 1 to `length`: bin i holds positions p with `edges[i] <= p < edges[i+1]`.

    The edges are the different whole numbers `round(2**(i / per_octave))`, as many as the length needs. The last bin
    may reach beyond the length.

    Args:
        length: the last position, 1 or more.
        per_octave: how many bins lie between a position and its double.

    Raises:
        ValueError: one of them is below 1.
    """
    import numpy as np

    if length < 1 or per_octave < 1:
        raise ValueError(f"length is {length} and per_octave {per_octave}; both must be 1 or more")
    octaves = int(length).bit_length()  # 2**octaves is above the length
    edges = np.unique(np.rint(2 ** (np.arange(octaves * per_octave + 1) / per_octave)).astype(np.int64))
    return edges[: int(np.searchsorted(edges, length, side="right")) + 1]


@dataclass(frozen=True, eq=False)
class Binned:
    """What was measured, summed by bins of positions. Those of other pieces of the same stream can be added."""

    edges: Integers
    """`[N+1]`, as `log_edges` makes them."""
    sums: Floats
    """`[N]`: of the values in each bin."""
    counts: Integers
    """`[N]`: how many values those are."""

    @property
    def means(self) -> Floats:
        """`[N]`: the mean of each bin; NaN where there is nothing."""
        import numpy as np

        return np.divide(self.sums, self.counts, out=np.full(len(self.sums), np.nan), where=self.counts > 0)

    @property
    def centres(self) -> Floats:
        """`[N]`: where to draw each bin, the geometric mean of its first and its last position."""
        import numpy as np

        return np.sqrt(self.edges[:-1] * (self.edges[1:] - 1.0))

    def __add__(self, other: Binned) -> Binned:
        if list(self.edges) != list(other.edges):
            raise ValueError("bins of different edges cannot be added; bin both by the same ones")
        return Binned(self.edges, self.sums + other.sums, self.counts + other.counts)


def bin_by_position(values: ArrayLike, mask: ArrayLike | None, edges: Integers, *, first: int = 1) -> Binned:
    """Sum values by bins of positions.

    Args:
        values: `[..., T]`; all leading axes, such as streams of codes, go into the same bins.
        mask: `[..., T]`: which values count; a hidden one may be anything. None is all.
        edges: as `log_edges` makes them, up to the last position or beyond.
        first: the position of the first value, if this is a piece of a stream.

    Raises:
        ValueError: a value that counts is not finite or lies outside the edges; the shapes differ.
    """
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    shown = np.ones(values.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if values.ndim < 1 or shown.shape != values.shape:
        raise ValueError(f"values are {list(values.shape)}, their mask {list(shown.shape)}; both must be [..., T]")
    positions = np.broadcast_to(np.arange(first, first + values.shape[-1]), values.shape)[shown]
    counted = values[shown]
    _require_inside(positions, edges)
    if not np.isfinite(counted).all():
        raise ValueError(f"the value at position {positions[~np.isfinite(counted)][0]} is not finite; mask it")
    bins = np.searchsorted(edges, positions, side="right") - 1
    count = len(edges) - 1
    sums = np.bincount(bins, weights=counted, minlength=count).astype(np.float64)
    return Binned(edges, sums, np.bincount(bins, minlength=count).astype(np.int64))


def over_clusters(curves: Sequence[Any], clusters: Sequence[str]) -> list[Estimate | None]:
    """The mean of several streams for each bin, with its error clustered: the band around a curve.

    Each stream counts once in a bin, however many of its positions lie there. For the band of a difference of arms
    give the difference of their `means`.

    Args:
        curves: a row `[N]` for each stream, such as `Binned.means`; NaN where the stream has nothing.
        clusters: for each stream what it is not independent of, such as its book.

    Returns:
        An estimate for each bin; None where no stream has anything.

    Raises:
        ValueError: there are no streams; the rows or the clusters differ in number.
    """
    import numpy as np

    table = np.asarray(curves, dtype=np.float64)
    if table.ndim != 2 or len(table) != len(clusters):
        raise ValueError(f"curves are {list(table.shape)} for {len(clusters)} clusters; give a row for each cluster")
    return [_over_clusters(column, clusters) for column in table.T]


def moving_average(values: ArrayLike, window: int = WINDOW) -> Floats:
    """The mean of each position and the `window − 1` before it, along the last axis.

    The first positions are averaged over those that there are. NaN is left out; where a window holds nothing else, the
    result is NaN.

    Args:
        values: `[..., T]`.
        window: how many positions, 1 or more.

    Returns:
        `[..., T]`.

    Raises:
        ValueError: the window is below 1.
    """
    import numpy as np

    if window < 1:
        raise ValueError(f"a window of {window} positions averages nothing; give 1 or more")
    values = np.asarray(values, dtype=np.float64)
    if not values.size:
        return values.copy()
    before = np.full((*values.shape[:-1], window - 1), np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([before, values], -1), window, axis=-1)
    there = ~np.isnan(windows)
    sums, counts = np.sum(windows, -1, where=there), np.sum(there, -1)
    return np.divide(sums, counts, out=np.full(values.shape, np.nan), where=counts > 0)


def _over_clusters(column: Floats, clusters: Sequence[str]) -> Estimate | None:
    """The estimate of one bin."""
    there = [(float(value), number) for number, value in enumerate(column) if value == value]
    if not there:
        return None
    return estimate([value for value, _ in there], [str(n) for _, n in there], [clusters[n] for _, n in there])


def _require_inside(positions: Integers, edges: Integers) -> None:
    if positions.size and (positions.min() < edges[0] or positions.max() >= edges[-1]):
        raise ValueError(
            f"positions {positions.min()} to {positions.max()} do not lie between the edges {edges[0]} and "
            f"{edges[-1]}; make edges for the whole length"
        )
