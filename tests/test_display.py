"""The live line and the plain lines of a run."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from archer_fast.display import (
    LiveDisplay,
    Pace,
    PlainDisplay,
    behaviour_text,
    clock_text,
    evaluation_text,
    make_display,
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_clock_text() -> None:
    assert [clock_text(s) for s in (0, 59.4, 65, 3725)] == ["0:00", "0:59", "1:05", "1:02:05"]


def test_pace_counts_iterations_alone() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.left is None
    clock.now += 60  # warm start
    pace.iteration(0, 10, {"eval_return": -3.0})  # the evaluation before the first iteration
    assert pace.left is None
    clock.now += 4
    pace.iteration(1, 10, {"return": -10.0, "tokens_per_second": 12345.6})
    assert pace.left == 36
    clock.now += 2  # two of the four seconds of iteration 2
    assert pace.left == 34
    clock.now += 100  # it takes longer than the mean: the estimate waits
    assert pace.left == 32
    assert pace.text() == "iteration 1/10  return -10.00  12,346 tokens/s  2:46 gone, 0:32 left"


def test_pace_after_a_resume_and_at_the_end() -> None:
    clock = Clock()
    pace = Pace(clock)
    clock.now += 5
    pace.iteration(41, 42, {})
    assert pace.left == 5
    clock.now += 5
    pace.iteration(42, 42, {})
    clock.now += 30
    pace.iteration(42, 42, {"eval_return": -1.0})  # the evaluation after the last
    assert pace.left == 0
    assert pace._spent == 10


def test_running_mean_of_returns_forgets() -> None:
    pace = Pace(Clock())
    pace.iteration(1, 9, {"return": -10.0})
    pace.iteration(2, 9, {"return": -5.0})
    assert pace.mean_return == pytest.approx(-9.0)
    pace.iteration(3, 9, {"return": math.nan})
    pace.iteration(4, 9, {})
    assert pace.mean_return == pytest.approx(-9.0)
    assert pace.text().startswith("iteration 4/9  return -9.00  0"), "no standard error was told"


def test_the_running_mean_has_its_standard_error_and_a_collapse_is_seen_while_it_lasts() -> None:
    pace = Pace(Clock())
    pace.iteration(1, 9, {"return": -10.0, "return_se": 0.5})
    assert pace.text().startswith("iteration 1/9  return -10.00 ± 0.50  0:00 gone")
    pace.iteration(2, 9, {"return": -5.0, "return_se": 1.0, "collapsed": 1.0})
    assert pace.standard_error == pytest.approx((0.4**2 + 0.2**2) ** 0.5)
    assert pace.text().startswith("iteration 2/9  return -9.00 ± 0.45  collapsed  0:00 gone")
    pace.iteration(2, 9, {"eval_return": -9.0})
    assert pace.collapsed, "an evaluation tells nothing of it"
    pace.iteration(3, 9, {"collapsed": 0.0})
    assert not pace.collapsed


def test_evaluation_text_says_what_is_there() -> None:
    assert evaluation_text({"return": -1.0}) is None
    assert evaluation_text({"eval_return": -14.2}) == "eval return -14.20"
    every = {"eval_return": -14.2, "eval_return_se": 0.314, "eval_win_rate": 0.42, "greedy_return": -13.9}
    assert evaluation_text(every) == "eval return -14.20 ± 0.31, win rate 42%, greedy return -13.90"
    assert evaluation_text(every | {"greedy_return_se": 0.25}).endswith("greedy return -13.90 ± 0.25")


def test_behaviour_text_says_what_is_there() -> None:
    assert behaviour_text({"return": -1.0, "kl": math.nan}) == ""
    every = {"kl": 1.52, "guess": 0.9, "repeat": 0.304, "invalid": 0.0, "entropy": 0.934}
    assert behaviour_text(every) == "repeat 30%, invalid 0%, entropy 0.93, KL 1.5"


def plain(clock: Clock) -> tuple[PlainDisplay, io.StringIO]:
    out = io.StringIO()
    return PlainDisplay(Console(file=out, width=40), every=10, clock=clock), out


def test_plain_lines_are_rationed_by_time() -> None:
    clock = Clock()
    display, out = plain(clock)
    with display:
        display.message("device cpu [red]1[/red] thread, and a text that is longer than the console is wide")
        display.phase("warm start", 240)
        for _ in range(240):
            clock.now += 0.125  # no rounding: 30 s are 30 s
            display.advance()
        for number in range(1, 5):
            display.phase("rollout", 16)
            display.advance(16)
            clock.now += 4
            display.iteration(number, 4, {"return": -3.0, **({"eval_return": -2.0} if number == 2 else {})})
    lines = out.getvalue().splitlines()
    assert lines[0] == "device cpu [red]1[/red] thread, and a text that is longer than the console is wide"
    assert lines[1] == "warm start ..."
    gone = {80: "0:10", 160: "0:20", 240: "0:30"}
    assert lines[2:5] == [f"warm start {step}/240  {text} gone" for step, text in gone.items()]
    shown = lines[5:]
    assert [line.split()[1] for line in shown] == ["2/4", "4/4"], "what was evaluated, and the last"
    assert shown[0].endswith("eval return -2.00")


def test_plain_display_prints_slow_iterations_one_by_one() -> None:
    clock = Clock()
    display, out = plain(clock)
    for number in range(1, 4):
        clock.now += 11
        display.iteration(number, 100, {})
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/100", "2/100", "3/100"]
    clock.now += 11
    display.iteration(4, 100, {"repeat": 0.25, "eval_return": -2.0})
    assert out.getvalue().endswith(" left  repeat 25%  eval return -2.00\n")


def test_a_pipe_gets_plain_lines_and_a_terminal_the_live_one() -> None:
    assert isinstance(make_display(Console(file=io.StringIO())), PlainDisplay)
    assert isinstance(make_display(Console(file=io.StringIO(), force_terminal=True)), LiveDisplay)


def test_live_line_shows_phase_and_pace_and_keeps_messages() -> None:
    out = io.StringIO()
    with LiveDisplay(Console(file=out, force_terminal=True, width=150)) as display:
        display.message("attention [sdpa]")
        display.phase("critic", 50)
        display.advance(20)
        display.iteration(3, 80, {"return": -15.2, "tokens_per_second": 18400.0})
        display._progress.refresh()
        display.iteration(4, 80, {"eval_return": -14.0})
        display.phase("evaluate", None)
        display.advance()
        display._progress.refresh()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "attention [sdpa]\n" in text
    assert re.search(r"critic .* 20/50 iteration 3/80  return -15\.20  18,400 tokens/s  0:0\d gone", text)
    assert "iteration 4/80  eval return -14.00\n" in text
    assert re.search(r"evaluate .* 1 iteration 4/80", text)


def test_a_narrow_terminal_still_sees_the_time_left() -> None:
    long = {"return": -15.21, "return_se": 0.25, "tokens_per_second": 18400.0, "utilisation": 0.314, "collapsed": 1.0}
    shown = {}
    for width in (80, 147):
        out = io.StringIO()
        with LiveDisplay(Console(file=out, force_terminal=True, width=width)) as display:
            display.iteration(1, 80, long)
            display.phase("evaluate", 128)
            display.advance(128)
            display._progress.refresh()
        lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).replace("\r", "\n").splitlines()
        shown[width] = [line.rstrip() for line in lines if "128/128" in line][-1]
        assert len(shown[width]) <= width
    assert re.search(r"128/128 iteration 1/80  return -15\.21 ± 0\.25  collapsed  0:\d\d left$", shown[80])
    whole = r"━+ 128/128 iteration .* 18,400 tokens/s, 31% of the peak  0:\d\d gone, 0:\d\d left$"
    assert re.search(whole, shown[147])


def test_a_phase_forgets_the_size_of_the_one_before() -> None:
    out = io.StringIO()
    with LiveDisplay(Console(file=out, force_terminal=True, width=150)) as display:
        display.phase("critic", 50)
        display.advance(50)
        display.phase("saving", None)
        display._progress.refresh()
        task = display._progress.tasks[0]
        assert (task.description.strip(), task.total, task.completed) == ("saving", None, 0)
        assert len(display._progress.tasks) == 1


def test_the_live_line_is_gone_when_the_run_fails() -> None:
    display = LiveDisplay(Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(RuntimeError, match="x"), display:
        raise RuntimeError("x")
    assert display._progress.finished or not display._progress.live.is_started
