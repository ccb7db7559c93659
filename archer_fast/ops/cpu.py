"""The row functions of `reference` in C++: float32 on the CPU, memory handed over by address."""

from __future__ import annotations

import torch
from torch import Tensor

from archer_fast import _C
from archer_fast.ops.reference import scale as scale

SIMD = "auto"  # or a name out of _C.simd_levels(): tests force each instruction set


def softmax_update(
    logits: Tensor,
    first_column: int,
    target_ids: Tensor,
    inv_temperature: Tensor,
    softcap: float | None,
    state: Tensor,
) -> None:
    """`reference.softmax_update`: logits [n, v] float32 whose columns are contiguous, state [n, 4] in place."""
    n, v = logits.shape
    _C.softmax_update(
        *_columns(logits),
        n,
        v,
        first_column,
        _address(target_ids, (n,), torch.int64),
        _address(inv_temperature, (n,)),
        _cap(softcap),
        _address(state, (n, 4)),
        torch.get_num_threads(),
        SIMD,
    )


def softmax_backward(
    logits: Tensor,
    first_column: int,
    target_ids: Tensor,
    inv_temperature: Tensor,
    softcap: float | None,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
) -> None:
    """`reference.softmax_backward`: logits and out [n, v] float32 whose columns are contiguous; one memory, or two."""
    n, v = logits.shape
    assert out.shape == logits.shape, (out.shape, logits.shape)
    assert out.data_ptr() != logits.data_ptr() or out.stride() == logits.stride(), (out.stride(), logits.stride())
    _C.softmax_backward(
        *_columns(logits),
        n,
        v,
        first_column,
        _address(target_ids, (n,), torch.int64),
        _address(inv_temperature, (n,)),
        _cap(softcap),
        _address(row_max, (n,)),
        _address(log_sum, (n,)),
        _address(entropy, (n,)),
        _address(grad_logprobs, (n,)),
        0 if grad_entropy is None else _address(grad_entropy, (n,)),
        0 if grad_lse is None else _address(grad_lse, (n,)),
        *_columns(out),
        torch.get_num_threads(),
        SIMD,
    )


def segment_scan(a: Tensor, b: Tensor, cu: Tensor, out: Tensor) -> None:
    """`reference.segment_scan`: a, b, out [T] float32, cu [B+1] int32 offsets 0 ... T; `out` is memory of its own."""
    (total,) = out.shape
    assert cu.dim() == 1 and cu.shape[0] >= 1, cu.shape
    _C.segment_scan(
        _address(a, (total,)),
        _address(b, (total,)),
        _address(cu, (cu.shape[0],), torch.int32),
        _address(out, (total,)),
        cu.shape[0] - 1,
        torch.get_num_threads(),
        SIMD,
    )


def copy_offsets(cu: Tensor, total: int, out: Tensor) -> bool:
    """Whether cu [B+1] int32 or int64 rises from 0 to `total`; if so out [B+1] int32 is equal to it."""
    copy = _C.copy_offsets if cu.dtype == torch.int32 else _C.copy_long_offsets
    return copy(_address(cu, cu.shape, cu.dtype), cu.shape[0], total, _address(out, cu.shape, torch.int32))


def critic_loss(
    values: Tensor,
    targets: Tensor,
    kind: str,
    expectile: float,
    huber_delta: float,
    losses: Tensor,
    stats: Tensor,
    grads: Tensor,
) -> None:
    """`reference.critic_loss`: values, targets, grads [4, n], losses [4], stats [4, 4], all float32."""
    n = values.shape[1]
    _C.critic_loss(
        _address(values, (4, n)),
        _address(targets, (4, n)),
        n,
        kind,
        expectile,
        huber_delta,
        _address(losses, (4,)),
        _address(stats, (4, 4)),
        _address(grads, (4, n)),
    )


def empty_in_huge_pages(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised, its first touch cheap: page faults are a twentieth of the time of a loss with a big gradient."""
    made = like.new_empty(shape, dtype=dtype)
    if made.nbytes >= 4 << 20:  # a huge page is 2 MB
        _C.advise_huge_pages(made.data_ptr(), made.nbytes)
    return made


def _address(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """Where the elements lie; the caller's tensor keeps them alive, so it may not be a temporary."""
    assert tensor.device.type == "cpu" and tensor.dtype == dtype, (tensor.device, tensor.dtype)
    assert tensor.shape == shape and tensor.is_contiguous(), (tensor.shape, tensor.stride())
    return tensor.data_ptr()


def _columns(logits: Tensor) -> tuple[int, int]:
    """Where [n, v] lies, and the number of elements from column to column."""
    assert logits.device.type == "cpu" and logits.dtype == torch.float32, (logits.device, logits.dtype)
    n, v = logits.shape
    assert n <= 1 or logits.stride(0) == 1, logits.stride()
    assert v <= 1 or logits.stride(1) >= n, logits.stride()
    return logits.data_ptr(), logits.stride(1)


def _cap(softcap: float | None) -> float:
    assert softcap is None or softcap > 0, softcap
    return 0.0 if softcap is None else softcap
