"""How much has passed through a backbone, in numbers of the host: what its FLOPs are counted from."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class Counts:
    """One packed pass over sequences of 3 and 2 tokens, 2 of them scored: Counts(tokens=5, pairs=6 + 3, rows=2)."""

    tokens: int = 0
    pairs: int = 0  # a query and a key that it sees
    rows: int = 0  # hidden states that met the vocabulary


@dataclass(slots=True)
class PassCounts:
    """Since a backbone was made."""

    read: Counts = field(default_factory=Counts)
    trained: Counts = field(default_factory=Counts)  # a backward pass follows

    def of(self, hidden: Tensor) -> Counts:
        """Where a pass belongs that made these hidden states."""
        return self.trained if hidden.requires_grad else self.read
