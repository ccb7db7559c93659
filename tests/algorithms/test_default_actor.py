"""The actor as it is shipped, nothing of it overridden: fresh and taken actions in one clipped, normalised step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tiny_learners import (
    FreshActions,
    MakeLM,
    action_logprobs,
    assert_gradients,
    by_token,
    credit_by_hand,
    gradients,
    make_learner,
    random_games,
    sampled_logprobs,
)
from torch import Tensor

from archer_fast.actor import ActorLoss
from archer_fast.algorithms.archer import Archer
from archer_fast.backbone import Backbone
from archer_fast.config import ActorConfig, Config, CriticConfig, ModelConfig, RolloutConfig
from archer_fast.meters import Meters
from archer_fast.trajectory import Trajectory, Turn

pytestmark = pytest.mark.usefixtures("one_thread")


def make_config(max_pass_tokens: int) -> Config:
    """Small everywhere but in the actor."""
    return Config(
        critic=CriticConfig(hidden_size=16, batch_turns=12, epochs=3),
        rollout=RolloutConfig(max_new_tokens=4),
        model=ModelConfig(max_pass_tokens=max_pass_tokens),
    )


def sampled_nearby(actor: Backbone, game: Trajectory, rng: np.random.Generator) -> Trajectory:
    """The game as if a policy not far from `actor` had played it: ratios to it lie on both sides of 1."""
    with torch.no_grad():
        own = action_logprobs(actor, game).double().numpy()
    near = np.minimum(own + rng.normal(0, 0.3, own.size), -1e-3)
    parts = iter(np.split(near, np.cumsum([turn.action_ids.size for turn in game.turns])[:-1]))
    turns = tuple(Turn(t.observation_ids, t.action_ids, next(parts), t.reward, 0) for t in game.turns)
    return Trajectory(turns, game.final_observation_ids, game.terminated, game.truncated, game.info)


class Step(NamedTuple):
    """One step of the actor as the learner took it."""

    weights: dict[str, Tensor]  # before it
    gradients: dict[str, Tensor]  # that it followed
    out: ActorLoss
    num_passes: int
    num_sampled: int  # fresh actions up to and with this step


def watch_steps(learner: Any, fresh: FreshActions) -> list[Step]:
    """Filled while the learner takes its steps."""
    steps: list[Step] = []
    take = learner.take_actor_step

    def spy(passes: Any, *rest: Any, **more: Any) -> ActorLoss:
        weights = {name: p.detach().clone() for name, p in learner.actor.named_parameters()}
        out: ActorLoss = take(passes, *rest, **more)
        left = {name: p.grad.clone() for name, p in learner.actor.named_parameters()}
        steps.append(Step(weights, left, out, len(passes), len(fresh.found)))
        return out

    learner.take_actor_step = spy
    return steps


def credit_of_fresh(learner: Archer, fresh: FreshActions) -> Tensor:
    """[n] min Q less its mean over the four answers to the same state."""
    q = fresh.q_values(learner.critic.heads, learner.critic.trunk)
    states = [(id(game), turn) for game, turn, _ in fresh.found]
    assert all(states.count(state) == 4 for state in states)
    return torch.stack([q[i] - q[[j for j, s in enumerate(states) if s == states[i]]].mean() for i in range(len(q))])


@pytest.mark.parametrize("max_pass_tokens", [32768, 60])
def test_every_step_is_that_of_plain_torch(make_lm: MakeLM, max_pass_tokens: int) -> None:
    """Loss, clip fraction, gradient and its norm of the first and of the last of an iteration's eight steps."""
    config = make_config(max_pass_tokens)
    a = config.actor
    assert a == ActorConfig()
    assert (a.actions, a.data, a.loss, a.normalise_advantages, a.epochs) == ("both", "on_policy", "ppo_clip", True, 8)
    assert (a.advantage, a.gae_lambda, a.alternatives, a.clip, a.kl_coef) == ("centred", 0.0, 4, 0.2, 0.05)

    learner, rng = make_learner(make_lm, config), np.random.default_rng(3)
    games = [sampled_nearby(learner.actor, game, rng) for game in random_games()]
    learner.insert(random_games(5, seed=7), Meters())  # an earlier iteration's, which nobody may visit
    learner.insert(games, Meters())
    learner.update_critic(Meters())
    fresh = FreshActions(learner, games)
    steps, meters = watch_steps(learner, fresh), Meters()
    learner.update_actor(meters)
    row = meters.read()
    assert len(steps) == row["actor_steps"] == 8
    assert row["advantage_trust"] == 1
    num_states = sum(game.num_turns for game in games)
    assert [step.num_sampled for step in steps] == [4 * num_states * i for i in range(1, 9)], "all turns of all games"

    every = fresh.found
    for number in (0, 7):
        step = steps[number]
        assert (step.num_passes == 1) == (max_pass_tokens == 32768), "fresh and taken actions share a pass"
        with torch.no_grad():
            for name, p in learner.actor.named_parameters():
                p.copy_(step.weights[name])
        fresh.found = every[step.num_sampled - 4 * num_states : step.num_sampled]

        # Advantages: one root mean square, over every token of both kinds.
        of_fresh = fresh.by_token(credit_of_fresh(learner, fresh))
        of_taken = torch.cat([by_token(credit_by_hand(learner, game), game) for game in games])
        rms = ((of_fresh.square().sum() + of_taken.square().sum()) / (of_fresh.numel() + of_taken.numel())).sqrt()

        # Fresh actions are of the policy itself, so that their ratio is 1 and no clip bites.
        new = fresh.logprobs(learner.actor)
        policy = -((new - new.detach()).exp() * of_fresh / rms).sum()
        # Those that were taken: the ratio to whoever took them, clipped.
        taken = torch.cat([action_logprobs(learner.actor, game) for game in games])
        ratio = (taken - torch.cat([sampled_logprobs(game) for game in games])).exp()
        clipped = ratio.clamp(0.8, 1.2)
        policy = policy - torch.minimum(ratio * of_taken / rms, clipped * of_taken / rms).sum()
        outside = ratio != clipped
        for side in (ratio < 0.8, ratio > 1.2, ~outside):
            assert {-1.0, 1.0} <= set(of_taken[side].sign().tolist()), "both signs on both sides and between"

        references = [fresh.logprobs(learner.reference)]
        references += [action_logprobs(learner.reference, game) for game in games]
        moved = torch.cat([new, taken]) - torch.cat(references).detach()
        num_actions = len(fresh.found) + num_states
        policy, penalty = policy / num_actions, 0.05 * 0.5 * moved.square().sum() / num_actions
        assert penalty > 1e-4

        num_tokens = new.numel() + taken.numel()
        assert step.out.policy_loss.item() == pytest.approx(policy.item(), rel=1e-3, abs=1e-4)
        assert step.out.loss.item() == pytest.approx((policy + penalty).item(), rel=1e-3, abs=1e-4)
        assert step.out.clip_fraction.item() == pytest.approx(outside.sum().item() / num_tokens, abs=1e-6)
        wanted = gradients(learner.actor, policy + penalty)
        norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
        scale = min(1.0, a.max_grad_norm / float(norm))
        for name, p in learner.actor.named_parameters():
            p.grad = step.gradients[name]
        assert_gradients(learner.actor, {name: gradient * scale for name, gradient in wanted.items()})
    assert row["clip_fraction"] == pytest.approx(float(np.mean([step.out.clip_fraction.item() for step in steps])))


@pytest.mark.parametrize("reward", [-1.0, None])
def test_games_that_all_end_alike_teach_nothing(make_lm: MakeLM, reward: float | None) -> None:
    """Whatever an untrained critic makes of them; None: each has a reward of its own."""
    config = make_config(32768)
    learner = make_learner(make_lm, replace(config, actor=replace(config.actor, kl_coef=0.0)))
    rng = np.random.default_rng(3)
    games = []
    for game in random_games():
        (turn,) = sampled_nearby(learner.actor, game, rng).turns[:1]
        turn = Turn(turn.observation_ids, turn.action_ids, turn.rollout_logprobs, reward or float(rng.normal()), 0)
        games.append(Trajectory((turn,), game.final_observation_ids, True, False, {}))
    before = [p.detach().clone() for p in learner.actor.parameters()]
    learner.insert(games, meters := Meters())
    learner.update_critic(meters)
    learner.update_actor(meters)
    moved = any(not torch.equal(old, p) for old, p in zip(before, learner.actor.parameters(), strict=True))
    assert moved == (reward is None)
    assert (meters.read()["advantage_trust"] > 0) == (reward is None)


@pytest.mark.parametrize("max_pass_tokens", [1, 40, 100])
def test_steps_in_short_passes_are_those_in_one(make_lm: MakeLM, max_pass_tokens: int) -> None:
    """All eight, and what they leave of the actor; 1: every game is a pass of its own."""
    losses, weights, num_passes = [], [], []
    for tokens in (32768, max_pass_tokens):
        learner = make_learner(make_lm, make_config(tokens))
        learner.insert(random_games(), Meters())
        learner.update_critic(Meters())
        steps = watch_steps(learner, FreshActions(learner, random_games()))
        learner.update_actor(Meters())
        losses.append([step.out.loss.item() for step in steps])
        weights.append(torch.nn.utils.parameters_to_vector(learner.actor.parameters()).detach())
        num_passes.append(steps[0].num_passes)
    assert num_passes[0] == 1 < num_passes[1]
    assert len(losses[0]) == 8 and losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-4)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)
