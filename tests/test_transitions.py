"""Transitions: the worked example, and the C++ collation against the plain twin."""

from __future__ import annotations

import numpy as np
import pytest
from random_games import assert_same, poisoned, random_trajectories

from archer_fast.buffer import TrajectoryBuffer
from archer_fast.trajectory import Trajectory, Turn
from archer_fast.transitions import TransitionArrays, pack_transitions

TWO_TURNS = Trajectory(
    (
        Turn(np.array([17, 9]), np.array([41, 2]), np.array([-1.0, -2.0]), -1.0, 7),
        Turn(np.array([12]), np.array([5, 2]), np.array([-3.0, -4.0]), 0.0, 7),
    ),
    np.array([30]),
    terminated=True,
    truncated=False,
)


def as_in_the_docstring() -> TransitionArrays:
    return TransitionArrays(
        input_ids=np.array([17, 9, 41, 2, 12, 5, 2, 30, 17, 9, 41, 2, 12], np.int32),
        cu_seqlens=np.array([0, 8, 13], np.int32),
        state_positions=np.array([4, 9]),
        action_positions=np.array([6, 11]),
        next_state_positions=np.array([7, 12]),
        turn=np.array([1, 0], np.int32),
        rewards=np.array([0, -1], np.float32),
        returns=np.array([0, -1], np.float32),
        policy_versions=np.array([7, 7]),
        is_last=np.array([True, False]),
        terminated=np.array([True, False]),
        truncated=np.array([False, False]),
        rollout_logprobs=np.array([-3, -4, -1, -2], np.float32),
        cu_actions=np.array([0, 2, 4], np.int32),
    )


def test_the_worked_example() -> None:
    assert_same(pack_transitions([(TWO_TURNS, 1), (TWO_TURNS, 0)]), as_in_the_docstring())
    buffer = TrajectoryBuffer(100, 10)
    buffer.push(TWO_TURNS)
    assert_same(buffer.collate_transitions([1, 0]), as_in_the_docstring())


def test_a_turn_without_an_observation_behind_it() -> None:
    game = Trajectory(TWO_TURNS.turns[:1], np.array([], np.int32), terminated=False, truncated=True)
    buffer = TrajectoryBuffer(100, 10)
    buffer.push(game)
    got = buffer.collate_transitions([0])
    assert got.next_state_positions == got.action_positions == [3]
    assert (got.is_last, got.terminated, got.truncated) == ([True], [False], [True])
    assert_same(got, pack_transitions([(game, 0)]))


@pytest.mark.parametrize("vocab_size", [None, 600])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_buffer_agrees_with_the_plain_twin(vocab_size: int | None, gamma: float) -> None:
    games = random_trajectories(60, vocab_size=vocab_size or 2**31)
    buffer = TrajectoryBuffer(10**6, 40, vocab_size=vocab_size, gamma=gamma)
    buffer.extend(games)
    first, end = buffer.turn_range
    owners = buffer.trajectory_of(np.arange(first, end))
    rows = [(games[owner], turn) for owner in np.unique(owners) for turn in range(games[owner].num_turns)]
    for ids in (np.arange(first, end), buffer.sample_turns(300), np.array([end - 1, first, first])):
        got = buffer.collate_transitions(ids, memory=poisoned)
        assert_same(got, pack_transitions([rows[i - first] for i in ids], gamma))


def test_many_transitions_on_several_threads() -> None:
    buffer = TrajectoryBuffer(10**6, 100)
    buffer.extend(random_trajectories(100))
    ids = buffer.sample_turns(40_000)
    assert buffer.collate_transitions(ids).input_ids.nbytes > 2 << 20, "what two threads are worth (parallel_ranges.h)"
    assert_same(buffer.collate_transitions(ids, threads=2), buffer.collate_transitions(ids))


def test_no_transitions() -> None:
    got = TrajectoryBuffer(100, 10).collate_transitions([])
    assert_same(got, pack_transitions([]))
    assert got.cu_seqlens.tolist() == got.cu_actions.tolist() == [0]


def test_bad_ids_are_named() -> None:
    buffer = TrajectoryBuffer(100, 1)
    buffer.extend([TWO_TURNS, TWO_TURNS])
    with pytest.raises(IndexError, match=r"turn_ids\[1\]: wanted a live id in \[2, 4\), got 1"):
        buffer.collate_transitions([2, 1])
    with pytest.raises(TypeError, match="turn_ids: wanted integers that fit into int64, got float64"):
        buffer.collate_transitions([0.0])
