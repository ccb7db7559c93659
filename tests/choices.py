"""Decisions out of bytes, so that a fuzzer which changes the bytes changes the decisions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_INTEGERS = (0, 1, -1, 2, 3, 7, 255, 2**16, 2**30, 2**31 - 1, 2**31, 2**32, 2**53, 2**62 - 1, 2**62, 2**63 - 1, 2**63)
_MORE_INTEGERS = (2**64 - 1, 2**64, 10**30, -(2**31), -(2**63), -(2**63) - 1)
INTEGERS = _INTEGERS + _MORE_INTEGERS
FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-310, 1e30, 1e200, 1e201, 1.7e308, math.inf, -math.inf, math.nan)


class Choices:
    """Takes them from the front; where nothing is left, each is the first.

    choices = Choices(bytes([5, 0, 200])); choices.below(3), choices.below(3), choices.below(256) == (2, 0, 200)
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    @property
    def are_left(self) -> bool:
        return self._place < len(self._data)

    def bytes(self, num: int) -> bytes:
        taken = self._data[self._place : self._place + num]
        self._place += num
        return taken.ljust(num, b"\0")

    def below(self, end: int) -> int:
        """0 to end - 1, of as many bytes as it needs."""
        num = max(1, ((end - 1).bit_length() + 7) // 8)
        return int.from_bytes(self.bytes(num), "little") % end

    def once_in(self, n: int) -> bool:
        return self.below(n) == n - 1

    def of(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def integer(self) -> int:
        """One at which something ends, or any of 64 bits."""
        place = self.below(32)
        return INTEGERS[place] if place < len(INTEGERS) else int.from_bytes(self.bytes(8), "little", signed=True)
