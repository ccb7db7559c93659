"""Bare copies, of as many bytes as a batch has from a source as large as the store that the batch was read from."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch

LINE = 64  # bytes
NUM_PLACES = 256


class Copying:
    """Each copy begins at another, random place of the source and ends in the same memory."""

    def __init__(self, source_bytes: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        source = np.ones(max(source_bytes, num_bytes), np.uint8)
        lines = np.random.default_rng(0).integers(0, (source.size - num_bytes) // LINE + 1, NUM_PLACES)
        # Made here, so that a call does nothing but copy.
        views = [source[LINE * line : LINE * line + num_bytes] for line in lines.tolist()]
        self.views = itertools.cycle(views)
        self.tensors = itertools.cycle([torch.from_numpy(view) for view in views])
        self.to = np.zeros(num_bytes, np.uint8)
        self.to_tensor = torch.from_numpy(self.to)

    def a_little(self) -> None:
        """As good as nothing, by the same code."""
        np.copyto(self.to[:1], self.to[-1:])
        self.to_tensor[:1].copy_(self.to_tensor[-1:])

    def by_numpy(self) -> None:
        """One thread, memcpy."""
        np.copyto(self.to, next(self.views))

    def by_torch(self) -> None:
        """As many threads as torch has."""
        self.to_tensor.copy_(next(self.tensors))

    def ways(self) -> tuple[Callable[[], None], ...]:
        """The fastest of them is the floor."""
        return self.by_numpy, self.by_torch
