"""Features in the buffer: against a dictionary, in RAM and in mapped files, on a full disk, and refused where wrong."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from saved_buffers import feature_rows, filled, game, push
from test_buffer_crash import on_a_disk_of

from archer_fast.buffer import MAX_FEATURE_MEMORY, FeatureRows, TrajectoryBuffer

BYTES = 24


def rows_of(*values: int) -> np.ndarray:
    return np.array(values, np.uint8).reshape(-1, 4)


def test_the_example_of_the_docstring() -> None:
    buffer = TrajectoryBuffer(1000, 10, feature_bytes=4)
    two_turns = next(game(n) for n in range(100) if game(n).num_turns == 2)
    assert buffer.push(two_turns) == 0
    buffer.set_features([0], 7, rows_of(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0))
    got = buffer.read_features([1, 0], 7, next_bytes=2)
    assert got.rows.tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]] and got.next_rows.tolist() == [[9, 10], [5, 6]]


class Features(RuleBasedStateMachine):
    """Games pushed and evicted, features set, read, saved and loaded in any order, against a dictionary."""

    MAX_TRAJECTORIES = 12

    @initialize(max_feature_memory=st.sampled_from([0, MAX_FEATURE_MEMORY]))
    def begin(self, max_feature_memory: int) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.memory = {"max_feature_memory": max_feature_memory, "feature_folder": self.root}
        self.buffer = TrajectoryBuffer(10_000, self.MAX_TRAJECTORIES, feature_bytes=BYTES, **self.memory)  # type: ignore[arg-type]
        self.model: dict[int, tuple[int, np.ndarray] | None] = {}  # of every live game: version and rows
        self.count = 0

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    @rule(num=st.integers(1, 6))
    def push(self, num: int) -> None:
        for _ in range(num):
            number = self.buffer.trajectory_range[1]
            self.model[self.buffer.push(game(number))] = None
        self.model = {i: self.model[i] for i in sorted(self.model)[-self.MAX_TRAJECTORIES :]}

    @rule(data=st.data(), trunk_version=st.integers(0, 3))
    def set(self, data: st.DataObject, trunk_version: int) -> None:
        if self.model:
            ids = data.draw(st.lists(st.sampled_from(sorted(self.model)), max_size=5))
            self.count += 1
            rows = [feature_rows(i, self.count, BYTES) for i in ids]
            self.buffer.set_features(ids, trunk_version, np.concatenate([np.empty((0, BYTES), np.uint8), *rows]))
            self.model |= {i: (trunk_version, r) for i, r in zip(ids, rows, strict=True)}

    @rule(previous=st.booleans())
    def save_and_load(self, previous: bool) -> None:
        self.count += 1
        self.buffer.save(self.root / str(self.count), self.root / str(self.count - 1) if previous else None)
        self.buffer = TrajectoryBuffer.load(self.root / str(self.count), **self.memory)  # type: ignore[arg-type]

    @rule(data=st.data(), next_bytes=st.integers(0, BYTES), threads=st.integers(1, 3))
    def read(self, data: st.DataObject, next_bytes: int, threads: int) -> None:
        held = {version for entry in self.model.values() if entry for version in [entry[0]]}
        if not held:
            return
        version = data.draw(st.sampled_from(sorted(held)))
        ids = [i for i, entry in self.model.items() if entry and entry[0] == version]
        wanted = {}
        for first, i in zip(self.buffer.turn_span(ids)[0].tolist(), ids, strict=True):
            rows = self.model[i][1]  # type: ignore[index]
            wanted |= {first + k: (rows[k], rows[k + 1, :next_bytes]) for k in range(rows.shape[0] - 1)}
        turns = data.draw(st.lists(st.sampled_from(sorted(wanted)), min_size=1, max_size=40))
        got = self.buffer.read_features(turns, version, next_bytes, threads=threads)
        np.testing.assert_array_equal(got.rows, [wanted[t][0] for t in turns])
        np.testing.assert_array_equal(
            got.next_rows, np.reshape([wanted[t][1] for t in turns], (len(turns), next_bytes))
        )

    @invariant()
    def knows_who_has_none(self) -> None:
        for version in range(4):
            missing = [i for i, e in getattr(self, "model", {}).items() if e is None or e[0] != version]
            if hasattr(self, "buffer"):
                assert self.buffer.trajectories_without_features(version).tolist() == missing
                in_files = self.buffer.stats().num_mapped_bytes
                assert (in_files > 0) == bool(self.model and self.memory["max_feature_memory"] == 0)


TestFeatures = Features.TestCase
TestFeatures.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_more_than_fits_into_memory_lies_in_files_and_memory_is_reused(tmp_path: Path) -> None:
    """Chunks of 16 MiB: two in RAM, the rest in files, and no more of them however long the ring turns."""
    row_bytes, chunk = 1 << 20, 1 << 24
    buffer = TrajectoryBuffer(
        10_000, 30, feature_bytes=row_bytes, max_feature_memory=2 * chunk + 1, feature_folder=tmp_path
    )
    most = 0
    for _ in range(150):
        push(buffer, 1)
        stats = buffer.stats()
        most = max(most, stats.num_mapped_bytes)
        assert stats.num_bytes < 2 * chunk + (5 << 20), "2 chunks, and one of 4 MiB of the tokens"
        assert list(tmp_path.iterdir()) == [], "the files have no names"
    live = list(range(*buffer.trajectory_range))
    held = sum((game(i).num_turns + 1) * row_bytes for i in live)
    assert held - 2 * chunk < most < 1.5 * held
    for i in live:
        if i % 3 != 2:
            turn = buffer.turn_span([i])[0]
            wanted = feature_rows(i, i % 5, row_bytes)
            got = buffer.read_features(turn, i % 5, next_bytes=3)
            assert (got.rows[0] == wanted[0]).all() and (got.next_rows[0] == wanted[1, :3]).all()


# -- disks -----------------------------------------------------------------------------------------


def push_until_the_disk_is_full(disk: Path) -> None:
    buffer = TrajectoryBuffer(10_000, 1000, feature_bytes=1 << 20, max_feature_memory=0, feature_folder=disk)
    try:
        while True:
            push(buffer, 1)
    except OSError as error:
        print(error)
    num = len(buffer)
    assert 10 <= num < 30 and list(disk.iterdir()) == []
    before = buffer.stats()
    for _ in range(3):
        with pytest.raises(OSError, match="No space left on device"):
            buffer.push(game(num))
    assert buffer.stats() == before
    packed = buffer.collate(range(num))
    assert packed.input_ids.tolist() == np.concatenate([game(i).input_ids for i in range(num)]).tolist()
    for i in range(0, num, 3):
        turn = buffer.turn_span([i])[0]
        assert (buffer.read_features(turn, i % 5, 0).rows[0] == feature_rows(i, i % 5, 1 << 20)[0]).all()
    small = TrajectoryBuffer(10_000, 2, feature_bytes=1 << 20, max_feature_memory=0, feature_folder=disk)
    del buffer
    push(small, 20)
    print("went on")


def test_a_push_for_which_the_disk_has_no_room_loses_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    call = f"from test_buffer_features import *\npush_until_the_disk_is_full(Path({str(disk)!r}))"
    said = on_a_disk_of("68m", disk, call)
    assert said == f"[Errno 28] feature_folder: '{disk}': No space left on device\nwent on\n"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "nowhere"
    buffer = TrajectoryBuffer(1000, 10, feature_bytes=BYTES, max_feature_memory=0, feature_folder=folder)
    with pytest.raises(FileNotFoundError, match=re.escape(f"feature_folder: '{folder}': No such file")):
        buffer.push(game(0))
    assert len(buffer) == 0 and buffer.turn_range == (0, 0)
    filled(3, feature_bytes=BYTES).save(tmp_path / "saved")
    with pytest.raises(FileNotFoundError, match="feature_folder"):
        TrajectoryBuffer.load(tmp_path / "saved", max_feature_memory=0, feature_folder=folder)


# -- together --------------------------------------------------------------------------------------


def test_readers_beside_a_writer_read_whole_rows() -> None:
    """Without the GIL: a torn row, or one of another game, would show."""
    buffer = TrajectoryBuffer(10_000, 20, feature_bytes=4096, max_feature_memory=0)
    push(buffer, 20)
    done, faults, num_read = threading.Event(), [], []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            while not done.is_set() or len(num_read) < 100:
                first, end = buffer.trajectory_range
                number = int(rng.integers(first, end))
                try:
                    turn = buffer.turn_span([number])[0]
                    got = buffer.read_features(np.repeat(turn, 8), number % 5, 4096, threads=2)
                except IndexError:  # evicted
                    continue
                except ValueError as error:  # not set yet, or never
                    assert "wanted features of trunk version" in str(error)
                    continue
                wanted = feature_rows(number, number % 5, 4096)
                assert (got.rows == wanted[0]).all() and (got.next_rows == wanted[1]).all()
                num_read.append(number)
        except BaseException as error:
            faults.append(error)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
    for reader in readers:
        reader.start()
    push(buffer, 400)
    done.set()
    for reader in readers:
        reader.join()
    assert not faults
    assert len(num_read) >= 100


# -- bad input -------------------------------------------------------------------------------------


def two_games() -> TrajectoryBuffer:
    buffer = filled(2, feature_bytes=BYTES)
    assert [game(i).num_turns for i in range(2)] == [4, 2]
    return buffer


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0], 1, np.zeros((5, BYTES))), TypeError, "rows: wanted an array of uint8, got float64"),
        (([0], 1, [[1]]), TypeError, "rows: wanted an array of uint8, got list"),
        (
            ([0], 1, np.zeros((5, 2 * BYTES), np.uint8)[:, ::2]),
            TypeError,
            "rows: wanted a C-contiguous array, got stri",
        ),
        (([0], 1, np.zeros((4, BYTES), np.uint8)), ValueError, "rows: wanted 5 rows of 24 bytes, got 96 bytes in all"),
        (([0, 1], 1, np.zeros((5, BYTES), np.uint8)), ValueError, "rows: wanted 8 rows of 24 bytes, got 120 bytes"),
        (
            ([0], -1, np.zeros((5, BYTES), np.uint8)),
            ValueError,
            "trunk_version: wanted an integer from 0 to 2**63 - 1, got -1",
        ),
        (([0], 1.5, np.zeros((5, BYTES), np.uint8)), TypeError, "trunk_version: wanted an integer"),
        (([2], 1, np.zeros((5, BYTES), np.uint8)), IndexError, "trajectory_ids[0]: wanted a live id in [0, 2), got 2"),
        (([0.0], 1, np.zeros((5, BYTES), np.uint8)), TypeError, "trajectory_ids: wanted integers"),
    ],
)
def test_features_that_are_refused_change_nothing(arguments: Any, error: type[Exception], message: str) -> None:
    buffer = two_games()
    before = buffer.read_features([0], 0, BYTES)
    with pytest.raises(error, match=re.escape(message)):
        buffer.set_features(*arguments)
    after = buffer.read_features([0], 0, BYTES)
    assert (before.rows == after.rows).all() and (before.next_rows == after.next_rows).all()
    assert buffer.trajectories_without_features(0).tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([6], 0, 8), IndexError, "turn_ids[0]: wanted a live id in [0, 6), got 6"),
        (([0], 0, -1), ValueError, "next_bytes: wanted an integer from 0 to 24, got -1"),
        (([0], 0, 25), ValueError, "next_bytes: wanted an integer from 0 to 24, got 25"),
        (
            ([0, 5], 0, 8),
            ValueError,
            "turn_ids[1]: wanted features of trunk version 0, got turn 5 of trajectory 1, which has version 1",
        ),
        (([[0]], 0, 8), ValueError, "turn_ids: wanted 1 dimension"),
        (([0], -3, 8), ValueError, "trunk_version: wanted an integer from 0 to 2**63 - 1, got -3"),
    ],
)
def test_reads_that_are_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        two_games().read_features(*arguments)


def test_no_turns_are_no_rows() -> None:
    assert [a.shape for a in two_games().read_features([], 0, 8)] == [(0, BYTES), (0, 8)]


def test_a_buffer_without_features_says_so() -> None:
    buffer = filled(2)
    message = re.escape("features: wanted a buffer with some, got one of feature_bytes = 0")
    with pytest.raises(ValueError, match=message):
        buffer.set_features([0], 0, np.zeros((5, 0), np.uint8))
    with pytest.raises(ValueError, match=message):
        buffer.read_features([0], 0, 0)
    with pytest.raises(ValueError, match=message):
        buffer.trajectories_without_features(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_bytes": -1}, "feature_bytes: wanted an integer from 0 to 2**30, got -1"),
        ({"feature_bytes": 2**31}, "feature_bytes: wanted an integer from 0 to 2**30, got 2147483648"),
        (
            {"feature_bytes": 4, "max_feature_memory": -1},
            "max_feature_memory: wanted an integer from 0 to 2**63 - 1, got -1",
        ),
    ],
)
def test_options_that_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TrajectoryBuffer(100, 10, **options)  # type: ignore[arg-type]


def test_a_bad_scalar_is_refused_by_name(tmp_path: Path) -> None:
    buffer = two_games()
    for version, error in ((-1, ValueError), (2**63, ValueError), (1.5, TypeError), ("1", TypeError)):
        with pytest.raises(error, match=r"trunk_version: wanted an integer from 0 to 2\*\*63 - 1, got "):
            buffer.trajectories_without_features(version)  # type: ignore[arg-type]
    buffer.save(tmp_path)
    for memory, error in ((-1, ValueError), (1e9, TypeError), (None, TypeError)):
        with pytest.raises(error, match=r"max_feature_memory: wanted an integer from 0 to 2\*\*63 - 1, got "):
            TrajectoryBuffer.load(tmp_path, max_feature_memory=memory)  # type: ignore[arg-type]


def test_rows_handed_out_are_the_callers_own() -> None:
    buffer = two_games()
    got: FeatureRows = buffer.read_features([0], 0, 8)
    got.rows[:] = 0
    assert (buffer.read_features([0], 0, 8).rows[0] == feature_rows(0, 0, BYTES)[0]).all()
