"""The linear recurrence backwards in time over the segments of a flat array: returns, GAE and sums by turn are it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archer_fast.ops.checks import FLOATS
from archer_fast.ops.choice import Impl, choose_impl, load_kernels, record

_NAME = "segment_scan"


def segment_scan(a: Tensor, b: Tensor, cu: Tensor, *, impl: Impl | None = None) -> Tensor:
    """y_t = b_t + a_t y_{t+1} inside each segment [cu[k], cu[k+1]); beyond a segment's end y is 0.

    With cu = [0, 3, 4], a = 0.5 throughout and b = [1, 2, 4, 8]: y = [3, 4, 4, 8]. Forward in time it is the same op
    on flipped arrays: `segment_scan(a.flip(0), b.flip(0), (T - cu).flip(0)).flip(0)`.

    Differentiable in a and b, as often as you like, in reverse mode (torch.func's forward mode would see zeros). With
    z_t = gy_t + a_{t-1} z_{t-1} (forward in time): db_t = z_t and da_t = z_t y_{t+1}.

    Args:
        a, b: [T] float32, bfloat16 or float16 (computed in float32), or float64 (the reference). What stands in a at a
            segment's last position is not read: it may be NaN.
        cu: [B+1] int32 or int64 offsets from 0 to T, nondecreasing; segments may be empty. T < 2**31.
        impl: "reference" (plain torch), "cpu" (C++), "triton"; None chooses by device.
    Returns: [T] float32, or float64 where a or b is.
    Errors: ValueError or TypeError naming the argument, what was wanted and what came. Offsets on a GPU are checked
        by an assertion on the device.
    """
    if b.dim() != 1 or a.shape != b.shape:
        raise ValueError(f"a, b: wanted [T] both, got {tuple(a.shape)} and {tuple(b.shape)}")
    for name, x in (("a", a), ("b", b)):
        if x.dtype not in FLOATS:
            raise TypeError(f"{name}: wanted a float tensor, got {x.dtype}")
    if cu.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu: wanted int32 or int64, got {cu.dtype}")
    if cu.dim() != 1 or cu.shape[0] == 0:
        raise ValueError(f"cu: wanted [B+1], got {tuple(cu.shape)}")
    for name, x in (("a", a), ("cu", cu)):
        if x.device != b.device:
            raise ValueError(f"{name}: wanted {b.device}, where b is, got {x.device}")
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    a, b = a.to(dtype), b.to(dtype)
    return _scan(a, b, cu, choose_impl(impl, b))


def _scan(a: Tensor, b: Tensor, cu: Tensor, impl: str) -> Tensor:
    y: Tensor
    if impl == "triton" and b.is_cuda:
        from archer_fast.ops import triton_ops  # registering a triton_op imports Triton

        y = triton_ops.segment_scan(a, b, checked_offsets(cu, b.shape[0]))
    else:
        y = _op(a, b, cu, impl)  # looks at the offsets itself: an op more takes as long as half a million tokens
    return y


@torch.library.custom_op("archer_fast::segment_offsets", mutates_args=())
def checked_offsets(cu: Tensor, total: int) -> Tensor:
    """`cu` as contiguous int32, known to rise from 0 to `total`; ValueError, or an assertion on the GPU, otherwise.

    An op, so that the values are looked at where its caller is traced.
    """
    return _checked(cu, total)


def _checked(cu: Tensor, total: int) -> Tensor:
    if total >= 1 << 31:
        raise ValueError(f"b: wanted fewer than 2**31 tokens, which offsets of 32 bits reach, got {total}")
    rises: bool | Tensor
    if cu.device.type == "cpu":
        from archer_fast.ops import cpu  # imported by the first call that runs there

        out = torch.empty(cu.shape, dtype=torch.int32)
        rises = cpu.copy_offsets(cu.contiguous(), total, out)
    else:
        out = cu.to(torch.int32, memory_format=torch.contiguous_format, copy=True)
        rises = (cu[0] == 0) & (cu[-1] == total) & (cu[1:] >= cu[:-1]).all()
    message = f"cu: wanted offsets that rise from 0 to {total}"
    if isinstance(rises, Tensor) and rises.is_cuda:
        torch.ops.aten._assert_async.msg(rises, message)
    elif not rises:
        raise ValueError(f"{message}, got {_few(cu)}")
    return out


@checked_offsets.register_fake
def _(cu: Tensor, total: int) -> Tensor:
    return cu.new_empty(cu.shape, dtype=torch.int32)


def _few(cu: Tensor) -> str:
    """The offsets, or their ends where they are many."""
    if cu.shape[0] <= 8:
        return str(cu.tolist())
    fall = (cu[1:] < cu[:-1]).nonzero()[:1].flatten().tolist()
    falls = f", falling at [{fall[0] + 1}]" if fall else ""
    return f"{cu.shape[0]} from {int(cu[0])} to {int(cu[-1])}{falls}"


@torch.library.custom_op("archer_fast::segment_scan", mutates_args=())
def _op(a: Tensor, b: Tensor, cu: Tensor, impl: str) -> Tensor:
    record(_NAME, impl)
    offsets = _checked(cu, b.shape[0])
    out = torch.empty_like(b, memory_format=torch.contiguous_format)
    load_kernels(impl, "triton_turns").segment_scan(a.contiguous(), b.contiguous(), offsets, out)
    return out


@_op.register_fake
def _(a: Tensor, b: Tensor, cu: Tensor, impl: str) -> Tensor:
    return torch.empty_like(b, memory_format=torch.contiguous_format)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Of `archer_fast::segment_scan`, and of its Triton twin, whose schema has no `impl`."""
    a, _, cu, *impl = inputs
    ctx.impl = impl[0] if impl else "triton"
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(a, cu, output if ctx.needs_input_grad[0] else None)


def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    a, cu, y = ctx.saved_tensors
    total = grad_y.shape[0]
    marks = torch.zeros(total + 1, dtype=torch.bool, device=a.device)
    is_end = marks.index_fill(0, cu[1:].long(), True)[1:]  # [T]; an empty segment at the front marks 0, which is none's
    before = a.roll(1)  # a_{t-1}; at a segment's start another's, which is not read
    z = _scan(before.flip(0), grad_y.flip(0), (total - cu).flip(0), ctx.impl).flip(0)
    grad_a = None if y is None else z * y.roll(-1).masked_fill(is_end, 0)
    grad_b = z if ctx.needs_input_grad[1] else None
    return grad_a, grad_b, *[None] * (ctx.num_inputs - 2)


torch.library.register_autograd("archer_fast::segment_scan", backward, setup_context=setup_context)
