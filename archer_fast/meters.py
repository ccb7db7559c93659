"""Running means and counters of an iteration, kept on the device until one read at its end."""

from __future__ import annotations

import torch
from torch import Tensor


class Meters:
    """`add` averages tensors over an iteration without a host sync; `count` sums; `read` returns and clears."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._adds: dict[str, int] = {}
        self._counts: dict[str, float] = {}

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._adds[name] = self._adds.get(name, 0) + 1

    def count(self, **values: float) -> None:
        for name, value in values.items():
            self._counts[name] = self._counts.get(name, 0) + value

    def counted(self, name: str) -> float:
        """What `count` has summed up under that name since the last read."""
        return self._counts.get(name, 0.0)

    def read(self) -> dict[str, float]:
        """Every mean and count since the last read; the iteration's one device synchronisation."""
        out: dict[str, float] = dict(self._counts)
        if self._sums:
            means = torch.stack([self._sums[n].float() / self._adds[n] for n in self._sums]).tolist()
            out.update(zip(self._sums, means, strict=True))
        self._sums, self._adds, self._counts = {}, {}, {}
        return out
