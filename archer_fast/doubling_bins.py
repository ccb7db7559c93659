"""Bins of whole numbers, each twice as wide as the one before: 0, 1, 2 to 3, 4 to 7, ..."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def bin_of(value: int) -> int:
    """0 -> 0, 1 -> 1, 2 and 3 -> 2, 4 to 7 -> 3."""
    return value.bit_length()


def first_of(index: int) -> int:
    """The smallest value of a bin: 0, 1, 2, 4, 8, ..."""
    return 1 << (index - 1) if index else 0


def bins_of(values: Tensor, num_bins: int) -> Tensor:
    """`bin_of` of each value [n] int64, 0 or more and below 2^24; the last bin holds whatever is larger."""
    exponents: Tensor = torch.frexp(values.float()).exponent  # no table of bounds, so nothing is copied to the device
    return exponents.long().clamp(max=num_bins - 1)


def shares(counts: Mapping[int, int]) -> dict[int, float]:
    """How often each value is there -> by each bin's smallest value, up to the largest there is, the bin's share.

    {0: 30, 5: 10} -> {0: 0.75, 1: 0.0, 2: 0.0, 4: 0.25}.
    """
    found = [0] * (1 + max((bin_of(value) for value in counts), default=-1))
    for value, count in counts.items():
        found[bin_of(value)] += count
    return {first_of(index): count / sum(found) for index, count in enumerate(found)}
