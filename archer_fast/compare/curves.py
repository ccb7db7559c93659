"""Learning curves as arrays: smoothed, averaged over seeds, and when they reach a return."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from archer_fast.compare.estimates import CONFIDENCE, two_sided_t

Floats = npt.NDArray[np.float64]


@dataclass(slots=True, frozen=True)
class Curve:
    """`Curve(x=[640, 768], y=[-15.2, -14.9])`: a return after so many trajectories (or seconds), x ascending."""

    x: Floats  # [P]
    y: Floats  # [P]


@dataclass(slots=True, frozen=True)
class Band:
    """The mean of several curves on one x, with its Student-t interval; NaN where one curve alone has none."""

    x: Floats  # [P]
    mean: Floats  # [P]
    low: Floats  # [P]
    high: Floats  # [P]
    n: int


def smoothed(games: Floats, returns: Floats, window: int) -> Curve:
    """Mean return of the last `window` games, after each iteration that completes so many.

    `games` [R]: games played by the end of each iteration; `returns` [R]: mean return of that iteration's games. An
    iteration that does not fit into the window whole is left out of it, one that is longer is a window of its own. A
    return that is not finite weighs nothing; a window of such returns alone is no point of the curve, nor is an
    iteration that played nothing.
    """
    edges = np.concatenate(([0.0], games))  # iteration i played the games edges[i] .. edges[i + 1]
    finite = np.isfinite(returns)
    weights = np.where(finite, np.diff(edges), 0.0)
    sums = np.concatenate(([0.0], np.cumsum(weights * np.where(finite, returns, 0.0))))
    counts = np.concatenate(([0.0], np.cumsum(weights)))
    ends = np.arange(1, edges.size)
    starts = np.minimum(np.searchsorted(edges, games - window, side="left"), ends - 1)
    total, count = sums[ends] - sums[starts], counts[ends] - counts[starts]
    keep = (games >= window) & (count > 0) & (np.diff(edges) > 0)
    return Curve(games[keep], total[keep] / count[keep])


def first_reach(curve: Curve, level: float) -> float:
    """The first x at which the curve is at least `level`; infinity where it never is."""
    reached = np.flatnonzero(curve.y >= level)
    return float(curve.x[reached[0]]) if reached.size else math.inf


def mean_band(curves: Sequence[Curve], *, points: int | None = None, confidence: float = CONFIDENCE) -> Band | None:
    """Mean and interval of `curves` where all of them are defined, each interpolated linearly between its points.

    On the union of their x, or on `points` evenly spaced ones. None where they share no x.
    """
    if not curves or any(c.x.size == 0 for c in curves):
        return None
    low, high = max(c.x[0] for c in curves), min(c.x[-1] for c in curves)
    if low > high:
        return None
    x = np.unique(np.concatenate([c.x for c in curves]))
    x = x[(x >= low) & (x <= high)] if points is None else np.linspace(low, high, points)
    values = np.stack([np.interp(x, c.x, c.y) for c in curves])  # [seeds, P]
    n, mean = len(curves), values.mean(axis=0)
    half = np.full_like(mean, math.nan)
    if n > 1:
        half = two_sided_t(confidence, n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n)
    return Band(x, mean, mean - half, mean + half, n)


def ladder(low: float, high: float, most: int = 7) -> list[float]:
    """Up to `most` round returns above `low`, up to `high`: ladder(-16.8, -8.1) -> [-16, -14, -12, -10]."""
    if not high > low:
        return []
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9) + 1
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]
