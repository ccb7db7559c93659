"""What a person sees of a comparison while it runs: a table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Literal, Protocol

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Column, Table

from archer_fast.compare.plan import RunPlan
from archer_fast.display import clock_text
from archer_fast.loggers import read_rows

State = Literal["waiting", "running", "finished", "stopped", "failed"]
LAST = 5  # iterations that the return shown is the mean of
STYLES = {"waiting": "dim", "running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red"}


class Standing:
    """How far one run is, by its metrics.jsonl."""

    def __init__(self, run: RunPlan) -> None:
        self.run = run
        self.state: State = "finished" if run.finished else "waiting"
        self.iteration, self.total = 0, run.config.iterations
        self.last_return = self.seconds = math.nan  # seconds: of an iteration, evaluations and checkpoints too
        self._size = -1
        self.read()

    def read(self) -> None:
        """Look at the file again, if it has grown."""
        path = self.run.folder / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size == self._size:
            return
        self._size = size
        rows = [row for row in read_rows(path) if "return" in row or "seconds_critic" in row]
        self.iteration = int(rows[-1]["iteration"]) if rows else 0
        returns = [row["return"] for row in rows if math.isfinite(row.get("return", math.nan))][-LAST:]
        self.last_return = math.fsum(returns) / len(returns) if returns else math.nan
        spent = [sum(v for k, v in row.items() if k.startswith("seconds_") and math.isfinite(v)) for row in rows]
        self.seconds = math.fsum(spent) / len(spent) if spent else math.nan


def seconds_left(standings: Sequence[Standing], jobs: int) -> float | None:
    """Until the last run ends, by the pace of each algorithm so far; None before any has ended an iteration.

    An algorithm that has not begun is taken to be as slow as the mean of the others.
    """
    paces: dict[str, list[float]] = {}
    for one in standings:
        if math.isfinite(one.seconds):
            paces.setdefault(one.run.algorithm, []).append(one.seconds)
    if not paces:
        return None
    means: Mapping[str, float] = {name: math.fsum(seconds) / len(seconds) for name, seconds in paces.items()}
    usual = math.fsum(means.values()) / len(means)
    left = [
        (one.total - one.iteration) * means.get(one.run.algorithm, usual)
        for one in standings
        if one.state in ("waiting", "running")
    ]
    return max(math.fsum(left) / jobs, *left, 0.0) if left else 0.0


class Watcher(Protocol):
    """Told what happens; a context that leaves the terminal clean."""

    def message(self, text: str) -> None: ...
    def show(self, standings: Sequence[Standing], jobs: int) -> None: ...
    def __enter__(self) -> Watcher: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def make_watcher(console: Console) -> Watcher:
    """A live table on a terminal, plain lines where the output is piped or a file."""
    return LiveTable(console) if console.is_terminal and not console.is_dumb_terminal else PlainLines(console)


class LiveTable:
    """One row a run, redrawn in place; messages scroll above it."""

    def __init__(self, console: Console, *, every: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._every, self._clock, self._shown = every, clock, -math.inf

    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def message(self, text: str) -> None:
        self._live.console.print(escape(text), highlight=False)

    def show(self, standings: Sequence[Standing], jobs: int) -> None:
        if self._clock() - self._shown >= self._every:
            self._shown = self._clock()
            self._live.update(table_of(standings, jobs), refresh=True)


def table_of(standings: Sequence[Standing], jobs: int) -> Table:
    right = [Column(name, justify="right") for name in ("iterations", f"return, last {LAST}", "left")]
    table = Table("algorithm", "seed", "", *right, caption=_overall(standings, jobs), caption_justify="left")
    for one in standings:
        one.read()
        left = (one.total - one.iteration) * one.seconds if one.state == "running" else math.nan
        table.add_row(
            escape(one.run.algorithm),
            str(one.run.seed),
            one.state,
            f"{one.iteration}/{one.total}",
            f"{one.last_return:.2f}" if math.isfinite(one.last_return) else "",
            clock_text(left) if math.isfinite(left) else "",
            style=STYLES[one.state],
        )
    return table


class PlainLines:
    """A line about every `every` seconds, and what begins, ends or fails."""

    def __init__(self, console: Console, *, every: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._every, self._clock = console, every, clock
        self._shown = clock()

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def message(self, text: str) -> None:
        self._console.print(escape(text), soft_wrap=True, highlight=False)

    def show(self, standings: Sequence[Standing], jobs: int) -> None:
        if self._clock() - self._shown < self._every:
            return
        self._shown = self._clock()
        for one in standings:
            one.read()
        running = [
            f"{one.run.name} {one.iteration}/{one.total}"
            + (f" return {one.last_return:.2f}" if math.isfinite(one.last_return) else "")
            for one in standings
            if one.state == "running"
        ]
        self.message("  ".join([_overall(standings, jobs), *running]))


def _overall(standings: Sequence[Standing], jobs: int) -> str:
    finished = sum(one.state == "finished" for one in standings)
    left = seconds_left(standings, jobs)
    return f"{finished}/{len(standings)} runs finished" + (f", about {clock_text(left)} left" if left else "")
