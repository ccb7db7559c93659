"""Turn and Trajectory: what they hold, derive and refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from archer_fast.trajectory import Trajectory, Turn


def turn(**changes: Any) -> Turn:
    fields: dict[str, Any] = {
        "observation_ids": [17, 9],
        "action_ids": [41, 8, 2],
        "rollout_logprobs": [-0.5, -1.5, -0.25],
        "reward": -1.0,
        "policy_version": 3,
    }
    return Turn(**(fields | changes))


def test_stream_counts_and_return_of_a_game() -> None:
    last = turn(observation_ids=[12], action_ids=[5], rollout_logprobs=[-0.1], reward=0.25)
    trajectory = Trajectory((turn(), last), np.array([30, 31]), terminated=True, truncated=False)
    assert trajectory.input_ids.tolist() == [17, 9, 41, 8, 2, 12, 5, 30, 31]
    assert trajectory.input_ids.dtype == np.int32
    assert trajectory.num_tokens == 9
    assert trajectory.num_turns == 2
    assert trajectory.episode_return == -0.75
    assert trajectory.info == {}


def test_what_is_already_as_wanted_is_kept_without_a_copy() -> None:
    ids, logprobs = np.array([41, 2], np.int32), np.array([-0.5, -1.5], np.float32)
    made = turn(observation_ids=ids, action_ids=ids, rollout_logprobs=logprobs)
    final = Trajectory((made,), ids, terminated=True, truncated=False).final_observation_ids
    assert made.observation_ids is ids and made.action_ids is ids and final is ids
    assert made.rollout_logprobs is logprobs


def test_scalars_become_pythons() -> None:
    made = turn(reward=np.float32(0.5), policy_version=np.int64(7))
    assert [(type(x), x) for x in (made.reward, made.policy_version)] == [(float, 0.5), (int, 7)]
    game = Trajectory((made,), np.array([]), np.bool_(True), np.bool_(False))  # type: ignore[arg-type]
    assert game.terminated is True and game.truncated is False


def test_final_observation_may_be_empty() -> None:
    trajectory = Trajectory((turn(),), np.array([]), terminated=False, truncated=True)
    assert trajectory.input_ids.tolist() == [17, 9, 41, 8, 2]
    assert trajectory.num_tokens == 5
    assert trajectory.final_observation_ids.dtype == np.int32


def test_arrays_become_contiguous_int32_and_float32() -> None:
    made = turn(action_ids=np.arange(6)[::2], rollout_logprobs=np.zeros(3))
    assert made.action_ids.tolist() == [0, 2, 4]
    assert made.action_ids.dtype == np.int32 and made.action_ids.flags.c_contiguous
    assert made.rollout_logprobs.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"observation_ids": []}, ValueError, "observation_ids: wanted at least 1 token, got none"),
        ({"observation_ids": [1.7]}, TypeError, "observation_ids: wanted integers that fit into int32, got float64"),
        ({"observation_ids": [True]}, TypeError, "observation_ids: wanted integers that fit into int32, got bool"),
        (
            {"observation_ids": [2**32 + 5]},
            ValueError,
            "observation_ids: wanted integers that fit into int32, got 4294967301 to 4294967301",
        ),
        ({"action_ids": [[1, 2]]}, ValueError, "action_ids: wanted 1 dimension, got shape (1, 2)"),
        ({"action_ids": np.ones(3)}, TypeError, "action_ids: wanted integers that fit into int32, got float64"),
        ({"rollout_logprobs": [-0.5]}, ValueError, "rollout_logprobs: wanted one per action token (3), got 1"),
        ({"rollout_logprobs": ["a"] * 3}, TypeError, "rollout_logprobs: wanted real numbers, got <U1"),
        ({"rollout_logprobs": [[-0.5] * 3]}, ValueError, "rollout_logprobs: wanted 1 dimension, got shape (1, 3)"),
        ({"reward": float("nan")}, ValueError, "reward: wanted a finite number, got nan"),
        ({"reward": float("inf")}, ValueError, "reward: wanted a finite number, got inf"),
        ({"reward": None}, TypeError, "reward: wanted a real number, got None"),
        ({"reward": "1"}, TypeError, "reward: wanted a real number, got '1'"),
        ({"policy_version": 1.5}, TypeError, "policy_version: wanted an integer from -2**63 to 2**63 - 1, got 1.5"),
        (
            {"policy_version": 2**63},
            ValueError,
            "policy_version: wanted an integer from -2**63 to 2**63 - 1, got 9223372036854775808",
        ),
    ],
)
def test_a_bad_turn_is_refused_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        turn(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"final_observation_ids": [1.0]},
            TypeError,
            "final_observation_ids: wanted integers that fit into int32, got float64",
        ),
        (
            {"final_observation_ids": np.array([[1, 2]], np.int32)},
            ValueError,
            "final_observation_ids: wanted 1 dimension, got shape (1, 2)",
        ),
        ({"terminated": "False"}, TypeError, "terminated: wanted True or False, got 'False'"),
        ({"truncated": 0}, TypeError, "truncated: wanted True or False, got 0"),
    ],
)
def test_a_bad_end_is_refused_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    fields = {"final_observation_ids": [30], "terminated": True, "truncated": False} | changes
    with pytest.raises(error) as caught:
        Trajectory((turn(),), **fields)
    assert str(caught.value) == message


def test_a_game_without_turns_is_refused() -> None:
    with pytest.raises(ValueError, match="turns: wanted at least one turn, got none"):
        Trajectory((), np.array([1]), terminated=True, truncated=False)


@pytest.mark.parametrize("both", [True, False])
def test_terminated_and_truncated_exclude_each_other(both: bool) -> None:
    with pytest.raises(ValueError, match=f"exactly one True, got terminated={both}, truncated={both}"):
        Trajectory((turn(),), np.array([1]), terminated=both, truncated=both)
