"""Arguments of the ops on the vocabulary that nobody could have meant: the error names each, and what was wanted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from archer_fast.ops import linear_logprobs, linear_policy_loss

pytestmark = pytest.mark.usefixtures("one_thread")

GOOD: dict[str, Any] = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(5, 3), "target_ids": torch.zeros(4).long()}


class Sharded(Tensor):
    """What tells a DTensor from a tensor."""

    def full_tensor(self) -> Tensor:
        return self


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(4, 2)}, ValueError, r"hidden, weight: wanted \[T, H\] and \[V, H\], got \(4, 2\)"),
        ({"hidden": torch.zeros(2, 2, 3)}, ValueError, r"hidden, weight: .* got \(2, 2, 3\)"),
        ({"weight": torch.zeros(3)}, ValueError, r"hidden, weight: .* got \(4, 3\) and \(3,\)"),
        ({"weight": torch.zeros(0, 3)}, ValueError, r"weight: wanted a vocabulary of at least one token, got \(0, 3\)"),
        ({"weight": torch.zeros(5, 3).as_subclass(Sharded)}, TypeError, "weight: wanted a plain tensor, got a DTensor"),
        ({"weight": torch.zeros(5, 3).half()}, TypeError, "weight: wanted .* hidden's dtype, got torch.float16 beside"),
        ({"hidden": torch.zeros(4, 3).int()}, TypeError, "hidden: wanted a float tensor .* got torch.int32"),
        ({"target_ids": torch.zeros(4).int()}, TypeError, "target_ids: wanted int64, got torch.int32"),
        ({"target_ids": torch.zeros(3).long()}, ValueError, r"target_ids: wanted one a scored row \(4\), got \(3,\)"),
        ({"target_ids": torch.zeros(4, 1).long()}, ValueError, r"target_ids: wanted one dimension, got \(4, 1"),
        ({"rows": torch.tensor([0, 1])}, ValueError, r"target_ids: wanted one a scored row \(2\), got \(4,\)"),
        ({"rows": torch.tensor([0, 1, 2, 3]).int()}, TypeError, "rows: wanted int64, got torch.int32"),
        ({"rows": torch.zeros(4, device="meta").long()}, ValueError, "rows: wanted cpu, where hidden is, got meta"),
        ({"temperature": 0.0}, ValueError, r"temperature: wanted a finite number above 0.* got 0\.0"),
        ({"temperature": -1.0}, ValueError, "temperature: wanted a finite number above 0.* got -1"),
        ({"temperature": math.nan}, ValueError, "temperature: wanted a finite number above 0.* got nan"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature: wanted one a scored row \(4\), got \(3,\)"),
        ({"temperature": torch.tensor([1.0, 1, 0, 1])}, ValueError, r"temperature: .* got 0 in row 2"),
        ({"temperature": torch.tensor([1.0, 1, -2, 1])}, ValueError, r"temperature: .* got -2 in row 2"),
        ({"temperature": torch.ones(4, requires_grad=True)}, ValueError, "temperature: no gradient is computed"),
        ({"temperature": "hot"}, ValueError, "temperature: wanted a finite number above 0.* got 'hot'"),
        ({"temperature": 1e-40}, ValueError, "temperature: wanted a finite number above 0.* got 1e-40"),
        ({"softcap": math.inf}, ValueError, "softcap: wanted a finite number above 0 or None, got inf"),
        ({"target_ids": [0, 1, 2, 3]}, TypeError, "target_ids: wanted a tensor, got list"),
        ({"rows": torch.tensor(3)}, ValueError, r"rows: wanted one dimension, got \(\)"),
        ({"hidden": torch.zeros(4, 3).as_subclass(Sharded)}, TypeError, "hidden: wanted a plain tensor, got a DTensor"),
        ({"weight": torch.zeros(5, 3, device="meta")}, ValueError, "weight: wanted cpu, where hidden is, got meta"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: wanted \[V\] = \(5,\), got \(4,\)"),
        ({"softcap": 0.0}, ValueError, r"softcap: wanted a finite number above 0 or None, got 0\.0"),
        ({"target_ids": torch.tensor([0, 1, 2, 5])}, ValueError, r"target_ids: wanted values in \[0, 5\), got 0 .. 5"),
        ({"target_ids": torch.tensor([0, 1, 2, -1])}, ValueError, r"target_ids: wanted .* got -1 .. 2"),
        ({"rows": torch.tensor([0, 1, 2, 4])}, ValueError, r"rows: wanted values in \[0, 4\), got 0 .. 4"),
        ({"impl": "cuda"}, ValueError, "impl: wanted one of reference, cpu, triton or None, got 'cuda'"),
        ({"impl": "triton"}, ValueError, "impl: 'triton' wants CUDA tensors .* got cpu"),
        (
            {"impl": "cpu", "hidden": torch.zeros(4, 3).double(), "weight": torch.zeros(5, 3).double()},
            ValueError,
            "impl: 'cpu' computes in float32; float64 operands need 'reference'",
        ),
    ],
)
def test_linear_logprobs_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_logprobs(**(GOOD | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(4, 2)}, ValueError, r"hidden, weight: wanted \[T, H\] and \[V, H\]"),
        ({"target_ids": torch.tensor([0, 1, 2, 5])}, ValueError, r"target_ids: wanted values in \[0, 5\)"),
        ({"advantages": torch.zeros(3)}, ValueError, r"advantages: wanted one a scored row \(4\), got \(3,\)"),
        ({"advantages": torch.zeros(4).long()}, TypeError, "advantages: wanted a float tensor, got torch.int64"),
        ({"advantages": torch.zeros(4, requires_grad=True)}, ValueError, "advantages: no gradient .* detach it"),
        ({"advantages": torch.zeros(4, device="meta")}, ValueError, "advantages: wanted cpu, .* got meta"),
        ({"kind": "dpo"}, ValueError, "kind: wanted one of reinforce, ppo_clip, awr, got 'dpo'"),
        ({"kind": "ppo_clip"}, ValueError, "rollout_logprobs: kind 'ppo_clip' wants .* got None"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs: kl_coef 0.1 wants .* got None"),
        ({"ref_logprobs": torch.zeros(5)}, ValueError, r"ref_logprobs: wanted one a scored row \(4\), got \(5,\)"),
        ({"clip_low": 1.5}, ValueError, "clip_low, clip_high: wanted 0 <= clip_low <= 1 .* got 1.5, 0.2"),
        ({"clip_high": -0.1}, ValueError, "clip_low, clip_high: .* got 0.2, -0.1"),
        ({"num_actions": 0}, ValueError, "num_actions: wanted an integer above 0 or None, got 0"),
        ({"num_actions": 2.5}, ValueError, "num_actions: wanted an integer above 0 or None, got 2.5"),
        (
            {"kl_coef": math.nan, "ref_logprobs": torch.zeros(4)},
            ValueError,
            "kl_coef: wanted a finite number, 0 or more, got nan",
        ),
        ({"entropy_coef": math.inf}, ValueError, "entropy_coef: wanted a finite number, got inf"),
        ({"advantages": [0.0] * 4}, TypeError, "advantages: wanted a tensor, got list"),
        ({"awr_max_weight": 0.0}, ValueError, "awr_max_weight: wanted a number above 0, got 0.0"),
        ({"temperature": 0.0}, ValueError, "temperature: wanted a finite number above 0"),
        ({"impl": "fast"}, ValueError, "impl: wanted one of reference, cpu, triton or None, got 'fast'"),
    ],
)
def test_linear_policy_loss_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_policy_loss(**(GOOD | {"advantages": torch.zeros(4)} | changes))
