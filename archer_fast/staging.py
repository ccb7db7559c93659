"""Memory that batches are written to, used again: the page faults of fresh memory cost more than the copy into it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Memory = Callable[[int], UInt8]  # number of bytes -> that many, which live as long as the last array over them


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
        self._free: deque[_Slot] = deque(maxlen=max_free)  # one too many pushes the oldest out

    def __call__(self, num_bytes: int) -> UInt8:
        return np.asarray(_Lease(self._take(num_bytes), self._free))[:num_bytes]

    def _take(self, num_bytes: int) -> _Slot:
        for _ in range(len(self._free)):
            try:
                slot = self._free.pop()  # the one that the caches know best
            except IndexError:  # another thread was faster
                break
            if slot.memory.size >= num_bytes:
                return slot  # those passed over were too small for what is asked for now, and go
        return _Slot(self._allocate(num_bytes + num_bytes // 4))  # batches differ in size by a little


class _Slot:
    def __init__(self, memory: UInt8) -> None:
        self.memory, self.interface = memory, memory.__array_interface__


class _Lease:
    """What arrays over a slot keep alive: NumPy takes it for the owner of their memory."""

    def __init__(self, slot: _Slot, free: deque[_Slot]) -> None:
        self.__array_interface__ = slot.interface
        self._slot, self._free = slot, free

    def __del__(self) -> None:
        self._free.append(self._slot)
