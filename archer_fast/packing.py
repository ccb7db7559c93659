"""Packed arrays: ragged trajectories end to end, never padded, with what ties tokens to turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from archer_fast.trajectory import Trajectory

Bool = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Arrays = TypeVar("Arrays", bound=NamedTuple)


class PackedArrays(NamedTuple):
    """B trajectories as one sequence of T tokens and N turns.

    Two games. The first has two turns, [17 9] -> [41 2] and [12] -> [5 2], ends in the task's own way and is
    answered with [30]; the second has one turn, [17] -> [8 2], is cut there and has no final observation:

        input_ids         17  9 41  2 12  5  2 30 17  8  2
        position_ids       0  1  2  3  4  5  6  7  0  1  2
        cu_seqlens         0  8 11
        turn_ids           0  0  0  0  1  1  1  1  2  2  2
        action_mask        .  .  T  T  .  T  T  .  .  T  T
        cu_turns           0  2  3
        state_positions    1  4  8
        action_positions   3  6 10
        final_positions    7 10
        turn               0  1  0
        rewards           -1  0 -1
        returns           -1  0 -1
        policy_versions    7  7  7
        terminated         T  .
        truncated          .  T
        rollout_logprobs   0  0 -1 -2  0 -3 -4  0  0 -5 -6

    An observation belongs to the turn whose action answers it; the final observation, which no action answers,
    belongs to the last turn. Where it is empty, `final_positions` is the last action's last token.
    """

    input_ids: Int32  # [T]
    position_ids: Int32  # [T], restart at 0 in every trajectory
    cu_seqlens: Int32  # [B + 1], where each trajectory's tokens begin; the last is T
    turn_ids: Int32  # [T], turn of this batch, 0 .. N - 1
    action_mask: Bool  # [T], True where the policy sampled the token
    cu_turns: Int32  # [B + 1], where each trajectory's turns begin; the last is N
    state_positions: Int64  # [N], last observation token before the action: index into [T]
    action_positions: Int64  # [N], last action token: index into [T]
    final_positions: Int64  # [B], last token: index into [T]
    turn: Int32  # [N], index of the turn inside its trajectory
    rewards: Float32  # [N]
    returns: (
        Float32  # [N], Monte-Carlo: reward + gamma * that of the next turn; nothing stands for what a cut-off game lost
    )
    policy_versions: Int64  # [N]
    terminated: Bool  # [B]
    truncated: Bool  # [B]
    rollout_logprobs: Float32  # [T], 0 where action_mask is False


# Of every kind of batch: a name has one dtype, whatever it stands in.
DTYPES: dict[str, type[np.generic]] = {
    **dict.fromkeys(("input_ids", "position_ids", "turn_ids", "turn"), np.int32),
    **dict.fromkeys(("cu_seqlens", "cu_turns", "cu_actions"), np.int32),
    **dict.fromkeys(("state_positions", "action_positions", "next_state_positions", "final_positions"), np.int64),
    "policy_versions": np.int64,
    **dict.fromkeys(("rewards", "returns", "rollout_logprobs"), np.float32),
    **dict.fromkeys(("attention_mask", "action_mask", "is_last", "terminated", "truncated"), np.bool_),
}


def empty_arrays(kind: type[Arrays], sizes: dict[str, int]) -> Arrays:
    """Uninitialised arrays for a NamedTuple's fields, of these lengths, to be written to."""
    return kind._make(np.empty(sizes[name], DTYPES[name]) for name in kind._fields)


def packed_sizes(num_trajectories: int, num_turns: int, num_tokens: int) -> dict[str, int]:
    """The length of each field of PackedArrays."""
    per_token = ("input_ids", "position_ids", "turn_ids", "action_mask", "rollout_logprobs")
    per_turn = ("state_positions", "action_positions", "turn", "rewards", "returns", "policy_versions")
    sizes = dict.fromkeys(PackedArrays._fields, num_trajectories)
    sizes |= dict.fromkeys(per_token, num_tokens) | dict.fromkeys(per_turn, num_turns)
    return sizes | dict.fromkeys(("cu_seqlens", "cu_turns"), num_trajectories + 1)


def monte_carlo_returns(rewards: Sequence[float], gamma: float) -> list[float]:
    """reward + gamma * the return of the next turn, for each turn: [-1, 0, -1] with gamma .5 -> [-1.25, -.5, -1]."""
    returns: list[float] = []
    rest = 0.0
    for reward in reversed(rewards):
        rest = reward + gamma * rest
        returns.append(rest)
    return returns[::-1]


def pack_trajectories(trajectories: Sequence[Trajectory], gamma: float = 1.0) -> PackedArrays:
    """Lay the trajectories end to end: the plain twin, and the specification, of `TrajectoryBuffer.collate`."""
    num_tokens = sum(trajectory.num_tokens for trajectory in trajectories)
    if num_tokens > np.iinfo(np.int32).max:
        raise ValueError(f"trajectories: wanted at most {np.iinfo(np.int32).max} tokens in all, got {num_tokens}")
    num_turns = sum(trajectory.num_turns for trajectory in trajectories)
    packed = empty_arrays(PackedArrays, packed_sizes(len(trajectories), num_turns, num_tokens))
    packed.action_mask[:] = False
    packed.rollout_logprobs[:] = 0.0

    position, row = 0, 0  # of the next token and the next turn
    for b, trajectory in enumerate(trajectories):
        packed.cu_seqlens[b], packed.cu_turns[b] = position, row
        begin = position
        rewards = [float(np.float32(turn.reward)) for turn in trajectory.turns]  # as they are stored
        packed.returns[row : row + trajectory.num_turns] = monte_carlo_returns(rewards, gamma)
        for i, turn in enumerate(trajectory.turns):
            action_begin = position + turn.observation_ids.size
            action_end = action_begin + turn.action_ids.size
            packed.input_ids[position:action_begin] = turn.observation_ids
            packed.input_ids[action_begin:action_end] = turn.action_ids
            packed.turn_ids[position:action_end] = row
            packed.action_mask[action_begin:action_end] = True
            packed.rollout_logprobs[action_begin:action_end] = turn.rollout_logprobs
            packed.state_positions[row] = action_begin - 1
            packed.action_positions[row] = action_end - 1
            packed.turn[row] = i
            packed.rewards[row] = turn.reward
            packed.policy_versions[row] = turn.policy_version
            position, row = action_end, row + 1
        end = position + trajectory.final_observation_ids.size
        packed.input_ids[position:end] = trajectory.final_observation_ids
        packed.turn_ids[position:end] = row - 1
        packed.position_ids[begin:end] = np.arange(end - begin)
        packed.final_positions[b] = end - 1
        packed.terminated[b] = trajectory.terminated
        packed.truncated[b] = trajectory.truncated
        position = end
    packed.cu_seqlens[-1], packed.cu_turns[-1] = position, row
    assert_invariants(packed)
    return packed


def assert_invariants(packed: PackedArrays) -> None:
    """What every packed batch holds, whoever made it."""
    num_trajectories, num_turns, num_tokens = packed.terminated.size, packed.rewards.size, packed.input_ids.size
    wanted = empty_arrays(PackedArrays, packed_sizes(num_trajectories, num_turns, num_tokens))
    for name, array in packed._asdict().items():
        model = getattr(wanted, name)
        assert (array.dtype, array.shape) == (model.dtype, model.shape), (name, array.dtype, array.shape)

    for cu, total in ((packed.cu_seqlens, num_tokens), (packed.cu_turns, num_turns)):
        assert cu[0] == 0 and cu[-1] == total
        assert (np.diff(cu) >= 1).all()
    starts = np.repeat(packed.cu_seqlens[:-1], np.diff(packed.cu_seqlens))
    assert (packed.position_ids == np.arange(num_tokens) - starts).all()
    assert (packed.final_positions == packed.cu_seqlens[1:] - 1).all()
    first_rows = np.repeat(packed.cu_turns[:-1], np.diff(packed.cu_turns))
    assert (packed.turn == np.arange(num_turns) - first_rows).all()

    rows = np.arange(num_turns)
    assert (packed.turn_ids[packed.state_positions] == rows).all()
    assert (packed.turn_ids[packed.action_positions] == rows).all()
    assert (np.diff(packed.turn_ids) >= 0).all()
    assert not packed.action_mask[packed.state_positions].any()
    assert packed.action_mask[packed.action_positions].all()
    assert packed.action_mask.sum() == (packed.action_positions - packed.state_positions).sum()
    assert (packed.rollout_logprobs[~packed.action_mask] == 0).all()
    assert (packed.terminated != packed.truncated).all()
