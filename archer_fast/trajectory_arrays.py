"""Many trajectories as a few flat arrays: how they are loaded in bulk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from archer_fast.arguments import MAX_INT32, MIN_INT32, as_integer
from archer_fast.trajectory import Trajectory

Bool = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


class TrajectoryArrays(NamedTuple):
    """B trajectories end to end: N turns, T tokens, A action tokens of all of them.

    Two games. The first has two turns, [17 9] -> [41 2] and [12] -> [5 2], and is answered with [30]; the second has
    one turn, [17] -> [8 2], and no final observation:

        tokens              17 9 41 2 12 5 2 30 | 17 8 2
        num_tokens           8                  |  3
        num_turns            2                  |  1
        observation_lengths  2        1         |  1
        action_lengths       2        2         |  2
        rollout_logprobs    -1 -2    -3 -4      | -5 -6
        rewards             -1        0         | -1
        policy_versions      7        7         |  7
        terminated           T                  |  .
        truncated            .                  |  T
        task_ids             0                  |  0
    """

    tokens: Int32  # [T], o_0 a_0 o_1 a_1 ... o_final of each
    num_tokens: Int32  # [B]
    num_turns: Int32  # [B], at least 1
    observation_lengths: Int32  # [N], at least 1
    action_lengths: Int32  # [N], at least 1
    rollout_logprobs: Float32  # [A]
    rewards: Float32  # [N]
    policy_versions: Int64  # [N]
    terminated: Bool  # [B]
    truncated: Bool  # [B], exactly one of the two
    task_ids: Int32  # [B], which task was played


def flatten(trajectories: Sequence[Trajectory], task_ids: Sequence[int]) -> TrajectoryArrays:
    """The arrays of some trajectories and of their tasks, as many. TypeError or ValueError names what does not fit."""
    for i, trajectory in enumerate(trajectories):
        if not isinstance(trajectory, Trajectory):
            raise TypeError(f"trajectories[{i}]: wanted a Trajectory, got {type(trajectory).__name__}")
    tasks = [as_integer(f"task_ids[{i}]", task_id, MIN_INT32, MAX_INT32) for i, task_id in enumerate(task_ids)]
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    streams = [trajectory.input_ids for trajectory in trajectories]
    with np.errstate(over="ignore"):  # a reward beyond float32 becomes inf, which the core refuses by name
        rewards = np.array([turn.reward for turn in turns], np.float32)
    return TrajectoryArrays(
        tokens=np.concatenate([np.empty(0, np.int32), *streams]),
        num_tokens=np.array([trajectory.num_tokens for trajectory in trajectories], np.int32),
        num_turns=np.array([trajectory.num_turns for trajectory in trajectories], np.int32),
        observation_lengths=np.array([turn.observation_ids.size for turn in turns], np.int32),
        action_lengths=np.array([turn.action_ids.size for turn in turns], np.int32),
        rollout_logprobs=np.concatenate([np.empty(0, np.float32), *(turn.rollout_logprobs for turn in turns)]),
        rewards=rewards,
        policy_versions=np.array([turn.policy_version for turn in turns], np.int64),
        terminated=np.array([trajectory.terminated for trajectory in trajectories], np.bool_),
        truncated=np.array([trajectory.truncated for trajectory in trajectories], np.bool_),
        task_ids=np.array(tasks, np.int32),
    )
