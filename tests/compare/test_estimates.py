"""Means over seeds: Student's t beside printed tables, intervals by hand."""

from __future__ import annotations

import math
import statistics

import pytest

from archer_fast.compare.estimates import estimate, two_sided_t


@pytest.mark.parametrize(
    ("confidence", "degrees", "printed"),
    [  # Pearson and Hartley, Biometrika Tables for Statisticians, table 12
        *((0.95, n, t) for n, t in [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (6, 2.447)]),
        *((0.95, n, t) for n, t in [(9, 2.262), (10, 2.228), (29, 2.045), (30, 2.042), (60, 2.000), (120, 1.980)]),
        *((0.99, n, t) for n, t in [(1, 63.657), (2, 9.925), (3, 5.841), (10, 3.169), (30, 2.750)]),
        *((0.90, n, t) for n, t in [(1, 6.314), (2, 2.920), (7, 1.895), (20, 1.725)]),
    ],
)
def test_t_is_that_of_the_printed_table(confidence: float, degrees: int, printed: float) -> None:
    assert two_sided_t(confidence, degrees) == pytest.approx(printed, abs=6e-4)


def test_t_in_closed_form_and_in_the_limit() -> None:
    for p in (0.5, 0.8, 0.95, 0.999):
        assert two_sided_t(p, 1) == pytest.approx(math.tan(math.pi * p / 2), rel=1e-9)  # Cauchy
        assert two_sided_t(p, 2) == pytest.approx(p * math.sqrt(2 / (1 - p * p)), rel=1e-9)
        assert two_sided_t(p, 5_000) == pytest.approx(statistics.NormalDist().inv_cdf((1 + p) / 2), rel=2e-3)


@pytest.mark.parametrize(("confidence", "degrees"), [(0.0, 3), (1.0, 3), (math.nan, 3), (0.95, 0)])
def test_t_refuses_what_has_none(confidence: float, degrees: int) -> None:
    with pytest.raises(ValueError, match="wanted"):
        two_sided_t(confidence, degrees)


def test_an_interval_by_hand() -> None:
    one = estimate([1.0, 2.0, 3.0])
    assert one is not None and (one.mean, one.n) == (2.0, 3)
    assert one.se == pytest.approx(1 / math.sqrt(3))  # s = 1
    assert (one.low, one.high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-5)


def test_one_value_has_no_error_and_no_value_no_mean() -> None:
    one = estimate([5.0, math.nan])
    assert one is not None and (one.mean, one.n) == (5.0, 1)
    assert all(map(math.isnan, (one.se, one.low, one.high)))
    assert estimate([]) is estimate([math.inf, math.nan]) is None


def test_ninety_five_intervals_of_a_hundred_hold_the_mean() -> None:
    import numpy as np

    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(4000, 3))
    held = [e.low <= 3.0 <= e.high for row in draws if (e := estimate(row.tolist()))]
    assert np.mean(held) == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 4000))
