"""Transitions as flat arrays: each turn with the whole history it answers and the observation behind its action."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from archer_fast.packing import Bool, Float32, Int32, Int64, empty_arrays, monte_carlo_returns
from archer_fast.trajectory import Trajectory


class TransitionArrays(NamedTuple):
    """n transitions in T tokens, A of which their policies sampled as these actions.

    The history, the action and the next observation are one slice of the game, in which three positions say where each
    ends. Of a game of two turns, [17 9] -> [41 2] and [12] -> [5 2], which ends in the task's own way and is answered
    with [30], the second turn and then the first:

        input_ids             17  9 41  2 12  5  2 30 | 17  9 41  2 12
        cu_seqlens             0  8 13
        state_positions        4  9            the last token that the action answers
        action_positions       6 11            the action's last token
        next_state_positions   7 12            the last token that the next action would answer
        turn                   1  0
        rewards                0 -1
        returns                0 -1
        policy_versions        7  7
        is_last                T  .
        terminated             T  .
        truncated              .  .
        rollout_logprobs      -3 -4 | -1 -2
        cu_actions             0  2  4

    Where no observation follows, `next_state_positions` is the action's last token.
    """

    input_ids: Int32  # [T]
    cu_seqlens: Int32  # [n + 1], where each transition's tokens begin; the last is T
    state_positions: Int64  # [n], index into [T]
    action_positions: Int64  # [n], index into [T]
    next_state_positions: Int64  # [n], index into [T]
    turn: Int32  # [n], index of the turn in its game
    rewards: Float32  # [n]
    returns: Float32  # [n], Monte-Carlo, as in PackedArrays
    policy_versions: Int64  # [n]
    is_last: Bool  # [n]
    terminated: Bool  # [n], is_last and the game terminated
    truncated: Bool  # [n], is_last and the game was truncated
    rollout_logprobs: Float32  # [A]
    cu_actions: Int32  # [n + 1], where each action's log-probs begin; the last is A


def transition_sizes(num_transitions: int, num_tokens: int, num_action_tokens: int) -> dict[str, int]:
    """The length of each field of TransitionArrays."""
    sizes = dict.fromkeys(TransitionArrays._fields, num_transitions)
    sizes |= {"input_ids": num_tokens, "rollout_logprobs": num_action_tokens}
    return sizes | dict.fromkeys(("cu_seqlens", "cu_actions"), num_transitions + 1)


def pack_transitions(rows: Sequence[tuple[Trajectory, int]], gamma: float = 1.0) -> TransitionArrays:
    """Transitions of (trajectory, index of the turn): the plain twin, and the specification, of
    `TrajectoryBuffer.collate_transitions`."""
    tokens, logprobs, columns = [], [], []
    num_tokens = 0
    for trajectory, turn in rows:
        turns, present = trajectory.turns, trajectory.turns[turn]
        is_last = turn + 1 == len(turns)
        history = [ids for earlier in turns[:turn] for ids in (earlier.observation_ids, earlier.action_ids)]
        history.append(present.observation_ids)
        behind = trajectory.final_observation_ids if is_last else turns[turn + 1].observation_ids
        tokens += [*history, present.action_ids, behind]
        logprobs.append(present.rollout_logprobs)
        state_end = num_tokens + sum(ids.size for ids in history)
        action_end = state_end + present.action_ids.size
        num_tokens = action_end + behind.size
        returns = monte_carlo_returns([float(np.float32(t.reward)) for t in turns], gamma)
        columns.append((state_end - 1, action_end - 1, num_tokens - 1, turn, present.reward, returns[turn],
                        present.policy_version, is_last, is_last and trajectory.terminated,
                        is_last and trajectory.truncated))  # fmt: skip
    if num_tokens > np.iinfo(np.int32).max:
        raise ValueError(f"rows: wanted at most {np.iinfo(np.int32).max} tokens in all, got {num_tokens}")
    sizes = transition_sizes(len(columns), num_tokens, sum(part.size for part in logprobs))
    packed = empty_arrays(TransitionArrays, sizes)
    packed.input_ids[:] = np.concatenate([[], *tokens])
    packed.rollout_logprobs[:] = np.concatenate([[], *logprobs])
    packed.cu_actions[:] = np.cumsum([0, *(part.size for part in logprobs)])
    for name, column in zip(TransitionArrays._fields[2:12], zip(*columns, strict=True), strict=bool(columns)):
        getattr(packed, name)[:] = column
    packed.cu_seqlens[:] = [0, *(packed.next_state_positions + 1)]
    return packed
