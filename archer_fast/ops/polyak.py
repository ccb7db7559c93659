"""Target networks that follow slowly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def polyak_(targets: Sequence[Tensor], params: Sequence[Tensor], tau: float) -> None:
    """target <- (1 - tau) target + tau param, in place, all tensors in one call of torch._foreach_lerp_.

    tau 0 leaves the targets alone, 1 copies the params.

    Args:
        targets, params: as many tensors each, of the same shapes and dtypes, pair by pair.
        tau: in [0, 1].
    Errors: ValueError naming the argument, what was wanted and what came.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"tau: wanted a number in [0, 1], got {tau}")
    if len(targets) != len(params):
        raise ValueError(f"params: wanted one a target ({len(targets)}), got {len(params)}")
    for i, (target, param) in enumerate(zip(targets, params, strict=True)):
        if target.shape != param.shape:  # lerp would broadcast
            raise ValueError(f"params[{i}]: wanted {tuple(target.shape)} as its target, got {tuple(param.shape)}")
    if targets:
        torch._foreach_lerp_(list(targets), list(params), tau)
