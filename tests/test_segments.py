"""A buffer's folder: what a commit writes, links and deletes, and who may be in it at once."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from safetensors.numpy import load_file
from saved_buffers import (
    assert_same_state,
    filled,
    game,
    learn,
    names_in,
    push,
    segments_in,
    state_of,
)

from archer_fast import segments
from archer_fast.buffer import TrajectoryBuffer
from archer_fast.folder_lock import folder_lock
from archer_fast.packing import pack_trajectories
from archer_fast.segment_file import batches
from archer_fast.segment_manifest import read_manifest
from archer_fast.trajectory import Trajectory, Turn

load = TrajectoryBuffer.load

# -- there and back --------------------------------------------------------------------------------


def test_a_loaded_buffer_goes_on_as_the_original(tmp_path: Path) -> None:
    buffer = filled(30, max_trajectories=20, seed=9)
    buffer.sample_turns(17)
    buffer.sample_trajectories(5)
    learn(buffer)
    buffer.save(tmp_path)
    loaded = load(tmp_path)
    assert_same_state(loaded, buffer)
    assert (loaded.max_tokens, loaded.max_trajectories, loaded.num_evicted) == (100_000, 20, 10)
    for _ in range(30):
        assert loaded.sample_turns(33).tolist() == buffer.sample_turns(33).tolist()
        assert (
            loaded.sample_trajectories(7, by_task=True).tolist() == buffer.sample_trajectories(7, by_task=True).tolist()
        )
        for mine, other in zip(loaded.sample_prioritised(9), buffer.sample_prioritised(9), strict=True):
            assert mine.tolist() == other.tolist()
        learn(loaded)
        learn(buffer)
        push(loaded, 1)
        push(buffer, 1)
        assert_same_state(loaded, buffer)


def test_an_empty_buffer_and_the_largest_seed_are_saved_too(tmp_path: Path) -> None:
    buffer = TrajectoryBuffer(100, 5, seed=2**64 - 1)
    buffer.save(tmp_path / "empty")
    assert names_in(tmp_path / "empty") == ["manifest.json", "priorities-000000001.safetensors"]
    assert_same_state(load(tmp_path / "empty"), buffer)
    push(buffer, 2)
    buffer.save(tmp_path / "empty")
    assert_same_state(load(tmp_path / "empty"), buffer)


def test_equal_histories_make_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        buffer = filled(3)
        buffer.save(tmp_path / name)
        push(buffer, 2)
        buffer.save(tmp_path / name)
    assert names_in(tmp_path / "a") == names_in(tmp_path / "b")
    for name in names_in(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# -- commits ---------------------------------------------------------------------------------------


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    return {n: (s.st_ino, s.st_mtime_ns) for n in names_in(folder) if (s := (folder / n).stat())}


def test_a_commit_writes_what_is_new_and_touches_no_older_segment(tmp_path: Path) -> None:
    buffer = filled(3)
    buffer.save(tmp_path)
    assert segments_in(tmp_path) == ["0-3"]
    before = inodes(tmp_path)
    push(buffer, 2)
    buffer.save(tmp_path)
    assert names_in(tmp_path) == [
        "manifest.json",
        "priorities-000000002.safetensors",
        "segment-000000000000-000000000003.safetensors",
        "segment-000000000003-000000000005.safetensors",
    ]
    kept = "segment-000000000000-000000000003.safetensors"
    assert inodes(tmp_path)[kept] == before[kept]
    new = load_file(tmp_path / "segment-000000000003-000000000005.safetensors")
    assert new["policy_versions"].tolist() == [3] * game(3).num_turns + [4] * game(4).num_turns
    assert_same_state(load(tmp_path), buffer)
    buffer.sample_turns(9)
    learn(buffer)
    buffer.save(tmp_path)
    assert segments_in(tmp_path) == ["0-3", "3-5"], "nothing was pushed"
    assert_same_state(load(tmp_path), buffer)


def test_segments_are_deleted_once_wholly_evicted_and_read_in_part_before(tmp_path: Path) -> None:
    buffer = filled(4, max_trajectories=6)
    buffer.save(tmp_path)
    push(buffer, 3)
    buffer.save(tmp_path)
    assert buffer.trajectory_range == (1, 7) and segments_in(tmp_path) == ["0-4", "4-7"]
    assert_same_state(load(tmp_path), buffer)
    push(buffer, 2)
    buffer.save(tmp_path)
    assert buffer.trajectory_range == (3, 9) and segments_in(tmp_path) == ["0-4", "4-7", "7-9"]
    assert_same_state(load(tmp_path), buffer)
    push(buffer, 1)
    buffer.save(tmp_path)
    assert buffer.trajectory_range == (4, 10) and segments_in(tmp_path) == ["4-7", "7-9", "9-10"]
    assert_same_state(load(tmp_path), buffer)
    push(buffer, 50)
    buffer.save(tmp_path)
    assert segments_in(tmp_path) == ["54-60"], "what came and went between two commits is written by none"
    assert_same_state(load(tmp_path), buffer)


def test_a_loaded_buffer_commits_to_its_folder_what_is_new(tmp_path: Path) -> None:
    filled(3).save(tmp_path)
    loaded = load(tmp_path)
    push(loaded, 2)
    loaded.save(tmp_path)
    assert segments_in(tmp_path) == ["0-3", "3-5"]
    assert_same_state(load(tmp_path), filled(5))


def test_batches() -> None:
    assert list(batches(np.array([3, 3, 3, 9, 1], np.int32), 6)) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert list(batches(np.array([], np.int32), 6)) == []
    assert list(batches(np.array([6, 6], np.int32), 6)) == [(0, 1), (1, 2)]


def test_much_at_once_becomes_several_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MAX_SEGMENT_TOKENS", 30)
    buffer = filled(40)
    buffer.save(tmp_path)
    sizes = [load_file(tmp_path / name)["num_tokens"] for name in names_in(tmp_path) if name.startswith("segment")]
    assert len(sizes) > 10 and sum(s.size for s in sizes) == 40
    assert all(s.sum() <= 30 for s in sizes)
    assert all(a.sum() + b[0] > 30 for a, b in itertools.pairwise(sizes)), "none could have taken one more"
    assert_same_state(load(tmp_path), buffer)
    loaded = load(tmp_path)
    push(loaded, 1)
    loaded.save(tmp_path)
    assert_same_state(load(tmp_path), filled(41))


class Folders(RuleBasedStateMachine):
    """Buffers that are pushed to, saved, loaded and gone on with in any order, against what was last saved where."""

    folders: Bundle[str] = Bundle("folders")

    @initialize(seed=st.integers(0, 9), feature_bytes=st.sampled_from([0, 12]))
    def begin(self, seed: int, feature_bytes: int) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.buffer = TrajectoryBuffer(120, 8, seed, feature_bytes=feature_bytes)
        self.saved: dict[str, dict[str, Any]] = {}
        self.count = 0

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    @rule(num=st.integers(0, 5), drawn=st.integers(0, 3))
    def push(self, num: int, drawn: int) -> None:
        for i in range(num):
            self.buffer.push(game(1000 * self.count + i))  # another history after every load
        if len(self.buffer):
            self.buffer.sample_turns(drawn)
            learn(self.buffer)

    @rule(place=st.floats(0, 0.999), num=st.integers(1, 3), trunk_version=st.integers(0, 9))
    def set_features(self, place: float, num: int, trunk_version: int) -> None:
        first, end = self.buffer.trajectory_range
        if first < end and self.buffer.feature_bytes:
            self.count += 1
            begin = first + int(place * (end - first))
            ids = np.arange(begin, min(begin + num, end))
            num_rows = int((self.buffer.turn_span(ids)[1] + 1).sum())
            rows = np.random.default_rng(self.count).integers(0, 256, (num_rows, 12), np.uint8)
            self.buffer.set_features(ids, trunk_version, rows)

    @rule(target=folders)
    def save_elsewhere(self) -> str:
        return self.save_to(None)

    @rule(target=folders, previous=folders)
    def save_beside(self, previous: str) -> str:
        return self.save_to(previous)

    def save_to(self, previous: str | None) -> str:
        self.count += 1
        name = str(self.count)
        self.buffer.save(self.root / name, None if previous is None else self.root / previous)
        self.saved[name] = state_of(self.buffer)
        return name

    @rule(name=folders)
    def save_again(self, name: str) -> None:
        self.buffer.save(self.root / name)
        self.saved[name] = state_of(self.buffer)

    @rule(name=folders)
    def load(self, name: str) -> None:
        self.count += 1
        self.buffer = load(self.root / name)

    @rule(name=consumes(folders))
    def delete(self, name: str) -> None:
        shutil.rmtree(self.root / name)
        del self.saved[name]

    @invariant()
    def every_folder_is_whole_by_itself(self) -> None:
        for name, state in getattr(self, "saved", {}).items():
            assert_same_state(load(self.root / name), state)
            manifest = read_manifest(self.root / name)
            assert set(names_in(self.root / name)) == manifest.names() | {"manifest.json"}


TestFolders = Folders.TestCase
TestFolders.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_a_commit_that_may_not_last_keeps_the_files_of_the_old_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = filled(3, max_trajectories=3)
    buffer.save(tmp_path)
    names = set(names_in(tmp_path))
    push(buffer, 3)
    syncs: list[Path] = []

    def fails_after_the_manifest(folder: Path) -> None:
        syncs.append(folder)
        if len(syncs) == 2:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(segments, "sync", fails_after_the_manifest)
    with pytest.raises(OSError, match="Input/output error"):
        buffer.save(tmp_path)
    assert names < set(names_in(tmp_path)), "should the machine stop now, either manifest may be found"
    assert_same_state(load(tmp_path), buffer)
    push(buffer, 1)
    buffer.save(tmp_path)
    assert_same_state(load(tmp_path), buffer)


# -- links -----------------------------------------------------------------------------------------


def test_the_next_folder_links_what_the_previous_one_holds_and_outlives_it(tmp_path: Path) -> None:
    old, new = tmp_path / "1", tmp_path / "2"
    buffer = filled(6, max_trajectories=8)
    buffer.save(old)
    push(buffer, 1)
    buffer.save(old)
    push(buffer, 4)
    before = inodes(old)
    buffer.save(new, previous=old)
    assert segments_in(new) == ["0-6", "6-7", "7-11"] and buffer.trajectory_range == (3, 11)
    for name in names_in(old):
        if name.startswith("segment"):
            assert (old / name).samefile(new / name)
    assert inodes(old) == before, "the previous folder is as it was"
    assert_same_state(load(old), filled(7, max_trajectories=8))
    shutil.rmtree(old)
    assert_same_state(load(new), buffer)


@pytest.mark.parametrize("harm", ["gone", "no manifest", "cut short", "another buffer's", "a segment gone"])
def test_what_cannot_be_linked_is_written_again(tmp_path: Path, harm: str) -> None:
    old, new = tmp_path / "1", tmp_path / "2"
    buffer = filled(3)
    buffer.save(old)
    segment = old / "segment-000000000000-000000000003.safetensors"
    if harm == "gone":
        shutil.rmtree(old)
    elif harm == "no manifest":
        (old / "manifest.json").write_text("{")
    elif harm == "cut short":
        os.truncate(segment, 100)
    elif harm == "a segment gone":
        segment.unlink()
    else:
        shutil.rmtree(old)
        other = TrajectoryBuffer(1000, 10)
        other.extend([game(n) for n in (7, 8, 9)])
        other.save(old)
    push(buffer, 1)
    buffer.save(new, previous=old)
    assert segments_in(new) == ["0-4"]
    assert_same_state(load(new), filled(4))


def test_another_file_system_refuses_links_and_all_is_written(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm to be another file system than the temporary folder's; runs where it is")
    other = shm / f"archer_fast_test_{os.getpid()}"
    try:
        buffer = filled(3)
        buffer.save(tmp_path)
        push(buffer, 1)
        buffer.save(other, previous=tmp_path)
        assert segments_in(other) == ["0-4"]
        assert_same_state(load(other), buffer)
    finally:
        shutil.rmtree(other, ignore_errors=True)


def test_a_folder_that_another_buffer_saved_to_is_replaced_in_one_step(tmp_path: Path) -> None:
    """Both histories have segments of the same ids: the new one's take other names until the old ones go."""
    filled(3).save(tmp_path)
    other = TrajectoryBuffer(1000, 10)
    other.extend([game(n) for n in (7, 8, 9)])
    other.save(tmp_path)
    assert segments_in(tmp_path) == ["0-3-1"]
    assert_same_state(load(tmp_path), other)


def test_two_buffers_that_part_ways_overwrite_each_other_whole(tmp_path: Path) -> None:
    left = filled(3)
    left.save(tmp_path)
    right = load(tmp_path)
    left.push(game(100))
    left.save(tmp_path)
    right.push(game(200))
    right.save(tmp_path)
    assert_same_state(load(tmp_path), right)
    assert segments_in(tmp_path) == ["0-3", "3-4-1"]
    left.save(tmp_path)
    assert_same_state(load(tmp_path), left)


# -- together --------------------------------------------------------------------------------------

_HOLD = """
import sys, time
from pathlib import Path
from archer_fast.folder_lock import folder_lock
from archer_fast.packing import pack_trajectories
with folder_lock(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_until_the_first_one_ends(tmp_path: Path) -> None:
    buffer = filled(3)
    buffer.save(tmp_path)
    push(buffer, 1)
    before = names_in(tmp_path)
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match=rf"folder: another writer is in '{tmp_path}' \(pid {holder.pid} on "):
            buffer.save(tmp_path)
        assert names_in(tmp_path) == before
        assert_same_state(load(tmp_path), filled(3))  # a reader needs no lock
        holder.send_signal(signal.SIGKILL)
    buffer.save(tmp_path)
    assert_same_state(load(tmp_path), filled(4))


def test_a_second_thread_is_refused_too(tmp_path: Path) -> None:
    with folder_lock(tmp_path), pytest.raises(ValueError, match=rf"another writer is in .*\(pid {os.getpid()} on "):
        filled(1).save(tmp_path)
    filled(1).save(tmp_path)


def test_readers_see_whole_commits_while_one_is_written(tmp_path: Path) -> None:
    buffer = filled(5, max_trajectories=6, seed=1)
    states = {5: state_of(buffer)}
    buffer.save(tmp_path)
    done = threading.Event()
    faults: list[BaseException] = []
    seen: set[int] = set()

    def read() -> None:
        try:
            while not done.is_set():
                loaded = load(tmp_path)
                end = loaded.trajectory_range[1]
                assert_same_state(loaded, states[end])
                seen.add(end)
        except BaseException as error:
            faults.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(60):
        push(buffer, 4)
        states[buffer.trajectory_range[1]] = state_of(buffer)
        buffer.save(tmp_path)
        if faults:
            break
    done.set()
    for reader in readers:
        reader.join()
    assert not faults
    assert len(seen) > 3


def test_a_commit_beside_a_learner_is_of_one_moment(tmp_path: Path) -> None:
    """At every moment all priorities are the largest there ever was: so they are in what is saved."""
    buffer = filled(400, max_trajectories=400)
    done = threading.Event()

    def learn_on() -> None:
        for priority in itertools.count(2.0):
            if done.is_set():
                return
            push(buffer, 1)
            buffer.sample_prioritised(4)
            turn_ids = np.arange(*buffer.turn_range)
            buffer.update_priorities(turn_ids, np.full(turn_ids.size, priority))

    learner = threading.Thread(target=learn_on)
    learner.start()
    try:
        seen = set()
        for _ in range(20):
            buffer.save(tmp_path)
            state = load(tmp_path)._core.state()
            assert set(state["priorities"]) == {state["max_priority"]}
            seen.add(state["max_priority"])
    finally:
        done.set()
        learner.join()
    assert len(seen) > 10


def test_a_commit_ends_though_pushes_come_faster_than_it_copies(tmp_path: Path) -> None:
    turn = Turn(np.array([1]), np.array([2]), np.array([-1.0]), 0.0, 0)
    one = Trajectory((turn,) * 4, np.array([], np.int32), True, False)
    buffer = TrajectoryBuffer(10**8, 50_000)
    buffer.extend([one] * 50_000)
    buffer.update_priorities([0], [0.5])  # now every turn has one of its own
    done, pushed = threading.Event(), [0]

    def produce() -> None:
        while not done.is_set():
            buffer.push(one)
            pushed[0] += 1

    producers = [threading.Thread(target=produce) for _ in range(2)]
    for producer in producers:
        producer.start()
    saver = threading.Thread(target=buffer.save, args=(tmp_path,))
    saver.start()
    saver.join(60)
    is_saved = not saver.is_alive()
    done.set()
    for thread in (*producers, saver):
        thread.join()
    assert is_saved
    assert pushed[0] > 10
    assert len(load(tmp_path)) == 50_000


def test_a_commit_beside_a_thread_that_pushes(tmp_path: Path) -> None:
    buffer = filled(1, max_trajectories=30)
    done = threading.Event()

    def produce() -> None:
        while not done.is_set():
            push(buffer, 1)

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        ends = []
        for _ in range(20):
            buffer.save(tmp_path)
            loaded = load(tmp_path)
            first, end = loaded.trajectory_range
            packed, wanted = loaded.collate(range(first, end)), pack_trajectories([game(n) for n in range(first, end)])
            for name, array in wanted._asdict().items():
                assert getattr(packed, name).tolist() == array.tolist(), name
            ends.append(end)
    finally:
        done.set()
        producer.join()
    assert ends == sorted(ends) and ends[-1] > ends[0]
