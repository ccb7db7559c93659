"""Whether a policy has collapsed, and what of it: five rules on a run's rows of metrics."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean
from typing import Any, NamedTuple

from archer_fast.config import CollapseConfig

Row = Mapping[str, float]

CLEARLY = 2.0  # standard errors by which one mean return is called better than another


class Mean(NamedTuple):
    value: float
    error: float  # standard error

    def above(self, other: Mean) -> float:
        """How far, in standard errors of the difference."""
        error, difference = math.hypot(self.error, other.error), self.value - other.value
        return difference / error if error > 0 else math.copysign(math.inf, difference) if difference else 0.0


class CollapseDetector:
    """Sees the rows of a run in their order and says in words what has collapsed, once for each thing.

    The mean of the last `window` rows is compared with the evaluation of the start:

        return    below the start's by more than `return_errors` standard errors of the difference
        invalid   its share of turns is beyond `max_invalid` of the way from the start's to all
        repeat    likewise, by `max_repeat`
        entropy   below `min_entropy` of the start's
        kl        above `max_kl` nats a token

    The last four are no collapse while the return is clearly above the start's and not clearly below that of the best
    window so far: whoever has solved a task may well be sure of himself and far from where he began. The share of a
    kind of turns alone is none either, as a solved task may be all guesses.

        >>> start = {"return": -16.8, "return_se": .3, "repeat": .18, "entropy": 1.3}
        >>> detector = CollapseDetector(CollapseConfig(window=2), start)
        >>> row = {"return": -16.0, "return_se": .5, "repeat": .86, "entropy": .11}
        >>> detector.see({"iteration": 24, **row}), detector.see({"iteration": 25, **row})
        ([], ['collapse in iteration 25: repeat 86% of turns (start 18%); entropy 0.11 nats a token (start 1.30)'])
        >>> detector.see({"iteration": 26, **row}), list(detector.collapsed)
        ([], ['repeat', 'entropy'])
    """

    def __init__(self, config: CollapseConfig, start: Row | None = None) -> None:
        self.config = config
        self.start = dict(start or {})  # figures of the policy before training, named as in the rows
        self.collapsed: dict[str, str] = {}  # by the row seen last: name of the rule, words
        self._rows: deque[dict[str, float]] = deque(maxlen=config.window)
        self._best: Mean | None = None  # return of the best window so far
        self._episodes: dict[str, int] = {}  # what was said to have collapsed: rows since it last had

    def see(self, row: Row) -> list[str]:
        """What there is to say after this row: what has collapsed, what has recovered for a whole window."""
        seen = _figures(row)
        self.collapsed = {}
        if "return" in seen:
            self._rows.append(seen)
            if len(self._rows) == self.config.window:
                self.collapsed = self._judge()
        new = [words for name, words in self.collapsed.items() if name not in self._episodes]
        self._episodes = {name: n + 1 for name, n in self._episodes.items()} | dict.fromkeys(self.collapsed, 0)
        over = [name for name, n in self._episodes.items() if n >= self.config.window]
        for name in over:
            del self._episodes[name]
        iteration = int(row["iteration"])
        said = [f"collapse in iteration {iteration}: {'; '.join(new)}"] if new else []
        return [*said, f"recovered in iteration {iteration}: {', '.join(over)}"] if over else said

    def forget(self) -> None:
        """The next row is another policy's: judge none before there are `window` of its own."""
        self._rows.clear()
        self._episodes.clear()

    def _judge(self) -> dict[str, str]:
        c, start = self.config, self.start
        at_start = Mean(start.get("return", math.nan), start.get("return_se", 0.0))
        errors = [row.get("return_se", 0.0) for row in self._rows]
        now = Mean(self._mean("return"), math.hypot(*errors) / len(errors))
        if self._best is None or now.value > self._best.value:
            self._best = now
        found = {}
        if now.above(at_start) < -c.return_errors:
            found["return"] = (
                f"return {now.value:.2f} ± {now.error:.2f} (start {at_start.value:.2f} ± {at_start.error:.2f})"
            )
        if now.above(at_start) > CLEARLY and now.above(self._best) > -CLEARLY:
            return found
        for name, most in (("invalid", c.max_invalid), ("repeat", c.max_repeat)):
            share, before = self._mean(name), start.get(name, 0.0)
            if share > before + most * (1 - before):
                found[name] = f"{name} {share:.0%} of turns (start {before:.0%})"
        entropy, before = self._mean("entropy"), start.get("entropy", math.nan)
        if entropy < c.min_entropy * before:
            found["entropy"] = f"entropy {entropy:.2f} nats a token (start {before:.2f})"
        kl, length = self._mean("kl"), self._mean("action_length")
        if kl > c.max_kl * length:
            found["kl"] = f"KL to the start {kl:.1f} nats an action of {length:.1f} tokens"
        return found

    def _mean(self, name: str) -> float:
        """Over the window; NaN, which no rule is true of, where a row lacks it."""
        return fmean(row.get(name, math.nan) for row in self._rows)

    # -- checkpoints -------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "start": self.start,
            "rows": list(self._rows),
            "best": None if self._best is None else list(self._best),
            "episodes": self._episodes,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`, also under other settings; KeyError names what is missing."""
        self.start = dict(state["start"])
        self._rows = deque((dict(row) for row in state["rows"]), self.config.window)
        self._best = None if state["best"] is None else Mean(*state["best"])
        self._episodes = dict(state["episodes"])


def _figures(row: Row) -> dict[str, float]:
    """What the rules read; where an iteration played no games of its own, those that it was probed with tell."""
    names = ("return", "return_se", "invalid", "repeat", "entropy", "kl", "action_length")
    seen = {name: row.get(name, row.get(f"probe_{name}", math.nan)) for name in names}
    return {name: value for name, value in seen.items() if math.isfinite(value)}
