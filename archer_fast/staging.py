"""Memory that batches are written to, used again: the page faults of fresh memory cost more than the copy into it."""

from __future__ import annotations

import functools
import typing
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Arrays = TypeVar("Arrays", bound=NamedTuple)
Memory = Callable[[int], UInt8]  # number of bytes -> that many, which live as long as the last array over them

ALIGNMENT = 64  # bytes: a cache line


def fresh(num_bytes: int) -> UInt8:
    """Memory that nobody had before."""
    return np.empty(num_bytes, np.uint8)


class StagingSlots:
    """A small stock of memory. A slot comes back when the last array over it dies, a tensor made of it included.

    With two batches alive at a time, the third is written where the first was:

        slots = StagingSlots()
        first = buffer.collate(ids, memory=slots)
        second = buffer.collate(ids, memory=slots)
        del first                                       # its slot is free
        third = buffer.collate(ids, memory=slots)       # takes no memory from the system

    Any thread may ask, and any may let go.
    """

    def __init__(self, allocate: Memory = fresh, max_free: int = 4) -> None:
        """allocate: where slots come from; page-locked memory, say. max_free: how many unused ones are kept."""
        if max_free < 1:
            raise ValueError(f"max_free: wanted 1 or more, got {max_free}")
        self._allocate = allocate
        self._free: deque[UInt8] = deque(maxlen=max_free)  # one too many pushes the oldest out

    def __call__(self, num_bytes: int) -> UInt8:
        return np.asarray(_Lease(self._take(num_bytes), self._free))[:num_bytes]

    def _take(self, num_bytes: int) -> UInt8:
        for _ in range(len(self._free)):
            try:
                slot = self._free.popleft()
            except IndexError:  # another thread was faster
                break
            if slot.size >= num_bytes:
                return slot  # those passed over were too small for what is asked for now, and go
        return self._allocate(num_bytes + num_bytes // 4)  # batches differ in size by a little


class _Lease:
    """What arrays over a slot keep alive: NumPy takes it for the owner of their memory."""

    def __init__(self, slot: UInt8, free: deque[UInt8]) -> None:
        self.__array_interface__ = slot.__array_interface__
        self._slot, self._free = slot, free

    def __del__(self) -> None:
        self._free.append(self._slot)


def carve(kind: type[Arrays], sizes: dict[str, int], memory: Memory) -> Arrays:
    """Uninitialised arrays of these lengths for a NamedTuple's fields, side by side in one piece of memory."""
    offsets, end = [], 0
    dtypes = dtypes_of(kind)
    for name, dtype in dtypes.items():
        offsets.append(end)
        end += -(-sizes[name] * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    whole = memory(end)
    places = zip(dtypes.items(), offsets, strict=True)
    return kind._make(np.ndarray(sizes[name], dtype, whole, offset) for (name, dtype), offset in places)


@functools.cache
def dtypes_of(kind: type[NamedTuple]) -> dict[str, np.dtype[np.generic]]:
    """The dtype of each field, out of its annotation."""
    hints = typing.get_type_hints(kind)
    return {name: np.dtype(typing.get_args(typing.get_args(hints[name])[1])[0]) for name in kind._fields}
