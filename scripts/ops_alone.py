"""Run by test_ops_alone.sh where torch is all there is: every op once, forward and backward, against plain torch."""

from __future__ import annotations

import importlib.util

import torch

from archer_fast import ops

for absent in ("numpy", "transformers", "tyro", "rich", "safetensors"):
    assert importlib.util.find_spec(absent) is None, f"{absent} is installed here: this environment proves nothing"

torch.manual_seed(0)
hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
target_ids, advantages = torch.randint(50, (6,)), torch.randn(6)
plain = (hidden @ weight.T).log_softmax(-1).gather(1, target_ids[:, None]).squeeze(1)
wanted = torch.autograd.grad(-(advantages * plain).mean(), (hidden, weight))

for impl in (None, "reference"):
    logprobs = ops.linear_logprobs(hidden, weight, target_ids, impl=impl).logprobs
    torch.testing.assert_close(logprobs, plain)
    loss = ops.linear_policy_loss(hidden, weight, target_ids, advantages, impl=impl).loss
    for out in (loss, -(advantages * logprobs).mean()):
        for got, expected in zip(torch.autograd.grad(out, (hidden, weight)), wanted, strict=True):
            torch.testing.assert_close(got, expected)
    assert ops.last_impl("linear_policy_loss") == (impl or "cpu")

    y = ops.segment_scan(torch.full((5,), 0.5), torch.ones(5), torch.tensor([0, 2, 5], dtype=torch.int32), impl=impl)
    assert y.tolist() == [1.5, 1.0, 1.75, 1.5, 1.0]

    heads = [torch.tensor([1.0, 3.0], requires_grad=True) for _ in range(4)]
    out = ops.critic_loss(*heads, *(torch.tensor([0.0, 1.0]) for _ in range(4)), impl=impl)
    assert out.loss.item() == 10.0 and torch.autograd.grad(out.loss, heads[0])[0].tolist() == [1.0, 2.0]

target, param = [torch.zeros(2)], [torch.ones(2)]
ops.polyak_(target, param, 0.25)
assert target[0].tolist() == [0.25, 0.25]
print("== ops alone: all right")
