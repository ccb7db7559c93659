"""Measuring a policy: what it depends on, its standard error, and a game as people read it."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch

from archer_fast.backbone import Backbone
from archer_fast.config import RolloutConfig, TaskConfig
from archer_fast.envs import registry
from archer_fast.evaluation import (
    EVALUATION_SEED,
    Evaluation,
    as_greedy,
    encoder,
    evaluate_policy,
    render_game,
    summarise,
)
from archer_fast.tiny_model import TinyModel, build_tiny_model
from archer_fast.trajectory import Trajectory, Turn

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = TaskConfig("guess-number", {"high": 4, "max_turns": 5})


@pytest.fixture(scope="module")
def policy() -> tuple[Backbone, int]:
    sizes = TinyModel(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, max_positions=128)
    return build_tiny_model(registry.get("guess-number").vocabulary_text(high=4), sizes, seed=0)


def evaluate(policy: tuple[Backbone, int], seed: int = 0, games: int = 12, **options: Any) -> Evaluation:
    return evaluate_policy(
        *policy, TASK, RolloutConfig(num_slots=5, max_new_tokens=3), games=games, seed=seed, **options
    )


def tokens(evaluation: Evaluation) -> list[list[int]]:
    return [game.input_ids.tolist() for game in evaluation.trajectories]


def game(returns: float, turns: int = 1, **info: Any) -> Trajectory:
    rewards = [0.0] * (turns - 1) + [returns]
    made = tuple(Turn(np.array([1]), np.array([2]), np.array([0.0]), reward, 0) for reward in rewards)
    return Trajectory(made, np.array([]), True, False, info)


def test_the_seed_alone_decides(policy: tuple[Backbone, int]) -> None:
    torch.manual_seed(1)
    first = evaluate(policy)
    torch.manual_seed(2)
    assert tokens(evaluate(policy)) == tokens(first)
    assert tokens(evaluate(policy, seed=1)) != tokens(first)


def test_the_runs_own_random_numbers_are_not_touched(policy: tuple[Backbone, int]) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    evaluate(policy)
    assert torch.equal(torch.rand(4), wanted)


def test_its_games_are_never_those_of_training(policy: tuple[Backbone, int]) -> None:
    seeds = [played.info["seed"] for played in evaluate(policy, seed=7).trajectories]
    assert seeds == list(range(EVALUATION_SEED + 7_000_000, EVALUATION_SEED + 7_000_012))
    assert min(seeds) > 1_000 * 1_000_000_000  # training begins at seed * 10**9


def test_greedy_is_the_same_for_every_seed_of_the_sampler(policy: tuple[Backbone, int]) -> None:
    """The first action of every game is that of the same text: greedy must answer all alike, sampling must not."""

    def first_actions(seed: int, greedy: bool) -> set[tuple[int, ...]]:
        played = evaluate(policy, seed=seed, games=20, greedy=greedy).trajectories
        return {tuple(one.turns[0].action_ids.tolist()) for one in played}

    assert len(first_actions(0, True)) == 1
    assert first_actions(0, True) == first_actions(5, True)
    assert len(first_actions(0, False)) > 3
    assert tokens(evaluate(policy, greedy=True)) == tokens(evaluate(policy, greedy=True))


def test_every_game_is_told(policy: tuple[Backbone, int]) -> None:
    seen: list[Trajectory] = []
    evaluation = evaluate(policy, on_game=seen.append)
    assert len(seen) == evaluation.num_games == 12
    assert {id(x) for x in seen} == {id(x) for x in evaluation.trajectories}


def test_the_mean_and_its_standard_error() -> None:
    returns = [-1.0, -5.0, -2.5, 0.0, -20.0]
    got = summarise([game(r) for r in returns])
    assert got.num_games == 5
    assert got.mean_return == pytest.approx(statistics.mean(returns))
    assert got.standard_error == pytest.approx(statistics.stdev(returns) / math.sqrt(5))


def test_one_game_has_no_spread_and_none_has_no_mean() -> None:
    one = summarise([game(-3.0)])
    assert (one.mean_return, one.standard_error) == (-3.0, 0.0)
    none = summarise([])
    assert math.isnan(none.mean_return) and none.num_games == 0 and none.win_rate == 0.0


def test_shares_are_per_turn_and_wins_per_game() -> None:
    played = [
        game(-3.0, 4, won=True, kinds={"turns": 4, "guess": 1, "question": 3, "repeat": 2}),
        game(-5.0, 6, won=False, kinds={"turns": 6, "question": 5, "invalid": 1}),
        game(-9.0, 2),  # a task that tells nothing
    ]
    got = summarise(played)
    assert got.win_rate == pytest.approx(1 / 3) and got.mean_turns == 4.0
    assert got.shares == pytest.approx({"guess": 0.1, "invalid": 0.1, "question": 0.8, "repeat": 0.2})
    assert got.as_metrics("eval_") == pytest.approx(
        {
            "eval_return": -17 / 3,
            "eval_return_se": got.standard_error,
            "eval_win_rate": 1 / 3,
            "eval_guess": 0.1,
            "eval_invalid": 0.1,
            "eval_question": 0.8,
            "eval_repeat": 0.2,
            "eval_turns": 4.0,
            "eval_entropy": 0.0,
            "eval_action_length": 1.0,
        }
    )


def test_entropy_is_a_token_action_length_a_turn_and_kl_what_was_asked_for() -> None:
    turns = (
        Turn(np.array([1]), np.array([2, 3, 4]), np.array([-0.5, -1.0, -0.25]), 0.0, 0),
        Turn(np.array([1]), np.array([2]), np.array([-2.25]), -1.0, 0),
    )
    played = [Trajectory(turns, np.array([]), True, False, {}), game(-1.0)]
    got = summarise(played)
    assert got.entropy == pytest.approx(4 / 5) and got.action_length == pytest.approx(5 / 3)
    assert "kl" not in got.behaviour
    got.kl = 1.5
    assert got.as_metrics("eval_")["eval_kl"] == got.behaviour["kl"] == 1.5
    sure = summarise([game(-1.0)]).entropy
    assert sure == 0 and math.copysign(1, sure) == 1, "-0.0 is no figure for a log"


def test_what_is_said_of_a_greedy_policy() -> None:
    got = as_greedy(summarise([game(-1.0, won=True), game(-4.0)]))
    assert got == pytest.approx({"greedy_return": -2.5, "greedy_return_se": 1.5, "greedy_win_rate": 0.5})


def test_a_game_as_it_is_read(policy: tuple[Backbone, int]) -> None:
    backbone, stop = policy
    encode = encoder(backbone.tokenizer)

    def turn(observation: str, action: str, reward: float) -> Turn:
        ids = np.array([*encode(action), stop])
        return Turn(np.array(encode(observation)), ids, np.zeros(ids.size), reward, 0)

    played = Trajectory(
        (turn("Guess 1 to 4.\n", "2", -1.0), turn(" Higher.\n", "4", 0.0)), np.array(encode(" Correct.\n")), True, False
    )
    assert render_game(played, backbone.tokenizer) == "Guess 1 to 4.\n2 Higher.\n4 Correct.\n[return -1]"


def test_encode_adds_no_special_tokens(policy: tuple[Backbone, int]) -> None:
    backbone, stop = policy
    ids = encoder(backbone.tokenizer)(" Higher.\n")
    assert stop not in ids and backbone.tokenizer.decode(ids) == " Higher.\n"
