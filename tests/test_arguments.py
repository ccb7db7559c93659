"""What a user hands over as numbers: taken where it is exact, else refused by the argument's name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from archer_fast.arguments import as_int32, as_int64, as_numbers


def test_integers_of_any_width_become_int64() -> None:
    for values in ([3, -4], (3, -4), np.array([3, -4], np.int8), np.array([3, 0, -4])[::2]):
        got = as_int64("ids", values)
        assert (got.dtype, got.tolist(), got.flags.c_contiguous) == (np.int64, [3, -4], True)
    assert as_int64("ids", []).dtype == np.int64


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([0.5], TypeError, "ids: wanted integers that fit into int64, got float64"),
        ([True], TypeError, "ids: wanted integers that fit into int64, got bool"),
        ([2**63], TypeError, "ids: wanted integers that fit into int64, got uint64"),
        (["a"], TypeError, "ids: wanted integers that fit into int64, got <U1"),
        (None, TypeError, "ids: wanted integers that fit into int64, got object"),
        (3, ValueError, r"ids: wanted 1 dimension, got shape \(\)"),
        ([[1]], ValueError, r"ids: wanted 1 dimension, got shape \(1, 1\)"),
        ([[1], [2, 3]], TypeError, "ids: wanted numbers, got a list: .*inhomogeneous"),
    ],
)
def test_other_values_are_refused_by_name(values: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_int64("ids", values)


def test_tensors() -> None:
    torch = pytest.importorskip("torch", reason="the Python without torch; runs in .venv")
    assert as_int64("ids", torch.tensor([1, 2])).tolist() == [1, 2]
    with pytest.raises(TypeError, match="ids: wanted numbers, got a Tensor: can't convert meta device type tensor"):
        as_int64("ids", torch.empty(2, dtype=torch.int64, device="meta"))
    with pytest.raises(TypeError, match="values: wanted numbers, got a Tensor: Can't call numpy"):
        as_numbers("values", torch.ones(2, requires_grad=True), np.float32)


def test_integers_that_do_not_fit_into_int32() -> None:
    assert as_int32("tokens", [2**31 - 1, -(2**31)]).dtype == np.int32
    with pytest.raises(ValueError, match="tokens: wanted integers that fit into int32, got 0 to 2147483648"):
        as_int32("tokens", [0, 2**31])


def test_real_numbers_are_rounded_and_too_large_ones_become_inf_for_the_core_to_name() -> None:
    assert as_numbers("x", [1, 0.1], np.float32).tolist() == [1.0, np.float32(0.1)]
    assert as_numbers("x", [1e300], np.float32).tolist() == [np.inf]
    with pytest.raises(TypeError, match="x: wanted real numbers, got complex128"):
        as_numbers("x", [1j], np.float64)
    with pytest.raises(ValueError, match=r"x: wanted 1 dimension, got shape \(\)"):
        as_numbers("x", 1.0, np.float64)
