"""What every algorithm has: the KL to the start policy, of stored games and of others; games it cannot learn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_learners import MakeLM, action_logprobs, make_learner, prefix, random_games, sampled_logprobs

from archer_fast.config import ActorConfig, BufferConfig, Config, CriticConfig
from archer_fast.meters import Meters
from archer_fast.trajectory import Trajectory, Turn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("max_pass_tokens", [32768, 1, 40])
def test_the_kl_to_the_start_is_nats_an_action_and_the_same_stored_or_not(
    make_lm: MakeLM, max_pass_tokens: int
) -> None:
    config, games, meters = Config(algorithm="filtered-bc"), random_games(), Meters()
    config.model.max_pass_tokens = max_pass_tokens
    learner = make_learner(make_lm, config)
    with torch.no_grad():
        moved = [(sampled_logprobs(game) - action_logprobs(learner.reference, game)).sum() for game in games]
    wanted = float(sum(moved)) / sum(game.num_turns for game in games)
    assert abs(wanted) > 1
    assert learner.kl_to_start(games) == pytest.approx(wanted, rel=1e-5)
    assert len(learner.buffer) == 0
    learner.insert(games, meters)
    row = meters.read()
    assert row["kl"] == pytest.approx(wanted, rel=1e-5)
    rows = sum(prefix(game, i).size + game.turns[i].action_ids.size for game in games for i in range(game.num_turns))
    assert row["deduplication"] == pytest.approx(rows / sum(game.num_tokens for game in games), rel=1e-6)


def test_the_samplers_mismatch_is_measured_at_equal_weights_alone(make_lm: MakeLM) -> None:
    def own(**settings: Any) -> bool:
        critic = CriticConfig(trunk=settings.pop("trunk", "frozen"))
        found: bool = make_learner(make_lm, Config(critic=critic, actor=ActorConfig(**settings))).samples_are_own
        return found

    assert own() and own(actions="fresh", data="replay") and own(actions="fresh", trunk="shared")
    assert not own(data="replay"), "older games are among them"
    assert not own(trunk="shared"), "the critic has moved the weights"


@pytest.mark.parametrize("max_pass_tokens", [32768, 40])
def test_what_the_start_policy_said_of_the_newest_games_is_kept(make_lm: MakeLM, max_pass_tokens: int) -> None:
    """Game by game, in whatever passes they were read; of those that came before nothing is."""
    config, games = Config(algorithm="filtered-bc"), random_games()
    config.model.max_pass_tokens = max_pass_tokens
    learner = make_learner(make_lm, config)
    learner.insert(random_games(3, seed=1), Meters())
    learner.insert(games, Meters())
    assert sorted(learner.ref_logprobs) == learner.newest.tolist() == list(range(3, 12))
    for i, game in enumerate(games):
        with torch.no_grad():
            wanted = action_logprobs(learner.reference, game)
        torch.testing.assert_close(learner.ref_logprobs[3 + i], wanted, rtol=1e-4, atol=1e-4)
    learner.insert([], Meters())  # an offline iteration: nothing is new
    assert learner.ref_logprobs == {} and learner.newest.size == 0


# -- games whose sampler nobody knows --------------------------------------------------------------


def unknown_sampler(game: Trajectory, turn: int) -> Trajectory:
    """The game, with a turn taken by somebody whose log-probs are not known."""
    turns = list(game.turns)
    t = turns[turn]
    turns[turn] = Turn(t.observation_ids, t.action_ids, np.zeros(t.action_ids.size), t.reward, -1)
    return Trajectory(tuple(turns), game.final_observation_ids, game.terminated, game.truncated, game.info)


LOGGED: dict[str, Any] = {"actions": "logged", "advantage": "q_minus_v", "data": "replay"}


@pytest.mark.parametrize(
    ("settings", "refuses"),
    [
        ({}, True),
        ({"actor": ActorConfig(**LOGGED)}, True),
        ({"actor": ActorConfig(actions="fresh")}, False),  # sampled anew, by the policy that learns
        ({"actor": ActorConfig(loss="awr")}, False),
        ({"actor": ActorConfig(**LOGGED, loss="awr")}, False),
        ({"algorithm": "ppo"}, True),
        ({"algorithm": "reinforce"}, False),
        ({"algorithm": "filtered-bc"}, False),
        ({"algorithm": "filtered-bc", "actor": ActorConfig(**LOGGED)}, False),
    ],
)
def test_turns_whose_sampler_is_unknown_are_refused_where_a_ratio_to_it_is_wanted(
    make_lm: MakeLM, settings: dict[str, Any], refuses: bool
) -> None:
    config = Config(critic=CriticConfig(hidden_size=16), buffer=BufferConfig(max_tokens=4096), **settings)
    learner, meters = make_learner(make_lm, config), Meters()
    learner.insert(random_games(), meters)
    games = random_games(4, seed=1)
    games[3] = unknown_sampler(games[3], turn=2)
    if refuses:
        message = rf"^trajectories: {config.algorithm} with the loss ppo_clip wants the log-probs .* policy_version < 0"
        with pytest.raises(ValueError, match=message):
            learner.insert(games, meters)
        assert len(learner.buffer) == 9 and learner.newest.tolist() == list(range(9)), "nothing is stored"
    else:
        learner.insert(games, meters)
        assert learner.newest.tolist() == [9, 10, 11, 12]
