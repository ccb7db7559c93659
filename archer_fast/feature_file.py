"""A file of features: what a trunk computed of some trajectories in a row, written and read piece by piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from archer_fast.sealed_file import SealedFile, UInt8, open_sealed, write_pieces
from archer_fast.segment_file import batches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from archer_fast._C import TrajectoryBuffer

Int64 = npt.NDArray[np.int64]

PIECE_BYTES = 1 << 24  # held at once, beside what is in the buffer itself; a longer trajectory is held whole


def write_feature_file(path: Path, core: TrajectoryBuffer, first: int, num_turns: Int64) -> SealedFile:
    """Write the features of the trajectories [first, first + B), which have these numbers of turns [B].

    A safetensors file: `rows` [R, feature_bytes] uint8, the N + 1 rows of every trajectory of N turns, and
    `trunk_versions` [B] int64, -1 with zeros for rows where there are none, or where they were evicted meanwhile.
    """

    def pieces() -> Iterator[UInt8]:
        yield np.frombuffer(_header(num_turns, core.feature_bytes), np.uint8)
        versions = np.empty(num_turns.size, np.int64)
        for begin, end, num_bytes in _pieces(num_turns, core.feature_bytes):
            rows = np.empty(num_bytes, np.uint8)
            core.copy_features(first + begin, num_turns[begin:end], versions[begin:end], rows)
            yield rows
        yield versions.view(np.uint8)

    return write_pieces(path, pieces())


def read_feature_file(folder: Path, file: SealedFile, core: TrajectoryBuffer, first: int, num_turns: Int64) -> None:
    """Set the features of those of the trajectories [first, first + B) that `core` holds.

    Raises FileNotFoundError, or ValueError that names the file and the field at fault; some may be set then.
    """
    path, row_bytes = folder / file.name, core.feature_bytes
    header, num_rows = _header(num_turns, row_bytes), int(num_turns.sum()) + num_turns.size
    with open_sealed(folder, file) as reader:
        if (wanted := len(header) + num_rows * row_bytes + 8 * num_turns.size) != file.num_bytes:
            raise ValueError(f"{path}: rows: wanted {num_rows} of {row_bytes} bytes, {wanted} bytes with all else, "
                             f"got {file.num_bytes}")  # fmt: skip
        if (got := reader.read(len(header))) != header:
            raise ValueError(f"{path}: header: wanted {header!r}, got {got!r}")
        versions = np.frombuffer(reader.last(8 * num_turns.size), np.int64)
        if versions.min() < -1:
            raise ValueError(f"{path}: trunk_versions: wanted -1 or more, got {versions.min()}")
        for begin, end, num_bytes in _pieces(num_turns, row_bytes):
            rows = np.frombuffer(reader.read(num_bytes), np.uint8)
            _set(core, first + begin, num_turns[begin:end], versions[begin:end], rows)
        reader.read(8 * num_turns.size)


def _set(core: TrajectoryBuffer, first: int, num_turns: Int64, versions: Int64, rows: UInt8) -> None:
    """One call for each run of trajectories of one version, without those that are gone and those that have none."""
    offsets = np.concatenate([[0], np.cumsum(num_turns + 1)]) * core.feature_bytes
    is_set = (versions >= 0) & (first + np.arange(versions.size) >= core.trajectory_range[0])
    cuts = np.flatnonzero(np.diff(np.where(is_set, versions, -1))) + 1
    for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), versions.size], strict=True):
        if is_set[begin]:
            ids = np.arange(first + begin, first + end)
            core.set_features(ids, int(versions[begin]), rows[offsets[begin] : offsets[end]])


def _pieces(num_turns: Int64, row_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Places [begin, end) of trajectories whose rows fit into a piece, and the bytes of these rows."""
    sizes = (num_turns + 1) * row_bytes
    for begin, end in batches(sizes, PIECE_BYTES):
        yield begin, end, int(sizes[begin:end].sum())


def _header(num_turns: Int64, row_bytes: int) -> bytes:
    """What a safetensors file begins with; it follows from the shapes alone, so reading compares it."""
    num_rows = int(num_turns.sum()) + num_turns.size
    middle = num_rows * row_bytes
    fields = {
        "rows": {"dtype": "U8", "shape": [num_rows, row_bytes], "data_offsets": [0, middle]},
        "trunk_versions": {
            "dtype": "I64",
            "shape": [num_turns.size],
            "data_offsets": [middle, middle + 8 * num_turns.size],
        },
    }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
