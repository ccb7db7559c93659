"""A damaged folder of a saved buffer: whatever was done to it is read right or refused by name."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from safetensors.numpy import load_file
from saved_buffers import (
    assert_same_state,
    filled,
    names_in,
    push,
    reseal_manifest,
    reseal_segment,
)

from archer_fast.buffer import TrajectoryBuffer
from archer_fast.sealed_file import SealedFile
from archer_fast.segment_manifest import read_manifest, write_manifest

load = TrajectoryBuffer.load


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Three segments, the first of them evicted in part."""
    buffer = filled(4, max_trajectories=7)
    for num in (3, 2):
        buffer.save(tmp_path)
        push(buffer, num)
    buffer.save(tmp_path)
    assert len(names_in(tmp_path)) == 5 and buffer.num_evicted == 2
    return tmp_path


def assert_named(folder: Path, path: Path) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        load(folder)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_no_flipped_bit_passes(saved: Path) -> None:
    rng = random.Random(0)
    for name in names_in(saved):
        path = saved / name
        whole = path.read_bytes()
        places = sorted({*range(0, min(len(whole), 1200), 5), *(rng.randrange(len(whole)) for _ in range(150))})
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            message = assert_named(saved, path)
            if name != "manifest.json":
                assert "crc32c: wanted" in message and "the file was damaged" in message
        path.write_bytes(whole)
    load(saved)


def test_no_cut_and_no_tail_passes(saved: Path) -> None:
    for name in names_in(saved):
        path = saved / name
        whole = path.read_bytes()
        for length in sorted({0, 1, len(whole) - 1, *range(0, len(whole), 29)}):
            path.write_bytes(whole[:length])
            message = assert_named(saved, path)
            if name != "manifest.json":
                assert f"size: wanted {len(whole)} bytes, got {length}" in message
        for tail in (b"\0", b"\n", b" "):
            path.write_bytes(whole + tail)
            assert_named(saved, path)
        path.write_bytes(whole)
    load(saved)


def test_a_missing_file_is_named(saved: Path) -> None:
    for name in names_in(saved):
        path = saved / name
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            load(saved)
        path.write_bytes(whole)
    load(saved)


def test_swapped_files_are_named(saved: Path) -> None:
    first, second, _ = (saved / name for name in names_in(saved) if name.startswith("segment"))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    assert_named(saved, first)


def test_what_nobody_names_is_ignored_and_ours_of_it_swept(saved: Path) -> None:
    left_behind = [
        "segment-000000000009-000000000012.safetensors",
        "segment-000000000000-000000000004-3.safetensors",
        "priorities-000000077.safetensors",
        ".manifest.json.tmp",
        ".segment-000000000009-000000000012.safetensors.tmp",
        ".priorities-000000004.safetensors.tmp",
    ]
    foreign = ["notes.txt", "segment.safetensors", ".hidden", "segment-a-b.safetensors", "x.tmp"]
    for name in (*left_behind, *foreign):
        (saved / name).write_bytes(b"half")
    buffer = load(saved)
    push(buffer, 3)  # the name of what was left behind
    buffer.save(saved)
    assert_same_state(load(saved), buffer)
    there = set(names_in(saved))
    assert set(foreign) <= there
    assert there - set(foreign) == read_manifest(saved).names() | {"manifest.json"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": np.zeros(4, np.int64)}, "tokens: wanted a 1-d array of int32, got int64 of shape (4,)"),
        ({"tokens": np.zeros((4, 1), np.int32)}, "tokens: wanted a 1-d array of int32, got int32 of shape (4, 1)"),
        ({"tokens": np.zeros(4, np.int32)}, "tokens: wanted 53 items, got 4"),
        ({"rewards": None}, "wanted the fields ['action_lengths', "),
        ({"extra": np.zeros(1)}, "wanted the fields ['action_lengths', "),
        ({"rewards": np.zeros(1, np.float32)}, "rewards: wanted "),
        ({"rollout_logprobs": np.zeros(1, np.float32)}, "rollout_logprobs: wanted "),
        ({"terminated": np.zeros(3, np.bool_)}, "terminated: wanted 4 items, got 3"),
        ({"num_turns": np.array([1, 1, -1, 1], np.int32)}, "num_turns: wanted at least 1, got -1"),
        ({"num_tokens": np.array([0, 1, 1, 1], np.int32)}, "num_tokens: wanted at least 1, got 0"),
        ({"num_turns": np.full(4, 2**31 - 1, np.int32)}, "observation_lengths: wanted 8589934588 items, got "),
    ],
)
def test_a_segment_that_is_wrong_under_a_right_checksum(saved: Path, changes: dict[str, Any], message: str) -> None:
    path = reseal_segment(saved, **changes)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        load(saved)


def test_a_token_that_the_core_refuses_is_named_with_the_folder(saved: Path) -> None:
    path = saved / names_in(saved)[2]
    tokens = load_file(path)["tokens"]
    tokens[-1] = -5
    reseal_segment(saved, tokens=tokens)
    with pytest.raises(ValueError, match=rf"{re.escape(str(saved))}: .*tokens\[\d+\]: .* got -5"):
        load(saved)


def test_a_number_that_its_type_does_not_hold_is_named_with_the_folder(saved: Path) -> None:
    reseal_manifest(saved, scalars=read_manifest(saved).scalars | {"seed": 2**64})
    with pytest.raises(ValueError, match=rf"{re.escape(str(saved))}: seed: wanted a number in the range of its type"):
        load(saved)


def test_a_file_that_is_no_safetensors_under_a_right_checksum(saved: Path) -> None:
    manifest = read_manifest(saved)
    path = saved / manifest.priorities.name
    path.write_bytes(b"abcd")
    crc32c_of_abcd = 0x92C80A31
    reseal_manifest(saved, priorities=SealedFile(path.name, 4, crc32c_of_abcd))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: wanted a whole safetensors file, got: "):
        load(saved)


def test_whatever_a_right_checksum_covers_is_read_or_refused(saved: Path) -> None:
    """What no accident makes: damaged bytes whose checksums were made right again."""
    rng = random.Random(0)
    manifest = read_manifest(saved)
    for sealed in (manifest.segments[0].file, manifest.priorities):
        path = saved / sealed.name
        whole = path.read_bytes()
        outcomes = set()
        for _ in range(300):
            damaged = bytearray(whole[: rng.choice([len(whole)] * 4 + [rng.randrange(len(whole))])])
            for _ in range(rng.randint(1, 4)):
                if damaged:
                    damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            path.write_bytes(damaged)
            resealed = sealed._replace(num_bytes=len(damaged), crc32c=google_crc32c.value(bytes(damaged)))
            first = manifest.segments[0]
            if sealed == manifest.priorities:
                reseal_manifest(saved, priorities=resealed)
            else:
                reseal_manifest(saved, segments=(first._replace(file=resealed), *manifest.segments[1:]))
            try:
                load(saved)
                outcomes.add("read")
            except ValueError as error:
                assert str(saved) in str(error)
                outcomes.add("refused")
            write_manifest(saved, manifest)
        assert outcomes == {"read", "refused"}
        path.write_bytes(whole)
    load(saved)


def test_a_manifest_that_is_wrong_under_a_right_checksum(saved: Path) -> None:
    manifest = read_manifest(saved)
    first, second, third = manifest.segments
    scalars = manifest.scalars
    for changes, message in (
        ({"segments": (first, third)}, f"first: wanted 4 after {first.file.name}, got 7"),
        ({"segments": (first._replace(end=0), second)}, "first: wanted 0 after"),
        ({"segments": (third._replace(first=9),)}, "end: wanted more than first"),
        ({"segments": (first._replace(first=-1),)}, "first: wanted an integer of 0 or more, got -1"),
        ({"segments": (first._replace(first="0"),)}, "first: wanted an integer of 0 or more, got '0'"),
        ({"segments": (first._replace(file=first.file._replace(name="../a")),)}, "name: wanted a segment, features or"),
        ({"segments": (second, third)}, "first_trajectory_id: wanted one of the first segment, 4 to 6, got 2"),
        ({"scalars": scalars | {"first_trajectory_id": 4}}, "first_trajectory_id: wanted one of the first segment"),
        ({"scalars": {k: v for k, v in scalars.items() if k != "seed"}}, "scalars: wanted "),
        ({"scalars": scalars | {"seed": 0.5}}, "scalars: wanted "),
        ({"scalars": scalars | {"seed": None}}, "seed: wanted a number, got None"),
        ({"scalars": [1]}, "content: AttributeError"),
        ({"commit": "3"}, "commit: wanted an integer of 0 or more, got '3'"),
    ):
        reseal_manifest(saved, **changes)
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            load(saved)
        assert str(saved / "manifest.json") in str(caught.value)
        write_manifest(saved, manifest)
    load(saved)


def test_manifests_of_another_kind(saved: Path) -> None:
    path = saved / "manifest.json"
    values = json.loads(path.read_text())
    for text, message in (
        (json.dumps(values | {"version": 4}), "version: wanted 3, got 4: a newer archer_fast wrote it"),
        (json.dumps(values | {"version": 1}), "version: wanted 3, got 1"),
        (json.dumps({"format": 2, "sha256": {}}), "version: wanted 3, got None"),
        (json.dumps(values | {"more": 1}), "wanted the fields"),
        (json.dumps(values, indent=1), "wanted not a blank but those that were written"),
        (path.read_text().replace('"commit": 3', '"commit": 4'), f"crc32c: wanted {values['crc32c']}, got "),
        ("[]", "version: wanted 3, got None"),
        ("", "wanted JSON, got b''"),
        ("[" * 100_000, "wanted JSON, got b'[[["),
        ("\xff", "wanted JSON, got b'"),
    ):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
            load(saved)
        with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
            filled(1).save(saved)  # it may be worth more than what is saved
        assert path.read_bytes() == text.encode("latin-1")


def test_no_folder_no_manifest_and_the_file_of_an_older_version(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/manifest\.json: wanted a saved trajectory buffer"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"manifest\.json: wanted a saved trajectory buffer"):
        load(tmp_path)
    old = tmp_path / "buffer.safetensors"
    old.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"buffer\.safetensors: .* got a file: an older archer_fast wrote it"):
        load(old)
    with pytest.raises(FileExistsError):
        filled(1).save(old)
    assert old.read_bytes() == b"x"
