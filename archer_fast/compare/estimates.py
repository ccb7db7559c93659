"""A mean over seeds, with its standard error and its Student-t interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

CONFIDENCE = 0.95


@dataclass(slots=True, frozen=True)
class Estimate:
    """`Estimate(mean=2.0, se=0.58, low=-0.48, high=4.48, n=3)` of 1, 2, 3; one value alone has no error: NaN."""

    mean: float
    se: float
    low: float
    high: float
    n: int


def estimate(values: Iterable[float], confidence: float = CONFIDENCE) -> Estimate | None:
    """mean ± t se, se = s / sqrt(n), t of n - 1 degrees of freedom; what is not finite is left out; None of nothing."""
    finite = [float(v) for v in values if math.isfinite(v)]
    n = len(finite)
    if not n:
        return None
    mean = math.fsum(finite) / n
    if n == 1:
        return Estimate(mean, math.nan, math.nan, math.nan, 1)
    se = math.sqrt(math.fsum((v - mean) ** 2 for v in finite) / (n - 1) / n)
    half = two_sided_t(confidence, n - 1) * se
    return Estimate(mean, se, mean - half, mean + half, n)


@cache
def two_sided_t(confidence: float, degrees: int) -> float:
    """The t with P(|T| < t) = `confidence`, T of `degrees` degrees of freedom: 12.71 of 1, 4.30 of 2, 1.96 of many.

    By the finite sums for whole degrees in theta = atan(t / sqrt(degrees)) (Abramowitz and Stegun 26.7.3 and 26.7.4),
    halved until theta is exact: fifteen lines where SciPy would be a dependency four times the size of NumPy.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: wanted a number between 0 and 1, got {confidence}")
    if degrees < 1:
        raise ValueError(f"degrees: wanted at least 1, got {degrees}")
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        theta = (low + high) / 2
        if _inside(theta, degrees) < confidence:
            low = theta
        else:
            high = theta
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _inside(theta: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan(theta))."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
