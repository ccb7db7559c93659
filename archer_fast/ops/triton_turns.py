"""The turn-level kernels of Triton: what each is launched with, and every compilation that a launch can choose."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from archer_fast.kernels.critic_loss import critic_loss_kernel
from archer_fast.kernels.segment_scan import (
    segment_carry_kernel,
    segment_ends_kernel,
    segment_fixup_kernel,
    segment_scan_fwd_kernel,
)
from archer_fast.ops.triton_variant import FP_FUSION, Variant

MARK_BLOCK = 1024  # offsets a program
SCAN_BLOCK = 1024  # tokens a chunk: 8 a thread
CARRY_BLOCK = 1024  # chunks a tile of the one program that scans them
ALL = (80, 90, 100)


def scan_options() -> dict[str, Any]:
    """Launch options of the segment kernels."""
    return {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": FP_FUSION}


def critic_block(num_values: int) -> tuple[int, int]:
    """(values a tile, warps) of the critic loss: few values hardly fill one tile, many want wide ones."""
    return (1024, 4) if num_values <= 1024 else (2048, 8)


def segment_scan(a: Tensor, b: Tensor, cu: Tensor, out: Tensor) -> None:
    """y_t = b_t + a_t y_{t+1} inside each segment, into `out`: see `reference.segment_scan`.

    a, b, out [T] float32, cu [B+1] int32, all contiguous on one device. `out` may be b, not a. What stands in a at a
    segment's last token is never read into a product. Two launches and a fill, four where T > SCAN_BLOCK; no
    synchronisation.
    """
    num_tokens = a.shape[0]
    if num_tokens == 0:
        return
    options = scan_options()
    num_chunks = triton.cdiv(num_tokens, SCAN_BLOCK)
    ends = torch.zeros(num_tokens, dtype=torch.int8, device=a.device)
    chunk_a, chunk_b, chunk_y = (torch.empty(num_chunks, dtype=torch.float32, device=a.device) for _ in range(3))
    chunk_open = torch.empty(num_chunks, dtype=torch.int32, device=a.device)
    with _on(a.device):
        wrap_triton(segment_ends_kernel)[(triton.cdiv(cu.shape[0], MARK_BLOCK),)](
            cu, ends, cu.shape[0], BLOCK=MARK_BLOCK, **options
        )
        wrap_triton(segment_scan_fwd_kernel)[(num_chunks,)](
            a, b, ends, out, chunk_a, chunk_b, chunk_open, num_tokens, BLOCK=SCAN_BLOCK, **options
        )
        if num_chunks == 1:
            return
        wrap_triton(segment_carry_kernel)[(1,)](
            chunk_a, chunk_b, chunk_open, chunk_y, num_chunks, BLOCK=CARRY_BLOCK, **options
        )
        wrap_triton(segment_fixup_kernel)[(num_chunks - 1,)](a, chunk_open, chunk_y, out, BLOCK=SCAN_BLOCK, **options)


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
    """Losses, statistics and gradients of the four heads in one launch: see `reference.critic_loss`.

    values, targets, grads [4, n], losses [4], stats [4, 4], all float32 and contiguous on one device.
    """
    num_values = values.shape[1]
    if num_values == 0:
        losses.zero_()
        stats.fill_(torch.nan)
        return
    above, below = (expectile, 1.0 - expectile) if kind == "expectile" else (1.0, 1.0)
    block, num_warps = critic_block(num_values)
    with _on(values.device):
        wrap_triton(critic_loss_kernel)[(4,)](
            values,
            targets,
            losses,
            stats,
            grads,
            num_values,
            above,
            below,
            huber_delta,
            IS_HUBER=kind == "huber",
            BLOCK=block,
            num_warps=num_warps,
            num_stages=1,
            enable_fp_fusion=FP_FUSION,
        )


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make that the operands'. A trace may have a GPU's tensors and no GPU."""
    is_there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.device(device) if is_there else contextlib.nullcontext()


def variants() -> tuple[Variant, ...]:
    """Every compilation that the launches above can choose."""
    scans = (
        (segment_ends_kernel, "cu:*i32 ends:*i8 num_offsets:i32", MARK_BLOCK),
        (
            segment_scan_fwd_kernel,
            "a:*fp32 b:*fp32 ends:*i8 out:*fp32 chunk_a:*fp32 chunk_b:*fp32 chunk_open:*i32 num_tokens:i32",
            SCAN_BLOCK,
        ),
        (
            segment_carry_kernel,
            "chunk_a:*fp32 chunk_b:*fp32 chunk_open:*i32 chunk_y:*fp32 num_chunks:i32",
            CARRY_BLOCK,
        ),
        (
            segment_fixup_kernel,
            "a:*fp32 chunk_open:*i32 chunk_y:*fp32 out:*fp32",
            SCAN_BLOCK,
        ),
    )
    options = scan_options()
    found = [
        Variant(
            name=kernel.__name__.removesuffix("_kernel"),
            kernel=kernel,
            signature={**_types(arguments), "BLOCK": "constexpr"},
            constexprs={"BLOCK": block},
            num_warps=options["num_warps"],
            num_stages=options["num_stages"],
            capabilities=ALL,
            needs_tensor_core=False,
        )
        for kernel, arguments, block in scans
    ]
    critic_types = _types(
        "values:*fp32 targets:*fp32 losses:*fp32 stats:*fp32 grads:*fp32 "
        "num_values:i32 weight_above:fp32 weight_below:fp32 huber_delta:fp32"
    )
    for num_values in (1024, 1025):
        block, num_warps = critic_block(num_values)
        for is_huber in (False, True):
            found.append(
                Variant(
                    name=f"critic_loss[{'huber' if is_huber else 'squares'}, {block}]",
                    kernel=critic_loss_kernel,
                    signature={**critic_types, "IS_HUBER": "constexpr", "BLOCK": "constexpr"},
                    constexprs={"IS_HUBER": is_huber, "BLOCK": block},
                    num_warps=num_warps,
                    num_stages=1,
                    capabilities=ALL,
                    needs_tensor_core=False,
                )
            )
    return tuple(found)


def _types(arguments: str) -> dict[str, str]:
    """{"cu": "*i32", "num_offsets": "i32"} of "cu:*i32 num_offsets:i32"."""
    return dict(part.split(":") for part in arguments.split())
