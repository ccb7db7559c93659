"""Padded rows: the worked example, and the C++ collations against the plain twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from random_games import assert_same, poisoned, random_trajectories

from archer_fast.buffer import TrajectoryBuffer
from archer_fast.packing import pack_trajectories
from archer_fast.padding import Side, pad_packed, pad_transitions
from archer_fast.trajectory import Trajectory, Turn


def two_games() -> TrajectoryBuffer:
    """Those of PackedArrays."""
    buffer = TrajectoryBuffer(100, 10)
    first = (
        Turn(np.array([17, 9]), np.array([41, 2]), np.array([-1.0, -2.0]), -1.0, 7),
        Turn(np.array([12]), np.array([5, 2]), np.array([-3.0, -4.0]), 0.0, 7),
    )
    second = (Turn(np.array([17]), np.array([8, 2]), np.array([-5.0, -6.0]), -1.0, 7),)
    buffer.push(Trajectory(first, np.array([30]), terminated=True, truncated=False))
    buffer.push(Trajectory(second, np.array([], np.int32), terminated=False, truncated=True))
    return buffer


def test_the_worked_example() -> None:
    got = two_games().collate_padded([0, 1], pad_token_id=0, side="left")
    assert got.input_ids.tolist() == [[17, 9, 41, 2, 12, 5, 2, 30], [0, 0, 0, 0, 0, 17, 8, 2]]
    assert got.attention_mask.tolist() == [[True] * 8, [False] * 5 + [True] * 3]
    assert got.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 0, 0, 1, 2]]
    assert got.turn_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [-1, -1, -1, -1, -1, 2, 2, 2]]
    assert got.state_positions.tolist() == [1, 4, 13]
    assert got.cu_seqlens.tolist() == [0, 8, 11]


def test_log_probs_of_transitions_go_to_their_places_by_the_mask() -> None:
    got = two_games().collate_padded_transitions([2, 1], pad_token_id=9)
    assert got.input_ids.tolist() == [[17, 8, 2, 9, 9, 9, 9, 9], [17, 9, 41, 2, 12, 5, 2, 30]]
    logprobs = np.zeros(got.input_ids.shape, np.float32)
    logprobs[got.action_mask] = got.rollout_logprobs
    assert logprobs.tolist() == [[0, -5, -6, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, -3, -4, 0]]
    assert got.input_ids.ravel()[got.action_positions].tolist() == [2, 2]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spare", [None, 0, 5])
def test_the_buffer_agrees_with_the_plain_twins(side: Side, spare: int | None) -> None:
    games = random_trajectories(60)
    buffer = TrajectoryBuffer(10**6, 100, gamma=0.9)
    buffer.extend(games)
    for ids in (np.arange(60), buffer.sample_trajectories(7), np.array([3, 3])):
        packed = buffer.collate(ids)
        longest = int(np.diff(packed.cu_seqlens).max())
        width = None if spare is None else longest + spare
        got = buffer.collate_padded(ids, 7, side, width, memory=poisoned)
        assert got.input_ids.shape == (ids.size, width or longest)
        assert_same(got, pad_packed(pack_trajectories([games[i] for i in ids], 0.9), 7, side, width or longest))
    turn_ids = buffer.sample_turns(50)
    transitions = buffer.collate_transitions(turn_ids)
    longest = int(np.diff(transitions.cu_seqlens).max())
    width = None if spare is None else longest + spare
    rows = buffer.collate_padded_transitions(turn_ids, 7, side, width, memory=poisoned)
    assert_same(rows, pad_transitions(transitions, 7, side, width or longest))


@pytest.mark.parametrize("side", ["left", "right"])
def test_enough_rows_for_two_threads(side: Side) -> None:
    buffer = TrajectoryBuffer(10**6, 100)
    buffer.extend(random_trajectories(100))
    ids, turns = np.tile(np.arange(100), 60), buffer.sample_turns(30_000)
    games = buffer.collate_padded(ids, 7, side)
    assert games.input_ids.size * 17 > 2 << 20, "what two threads are worth (csrc/parallel_ranges.h)"
    assert_same(buffer.collate_padded(ids, 7, side, threads=2), games)
    rows = buffer.collate_padded_transitions(turns, 7, side)
    assert rows.input_ids.nbytes > 2 << 20
    assert_same(buffer.collate_padded_transitions(turns, 7, side, threads=2), rows)


def test_no_rows() -> None:
    buffer = TrajectoryBuffer(100, 10)
    assert buffer.collate_padded([], 0, width=4).input_ids.shape == (0, 4)
    assert buffer.collate_padded_transitions([], 0).action_mask.shape == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"side": "middle"}, ValueError, "side: wanted 'left' or 'right', got 'middle'"),
        ({"pad_token_id": -1}, ValueError, r"pad_token_id: wanted an integer from 0 to 2\*\*31 - 1, got -1"),
        ({"pad_token_id": 2**31}, ValueError, r"pad_token_id: wanted an integer .* 2\*\*31 - 1, got 2147483648"),
        ({"pad_token_id": np.float32(0.0)}, TypeError, r"pad_token_id: wanted an integer .*, got .*0\.0"),
        ({"pad_token_id": None}, TypeError, "pad_token_id: wanted an integer .*, got None"),
        ({"width": 7}, ValueError, "width: wanted 8, the longest row, to 1073741823, got 7"),
        ({"width": 2**31}, ValueError, "width: wanted 8, the longest row, to 1073741823, got 2147483648"),
        ({"width": -1}, ValueError, r"width: wanted an integer from 0 to 2\*\*63 - 1, got -1"),
        ({"width": 2**63}, ValueError, r"width: wanted an integer from 0 to 2\*\*63 - 1, got 9223372036854775808"),
        ({"width": np.float32(9.9)}, TypeError, r"width: wanted an integer .*, got .*9\.9"),
        ({"threads": 0}, ValueError, r"threads: wanted an integer from 1 to 2\*\*31 - 1, got 0"),
        ({"threads": "2"}, TypeError, "threads: wanted an integer .*, got '2'"),
    ],
)
def test_bad_padding(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    buffer = two_games()
    for collate in (buffer.collate_padded, buffer.collate_padded_transitions):
        with pytest.raises(error, match=message):
            collate([0, 1], **({"pad_token_id": 0} | arguments))
