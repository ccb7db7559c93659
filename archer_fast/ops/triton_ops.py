"""The turn-level ops on a GPU as triton_ops, into whose kernels torch.compile sees.

A module of its own, imported when a GPU's tensor first arrives: registering a triton_op imports Triton and half of
inductor, and looks for the kernels among this module's globals (their source becomes part of a compiled graph's key).
"""

from __future__ import annotations

import torch
from torch import Tensor

from archer_fast.ops.choice import record
from archer_fast.ops.critic_loss import backward as critic_loss_backward
from archer_fast.ops.critic_loss import empty_outputs
from archer_fast.ops.critic_loss import setup_context as critic_loss_context
from archer_fast.ops.segment_scan import backward as segment_scan_backward
from archer_fast.ops.segment_scan import setup_context as segment_scan_context
from archer_fast.ops.triton_turns import critic_loss as launch_critic_loss
from archer_fast.ops.triton_turns import segment_scan as launch_segment_scan


@torch.library.triton_op("archer_fast::segment_scan_triton", mutates_args=())
def segment_scan(a: Tensor, b: Tensor, cu: Tensor) -> Tensor:
    """y [T] float32 of `ops.segment_scan`; cu [B+1] int32, checked. `record` tells of a trace too, not of its runs."""
    record("segment_scan", "triton")
    out = torch.empty_like(b, memory_format=torch.contiguous_format)
    launch_segment_scan(a.contiguous(), b.contiguous(), cu, out)
    return out


@torch.library.triton_op("archer_fast::critic_loss_triton", mutates_args=())
def critic_loss(
    values: Tensor, targets: Tensor, kind: str, expectile: float, huber_delta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """losses [4], stats [4, 4], grads [4, n] of `ops.critic_loss`."""
    record("critic_loss", "triton")
    losses, stats, grads = empty_outputs(values)
    launch_critic_loss(values.contiguous(), targets.contiguous(), kind, expectile, huber_delta, losses, stats, grads)
    return losses, stats, grads


torch.library.register_autograd(
    "archer_fast::segment_scan_triton", segment_scan_backward, setup_context=segment_scan_context
)
torch.library.register_autograd(
    "archer_fast::critic_loss_triton", critic_loss_backward, setup_context=critic_loss_context
)
