"""The ops on the vocabulary with impl="triton": the chunk loop, the fused scoring and the kernels together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from archer_fast.ops import last_impl, linear_logprobs, linear_policy_loss, lm_head

N, T, H, V = 11, 15, 24, 203


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "MAX_CHUNK_ROWS", {"cpu": 8})
    monkeypatch.setattr(lm_head, "COLUMN_BLOCK", 128)


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, target_ids, rows (with repeats)."""
    hidden, weight, bias = torch.randn(T, H), torch.randn(V, H) / H**0.5, torch.randn(V)
    rows, target_ids = torch.randint(0, T - 3, (N,)), torch.randint(0, V, (N,))
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
    return hidden, weight, bias, target_ids, rows


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, target_ids: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    z = 4.0 * ((hidden[rows] @ weight.T + bias) / 4.0).tanh() / 0.8
    logprobs = z.log_softmax(-1)
    at_target = logprobs.gather(1, target_ids[:, None]).squeeze(1)
    return at_target, -(logprobs.exp() * logprobs).sum(-1), z.logsumexp(-1)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in tensors]


TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 2e-2), torch.float16: (2e-3, 2e-3)}


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    rtol, atol = TOLERANCES[dtype]
    scale = max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(found.double(), wanted.double(), rtol=rtol, atol=atol * scale)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_log_probs_entropy_and_lse_with_their_gradients(dtype: torch.dtype) -> None:
    hidden, weight, bias, target_ids, rows = operands(dtype)
    head: dict[str, Any] = {"rows": rows, "bias": bias, "temperature": 0.8, "softcap": 4.0, "impl": "triton"}
    out = linear_logprobs(hidden, weight, target_ids, return_entropy=True, return_lse=True, **head)
    assert last_impl("linear_logprobs") == "triton"
    exact = plain(*wide(hidden, weight, bias, target_ids, rows))
    gs = [torch.randn(N) for _ in range(3)]
    for found, wanted in zip(out, exact, strict=True):
        assert found is not None and found.dtype == torch.float32
        assert_close(found, wanted, dtype)
    found_grads = torch.autograd.grad([x for x in out if x is not None], (hidden, weight, bias), gs)
    assert last_impl("linear_logprobs_backward") == "triton"
    wanted_grads = torch.autograd.grad(exact, (hidden, weight, bias), [g.double() for g in gs])
    for found, wanted in zip(found_grads, wanted_grads, strict=True):
        assert found.dtype == dtype
        assert_close(found, wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scoring_in_half_precision_takes_the_fused_kernel(
    launched: list[Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """No logits chunk exists there; float32 has no tensor cores and keeps the library's product."""
    hidden, weight, bias, target_ids, rows = operands(dtype)
    with torch.no_grad():
        out = linear_logprobs(
            hidden, weight, target_ids, rows=rows, bias=bias, temperature=0.8, softcap=4.0, return_entropy=True,
            return_lse=True, impl="triton",
        )  # fmt: skip
    assert {variant.kernel.fn.__name__ for variant, _ in launched} == {"linear_logprobs_fwd_kernel"}
    for found, wanted in zip(out, plain(*wide(hidden, weight, bias, target_ids, rows)), strict=True):
        assert found is not None
        assert_close(found, wanted.detach(), dtype)


@pytest.mark.parametrize("kind", ["reinforce", "ppo_clip", "awr"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_policy_loss_with_its_gradients(dtype: torch.dtype, kind: Any) -> None:
    hidden, weight, _, target_ids, rows = operands(dtype)
    advantages = torch.randn(N)
    at = linear_logprobs(hidden, weight, target_ids, rows=rows, impl="reference").logprobs.detach()
    settings: dict[str, Any] = {
        "rows": rows,
        "kind": kind,
        "rollout_logprobs": at + 0.3 * torch.randn(N).sign(),  # away from the clip's corner
        "ref_logprobs": at + torch.randn(N),
        "kl_coef": 0.1,
        "entropy_coef": 0.1,
    }
    found, wanted = (
        linear_policy_loss(hidden, weight, target_ids, advantages, impl=impl, **settings)
        for impl in ("triton", "reference")
    )
    assert_close(found.loss, wanted.loss, dtype)
    gradients = [torch.autograd.grad(2 * out.loss, (hidden, weight)) for out in (found, wanted)]
    for x, y in zip(*gradients, strict=True):
        assert_close(x, y, dtype)


def test_no_rows(launched: list[Any]) -> None:
    hidden, weight, _, target_ids, rows = operands(torch.float32)
    out = linear_policy_loss(hidden, weight, target_ids[:0], torch.zeros(0), rows=rows[:0], impl="triton")
    assert out.loss.item() == 0.0 and launched == []
    for gradient in torch.autograd.grad(out.loss, (hidden, weight)):
        assert (gradient == 0).all()
