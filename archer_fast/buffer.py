"""The replay buffer: the thin face of the C++ trajectory buffer (csrc/trajectory_buffer.h)."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from archer_fast import _C
from archer_fast.buffer_file import read_state, write_state
from archer_fast.packing import Bool, Float32, Int32, Int64, PackedArrays, empty_packed_arrays
from archer_fast.trajectory import Trajectory


class TurnRecords(NamedTuple):
    """What is known of some turns without their tokens.

    The last turn of a three-turn game that the task ended, then a middle turn of another:

        TurnRecords(rewards=[0., -1.], turn=[2, 4], is_last=[True, False],
                    terminated=[True, False], truncated=[False, False])
    """

    rewards: Float32  # [n]
    turn: Int32  # [n], index of the turn in its game
    is_last: Bool  # [n]
    terminated: Bool  # [n], is_last and the game terminated
    truncated: Bool  # [n], is_last and the game was truncated


class TrajectoryBuffer:
    """The last whole trajectories that fit into `max_tokens` and `max_trajectories`, oldest evicted first.

    Trajectories and turns are numbered 0, 1, 2, ... in the order of push and never renumbered. With three games
    of two turns each pushed into a buffer for two games:

        trajectory_range == (1, 3), turn_range == (2, 6), num_evicted == 1

    An id outside these ranges is an IndexError. `Trajectory.info` is not stored. Any thread may call any method;
    another thread's push may evict an id between two calls. The same seed and calls draw the same samples on
    every machine.
    """

    def __init__(self, max_tokens: int, max_trajectories: int, seed: int = 0) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: wanted 0 to 2**64 - 1, got {seed}")
        self._core = _C.TrajectoryBuffer(max_tokens, max_trajectories, seed)

    def push(self, trajectory: Trajectory) -> int:
        """Copy the trajectory in and return its id. The buffer is unchanged where this raises."""
        turns = trajectory.turns
        with np.errstate(over="ignore"):  # a reward beyond float32 becomes inf, which the core refuses by name
            rewards = np.array([turn.reward for turn in turns], np.float32)
        return self._core.push(
            trajectory.input_ids,
            np.array([turn.observation_ids.size for turn in turns], np.int32),
            np.array([turn.action_ids.size for turn in turns], np.int32),
            np.concatenate([turn.rollout_logprobs for turn in turns]),
            rewards,
            np.array([operator.index(turn.policy_version) for turn in turns], np.int64),
            trajectory.terminated,
            trajectory.truncated,
        )

    def extend(self, trajectories: Iterable[Trajectory]) -> list[int]:
        """Push one after the other; where one is refused, those before it stay."""
        return [self.push(trajectory) for trajectory in trajectories]

    def __len__(self) -> int:
        return self._core.num_trajectories

    @property
    def max_tokens(self) -> int:
        return self._core.max_tokens

    @property
    def max_trajectories(self) -> int:
        return self._core.max_trajectories

    @property
    def num_trajectories(self) -> int:
        return self._core.num_trajectories

    @property
    def num_turns(self) -> int:
        return self._core.num_turns

    @property
    def num_tokens(self) -> int:
        return self._core.num_tokens

    @property
    def num_evicted(self) -> int:
        """Trajectories evicted since the buffer was made."""
        return self._core.num_evicted

    @property
    def trajectory_range(self) -> tuple[int, int]:
        """The live trajectory ids: first, end (exclusive)."""
        return self._core.trajectory_range

    @property
    def turn_range(self) -> tuple[int, int]:
        """The live turn ids: first, end (exclusive)."""
        return self._core.turn_range

    def sample_turns(self, n: int) -> Int64:
        """Ids of n turns [n], uniform over all live turns, with replacement."""
        return self._core.sample_turns(n)

    def sample_trajectories(self, n: int) -> Int64:
        """Ids of n distinct trajectories [n], uniform, in random order."""
        return self._core.sample_trajectories(n)

    def trajectory_of(self, turn_ids: npt.ArrayLike) -> Int64:
        """The trajectory of each turn [n]."""
        return self._core.trajectory_of(_as_ids("turn_ids", turn_ids))

    def turn_span(self, trajectory_ids: npt.ArrayLike) -> tuple[Int64, Int64]:
        """Each trajectory's first turn id [n] and number of turns [n]."""
        return self._core.turn_span(_as_ids("trajectory_ids", trajectory_ids))

    def turn_records(self, turn_ids: npt.ArrayLike) -> TurnRecords:
        return TurnRecords(*self._core.turn_records(_as_ids("turn_ids", turn_ids)))

    def collate(self, trajectory_ids: npt.ArrayLike) -> PackedArrays:
        """The trajectories packed in the order given, into fresh arrays; an id given twice is packed twice."""
        ids = _as_ids("trajectory_ids", trajectory_ids)
        packed = empty_packed_arrays(*self._core.collated_sizes(ids))
        self._core.collate(ids, **packed._asdict())
        return packed

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file; a failure leaves the file that was there before."""
        write_state(Path(path), self._core.state())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrajectoryBuffer:
        """Continue a saved buffer: same trajectories, ids, evictions to come and samples to come.

        Raises FileNotFoundError, or ValueError that names the file and the field at fault.
        """
        state = read_state(Path(path))
        buffer = cls.__new__(cls)
        try:
            buffer._core = _C.TrajectoryBuffer.restore(**state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return buffer


def _as_ids(name: str, ids: npt.ArrayLike) -> Int64:
    array = np.asarray(ids)
    if array.size == 0:
        array = array.astype(np.int64)  # an empty list has no dtype of its own
    if not (array.dtype.kind in "iu" and np.can_cast(array.dtype, np.int64)):
        raise TypeError(f"{name}: wanted integers that fit into int64, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name}: wanted 1 dimension, got shape {array.shape}")
    return np.ascontiguousarray(array, np.int64)
