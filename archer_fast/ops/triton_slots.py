"""The launch of the slot attention's Triton kernel, and every compilation that it can choose for common heads."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
from torch import Tensor

from archer_fast.kernels.slot_attention import slot_attention_kernel
from archer_fast.ops.triton_choices import CAPABILITIES, TRITON_TYPES
from archer_fast.ops.triton_variant import Variant

MIN_PRODUCT = 16  # rows and columns of the smallest product of the tensor cores

# (key-value heads, query heads a group, head size): Qwen2.5-7B, Llama 3.1 8B and Mistral 7B, GPT-2.
COMMON_HEADS = ((4, 7, 128), (8, 4, 128), (12, 1, 64))


def slot_attention(
    query: Tensor, keys: Tensor, values: Tensor, slot_ids: Tensor, position_ids: Tensor, scale: float
) -> Tensor:
    """See `ops.slot_attention`; one launch, no synchronisation."""
    num_tokens, num_heads, size = query.shape
    query = query.contiguous()
    out = torch.empty_like(query)
    if num_tokens == 0:
        return out
    num_kv_heads = keys.shape[1]
    variant = slot_attention_variant(query.dtype, num_kv_heads, num_heads // num_kv_heads, size)
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        variant.kernel[(num_tokens, num_kv_heads)](
            query,
            keys,
            values,
            slot_ids.contiguous(),
            position_ids.contiguous(),
            out,
            scale,
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            **variant.constexprs,
            **variant.options,
        )
    return out


def variants() -> list[Variant]:
    """Of the head shapes in COMMON_HEADS; others are compiled when they are met."""
    return [slot_attention_variant(dtype, *heads) for dtype in TRITON_TYPES for heads in COMMON_HEADS]


@functools.cache
def slot_attention_variant(dtype: torch.dtype, num_kv_heads: int, group: int, size: int) -> Variant:
    """64 keys a step keep a block of keys and one of values in registers without spills (compile report)."""
    constexprs = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_SIZE": size,
        "GROUP_ROWS": max(MIN_PRODUCT, triton.next_power_of_2(group)),
        "BLOCK_D": max(MIN_PRODUCT, triton.next_power_of_2(size)),
        "BLOCK_L": 64 if dtype != torch.float32 else 16,
        "INTERPRET": not isinstance(slot_attention_kernel, triton.JITFunction),
    }
    pointers = dict.fromkeys(("query", "keys", "values"), f"*{TRITON_TYPES[dtype]}")
    strides = ("key_slot_stride", "key_head_stride", "value_slot_stride", "value_head_stride")
    signature = {
        **pointers,
        "slot_ids": "*i64",
        "position_ids": "*i64",
        "out": f"*{TRITON_TYPES[dtype]}",
        "scale": "fp32",
        **dict.fromkeys(strides, "i64"),
    }
    return Variant(
        name=f"slot_attention[{TRITON_TYPES[dtype]}, {num_kv_heads} x {group} heads of {size}]",
        kernel=slot_attention_kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=4,
        num_stages=2,
        capabilities=CAPABILITIES,
        needs_tensor_core=dtype != torch.float32,
    )
