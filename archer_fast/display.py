"""What a person sees of a run while it runs: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

WIDE = 147  # columns that the whole live line takes; a narrower terminal gets it without bar, speed and time gone


class Display(Protocol):
    """train.Watcher, and a context that leaves the terminal clean however the run ends."""

    def message(self, text: str) -> None: ...
    def phase(self, name: str, total: int | None) -> None: ...
    def advance(self, steps: int = 1) -> None: ...
    def calling(self, what: str) -> None: ...
    def iteration(self, number: int, total: int, metrics: Mapping[str, float]) -> None: ...
    def __enter__(self) -> Display: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def make_display(console: Console) -> Display:
    """The live line on a terminal, plain lines where the output is piped or a file."""
    return LiveDisplay(console) if console.is_terminal and not console.is_dumb_terminal else PlainDisplay(console)


class Pace:
    """The figures of the line: a running mean of the return, tokens a second, time gone and left.

    Time left is iterations left times the mean time of those seen, None before the first has ended.
    """

    SMOOTHING = 0.8  # weight of the past in the running mean of returns: about the last five iterations

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = self._last = clock()
        self._spent = 0.0  # seconds in iterations alone, the warm start left out
        self._seen = 0
        self.number = self.total = 0
        self.mean_return: float | None = None
        self.standard_error = 0.0  # of that mean
        self.collapsed = False
        self.tokens_per_second: float | None = None
        self.utilisation: float | None = None  # where the device's peak is known

    def begin_iterations(self) -> None:
        """What came until now (loading, warm start) tells nothing about the pace of iterations."""
        if self._seen == 0:
            self._last = self._clock()

    def iteration(self, number: int, total: int, metrics: Mapping[str, float]) -> None:
        now = self._clock()
        if number > max(0, self.number):  # the evaluations before and after the run come as rows of their own
            self._spent += now - self._last
            self._seen += 1
        self._last = now
        self.number, self.total = number, total
        new = metrics.get("return", math.nan)
        if math.isfinite(new):
            old = self.mean_return
            self.mean_return = new if old is None else self.SMOOTHING * old + (1 - self.SMOOTHING) * new
            past, weight = (0.0, 1.0) if old is None else (self.SMOOTHING * self.standard_error, 1 - self.SMOOTHING)
            self.standard_error = math.hypot(past, weight * metrics.get("return_se", math.nan))
        self.tokens_per_second = metrics.get("tokens_per_second", self.tokens_per_second)
        self.utilisation = metrics.get("utilisation", self.utilisation)
        self.collapsed = metrics.get("collapsed", self.collapsed) > 0

    @property
    def elapsed(self) -> float:
        return self._clock() - self._start

    @property
    def left(self) -> float | None:
        if not self._seen:
            return None
        per_iteration = self._spent / self._seen
        running = min(per_iteration, self._clock() - self._last)  # already spent on the next one
        return max(0.0, per_iteration * (self.total - self.number) - running)

    def text(self, *, short: bool = False) -> str:
        """`iteration 12/80  return -15.21 ± 0.25  18,400 tokens/s, 31% of the peak  1:03 gone, 5:10 left`.

        `short`: without speed and the time gone.
        """
        parts = [f"iteration {self.number}/{self.total}"] if self._seen else []
        if self.mean_return is not None:
            error = f" ± {self.standard_error:.2f}" if math.isfinite(self.standard_error) else ""
            parts.append(f"return {self.mean_return:.2f}{error}")
        if self.collapsed:
            parts.append("collapsed")
        if not short and self.tokens_per_second is not None and math.isfinite(self.tokens_per_second):
            used = "" if self.utilisation is None else f", {self.utilisation:.0%} of the peak"
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s{used}")
        left = self.left
        times = [] if short and left is not None else [f"{clock_text(self.elapsed)} gone"]
        times += [] if left is None else [f"{clock_text(left)} left"]
        return "  ".join([*parts, ", ".join(times)])


def clock_text(seconds: float) -> str:
    """65 -> "1:05", 3725 -> "1:02:05"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def evaluation_text(metrics: Mapping[str, float]) -> str | None:
    """`eval return -14.20 ± 0.31, win rate 42 %, greedy return -13.90`; None where nothing was evaluated."""
    if "eval_return" not in metrics:
        return None
    text = f"eval return {metrics['eval_return']:.2f}"
    if "eval_return_se" in metrics:
        text += f" ± {metrics['eval_return_se']:.2f}"
    if "eval_win_rate" in metrics:
        text += f", win rate {metrics['eval_win_rate']:.0%}"
    if "greedy_return" in metrics:
        text += f", greedy return {metrics['greedy_return']:.2f}"
    if "greedy_return_se" in metrics:
        text += f" ± {metrics['greedy_return_se']:.2f}"
    return text


def behaviour_text(metrics: Mapping[str, float]) -> str:
    """`repeat 30%, invalid 3%, entropy 0.93, KL 1.5`: of these, what is known of an iteration."""
    forms = {"repeat": "repeat {:.0%}", "invalid": "invalid {:.0%}", "entropy": "entropy {:.2f}", "kl": "KL {:.1f}"}
    known = {name: metrics[name] for name in forms if math.isfinite(metrics.get(name, math.nan))}
    return ", ".join(forms[name].format(value) for name, value in known.items())


class PlainDisplay:
    """Lines for logs: one an iteration where iterations are slow, else one about every `every` seconds."""

    def __init__(self, console: Console, *, every: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._every, self._clock = console, every, clock
        self._pace = Pace(clock)
        self._printed = -math.inf
        self._phase, self._done, self._total = "", 0, 0
        self._in_iterations = False

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def message(self, text: str) -> None:
        self._print(text)

    def phase(self, name: str, total: int | None) -> None:
        self._phase, self._done, self._total = name, 0, total or 0
        if name == "rollout" and not self._in_iterations:
            self._in_iterations = True
            self._pace.begin_iterations()
        if not self._in_iterations:
            self._print(f"{name} ...")

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        if self._clock() - self._printed >= self._every:
            of = f"/{self._total}" if self._total else ""
            self._print(f"{self._phase} {self._done}{of}  {self._pace.text()}")

    def calling(self, what: str) -> None:
        pass

    def iteration(self, number: int, total: int, metrics: Mapping[str, float]) -> None:
        self._pace.iteration(number, total, metrics)
        evaluated = evaluation_text(metrics)
        if evaluated or number == total or self._clock() - self._printed >= self._every:
            self._print("  ".join(filter(None, [self._pace.text(), behaviour_text(metrics), evaluated])))

    def _print(self, text: str) -> None:
        self._printed = self._clock()
        # No wrapping: a line of a log stays one line, whatever width was guessed.
        self._console.print(escape(text), soft_wrap=True, highlight=False)


class LiveDisplay:
    """One line that is redrawn in place; messages and evaluations scroll above it."""

    def __init__(self, console: Console) -> None:
        self._pace = Pace()
        wide = console.width >= WIDE
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            *([BarColumn(bar_width=20)] if wide else []),
            TextColumn("{task.fields[count]}"),
            _PaceColumn(self._pace, short=not wide),
            console=console,
            refresh_per_second=4,
            transient=True,
        )
        self._task = self._progress.add_task("start", total=None, count="")
        self._in_iterations = False

    def __enter__(self) -> LiveDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def message(self, text: str) -> None:
        self._progress.console.print(escape(text), highlight=False)

    def phase(self, name: str, total: int | None) -> None:
        if name == "rollout" and not self._in_iterations:
            self._in_iterations = True
            self._pace.begin_iterations()
        self._progress.remove_task(self._task)  # reset() would keep the old total where the new one is not known
        self._task = self._progress.add_task(f"{name:<8}", total=total, count=self._count(0, total))

    def advance(self, steps: int = 1) -> None:
        task = self._progress.tasks[0]
        done = int(task.completed) + steps
        total = None if task.total is None else int(task.total)
        self._progress.update(self._task, completed=done, count=self._count(done, total))

    def calling(self, what: str) -> None:
        pass

    def iteration(self, number: int, total: int, metrics: Mapping[str, float]) -> None:
        self._pace.iteration(number, total, metrics)
        evaluated = evaluation_text(metrics)
        if evaluated:
            self.message(f"iteration {number}/{total}  {evaluated}")

    @staticmethod
    def _count(done: int, total: int | None) -> str:
        return f"{done}/{total}" if total else str(done) if done else ""


class _PaceColumn(ProgressColumn):
    """The pace, asked anew at every redraw so that the clocks run on."""

    def __init__(self, pace: Pace, *, short: bool) -> None:
        super().__init__()
        self._pace, self._short = pace, short

    def render(self, task: Task) -> Text:
        del task
        return Text(self._pace.text(short=self._short), style="cyan", no_wrap=True, overflow="ellipsis")
