"""Filtered cloning: which games are chosen, and that a step is plain cross-entropy on what was said in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_learners import MakeLM, action_logprobs, assert_gradients, gradients, make_learner, random_games

from archer_fast.config import BufferConfig, Config, CriticConfig, FilteredBCConfig, RolloutConfig
from archer_fast.meters import Meters
from archer_fast.trajectory import Trajectory, Turn

pytestmark = pytest.mark.usefixtures("one_thread")


def make_config(max_trajectories: int = 64, **filtered_bc: Any) -> Config:
    settings = {"epochs": 1, "batch_games": 16, "kl_coef": 0.0, "max_grad_norm": 1e9} | filtered_bc
    return Config(
        algorithm="filtered-bc",
        filtered_bc=FilteredBCConfig(**settings),
        critic=CriticConfig(hidden_size=16),
        rollout=RolloutConfig(games=3, max_new_tokens=4),
        buffer=BufferConfig(max_trajectories=max_trajectories, max_tokens=4096),
    )


def games_with(returns: list[float]) -> list[Trajectory]:
    """Random games whose rewards add up to these; the first turn takes what the others leave."""
    made = []
    for game, total in zip(random_games(len(returns)), returns, strict=True):
        rest = [float(i) for i in range(1, game.num_turns)]
        rewards = [total - sum(rest), *rest]
        turns = tuple(
            Turn(t.observation_ids, t.action_ids, t.rollout_logprobs, r, 0)
            for t, r in zip(game.turns, rewards, strict=True)
        )
        made.append(Trajectory(turns, game.final_observation_ids, game.terminated, game.truncated, game.info))
    return made


@pytest.mark.parametrize(
    ("share", "chosen"),
    [
        (0.25, [1, 7]),
        (0.5, [1, 4, 5, 7]),
        (0.3, [1, 7]),  # 2.4 games
        (0.33, [1, 5, 7]),  # 2.64; of the equal 2, 4 and 5 the newest
        (0.0, [7]),  # at least one; of the equal 1 and 7 the newest
        (1.0, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_the_best_games_are_chosen(make_lm: MakeLM, share: float, chosen: list[int]) -> None:
    learner = make_learner(make_lm, make_config(share=share))
    learner.insert(games_with([-5, 3, 2, -9]), Meters())
    learner.insert(games_with([2, 2, -1, 3]), Meters())
    assert learner.best_games().tolist() == chosen


def test_only_what_the_buffer_holds_or_this_iteration_brought(make_lm: MakeLM) -> None:
    learner = make_learner(make_lm, make_config(max_trajectories=5, share=0.4))
    learner.insert(games_with([9, 9, 9, -1]), Meters())
    learner.insert(games_with([2, 1, 0]), Meters())  # the first two of all have left
    assert learner.best_games().tolist() == [2, 4]
    learner.config.filtered_bc.newest = True
    assert learner.best_games().tolist() == [4]


def test_a_step_is_cross_entropy_on_the_actions_of_the_chosen_games(make_lm: MakeLM) -> None:
    """Summed over an action's tokens, a mean over actions."""
    learner, games = make_learner(make_lm, make_config(share=0.5)), games_with([-5, 3, 2, -9, 2, 2, -1, 3])
    learner.insert(games, Meters())
    chosen = [games[i] for i in (1, 4, 5, 7)]
    loss = -sum((action_logprobs(learner.actor, game).sum() for game in chosen), torch.zeros(()))
    loss = loss / sum(game.num_turns for game in chosen)
    wanted = gradients(learner.actor, loss)
    meters = Meters()
    learner.update_critic(meters)
    learner.update_actor(meters)
    row = meters.read()
    assert row["actor_loss"] == pytest.approx(loss.item(), rel=1e-4) and row["actor_steps"] == 1
    assert_gradients(learner.actor, wanted)


def test_steps_make_the_best_games_likelier(make_lm: MakeLM) -> None:
    learner = make_learner(make_lm, make_config(share=0.25, epochs=20, lr=3e-3, max_grad_norm=1.0))
    games = games_with([-5, 3, 2, -9, 2, 2, -1, 3])
    learner.insert(games, Meters())

    def mean_logprob() -> float:
        with torch.no_grad():
            return float(np.mean([action_logprobs(learner.actor, games[i]).mean() for i in (1, 7)]))

    before = mean_logprob()
    learner.update_actor(Meters())
    assert mean_logprob() > before + 0.5
