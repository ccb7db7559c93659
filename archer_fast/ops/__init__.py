"""Fused operations with one public name each; `reference` holds their plain torch specification.

Importable with nothing but torch installed: the C++ and Triton kernels are loaded by the first call that runs on them.
"""

from archer_fast.ops.choice import IMPLS, Impl, last_impl
from archer_fast.ops.critic_loss import CriticLoss, HeadStats, critic_loss
from archer_fast.ops.linear_logprobs import LinearLogprobs, linear_logprobs
from archer_fast.ops.linear_policy_loss import LinearPolicyLoss, PolicyMetrics, linear_policy_loss
from archer_fast.ops.polyak import polyak_
from archer_fast.ops.segment_scan import segment_scan
from archer_fast.ops.slot_attention import slot_attention

__all__ = [
    "IMPLS",
    "CriticLoss",
    "HeadStats",
    "Impl",
    "LinearLogprobs",
    "LinearPolicyLoss",
    "PolicyMetrics",
    "critic_loss",
    "last_impl",
    "linear_logprobs",
    "linear_policy_loss",
    "polyak_",
    "segment_scan",
    "slot_attention",
]
