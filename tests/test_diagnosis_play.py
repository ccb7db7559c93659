"""Measured states: returns against exact ones and against games that were never interrupted, and what is left out."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from archer_fast.backbone import Backbone
from archer_fast.config import RolloutConfig, TaskConfig, WarmStartConfig
from archer_fast.diagnosis_play import MeasuredStates, check_resamplable, first_of_each, measure_states, spread_turns
from archer_fast.envs import registry
from archer_fast.envs.guess_number import TASK, GuessNumber
from archer_fast.envs.players import play_scripted
from archer_fast.evaluation import encoder, evaluate_policy, evaluation_seeds
from archer_fast.rollout.interact import TooManyDroppedGames
from archer_fast.tiny_model import TinyModel, build_tiny_model
from archer_fast.warm_start import clone, to_trajectory

pytestmark = pytest.mark.usefixtures("one_thread")
ROLLOUT = RolloutConfig(num_slots=64, max_new_tokens=2)


@pytest.fixture(scope="module")
def policy() -> tuple[Backbone, int]:
    """A clone of the player that guesses at random, after so few steps that it says nonsense now and then."""
    sizes = TinyModel(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, max_positions=128)
    backbone, stop = build_tiny_model(TASK.vocabulary_text(high=4), sizes, seed=0)
    games = [play_scripted(GuessNumber(4, 4), TASK.make_player(), seed) for seed in range(300)]
    dialogues = [to_trajectory(game, encoder(backbone.tokenizer), stop) for game in games]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    clone(backbone, dialogues, WarmStartConfig(steps=80, lr=1e-2), 0, lambda step: None)
    torch.set_num_threads(threads)
    return backbone, stop


def measure(policy: tuple[Backbone, int], max_turns: int = 3, **options: Any) -> MeasuredStates:
    task = TaskConfig(options.pop("name", "guess-number"), {"high": 4, "max_turns": max_turns})
    settings = {"gamma": 0.5, "num_states": 12, "num_actions": 6, "num_continuations": 3} | options
    rollout = settings.pop("rollout", ROLLOUT)
    return measure_states(*policy, task, rollout, **settings)  # type: ignore[arg-type]


def text_of(policy: tuple[Backbone, int], states: MeasuredStates, s: int, k: int) -> str:
    text: str = policy[0].tokenizer.decode([i for i in states.action(s, k) if i != policy[1]])
    return text


def left_of(policy: tuple[Backbone, int], states: MeasuredStates, s: int) -> list[int]:
    """The numbers that a state's dialogue leaves possible: by playing it with each."""
    decode, turns = policy[0].tokenizer.decode, states.games[s].turns[: states.turn[s] + 1]

    def agrees(number: int) -> bool:
        env = GuessNumber(4, 9)
        env.reset(0, {"number": number})
        for turn, behind in itertools.pairwise(turns):
            text, _, over, _, _ = env.step(decode([i for i in turn.action_ids.tolist() if i != policy[1]]))
            if over or text != decode(behind.observation_ids):
                return False
        return True

    return [number for number in range(1, 5) if agrees(number)]


def test_an_actions_own_reward_is_that_of_the_hidden_numbers_that_are_left(policy: tuple[Backbone, int]) -> None:
    """With gamma 0 the return is the action's reward: 0 if it hits, which is exact; the same number for all actions."""
    states = measure(policy, gamma=0.0, num_states=24, num_continuations=150)
    seen_hits = False
    for s in range(24):
        left = left_of(policy, states, s)
        hits = np.zeros(150)
        for k in states.valid[s].nonzero()[0]:
            text = text_of(policy, states, s, k).strip()
            chance = 1 / len(left) if text in map(str, left) else 0.0
            won = states.returns[s, k] == 0.0
            assert set(states.returns[s, k]) <= {0.0, -1.0}
            assert won.mean() == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 150) ** 0.5)
            hits += won
            seen_hits |= 0 < chance < 1
        texts = {text_of(policy, states, s, k).strip() for k in states.valid[s].nonzero()[0]}
        if len(texts) == states.valid[s].sum():
            assert hits.max() <= 1, "one number is hidden from all actions of a state"
    assert seen_hits and {0, 1, 2} == set(states.turn.tolist())


def test_returns_are_those_of_games_that_were_never_interrupted(policy: tuple[Backbone, int]) -> None:
    """The value of a first action, by continuations and by thousands of whole games that began with it."""
    task = TaskConfig("guess-number", {"high": 4, "max_turns": 4})
    whole = defaultdict(list)
    for game in evaluate_policy(
        *policy, task, RolloutConfig(num_slots=512, max_new_tokens=2), games=4000, seed=3
    ).trajectories:
        rewards = [turn.reward * 0.9**i for i, turn in enumerate(game.turns)]
        whole[tuple(game.turns[0].action_ids.tolist())].append(sum(rewards))
    tried = defaultdict(list)
    rollout = RolloutConfig(num_slots=512, max_new_tokens=2)
    states = measure(policy, 4, gamma=0.9, num_states=24, num_continuations=60, rollout=rollout)
    for s, k in zip(*(states.valid & (states.turn == 0)[:, None]).nonzero(), strict=True):
        tried[tuple(states.action(s, k))] += states.returns[s, k].tolist()
    compared = [action for action in tried if len(tried[action]) >= 60 and len(whole[action]) >= 60]
    assert len(compared) >= 5
    for action in compared:
        ours, theirs = np.array(tried[action]), np.array(whole[action])
        error = (ours.var() / ours.size + theirs.var() / theirs.size) ** 0.5
        assert abs(ours.mean() - theirs.mean()) < 4 * error


def test_games_are_held_out_and_the_seed_decides_everything(policy: tuple[Backbone, int]) -> None:
    told = []
    first = measure(policy, seed=2, on_continuation=lambda: told.append(1))
    assert [game.info["seed"] for game in first.games] == list(evaluation_seeds(2, 12))
    assert len(told) == 12 * 6 * 3
    again, other = measure(policy, seed=2), measure(policy, seed=3)
    for name in ("turn", "action_ids", "lengths", "valid", "returns"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.action_ids, other.action_ids)


def test_an_action_that_is_drawn_twice_counts_once(policy: tuple[Backbone, int]) -> None:
    states = measure(policy)
    for s in range(12):
        drawn = [tuple(states.action(s, k)) for k in range(6)]
        assert states.valid[s].tolist() == [action not in drawn[:k] for k, action in enumerate(drawn)]
        assert all(1 <= len(action) <= 2 for action in drawn)
    assert 12 < states.valid.sum() < 72
    assert (np.isnan(states.returns).all(2) == ~states.valid).all() and (
        np.isnan(states.returns).any(2) == ~states.valid
    ).all()
    ids = np.array([[[1, 0], [1, 1], [1, 0], [2, 0], [1, 0]]])
    assert first_of_each(ids, np.array([[1, 2, 1, 1, 2]])).tolist() == [[True, True, False, True, True]]


def test_turns_are_spread() -> None:
    rng = np.random.default_rng(0)
    turns = spread_turns([10] * 50, rng)
    assert np.bincount(turns).tolist() == [5] * 10 and np.unique(turns[:20]).size > 5
    assert spread_turns([1, 1, 1], rng).tolist() == [0, 0, 0]
    uneven = np.array([spread_turns([2, 7], rng) for _ in range(4000)])
    assert np.bincount(uneven[:, 0]) == pytest.approx(2000, abs=130)
    assert np.bincount(uneven[:, 1]) == pytest.approx(4000 / 7, abs=90)


def test_a_full_window_cuts_a_continuation_and_is_counted(policy: tuple[Backbone, int]) -> None:
    backbone, _ = policy
    config = backbone.model.config
    before, config.max_position_embeddings = config.max_position_embeddings, 26
    try:
        states = measure(policy, max_turns=20, num_continuations=2)
    finally:
        config.max_position_embeddings = before
    assert all(game.truncated or game.info["won"] for game in states.games)
    assert 0 < states.num_truncated <= 2 * states.valid.sum()
    assert not np.isnan(states.returns[states.valid]).any()
    assert measure(policy).num_truncated == 0


class Broken(GuessNumber):
    """What `fault` names is wrong with the games whose hidden number is 2, once it was played."""

    fault = ""
    played: int = 0

    def reset(self, seed: int, options: Any = None) -> str:
        text = super().reset(seed, options)
        type(self).played += 1
        again = type(self).played > 12 and self._number == 2
        return "Guess 1 to 3.\n" if again and self.fault == "another game" else text

    def clone(self) -> Any:
        if self.fault == "clone":
            raise OSError("no memory")
        return super().clone()

    def resample_hidden(self, seed: int) -> None:
        super().resample_hidden(seed)
        self.resampled = True

    def step(self, action: str) -> Any:
        if self.fault == "step" and self.__dict__.pop("resampled", False) and self._number == 2:
            raise KeyError("two")
        return super().step(action)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> type[Broken]:
    env = type("Broken", (Broken,), {})
    monkeypatch.setitem(registry._registered, "broken", dataclasses.replace(TASK, name="broken", env_factory=env))
    return env


def test_a_game_that_is_not_the_same_when_it_is_replayed_is_left_out(
    policy: tuple[Backbone, int], broken: type[Broken], caplog: pytest.LogCaptureFixture
) -> None:
    broken.fault = "another game"
    with caplog.at_level(logging.WARNING, "archer_fast"):
        states = measure(policy, name="broken")
    left_out = ~states.valid.any(1)
    assert 0 < left_out.sum() < 12 and np.isnan(states.returns[left_out]).all()
    assert len(caplog.records) == left_out.sum()
    assert "turn 0: wanted what was said when it was played, got 'Guess 1 to 3" in caplog.text


def test_a_state_whose_env_fails_is_left_out(
    policy: tuple[Backbone, int], broken: type[Broken], caplog: pytest.LogCaptureFixture
) -> None:
    broken.fault = "step"
    with caplog.at_level(logging.WARNING, "archer_fast"):
        states = measure(policy, name="broken", num_continuations=2)
    assert "Broken.step raised KeyError: 'two'" in caplog.text
    left_out = ~states.valid.any(1)
    assert 0 < left_out.sum() < 12 and np.isnan(states.returns[left_out]).all()
    whole = measure(policy, num_continuations=2)
    assert (states.valid[~left_out] == whole.valid[~left_out]).all(), "the others are none the worse"
    broken.fault = "clone"
    assert not measure(policy, name="broken").valid.any()


def test_too_many_broken_games_stop_it(policy: tuple[Backbone, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GuessNumber, "reset", lambda self, seed, options=None: 1 / 0)
    with pytest.raises(TooManyDroppedGames):
        measure(policy)


class Plain:
    """Cannot be cloned."""

    def __init__(self, high: int = 4, max_turns: int = 3) -> None:
        self.inner = GuessNumber(high, max_turns)
        self.name, self.max_turns, self.step_time_limit = "plain", max_turns, None
        self.reset, self.step = self.inner.reset, self.inner.step


def test_what_is_asked_of_the_task_and_the_numbers(
    policy: tuple[Backbone, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = dataclasses.replace(TASK, name="plain", env_factory=Plain)
    monkeypatch.setitem(registry._registered, "plain", spec)
    message = (
        r"task 'plain': wanted clone\(\) and resample_hidden\(\), which diagnose needs, got an env without clone and"
    )
    with pytest.raises(ValueError, match=message):
        measure(policy, name="plain")
    monkeypatch.setattr(Plain, "clone", lambda self: self, raising=False)
    with pytest.raises(ValueError, match=r"got an env without resample_hidden$"):
        check_resamplable(TaskConfig("plain", {}))
    for name in ("num_states", "num_actions", "num_continuations"):
        with pytest.raises(ValueError, match=f"{name}: wanted at least 1, got 0"):
            measure(policy, **{name: 0})
