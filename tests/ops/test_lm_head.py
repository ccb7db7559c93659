"""The chunk loop: what it allocates, which products it makes, and in what its sums are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_head_cases import H, V, normal, plain, problem
from torch import Tensor

from archer_fast.ops import linear_logprobs, linear_policy_loss, lm_head

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")


def test_nothing_of_n_by_v_is_allocated(cpu_impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made, forward and backward, is a chunk: seen by a spy on every allocation."""
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", {"cpu": 16 * 4 * V})
    sizes: list[int] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))
            return out

    head = lm_head.LmHead(
        *(x.detach() for x in problem(200)[:2]), problem(200)[2], None, None, torch.ones(200), None, cpu_impl
    )
    with Spy():
        lm_head.score(head, scoring_only=True)
        loop = lm_head.ChunkLoop(head, needs=(True, False, False))
        for chunk in loop.chunks():
            loop.backward(chunk, loop.scores(chunk), torch.ones(len(chunk.hidden)), None, None)
    assert max(sizes) == max(V * H, 16 * V)


def test_without_gradients_only_tiles_are_made(cpu_impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "COLUMN_BLOCK", 100)
    widths: list[int] = []
    product = lm_head._product
    monkeypatch.setattr(lm_head, "_product", lambda out, *a: [widths.append(out.shape[1]), product(out, *a)][1])
    inputs = problem(20)
    with torch.no_grad():
        out = linear_policy_loss(*inputs, normal(20, seed=2), impl=cpu_impl)
    assert not out.loss.requires_grad and set(widths) == {100, 3}
    torch.testing.assert_close(out.loss, linear_policy_loss(*inputs, normal(20, seed=2), impl=cpu_impl).loss.detach())


def test_three_products_with_the_vocabulary_and_no_fourth(impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One product [N, V] for logits, one for each gradient: a per-token API needs the first twice."""
    inputs = problem(20)
    flops = {"forward": 0, "hidden": 0, "weight": 0}
    product, add_product = lm_head._product, lm_head._add_product

    def count_logits(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
        flops["forward"] += out.numel()
        product(out, hidden, weight)

    def count_gradients(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
        is_weight = right.untyped_storage().data_ptr() == inputs[1].untyped_storage().data_ptr()
        flops["hidden" if is_weight else "weight"] += left.numel()
        add_product(total, left, right, is_first)

    monkeypatch.setattr(lm_head, "_product", count_logits)
    monkeypatch.setattr(lm_head, "_add_product", count_gradients)
    linear_policy_loss(*inputs, normal(20, seed=2), impl=impl).loss.backward()
    assert flops == {"forward": 20 * V, "hidden": 20 * V, "weight": 20 * V}
    linear_logprobs(*inputs, impl=impl).logprobs.sum().backward()
    assert flops == {"forward": 60 * V, "hidden": 40 * V, "weight": 40 * V}


@pytest.mark.parametrize("num_rows", [70, 110])  # in memory lent by a gradient 80 wide, in the op's own
@pytest.mark.parametrize("trained", ["both", "hidden"])
def test_rows_that_fill_a_product_are_nobodys(impl: Any, trained: str, num_rows: int) -> None:
    hidden, weight = normal(200, 80, seed=1).requires_grad_(), normal(V, 80, seed=2).requires_grad_(trained == "both")
    rows, target_ids = torch.arange(num_rows).flip(0), torch.arange(num_rows) * 9
    bias = torch.zeros(V).index_fill(0, torch.tensor([900]), -torch.inf)
    advantages = normal(num_rows, seed=2)
    out = linear_policy_loss(hidden, weight, target_ids, advantages, rows=rows, bias=bias, impl=impl)
    logprobs, _, _ = plain(hidden.double()[rows], weight.double(), target_ids, bias=bias.double())
    torch.testing.assert_close(out.logprobs.double(), logprobs, rtol=1e-5, atol=1e-5)
    operands = [hidden, weight][: 2 if trained == "both" else 1]
    found, wanted = (torch.autograd.grad(x, operands) for x in (out.loss, -(advantages.double() * logprobs).mean()))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_sums_over_chunks_are_kept_in_float32(impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, 400 equal contributions to dWeight would stop adding up at 256."""
    monkeypatch.setattr(lm_head, "MAX_CHUNK_ROWS", {"cpu": 8, "cuda": 8})
    hidden = torch.ones(3200, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_logprobs(hidden, weight, torch.zeros(3200).long(), impl=impl).logprobs.sum().backward()
    assert weight.grad is not None and weight.grad.flatten().tolist() == [1600.0, -1600.0]


def test_sums_of_float16_rows_outgrow_float16_before_they_are_divided(impl: Any) -> None:
    """1,600 rows that pull the same way by 50 each: 80,000 is more than 65,504."""
    hidden = torch.full((1600, 1), 100.0, dtype=torch.float16)
    weight = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True)
    linear_policy_loss(hidden, weight, torch.zeros(1600).long(), torch.ones(1600), impl=impl).loss.backward()
    assert weight.grad is not None and weight.grad.flatten().tolist() == [-50.0, 50.0]
