"""REINFORCE: baselines as functions, and what each mode credits an iteration's actions with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_learners import MakeLM, make_learner, random_games, turns_of

from archer_fast.algorithms.reinforce import Reinforce, leave_one_out, mean_by
from archer_fast.config import BufferConfig, Config, CriticConfig, ReinforceConfig, RolloutConfig
from archer_fast.meters import Meters
from archer_fast.trajectory import Trajectory

pytestmark = pytest.mark.usefixtures("one_thread")
NUMBERS = st.floats(-100, 100, width=32)
KEYED = st.lists(st.tuples(NUMBERS, st.integers(0, 3)), max_size=20)


# -- functions -------------------------------------------------------------------------------------


def test_the_examples_of_the_docstrings() -> None:
    assert mean_by(np.array([1.0, 3, 5]), np.array([7, 7, 2])).tolist() == [2, 2, 5]
    assert leave_one_out(np.array([1.0, 3, 5]), np.array([7, 7, 2])).tolist() == [-2, 2, 0]


@given(KEYED)
def test_means_and_others_are_those_of_lists(pairs: list[tuple[float, int]]) -> None:
    values, keys = np.array([v for v, _ in pairs]), np.array([k for _, k in pairs], np.int64)
    means, apart = mean_by(values, keys), leave_one_out(values, keys)
    for i, (value, key) in enumerate(pairs):
        same = [v for v, k in pairs if k == key]
        others = [v for j, (v, k) in enumerate(pairs) if k == key and j != i]
        assert means[i] == pytest.approx(sum(same) / len(same), abs=1e-9)
        assert apart[i] == pytest.approx(value - sum(others) / len(others) if others else 0, abs=1e-9)


@given(KEYED, NUMBERS)
def test_a_group_that_earned_alike_learns_nothing_and_its_level_does_not_matter(
    pairs: list[tuple[float, int]], shift: float
) -> None:
    values, keys = np.array([v for v, _ in pairs]), np.array([k for _, k in pairs], np.int64)
    assert (leave_one_out(keys * 3.0, keys) == 0).all()
    apart = leave_one_out(values, keys)
    np.testing.assert_allclose(leave_one_out(values + shift * keys, keys), apart, atol=1e-6)
    for key in set(keys.tolist()):
        assert apart[keys == key].sum() == pytest.approx(0, abs=1e-6)


# -- a learner -------------------------------------------------------------------------------------


def make_config(max_trajectories: int = 64, **reinforce: Any) -> Config:
    settings = {"gamma": 0.8, "group_size": 3, "epochs": 1, "batch_games": 16, "normalise_advantages": False}
    return Config(
        algorithm="reinforce",
        reinforce=ReinforceConfig(**settings | reinforce),
        critic=CriticConfig(hidden_size=16),
        rollout=RolloutConfig(games=3, max_new_tokens=4),
        buffer=BufferConfig(max_trajectories=max_trajectories, max_tokens=4096),
    )


def grouped(seeds: list[int]) -> list[Trajectory]:
    return [
        Trajectory(g.turns, g.final_observation_ids, g.terminated, g.truncated, {"seed": seed})
        for g, seed in zip(random_games(len(seeds)), seeds, strict=True)
    ]


def credits(learner: Reinforce, games: list[Trajectory], monkeypatch: pytest.MonkeyPatch) -> dict[int, list[float]]:
    """What the games of one iteration are credited with, by id and turn."""
    found: dict[int, list[float]] = {}
    step = Reinforce.step_on_games

    def spy(self: Reinforce, games: np.ndarray, advantages: Any, *rest: Any, **more: Any) -> None:
        found.update({game: own.tolist() for game, own in advantages.items()})
        assert sorted(found) == games.tolist()
        step(self, games, advantages, *rest, **more)

    monkeypatch.setattr(Reinforce, "step_on_games", spy)
    learner.insert(games, Meters())
    meters = Meters()
    learner.update_critic(meters)
    learner.update_actor(meters)
    assert meters.read()["actor_steps"] == 1
    return found


def returns_by_hand(game: Trajectory) -> list[float]:
    return [sum(0.8**k * t.reward for k, t in enumerate(game.turns[i:])) for i in range(game.num_turns)]


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("baseline", ["none", "batch", "group"])
def test_credit(make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch, baseline: str, normalise: bool) -> None:
    learner = make_learner(make_lm, make_config(baseline=baseline, normalise_advantages=normalise))
    learner.insert(random_games(2, seed=3), Meters())  # of an earlier iteration
    games = grouped([5, 5, 5, 9, 9, 9])
    got = credits(learner, games, monkeypatch)
    returns = [returns_by_hand(game) for game in games]
    wanted: dict[int, list[float]] = {}
    for i, (game, own) in enumerate(zip(games, returns, strict=True)):
        if baseline == "group":
            others = [returns[j][0] for j in range(6) if j != i and j // 3 == i // 3]
            wanted[2 + i] = [own[0] - sum(others) / 2] * game.num_turns
        elif baseline == "batch":
            levels = [[r[t] for r in returns if t < len(r)] for t in range(game.num_turns)]
            wanted[2 + i] = [x - sum(level) / len(level) for x, level in zip(own, levels, strict=True)]
        else:
            wanted[2 + i] = own
    assert got.keys() == wanted.keys()
    flat, flat_wanted = ([x for game in sorted(d) for x in d[game]] for d in (got, wanted))
    rms = float(np.sqrt(np.mean(np.square(flat_wanted)))) if normalise else 1.0
    assert flat == pytest.approx([x / rms for x in flat_wanted], rel=1e-4, abs=1e-5)
    assert len(flat) == len(turns_of(games))


def test_a_game_that_was_dropped_leaves_its_group_together(make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three games with seed 5 are left, which are compared, and one with seed 9, compared with nobody."""
    games = grouped([5, 5, 9])
    got = credits(make_learner(make_lm, make_config(baseline="group")), games, monkeypatch)
    first = [returns_by_hand(game)[0] for game in games]
    assert got[0] == pytest.approx([first[0] - first[1]], rel=1e-4)
    assert got[1] == pytest.approx([first[1] - first[0]] * 2, rel=1e-4)
    assert got[2] == [0, 0, 0]


def test_games_that_the_buffer_cannot_hold_are_left_out(make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six games the last four stay, and the seeds are theirs."""
    games = grouped([5, 5, 5, 9, 9, 9])
    learner = make_learner(make_lm, make_config(max_trajectories=4, baseline="group"))
    got = credits(learner, games, monkeypatch)
    first = [returns_by_hand(game)[0] for game in games]
    assert learner.newest.tolist() == sorted(got) == [2, 3, 4, 5]
    assert got[2] == [0, 0, 0]
    assert got[3] == pytest.approx([first[3] - (first[4] + first[5]) / 2] * 4, rel=1e-4)
