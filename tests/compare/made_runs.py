"""Folders of runs that nobody trained: what they say is made up, so that the truth is known."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archer_fast.compare.plan import Plan
from archer_fast.config import Config, TaskConfig
from archer_fast.presets import with_preset
from archer_fast.run_folder import RunFolder, write_json

GAMES = 100  # an iteration


def made_plan(out: Path, algorithms: Sequence[str], seeds: int, iterations: int, window: int = 100) -> Plan:
    out.mkdir(parents=True, exist_ok=True)
    made = {"command": "archer-fast compare ...", "commit": "abc", "machine": "2 cores", "date": "2026-11-26"}
    plan = Plan(tuple(algorithms), seeds, iterations * GAMES, window, (made,))
    plan.save(out)
    return plan


def made_run(
    out: Path,
    algorithm: str,
    seed: int,
    returns: Sequence[float | None],
    *,
    total: int | None = None,
    start: float = -10.0,
    end: float | None = None,
    **changes: Any,
) -> Path:
    """A run whose iterations had these returns; finished where `end`, the return of its last evaluation, is given."""
    folder = RunFolder(out / algorithm / f"seed-{seed}")
    config = with_preset(Config(task=TaskConfig("guess-number")), algorithm)
    config.rollout.games = GAMES
    settings = {
        "seed": seed,
        "out": str(folder.path),
        "iterations": len(returns) if total is None else total,
        **changes,
    }
    folder.save_config(dataclasses.replace(config, **settings))
    evaluated = {"iteration": 0, "games": 0, "eval_return": start, "eval_return_se": 0.5, "eval_win_rate": 0.1}
    rows = [evaluated] + [
        {
            "iteration": i,
            "games": GAMES * i,
            "return": value,
            "return_se": 0.2,
            "seconds_rollout": 1.0,
            "seconds_critic": 2.0,
            "seconds_actor": 0.5,
            "seconds_other": 100.0,
            "kl": 0.01 * i,
            "entropy": 1.0,
        }
        for i, value in enumerate(returns, 1)
    ]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if end is not None:
        summary = {
            "games": GAMES * len(returns),
            "before_return": start,
            "before_return_se": 0.5,
            "best_return": end + 1,
            "last_return": end,
            "last_return_se": 0.3,
            "last_win_rate": 0.5,
            "last_guess": 0.6,
            "last_repeat": 0.2,
            "last_invalid": 0.0,
            "last_greedy_return": end + 0.5,
        }
        write_json(folder.summary, summary)
    return folder.path
