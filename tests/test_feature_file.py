"""Features of saved buffers: which files a commit keeps, links, writes anew and deletes, and what is done to them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from saved_buffers import (
    assert_same_state,
    feature_rows,
    filled,
    game,
    names_in,
    push,
    read_again,
    reseal_manifest,
    segments_in,
    state_of,
)

from archer_fast import feature_file
from archer_fast.buffer import TrajectoryBuffer
from archer_fast.sealed_file import SealedFile, write_pieces
from archer_fast.segment_file import FeatureFile
from archer_fast.segment_manifest import read_manifest, write_manifest
from archer_fast.segments import commit

load = TrajectoryBuffer.load
BYTES = 20


def features_in(folder: Path) -> list[str]:
    return segments_in(folder, "features")


def inode(folder: Path, first: int, end: int) -> int:
    return (folder / f"features-{first:012d}-{end:012d}.safetensors").stat().st_ino


def test_a_loaded_buffer_has_the_features_and_goes_on(tmp_path: Path) -> None:
    buffer = filled(12, max_trajectories=10, feature_bytes=BYTES)
    buffer.save(tmp_path)
    assert features_in(tmp_path) == ["2-12"]
    loaded = load(tmp_path, max_feature_memory=0)
    assert loaded.feature_bytes == BYTES and loaded.stats().num_mapped_bytes > 0
    assert_same_state(loaded, buffer)
    for both in (buffer, loaded):
        push(both, 3)
        read_again(both)
    assert_same_state(loaded, buffer)
    loaded.save(tmp_path)
    assert_same_state(load(tmp_path), buffer)


def test_the_file_is_what_its_name_says(tmp_path: Path) -> None:
    filled(4, feature_bytes=BYTES).save(tmp_path)
    arrays = load_file(tmp_path / "features-000000000000-000000000004.safetensors")
    assert arrays.keys() == {"rows", "trunk_versions"}
    assert arrays["trunk_versions"].dtype == np.int64 and arrays["trunk_versions"].tolist() == [0, 1, -1, 3]
    none = np.zeros((game(2).num_turns + 1, BYTES), np.uint8)
    wanted = [feature_rows(0, 0, BYTES), feature_rows(1, 1, BYTES), none, feature_rows(3, 3, BYTES)]
    np.testing.assert_array_equal(arrays["rows"], np.concatenate(wanted))


def test_without_features_there_is_no_file(tmp_path: Path) -> None:
    buffer = filled(3)
    buffer.save(tmp_path / "none")
    assert features_in(tmp_path / "none") == []
    with_room = TrajectoryBuffer(100, 10, feature_bytes=BYTES)
    with_room.push(game(0))
    with_room.save(tmp_path / "room")
    assert features_in(tmp_path / "room") == []
    loaded = load(tmp_path / "room")
    assert loaded.trajectories_without_features(0).tolist() == [0]
    loaded.set_features([0], 1, feature_rows(0, 1, BYTES))
    loaded.save(tmp_path / "room")
    assert segments_in(tmp_path / "room") == ["0-1"] and features_in(tmp_path / "room") == ["0-1"]
    assert_same_state(load(tmp_path / "room"), loaded)


def test_a_file_is_kept_until_features_of_its_games_are_set(tmp_path: Path) -> None:
    buffer = filled(4, max_trajectories=6, feature_bytes=BYTES)
    buffer.save(tmp_path)
    push(buffer, 2)
    before = inode(tmp_path, 0, 4)
    buffer.save(tmp_path)
    assert features_in(tmp_path) == ["0-4", "4-6"] and inode(tmp_path, 0, 4) == before
    kept = inode(tmp_path, 4, 6)

    buffer.set_features([3], 9, feature_rows(3, 9, BYTES))
    buffer.save(tmp_path)
    assert features_in(tmp_path) == ["0-4-1", "4-6"], "the old name was taken"
    assert inode(tmp_path, 4, 6) == kept
    assert_same_state(load(tmp_path), buffer)

    push(buffer, 2)  # 0 and 1 go
    buffer.save(tmp_path)
    assert features_in(tmp_path) == ["0-4-1", "4-6", "6-8"], "a file in part evicted stays as it is"
    assert_same_state(load(tmp_path), buffer)
    loaded = load(tmp_path)
    for one in (buffer, loaded):
        one.set_features([2], 9, feature_rows(2, 9, BYTES))
        one.save(tmp_path)
        assert segments_in(tmp_path) == ["0-4", "4-6", "6-8"]
        assert_same_state(load(tmp_path), one)
    assert features_in(tmp_path)[0].startswith("2-4"), "written again: what is left of it"
    push(buffer, 2)
    buffer.save(tmp_path)
    assert features_in(tmp_path) == ["4-6", "6-8", "8-10"]
    assert_same_state(load(tmp_path), buffer)


def test_the_next_folder_links_what_did_not_change_and_outlives_the_previous_one(tmp_path: Path) -> None:
    old, new = tmp_path / "1", tmp_path / "2"
    buffer = filled(3, feature_bytes=BYTES)
    buffer.save(old)
    push(buffer, 3)
    buffer.save(old)
    before = state_of(buffer)
    push(buffer, 1)
    buffer.set_features([4], 9, feature_rows(4, 9, BYTES))
    buffer.save(new, previous=old)
    assert features_in(new) == ["0-3", "3-6", "6-7"]
    assert inode(new, 0, 3) == inode(old, 0, 3)
    assert inode(new, 3, 6) != inode(old, 3, 6)
    assert_same_state(load(old), before)
    shutil.rmtree(old)
    assert_same_state(load(new), buffer)


@pytest.mark.parametrize("harm", ["gone", "cut short"])
def test_features_that_cannot_be_linked_are_written_again_and_their_games_are_not(tmp_path: Path, harm: str) -> None:
    old, new = tmp_path / "1", tmp_path / "2"
    buffer = filled(3, feature_bytes=BYTES)
    buffer.save(old)
    path = old / "features-000000000000-000000000003.safetensors"
    path.unlink() if harm == "gone" else path.write_bytes(path.read_bytes()[:-1])
    buffer.save(new, previous=old)
    segment = "segment-000000000000-000000000003.safetensors"
    assert (new / segment).samefile(old / segment)
    assert_same_state(load(new), buffer)


def test_files_are_written_and_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_file, "PIECE_BYTES", 7 * BYTES)
    buffer = filled(40, max_trajectories=35, feature_bytes=BYTES)
    pieces = []

    def spy(path: Path, made: Any) -> SealedFile:
        def seen() -> Any:
            for piece in made:
                pieces.append(piece.size)
                yield piece

        return write_pieces(path, seen())

    monkeypatch.setattr(feature_file, "write_pieces", spy)
    buffer.save(tmp_path)
    _, *rows, versions = pieces
    assert len(rows) > 10 and max(rows) <= 7 * BYTES and versions == 8 * 35
    loaded = load(tmp_path)
    assert_same_state(loaded, buffer)
    push(loaded, 20)  # the file begins before the first live game now
    loaded.save(tmp_path)
    assert_same_state(load(tmp_path), loaded)


class Evicting:
    """A core from which somebody evicts, by pushes, while the first features are copied."""

    def __init__(self, buffer: TrajectoryBuffer) -> None:
        self.buffer, self.is_first = buffer, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.buffer._core, name)

    def copy_features(self, *args: Any) -> None:
        if self.is_first:
            self.is_first = False
            push(self.buffer, 2)
        self.buffer._core.copy_features(*args)


def test_features_evicted_while_they_are_written_are_left_out_and_set_again_are_written_again(tmp_path: Path) -> None:
    buffer = filled(5, max_trajectories=5, feature_bytes=BYTES)
    wanted = state_of(buffer)
    saved = commit(tmp_path, Evicting(buffer))  # type: ignore[arg-type]
    loaded = load(tmp_path)
    assert loaded.trajectory_range == (0, 5), "the games were read before they went"
    got = state_of(loaded)
    assert got["trunk_versions"].tolist() == [-1, -1, -1, 3, 4]
    assert got["tokens"].tolist() == wanted["tokens"].tolist()
    num_rows = [game(i).num_turns + 1 for i in range(5)]
    kept = sum(num_rows[3:]) * BYTES
    assert got["features"][-kept:].tolist() == wanted["features"][-kept:].tolist()
    commit(tmp_path, buffer._core, saved)
    assert_same_state(load(tmp_path), buffer)


# -- damage ----------------------------------------------------------------------------------------


def changed(folder: Path, **changes: Any) -> Path:
    """Change the arrays of the features file and make the checksums right again."""
    manifest = read_manifest(folder)
    segment = manifest.segments[0]
    assert segment.features is not None
    path = folder / segment.features.file.name
    if changes:
        save_file(load_file(path) | changes, path)
    sealed = write_pieces(path, [np.frombuffer(path.read_bytes(), np.uint8)])
    reseal_manifest(folder, segments=(segment._replace(features=FeatureFile(segment.features.first, sealed)),))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trunk_versions": np.zeros(5, np.int64)}, "rows: wanted 18 of 20 bytes, "),
        ({"rows": np.zeros((17, BYTES), np.uint8)}, "rows: wanted 18 of 20 bytes, "),
        ({"rows": np.zeros((20, 18), np.uint8)}, "header: wanted b'"),
    ],
)
def test_a_file_that_is_wrong_under_a_right_checksum(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    filled(4, feature_bytes=BYTES).save(tmp_path)
    assert sum(game(i).num_turns + 1 for i in range(4)) == 18
    path = changed(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        load(tmp_path)


def test_a_version_that_no_trunk_has_is_refused(tmp_path: Path) -> None:
    filled(4, feature_bytes=BYTES).save(tmp_path)
    path = tmp_path / "features-000000000000-000000000004.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + np.int64(-2).tobytes())
    changed(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: trunk_versions: wanted -1 or more, got -2")):
        load(tmp_path)


def test_no_flipped_bit_and_no_cut_passes(tmp_path: Path) -> None:
    buffer = filled(4, feature_bytes=BYTES)
    buffer.save(tmp_path)
    path = tmp_path / "features-000000000000-000000000004.safetensors"
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load(tmp_path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: size: wanted {len(whole)} bytes, got "):
        load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(path))}: missing, though the manifest names it"):
        load(tmp_path)
    path.write_bytes(whole)
    assert_same_state(load(tmp_path), buffer)


def test_features_that_the_manifest_cannot_mean(tmp_path: Path) -> None:
    buffer = filled(4, max_trajectories=3, feature_bytes=BYTES)
    buffer.save(tmp_path)
    manifest = read_manifest(tmp_path)
    (segment,) = manifest.segments
    assert segment.features is not None and segment.features.first == 1
    for first, message in ((0, "features: first: wanted 1 to 3, got 0"), (2, "features: wanted none, or those of all")):
        reseal_manifest(tmp_path, segments=(segment._replace(features=segment.features._replace(first=first)),))
        with pytest.raises(ValueError, match=re.escape(message)):
            load(tmp_path)
        write_manifest(tmp_path, manifest)
    reseal_manifest(tmp_path, segments=(segment,), scalars=manifest.scalars | {"feature_bytes": 0})
    with pytest.raises(ValueError, match="features: wanted none, or those of all live"):
        load(tmp_path)
    assert set(names_in(tmp_path)) == manifest.names() | {"manifest.json"}
