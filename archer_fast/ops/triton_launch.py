"""Launches of the lm_head's Triton kernels; importing this module imports triton, so do it inside an op's body."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from archer_fast.ops import triton_choices as choices
from archer_fast.ops.triton_choices import variants as variants
from archer_fast.ops.triton_variant import Variant


def softmax_update(
    logits: Tensor,
    first_column: int,
    target_ids: Tensor,
    inv_temperature: Tensor,
    softcap: float | None,
    state: Tensor,
) -> None:
    """Fold a tile of columns into each row's running (m, s, t, z_target), in place; see `reference.softmax_update`.

    logits [n, v] float32 | bfloat16 | float16, rows contiguous; target_ids [n] int64; inv_temperature [n] float32;
    state [n, 4] float32.
    """
    n, v = logits.shape
    assert logits.stride(1) == 1 or v <= 1
    assert target_ids.dtype == torch.int64 and target_ids.shape == (n,) and target_ids.is_contiguous()
    assert state.dtype == torch.float32 and state.shape == (n, 4) and state.is_contiguous()
    _assert_row_floats(n, inv_temperature)
    if n == 0 or v == 0:
        return
    vector = choices.row_vector(logits)
    variant = choices.softmax_update_variant(logits.dtype, softcap is not None, vector, *choices.row_tile(v, vector))
    cap = 1.0 if softcap is None else float(softcap)
    _launch(variant, (n,), logits, logits.stride(0), v, first_column, target_ids, inv_temperature, cap, state)


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
    """d loss / d logits into `out`, which may share memory with `logits`, row by row; see `reference.softmax_backward`.

    logits [n, v] float32 | bfloat16 | float16; out [n, v] of the same dtype, or of a half one; the rest [n].
    """
    n, v = logits.shape
    assert out.shape == (n, v) and (v <= 1 or (logits.stride(1) == 1 and out.stride(1) == 1))
    assert target_ids.dtype == torch.int64 and target_ids.shape == (n,) and target_ids.is_contiguous()
    _assert_row_floats(n, inv_temperature, row_max, log_sum, entropy, grad_logprobs, grad_entropy, grad_lse)
    if n == 0 or v == 0:
        return
    vector = choices.row_vector(logits, out)
    variant = choices.softmax_backward_variant(
        logits.dtype, out.dtype, softcap is not None, vector, *choices.row_tile(v, vector)
    )
    _launch(
        variant,
        (n,),
        logits,
        logits.stride(0),
        v,
        first_column,
        target_ids,
        inv_temperature,
        1.0 if softcap is None else float(softcap),
        row_max,
        log_sum,
        entropy,
        grad_logprobs,
        grad_logprobs if grad_entropy is None else grad_entropy,
        int(grad_entropy is not None),
        grad_logprobs if grad_lse is None else grad_lse,
        int(grad_lse is not None),
        out,
        out.stride(0),
    )


def scale(x: Tensor, factor: Tensor) -> None:
    """x *= factor in place; where the factor is 1 (known on the device alone) x is not read. See `reference.scale`.

    x contiguous, float32 | bfloat16; factor [] float32.
    """
    assert x.is_contiguous() and factor.dtype == torch.float32 and factor.shape == ()
    if x.numel() == 0:
        return
    vector = choices.row_vector(x.view(1, -1))
    variant = choices.scale_variant(x.dtype, vector)
    _launch(variant, (-(-x.numel() // choices.SCALE_BLOCK),), x, x.numel(), factor)


def linear_logprobs_fwd(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    inv_temperature: Tensor,
    softcap: float | None,
) -> Tensor:
    """The state (m, s, t, z_target) [N, 4] float32 of every scored row; no logits are ever in memory.

    hidden [T, H] and weight [V, H] float32 | bfloat16 | float16, target_ids [N] int64, rows [N] int64 or None,
    bias [V] or None, inv_temperature [N] float32. Takes num_splits * N * 16 bytes beside its output.
    """
    (n,), (v, h) = target_ids.shape, weight.shape
    assert hidden.dtype == weight.dtype and hidden.shape[1] == h
    assert target_ids.dtype == torch.int64 and (rows is None or (rows.dtype == torch.int64 and rows.shape == (n,)))
    _assert_row_floats(n, inv_temperature)
    if n == 0:
        return hidden.new_empty((0, 4), dtype=torch.float32)
    hidden, weight = _rows_contiguous(hidden), _rows_contiguous(weight)
    target_ids = target_ids.contiguous()
    chip, vector = choices.chip_of(hidden.device), choices.row_vector(hidden, weight)
    tile = choices.fused_tile(chip.capability, hidden.dtype, vector, rows is not None)
    variant = choices.linear_logprobs_variant(hidden.dtype, softcap is not None, vector, tile)
    num_blocks = -(-n // tile.rows)
    tiles_per_split, num_splits = choices.vocab_splits(num_blocks, -(-v // tile.columns), chip.num_processors)
    partial = hidden.new_empty((num_splits, n, 4), dtype=torch.float32)
    _launch(
        variant,
        (num_blocks * num_splits,),
        _descriptor(hidden, tile.rows, tile.depth) if tile.hidden_tma else hidden,
        hidden.stride(0),
        _descriptor(weight, tile.columns, tile.depth) if tile.weight_tma else weight,
        weight.stride(0),
        target_ids,
        target_ids if rows is None else rows.contiguous(),
        int(rows is not None),
        inv_temperature if bias is None else bias.float().contiguous(),
        int(bias is not None),
        inv_temperature,
        1.0 if softcap is None else float(softcap),
        partial,
        n,
        v,
        h,
        tiles_per_split,
        num_splits,
    )
    return merge_states(partial)


def merge_states(partial: Tensor) -> Tensor:
    """Online states [splits, N, 4] of disjoint columns -> [N, 4]; z_target is 0 in all splits but the target's."""
    if partial.shape[0] == 1:
        return partial[0]
    m, s, t, z_target = partial.unbind(-1)  # [splits, N]
    top = m.amax(0)
    shift = torch.where(m == -torch.inf, 0.0, m - top)  # a split of masked columns alone: s = t = 0, at any shift
    scale = shift.exp()
    return torch.stack([top, (scale * s).sum(0), (scale * (t + s * shift)).sum(0), z_target.sum(0)], dim=-1)


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(variant: Variant, grid: tuple[int, ...], *args: Any) -> None:
    """The one place where a kernel starts. Triton launches on the current device, so make that the operands'."""
    device = next(x.device for x in args if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        variant.kernel[grid](*args, **variant.constexprs, **variant.options)


def _assert_row_floats(n: int, *tensors: Tensor | None) -> None:
    """Per-row numbers: [n] float32, contiguous, because the kernels index them without strides."""
    for x in tensors:
        assert x is None or (x.dtype == torch.float32 and x.shape == (n,) and (n <= 1 or x.stride(0) == 1))
