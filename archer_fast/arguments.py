"""Numbers that a user hands over: an error names the argument, what was wanted and what came."""

from __future__ import annotations

import math
import operator
from typing import Any, SupportsFloat, SupportsIndex, TypeVar

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Number = TypeVar("Number", np.float32, np.float64)

MIN_INT32, MAX_INT32 = -(2**31), 2**31 - 1
MIN_INT64, MAX_INT64 = -(2**63), 2**63 - 1


def as_integer(name: str, value: SupportsIndex, low: int, high: int) -> int:
    """An integer from low to high. TypeError or ValueError names the argument: no float is cut, no bool counts.

    as_integer("n", np.int16(3), 0, 9) is 3; of 3.0 it says "n: wanted an integer from 0 to 9, got 3.0".
    """
    try:
        if isinstance(value, (bool, np.bool_)):  # an index to Python, and to nobody who counts
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: wanted {_integers(low, high)}, got {value!r:.80}") from None
    if not low <= number <= high:
        raise ValueError(f"{name}: wanted {_integers(low, high)}, got {number}")
    return number


def as_real(name: str, value: SupportsFloat, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number from low to high. TypeError or ValueError names the argument: no text is read as a number."""
    number = value if type(value) is float else _as_float(name, value)
    if not (low <= number <= high and math.isfinite(number)):
        wanted = "a finite number" if low == -math.inf and high == math.inf else f"a number from {low:g} to {high:g}"
        raise ValueError(f"{name}: wanted {wanted}, got {number}")
    return number


def as_flag(name: str, value: bool | np.bool_) -> bool:
    """True or False. TypeError names the argument: no text is true because it is not empty."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: wanted True or False, got {value!r:.80}")
    return bool(value)


def as_int64(name: str, values: npt.ArrayLike) -> Int64:
    """Integers [n], C-contiguous. TypeError or ValueError names the argument: no float is cut to an integer."""
    return np.ascontiguousarray(_as_integers(name, values, np.int64), np.int64)


def as_int32(name: str, values: npt.ArrayLike) -> Int32:
    """Integers [n] that fit into int32, C-contiguous; what is so already comes back as it is, without a copy.

    TypeError or ValueError names the argument.
    """
    if isinstance(values, np.ndarray) and values.dtype == np.int32 and values.ndim == 1:  # every turn that is played
        return np.ascontiguousarray(values)
    array = _as_integers(name, values, np.int32)
    if array.size and array.itemsize > 2 and not (array.min() >= MIN_INT32 and array.max() <= MAX_INT32):
        raise ValueError(f"{name}: wanted integers that fit into int32, got {array.min()} to {array.max()}")
    return np.ascontiguousarray(array, np.int32)


def as_numbers(name: str, numbers: npt.ArrayLike, dtype: type[Number]) -> npt.NDArray[Number]:
    """Real numbers [n], C-contiguous, rounded to `dtype`. TypeError or ValueError names the argument."""
    array = _as_array(name, numbers)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name}: wanted real numbers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name}: wanted 1 dimension, got shape {array.shape}")
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):  # what is too large becomes inf, for the core to refuse by name
        return np.ascontiguousarray(array, dtype)


def _as_integers(name: str, values: npt.ArrayLike, dtype: type[np.signedinteger[Any]]) -> npt.NDArray[Any]:
    """[n] of any integer dtype but uint64."""
    array = _as_array(name, values)
    if array.size == 0:
        array = array.astype(dtype)  # an empty list has no dtype of its own
    if array.dtype.kind not in "iu" or array.dtype == np.uint64:
        raise TypeError(f"{name}: wanted integers that fit into {dtype.__name__}, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name}: wanted 1 dimension, got shape {array.shape}")
    return array


def _as_float(name: str, value: SupportsFloat) -> float:
    array = _as_array(name, value)
    if array.dtype.kind not in "iuf" or array.ndim != 0:
        raise TypeError(f"{name}: wanted a real number, got {value!r:.80}")
    return float(array)


def _as_array(name: str, values: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor on another device, a ragged list
        raise TypeError(f"{name}: wanted numbers, got a {type(values).__name__}: {error}") from error


def _integers(low: int, high: int) -> str:
    return f"an integer from {_bound(low)} to {_bound(high)}"


def _bound(number: int) -> str:
    """2**63 - 1 is read at a glance, 9223372036854775807 is not."""
    for offset, text in ((0, ""), (1, " - 1")):
        size = abs(number + offset)
        if size >= 2**16 and size & (size - 1) == 0:
            return f"{'-' if number < 0 else ''}2**{size.bit_length() - 1}{text}"
    return str(number)
