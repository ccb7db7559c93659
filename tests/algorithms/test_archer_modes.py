"""ArCHer beyond its defaults: lambda-returns, expectiles, logged actions, other losses, token baseline, best of K."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    q_and_v,
    q_of,
    random_games,
    sampled_logprobs,
    turns_of,
    twin_of,
)
from torch import Tensor

from archer_fast.batch import PackedBatch
from archer_fast.config import ActorConfig, BufferConfig, Config, CriticConfig, ModelConfig, RolloutConfig
from archer_fast.meters import Meters
from archer_fast.packing import pack_trajectories
from archer_fast.trajectory import Trajectory

pytestmark = pytest.mark.usefixtures("one_thread")
GAMMA = 0.9


def make_config(critic: dict[str, Any] | None = None, max_trajectories: int = 64, **actor: Any) -> Config:
    """Fresh actions at replayed states, by REINFORCE, where `actor` does not say otherwise."""
    of_critic = {"hidden_size": 16, "batch_turns": 12, "epochs": 1, "gamma": GAMMA, "tau": 0.3} | (critic or {})
    plain_actor = {"data": "replay", "actions": "fresh", "loss": "reinforce", "normalise_advantages": False}
    of_actor = {"batch_games": 16, "epochs": 1, "lr": 1e-3, "max_kl_step": 1e3, "max_grad_norm": 1e9}
    return Config(
        critic=CriticConfig(**of_critic),
        actor=ActorConfig(**plain_actor | of_actor | actor),
        rollout=RolloutConfig(max_new_tokens=4),
        buffer=BufferConfig(max_trajectories=max_trajectories, max_tokens=4096),
        model=ModelConfig(max_pass_tokens=60),  # several passes a step
    )


def lambda_returns(game: Trajectory, v: Tensor, end: Tensor, td_lambda: float) -> Tensor:
    """[2, turns], from the end backwards."""
    value = following = end * (not game.terminated)
    found: list[Tensor] = []
    for i in reversed(range(game.num_turns)):
        following = game.turns[i].reward + GAMMA * ((1 - td_lambda) * value + td_lambda * following)
        found.insert(0, following)
        value = v[:, i]
    return torch.stack(found, 1)


# -- the critic ------------------------------------------------------------------------------------


@pytest.mark.parametrize("td_lambda", [0.3, 1.0])
def test_lambda_returns_are_a_recursion_over_each_game(make_lm: MakeLM, td_lambda: float, tmp_path: Path) -> None:
    """Of all live games, by the target's heads, each against itself; the first games have left the buffer."""
    learner = make_learner(make_lm, make_config({"td_lambda": td_lambda}, max_trajectories=9))
    games = random_games(13)
    for part in (games[:5], games[5:]):
        learner.insert(part, Meters())
    learner.update_critic(Meters())  # target and online heads part
    target, critic = learner.critic.target_heads, learner.critic.heads
    turns, wanted = turns_of(games), {}
    for k, game in enumerate(games):
        if k >= 4:
            _, v, end = q_and_v(target, learner.reference, game)
            wanted[k] = lambda_returns(game, v, end, td_lambda)
    first, got = learner._make_lambda_returns()
    assert first == sum(game.num_turns for game in games[:4]) > 0
    torch.testing.assert_close(got, torch.cat(list(wanted.values()), 1), rtol=1e-4, atol=1e-4)
    if td_lambda == 1:  # what was earned, to the end of a game that ended
        earned = [
            sum(GAMMA**k * t.reward for k, t in enumerate(game.turns[i:]))
            for game in games[4:]
            if game.terminated
            for i in range(game.num_turns)
        ]
        ended = torch.cat([torch.full((game.num_turns,), game.terminated) for game in games[4:]])
        assert got[0, ended].tolist() == got[1, ended].tolist() == pytest.approx(earned, rel=1e-4, abs=1e-5)

    chosen = twin_of(learner.buffer, tmp_path).sample_turns(12).tolist()
    index = {id(game): k for k, game in enumerate(games)}
    squares = [
        q_and_v(critic, learner.reference, game)[0][:, i] - wanted[index[id(game)]][:, i]
        for game, i in (turns[t] for t in chosen)
    ]
    meters = Meters()
    learner.update_critic(meters)
    assert meters.read()["q_loss"] == pytest.approx(float(torch.stack(squares).square().mean()), rel=1e-3)


def test_a_lambda_of_nearly_nothing_is_the_one_step_target(make_lm: MakeLM) -> None:
    """Where an iteration is one step: lambda-returns are made once an iteration, the other target at every step."""
    rows = []
    for td_lambda in (0.0, 1e-9):
        learner, meters = make_learner(make_lm, make_config({"td_lambda": td_lambda})), Meters()
        learner.insert(random_games(), meters)
        for _ in range(4):
            learner.update_critic(meters)
        rows.append(meters.read())
    assert rows[1] == pytest.approx(rows[0], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("expectile", [0.5, 0.9])
def test_v_is_an_expectile_of_the_target_q_of_the_action_taken(
    make_lm: MakeLM, expectile: float, tmp_path: Path
) -> None:
    learner, games = (
        make_learner(make_lm, make_config({"value_target": "expectile", "expectile": expectile})),
        random_games(),
    )
    learner.insert(games, Meters())
    learner.update_critic(Meters())
    chosen = twin_of(learner.buffer, tmp_path).sample_turns(12).tolist()
    total, signs = 0.0, set()
    for game, i in (turns_of(games)[t] for t in chosen):
        target = q_and_v(learner.critic.target_heads, learner.reference, game)[0][:, i]
        u = target - q_and_v(learner.critic.heads, learner.reference, game)[1][:, i]
        weight = torch.where(u < 0, 1 - expectile, expectile)
        total += float((weight * u.square()).sum()) / 2 / len(chosen)
        signs |= set(u.sign().tolist())
    meters = Meters()
    learner.update_critic(meters)
    assert signs == {-1.0, 1.0}
    assert meters.read()["v_loss"] == pytest.approx(total, rel=1e-3)


# -- the actor on logged actions -------------------------------------------------------------------


@pytest.mark.parametrize("trunk", ["frozen", "shared", "separate"])
@pytest.mark.parametrize(
    "actor",
    [
        {"advantage": "q_minus_v", "loss": "awr", "awr_beta": 2.0, "kl_coef": 0.0},
        {"advantage": "q_minus_v", "loss": "reinforce", "pessimistic": False, "kl_coef": 0.2},
        {"advantage": "residual", "loss": "ppo_clip", "clip": 0.1, "normalise_advantages": True, "data": "on_policy"},
        {"advantage": "residual", "gae_lambda": 0.7, "loss": "reinforce"},
    ],
    ids=["awr", "reinforce", "residual", "gae"],
)
def test_a_step_on_logged_actions_is_that_of_plain_torch(make_lm: MakeLM, trunk: str, actor: dict[str, Any]) -> None:
    """All turns of all games; on policy of this iteration's alone."""
    learner = make_learner(make_lm, make_config({"trunk": trunk}, actions="logged", **actor))
    old, new = random_games(4, seed=2), random_games()
    learner.insert(old, Meters())
    learner.insert(new, Meters())
    learner.update_critic(Meters())
    a = learner.config.actor
    games = new if a.data == "on_policy" else [*old, *new]
    credit = torch.cat([by_token(credit_by_hand(learner, game), game) for game in games])
    if a.normalise_advantages:
        credit = credit / credit.square().mean().sqrt()
    logprobs = torch.cat([action_logprobs(learner.actor, game) for game in games])
    reference = torch.cat([action_logprobs(learner.reference, game).detach() for game in games])
    if a.loss == "ppo_clip":
        ratio = (logprobs - torch.cat([sampled_logprobs(game) for game in games])).exp()
        loss = -torch.minimum(ratio * credit, ratio.clamp(1 - a.clip, 1 + a.clip) * credit)
    else:
        loss = -(credit if a.loss == "reinforce" else (a.awr_beta * credit).exp()) * logprobs
    num_turns = sum(game.num_turns for game in games)
    policy = loss.sum().item() / num_turns
    loss = (loss + a.kl_coef * 0.5 * (logprobs - reference).square()).sum() / num_turns
    wanted = gradients(learner.actor, loss)
    meters = Meters()
    learner.update_actor(meters)
    row = meters.read()
    assert row["actor_loss"] == pytest.approx(policy, rel=1e-3, abs=1e-4) and row["actor_steps"] == 1
    assert_gradients(learner.actor, wanted)


@pytest.mark.parametrize(("data", "num_steps"), [("on_policy", 1), ("replay", 4)])
def test_steps_on_logged_actions_end_once_the_policy_has_moved_from_the_one_that_acted(
    make_lm: MakeLM, data: Any, num_steps: int
) -> None:
    """Of older games the policy has moved away long since."""
    config = make_config(actions="logged", advantage="residual", data=data, epochs=4, max_kl_step=0.0)
    learner, meters = make_learner(make_lm, config), Meters()
    learner.insert(random_games(), meters)
    learner.update_actor(meters)
    assert meters.read()["actor_steps"] == num_steps


# -- the actor on fresh actions --------------------------------------------------------------------


@pytest.mark.parametrize("trunk", ["frozen", "separate"])
@pytest.mark.parametrize(
    "actor",
    [
        {"advantage": "centred", "alternatives": 3, "kl_coef": 0.2},
        {"advantage": "q_minus_v", "alternatives": 1, "kl_coef": 0.0},
        {"advantage": "q_minus_v", "alternatives": 2, "kl_coef": 0.1, "loss": "awr", "normalise_advantages": True},
        {"advantage": "centred", "alternatives": 3, "kl_coef": 0.2, "actions": "both", "gae_lambda": 0.7},
        {"advantage": "centred", "alternatives": 3, "kl_coef": 0.2, "actions": "both", "normalise_advantages": True},
    ],
    ids=["centred", "paper", "awr", "both", "both-normalised"],
)
def test_a_step_on_fresh_actions_is_that_of_plain_torch(make_lm: MakeLM, trunk: str, actor: dict[str, Any]) -> None:
    learner = make_learner(make_lm, make_config({"trunk": trunk}, states_per_game=2, **actor))
    games = random_games()
    learner.insert(games, Meters())
    learner.update_critic(Meters())
    if learner.critic.own_trunk is not None:  # not the reference any more
        with torch.no_grad():
            for p in learner.critic.own_trunk.parameters():
                p.mul_(0.9)
    fresh = FreshActions(learner, games)
    weights = {name: p.detach().clone() for name, p in learner.actor.named_parameters()}
    meters = Meters()
    learner.update_actor(meters)
    got = {name: p.grad.clone() for name, p in learner.actor.named_parameters()}
    with torch.no_grad():
        for name, p in learner.actor.named_parameters():
            p.copy_(weights[name])

    a, found = learner.config.actor, fresh.found
    q = fresh.q_values(learner.critic.heads, learner.critic.trunk)
    if a.advantage != "q_minus_v":
        assert len(found) == 3 * sum(min(game.num_turns, 2) for game in games)
        advantages = (q.view(-1, 3) - q.view(-1, 3).mean(1, keepdim=True)).view(-1)
    else:
        v = [q_and_v(learner.critic.heads, learner.critic.trunk, game)[1][:, turn].amin() for game, turn, _ in found]
        advantages = q - torch.stack(v)
    credit = fresh.by_token(advantages)
    logprobs, reference = fresh.logprobs(learner.actor), fresh.logprobs(learner.reference).detach()
    num_actions = len(found)
    residual_std = None
    if a.actions == "both":  # and those that were taken, each by its residual
        residuals = [credit_by_hand(learner, game) for game in games]
        residual_std = pytest.approx(torch.cat(residuals).std(correction=0).item(), rel=1e-3, abs=1e-4)
        credit = torch.cat([credit, *map(by_token, residuals, games)])
        logprobs = torch.cat([logprobs, *(action_logprobs(learner.actor, game) for game in games)])
        reference = torch.cat([reference, *(action_logprobs(learner.reference, game).detach() for game in games)])
        num_actions += sum(game.num_turns for game in games)
    if a.normalise_advantages:
        credit = credit / credit.square().mean().sqrt()
    loss = -(credit.exp() if a.loss == "awr" else credit) * logprobs
    loss = (loss + a.kl_coef * 0.5 * (logprobs - reference).square()).sum() / num_actions
    row = meters.read()
    assert row.get("residual_std") == residual_std
    assert row["q_fresh"] == pytest.approx(q.mean().item(), rel=1e-3, abs=1e-4)
    assert row["advantage_std"] == pytest.approx(advantages.std(correction=0).item(), rel=1e-3, abs=1e-4)
    wanted = gradients(learner.actor, loss)
    for name, p in learner.actor.named_parameters():
        p.grad = got[name]
    assert_gradients(learner.actor, wanted)


# -- the token baseline, and CHAI's choice ---------------------------------------------------------


@pytest.mark.parametrize(
    ("actions", "advantage"), [("fresh", "q_minus_v"), ("logged", "q_minus_v"), ("both", "centred")]
)
def test_the_token_baseline_is_subtracted_saved_and_stepped(make_lm: MakeLM, actions: Any, advantage: Any) -> None:
    config = make_config(
        {"lr": 1e-2}, token_baseline=True, actions=actions, advantage=advantage, epochs=3, normalise_advantages=True
    )
    learner, meters = make_learner(make_lm, config), Meters()
    learner.insert(random_games(), meters)
    before = {name: tensor.clone() for name, tensor in learner.state_tensors().items()}
    assert any(name.startswith("baseline.") for name in before)
    scored: list[float] = []
    take = learner.take_actor_step

    def spy(passes: Any, *rest: Any, **more: Any) -> Any:
        credit = torch.cat([own.advantages for own in passes])
        assert not credit.requires_grad
        scored.append(float(credit.square().mean()))
        return take(passes, *rest, **more)

    learner.take_actor_step = spy
    learner.update_actor(meters)
    row = meters.read()
    assert row["actor_steps"] == 3 and learner.baseline.step.num_steps == 3 and row["baseline_loss"] > 0
    assert scored == pytest.approx([1.0] * 3, rel=1e-4), "normalised once the baseline is off"
    after = learner.state_tensors()
    moved = {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {"baseline"}, "the critic's heads stay"
    assert any(name.startswith("optimizer.baseline.") for name in after)


def test_the_score_of_candidates_is_the_critics_q(make_lm: MakeLM) -> None:
    learner, games = make_learner(make_lm, make_config()), random_games(4)
    learner.insert(games, Meters())
    learner.update_critic(Meters())
    batch = PackedBatch.from_arrays(pack_trajectories(games))
    last = batch.cu_turns[1:].long() - 1
    candidates = learner.engine.sample_alternatives(batch, last[:, None].repeat(1, 3))
    got = learner.score(batch, candidates)
    for row, game in enumerate(games):
        for column in range(3):
            ids = candidates.action_ids[row, column, : candidates.lengths[row, column]].numpy()
            wanted = q_of(learner.critic.heads, learner.reference, game, game.num_turns - 1, ids).amin()
            assert got[row, column].item() == pytest.approx(wanted.item(), rel=1e-3, abs=1e-4)
