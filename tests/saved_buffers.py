"""What the tests of saved buffers share: games and features made from their number, states compared to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors.numpy import load_file

from archer_fast import _C
from archer_fast.buffer import TrajectoryBuffer
from archer_fast.sealed_file import write_arrays
from archer_fast.segment_manifest import Manifest, read_manifest, write_manifest
from archer_fast.trajectory import Trajectory, Turn


def restored(state: _C.BufferState) -> _C.TrajectoryBuffer:
    """A core that goes on from there, with no features in RAM."""
    return _C.TrajectoryBuffer.restore(**state, max_feature_memory=0, feature_folder="")


def game(number: int) -> Trajectory:
    """The same for the same number: 1 to 4 turns, 2 to 26 tokens."""
    rng = np.random.default_rng(number)
    turns = []
    for _ in range(rng.integers(1, 5)):
        observation, action = rng.integers(1, 4, size=2)
        turns.append(
            Turn(
                rng.integers(0, 2**31 - 1, size=observation, dtype=np.int32),
                rng.integers(0, 2**31 - 1, size=action, dtype=np.int32),
                -rng.random(action, dtype=np.float32),
                float(rng.normal()),
                number,
            )
        )
    final = rng.integers(0, 100, size=rng.integers(0, 3), dtype=np.int32)
    return Trajectory(tuple(turns), final, number % 2 == 0, number % 2 == 1)


def feature_rows(number: int, trunk_version: int, row_bytes: int) -> np.ndarray:
    """The same for the same numbers: the rows of game(number), as a trunk of that version computes them."""
    rng = np.random.default_rng([number, trunk_version])
    return rng.integers(0, 256, (game(number).num_turns + 1, row_bytes), np.uint8)


def push(buffer: TrajectoryBuffer, num: int) -> None:
    """The next games by number: a buffer filled by this alone has game(i) of task i % 3 as trajectory i.

    With features where there is room for them; every third game has none.
    """
    for _ in range(num):
        number = buffer.trajectory_range[1]
        assert buffer.push(game(number), number % 3) == number
        if buffer.feature_bytes and number % 3 != 2:
            buffer.set_features([number], number % 5, feature_rows(number, number % 5, buffer.feature_bytes))


def read_again(buffer: TrajectoryBuffer) -> None:
    """Features of the oldest and the newest game by a new trunk; follows from what the buffer holds."""
    first, end = buffer.trajectory_range
    for number in (first, end - 1):
        buffer.set_features([number], end, feature_rows(number, end, buffer.feature_bytes))


def learn(buffer: TrajectoryBuffer) -> None:
    """Give some turns other priorities, as a critic would; follows from what the buffer holds."""
    turn_ids, weights = buffer.sample_prioritised(5)
    buffer.update_priorities(turn_ids, weights * np.arange(1, 6) / 3)


def filled(
    num: int, max_trajectories: int = 100, max_tokens: int = 100_000, seed: int = 0, feature_bytes: int = 0
) -> TrajectoryBuffer:
    buffer = TrajectoryBuffer(max_tokens, max_trajectories, seed, feature_bytes=feature_bytes)
    push(buffer, num)
    return buffer


def state_of(buffer: TrajectoryBuffer) -> dict[str, Any]:
    state = cast("dict[str, Any]", buffer._core.state())
    if buffer.feature_bytes:
        num_turns = state["num_turns"].astype(np.int64)
        state["trunk_versions"] = np.empty(num_turns.size, np.int64)
        state["features"] = np.empty((num_turns.sum() + num_turns.size) * buffer.feature_bytes, np.uint8)
        first = state["first_trajectory_id"]
        buffer._core.copy_features(first, num_turns, state["trunk_versions"], state["features"])
    return state


def assert_same_state(got: TrajectoryBuffer | dict[str, Any], wanted: TrajectoryBuffer | dict[str, Any]) -> None:
    """Every number and every array of the core, features too, to the bit."""
    left, right = (state_of(x) if isinstance(x, TrajectoryBuffer) else x for x in (got, wanted))
    assert left.keys() == right.keys()
    for name, value in right.items():
        assert type(left[name]) is type(value), name
        if isinstance(value, np.ndarray):
            assert left[name].dtype == value.dtype, name
            np.testing.assert_array_equal(left[name], value, err_msg=name)
        else:
            assert left[name] == value, name


def names_in(folder: Path) -> list[str]:
    """Every file but the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def segments_in(folder: Path, kind: str = "segment") -> list[str]:
    """The ids in the names of its segments, or of its "features", zeros left out: ["0-3", "3-5"]."""
    names = [name.removesuffix(".safetensors").split("-") for name in names_in(folder) if name.startswith(kind)]
    return ["-".join([str(int(first)), str(int(end)), *rest]) for _, first, end, *rest in names]


def reseal_segment(folder: Path, **changes: Any) -> Path:
    """Change arrays of the first segment and make every checksum right again, as a hostile writer would."""
    manifest = read_manifest(folder)
    first = manifest.segments[0]
    path = folder / first.file.name
    arrays = {name: array for name, array in (load_file(path) | changes).items() if array is not None}
    sealed = write_arrays(path, arrays)
    reseal_manifest(folder, segments=(first._replace(file=sealed), *manifest.segments[1:]))
    return path


def reseal_manifest(folder: Path, **changes: Any) -> None:
    """Change the manifest's fields and make its checksum right again."""
    manifest = read_manifest(folder)
    fields = {name: getattr(manifest, name) for name in ("commit", "scalars", "segments", "priorities")}
    write_manifest(folder, Manifest(**(fields | changes)))
