"""A file that is never changed: written whole or not at all, and read back under its size and checksum."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

Arrays = dict[str, npt.NDArray[np.generic]]
UInt8 = npt.NDArray[np.uint8]


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
    write_pieces(path, [np.frombuffer(data, np.uint8)])


def write_pieces(path: Path, pieces: Iterable[UInt8]) -> SealedFile:
    """`write_bytes` of what is never held whole: each piece is written before the next is asked for."""
    temporary = path.with_name(temporary_name(path.name))
    num_bytes = crc32c = 0
    with temporary.open("wb") as file:
        for piece in pieces:
            file.write(piece.data)
            num_bytes, crc32c = num_bytes + piece.size, google_crc32c.extend(crc32c, piece)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return SealedFile(path.name, num_bytes, crc32c)


def write_arrays(path: Path, arrays: Arrays) -> SealedFile:
    """Write C-contiguous arrays as one safetensors file; see `write_bytes`."""
    return write_pieces(path, [np.frombuffer(save(arrays), np.uint8)])


def read_arrays(folder: Path, file: SealedFile, dtypes: dict[str, type[np.generic]]) -> Arrays:
    """The 1-d arrays of exactly these names and dtypes.

    Raises FileNotFoundError, or ValueError that names the file and the field at fault.
    """
    path = folder / file.name
    with open_sealed(folder, file) as reader:
        data = reader.read(file.num_bytes)
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


class SealedReader:
    """A sealed file, read front to back in pieces."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file, self.crc32c = path, file, 0

    def read(self, num_bytes: int) -> bytes:
        """The next bytes; ValueError where there are fewer."""
        data = self._file.read(num_bytes)
        if len(data) != num_bytes:
            raise ValueError(f"{self.path}: size: wanted {num_bytes} more bytes, got {len(data)}")
        self.crc32c = google_crc32c.extend(self.crc32c, data)
        return data

    def last(self, num_bytes: int) -> bytes:
        """The bytes at the end, out of turn: `read` comes to them again, and verifies them then."""
        here = self._file.tell()
        self._file.seek(-num_bytes, os.SEEK_END)
        data = self._file.read(num_bytes)
        self._file.seek(here)
        return data


@contextlib.contextmanager
def open_sealed(folder: Path, file: SealedFile) -> Iterator[SealedReader]:
    """Read a file piece by piece. Whoever enters reads all of it: on leaving, the checksum is compared.

    Raises FileNotFoundError, or ValueError that names the file and what is wrong with it.
    """
    path = folder / file.name
    try:
        opened = path.open("rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing, though the manifest names it") from None
    with opened:
        if (num_bytes := os.fstat(opened.fileno()).st_size) != file.num_bytes:
            raise ValueError(f"{path}: size: wanted {file.num_bytes} bytes, got {num_bytes}: the file was damaged")
        reader = SealedReader(path, opened)
        yield reader
        if reader.crc32c != file.crc32c:
            raise ValueError(f"{path}: crc32c: wanted {file.crc32c:08x}, got {reader.crc32c:08x}: the file was damaged")


def sync(path: Path) -> None:
    """A file's content, or a folder's names, to the disk: until then a power cut may undo the renames in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
