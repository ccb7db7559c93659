"""Attention of a decode step: any number of new tokens, each over the cached keys and values of its own slot."""

from __future__ import annotations

import torch
from torch import Tensor

from archer_fast.ops.choice import Impl, choose_impl, record

_NAME = "slot_attention"


def slot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_ids: Tensor,
    position_ids: Tensor,
    scale: float,
    *,
    impl: Impl | None = None,
) -> Tensor:
    """out_t = softmax(scale q_t K_s[:p+1]^T) V_s[:p+1], s = slot_ids[t], p = position_ids[t], a head at a time.

    Token t's own key stands in the cache already. No shape depends on the positions, so that a CUDA graph may hold it.
    No gradient.

    Args:
        query: [T, h, d] float32, bfloat16 or float16.
        keys, values: [slots, g, capacity, d] of its dtype, the last two contiguous; h is a multiple of g.
        slot_ids, position_ids: [T] int64, in [0, slots) and [0, capacity); looked at on the device alone.
        impl: "reference" (plain torch) or "triton"; None chooses by device.
    Returns: [T, h, d].
    Errors: ValueError or TypeError naming the argument, what was wanted and what came.
    """
    _check(query, keys, values, slot_ids, position_ids)
    chosen: str = choose_impl("reference" if impl is None and not query.is_cuda else impl, query)
    if chosen == "cpu":
        raise ValueError("impl: wanted reference or triton, got 'cpu'")
    record(_NAME, chosen)
    if chosen == "triton":
        from archer_fast.ops import triton_slots

        return triton_slots.slot_attention(query, keys, values, slot_ids, position_ids, scale)
    return _reference(query, keys, values, slot_ids, position_ids, scale)


def _reference(
    query: Tensor, keys: Tensor, values: Tensor, slot_ids: Tensor, position_ids: Tensor, scale: float
) -> Tensor:
    group = query.shape[1] // keys.shape[1]
    k, v = (x[slot_ids].repeat_interleave(group, 1) for x in (keys, values))  # [T, h, capacity, d]
    scores = (query[:, :, None] @ k.mT).float() * scale  # [T, h, 1, capacity]
    hidden = torch.arange(keys.shape[2], device=query.device) > position_ids[:, None]
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    # What lies behind the last token may be anything, and 0 times a NaN is one.
    v = v.masked_fill(hidden[:, None, :, None], 0.0)
    return (weights.to(v.dtype) @ v)[:, :, 0]


def _check(query: Tensor, keys: Tensor, values: Tensor, slot_ids: Tensor, position_ids: Tensor) -> None:
    if query.dim() != 3:
        raise ValueError(f"query: wanted [T, h, d], got {tuple(query.shape)}")
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"query: wanted float32, bfloat16 or float16, got {query.dtype}")
    num_tokens, num_heads, size = query.shape
    for name, x in (("keys", keys), ("values", values)):
        if x.dim() != 4 or x.shape != keys.shape or x.shape[3] != size or num_heads % max(x.shape[1], 1):
            raise ValueError(
                f"{name}: wanted [slots, g, capacity, {size}] with {num_heads} a multiple of g, got {tuple(x.shape)}"
            )
        if x.dtype != query.dtype or x.device != query.device:
            raise TypeError(f"{name}: wanted {query.dtype} on {query.device}, got {x.dtype} on {x.device}")
        if x.stride(3) != 1 or x.stride(2) != size:
            raise ValueError(f"{name}: wanted positions that follow one another in memory, got strides {x.stride()}")
    for name, x in (("slot_ids", slot_ids), ("position_ids", position_ids)):
        if x.dtype != torch.int64 or x.shape != (num_tokens,) or x.device != query.device:
            raise ValueError(f"{name}: wanted [{num_tokens}] int64 on {query.device}, got {x.dtype} {tuple(x.shape)}")
