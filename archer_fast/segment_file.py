"""A segment: the arrays of some trajectories in a row, in one immutable file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from archer_fast.sealed_file import Arrays, SealedFile, read_arrays, write_arrays

# The immutable arrays of csrc/buffer_state.h, by what they have one item of.
PER_TRAJECTORY: dict[str, type[np.generic]] = {
    "num_tokens": np.int32,
    "num_turns": np.int32,
    "terminated": np.bool_,
    "truncated": np.bool_,
    "task_ids": np.int32,
}
PER_TURN: dict[str, type[np.generic]] = {
    "observation_lengths": np.int32,
    "action_lengths": np.int32,
    "rewards": np.float32,
    "policy_versions": np.int64,
}
PER_TOKEN: dict[str, type[np.generic]] = {"tokens": np.int32}
PER_ACTION_TOKEN: dict[str, type[np.generic]] = {"rollout_logprobs": np.float32}
FIELDS = PER_TRAJECTORY | PER_TURN | PER_TOKEN | PER_ACTION_TOKEN

Counts = npt.NDArray[Any]


class FeatureFile(NamedTuple):
    """Features of a segment's trajectories from `first` on, those before having been evicted when it was written."""

    first: int
    file: SealedFile


class Segment(NamedTuple):
    """The trajectories [first, end) and the file they are in. Of the first 64 trajectories, whose features came later:

    Segment(0, 64, SealedFile("segment-000000000000-000000000064.safetensors", 40960, 0x1F2E3D4C),
            FeatureFile(10, SealedFile("features-000000000010-000000000064.safetensors", 1032192, 0x5A6B7C8D)))
    """

    first: int
    end: int
    file: SealedFile
    features: FeatureFile | None = None  # None: none of its trajectories has features

    def names(self) -> set[str]:
        return {self.file.name} | ({self.features.file.name} if self.features else set())


def numbered_name(kind: str, first: int, end: int, taken: set[str]) -> str:
    """`<kind>-<first>-<end>.safetensors`, with a number behind where that name is taken."""
    stem = f"{kind}-{first:012d}-{end:012d}"
    name, number = f"{stem}.safetensors", 1
    while name in taken:
        name, number = f"{stem}-{number}.safetensors", number + 1
    return name


def write_segment(path: Path, first: int, arrays: Arrays) -> Segment:
    """Write the trajectories [first, first + B) that `arrays` hold."""
    return Segment(first, first + arrays["num_turns"].size, write_arrays(path, {k: arrays[k] for k in FIELDS}))


def read_segment(folder: Path, segment: Segment) -> Arrays:
    """The arrays of all of a segment's trajectories.

    Raises FileNotFoundError, or ValueError that names the file and the field at fault.
    """
    arrays = read_arrays(folder, segment.file, FIELDS)
    _check_lengths(folder / segment.file.name, arrays, segment.end - segment.first)
    return arrays


def part(arrays: Arrays, begin: int, end: int) -> Arrays:
    """Views of the trajectories [begin, end), counted from the first one in `arrays`."""
    turns = _span(arrays["num_turns"], begin, end)
    spans = (
        (PER_TRAJECTORY, (begin, end)),
        (PER_TURN, turns),
        (PER_TOKEN, _span(arrays["num_tokens"], begin, end)),
        (PER_ACTION_TOKEN, _span(arrays["action_lengths"], *turns)),
    )
    return {name: arrays[name][slice(*span)] for fields, span in spans for name in fields}


def batches(sizes: Counts, max_size: int) -> Iterator[tuple[int, int]]:
    """Cut a row of trajectories into (begin, end) of at most `max_size` each; a larger one stands alone.

    list(batches([3, 3, 3, 9, 1], 6)) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    begin, before = 0, 0
    while begin < ends.size:
        end = max(int(np.searchsorted(ends, before + max_size, side="right")), begin + 1)
        yield begin, end
        begin, before = end, int(ends[end - 1])


def _span(counts: Counts, begin: int, end: int) -> tuple[int, int]:
    first = int(counts[:begin].sum(dtype=np.int64))
    return first, first + int(counts[begin:end].sum(dtype=np.int64))


def _check_lengths(path: Path, arrays: Arrays, num_trajectories: int) -> None:
    """Refuse what `part` would cut wrongly; what the items may be is the core's to check."""
    for name in ("num_turns", "num_tokens", "action_lengths"):
        if (counts := arrays[name]).size and int(counts.min()) < 1:
            raise ValueError(f"{path}: {name}: wanted at least 1, got {counts.min()}")
    wanted = (
        (PER_TRAJECTORY, num_trajectories),
        (PER_TURN, _span(arrays["num_turns"], 0, num_trajectories)[1]),
        (PER_TOKEN, _span(arrays["num_tokens"], 0, num_trajectories)[1]),
        (PER_ACTION_TOKEN, int(arrays["action_lengths"].sum(dtype=np.int64))),
    )
    for fields, length in wanted:
        for name in fields:
            if arrays[name].size != length:
                raise ValueError(f"{path}: {name}: wanted {length} items, got {arrays[name].size}")
