"""The original's metrics: statistics of each micro-batch, averaged over micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def statistics(name: str, rows: Tensor) -> dict[str, Tensor]:
    """`name`.mean, .min, .max, .std (unbiased; nan of one value) of each row of [m, n], averaged over the m rows."""
    std = rows.std(1) if rows.shape[1] > 1 else torch.full_like(rows[:, 0], torch.nan)
    found = {"mean": rows.mean(1), "min": rows.amin(1), "max": rows.amax(1), "std": std}
    return {f"{name}.{key}": value.mean() for key, value in found.items()}


def mean_of(rows: Sequence[Mapping[str, Any]], weights: Sequence[float] | None = None) -> dict[str, Any]:
    """Key by key the weighted mean over the rows, equal weights where none are given; {} of no rows."""
    if not rows:
        return {}
    weights = [1.0] * len(rows) if weights is None else weights
    total = sum(weights)
    return {key: sum(w * row[key] for w, row in zip(weights, rows, strict=True)) / total for key in rows[0]}
