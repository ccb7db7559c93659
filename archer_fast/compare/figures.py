"""Every figure of a comparison, from the records of its runs: what the page says and comparison.json holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from archer_fast.compare.curves import Band, Curve, first_reach, ladder, mean_band
from archer_fast.compare.estimates import CONFIDENCE, Estimate, estimate
from archer_fast.compare.plan import Plan
from archer_fast.compare.races import Difference, Race, paired_difference, race
from archer_fast.compare.records import Record

ENDS = {  # figure: where summary.json has it
    "start": "before_return",
    "end": "last_return",
    "best": "best_return",
    "greedy": "last_greedy_return",
    "win_rate": "last_win_rate",
}
BEHAVIOUR = ("guess", "repeat", "invalid", "entropy", "kl")
SHARES = (1.0, 0.9)  # of a rival's gain that is raced for: the top of a flat curve is reached at no certain moment
POINTS_IN_TIME = 200


class NothingYet(ValueError):
    """No run has ended an iteration."""


@dataclass(slots=True, frozen=True)
class Contestant:
    """One algorithm over its seeds."""

    name: str
    seeds: Sequence[int]
    """Those that the means are over: the finished ones; where none is, all that have ended an iteration."""
    starts: Mapping[int, float]
    """Return before training, by seed where it is known."""
    ends: Mapping[str, Estimate | None]
    """start, end, best, greedy, win_rate, seconds, over the finished seeds."""
    behaviour: Mapping[str, Estimate | None]
    curve: Band | None
    curve_in_seconds: Band | None
    seed_curves: Mapping[int, Curve]
    seed_curves_in_seconds: Mapping[int, Curve]
    tuning: str | None


@dataclass(slots=True, frozen=True)
class Step:
    """A step of the ladder: trajectories until a seed's smoothed curve first reached it; infinity: it never did."""

    median: float
    by_seed: Mapping[int, float]

    @property
    def reached(self) -> int:
        return sum(math.isfinite(x) for x in self.by_seed.values())


@dataclass(slots=True, frozen=True)
class Figures:
    plan: Plan
    task: str
    task_options: Mapping[str, Any]
    confidence: float
    contestants: Mapping[str, Contestant]
    ladder: Mapping[float, Mapping[str, Step]]
    """return: algorithm: its step."""
    races: Sequence[Race]
    differences: Sequence[Difference]
    settings: Mapping[str, Mapping[str, Any]]
    """Dotted name: algorithm: value, where they are not all the same."""
    updates: Mapping[str, Mapping[str, Any]]
    """Name in `config.UpdateConfig`: algorithm: value, the same or not."""
    offline: Sequence[str]
    """Algorithms whose games say nothing of what they learn."""
    collapsed: Mapping[str, str]
    """Name of a run: why."""
    missing: Mapping[str, str]
    """Name of a run that is not finished: how far it is."""
    faulty: Mapping[str, Sequence[int]]
    """Name of a run: its iterations without a finite return."""

    @property
    def played(self) -> str:
        """`twenty-questions objects=10`."""
        return " ".join([self.task, *(f"{name}={value}" for name, value in self.task_options.items())])


def make_figures(plan: Plan, records: Sequence[Record], tuning: Mapping[str, str]) -> Figures:
    """NothingYet, or ValueError where two seeds of an algorithm had different settings."""
    if not any(record.rows for record in records):
        raise NothingYet("out: nothing to compare: no run has ended an iteration yet")
    of = {name: [r for r in records if r.algorithm == name] for name in plan.algorithms}
    settings = {name: _settings(some) for name, some in of.items() if any(r.settings for r in some)}
    contestants = {name: _contestant(name, some, plan.window, tuning.get(name)) for name, some in of.items()}
    first, *rivals = contestants.values()
    some_settings = next(iter(settings.values()))
    return Figures(
        plan=plan,
        task=str(some_settings["task.name"]),
        task_options=some_settings["task.options"],
        confidence=CONFIDENCE,
        contestants=contestants,
        ladder=_ladder(contestants, records),
        races=[race(first, rival, share) for rival in rivals for share in SHARES if first.curve and rival.curve],
        differences=[
            difference
            for rival in rivals
            if (difference := paired_difference(first.name, of[first.name], rival.name, of[rival.name]))
        ],
        settings=differing(settings),
        updates=side_by_side({name: next(r for r in of[name] if r.settings).update for name in settings}),
        offline=[name for name, some in of.items() if any(r.offline for r in some)],
        collapsed={r.name: why for r in records if (why := r.collapse(plan.window))},
        missing={r.name: _how_far(r) for r in records if not r.finished},
        faulty={r.name: r.faulty for r in records if r.faulty},
    )


def differing(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings in which the algorithms are not all the same."""
    rows = side_by_side(settings)
    return {name: row for name, row in rows.items() if any(value != next(iter(row.values())) for value in row.values())}


def side_by_side(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{"ppo": {"lr": 1e-4}} -> {"lr": {"ppo": 1e-4}}; None where one has no such setting."""
    names = dict.fromkeys(name for one in settings.values() for name in one)
    return {name: {algorithm: one.get(name) for algorithm, one in settings.items()} for name in names}


def _settings(records: Sequence[Record]) -> Mapping[str, Any]:
    started = [r for r in records if r.settings]
    for record in started[1:]:
        unlike = differing({started[0].name: started[0].settings, record.name: record.settings})
        if unlike:
            raise ValueError(f"out: {record.name} and {started[0].name} differ in {', '.join(unlike)}")
    return started[0].settings


def _contestant(name: str, records: Sequence[Record], window: int, tuning: str | None) -> Contestant:
    finished = [r for r in records if r.finished]
    curves = {r.seed: r.curve(window) for r in records}
    averaged = finished or [r for r in records if r.rows]
    in_seconds = {r.seed: r.curve_in_seconds(window) for r in records}
    ends = {end: estimate(r.summary.get(key, math.nan) for r in finished) for end, key in ENDS.items()}
    ends["seconds"] = estimate(float(r.seconds[-1]) for r in finished if r.rows)
    return Contestant(
        name=name,
        seeds=[r.seed for r in averaged],
        starts={r.seed: r.start for r in records if math.isfinite(r.start)},
        ends=ends,
        behaviour={key: estimate(r.at_end(key, window) for r in averaged) for key in BEHAVIOUR},
        curve=mean_band([curves[r.seed] for r in averaged]),
        curve_in_seconds=mean_band([in_seconds[r.seed] for r in averaged], points=POINTS_IN_TIME),
        seed_curves=curves,
        seed_curves_in_seconds=in_seconds,
        tuning=tuning,
    )


def _ladder(contestants: Mapping[str, Contestant], records: Sequence[Record]) -> dict[float, dict[str, Step]]:
    """From the mean return of the start to the highest mean curve."""
    starts = [r.start for r in records if math.isfinite(r.start)]
    tops = [float(one.curve.mean.max()) for one in contestants.values() if one.curve]
    if not starts or not tops:
        return {}
    steps = ladder(statistics.fmean(starts), max(tops))
    return {level: {name: _step(one, level) for name, one in contestants.items() if one.curve} for level in steps}


def _step(contestant: Contestant, level: float) -> Step:
    by_seed = {seed: first_reach(contestant.seed_curves[seed], level) for seed in contestant.seeds}
    return Step(statistics.median(by_seed.values()), by_seed)


def _how_far(record: Record) -> str:
    if not record.settings:
        return "not started"
    if record.iterations < record.total:
        return f"{record.iterations} of {record.total} iterations"
    return f"all {record.total} iterations, its last evaluation not"
