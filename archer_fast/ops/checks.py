"""What every op on the vocabulary asks of its arguments: errors name the argument, what was wanted, what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and per-row numbers are kept in: float32, or float64 where the operands are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def check_operands(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, rows: Tensor | None, bias: Tensor | None, softcap: float | None
) -> int:
    """The number of scored rows; ValueError or TypeError unless the operands fit one another."""
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias), ("target_ids", target_ids), ("rows", rows)):
        check_plain(name, x)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden, weight: wanted [T, H] and [V, H], got {shape(hidden)} and {shape(weight)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight: wanted a vocabulary of at least one token, got {shape(weight)}")
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None and (x.dtype not in FLOATS or x.dtype != hidden.dtype):
            raise TypeError(f"{name}: wanted a float tensor of hidden's dtype, got {x.dtype} beside {hidden.dtype}")
    check_ids("rows", rows)
    check_ids("target_ids", target_ids)
    num_rows = hidden.shape[0] if rows is None else rows.shape[0]
    if target_ids.shape != (num_rows,):
        raise ValueError(f"target_ids: wanted one a scored row ({num_rows}), got {shape(target_ids)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: wanted [V] = ({weight.shape[0]},), got {shape(bias)}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap: wanted a finite number above 0 or None, got {softcap}")
    for name, x in (("weight", weight), ("target_ids", target_ids), ("rows", rows), ("bias", bias)):
        check_device(name, x, hidden)
    return num_rows


def check_plain(name: str, x: object) -> None:
    if x is not None and not isinstance(x, Tensor):
        raise TypeError(f"{name}: wanted a tensor, got {type(x).__name__}")
    if hasattr(x, "full_tensor"):
        raise TypeError(
            f"{name}: wanted a plain tensor, got a DTensor; gather it with full_tensor(), or score this rank's rows "
            "against the whole vocabulary"
        )


def check_ids(name: str, ids: Tensor | None) -> None:
    if ids is None:
        return
    if ids.dtype != torch.int64:
        raise TypeError(f"{name}: wanted int64, got {ids.dtype}")
    if ids.dim() != 1:
        raise ValueError(f"{name}: wanted one dimension, got {shape(ids)}")


def check_device(name: str, x: Tensor | None, like: Tensor) -> None:
    if x is not None and x.device != like.device:
        raise ValueError(f"{name}: wanted {like.device}, where hidden is, got {x.device}")


def check_per_row(name: str, x: Tensor | None, num_rows: int, hidden: Tensor) -> None:
    """One number a scored row, no gradient asked."""
    if x is None:
        return
    check_plain(name, x)
    if x.shape != (num_rows,):
        raise ValueError(f"{name}: wanted one a scored row ({num_rows}), got {shape(x)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: wanted a float tensor, got {x.dtype}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: no gradient is computed for it, got a tensor that requires one; detach it")
    check_device(name, x, hidden)


def inverse_temperature(temperature: float | Tensor, num_rows: int, hidden: Tensor) -> Tensor:
    """[N] 1 / temperature in float32 (float64 where hidden is); values of a tensor are checked by the op's body."""
    dtype = accumulation_dtype(hidden.dtype)
    if isinstance(temperature, Tensor):
        if temperature.dim() == 0:
            temperature = temperature.expand(num_rows)
        check_per_row("temperature", temperature, num_rows, hidden)
        return temperature.to(dtype).reciprocal()
    if not isinstance(temperature, (int, float)) or not 1e-30 < temperature < float("inf"):
        raise ValueError(f"temperature: wanted a finite number above 0, or one a scored row, got {temperature!r}")
    return hidden.new_full((num_rows,), 1 / temperature, dtype=dtype)


def check_values(target_ids: Tensor, vocab: int, rows: Tensor | None, num_hidden: int, inv_temperature: Tensor) -> None:
    """Called by an op's body: what only the values tell. On a GPU an assertion on the device, without a host sync."""
    _check_range("target_ids", target_ids, vocab)
    if rows is not None:
        _check_range("rows", rows, num_hidden)
    good = (inv_temperature > 0) & inv_temperature.isfinite()
    seen = ""
    if not good.is_cuda and not good.all():
        row = int((~good).nonzero()[0])
        seen = f", got {float(1 / inv_temperature[row]):g} in row {row}"
    _require(good.all(), f"temperature: wanted finite numbers above 0 in every row{seen}")


def _check_range(name: str, ids: Tensor, end: int) -> None:
    if ids.numel():
        low, high = ids.aminmax()
        seen = "" if ids.is_cuda else f", got {int(low)} .. {int(high)}"
        _require((low >= 0) & (high < end), f"{name}: wanted values in [0, {end}){seen}")


def _require(condition: Tensor, message: str) -> None:
    if condition.is_cuda:
        torch.ops.aten._assert_async.msg(condition, message)
    elif not condition:
        raise ValueError(message)
