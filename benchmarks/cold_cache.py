"""Caches in which nothing of what is measured lies any more."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def reader(num_bytes: int) -> Callable[[], object]:
    """Call it, and what was in the caches is there no longer."""
    other = np.ones(num_bytes // 8)
    return other.sum
