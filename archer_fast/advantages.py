"""Advantages of whole actions, as pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def centre_by_state(values: Tensor, state_ids: Tensor, num_states: int) -> Tensor:
    """A_k = Q(s, a_k) - mean_j Q(s, a_j) over the actions j at the same state.

    values [n] float32, state_ids [n] int64 in [0, num_states) -> [n]. A state with one action gets 0:
    with nothing to compare there is nothing to learn. The mean is the Monte-Carlo estimate of
    V(s) = E_{a ~ pi} Q(s, a), so no lag or bias between Q and V heads can tilt it.
    """
    total = values.new_zeros(num_states).index_add(0, state_ids, values)
    count = values.new_zeros(num_states).index_add(0, state_ids, torch.ones_like(values))
    return values - (total / count.clamp(min=1))[state_ids]


def normalise(advantages: Tensor) -> Tensor:
    """Divide by the root mean square (the sign and the zero stay: centring is not this function's business)."""
    return advantages / advantages.square().mean().sqrt().clamp(min=1e-6)
