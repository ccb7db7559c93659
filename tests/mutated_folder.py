"""A saved buffer's folder as a hostile writer leaves it: changed anywhere, most often under right checksums."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from choices import FLOATS, Choices
from safetensors import SafetensorError
from safetensors.numpy import load, save
from saved_buffers import assert_same_state, filled, game, learn, push, read_again

from archer_fast.buffer import TrajectoryBuffer
from archer_fast.segment_manifest import MANIFEST, _encoded, read_manifest

Arrays = dict[str, np.ndarray]


class Original(NamedTuple):
    """A folder before anything was done to it."""

    content: dict[str, Any]  # of the manifest
    files: dict[str, bytes]  # those that the manifest names


def originals(folder: Path) -> list[Original]:
    """Some of each kind, written to `folder` and read again."""
    with_features = filled(4, max_trajectories=7, feature_bytes=5)
    for num in (3, 2):  # three segments, the first of them evicted in part
        with_features.save(folder / "features")
        push(with_features, num)
        learn(with_features)
    read_again(with_features)
    with_features.save(folder / "features")
    filled(6).save(folder / "plain")
    filled(0, feature_bytes=8).save(folder / "empty")
    return [_read(folder / name) for name in ("features", "plain", "empty")]


def write_mutated(original: Original, choices: Choices, folder: Path) -> bool:
    """Write the folder with all that was chosen done to it; whether checksums must show it."""
    content, files = copy.deepcopy(original.content), dict(original.files)
    manifest = _encoded(content)
    is_sealed = not choices.once_in(8)
    if is_sealed:
        for _ in range(1 + choices.below(4)):
            content = choices.of(_SEALED)(choices, content, files)
            if not choices.are_left:
                break
        manifest = _encoded(content)
    files[MANIFEST] = manifest
    before = dict(files)
    if not is_sealed:
        _damage(choices, files)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return files != before


def check(folder: Path, must_be_refused: bool) -> bool:
    """Whether the folder is read. If it is, the buffer is whole; if not, the error names a file that is at fault."""
    memory: dict[str, Any] = {"max_feature_memory": 32 << 20, "feature_folder": folder.parent}
    try:
        with _small_files():
            buffer = TrajectoryBuffer.load(folder, **memory)
    except (OSError, ValueError) as error:
        assert str(folder) in str(error) or f"feature_folder: '{folder.parent}'" in str(error), repr(error)
        return False
    assert not must_be_refused
    manifest = read_manifest(folder)
    first = manifest.scalars["first_trajectory_id"]
    assert buffer.trajectory_range == (first, manifest.segments[-1].end if manifest.segments else first)
    assert all(Path(name).name == name for name in manifest.names())
    if buffer.feature_bytes * (buffer.num_turns + len(buffer)) > memory["max_feature_memory"]:
        return True  # no damage but a large buffer: to compare all of it takes gigabytes
    again = folder.with_name("again")
    shutil.rmtree(again, ignore_errors=True)
    buffer.save(again)
    assert_same_state(TrajectoryBuffer.load(again, **memory), buffer)
    _use(buffer)
    buffer.save(again, previous=folder)
    assert_same_state(TrajectoryBuffer.load(again, **memory), buffer)
    return True


@contextlib.contextmanager
def _small_files() -> Iterator[None]:
    """Features of an absurd size find no room, rather than fill the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _use(buffer: TrajectoryBuffer) -> None:
    packed = buffer.collate(np.arange(*buffer.trajectory_range))
    assert packed.input_ids.size == buffer.num_tokens and packed.turn.size == buffer.num_turns
    if buffer.num_turns:
        assert buffer.trajectory_of(buffer.sample_turns(5)).min() >= buffer.trajectory_range[0]
    if buffer.max_tokens > 100 and buffer.vocab_size is None and buffer.feature_bytes < 1 << 16:
        buffer.push(game(1))


def _read(folder: Path) -> Original:
    content = json.loads((folder / MANIFEST).read_bytes())["content"]
    return Original(content, {entry["name"]: (folder / entry["name"]).read_bytes() for entry in _entries(content)})


def _entries(values: Any) -> Iterator[dict[str, Any]]:
    """Everything that names a file, however the manifest around it looks."""
    inside = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    if isinstance(values, dict) and isinstance(values.get("name"), str):
        yield values
    for value in inside:
        yield from _entries(value)


def _seal(content: Any, name: str, data: bytes) -> None:
    for entry in _entries(content):
        if entry["name"] == name:
            entry |= {"num_bytes": len(data), "crc32c": google_crc32c.value(data)}


# -- what is done under right checksums -------------------------------------------------------------


def _rewrite_bytes(choices: Choices, content: Any, files: dict[str, bytes]) -> Any:
    name = choices.of(sorted(files))
    data = bytearray(files[name])
    for _ in range(1 + choices.below(3)):
        place = choices.below(len(data) + 1)
        place = len(data) - place if choices.once_in(2) else place
        match choices.below(5):
            case 0:
                data[place : place + 1] = choices.bytes(1)
            case 1:
                data[place : place + 8] = (choices.integer() % 2**64).to_bytes(8, "little")
            case 2:
                del data[place:]
            case 3:
                del data[place : place + 1 + choices.below(16)]
            case _:
                data[place:place] = choices.bytes(1 + choices.below(16))
    files[name] = bytes(data)
    _seal(content, name, files[name])
    return content


def _change_arrays(choices: Choices, content: Any, files: dict[str, bytes]) -> Any:
    name = choices.of([n for n in sorted(files) if not n.startswith("features")])
    try:
        arrays: Arrays = {key: array.copy() for key, array in load(files[name]).items()}
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError):  # damaged before
        return content
    for _ in range(1 + choices.below(3)):
        if arrays:
            choices.of(_ARRAYS)(choices, arrays, choices.of(sorted(arrays)))
    files[name] = save(arrays)
    _seal(content, name, files[name])
    return content


def _set_item(choices: Choices, arrays: Arrays, key: str) -> None:
    array = arrays[key].reshape(-1)
    if array.size:
        place = choices.below(array.size)
        if array.dtype.kind in "iu":
            size = 8 * array.dtype.itemsize
            array[place] = np.array(choices.integer() % 2**size).astype(f"u{array.dtype.itemsize}").astype(array.dtype)
        elif array.dtype.kind == "f":
            with np.errstate(over="ignore"):
                array[place] = choices.of(FLOATS)
        else:
            array[place] = not array[place]


def _shift_one(choices: Choices, arrays: Arrays, key: str) -> None:
    """From one item to the one behind it: all sums stay."""
    array = arrays[key]
    if array.ndim == 1 and array.size > 1 and array.dtype.kind == "i":
        place = choices.below(array.size - 1)
        with np.errstate(over="ignore"):
            array[place] += 1
            array[place + 1] -= 1


def _resize(choices: Choices, arrays: Arrays, key: str) -> None:
    arrays[key] = np.resize(arrays[key], choices.of((0, 1, max(arrays[key].size - 1, 0), arrays[key].size + 1)))


def _drop_last_trajectory(choices: Choices, arrays: Arrays, key: str) -> None:
    """Everything fits, but for the number in the manifest."""
    if {"num_turns", "num_tokens"} <= set(arrays) and arrays["num_turns"].size and arrays["num_tokens"].size:
        for field in ("num_tokens", "num_turns", "terminated", "truncated", "task_ids"):
            if field in arrays:
                arrays[field] = arrays[field].reshape(-1)[:-1]


def _change_dtype(choices: Choices, arrays: Arrays, key: str) -> None:
    with np.errstate(all="ignore"):
        arrays[key] = arrays[key].astype(choices.of((np.int64, np.int32, np.uint8, np.float32, np.float64, np.bool_)))


def _reshape(choices: Choices, arrays: Arrays, key: str) -> None:
    arrays[key] = arrays[key].reshape((1, *arrays[key].shape) if choices.below(2) else (*arrays[key].shape, 1))


def _rename(choices: Choices, arrays: Arrays, key: str) -> None:
    arrays[choices.of((*sorted(arrays), "", "extra"))] = arrays.pop(key)


_ARRAYS: tuple[Callable[[Choices, Arrays, str], None], ...] = (
    _set_item,
    _set_item,
    _shift_one,
    _resize,
    _drop_last_trajectory,
    _change_dtype,
    _reshape,
    _rename,
)


def _change_manifest(choices: Choices, content: Any, files: dict[str, bytes]) -> Any:
    """One value of it, at any depth, becomes another one, goes, or is doubled."""
    value: Any = content
    path: list[tuple[Any, Any]] = []
    while isinstance(value, (dict, list)) and value and (not path or not choices.once_in(8)):
        key = choices.of(sorted(value)) if isinstance(value, dict) else choices.below(len(value))
        path.append((value, key))
        value = value[key]
    if not path:
        return _other_value(choices, content, files)
    parent, key = path[-1]
    choice = choices.below(8)
    if choice == 6 and isinstance(parent, dict):
        del parent[key]
    elif choice == 6:
        parent.insert(key, copy.deepcopy(parent[key]))
    elif choice == 7 and isinstance(parent, dict):
        parent["more"] = parent[key]
    elif choice == 7:
        parent.pop(key)
    else:
        parent[key] = _other_value(choices, value, files)
    return content


def _other_value(choices: Choices, value: Any, files: dict[str, bytes]) -> Any:
    if type(value) is int and choices.below(2):
        return value + choices.below(9) - 4
    if isinstance(value, str) and choices.below(2):
        odd = ("../manifest.json", "manifest.json", ".lock", "", "priorities-.safetensors", "segment-" + "1" * 300)
        return choices.of((*sorted(files), *odd, "segment-" + "1" * 300 + ".safetensors", "segment-1.safetensors\n"))
    kind = choices.below(4)
    if kind < 2:
        return choices.integer()
    return choices.of(FLOATS) if kind == 2 else choices.of((None, True, "", "1", "\ud800", [], {}, [1], {"first": 1}))


def _shift_ids(choices: Choices, content: Any, files: dict[str, bytes]) -> Any:
    """Every trajectory, or every turn, has another number."""
    by = choices.integer()
    try:
        scalars, segments = content["scalars"], content["segments"]
        if choices.once_in(4):
            scalars["first_turn_id"] += by
            return content
        scalars["first_trajectory_id"] += by
        for entry in (*segments, *(s["features"] for s in segments if s["features"])):
            for key in ("first", "end"):
                if key in entry:
                    entry[key] += by
    except (KeyError, TypeError):  # changed before
        pass
    return content


def _swap_files(choices: Choices, content: Any, files: dict[str, bytes]) -> Any:
    """What names one file names another one."""
    entries = list(_entries(content))
    if len(entries) > 1:
        one, other = choices.of(entries), choices.of(entries)
        for key in ("name", "num_bytes", "crc32c"):
            if key in one and key in other:
                one[key], other[key] = other[key], one[key]
    return content


_SEALED: tuple[Callable[[Choices, Any, dict[str, bytes]], Any], ...] = (
    _rewrite_bytes,
    _change_arrays,
    _change_manifest,
    _shift_ids,
    _swap_files,
)


# -- what checksums show ----------------------------------------------------------------------------


def _damage(choices: Choices, files: dict[str, bytes]) -> None:
    name = choices.of(sorted(files))
    data = bytearray(files[name])
    match choices.below(5):
        case 0:
            data[choices.below(len(data))] ^= 1 << choices.below(8)
        case 1:
            del data[choices.below(len(data)) :]
        case 2:
            data += choices.bytes(1 + choices.below(8))
        case 3:
            del files[name]
            return
        case _:
            other = choices.of(sorted(files))
            files[name], files[other] = files[other], files[name]
            return
    files[name] = bytes(data)
