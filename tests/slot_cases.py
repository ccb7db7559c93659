"""A cache of keys and values with games of unlike length in it, and the tokens that look at them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SlotCase(NamedTuple):
    query: Tensor
    keys: Tensor
    values: Tensor
    slot_ids: Tensor
    position_ids: Tensor
    scale: float

    def to(self, device: str, dtype: torch.dtype) -> SlotCase:
        moved = (x.to(device, dtype if x.is_floating_point() else None) for x in self[:5])
        return SlotCase(*moved, self.scale)


def slot_case(heads: int, kv_heads: int, size: int, capacity: int = 150, seed: int = 0) -> SlotCase:
    """Two tokens of one slot, first and last positions, a slot that nobody asks about; garbage behind the tokens."""
    generator = torch.Generator().manual_seed(seed)
    slot_ids = torch.tensor([2, 0, 2, 3, 4])
    position_ids = torch.tensor([0, capacity - 1, 63, 64, 70 % capacity])
    keys, values = (torch.randn(5, kv_heads, capacity, size, generator=generator) for _ in range(2))
    keys[3, :, 65:], values[3, :, 65:] = torch.nan, torch.nan
    query = torch.randn(5, heads, size, generator=generator)
    return SlotCase(query, keys, values, slot_ids, position_ids, size**-0.5)


def truth(case: SlotCase) -> Tensor:
    """float64, a token and a head at a time."""
    query, keys, values = (x.double().cpu() for x in case[:3])
    out = torch.empty_like(query)
    group = query.shape[1] // keys.shape[1]
    for t, (slot, position) in enumerate(zip(case.slot_ids.tolist(), case.position_ids.tolist(), strict=True)):
        for h in range(query.shape[1]):
            seen = slice(0, position + 1)
            weights = (keys[slot, h // group, seen] @ query[t, h] * case.scale).softmax(0)
            out[t, h] = weights @ values[slot, h // group, seen]
    return out


HEADS = [(4, 2, 16), (7, 1, 32), (3, 3, 6), (32, 8, 20)]
