"""PPO: its time steps and advantages against loops over games, its step against plain torch, its value head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_learners import (
    MakeLM,
    action_logprobs,
    action_places,
    all_hidden,
    assert_gradients,
    gradients,
    make_learner,
    random_games,
    sampled_logprobs,
)
from torch import Tensor

from archer_fast.algorithms.ppo import PPO, TimeSteps
from archer_fast.batch import PackedBatch
from archer_fast.config import BufferConfig, Config, CriticConfig, PPOConfig, RolloutConfig
from archer_fast.critic import StateFeatures
from archer_fast.meters import Meters
from archer_fast.packing import pack_trajectories
from archer_fast.trajectory import Trajectory, Turn

pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = ["token", "turn"]


def make_config(level: Any, **ppo: Any) -> Config:
    settings = {"gamma": 0.8, "gae_lambda": 0.6, "batch_games": 4, "epochs": 1, "max_grad_norm": 1e9} | ppo
    return Config(
        algorithm="ppo",
        ppo=PPOConfig(level=level, **settings),
        critic=CriticConfig(hidden_size=16),
        rollout=RolloutConfig(games=9, max_new_tokens=4),
        buffer=BufferConfig(max_trajectories=64, max_tokens=4096),
    )


def steps_of(game: Trajectory, level: str, gamma: float) -> list[tuple[int, int, float, float]]:
    """Of each time step: the place of the token it is predicted from, its turn, its reward, its discount."""
    places, turns = action_places(game)
    found = []
    for at, (place, turn) in enumerate(zip(places, turns, strict=True)):
        first, last = at == 0 or turns[at - 1] != turn, at + 1 == len(turns) or turns[at + 1] != turn
        if level == "token":
            found.append((place - 1, turn, game.turns[turn].reward if last else 0.0, gamma if last else 1.0))
        elif first:
            found.append((place - 1, turn, game.turns[turn].reward, gamma))
    return found


@pytest.mark.parametrize("level", LEVELS)
def test_time_steps_are_those_of_a_loop_over_games(level: str) -> None:
    games = random_games()
    batch = PackedBatch.from_arrays(pack_trajectories(games))
    hidden = torch.arange(batch.num_tokens, dtype=torch.float32)[:, None]  # each says where it stands
    time = (TimeSteps.of_tokens if level == "token" else TimeSteps.of_turns)(hidden, batch, 0.8)
    begin, wanted, cu, ends = 0, [], [0], []
    for game in games:
        own = steps_of(game, level, 0.8)
        wanted += [(begin + place, *rest) for place, *rest in own]
        begin += game.num_tokens
        cu.append(cu[-1] + len(own))
        ends.append((begin - 1, game.num_turns))
    got = zip(time.before.hidden[:, 0], time.before.turn, time.rewards, time.discounts, strict=True)
    torch.testing.assert_close(torch.tensor(list(got)), torch.tensor(wanted, dtype=torch.float32))
    assert time.cu_steps.tolist() == cu and time.cu_steps.dtype == torch.int32
    assert list(zip(time.final.hidden[:, 0].tolist(), time.final.turn.tolist(), strict=True)) == ends


def value_of(learner: PPO, hidden: Tensor, turn: int) -> float:
    with torch.no_grad():
        return float(learner.value(StateFeatures(hidden[None], torch.tensor([turn]))).mean())


def advantages_by_hand(learner: PPO, game: Trajectory) -> tuple[list[float], list[float]]:
    """GAE of one game from its end backwards, on plain passes; and V of each of its steps."""
    p = learner.config.ppo
    with torch.no_grad():
        hidden = all_hidden(learner.reference, game.input_ids)
    steps = steps_of(game, p.level, p.gamma)
    values = [value_of(learner, hidden[place], turn) for place, turn, _, _ in steps]
    next_value = 0.0 if game.terminated else value_of(learner, hidden[-1], game.num_turns)
    advantages, following = [], 0.0
    for (_, _, reward, discount), value in zip(reversed(steps), reversed(values), strict=True):
        following = reward + discount * next_value - value + discount * p.gae_lambda * following
        advantages.insert(0, following)
        next_value = value
    return advantages, values


def credited(learner: PPO) -> dict[int, list[float]]:
    return {game: own.tolist() for game, own in learner._advantages.items()}


@pytest.mark.parametrize("max_pass_tokens", [32768, 40])
@pytest.mark.parametrize("level", LEVELS)
def test_advantages_are_a_recursion_over_each_game(make_lm: MakeLM, level: str, max_pass_tokens: int) -> None:
    """In one pass and in several; only of this iteration's games."""
    config = make_config(level, value_epochs=0)
    config.model.max_pass_tokens = max_pass_tokens
    learner, games = make_learner(make_lm, config), random_games()
    learner.insert(random_games(3, seed=1), Meters())
    learner.insert(games, Meters())
    learner.update_critic(Meters())
    got = credited(learner)
    assert sorted(got) == list(range(3, 12))
    for i, game in enumerate(games):
        assert got[3 + i] == pytest.approx(advantages_by_hand(learner, game)[0], rel=1e-3, abs=1e-4), i


@pytest.mark.parametrize("level", LEVELS)
def test_without_discount_and_bias_returns_are_what_was_earned(make_lm: MakeLM, level: str) -> None:
    """gamma = gae_lambda = 1: V of every step is fitted to the sum of later rewards, and V of the end of a cut game."""
    learner, games = make_learner(make_lm, make_config(level, gamma=1.0, gae_lambda=1.0)), random_games()
    learner.insert(games, Meters())
    state, returns = learner._credit(np.arange(9), Meters())
    wanted = []
    for game in games:
        with torch.no_grad():
            end = value_of(learner, all_hidden(learner.reference, game.input_ids)[-1], game.num_turns)
        for _, turn, _, _ in steps_of(game, level, 1.0):
            wanted.append(sum(t.reward for t in game.turns[turn:]) + (0.0 if game.terminated else end))
    assert returns.tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    assert state.hidden.shape[0] == len(wanted)


@pytest.mark.parametrize("level", LEVELS)
def test_a_step_is_that_of_plain_torch_on_one_game(make_lm: MakeLM, level: str) -> None:
    config = make_config(level, value_epochs=0, kl_coef=0.3, clip=0.15)
    learner, game = make_learner(make_lm, config), random_games(4)[3]
    learner.insert([game], Meters())
    learner.update_critic(Meters())
    advantages = torch.tensor(advantages_by_hand(learner, game)[0])
    credit = (advantages - advantages.mean()) / advantages.std(correction=0)
    if level == "turn":
        credit = credit[torch.tensor(action_places(game)[1])]
    logprobs = action_logprobs(learner.actor, game)
    ratio = (logprobs - sampled_logprobs(game)).exp()
    clipped = ratio.clamp(0.85, 1.15)
    policy = -torch.minimum(ratio * credit, clipped * credit).sum() / game.num_turns
    reference = action_logprobs(learner.reference, game).detach()
    loss = policy + 0.3 * 0.5 * (logprobs - reference).square().sum() / game.num_turns
    wanted = gradients(learner.actor, loss)
    meters = Meters()
    learner.update_actor(meters)
    row = meters.read()
    assert row["actor_loss"] == pytest.approx(policy.item(), rel=1e-3, abs=1e-4)
    assert row["clip_fraction"] == pytest.approx((ratio != clipped).float().mean().item())
    assert row["advantage_std"] == pytest.approx(advantages.std(correction=0).item(), rel=1e-3)
    assert_gradients(learner.actor, wanted)


@pytest.mark.parametrize("level", LEVELS)
def test_v_approaches_the_returns(make_lm: MakeLM, level: str) -> None:
    config = make_config(level, gamma=1.0, gae_lambda=1.0, value_epochs=60, value_lr=1e-2, value_batch=7)
    learner, games = make_learner(make_lm, config), [g for g in random_games(12) if g.terminated]
    learner.insert(games, Meters())
    steps: list[int] = []
    learner.update_critic(Meters(), lambda: steps.append(1))
    assert len(steps) == learner.critic_epochs == 60
    num_steps = sum(len(steps_of(game, level, 1.0)) for game in games)
    assert learner.value_step.num_steps == 60 * -(-num_steps // 7)
    state, returns = learner._credit(np.arange(len(games)), Meters())
    with torch.no_grad():
        left = (learner.value(state) - returns).square().mean(1)  # each of the two heads
    assert (left < 0.05 * returns.var()).all()


@pytest.mark.parametrize(("max_kl_step", "num_steps"), [(0.0, 1), (1e3, 5)])
def test_steps_end_once_the_policy_has_moved(make_lm: MakeLM, max_kl_step: float, num_steps: int) -> None:
    learner, meters = make_learner(make_lm, make_config("token", epochs=5, max_kl_step=max_kl_step)), Meters()
    learner.insert(random_games(), meters)
    learner.update_critic(meters)
    done: list[int] = []
    learner.update_actor(meters, lambda: done.append(1))
    assert meters.read()["actor_steps"] == learner.actor_step.num_steps == len(done) == num_steps


@pytest.mark.parametrize(("factor", "moves"), [(1.3, False), (1.1, True)])
def test_where_every_ratio_has_left_the_clip_nothing_moves(make_lm: MakeLM, factor: float, moves: bool) -> None:
    """What was better than expected is `factor` likelier than when it was sampled, and what was worse as much less."""
    learner, game = make_learner(make_lm, make_config("turn", value_epochs=0)), random_games(4)[3]
    learner.config.ppo.kl_coef = 0.0
    learner.insert([game], Meters())
    learner.update_critic(Meters())
    sign = (learner._advantages[0] - learner._advantages[0].mean()).sign()[torch.tensor(action_places(game)[1])]
    assert {-1.0, 1.0} == set(sign.tolist())
    sampled = action_logprobs(learner.actor, game).detach() - sign * float(np.log(factor))
    by_turn = iter(sampled.split([turn.action_ids.size for turn in game.turns]))
    turns = tuple(Turn(t.observation_ids, t.action_ids, next(by_turn).numpy(), t.reward, 0) for t in game.turns)
    learner.insert([Trajectory(turns, game.final_observation_ids, game.terminated, game.truncated)], Meters())
    learner.update_critic(Meters())
    learner.update_actor(Meters())
    largest = max(float(p.grad.abs().max()) for p in learner.actor.parameters() if p.grad is not None)
    assert largest > 0 if moves else largest == 0


def test_one_step_in_all_is_credited_with_nothing(make_lm: MakeLM) -> None:
    """Not with NaN, which the deviation of one number may be."""
    learner, meters = make_learner(make_lm, make_config("turn")), Meters()
    learner.insert(random_games(1), meters)
    learner.update_critic(meters)
    learner.update_actor(meters)
    row = meters.read()
    assert row["skipped_steps"] == 0 and abs(row["actor_loss"]) < 1e-6 and all(np.isfinite(x) for x in row.values())
