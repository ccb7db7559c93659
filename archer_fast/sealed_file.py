"""A file that is never changed: written whole or not at all, and read back under its size and checksum."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

Arrays = dict[str, npt.NDArray[np.generic]]


class SealedFile(NamedTuple):
    """What a file was when it was written: `SealedFile("priorities-000000003.safetensors", 240, 0x1F2E3D4C)`."""

    name: str
    num_bytes: int
    crc32c: int


def temporary_name(name: str) -> str:
    return f".{name}.tmp"


def write_bytes(path: Path, data: bytes) -> None:
    """Under a temporary name, synced, then renamed to `path`; `sync` of the folder makes the rename itself last.

    After an error or a kill the temporary file may be left; it is whoever owns the folder who sweeps it.
    """
    temporary = path.with_name(temporary_name(path.name))
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_arrays(path: Path, arrays: Arrays) -> SealedFile:
    """Write C-contiguous arrays as one safetensors file; see `write_bytes`."""
    data = save(arrays)
    write_bytes(path, data)
    return SealedFile(path.name, len(data), google_crc32c.value(data))


def read_arrays(folder: Path, file: SealedFile, dtypes: dict[str, type[np.generic]]) -> Arrays:
    """The 1-d arrays of exactly these names and dtypes.

    Raises FileNotFoundError, or ValueError that names the file and the field at fault.
    """
    path = folder / file.name
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing, though the manifest names it") from None
    if len(data) != file.num_bytes:
        raise ValueError(f"{path}: size: wanted {file.num_bytes} bytes, got {len(data)}: the file was damaged")
    if (got := google_crc32c.value(data)) != file.crc32c:
        raise ValueError(f"{path}: crc32c: wanted {file.crc32c:08x}, got {got:08x}: the file was damaged")
    try:
        arrays: Arrays = load(data)
    except (SafetensorError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: wanted a whole safetensors file, got: {error}") from error
    if set(arrays) != set(dtypes):
        raise ValueError(f"{path}: wanted the fields {sorted(dtypes)}, got {sorted(arrays)}")
    for name, dtype in dtypes.items():
        array = arrays[name]
        if array.dtype != dtype or array.ndim != 1:
            raise ValueError(
                f"{path}: {name}: wanted a 1-d array of {dtype.__name__}, got {array.dtype} of shape {array.shape}"
            )
    return arrays


def sync(path: Path) -> None:
    """A file's content, or a folder's names, to the disk: until then a power cut may undo the renames in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
