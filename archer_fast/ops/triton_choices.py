"""Choices of the lm_head's launches: plain functions of shapes, dtypes and the chip; `variants` lists them all.

Triton's autotuner would need a driver, and its choices could be neither listed nor compiled beforehand.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from archer_fast.kernels.linear_logprobs import linear_logprobs_fwd_kernel
from archer_fast.kernels.row_softmax import scale_kernel, softmax_backward_kernel, softmax_update_kernel
from archer_fast.ops.triton_variant import Variant

TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CAPABILITIES = (80, 90, 100)
SCALE_BLOCK = 8192  # elements a program multiplies
GROUP = 16  # row blocks that share a weight tile: at H = 4096 their hidden states take 17 MB of the L2 cache


class Chip(NamedTuple):
    capability: int  # the family of CAPABILITIES whose machine code the launch chooses for
    num_processors: int


class Tile(NamedTuple):
    """What one program of the fused forward multiplies at once, and how."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    hidden_tma: bool = False
    weight_tma: bool = False


def chip_of(device: torch.device) -> Chip:
    """A100 stands for what is neither Hopper nor data-centre Blackwell, and for the interpreter."""
    if device.type != "cuda":
        return Chip(80, 4)
    major, _ = torch.cuda.get_device_capability(device)
    family = major * 10 if major in (9, 10) else 80
    return Chip(family, torch.cuda.get_device_properties(device).multi_processor_count)


def fused_tile(capability: int, dtype: torch.dtype, vector: int, has_rows: bool) -> Tile:
    """The largest tile whose registers do not spill (compile report). Tests shrink it."""
    if dtype == torch.float32:  # products outside the tensor cores: float32 means float32
        return Tile(64, 128, 32, 8, 3) if vector > 1 else Tile(64, 64, 32, 8, 3)
    if vector == 1:
        return Tile(64, 64, 32, 4, 3)
    if capability == 80:
        return Tile(128, 128, 64, 8, 3)
    return Tile(128, 128, 64, 8, 4, hidden_tma=not has_rows, weight_tma=True)


def vocab_splits(num_row_blocks: int, num_tiles: int, num_processors: int) -> tuple[int, int]:
    """(vocabulary tiles a program walks through, programs a row block).

    About four programs a processor, so that the last of them leave few idle; at least 4 tiles each where that
    still fills the chip; 8 programs a row block (where there are as many tiles), for the L2 cache (GROUP).
    """
    share = num_row_blocks * num_tiles // num_processors  # tiles a processor
    tiles = max(1, min(4, share), share // 4)
    tiles = min(tiles, -(-num_tiles // 8))
    return tiles, -(-num_tiles // tiles)


def row_tile(num_columns: int, vector: int) -> tuple[int, int]:
    """(columns a program reads at once, warps): as many as spill on no chip (compile report). Tests shrink it."""
    return (4096, 8) if num_columns > 2048 and vector > 1 else (2048, 8)


def row_vector(*tensors: Tensor) -> int:
    """Elements that every row of every tensor starts and ends on a multiple of: 16 bytes of the smallest, or 1."""
    vector = 16 // min(x.element_size() for x in tensors)
    is_aligned = all(
        x.data_ptr() % (vector * x.element_size()) == 0
        and x.stride(0) % vector == 0
        and x.stride(0) >= x.shape[1]  # rows that overlap are no tensor descriptor's business
        and x.shape[1] % vector == 0
        for x in tensors
    )
    return vector if is_aligned else 1


def variants() -> list[Variant]:
    """Every compilation that `triton_launch` can ask for."""
    out = []
    halves = (torch.bfloat16, torch.float16)
    pairs = [(dtype, dtype) for dtype in TRITON_TYPES] + [(torch.float32, half) for half in halves]
    for dtype, out_dtype in pairs:
        for vector in (1, 16 // out_dtype.itemsize):
            for block, num_warps in sorted({row_tile(v, vector) for v in (1, 1 << 20)}):
                for has_softcap in (False, True):
                    if dtype == out_dtype:
                        out.append(softmax_update_variant(dtype, has_softcap, vector, block, num_warps))
                    out.append(softmax_backward_variant(dtype, out_dtype, has_softcap, vector, block, num_warps))
    for dtype in (torch.float32, torch.bfloat16):
        out += [scale_variant(dtype, vector) for vector in (1, 16 // dtype.itemsize)]
    for dtype in TRITON_TYPES:
        for vector in (1, 16 // dtype.itemsize):
            tiles = {fused_tile(chip, dtype, vector, rows) for chip in CAPABILITIES for rows in (False, True)}
            for has_softcap in (False, True):
                out += [linear_logprobs_variant(dtype, has_softcap, vector, tile) for tile in sorted(tiles)]
    return out


@functools.cache
def softmax_update_variant(dtype: torch.dtype, has_softcap: bool, vector: int, block: int, num_warps: int) -> Variant:
    constexprs = {"BLOCK": block, "VECTOR": vector, "HAS_SOFTCAP": has_softcap}
    signature = {
        "logits": f"*{TRITON_TYPES[dtype]}",
        "row_stride": "i32",
        "num_columns": "i32",
        "first_column": "i32",
        "target_ids": "*i64",
        "inv_temperature": "*fp32",
        "softcap": "fp32",
        "state": "*fp32",
    }
    name = _name("softmax_update", TRITON_TYPES[dtype], block, f"vector {vector}", has_softcap and "softcap")
    return _row_variant(name, softmax_update_kernel, signature, constexprs, num_warps)


@functools.cache
def softmax_backward_variant(
    dtype: torch.dtype, out_dtype: torch.dtype, has_softcap: bool, vector: int, block: int, num_warps: int
) -> Variant:
    constexprs = {"BLOCK": block, "VECTOR": vector, "HAS_SOFTCAP": has_softcap}
    signature = {
        "logits": f"*{TRITON_TYPES[dtype]}",
        "row_stride": "i32",
        "num_columns": "i32",
        "first_column": "i32",
        "target_ids": "*i64",
        "inv_temperature": "*fp32",
        "softcap": "fp32",
        "row_max": "*fp32",
        "log_sum": "*fp32",
        "entropy": "*fp32",
        "grad_logprobs": "*fp32",
        "grad_entropy": "*fp32",
        "has_grad_entropy": "i32",
        "grad_lse": "*fp32",
        "has_grad_lse": "i32",
        "out": f"*{TRITON_TYPES[out_dtype]}",
        "out_row_stride": "i32",
    }
    types = TRITON_TYPES[dtype] if dtype == out_dtype else f"{TRITON_TYPES[dtype]} to {TRITON_TYPES[out_dtype]}"
    name = _name("softmax_backward", types, block, f"vector {vector}", has_softcap and "softcap")
    return _row_variant(name, softmax_backward_kernel, signature, constexprs, num_warps)


@functools.cache
def scale_variant(dtype: torch.dtype, vector: int) -> Variant:
    signature = {"x": f"*{TRITON_TYPES[dtype]}", "num_elements": "i64", "factor": "*fp32"}
    name = _name("scale", TRITON_TYPES[dtype], f"vector {vector}")
    return _row_variant(name, scale_kernel, signature, {"BLOCK": SCALE_BLOCK, "VECTOR": vector}, num_warps=8)


@functools.cache
def linear_logprobs_variant(dtype: torch.dtype, has_softcap: bool, vector: int, tile: Tile) -> Variant:
    constexprs = {
        "BLOCK_N": tile.rows,
        "BLOCK_V": tile.columns,
        "BLOCK_H": tile.depth,
        "GROUP": GROUP,
        "VECTOR": vector,
        "HAS_SOFTCAP": has_softcap,
        "HIDDEN_TMA": tile.hidden_tma,
        "WEIGHT_TMA": tile.weight_tma,
        "INTERPRET": not isinstance(linear_logprobs_fwd_kernel, triton.JITFunction),
    }
    type_ = TRITON_TYPES[dtype]
    signature = {
        "hidden": f"tensordesc<{type_}[{tile.rows}, {tile.depth}]>" if tile.hidden_tma else f"*{type_}",
        "hidden_stride": "i32",
        "weight": f"tensordesc<{type_}[{tile.columns}, {tile.depth}]>" if tile.weight_tma else f"*{type_}",
        "weight_stride": "i32",
        "target_ids": "*i64",
        "rows": "*i64",
        "has_rows": "i32",
        "bias": "*fp32",
        "has_bias": "i32",
        "inv_temperature": "*fp32",
        "softcap": "fp32",
        "state": "*fp32",
        "num_rows": "i32",
        "vocab_size": "i32",
        "hidden_size": "i32",
        "tiles_per_split": "i32",
        "num_splits": "i32",
    }
    loads = "hidden and weight by TMA" if tile.hidden_tma else "weight by TMA" if tile.weight_tma else "pointers"
    shape = f"{tile.rows}x{tile.columns}x{tile.depth}"
    return Variant(
        name=_name("linear_logprobs", type_, shape, f"vector {vector}", loads, has_softcap and "softcap"),
        kernel=linear_logprobs_fwd_kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        capabilities=tuple(
            chip
            for chip in CAPABILITIES
            if tile in (fused_tile(chip, dtype, vector, False), fused_tile(chip, dtype, vector, True))
        ),
        needs_tensor_core=dtype != torch.float32,
    )


def _row_variant(
    name: str, kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], num_warps: int
) -> Variant:
    return Variant(
        name=name,
        kernel=kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=2,
        capabilities=CAPABILITIES,
        needs_tensor_core=False,
    )


def _name(kernel: str, *facts: str | int | bool) -> str:
    return f"{kernel}[{', '.join(str(fact) for fact in facts if fact is not False)}]"
