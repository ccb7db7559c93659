"""What is seen of a comparison while it runs: how far each run is, how long the rest takes, table and lines."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from archer_fast.compare.plan import RunPlan
from archer_fast.compare.progress import LiveTable, PlainLines, Standing, State, make_watcher, seconds_left
from archer_fast.config import Config


def standing(
    out: Path, algorithm: str, seed: int, done: int, state: State, *, total: int = 10, seconds: float = 2.0
) -> Standing:
    folder = out / algorithm / f"seed-{seed}"
    folder.mkdir(parents=True)
    rows = [{"iteration": 0, "eval_return": -9.0}]
    rows += [
        {"iteration": i, "return": -float(i), "seconds_critic": seconds / 2, "seconds_other": seconds / 2}
        for i in range(1, done + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Standing(RunPlan(algorithm, seed, folder, Config(iterations=total), ()))
    made.state = state
    return made


def test_a_run_is_read_again_when_it_has_grown(tmp_path: Path) -> None:
    one = standing(tmp_path, "ppo", 0, 7, "running")
    assert (one.iteration, one.total, one.last_return, one.seconds) == (7, 10, -5.0, 2.0)
    with (one.run.folder / "metrics.jsonl").open("a") as log:
        log.write('{"iteration": 8, "return": null, "seconds_critic": 10}\n{"iteration": 9, "re')
    one.read()
    assert (one.iteration, one.last_return, one.seconds) == (8, -5.0, 3.0), "a return that is no number is none"
    unborn = Standing(RunPlan("ppo", 1, tmp_path / "ppo" / "seed-1", Config(), ()))
    assert unborn.iteration == 0 and math.isnan(unborn.last_return) and math.isnan(unborn.seconds)


def test_what_is_left_by_the_pace_of_each_algorithm(tmp_path: Path) -> None:
    runs = [
        standing(tmp_path, "ppo", 0, 10, "finished", seconds=1.0),
        standing(tmp_path, "archer", 0, 5, "running", seconds=4.0),
        standing(tmp_path, "ppo", 1, 0, "waiting"),
        standing(tmp_path, "bc", 0, 0, "waiting"),
        standing(tmp_path, "bc", 1, 2, "failed", seconds=1.0),
    ]
    assert seconds_left(runs, 1) == 5 * 4 + 10 * 1 + 10 * 1
    assert seconds_left(runs, 2) == 20
    assert seconds_left(runs, 9) == 20, "no sooner than the longest of them"
    assert seconds_left(runs[:4], 1) == 5 * 4 + 10 * 1 + 10 * 2.5, "bc as the mean of the others"
    assert seconds_left(runs[:1], 1) == 0 and seconds_left(runs[2:4], 1) is None


def test_lines_where_nobody_looks(tmp_path: Path) -> None:
    now = [0.0]
    out = io.StringIO()
    console = Console(file=out, width=40)
    assert isinstance(make_watcher(console), PlainLines)
    runs = [standing(tmp_path, "archer", 0, 5, "running"), standing(tmp_path, "ppo", 0, 10, "finished")]
    runs.append(standing(tmp_path, "ppo", 1, 0, "running", total=1))
    with PlainLines(console, every=60, clock=lambda: now[0]) as lines:
        lines.message("[x] a long line that is not wrapped although the console is narrow")
        for now[0] in (1.0, 59.0, 60.0, 61.0, 119.0):
            lines.show(runs, 2)
    assert out.getvalue().splitlines() == [
        "[x] a long line that is not wrapped although the console is narrow",
        "1/3 runs finished, about 0:10 left  archer seed 0 5/10 return -3.00  ppo seed 1 0/1",
    ]


def test_a_table_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    console = Console(file=out, width=100, height=30, force_terminal=True, color_system=None)
    assert isinstance(make_watcher(console), LiveTable)
    runs = [
        standing(tmp_path, "archer", 0, 5, "running"),
        standing(tmp_path, "ppo", 0, 10, "finished"),
        standing(tmp_path, "ppo", 1, 0, "waiting"),
    ]
    with LiveTable(console, every=0) as table:
        table.show(runs, 2)
        table.message("a message")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]
    assert rows[:3] == [
        ["archer", "0", "running", "5/10", "-3.00", "0:10"],
        ["ppo", "0", "finished", "10/10", "-8.00", ""],
        ["ppo", "1", "waiting", "0/10", "", ""],
    ]
    assert "1/3 runs finished, about 0:20 left" in text and "a message" in text
