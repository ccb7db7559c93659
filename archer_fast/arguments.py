"""Numbers that a user hands over, as arrays: an error names the argument."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Number = TypeVar("Number", np.float32, np.float64)


def as_int64(name: str, values: npt.ArrayLike) -> Int64:
    """Integers [n], C-contiguous. TypeError or ValueError names the argument: no float is cut to an integer."""
    array = _as_array(name, values)
    if array.size == 0:
        array = array.astype(np.int64)  # an empty list has no dtype of its own
    if not (array.dtype.kind in "iu" and np.can_cast(array.dtype, np.int64)):
        raise TypeError(f"{name}: wanted integers that fit into int64, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name}: wanted 1 dimension, got shape {array.shape}")
    return np.ascontiguousarray(array, np.int64)


def as_int32(name: str, values: npt.ArrayLike) -> Int32:
    """Integers [n] that fit into int32, C-contiguous. TypeError or ValueError names the argument."""
    array = as_int64(name, values)
    if array.size and not (array.min() >= -(2**31) and array.max() < 2**31):
        raise ValueError(f"{name}: wanted integers that fit into int32, got {array.min()} to {array.max()}")
    return array.astype(np.int32)


def as_numbers(name: str, numbers: npt.ArrayLike, dtype: type[Number]) -> npt.NDArray[Number]:
    """Real numbers [n], C-contiguous, rounded to `dtype`. TypeError or ValueError names the argument."""
    array = _as_array(name, numbers)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name}: wanted real numbers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name}: wanted 1 dimension, got shape {array.shape}")
    with np.errstate(over="ignore"):  # what is too large becomes inf, for the core to refuse by name
        return np.ascontiguousarray(array, dtype)


def _as_array(name: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor on another device, a ragged list
        raise TypeError(f"{name}: wanted numbers, got a {type(values).__name__}: {error}") from error
