"""Scores of measured states: each action's value is the one that a plain pass over its own history gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from archer_fast.backbone import Backbone
from archer_fast.batch import PackedBatch, TreeBatch
from archer_fast.config import CriticConfig
from archer_fast.critic import TurnCritic, read_games
from archer_fast.diagnosis import diagnose, within_state
from archer_fast.diagnosis_play import MeasuredStates
from archer_fast.diagnosis_score import critic_score, diagnose_critic, score_states
from archer_fast.packing import pack_trajectories
from archer_fast.trajectory import Trajectory, Turn

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB, GAMMA = 37, 0.9
MakeLM = Callable[..., Any]


def measured(seed: int = 0, actions: int = 3, continuations: int = 4) -> MeasuredStates:
    """Random games of 3, 1, 4, 2 and 1 turns, a random turn and random actions of each, random returns."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(1, VOCAB, rng.integers(low, high))

    games = []
    for num_turns in (3, 1, 4, 2, 1):
        turns = []
        for _ in range(num_turns):
            action = ids(1, 5)
            turns.append(Turn(ids(1, 6), action, -rng.random(action.size), float(rng.normal()), 0))
        games.append(Trajectory(tuple(turns), ids(0, 3), True, False))
    lengths = rng.integers(1, 5, (5, actions))
    action_ids = np.where(np.arange(4) < lengths[..., None], rng.integers(1, VOCAB, (5, actions, 4)), 0).astype(
        np.int32
    )
    valid = rng.random((5, actions)) < 0.8
    turn = np.array([rng.integers(game.num_turns) for game in games])
    return MeasuredStates(
        games,
        turn,
        action_ids,
        lengths,
        valid,
        3 * rng.normal(size=(5, actions, 1)) + rng.normal(size=(5, actions, continuations)),
        GAMMA,
    )


def with_action(states: MeasuredStates, s: int, k: int) -> Trajectory:
    """The game up to the state, with its k-th action as its last."""
    game, turn = states.games[s], int(states.turn[s])
    action = np.array(states.action(s, k))
    last = Turn(game.turns[turn].observation_ids, action, np.zeros(action.size), 0.0, 0)
    return Trajectory((*game.turns[:turn], last), np.array([]), True, False)


@pytest.mark.parametrize("pessimistic", [True, False])
@pytest.mark.parametrize("trunk", ["frozen", "shared", "separate"])
def test_every_action_is_valued_as_in_a_game_of_its_own(make_lm: MakeLM, trunk: Any, pessimistic: bool) -> None:
    actor, reference = Backbone(make_lm(seed=1), None), Backbone(make_lm(seed=2), None)
    critic = TurnCritic(CriticConfig(trunk=trunk, hidden_size=16), actor, reference, seed=3)
    if critic.own_trunk is not None:
        with torch.no_grad():
            for parameter in critic.own_trunk.parameters():
                parameter.mul_(1.1)
    states = measured()

    def plain(games: list[Trajectory]) -> np.ndarray:
        with torch.no_grad():
            features = read_games(critic.trunk, PackedBatch.from_arrays(pack_trajectories(games)), 0.7)
            q = critic.heads.q_value(features.state, features.action)
        return (q.amin(0) if pessimistic else q.mean(0)).numpy()

    got = score_states(states, critic_score(critic, 0.7, pessimistic=pessimistic), actor)
    np.testing.assert_allclose(got.taken, plain(states.games), atol=1e-5)
    for s in range(5):
        wanted = [plain([with_action(states, s, k)])[-1] for k in range(3)]
        np.testing.assert_allclose(got.fresh[s], wanted, atol=1e-5)
    assert np.ptp(got.fresh) > 1e-3 and np.ptp(got.taken) > 1e-3


def test_passes_change_nothing_and_are_as_large_as_they_may_be(make_lm: MakeLM) -> None:
    actor = Backbone(make_lm(seed=1), None)
    critic = TurnCritic(CriticConfig(hidden_size=16), actor, Backbone(make_lm(seed=2), None), seed=3)
    states = measured()
    sizes: list[int] = []

    def score(batch: PackedBatch, tree: TreeBatch) -> Tensor:
        sizes.append(tree.input_ids.numel())
        return critic_score(critic, 1.0)(batch, tree)

    whole = score_states(states, score, actor)
    assert len(sizes) == 1
    longest = max(2 * game.num_tokens + n.sum() for game, n in zip(states.games, states.lengths, strict=True))
    for limit in (1, longest + 10):
        sizes.clear()
        parts = score_states(states, score, actor, max_pass_tokens=limit)
        assert 1 < len(sizes) < 5 and max(sizes) <= max(limit, longest)
        np.testing.assert_allclose(parts.fresh, whole.fresh, atol=1e-5)
        np.testing.assert_allclose(parts.taken, whole.taken, atol=1e-5)


def test_a_diagnosis_is_of_these_scores_and_returns(make_lm: MakeLM) -> None:
    """Two critics share the states: one that knows the returns, and one that knows the turn."""
    actor, states = Backbone(make_lm(seed=1), None), measured()
    packed = pack_trajectories(states.games, GAMMA)
    exact = {tuple(states.action(s, k)): states.returns[s, k].mean() for s in range(5) for k in range(3)}
    assert len(exact) == 15

    def oracle(batch: PackedBatch, tree: TreeBatch) -> Tensor:
        tokens = [tree.target_ids[tree.branch_ids == b].tolist() for b in range(tree.num_branches)]
        returns = {tuple(t.action_ids.tolist()): g for t, g in zip(turns, packed.returns.tolist(), strict=True)}
        return torch.tensor([exact.get(tuple(t), returns.get(tuple(t))) for t in tokens])

    turns = [turn for game in states.games for turn in game.turns]
    found, scores = diagnose_critic(states, oracle, actor)
    assert found.within.correlation == pytest.approx(1.0) and found.explained_variance == pytest.approx(1.0)
    assert found == diagnose(
        scores.fresh, states.returns, states.valid, scores.taken, packed.returns.astype(np.float64), packed.turn
    )
    assert found.within == within_state(scores.fresh, states.returns, states.valid)
    of_turn, _ = diagnose_critic(states, lambda batch, tree: batch.turn[tree.turn_ids].float(), actor)
    assert of_turn.within.correlation == 0.0
    assert [row.mean_predicted for row in of_turn.calibration] == [0, 1, 2, 3]
    assert [row.num_turns for row in of_turn.calibration] == [5, 3, 2, 1]
