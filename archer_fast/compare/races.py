"""One algorithm against another: how soon it is as good, and by how much it is better at the end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from archer_fast.compare.curves import Band, Curve, first_reach
from archer_fast.compare.estimates import Estimate, estimate
from archer_fast.compare.records import Record


class Runner(Protocol):
    """What a race needs of a contestant."""

    @property
    def name(self) -> str: ...
    @property
    def curve(self) -> Band | None: ...
    @property
    def seed_curves(self) -> Mapping[int, Curve]: ...
    @property
    def seeds(self) -> Sequence[int]: ...
    @property
    def starts(self) -> Mapping[int, float]: ...


@dataclass(slots=True, frozen=True)
class Race:
    """Trajectories of `subject` and `rival` until each first reached `level`, by the mean curves over seeds."""

    subject: str
    rival: str
    share: float
    """Of the rival's gain, from its start to its best, that the level stands for."""
    level: float
    gain: float
    """Of the rival; where it is not positive, the rest means nothing."""
    subject_trajectories: float
    """Infinity: not in its whole budget."""
    rival_trajectories: float
    subject_best: float
    ratios: Mapping[int, float]
    """Rival over subject by seed, each seed with the rival's level of that seed; 0: the subject did not get there."""

    @property
    def ratio(self) -> float:
        """Rival over subject: how many times fewer trajectories the subject took; 0 where it did not get there."""
        return self.rival_trajectories / self.subject_trajectories

    @property
    def median_ratio(self) -> float:
        return statistics.median(self.ratios.values()) if self.ratios else math.nan


@dataclass(slots=True, frozen=True)
class Difference:
    """Return at the end, subject minus rival, over the seeds that both have finished."""

    subject: str
    rival: str
    estimate: Estimate
    by_seed: Mapping[int, float]


def race(subject: Runner, rival: Runner, share: float = 1.0) -> Race:
    """Both must have a mean curve.

    The start is that of the rival's evaluation before training, or, where it is not known, its curve's first point. The
    best of a curve that is flat and noisy is reached late by chance, which flatters the subject: hence `share`.
    """
    assert subject.curve is not None and rival.curve is not None
    begun = [rival.starts[seed] for seed in rival.seeds if seed in rival.starts]
    start = statistics.fmean(begun) if len(begun) == len(rival.seeds) else None
    level, gain = _level(Curve(rival.curve.x, rival.curve.mean), start, share)
    ratios = {}
    for seed in sorted({*subject.seeds} & {*rival.seeds}):
        ours, theirs = subject.seed_curves[seed], rival.seed_curves[seed]
        its_level, its_gain = _level(theirs, rival.starts.get(seed), share)
        if its_gain > 0:  # what never rose above its start is no goal
            ratios[seed] = first_reach(theirs, its_level) / first_reach(ours, its_level)
    return Race(
        subject=subject.name,
        rival=rival.name,
        share=share,
        level=level,
        gain=gain,
        subject_trajectories=first_reach(Curve(subject.curve.x, subject.curve.mean), level),
        rival_trajectories=first_reach(Curve(rival.curve.x, rival.curve.mean), level),
        subject_best=float(subject.curve.mean.max()),
        ratios=ratios,
    )


def _level(curve: Curve, start: float | None, share: float) -> tuple[float, float]:
    """The return at `share` of the way from the start to the curve's best, and that whole way."""
    best, begin = float(curve.y.max()), float(curve.y[0]) if start is None else start
    if share == 1:  # exactly the best: it must be reached by the curve that it is of
        return best, best - begin
    return begin + share * (best - begin), best - begin


def paired_difference(subject: str, ours: Sequence[Record], rival: str, theirs: Sequence[Record]) -> Difference | None:
    """None where no seed of both is finished. A seed fixes start policy and games: pairs cancel what both share."""
    of = {record.seed: record.summary.get("last_return", math.nan) for record in theirs if record.finished}
    pairs = {r.seed: r.summary.get("last_return", math.nan) - of[r.seed] for r in ours if r.finished and r.seed in of}
    known = {seed: value for seed, value in pairs.items() if math.isfinite(value)}
    mean = estimate(known.values())
    return None if mean is None else Difference(subject, rival, mean, known)
