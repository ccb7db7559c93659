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
    ("changes", "message"),
    [
        ({"observation_ids": []}, "observation_ids: wanted a 1-d array of at least one item, got shape (0,)"),
        ({"action_ids": [[1, 2]]}, "action_ids: wanted a 1-d array of at least one item, got shape (1, 2)"),
        ({"rollout_logprobs": [-0.5]}, "rollout_logprobs: wanted one per action token (3), got 1"),
        ({"reward": float("nan")}, "reward: wanted a finite number, got nan"),
        ({"reward": float("inf")}, "reward: wanted a finite number, got inf"),
    ],
)
def test_a_bad_turn_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        turn(**changes)
    assert str(caught.value) == message


def test_a_game_without_turns_is_refused() -> None:
    with pytest.raises(ValueError, match="turns: wanted at least one turn, got none"):
        Trajectory((), np.array([1]), terminated=True, truncated=False)


@pytest.mark.parametrize("both", [True, False])
def test_terminated_and_truncated_exclude_each_other(both: bool) -> None:
    with pytest.raises(ValueError, match=f"exactly one True, got terminated={both}, truncated={both}"):
        Trajectory((turn(),), np.array([1]), terminated=both, truncated=both)
