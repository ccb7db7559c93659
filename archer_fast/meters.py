"""Running means and counters of an iteration, kept on the device until one read at its end."""

from __future__ import annotations

import torch
from torch import Tensor

from archer_fast.ranks import ALONE, Ranks


class Meters:
    """`add` averages tensors over an iteration without a host sync; `divide` sums two and divides; `count` sums;
    `read` returns and clears.

    Over ranks counts are summed, and means averaged by the weights that `add` was given on each.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self._sums: dict[str, Tensor] = {}
        self._adds: dict[str, float] = {}
        self._ratios: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}

    def add(self, weight: float = 1.0, **values: Tensor) -> None:
        """weight: of this rank's share in a step that several took."""
        for name, value in values.items():
            value = value if weight == 1.0 else weight * value
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._adds[name] = self._adds.get(name, 0.0) + weight

    def divide(self, **values: Tensor) -> None:
        """Each [2]: what is summed up, and by which sum it is divided; where that is 0 nothing is read."""
        for name, value in values.items():
            self._ratios[name] = self._ratios[name] + value if name in self._ratios else value

    def count(self, **values: float) -> None:
        for name, value in values.items():
            self._counts[name] = self._counts.get(name, 0) + value

    def count_once(self, **values: float) -> None:
        """`count` of what all ranks do together: it is one rank's alone."""
        if self.ranks.leads:
            self.count(**values)

    def counted(self, name: str) -> float:
        """What `count` has summed up under that name since the last read, on this rank."""
        return self._counts.get(name, 0.0)

    def read(self) -> dict[str, float]:
        """Every mean and count since the last read; the iteration's one device synchronisation."""
        means: dict[str, float] = {}
        if self._sums or self._ratios:
            tensors = [self._sums[n].float() / self._adds[n] for n in self._sums]
            tensors += [part for ratio in self._ratios.values() for part in ratio.float()]
            values, first = torch.stack(tensors).tolist(), len(self._sums)
            means.update(zip(self._sums, values, strict=False))
            for name, above, below in zip(self._ratios, values[first::2], values[first + 1 :: 2], strict=True):
                if below:
                    means[name], self._adds[name] = above / below, below
        mine = (self._counts, means, self._adds)
        self._sums, self._adds, self._ratios, self._counts = {}, {}, {}, {}
        if self.ranks.size == 1:
            return mine[0] | means
        out: dict[str, float] = {}
        total: dict[str, float] = {}
        every = self.ranks.gather(mine)
        for counts, _, weights in every:
            for into, found in ((out, counts), (total, weights)):
                into |= {name: into.get(name, 0) + value for name, value in found.items()}
        for name in total:
            out[name] = sum(found[name] * weights[name] for _, found, weights in every if name in found) / total[name]
        return out
