"""Curves by hand: windows of games, bands over seeds, first reaches, round steps."""

from __future__ import annotations

import math

import numpy as np
import pytest

from archer_fast.compare.curves import Curve, first_reach, ladder, mean_band, smoothed

NAN = math.nan


def curve(x: list[float], y: list[float]) -> Curve:
    return Curve(np.array(x, dtype=float), np.array(y, dtype=float))


def smooth(games: list[float], returns: list[float], window: int) -> tuple[list[float], list[float]]:
    made = smoothed(np.array(games, dtype=float), np.array(returns, dtype=float), window)
    return made.x.tolist(), made.y.tolist()


def test_a_window_of_equal_iterations_is_a_moving_average() -> None:
    assert smooth([10, 20, 30, 40], [1, 2, 6, 4], 20) == ([20, 30, 40], [1.5, 4, 5])
    assert smooth([10, 20, 30, 40], [1, 2, 6, 4], 10) == ([10, 20, 30, 40], [1, 2, 6, 4])
    assert smooth([10, 20, 30, 40], [1, 2, 6, 4], 39) == ([40], [4])  # 39 games hold three whole iterations


def test_iterations_weigh_by_their_games() -> None:
    assert smooth([10, 40, 50], [1, 2, 4], 40) == ([40, 50], [(10 + 60) / 40, (60 + 40) / 40])
    assert smooth([10, 40], [1, 2], 5) == ([10, 40], [1, 2])  # a longer iteration is a window of its own


def test_a_return_that_is_no_number_weighs_nothing() -> None:
    assert smooth([10, 20, 30], [1, NAN, 5], 20) == ([20, 30], [1, 5])
    assert smooth([10, 20, 30], [1, NAN, 5], 10) == ([10, 30], [1, 5])
    assert smooth([10, 20], [NAN, math.inf], 10) == ([], [])


def test_no_game_no_point() -> None:
    assert smooth([], [], 10) == ([], [])
    assert smooth([4], [1], 10) == ([], [])
    assert smooth([10, 20, 20, 30], [1, 2, NAN, 3], 10) == ([10, 20, 30], [1, 2, 3])


def test_first_reach() -> None:
    it = curve([10, 20, 30], [-5, -2, -3])
    assert [first_reach(it, level) for level in (-9, -5, -4.9, -2, -1.9)] == [10, 10, 20, 20, math.inf]
    assert first_reach(curve([], []), 0) == math.inf


def test_the_band_of_three_seeds_by_hand() -> None:
    band = mean_band([curve([10, 20], [1, 2]), curve([10, 20], [2, 2]), curve([10, 20], [3, 2])])
    assert band is not None and band.n == 3
    assert (band.x.tolist(), band.mean.tolist()) == ([10, 20], [2, 2])
    half = 4.302653 / math.sqrt(3)
    assert band.low.tolist() == pytest.approx([2 - half, 2], abs=1e-5)
    assert band.high.tolist() == pytest.approx([2 + half, 2], abs=1e-5)


def test_a_band_is_where_all_seeds_are() -> None:
    band = mean_band([curve([10, 20, 30], [0, 10, 20]), curve([15, 25], [0, 0])])
    assert band is not None
    assert (band.x.tolist(), band.mean.tolist()) == ([15, 20, 25], [2.5, 5, 7.5])
    even = mean_band([curve([10, 20, 30], [0, 10, 20]), curve([15, 25], [0, 0])], points=3)
    assert even is not None and even.x.tolist() == [15, 20, 25]
    assert mean_band([curve([1, 2], [0, 0]), curve([3, 4], [0, 0])]) is None
    assert mean_band([]) is mean_band([curve([1], [0]), curve([], [])]) is None


def test_one_seed_has_no_band() -> None:
    band = mean_band([curve([1, 2], [3, 4])])
    assert band is not None and band.mean.tolist() == [3, 4] and np.isnan([band.low, band.high]).all()


@pytest.mark.parametrize(
    ("low", "high", "steps"),
    [
        (-16.8, -8.1, [-16, -14, -12, -10]),
        (-14.7, -3.9, [-14, -12, -10, -8, -6, -4]),
        (0.0, 1.0, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (-1.0, 0.02, [-0.8, -0.6, -0.4, -0.2, 0.0]),
        (0.12, 0.19, [0.13, 0.14, 0.15, 0.16, 0.17, 0.18, 0.19]),
        (-3, -3, []),
        (-3, -4, []),
        (NAN, 1, []),
    ],
)
def test_the_ladder_has_round_steps_above_the_start(low: float, high: float, steps: list[float]) -> None:
    assert ladder(low, high) == steps
