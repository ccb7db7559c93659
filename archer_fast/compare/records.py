"""What one run of a comparison has left in its folder, finished or not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from archer_fast.compare.curves import Curve, Floats, smoothed
from archer_fast.config import UpdateConfig, to_dict
from archer_fast.loggers import read_rows
from archer_fast.resume import leaves
from archer_fast.run_folder import RunFolder, is_run, read_json

TRAINING = ("seconds_rollout", "seconds_critic", "seconds_actor")  # "other" holds the evaluations and checkpoints
COLLAPSE = 2.0  # standard errors below the start


@dataclass(frozen=True)
class Record:
    """`Record("ppo", 0, total=80, rows=[{"iteration": 1, "games": 128, "return": -16.2, ...}, ...], ...)`."""

    algorithm: str
    seed: int
    total: int = 0
    """Iterations that its config asks for; 0 where it never started."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted names, without those of one run (`seed`, `out`, `resume`)."""
    update: Mapping[str, Any] = field(default_factory=dict)
    """How the actor moves (`lr`, `epochs`, ...), from the section of its algorithm."""
    rows: Sequence[Mapping[str, float]] = ()
    """Of metrics.jsonl, those of iterations; what was evaluated between them is left out."""
    summary: Mapping[str, float] = field(default_factory=dict)
    """Of summary.json; of a run that is not finished, what is known of its start."""
    finished: bool = False

    @property
    def name(self) -> str:
        return f"{self.algorithm} seed {self.seed}"

    @property
    def start(self) -> float:
        """Return before training; NaN where it is not known."""
        return self.summary.get("before_return", math.nan)

    @property
    def iterations(self) -> int:
        return int(self.rows[-1]["iteration"]) if self.rows else 0

    @property
    def trajectories(self) -> int:
        return int(self.games[-1]) if self.rows else 0

    @cached_property
    def games(self) -> Floats:
        return self.column("games")

    @cached_property
    def returns(self) -> Floats:
        return self.column("return")

    @cached_property
    def seconds(self) -> Floats:
        """Of training so far, by the end of each iteration: without evaluations and checkpoints."""
        spent = [sum(row.get(name) or 0.0 for name in TRAINING) for row in self.rows]
        return np.cumsum(np.nan_to_num(np.array(spent, dtype=np.float64)))

    def column(self, name: str) -> Floats:
        """One number a row, NaN where the row lacks it."""
        return np.array([row.get(name, math.nan) for row in self.rows], dtype=np.float64)

    @property
    def faulty(self) -> list[int]:
        """Iterations whose return is no finite number."""
        return [int(row["iteration"]) for row in self.rows if "return" in row and not _ok(row["return"])]

    @property
    def offline(self) -> bool:
        """It learns from games of the start policy alone: its own games say nothing of what it learned."""
        playing = self.settings.get("rollout.iterations")
        return playing is not None and playing < self.total

    def curve(self, window: int) -> Curve:
        """Empty of a run that learns offline, or has not played `window` games."""
        return smoothed(self.games, self.returns, window) if not self.offline else Curve(np.empty(0), np.empty(0))

    def curve_in_seconds(self, window: int) -> Curve:
        curve = self.curve(window)
        return Curve(np.interp(curve.x, self.games, self.seconds), curve.y) if curve.x.size else curve

    def at_end(self, name: str, window: int) -> float:
        """A share of turns as the last evaluation has it; else the mean of a column over the last iterations.

        These are as many as play `window` games. NaN where nothing tells.
        """
        if f"last_{name}" in self.summary:
            return self.summary[f"last_{name}"]
        values = self.column(name)
        values = values[np.isfinite(values)][-self._num_last(window) :]
        return float(values.mean()) if values.size else math.nan

    def collapse(self, window: int) -> str | None:
        """Why this seed counts as collapsed: its own log says so, or its end is clearly below its start; else None."""
        said = [int(row["iteration"]) for row in self.rows if _ok(row.get("collapsed")) and row["collapsed"] > 0]
        if said:
            return f"its log says so, first in iteration {said[0]}"
        end, end_error = self.summary.get("last_return", math.nan), self.summary.get("last_return_se", 0.0)
        if not self.finished and (points := self.curve(window).y).size:
            end, end_error = float(points[-1]), self.at_end("return_se", window) / math.sqrt(self._num_last(window))
        error = math.hypot(self.summary.get("before_return_se", 0.0), end_error)
        if end < self.start - COLLAPSE * error:  # false where one of them is NaN
            return f"return {end:.2f} at the end, {self.start:.2f} at the start, ± {error:.2f} of the difference"
        return None

    def _num_last(self, window: int) -> int:
        """Iterations that play `window` games, at least one."""
        return max(1, window // int(self.settings.get("rollout.games", window)))


def read_record(algorithm: str, seed: int, path: Path) -> Record:
    """ValueError where a file there is broken; a run that was never started is a record without rows."""
    if not is_run(path):
        return Record(algorithm, seed)
    folder = RunFolder(path)
    config = folder.load_config()
    settings = dict(leaves(to_dict(config)))
    rows = read_rows(folder.metrics)
    iterations = [row for row in rows if "games" in row and ("return" in row or "seconds_critic" in row)]
    summary: dict[str, float] = read_json(folder.summary) if folder.summary.exists() else {}
    start = next((row for row in rows if row["iteration"] == 0 and "eval_return" in row), {})
    for name in ("return", "return_se", "win_rate"):
        if f"eval_{name}" in start:
            summary.setdefault(f"before_{name}", start[f"eval_{name}"])
    return Record(
        algorithm,
        seed,
        total=config.iterations,
        settings={name: value for name, value in settings.items() if name not in ("seed", "out", "resume")},
        update={f.name: getattr(config.update, f.name) for f in fields(UpdateConfig)} | {"gamma": config.gamma},
        rows=iterations,
        summary=summary,
        finished=folder.summary.exists(),
    )


def _ok(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
