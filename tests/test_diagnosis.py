"""The figures of a diagnosis on made-up states whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from archer_fast.diagnosis import (
    TurnCalibration,
    calibration,
    centred,
    diagnose,
    explained_variance,
    turn_share,
    within_state,
)

ALL = (slice(None), slice(None))


def made_up(
    correlation: float,
    noise: float,
    shared: float = 0.0,
    *,
    states: int = 3000,
    actions: int = 5,
    num: int = 4,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Advantages of spread 1 around states of spread 9; a critic that correlates so with them; returns with noise,
    `shared` of it common to the actions of a state."""
    rng = np.random.default_rng(seed)
    exact = rng.normal(size=(states, actions))
    other = rng.normal(size=(states, actions))
    critic = correlation * exact + math.sqrt(1 - correlation**2) * other
    own, common = rng.normal(size=(states, actions, num)), rng.normal(size=(states, 1, num))
    state = 9 * rng.normal(size=(states, 1))
    returns = (exact + state)[..., None] + noise * own + shared * common
    return 0.3 * critic + 7 * state, returns, np.ones((states, actions), bool)


@pytest.mark.parametrize("shared", [0.0, 5.0])
@pytest.mark.parametrize(("true", "noise"), [(0.6, 0.0), (0.6, 2.0), (1.0, 3.0), (-0.3, 1.0), (0.0, 1.0)])
def test_truth_and_noise_recover_the_true_correlation(true: float, noise: float, shared: float) -> None:
    got = within_state(*made_up(true, noise, shared))
    reliability = 1 / (1 + noise**2 / 4)  # noise that a state's actions share falls out
    assert got.reliability == pytest.approx(reliability, abs=0.02)
    assert got.ceiling == pytest.approx(math.sqrt(reliability), abs=0.015)
    assert got.correlation == pytest.approx(true * math.sqrt(reliability), abs=0.02)
    assert got.corrected == pytest.approx(true, abs=0.03)
    assert got.critic_spread == pytest.approx(0.3, rel=0.02) and got.true_spread == pytest.approx(1.0, rel=0.04)
    assert (got.num_states, got.num_actions) == (3000, 15000)
    for value, (low, high) in (
        (got.correlation, got.correlation_interval),
        (got.corrected, got.corrected_interval),
    ):
        assert low <= value <= high and high - low < 0.1


def test_the_noise_is_unbiased_with_few_actions_and_few_returns() -> None:
    """Two actions and two returns: wherever a degree of freedom were forgotten, it would be off by a factor of two."""
    found = [
        within_state(*made_up(0.5, 2.0, states=200, actions=2, num=2, seed=s), num_resamples=2) for s in range(200)
    ]
    exact = np.array([one.true_spread**2 for one in found])
    noise = exact / np.array([one.reliability for one in found]) - exact
    assert exact.mean() == pytest.approx(1.0, abs=0.08)  # 3 standard errors
    assert noise.mean() == pytest.approx(2.0, abs=0.05)  # 4 / 2


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    hits, corrected_hits = 0, 0
    for seed in range(200):
        got = within_state(*made_up(0.4, 1.5, states=150, seed=seed), num_resamples=300)
        hits += got.correlation_interval[0] <= 0.4 * 0.8 <= got.correlation_interval[1]  # ceiling sqrt(1 / 1.5625)
        corrected_hits += got.corrected_interval[0] <= 0.4 <= got.corrected_interval[1]
    assert 182 <= hits <= 198 and 182 <= corrected_hits <= 198


def test_by_hand() -> None:
    q = np.array([[1.0, 3.0, 99.0], [0.0, 0.0, 3.0], [5.0, 99.0, 99.0]])
    mask = np.array([[True, True, False], [True, True, True], [True, False, False]])
    returns = np.full((3, 3, 2), np.nan)
    returns[0, :2] = [[0.0, 2.0], [4.0, 4.0]]
    returns[1] = [[1.0, 1.0], [1.0, 1.0], [4.0, 4.0]]
    returns[2, 0] = 7.0
    # Centred: q -1 1 | -1 -1 2; returns [-2 -1] [2 1] | -1 -1 2, of means -1.5 1.5 | -1 -1 2.
    got = within_state(q, returns, mask)
    assert (got.num_states, got.num_actions) == (2, 5)
    assert got.correlation == pytest.approx((3 + 6) / math.sqrt((2 + 6) * (4.5 + 6)))
    assert got.reliability == pytest.approx(1 - (0.25 + 0.25) / 10.5)  # variances of .5 each, halved
    assert got.corrected == pytest.approx(got.correlation / math.sqrt(1 - 0.5 / 10.5))
    assert got.critic_spread == pytest.approx(math.sqrt(8 / 3)) and got.true_spread == pytest.approx(math.sqrt(10 / 3))
    np.testing.assert_allclose(centred(q, mask)[0], [-1, 1, 0])


def test_a_critic_that_knows_the_turn_alone_explains_much_and_ranks_nothing() -> None:
    rng = np.random.default_rng(3)
    turn = rng.integers(0, 20, 256).astype(np.int32)
    value = -20.0 + turn
    returns = value[:, None, None] + rng.normal(size=(256, 8, 1)) + rng.normal(size=(256, 8, 8))
    taken_turn = np.tile(np.arange(20, dtype=np.int32), 300)
    taken = -20.0 + taken_turn + 2 * rng.normal(size=6000)
    mask = np.ones((256, 8), bool)
    for jitter in (0.0, 1e-3):  # values that are exactly alike, and nearly
        q = value[:, None] + jitter * rng.normal(size=(256, 8)) / 3 + 0.1
        got = diagnose(q, returns, mask, -20.0 + taken_turn, taken, taken_turn)
        low, high = got.within.correlation_interval
        assert abs(got.within.correlation) < 0.06 and low <= 0 <= high
        assert got.within.ceiling > 0.9
        assert got.explained_variance == pytest.approx(1 - 4 / (4 + 399 / 12), abs=0.01)
        assert got.turn_share == pytest.approx(got.explained_variance, abs=0.01)
    exact = within_state(np.repeat(value[:, None] + 0.1, 8, 1), returns, mask)
    assert exact.correlation == 0.0 and exact.critic_spread == 0.0 and exact.correlation_interval == (0.0, 0.0)


def test_more_states_of_the_same_kind_narrow_the_interval() -> None:
    def width(states: int) -> float:
        low, high = within_state(*made_up(0.5, 1.0, states=states)).correlation_interval
        return high - low

    assert width(1600) == pytest.approx(width(100) / 4, rel=0.3)


def test_what_is_not_known_is_nan() -> None:
    q, returns, mask = made_up(0.5, 1.0, states=6)
    nothing = within_state(q, returns, np.zeros_like(mask))
    assert (nothing.num_states, nothing.num_actions) == (0, 0)
    assert math.isnan(nothing.correlation) and math.isnan(nothing.corrected_interval[0])
    alike = within_state(q, np.ones_like(returns), mask)
    assert math.isnan(alike.correlation) and math.isnan(alike.ceiling) and alike.true_spread == 0.0
    noise = np.random.default_rng(0).normal(size=(2, 1, 2)) * np.array([[[1.0], [-1.0]]]) * np.array([1, -1])
    only_noise = within_state(np.array([[0.0, 1.0], [0.0, 2.0]]), noise, np.ones((2, 2), bool))
    assert only_noise.reliability < 0 and math.isnan(only_noise.ceiling) and math.isnan(only_noise.corrected)
    assert math.isnan(explained_variance(np.zeros(3), np.ones(3)))
    assert math.isnan(turn_share(np.zeros(0), np.zeros(0, np.int32))) and calibration(*np.zeros((3, 0))) == []


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 2), (3, 2, 4), (3, 3)), r"wanted \[S, K\], \[S, K\], \[S, K, M\], got \[3, 2\], \[3, 3\], \[3, 2, 4\]"),
        (((3, 2), (2, 3, 4), (3, 2)), r"got \[3, 2\], \[3, 2\], \[2, 3, 4\]"),
        (((3, 2), (3, 2), (3, 2)), r"got \[3, 2\], \[3, 2\], \[3, 2\]"),
        (((3, 2), (3, 2, 1), (3, 2)), "returns: wanted at least 2 of each action, got 1"),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    q, returns, mask = shapes
    with pytest.raises(ValueError, match=message):
        within_state(np.zeros(q), np.zeros(returns), np.ones(mask, bool))


def test_the_turns_of_whole_games() -> None:
    turn = np.array([0, 1, 0, 1, 2], np.int32)
    returns = np.array([-3.0, -2.0, -1.0, 0.0, -4.0])
    assert calibration(np.array([-1.0, -1.0, -2.0, -2.0, 5.0]), returns, turn) == [
        TurnCalibration(0, 2, -1.5, -2.0),
        TurnCalibration(1, 2, -1.5, -1.0),
        TurnCalibration(2, 1, 5.0, -4.0),
    ]
    assert turn_share(returns, turn) == pytest.approx(1 - 4 / 10)  # 1 + 1 + 1 + 1 within, around -2, -1, -4
    assert explained_variance(returns + 5, returns) == 1.0
    assert explained_variance(np.zeros(5), returns) == 0.0
