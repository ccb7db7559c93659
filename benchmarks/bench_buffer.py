"""The trajectory buffer on games of Twenty Questions' size: push, sample, collate, beside what each could cost; and
draws by priority from 1 M turns.

extra_info: `bytes` moved, `GB_per_s` at the median, and for collate `share_of_copy`, against copying as many bytes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from archer_fast.buffer import TrajectoryBuffer
from archer_fast.packing import pack_trajectories
from archer_fast.trajectory import Trajectory, Turn

NUM_GAMES, NUM_COLLATED = 1024, 128


def make_games(num: int) -> list[Trajectory]:
    rng = np.random.default_rng(0)

    def turn() -> Turn:
        observation, action = rng.integers(1, 5), rng.integers(4, 9)
        return Turn(rng.integers(0, 500, observation), rng.integers(0, 500, action), -rng.random(action), -1.0, 0)

    return [
        Trajectory(tuple(turn() for _ in range(rng.integers(5, 21))), np.array([3]), True, False) for _ in range(num)
    ]


@pytest.fixture(scope="module")
def games() -> list[Trajectory]:
    return make_games(NUM_GAMES)


@pytest.fixture(scope="module")
def buffer(games: list[Trajectory]) -> TrajectoryBuffer:
    filled = TrajectoryBuffer(1 << 20, NUM_GAMES)
    filled.extend(games)
    return filled


def packed_bytes(games: list[Trajectory]) -> int:
    return sum(array.nbytes for array in pack_trajectories(games))


def note_bandwidth(benchmark: Any, num_bytes: int) -> None:
    benchmark.extra_info["bytes"] = num_bytes
    if benchmark.stats is not None:  # absent under --benchmark-disable
        benchmark.extra_info["GB_per_s"] = round(num_bytes / benchmark.stats.stats.median / 1e9, 3)


def seconds(function: Callable[[], Any], repeats: int = 50) -> float:
    """Median time of one call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@pytest.mark.benchmark(group="push 128 games")
def test_push(benchmark: Any, games: list[Trajectory]) -> None:
    """The ring is full, so every push evicts."""
    full = TrajectoryBuffer(1 << 20, 256)
    full.extend(games[:256])
    benchmark(full.extend, games[256:384])
    assert full.num_evicted >= 128
    note_bandwidth(benchmark, sum(8 * g.num_tokens for g in games[256:384]))


@pytest.mark.benchmark(group="sample 256 turns and read their records")
def test_sample_turns(benchmark: Any, buffer: TrajectoryBuffer) -> None:
    records = benchmark(lambda: buffer.turn_records(buffer.sample_turns(256)))
    assert records.rewards.shape == (256,)


@pytest.mark.benchmark(group="collate 128 games")
def test_collate(benchmark: Any, buffer: TrajectoryBuffer, games: list[Trajectory]) -> None:
    ids = buffer.sample_trajectories(NUM_COLLATED)
    packed = benchmark(buffer.collate, ids)
    chosen = [games[i] for i in ids]
    np.testing.assert_array_equal(packed.input_ids, pack_trajectories(chosen).input_ids)
    num_bytes = packed_bytes(chosen)
    note_bandwidth(benchmark, num_bytes)
    if benchmark.stats is not None:
        source = np.ones(num_bytes, np.uint8)
        benchmark.extra_info["share_of_copy"] = round(seconds(source.copy) / benchmark.stats.stats.median, 3)


@pytest.mark.benchmark(group="collate 128 games")
def test_collate_plain_twin(benchmark: Any, games: list[Trajectory]) -> None:
    chosen = games[:NUM_COLLATED]
    benchmark(pack_trajectories, chosen)
    note_bandwidth(benchmark, packed_bytes(chosen))


# 1 M turns of 50,000 games, priorities of very different sizes.
NUM_TURNS, TURNS_A_GAME, NUM_DRAWN, BETA = 1_000_000, 20, 256, 0.4
DRAW = "draw 256 of 1 M turns by priority, with their weights"
UPDATE = "give 256 of 1 M turns new priorities"


def make_priorities(num_turns: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(1).gamma(0.5, size=num_turns) + 1e-6


@pytest.fixture(scope="module")
def priorities() -> np.ndarray[Any, np.dtype[np.float64]]:
    return make_priorities(NUM_TURNS)


def prioritised_buffer(priorities: np.ndarray[Any, np.dtype[np.float64]]) -> TrajectoryBuffer:
    num_turns = priorities.size
    turn = Turn(np.array([1]), np.array([2]), np.array([-1.0]), -1.0, 0)
    game = Trajectory((turn,) * TURNS_A_GAME, np.array([]), True, False)
    filled = TrajectoryBuffer(1 << 30, num_turns)
    filled.extend([game] * (num_turns // TURNS_A_GAME))
    assert filled.num_turns == num_turns
    filled.update_priorities(np.arange(num_turns), priorities)
    return filled


@pytest.fixture(scope="module")
def prioritised(priorities: np.ndarray[Any, np.dtype[np.float64]]) -> TrajectoryBuffer:
    return prioritised_buffer(priorities)


@pytest.mark.benchmark(group=DRAW)
def test_sample_prioritised(benchmark: Any, prioritised: TrajectoryBuffer) -> None:
    sample = benchmark(prioritised.sample_prioritised, NUM_DRAWN, BETA)
    assert sample.weights.shape == (NUM_DRAWN,)
    benchmark.extra_info["target_us"] = 60
    benchmark.extra_info["bytes_a_turn"] = round(prioritised.stats().num_bytes / NUM_TURNS, 1)


@pytest.mark.benchmark(group=DRAW)
def test_sample_prioritised_out_of_cache(benchmark: Any, prioritised: TrajectoryBuffer) -> None:
    """As between two steps of training: 64 MB were read since the last draw."""
    other = np.ones(8 << 20)
    benchmark.pedantic(
        prioritised.sample_prioritised, (NUM_DRAWN, BETA), setup=lambda: other.sum() and None, rounds=200
    )


@pytest.mark.benchmark(group=DRAW)
def test_sample_prioritised_plain_twin(benchmark: Any, priorities: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    rng = np.random.default_rng(0)

    def draw() -> tuple[Any, Any]:
        ends = priorities.cumsum()
        masses = (np.arange(NUM_DRAWN) + rng.random(NUM_DRAWN)) / NUM_DRAWN * ends[-1]
        turn_ids = np.searchsorted(ends, masses, side="right")
        return turn_ids, (priorities.min() / priorities[turn_ids]) ** BETA

    benchmark(draw)


@pytest.mark.benchmark(group=UPDATE)
def test_update_priorities(benchmark: Any, prioritised: TrajectoryBuffer) -> None:
    rng = np.random.default_rng(2)
    values = rng.gamma(0.5, size=NUM_DRAWN)
    stale = benchmark.pedantic(
        prioritised.update_priorities,
        setup=lambda: ((rng.integers(0, NUM_TURNS, NUM_DRAWN), values), {}),
        rounds=2000,
    )
    assert stale == 0
