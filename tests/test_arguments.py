"""What a user hands over as numbers: taken where it is exact, else refused by the argument's name."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from archer_fast.arguments import as_flag, as_int32, as_int64, as_integer, as_numbers, as_real


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
    assert as_int32("ids", torch.tensor([1, 2], dtype=torch.int32)).tolist() == [1, 2]
    assert (as_integer("n", torch.tensor(3), 0, 9), as_real("x", torch.tensor(0.5))) == (3, 0.5)
    with pytest.raises(TypeError, match=r"n: wanted an integer from 0 to 9, got tensor\(3\.9000\)"):
        as_integer("n", torch.tensor(3.9), 0, 9)


def test_integers_that_do_not_fit_into_int32() -> None:
    assert as_int32("tokens", [2**31 - 1, -(2**31)]).dtype == np.int32
    for values in ([0, 2**31], np.array([0, 2**31], np.uint32)):
        with pytest.raises(ValueError, match="tokens: wanted integers that fit into int32, got 0 to 2147483648"):
            as_int32("tokens", values)
    for values, error, message in (
        ([1.0], TypeError, "tokens: wanted integers that fit into int32, got float64"),
        (np.array([1], np.uint64), TypeError, "tokens: wanted integers that fit into int32, got uint64"),
        (np.array([[1]], np.int32), ValueError, r"tokens: wanted 1 dimension, got shape \(1, 1\)"),
        (np.array(1, np.int32), ValueError, r"tokens: wanted 1 dimension, got shape \(\)"),
    ):
        with pytest.raises(error, match=message):
            as_int32("tokens", values)


def test_int32_and_float32_are_not_copied_where_they_are_as_wanted() -> None:
    ids, numbers = np.array([3, 0, -4], np.int32), np.array([0.5, 0.0], np.float32)
    assert as_int32("ids", ids) is ids
    assert as_numbers("x", numbers, np.float32) is numbers
    for values in (ids[::2], ids[::2].astype(">i4"), ids[::2].astype(np.int8), [3, -4]):
        got = as_int32("ids", values)
        assert (got.dtype, got.tolist(), got.flags.c_contiguous) == (np.int32, [3, -4], True)
        assert got.dtype.isnative
    assert as_int32("ids", []).dtype == as_int32("ids", np.array([])).dtype == np.int32


def test_an_integer() -> None:
    for value in (3, np.int8(3), np.uint64(3), np.array(3)):
        got = as_integer("n", value, 3, 3)  # type: ignore[arg-type]
        assert (type(got), got) == (int, 3)


@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        (1.0, TypeError, "1.0"),
        (np.float32(3.9), TypeError, repr(np.float32(3.9))),
        (Decimal("3.9"), TypeError, "Decimal('3.9')"),
        ("3", TypeError, "'3'"),
        (None, TypeError, "None"),
        (True, TypeError, "True"),
        (np.bool_(True), TypeError, repr(np.bool_(True))),
        (np.array([3]), TypeError, "array([3])"),
        ("x" * 200, TypeError, "'" + "x" * 79),
        (-1, ValueError, "-1"),
        (10, ValueError, "10"),
        (2**64, ValueError, "18446744073709551616"),
    ],
)
def test_no_integer_or_one_out_of_bounds_is_refused_by_name(value: Any, error: type[Exception], got: str) -> None:
    with pytest.raises(error) as caught:
        as_integer("n", value, 0, 9)
    assert str(caught.value) == f"n: wanted an integer from 0 to 9, got {got}"


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (-(2**31), 2**31 - 1, "-2**31 to 2**31 - 1"),
        (-(2**63), 2**63 - 1, "-2**63 to 2**63 - 1"),
        (1, 2**64 - 1, "1 to 2**64 - 1"),
        (-7, 2**31, "-7 to 2**31"),
        (2, 100_000, "2 to 100000"),
    ],
)
def test_bounds_are_told_as_people_write_them(low: int, high: int, text: str) -> None:
    with pytest.raises(TypeError) as caught:
        as_integer("n", None, low, high)  # type: ignore[arg-type]
    assert str(caught.value) == f"n: wanted an integer from {text}, got None"


def test_a_real_number() -> None:
    for value in (0.5, np.float32(0.5), np.float64(0.5), np.array(0.5)):
        got = as_real("x", value, 0, 0.5)
        assert (type(got), got) == (float, 0.5)
    assert as_real("x", np.int64(-3)) == -3.0
    assert type(as_real("x", 1)) is float
    for value in (None, "1", b"1", True, Decimal("0.5"), 1j, [0.5], np.complex64(1)):
        with pytest.raises(TypeError) as caught:
            as_real("x", value)  # type: ignore[arg-type]
        assert str(caught.value) == f"x: wanted a real number, got {value!r}"
    for value in (np.nan, np.inf, -np.inf, np.float32(np.nan)):
        with pytest.raises(ValueError, match=f"x: wanted a finite number, got {value}"):
            as_real("x", value)
        with pytest.raises(ValueError, match=rf"x: wanted a number from 0 to 0\.5, got {value}"):
            as_real("x", value, 0, 0.5)
    for value in (-1e-300, 0.51):
        with pytest.raises(ValueError, match=rf"x: wanted a number from 0 to 0\.5, got {value}"):
            as_real("x", value, 0, 0.5)


def test_a_flag() -> None:
    assert as_flag("done", True) is True
    assert as_flag("done", np.bool_(False)) is False
    for value in ("False", 0, 1, None, np.array(True), 0.0):
        with pytest.raises(TypeError) as caught:
            as_flag("done", value)  # type: ignore[arg-type]
        assert str(caught.value) == f"done: wanted True or False, got {value!r}"


def test_real_numbers_are_rounded_and_too_large_ones_become_inf_for_the_core_to_name() -> None:
    assert as_numbers("x", [1, 0.1], np.float32).tolist() == [1.0, np.float32(0.1)]
    assert as_numbers("x", [1e300], np.float32).tolist() == [np.inf]
    with pytest.raises(TypeError, match="x: wanted real numbers, got complex128"):
        as_numbers("x", [1j], np.float64)
    with pytest.raises(ValueError, match=r"x: wanted 1 dimension, got shape \(\)"):
        as_numbers("x", 1.0, np.float64)
