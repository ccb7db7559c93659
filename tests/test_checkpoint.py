"""Checkpoints: whole or absent, on a disk that is really full too; a broken one names its file and field."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from archer_fast.buffer import TrajectoryBuffer
from archer_fast.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    replace_folder,
    restore_folder,
    save_checkpoint,
)
from archer_fast.trajectory import Trajectory, Turn

TENSORS = {"critic.w": torch.arange(6, dtype=torch.float32).view(2, 3), "generator": torch.arange(5, dtype=torch.uint8)}
NUMBERS = {"iteration": 7, "best": None, "rng": {"state": 1 << 100}}


def save_policy(folder: Path, num_weights: int = 50) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    safetensors.torch.save_file({"w": torch.arange(num_weights)}, folder / "model.safetensors")


def make_buffer() -> TrajectoryBuffer:
    buffer = TrajectoryBuffer(100, 10, seed=3)
    turn = Turn(np.array([1, 2]), np.array([3, 0]), np.array([-1.0, -2.0]), -1.0, 0)
    buffer.push(Trajectory((turn, turn), np.array([4]), True, False))
    return buffer


def save(folder: Path, iteration: int, *, keep: int = 2, num_weights: int = 50) -> Path:
    return save_checkpoint(
        folder,
        iteration,
        lambda path: save_policy(path, num_weights),
        make_buffer().save,
        TENSORS,
        {**NUMBERS, "iteration": iteration},
        keep,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert path == tmp_path / "iteration-000007"
    got = load_checkpoint(path)
    assert got.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert got.tensors[name].dtype == tensor.dtype and torch.equal(got.tensors[name], tensor)
    assert got.numbers == NUMBERS
    assert got.number("iteration") == 7 and got.number("best") is None
    assert TrajectoryBuffer.load(got.buffer).collate([0]).input_ids.tolist() == [1, 2, 3, 0, 1, 2, 3, 0, 4]
    assert torch.equal(safetensors.torch.load_file(got.policy / "model.safetensors")["w"], torch.arange(50))


def test_tensors_that_share_memory_are_saved_by_value(tmp_path: Path) -> None:
    whole = torch.arange(6.0).view(2, 3)
    tensors = {"whole": whole, "again": whole, "view": whole[0]}
    path = save_checkpoint(tmp_path, 1, lambda p: p.mkdir(), make_buffer().save, tensors, {})
    got = load_checkpoint(path).tensors
    assert got["view"].tolist() == [0, 1, 2]
    assert got["whole"].tolist() == got["again"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for iteration in (2, 10, 100):
        save(tmp_path, iteration, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["iteration-000010", "iteration-000100"]
    save(tmp_path, 101, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration-000101", "notes.txt"]


def test_the_same_iteration_saved_again_replaces_itself(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path, 4)
    save(tmp_path, 4, num_weights=9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration-000003", "iteration-000004"]
    policy = load_checkpoint(tmp_path / "iteration-000004").policy
    assert safetensors.torch.load_file(policy / "model.safetensors")["w"].numel() == 9


# -- broken ones -----------------------------------------------------------------------------------

FILES = ["policy/config.json", "policy/model.safetensors", "state.safetensors", "state.json"]


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    path = save(tmp_path, 7)
    damage(path / name)
    with pytest.raises(CheckpointError, match=rf"{path / name}: its content is not what was written"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 7)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{path / name}: .*(missing|No such file)"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "field 'format': wanted 3, got 1: an older archer_fast wrote this run"),
        ({"format": 2}, "field 'format': wanted 3, got 2: an older archer_fast wrote this run"),
        ({"format": 4}, "field 'format': wanted 3, got 4"),
        ({"format": None}, "field 'format': wanted 3, got None"),
        ({"sha256": None}, "field 'sha256' is missing"),
    ],
)
def test_a_manifest_of_another_kind_is_named_with_its_field(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = save(tmp_path, 7)
    file = path / "manifest.json"
    changed = {k: v for k, v in (json.loads(file.read_text()) | change).items() if v is not None}
    file.write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=f"{file}: {message}"):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["", '{"format": 2, "sha', "[1]", "\ufffd"])
def test_a_manifest_that_is_no_object_is_named(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 7)
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"{path / 'manifest.json'}: "):
        load_checkpoint(path)


def test_the_buffer_answers_for_its_own_files(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["sha256"]) == set(FILES)
    files = [file for file in (path / "buffer").iterdir() if file.name != ".lock"]
    assert len(files) == 3
    for file in files:
        whole = file.read_bytes()
        flip_a_bit(file)
        with pytest.raises(ValueError, match=str(file)):
            TrajectoryBuffer.load(load_checkpoint(path).buffer)
        file.write_bytes(whole)
    TrajectoryBuffer.load(load_checkpoint(path).buffer)


def test_the_next_checkpoint_links_the_segments_of_the_last_one(tmp_path: Path) -> None:
    buffer = make_buffer()

    def save_and_push(iteration: int) -> Path:
        path = save_checkpoint(tmp_path, iteration, save_policy, buffer.save, TENSORS, NUMBERS, keep=2)
        turn = Turn(np.array([1]), np.array([2]), np.array([-1.0]), 0.0, iteration)
        buffer.push(Trajectory((turn,), np.array([]), True, False))
        return path

    def segments(path: Path) -> list[Path]:
        return sorted(path.glob("buffer/segment-*"))

    first, second = save_and_push(1), save_and_push(2)
    assert (len(segments(first)), len(segments(second))) == (1, 2)
    assert segments(first)[0].samefile(segments(second)[0])
    again = save_and_push(2)  # replaces the one that it links
    assert len(segments(again)) == 3 and segments(again)[0].samefile(segments(first)[0])
    third = save_and_push(3)
    assert not first.exists()
    assert [file.stat().st_nlink for file in segments(third)] == [2, 2, 2, 1]
    shutil.rmtree(again)
    loaded = TrajectoryBuffer.load(load_checkpoint(third).buffer)
    assert loaded.trajectory_range == (0, 4)
    assert loaded.collate([3]).policy_versions.tolist() == [2]
    save_and_push(4)
    assert len(segments(tmp_path / "iteration-000004")) == 5


def test_a_missing_number_is_named_with_its_file(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    with pytest.raises(CheckpointError, match=rf"{path / 'state.json'}: field 'num_games' is missing"):
        load_checkpoint(path).number("num_games")


# -- a full disk -----------------------------------------------------------------------------------


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond that, as a full disk would: a true OSError from write()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill_policy(folder: Path) -> None:
    save(folder, 8, num_weights=10_000)


def fill_state(folder: Path) -> None:
    many = {"w": torch.zeros(10_000)}
    save_checkpoint(folder, 8, save_policy, make_buffer().save, many, NUMBERS)


def fill_numbers(folder: Path) -> None:
    save_checkpoint(folder, 8, save_policy, make_buffer().save, TENSORS, {"long": "x" * 20_000})


@pytest.mark.parametrize("fill", [fill_policy, fill_state, fill_numbers])
def test_no_room_for_a_file_leaves_older_checkpoints_whole_and_nothing_behind(
    tmp_path: Path, fill: Callable[[Path], None]
) -> None:
    save(tmp_path, 6)
    save(tmp_path, 7)
    before = contents(tmp_path)
    with pytest.raises(OSError, match="File too large"), files_of_at_most(8_000):
        fill(tmp_path)
    assert contents(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration-000006", "iteration-000007"]
    load_checkpoint(list_checkpoints(tmp_path)[-1])
    fill(tmp_path)  # once there is room again
    load_checkpoint(tmp_path / "iteration-000008")


_ON_A_SMALL_DISK = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_checkpoint import contents, list_checkpoints, load_checkpoint, save
disk = Path(sys.argv[1])
save(disk, 6, num_weights=5_000)
save(disk, 7, num_weights=5_000)
before = contents(disk)
try:
    save(disk, 8, num_weights=12_000)  # 120 kB with the small files, and two of 64 kB are there
except OSError as error:
    print("OSError", error)
assert contents(disk) == before
assert [p.name for p in disk.iterdir() if p.name.startswith(".")] == []
load_checkpoint(list_checkpoints(disk)[-1])
print("whole")
save(disk, 8, num_weights=5_000, keep=1)
print(*[p.name for p in list_checkpoints(disk)])
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A file system of 224 kB in a mount namespace of its own, where the kernel lets us make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = tmp_path / "script.py"
    script.write_text(_ON_A_SMALL_DISK.format(tests=str(Path(__file__).parent)))
    mount = f'mount -t tmpfs -o size=224k tmpfs "{disk}"'
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip(
            "user namespaces are off here; runs where they are on. The tests above use the kernel's file size limit"
        )
    command = f'{mount} && exec "{sys.executable}" "{script}" "{disk}"'
    done = subprocess.run([*inside, command], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    refused, whole, kept = done.stdout.splitlines()
    assert refused.startswith("OSError") and "No space left on device" in refused
    assert (whole, kept) == ("whole", "iteration-000008")


def test_a_write_that_is_interrupted_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted(path: Path) -> None:
        path.joinpath("half").write_text("x")
        raise KeyboardInterrupt

    target = tmp_path / "best"
    replace_folder(target, lambda path: path.joinpath("whole").write_text("old"))
    with pytest.raises(KeyboardInterrupt):
        replace_folder(target, interrupted)
    assert contents(tmp_path) == {"best/whole": b"old"}


def test_what_a_killed_writer_left_is_neither_listed_nor_in_the_way(tmp_path: Path) -> None:
    save(tmp_path, 6)
    for name in (".iteration-000007.writing", ".iteration-000007.old"):
        shutil.copytree(tmp_path / "iteration-000006", tmp_path / name)
        (tmp_path / name / "state.json").unlink()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["iteration-000006"]
    save(tmp_path, 7)
    save(tmp_path, 7)
    load_checkpoint(tmp_path / "iteration-000007")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration-000006", "iteration-000007"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    old = tmp_path / ".best.old"
    old.mkdir()
    (old / "weights").write_text("old")
    restore_folder(tmp_path / "best")
    assert (tmp_path / "best" / "weights").read_text() == "old" and not old.exists()
    old.mkdir()  # killed after both renames, before the old one was removed
    restore_folder(tmp_path / "best")
    assert (tmp_path / "best" / "weights").read_text() == "old" and old.exists()
