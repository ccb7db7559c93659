"""What actions are credited with, by hand; the token baseline; the division by the root mean square."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_learners import MakeLM, make_learner, random_games
from torch import Tensor, nn

from archer_fast.actor import ScoredActions
from archer_fast.algorithms.credit import (
    TokenBaseline,
    credit_alternatives,
    credit_logged,
    normalised,
    return_spread,
)
from archer_fast.batch import PackedBatch
from archer_fast.config import ActorConfig, Config, CriticConfig
from archer_fast.critic import ActionFeatures, GameFeatures, StateFeatures
from archer_fast.meters import Meters
from archer_fast.packing import pack_trajectories
from archer_fast.trajectory import Trajectory, Turn

pytestmark = pytest.mark.usefixtures("one_thread")


class Heads(nn.Module):
    """V1, V2 and Q1, Q2 stand in the first two places of the state's and of the action's hidden state."""

    def value(self, state: StateFeatures) -> Tensor:
        return state.hidden[:, :2].T

    def q_value(self, state: StateFeatures, action: ActionFeatures) -> Tensor:
        assert state.hidden.shape == action.hidden.shape
        return action.hidden[:, :2].T


def states(*values: tuple[float, float]) -> StateFeatures:
    return StateFeatures(torch.tensor(values), torch.zeros(len(values), dtype=torch.int64))


def actions(*values: tuple[float, float]) -> ActionFeatures:
    return ActionFeatures(torch.tensor(values), torch.zeros(len(values)), torch.zeros(len(values)))


V = [(1.0, 2.0), (1.0, 2.0), (5.0, 4.0)]
Q = [(3.0, 2.0), (0.0, 7.0), (6.0, 8.0)]


@pytest.mark.parametrize(
    ("settings", "advantages", "q"),
    [
        # Two actions of state 3, one of state 1, which has nothing to be compared with.
        ({"advantage": "centred"}, [1.0, -1.0, 0.0], [2.0, 0.0, 6.0]),
        ({"advantage": "centred", "pessimistic": False}, [-0.5, 0.5, 0.0], [2.5, 3.5, 7.0]),
        ({"advantage": "q_minus_v"}, [1.0, -1.0, 2.0], [2.0, 0.0, 6.0]),
        ({"advantage": "q_minus_v", "pessimistic": False}, [1.0, 2.0, 2.5], [2.5, 3.5, 7.0]),
    ],
)
def test_alternatives(settings: dict[str, Any], advantages: list[float], q: list[float]) -> None:
    config = ActorConfig(actions="fresh", **settings)
    got = credit_alternatives(Heads(), states(*V), actions(*Q), torch.tensor([3, 3, 1]), config)
    assert [x.tolist() for x in got] == [advantages, q]


def test_no_alternatives() -> None:
    none = torch.empty(0, 2)
    state, action = StateFeatures(none, torch.empty(0)), ActionFeatures(none, torch.empty(0), torch.empty(0))
    got = credit_alternatives(Heads(), state, action, torch.empty(0, dtype=torch.int64), ActorConfig())
    assert [x.tolist() for x in got] == [[], []]


def two_games() -> tuple[PackedBatch, GameFeatures]:
    """A terminated game with rewards -1, 2 and a truncated one with rewards 4, 8."""
    games = []
    for rewards, terminated in (((-1.0, 2.0), True), ((4.0, 8.0), False)):
        turns = tuple(Turn(np.array([1]), np.array([2]), np.zeros(1), reward, 0) for reward in rewards)
        games.append(Trajectory(turns, np.array([3]), terminated, not terminated))
    state = states((10.0, 20.0), (40.0, 30.0), (50.0, 60.0), (80.0, 70.0))
    action = actions((11.0, 22.0), (44.0, 33.0), (55.0, 66.0), (88.0, 77.0))
    final = states((1000.0, 2000.0), (4.0, 2.0))  # of the terminated game nobody may read
    return PackedBatch.from_arrays(pack_trajectories(games)), GameFeatures(state, action, final, torch.empty(0))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        # r + V(s') / 2 - V(s), V the lesser of two: 10, 30, 50, 70, and 2 after the truncated game
        ({"advantage": "residual"}, [-1 + 15 - 10, 2 - 30, 4 + 35 - 50, 8 + 1 - 70]),
        # their mean: 15, 35, 55, 75, and 3
        ({"advantage": "residual", "pessimistic": False}, [-1 + 17.5 - 15, 2 - 35, 4 + 37.5 - 55, 8 + 1.5 - 75]),
        # residuals 4, -28 and -11, -61: each and a quarter of what follows
        ({"advantage": "residual", "gae_lambda": 0.5}, [4 - 7, -28, -11 - 15.25, -61]),
        ({"advantage": "q_minus_v"}, [1, 3, 5, 7]),
        ({"advantage": "q_minus_v", "pessimistic": False}, [1.5, 3.5, 5.5, 7.5]),
    ],
)
def test_logged_actions(config: dict[str, Any], wanted: list[float]) -> None:
    batch, features = two_games()
    got = credit_logged(Heads(), features, batch, ActorConfig(actions="logged", **config), 0.5)
    assert got.tolist() == wanted


@pytest.mark.parametrize(
    ("spread", "trust"), [(5.0, 1.0), (12.5**0.5, 1.0), (0.25 * 12.5**0.5, 0.25), (0.0, 0.0), (torch.inf, 1.0)]
)
def test_normalised_divides_all_passes_by_one_number(make_lm: MakeLM, spread: float, trust: float) -> None:
    """Less is left where the games' returns differ by less than the advantages."""
    scored = games_passes(make_learner(make_lm, Config()))[0]
    passes = [scored._replace(advantages=torch.tensor(x)) for x in ([3.0, -4.0], [0.0, 5.0])]
    rms = (50 / 4) ** 0.5
    found, trusted = normalised(passes, torch.tensor(spread))
    assert trusted.item() == pytest.approx(trust)
    for got, wanted in zip(found, ([3.0, -4.0], [0.0, 5.0]), strict=True):
        torch.testing.assert_close(got.advantages * rms, trust * torch.tensor(wanted))
        assert got.rows is scored.rows and got.num_actions == scored.num_actions


def test_return_spread_is_of_games_at_the_same_turn() -> None:
    # 1 and 5 at turn 0, 10 and 14 at turn 1, 100 at turn 2 alone: 4 * 4 over two degrees of freedom
    returns, turn = torch.tensor([1.0, 10.0, 100.0, 5.0, 14.0]), torch.tensor([0, 1, 2, 0, 1])
    assert return_spread(returns, turn).item() == pytest.approx(8**0.5)
    assert return_spread(returns[:3], turn[:3]).item() == float("inf"), "nothing to compare"
    assert return_spread(returns[:0], turn[:0]).item() == float("inf")


# -- the token baseline ----------------------------------------------------------------------------


def games_passes(learner: Any) -> list[ScoredActions]:
    """Nine games in two passes, credited with 0.7 a turn."""
    passes = []
    games = random_games()
    for own in (games[:4], games[4:]):
        batch = PackedBatch.from_arrays(pack_trajectories(own))
        layout = learner.reference.layout(batch.cu_seqlens, batch.lengths)
        passes.append(ScoredActions.of_games(batch, layout, None, torch.full((sum(batch.num_turns),), 0.7)))
    return passes


def test_the_baseline_learns_a_constant_and_leaves_the_trunk_alone(make_lm: MakeLM) -> None:
    config = Config(critic=CriticConfig(hidden_size=16, lr=1e-2))
    learner = make_learner(make_lm, config)
    passes, baseline, meters = games_passes(learner), TokenBaseline(config, learner.reference), Meters()
    trunk = {name: tensor.clone() for name, tensor in learner.reference.state_dict().items()}
    losses = []
    for _ in range(150):
        left = baseline(passes, np.arange(9), meters)
        losses.append(meters.read()["baseline_loss"])
    baseline.step.check(meters)
    assert losses[0] > 0.2 and losses[-1] < 1e-3
    for scored, own in zip(left, passes, strict=True):
        assert scored.advantages.abs().max() < 0.1 and not scored.advantages.requires_grad
        assert scored.target_ids is own.target_ids
    assert all(torch.equal(trunk[name], tensor) for name, tensor in learner.reference.state_dict().items())
    assert all(p.grad is None for p in learner.reference.parameters())


def test_what_is_subtracted_is_the_baseline_before_its_step(make_lm: MakeLM) -> None:
    """The mean of its two heads, each token's on the state it is predicted from and its turn's index."""
    config = Config(critic=CriticConfig(hidden_size=16, lr=1e-1))
    learner = make_learner(make_lm, config)
    passes, baseline = games_passes(learner), TokenBaseline(config, learner.reference)
    wanted = []
    with torch.no_grad():
        for scored in passes:
            hidden = learner.reference(scored.input_ids, scored.position_ids, scored.layout)
            for row, turn in zip(scored.rows.tolist(), scored.turn.tolist(), strict=True):
                state = StateFeatures(hidden[row][None], torch.tensor([turn]))
                wanted.append(0.7 - float(baseline.value(state).mean()))
    for _ in range(2):
        got = torch.cat([scored.advantages for scored in baseline(passes, np.arange(9), Meters())])
        differs = not torch.allclose(got, torch.tensor(wanted), rtol=1e-4, atol=1e-5)
        assert differs == (baseline.step.num_steps == 2)
