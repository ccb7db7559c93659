"""Random trajectories, and the comparison of arrays made of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from archer_fast.trajectory import Trajectory, Turn


def random_trajectory(
    rng: np.random.Generator, max_turns: int = 5, max_length: int = 6, vocab_size: int = 2**31
) -> Trajectory:
    turns = []
    for _ in range(rng.integers(1, max_turns + 1)):
        observation, action = rng.integers(1, max_length + 1, size=2)
        turns.append(
            Turn(
                rng.integers(0, vocab_size, size=observation),
                rng.integers(0, vocab_size, size=action),
                -rng.random(action, dtype=np.float32),
                float(rng.normal()),
                int(rng.integers(0, 2**40)),
            )
        )
    final = rng.integers(0, 100, size=rng.integers(0, 4), dtype=np.int32)
    terminated = bool(rng.random() < 0.5)
    return Trajectory(tuple(turns), final, terminated, not terminated)


def random_trajectories(num: int, seed: int = 0, vocab_size: int = 2**31) -> list[Trajectory]:
    rng = np.random.default_rng(seed)
    return [random_trajectory(rng, vocab_size=vocab_size) for _ in range(num)]


def poisoned(num_bytes: int) -> np.ndarray:
    """Memory in which what nobody wrote is seen."""
    return np.full(num_bytes, 0xA5, np.uint8)


def assert_same(got: NamedTuple, wanted: NamedTuple) -> None:
    """Arrays of one kind, of equal dtypes and values."""
    assert type(got) is type(wanted)
    for name, left, right in zip(wanted._fields, got, wanted, strict=True):
        assert left.dtype == right.dtype, name
        np.testing.assert_array_equal(left, right, err_msg=name)
