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
from archer_fast.open_trajectory import OpenTrajectory
from archer_fast.packing import Bool, Float32, Int32, Int64, PackedArrays, as_int64, as_numbers, empty_packed_arrays
from archer_fast.segment_file import Segment
from archer_fast.segments import commit, load
from archer_fast.trajectory import Trajectory
from archer_fast.trajectory_arrays import TrajectoryArrays, flatten

Float64 = npt.NDArray[np.float64]


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


class PrioritisedSample(NamedTuple):
    """Turns drawn in proportion to their priorities, in ascending order, and what undoes it in a mean.

    Four turns of priorities 2, 1, 1, 4, so of probabilities .25, .125, .125, .5, with beta=1:

        PrioritisedSample(turn_ids=[0, 2, 3, 3], weights=[.5, 1., .25, .25])
    """

    turn_ids: Int64  # [n]
    weights: Float32  # [n], (smallest live priority above 0 / the turn's own)**beta, at most 1


class BufferStats(NamedTuple):
    """One consistent look at the buffer.

    Four games of two turns each, the last two of them played by policy version 7, in a buffer for three games:

        BufferStats(num_trajectories=3, num_turns=6, num_tokens=27, num_evicted=1, num_bytes=4194716,
                    turns_by_age={0: 2, 1: 2, 2: 2}, turns_by_version={6: 2, 7: 4})
    """

    num_trajectories: int
    num_turns: int
    num_tokens: int
    num_evicted: int  # trajectories evicted since the buffer was made
    num_bytes: int  # memory held, what is reserved for the next trajectories included
    turns_by_age: dict[int, int]  # {a: turns} with a to 2 a - 1 games pushed after their own; a = 0, 1, 2, 4, 8, ...
    turns_by_version: dict[int, int]  # {policy version: turns}


class TrajectoryBuffer:
    """The last whole trajectories that fit into `max_tokens` and `max_trajectories`, oldest evicted first.

    Trajectories and turns are numbered 0, 1, 2, ... in the order of push and never renumbered. With three games
    of two turns each pushed into a buffer for two games:

        trajectory_range == (1, 3), turn_range == (2, 6), num_evicted == 1

    An id outside these ranges is an IndexError. `Trajectory.info` is not stored. Any thread may call any method;
    another thread's push may evict an id between two calls. The same seed and calls draw the same samples on
    every machine.
    """

    _segments: tuple[Segment, ...] = ()  # what of this buffer was saved, wherever it lies now

    def __init__(
        self,
        max_tokens: int,
        max_trajectories: int,
        seed: int = 0,
        *,
        vocab_size: int | None = None,
        gamma: float = 1.0,
    ) -> None:
        """seed: of the draws.

        vocab_size: token ids are below it, and a larger one is refused; up to 65,536 they are stored in two bytes
            instead of four. None where it is not known.
        gamma: 0 to 1, discount of the Monte-Carlo returns in `PackedArrays.returns`.
        """
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: wanted 0 to 2**64 - 1, got {seed}")
        if vocab_size is not None and not 1 <= vocab_size <= 2**31:
            raise ValueError(f"vocab_size: wanted 1 to 2**31, or None, got {vocab_size}")
        self._core = _C.TrajectoryBuffer(
            max_tokens=max_tokens,
            max_trajectories=max_trajectories,
            seed=seed,
            vocab_size=vocab_size or 0,
            gamma=gamma,
        )

    def push(self, trajectory: Trajectory, task_id: int = 0) -> int:
        """Copy the trajectory in and return its id. The buffer is unchanged where this raises.

        task_id: a number of int32 for the task that was played, for draws `by_task`. A new turn's priority is the
        largest that any turn ever had, 1 at first.
        """
        return self.extend([trajectory], [task_id])[0]

    def extend(self, trajectories: Iterable[Trajectory], task_ids: Iterable[int] | None = None) -> list[int]:
        """Copy trajectories in and return their ids: all of them at one moment, or none where one is refused.

        task_ids: one for each trajectory; all are of task 0 without. Other lengths are a ValueError.
        """
        games = list(trajectories)
        tasks = [0] * len(games) if task_ids is None else list(task_ids)
        if len(tasks) != len(games):
            raise ValueError(f"task_ids: wanted one per trajectory ({len(games)}), got {len(tasks)}")
        return list(range(*self.extend_arrays(flatten(games, tasks))))

    def extend_arrays(self, arrays: TrajectoryArrays) -> tuple[int, int]:
        """`extend` from flat arrays, at the speed of memory: returns the ids [first, end).

        Arrays of another dtype, or not contiguous, are a TypeError: nothing is converted in silence.
        """
        return self._core.extend(**arrays._asdict())

    def begin(self, task_id: int = 0) -> OpenTrajectory:
        """A game that is about to be played, to be pushed when it has ended:

            game = buffer.begin()
            game.add_turn([17, 9], [41, 2], [-1.0, -2.0], reward=-1.0, policy_version=7)
            game.add_turn([12], [5, 2], [-3.0, -4.0], reward=0.0, policy_version=7)
            trajectory_id = game.end([30], terminated=True)

        Until `end` the buffer does not know of it: a game that stops in the middle leaves nothing.
        """
        return OpenTrajectory(self._core, task_id)

    def __len__(self) -> int:
        return self._core.num_trajectories

    @property
    def max_tokens(self) -> int:
        return self._core.max_tokens

    @property
    def max_trajectories(self) -> int:
        return self._core.max_trajectories

    @property
    def vocab_size(self) -> int | None:
        """Token ids are below it; None where it is not known."""
        return self._core.vocab_size or None

    @property
    def gamma(self) -> float:
        """Discount of the Monte-Carlo returns."""
        return self._core.gamma

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

    def stats(self) -> BufferStats:
        """Sizes and histograms at this moment."""
        return BufferStats(*self._core.stats())

    def sample_turns(
        self, n: int, *, replacement: bool = True, min_policy_version: int | None = None, by_task: bool = False
    ) -> Int64:
        """Ids of n turns [n], uniform over the live turns that are allowed.

        replacement: False for distinct turns, in random order.
        min_policy_version: only turns that this version of the policy or a later one sampled.
        by_task: with K tasks, n // K turns of each, task by task in ascending order, and one more of n % K tasks drawn
            at random; without replacement these are among the tasks that have one more.

        Six turns, the first four of task 3 and version 1, the last two of task 5 and version 2:

            sample_turns(4, by_task=True)             -> [1, 0, 4, 4], say
            sample_turns(2, min_policy_version=2)     -> [5, 4]
            sample_turns(6, replacement=False)        -> [3, 0, 5, 1, 4, 2]

        Raises ValueError where the buffer is empty, has no turn as recent as that, or too few distinct ones.
        """
        if min_policy_version is None:
            return self._core.sample_turns(n, replacement=replacement, by_task=by_task)
        return self._core.sample_turns(
            n, replacement=replacement, min_policy_version=operator.index(min_policy_version), by_task=by_task
        )

    def sample_trajectories(self, n: int, *, by_task: bool = False) -> Int64:
        """Ids of n distinct trajectories [n], uniform, in random order; ValueError where there are fewer.

        by_task: equal numbers of each task, as in `sample_turns` without replacement.
        """
        return self._core.sample_trajectories(n, by_task=by_task)

    def sample_prioritised(self, n: int, beta: float = 0.4) -> PrioritisedSample:
        """n turns in proportion to their priorities (Schaul et al. 2016, arXiv 1511.05952).

        One draw from each of n equal slices of the sum of all priorities: a turn of probability P comes n P times,
        give or take less than 2. The paper's exponent alpha is applied by whoever sets the priorities:
        `update_priorities(turn_ids, np.abs(errors) ** alpha)`.

        beta: 0 to 1, how much of the bias the weights undo. The largest weight any live turn could have is 1.

        Raises ValueError for another beta, an empty buffer, or one where every priority is 0.
        """
        return PrioritisedSample(*self._core.sample_prioritised(n, beta))

    def update_priorities(self, turn_ids: npt.ArrayLike, priorities: npt.ArrayLike) -> int:
        """Set the priorities [n] of turns [n] and return how many of these were evicted since, which is no error.

        A priority is 0 (never drawn) to 1e200; where an id is given twice the last one holds. Raises IndexError for an
        id that no turn has had yet, ValueError for another priority or another length; nothing is changed then.
        """
        return self._core.update_priorities(
            as_int64("turn_ids", turn_ids), as_numbers("priorities", priorities, np.float64)
        )

    def priorities(self) -> Float64:
        """The priority of each live turn [num_turns], in the order of `turn_range`."""
        return self._core.priorities()

    def trajectory_of(self, turn_ids: npt.ArrayLike) -> Int64:
        """The trajectory of each turn [n]."""
        return self._core.trajectory_of(as_int64("turn_ids", turn_ids))

    def turn_span(self, trajectory_ids: npt.ArrayLike) -> tuple[Int64, Int64]:
        """Each trajectory's first turn id [n] and number of turns [n]."""
        return self._core.turn_span(as_int64("trajectory_ids", trajectory_ids))

    def turn_records(self, turn_ids: npt.ArrayLike) -> TurnRecords:
        return TurnRecords(*self._core.turn_records(as_int64("turn_ids", turn_ids)))

    def collate(self, trajectory_ids: npt.ArrayLike) -> PackedArrays:
        """The trajectories packed in the order given, into fresh arrays; an id given twice is packed twice."""
        ids = as_int64("trajectory_ids", trajectory_ids)
        packed = empty_packed_arrays(*self._core.collated_sizes(ids))
        self._core.collate(ids, **packed._asdict())
        return packed

    def save(self, folder: str | os.PathLike[str], previous: str | os.PathLike[str] | None = None) -> None:
        """Commit the buffer to a folder of its own (see `segments`): whole there, or as it was there before.

        Saved again into the same folder, only what was pushed since is written. Into another folder, everything
        is, or, given the `previous` folder this buffer was saved to or loaded from, what was pushed since and
        hard links of the rest: each folder is whole by itself, and deleting one harms no other.

            buffer.save("checkpoints/1"); buffer.push(game)
            buffer.save("checkpoints/2", previous="checkpoints/1")    # one new segment, one link

        Raises OSError (a full disk, say), or ValueError that names the folder where somebody else is saving there.
        """
        source = None if previous is None else Path(previous)
        self._segments = commit(Path(folder), self._core, self._segments, source)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TrajectoryBuffer:
        """Continue a saved buffer: same trajectories, ids, evictions to come and samples to come.

        Raises FileNotFoundError, or ValueError that names the file and the field at fault.
        """
        state, held = load(Path(folder))
        buffer = cls.__new__(cls)
        try:
            buffer._core = _C.TrajectoryBuffer.restore(**state)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        buffer._segments = held
        return buffer
