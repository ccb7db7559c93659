"""The trajectory buffer's file: one safetensors file, every field under a CRC."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

if TYPE_CHECKING:
    from archer_fast._C import BufferState  # a name of the stub alone

# The arrays are the file's tensors. Its metadata has one entry, so that equal buffers make equal bytes
# (safetensors shuffles entries): FORMAT -> JSON {"version": 1, "scalars": {name: int}, "crc32": {name: int}}.
FORMAT = "archer_fast.trajectory_buffer"
FORMAT_VERSION = 1
SCALAR_FIELDS = ("max_tokens", "max_trajectories", "seed", "counter", "first_trajectory_id", "first_turn_id")
ARRAY_FIELDS: dict[str, type[np.generic]] = {
    "tokens": np.int32,
    "rollout_logprobs": np.float32,
    "observation_lengths": np.int32,
    "action_lengths": np.int32,
    "rewards": np.float32,
    "policy_versions": np.int64,
    "num_tokens": np.int32,
    "num_turns": np.int32,
    "terminated": np.bool_,
    "truncated": np.bool_,
}


def write_state(path: Path, state: BufferState) -> None:
    """Write atomically: a failure leaves the file that was there before."""
    values = cast("dict[str, Any]", state)
    scalars = {name: values[name] for name in SCALAR_FIELDS}
    arrays = {name: values[name] for name in ARRAY_FIELDS}
    crc32 = {"scalars": _crc32_of_scalars(scalars)} | {name: _crc32(array) for name, array in arrays.items()}
    header = json.dumps({"version": FORMAT_VERSION, "scalars": scalars, "crc32": crc32})
    _write_atomically(path, save(arrays, {FORMAT: header}))


def read_state(path: Path) -> BufferState:
    """Read and verify. Raises FileNotFoundError, or ValueError that names the file and the field at fault."""
    metadata, arrays = _read_safetensors(path)
    header = _parse_header(path, metadata)
    crc32 = header["crc32"]
    _check_scalars(path, header["scalars"], crc32)
    _check_arrays(path, arrays, crc32)
    return cast("BufferState", header["scalars"] | arrays)


def _crc32_of_scalars(scalars: dict[str, int]) -> int:
    return zlib.crc32(json.dumps(scalars).encode())


def _crc32(array: npt.NDArray[Any]) -> int:
    return zlib.crc32(array.data.cast("B")) if array.size else 0


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else the rename itself may be lost
    finally:
        os.close(folder)


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, npt.NDArray[Any]]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: wanted a saved trajectory buffer, found no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: wanted a whole safetensors file, got: {error}") from error


def _parse_header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if set(metadata) != {FORMAT}:
        raise ValueError(f"{path}: metadata: wanted the one entry {FORMAT!r}, got {sorted(metadata)}")
    try:
        header = json.loads(metadata[FORMAT])
    except ValueError as error:
        raise ValueError(f"{path}: metadata: wanted JSON, got {metadata[FORMAT]!r}") from error
    version = header.get("version") if isinstance(header, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: version: wanted {FORMAT_VERSION}, got {version}")
    for name in ("scalars", "crc32"):
        if not isinstance(header.get(name), dict):
            raise ValueError(f"{path}: {name}: wanted a JSON object, got {header.get(name)!r}")
    return cast("dict[str, Any]", header)


def _check_scalars(path: Path, scalars: dict[str, int], crc32: dict[str, Any]) -> None:
    if set(scalars) != set(SCALAR_FIELDS) or not all(type(value) is int for value in scalars.values()):
        raise ValueError(f"{path}: scalars: wanted integers {SCALAR_FIELDS}, got {scalars}")
    _check_crc32(path, "scalars", _crc32_of_scalars(scalars), crc32)


def _check_arrays(path: Path, arrays: dict[str, npt.NDArray[Any]], crc32: dict[str, Any]) -> None:
    if set(arrays) != set(ARRAY_FIELDS):
        raise ValueError(f"{path}: wanted the fields {sorted(ARRAY_FIELDS)}, got {sorted(arrays)}")
    for name, dtype in ARRAY_FIELDS.items():
        array = arrays[name]
        if array.dtype != dtype or array.ndim != 1:
            raise ValueError(
                f"{path}: {name}: wanted a 1-d array of {dtype.__name__}, got {array.dtype} of shape {array.shape}"
            )
        _check_crc32(path, name, _crc32(array), crc32)


def _check_crc32(path: Path, name: str, got: int, crc32: dict[str, Any]) -> None:
    if crc32.get(name) != got:
        raise ValueError(f"{path}: {name}: wanted crc32 {crc32.get(name)}, got {got}: the file was damaged")
