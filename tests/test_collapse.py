"""What counts as a collapse: the stories of NOTES.md do, healthy runs do not; one message a story."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded_rows import CRISIS, HEALTHY, START

from archer_fast.collapse import CollapseDetector
from archer_fast.collapse_response import CollapseResponse
from archer_fast.config import CollapseConfig

Row = dict[str, float]
NAMES = ("return", "return_se", "invalid", "repeat", "entropy", "kl")
NUMBER_START = {"return": -14.7, "return_se": 0.3, "invalid": 0.03, "repeat": 0.2, "entropy": 1.3, "kl": 0.0}


def rows(table: Sequence[Sequence[float]], first: int = 1) -> list[Row]:
    named = [{**dict(zip(NAMES, values, strict=True)), "action_length": 3.0} for values in table]
    return [{"iteration": i, **row} for i, row in enumerate(named, first)]


def drift(start: Row, end: Row, over: int, stay: int) -> list[Row]:
    """`over` iterations from one row of figures to another, `stay` there."""
    shares = [*np.linspace(0, 1, over), *[1.0] * stay]
    return rows([[float(start[n] + t * (end.get(n, start[n]) - start[n])) for n in NAMES] for t in shares])


def said(seen: Sequence[Row], start: Row = START, **settings: float) -> list[str]:
    detector = CollapseDetector(CollapseConfig(**settings), start)  # type: ignore[arg-type]
    return [text for row in seen for text in detector.see(row)]


# -- stories ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [HEALTHY, CRISIS], ids=["healthy", "crisis"])
def test_recorded_runs_that_went_well_are_left_alone(table: Sequence[Sequence[float]]) -> None:
    assert said(rows(table)) == []


def test_a_healthy_run_of_another_kind() -> None:
    """As far as healthy runs were seen to go, and a task solved by a policy that is sure of itself."""
    end = {"return": -9.0, "return_se": 0.5, "repeat": 0.45, "kl": 9.0, "entropy": 0.9, "invalid": 0.2}
    assert said(drift(START, end, 30, 20)) == []
    solved = {"return": -3.2, "return_se": 0.1, "repeat": 0.0, "kl": 20.0, "entropy": 0.02, "invalid": 0.0}
    assert said(drift(START, solved, 30, 20)) == []


@pytest.mark.parametrize(
    ("start", "end", "names"),
    [
        # guess-number, lr 6e-4: 86 % invalid after 5 iterations of actor steps
        (NUMBER_START, {"return": -19.5, "return_se": 0.1, "invalid": 0.86}, {"return", "invalid"}),
        # lr 3e-4, 8 steps: 80 % invalid, KL 15
        (NUMBER_START, {"return": -19.0, "return_se": 0.2, "invalid": 0.8, "kl": 15.0}, {"return", "invalid", "kl"}),
        # softmax(Q) weights: 91 % invalid
        (NUMBER_START, {"return": -19.8, "return_se": 0.1, "invalid": 0.91}, {"return", "invalid"}),
        # 5e-4: 78 % invalid, which it recovered from in time
        (NUMBER_START, {"return": -18.5, "return_se": 0.2, "invalid": 0.78}, {"return", "invalid"}),
    ],
)
def test_known_collapses_are_named(start: Row, end: Row, names: set[str]) -> None:
    detector = CollapseDetector(CollapseConfig(), start)
    messages = [text for row in drift(start, end, 5, 6) for text in detector.see(row)]
    assert detector.collapsed.keys() == names
    assert messages and all(text.startswith("collapse in iteration ") for text in messages)


def test_a_collapse_onto_few_guesses_that_still_beats_the_start_is_named() -> None:
    """10 objects, lr 3e-4: -11.2 after 640 games, then 86 % repeats and entropy .11; its best was better."""
    best = START | {"return": -11.2, "return_se": 0.5, "repeat": 0.4, "entropy": 0.9}
    fallen = {"return": -15.0, "return_se": 0.5, "repeat": 0.86, "entropy": 0.11}
    story = [*drift(START, best, 5, 4), *drift(best, fallen, 8, 8)]
    story = [row | {"iteration": i} for i, row in enumerate(story, 1)]
    (message,) = said(story)
    assert re.fullmatch(
        r"collapse in iteration \d+: repeat 8\d% of turns \(start 18%\); entropy 0\.1\d nats a token \(start 1\.33\)",
        message,
    )


# -- rules -----------------------------------------------------------------------------------------


def constant(n: int = 8, **figures: float) -> list[Row]:
    return [{"iteration": i, **START, "action_length": 3.0, **figures} for i in range(1, n + 1)]


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"return": -18.3, "return_se": 0.6}, "return -18.30 ± 0.27 (start -16.55 ± 0.27)"),  # 4.6 standard errors
        ({"return": -18.0, "return_se": 0.6}, None),  # 3.8
        ({"invalid": 0.52}, "invalid 52% of turns (start 3%)"),  # .031 + .5 * .969 = .5155
        ({"invalid": 0.51}, None),
        ({"repeat": 0.80}, "repeat 80% of turns (start 18%)"),  # .18 + .75 * .82 = .795
        ({"repeat": 0.79}, None),
        ({"entropy": 0.19}, "entropy 0.19 nats a token (start 1.33)"),  # .15 * 1.33 = .1995
        ({"entropy": 0.21}, None),
        ({"kl": 7.6}, "KL to the start 7.6 nats an action of 3.0 tokens"),  # 2.5 * 3
        ({"kl": 7.4}, None),
        ({"kl": 7.6, "action_length": 20.0}, None),
        ({"guess": 1.0}, None),
    ],
)
def test_thresholds(figures: Row, words: str | None) -> None:
    assert said(constant(**figures)) == ([] if words is None else [f"collapse in iteration 5: {words}"])


def test_settings_move_the_thresholds() -> None:
    assert said(constant(invalid=0.52), max_invalid=0.6) == said(constant(repeat=0.8), max_repeat=0.8) == []
    assert said(constant(entropy=0.19), min_entropy=0.1) == said(constant(kl=7.6), max_kl=3) == []
    assert said(constant(**{"return": -18.3, "return_se": 0.6}), return_errors=5) == []
    assert said(constant(invalid=0.52), window=2)[0].startswith("collapse in iteration 2: ")
    assert said(constant(invalid=1.0, repeat=1.0), max_invalid=1, max_repeat=1) == []


def test_a_start_that_is_all_invalid_cannot_collapse_into_it() -> None:
    start = START | {"invalid": 1.0, "return": -20.0, "return_se": 0.0}
    assert said(constant(**{"invalid": 1.0, "return": -20.0, "return_se": 0.0}), start) == []


def test_behaviour_is_no_collapse_while_the_return_is_the_best_there_was() -> None:
    sure = {"entropy": 0.05, "return_se": 0.5}
    assert said(constant(**sure, **{"return": -12.0})) == []
    assert len(said(constant(**sure, **{"return": -16.3}))) == 1, "no better than the start"
    fell = [*constant(**sure, **{"return": -8.0}), *constant(**sure, **{"return": -12.0})]
    assert len(said(fell)) == 1, "better than the start, but it was clearly better before"


def test_what_is_missing_or_not_finite_decides_nothing() -> None:
    bad = {"invalid": 0.9}
    assert said([{"iteration": i} for i in range(9)]) == []
    assert said(constant(**{"return": math.nan}, **bad)) == []
    short = [{name: value for name, value in row.items() if name in ("iteration", "return")} for row in constant()]
    assert said(short) == []
    mixed = [row if i % 2 else {"iteration": i} for i, row in enumerate(constant(10, **bad))]
    assert [text.split(":")[0] for text in said(mixed)] == ["collapse in iteration 10"], "the fifth that tells"


def test_games_that_an_offline_iteration_was_probed_with_count_as_its_own() -> None:
    probed = [
        {name: value for name, value in row.items() if not name.startswith("return")}
        | {"probe_return": -20.0, "probe_return_se": 0.1}
        for row in constant()
    ]
    assert said(probed) == ["collapse in iteration 5: return -20.00 ± 0.04 (start -16.55 ± 0.27)"]


# -- once, and over --------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=12, max_size=60))
def test_each_thing_is_said_once_until_it_has_recovered(bad: list[bool]) -> None:
    """An episode ends when the mean of the window was below the threshold `window` times in a row."""
    window = 3
    seen = [row | {"iteration": i} for i, (is_bad, row) in enumerate(zip(bad, constant(len(bad)), strict=True))]
    seen = [row | ({"invalid": 0.9} if is_bad else {}) for row, is_bad in zip(seen, bad, strict=True)]
    wanted, in_episode, clear = [], False, 0
    for i in range(window - 1, len(bad)):
        holds = sum(bad[i - window + 1 : i + 1]) >= 2  # two of three: .61 of .5155
        clear = 0 if holds else clear + 1
        if holds and not in_episode:
            wanted.append(f"collapse in iteration {i}")
        if not holds and in_episode and clear == window:
            wanted.append(f"recovered in iteration {i}")
        in_episode = holds or (in_episode and clear < window)
    assert [text.split(":")[0] for text in said(seen, window=window)] == wanted


@given(st.lists(st.sampled_from(rows(CRISIS) + constant(invalid=0.9)), max_size=20), st.integers(0, 20))
def test_a_detector_goes_on_from_its_state(seen: list[Row], cut: int) -> None:
    whole = CollapseDetector(CollapseConfig(window=2), START)
    wanted = [whole.see(row) for row in seen]
    first = CollapseDetector(CollapseConfig(window=2), START)
    got = [first.see(row) for row in seen[:cut]]
    second = CollapseDetector(CollapseConfig(window=2))
    second.load_state(json.loads(json.dumps(first.state())))
    assert got + [second.see(row) for row in seen[cut:]] == wanted
    assert second.state() == whole.state()


# -- what follows ----------------------------------------------------------------------------------


class Run:
    def __init__(self, action: str, **settings: float) -> None:
        self.heard: list[str] = []
        self.restored = 0
        config = CollapseConfig(action=action, window=2, **settings)  # type: ignore[arg-type]
        self.response = CollapseResponse(config, self._restore, self.heard.append)
        self.response.detector.start = START

    def _restore(self) -> str:
        self.restored += 1
        return "as it was"

    def play(self, seen: Sequence[Row]) -> list[bool]:
        return [self.response.check(row) for row in seen]


def test_to_warn_is_to_say_it() -> None:
    run = Run("warn")
    assert run.play(constant(4, invalid=0.9)) == [False, True, True, True]
    assert run.play(constant(4)) == [False] * 4
    assert run.heard == [
        "collapse in iteration 2: invalid 90% of turns (start 3%)", "recovered in iteration 2: invalid",
    ]  # fmt: skip
    assert run.restored == 0 and run.response.stopped_by is None
    assert run.response.summary() == {"collapses": run.heard, "restores": 0}
    assert Run("warn").response.summary() == {}


def test_to_stop_is_to_say_why() -> None:
    run = Run("stop")
    assert run.play(constant(2, invalid=0.9)) == [False, True]
    why = "collapse in iteration 2: invalid 90% of turns (start 3%)"
    assert run.heard == [why, f"stopped by the {why}"]
    assert run.response.stopped_by == run.response.summary()["stopped_by"] == why


def test_restores_are_counted_and_the_next_policy_is_judged_by_its_own_rows() -> None:
    run = Run("restore", max_restores=2)
    assert run.play(constant(5, invalid=0.9)) == [False, True, False, True, False]
    assert run.restored == 2 and run.response.stopped_by is None
    assert run.heard[1] == "restore 1 of 2: as it was"
    other = Run("restore", max_restores=2)
    other.response.load_state(json.loads(json.dumps(run.response.state())))
    assert other.play(constant(1, invalid=0.9)) == [True]
    assert other.restored == 0, "two there were, and they did not help"
    assert (
        other.response.stopped_by is not None and "iteration 1, after 2 restores: invalid" in other.response.stopped_by
    )


def test_what_was_stopped_goes_on_where_it_is_now_to_warn() -> None:
    stopped = Run("stop")
    stopped.play(constant(2, invalid=0.9))
    for action, wanted in (("stop", stopped.response.stopped_by), ("warn", None)):
        again = Run(action)
        again.response.load_state(stopped.response.state())
        assert again.response.stopped_by == wanted
