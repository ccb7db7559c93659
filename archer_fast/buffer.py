"""The replay buffer: the thin face of the C++ trajectory buffer (csrc/trajectory_buffer.h)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from archer_fast import _C
from archer_fast.arguments import (
    MAX_INT32,
    MAX_INT64,
    MIN_INT32,
    MIN_INT64,
    as_flag,
    as_int64,
    as_integer,
    as_numbers,
    as_real,
)
from archer_fast.buffer_records import BufferStats, FeatureRows, PrioritisedSample, TurnRecords
from archer_fast.open_trajectory import OpenTrajectory
from archer_fast.packing import Int64, PackedArrays
from archer_fast.padding import PaddedArrays, PaddedTransitions, Side, padding_of
from archer_fast.segments import NOTHING, Saved, commit, load
from archer_fast.staging import Memory, UInt8, fresh
from archer_fast.trajectory import Trajectory
from archer_fast.trajectory_arrays import TrajectoryArrays, flatten
from archer_fast.transitions import TransitionArrays

MAX_FEATURE_MEMORY = 4 << 30  # bytes
MAX_DRAWS = 2**60 - 1  # ids of an array whose bytes int64 can count

Float64 = npt.NDArray[np.float64]


class TrajectoryBuffer:
    """The last whole trajectories that fit into `max_tokens` and `max_trajectories`, oldest evicted first.

    Trajectories and turns are numbered 0, 1, 2, ... in the order of push and never renumbered. With three games
    of two turns each pushed into a buffer for two games:

        trajectory_range == (1, 3), turn_range == (2, 6), num_evicted == 1

    An id outside these ranges is an IndexError. `Trajectory.info` is not stored. The same seed and calls draw the same
    samples on every machine.

    Any thread may call any method; another thread's push may evict an id between two calls. Join the threads that
    push before the program ends: a daemon thread that is inside a call while the interpreter shuts down aborts the
    process (pybind11 cannot give it the GIL any more).
    """

    _saved: Saved = NOTHING  # what of this buffer is on the disk, wherever it lies now

    def __init__(
        self,
        max_tokens: int,
        max_trajectories: int,
        seed: int = 0,
        *,
        vocab_size: int | None = None,
        gamma: float = 1.0,
        feature_bytes: int = 0,
        max_feature_memory: int = MAX_FEATURE_MEMORY,
        feature_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        """seed: of the draws.

        vocab_size: token ids are below it, and a larger one is refused; up to 65,536 they are stored in two bytes
            instead of four. None where it is not known.
        gamma: 0 to 1, discount of the Monte-Carlo returns in `PackedArrays.returns`.
        feature_bytes: of a row of features (see `set_features`); room for one a turn, and one more a trajectory, is
            taken as a trajectory is pushed. 0: there are none.
        max_feature_memory: bytes of features in RAM; what is beyond lies in files of `feature_folder`, mapped into
            memory. They have no names, and are gone with the buffer however the process ends. None is the system's
            folder for temporary files; where that is in memory itself, name one on a disk. A push for which the
            disk has no room is an OSError.
        """
        self._core = _C.TrajectoryBuffer(
            max_tokens=as_integer("max_tokens", max_tokens, 2, MAX_INT64),
            max_trajectories=as_integer("max_trajectories", max_trajectories, 1, MAX_INT64),
            seed=as_integer("seed", seed, 0, 2**64 - 1),
            vocab_size=0 if vocab_size is None else as_integer("vocab_size", vocab_size, 1, 2**31),
            gamma=as_real("gamma", gamma, 0, 1),
            feature_bytes=as_integer("feature_bytes", feature_bytes, 0, 2**30),
            max_feature_memory=as_integer("max_feature_memory", max_feature_memory, 0, MAX_INT64),
            feature_folder=_folder(feature_folder),
        )

    def push(self, trajectory: Trajectory, task_id: int = 0) -> int:
        """Copy the trajectory in and return its id. The buffer is unchanged where this raises.

        task_id: a number of int32 for the task that was played, for draws `by_task`. A new turn's priority is the
        largest that any turn ever had, 1 at first.
        """
        if not isinstance(trajectory, Trajectory):
            raise TypeError(f"trajectory: wanted a Trajectory, got {type(trajectory).__name__}")
        return self.extend([trajectory], [as_integer("task_id", task_id, MIN_INT32, MAX_INT32)])[0]

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
        version = MIN_INT64  # or later: any
        if min_policy_version is not None:
            version = as_integer("min_policy_version", min_policy_version, MIN_INT64, MAX_INT64)
        return self._core.sample_turns(
            as_integer("n", n, 0, MAX_DRAWS),
            replacement=as_flag("replacement", replacement),
            min_policy_version=version,
            by_task=as_flag("by_task", by_task),
        )

    def sample_trajectories(self, n: int, *, by_task: bool = False) -> Int64:
        """Ids of n distinct trajectories [n], uniform, in random order; ValueError where there are fewer.

        by_task: equal numbers of each task, as in `sample_turns` without replacement.
        """
        return self._core.sample_trajectories(as_integer("n", n, 0, MAX_DRAWS), by_task=as_flag("by_task", by_task))

    def sample_prioritised(self, n: int, beta: float = 0.4) -> PrioritisedSample:
        """n turns in proportion to their priorities (Schaul et al. 2016, arXiv 1511.05952).

        One draw from each of n equal slices of the sum of all priorities: a turn of probability P comes n P times,
        give or take less than 2. The paper's exponent alpha is applied by whoever sets the priorities:
        `update_priorities(turn_ids, np.abs(errors) ** alpha)`.

        beta: 0 to 1, how much of the bias the weights undo. The largest weight any live turn could have is 1.

        Raises ValueError for another beta, an empty buffer, or one where every priority is 0.
        """
        n, beta = as_integer("n", n, 0, MAX_DRAWS), as_real("beta", beta, 0, 1)
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

    def lengths(self, trajectory_ids: npt.ArrayLike) -> Int64:
        """Each trajectory's number of tokens [n]."""
        return self._core.lengths(as_int64("trajectory_ids", trajectory_ids))

    def turn_records(self, turn_ids: npt.ArrayLike) -> TurnRecords:
        return TurnRecords(*self._core.turn_records(as_int64("turn_ids", turn_ids)))

    # Each of the following makes a batch in fresh memory, or where `memory` says (see staging.StagingSlots), on up to
    # `threads` threads where there is enough to write; an id given twice is there twice.

    def collate(self, trajectory_ids: npt.ArrayLike, *, memory: Memory = fresh, threads: int = 1) -> PackedArrays:
        """The trajectories end to end, in the order given."""
        ids = as_int64("trajectory_ids", trajectory_ids)
        return PackedArrays._make(self._core.collate(ids, None, _thread_count(threads), memory))

    def collate_transitions(
        self, turn_ids: npt.ArrayLike, *, memory: Memory = fresh, threads: int = 1
    ) -> TransitionArrays:
        """The turns with all that came before them, end to end, in the order given."""
        ids = as_int64("turn_ids", turn_ids)
        return TransitionArrays._make(self._core.collate_transitions(ids, None, _thread_count(threads), memory))

    def collate_padded(
        self,
        trajectory_ids: npt.ArrayLike,
        pad_token_id: int,
        side: Side = "right",
        width: int | None = None,
        *,
        memory: Memory = fresh,
        threads: int = 1,
    ) -> PaddedArrays:
        """The trajectories in lines of their own, with pads on that side of them.

        width: places of a line; None for those of the longest trajectory. Nothing is cut: fewer are a ValueError.
        """
        ids = as_int64("trajectory_ids", trajectory_ids)
        padding = padding_of(pad_token_id, side, width)
        return PaddedArrays._make(self._core.collate(ids, padding, _thread_count(threads), memory))

    def collate_padded_transitions(
        self,
        turn_ids: npt.ArrayLike,
        pad_token_id: int,
        side: Side = "right",
        width: int | None = None,
        *,
        memory: Memory = fresh,
        threads: int = 1,
    ) -> PaddedTransitions:
        """The transitions in lines of their own; see `collate_padded`."""
        ids = as_int64("turn_ids", turn_ids)
        padding = padding_of(pad_token_id, side, width)
        return PaddedTransitions._make(self._core.collate_transitions(ids, padding, _thread_count(threads), memory))

    @property
    def feature_bytes(self) -> int:
        """Bytes of a row of features; 0: there are none."""
        return self._core.feature_bytes

    def set_features(self, trajectory_ids: npt.ArrayLike, trunk_version: int, rows: UInt8) -> None:
        """Keep what a trunk of this version (a number of 0 or more) computed of trajectories [n].

        rows: [R, feature_bytes] uint8. A trajectory of N turns has N + 1 rows: row i is what is known at turn i, and
        row N what is known after the last one, so that what follows a turn is always the row behind its own. What
        the bytes mean is the caller's to say. Features set before are replaced; they leave with their trajectory.

            buffer = TrajectoryBuffer(1000, 10, feature_bytes=4)
            buffer.push(game_of_two_turns)
            buffer.set_features([0], 7, np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]], np.uint8))
            buffer.read_features([1, 0], 7, next_bytes=2)    # see FeatureRows

        Raises TypeError for another dtype or an array that is not contiguous, IndexError for an id that is not
        live, ValueError for another number of bytes, a negative version, or a buffer without features; nothing is
        changed then.
        """
        flat = _flat_rows("rows", rows, self.feature_bytes)
        version = as_integer("trunk_version", trunk_version, 0, MAX_INT64)
        self._core.set_features(as_int64("trajectory_ids", trajectory_ids), version, flat)

    def read_features(
        self,
        turn_ids: npt.ArrayLike,
        trunk_version: int,
        next_bytes: int,
        *,
        memory: Memory = fresh,
        threads: int = 1,
    ) -> FeatureRows:
        """The rows of turns [n], and the first `next_bytes` bytes of the rows behind them.

        Raises IndexError for an id that is not live; ValueError for a turn whose trajectory has no features of this
        version, which it names with what is there.
        """
        ids, version = as_int64("turn_ids", turn_ids), as_integer("trunk_version", trunk_version, 0, MAX_INT64)
        num_next = as_integer("next_bytes", next_bytes, 0, self.feature_bytes)
        return FeatureRows(*self._core.read_features(ids, version, num_next, _thread_count(threads), memory))

    def trajectories_without_features(self, trunk_version: int) -> Int64:
        """Ids, ascending, of the live trajectories that have none of this version."""
        return self._core.trajectories_without_features(as_integer("trunk_version", trunk_version, 0, MAX_INT64))

    def save(self, folder: str | os.PathLike[str], previous: str | os.PathLike[str] | None = None) -> None:
        """Commit the buffer to a folder of its own (see `segments`): whole there, or as it was there before.

        Saved again into the same folder, only what was pushed since is written, and features where some were set
        since. Into another folder, everything is, or, given the `previous` folder this buffer was saved to or
        loaded from, what was pushed or set since and hard links of the rest: each folder is whole by itself, and
        deleting one harms no other.

            buffer.save("checkpoints/1"); buffer.push(game)
            buffer.save("checkpoints/2", previous="checkpoints/1")    # one new segment, one link

        Raises OSError (a full disk, say), or ValueError that names the folder where somebody else is saving there.
        """
        source = None if previous is None else Path(previous)
        self._saved = commit(Path(folder), self._core, self._saved, source)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        max_feature_memory: int = MAX_FEATURE_MEMORY,
        feature_folder: str | os.PathLike[str] | None = None,
    ) -> TrajectoryBuffer:
        """Continue a saved buffer: same trajectories, features, ids, evictions to come and samples to come.

        max_feature_memory, feature_folder: as for a new buffer; they are not saved.

        Raises FileNotFoundError, or ValueError that names the file and the field at fault; OSError where the features
        find no room.
        """
        max_feature_memory = as_integer("max_feature_memory", max_feature_memory, 0, MAX_INT64)
        buffer = cls.__new__(cls)
        buffer._core, buffer._saved = load(Path(folder), max_feature_memory, _folder(feature_folder))
        return buffer


def _thread_count(threads: int) -> int:
    return as_integer("threads", threads, 1, MAX_INT32)


def _folder(folder: str | os.PathLike[str] | None) -> str:
    return tempfile.gettempdir() if folder is None else str(Path(folder))


def _flat_rows(name: str, rows: UInt8, row_bytes: int) -> UInt8:
    """All bytes of [R, row_bytes], end to end, without a copy."""
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8:
        raise TypeError(f"{name}: wanted an array of uint8, got {getattr(rows, 'dtype', type(rows).__name__)}")
    if not rows.flags.c_contiguous:
        raise TypeError(f"{name}: wanted a C-contiguous array, got strides {rows.strides} for shape {rows.shape}")
    if row_bytes and (rows.ndim != 2 or rows.shape[1] != row_bytes):
        raise ValueError(f"{name}: wanted shape (R, feature_bytes = {row_bytes}), got {rows.shape}")
    return rows.reshape(-1)
