"""linear_policy_loss against the same loss in plain torch on linear_logprobs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm_head_cases import KINDS, V, assert_no_worse, normal, plain, problem
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from archer_fast.ops import last_impl, linear_logprobs, linear_policy_loss

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")

LOSSES = ["reinforce", "ppo_clip", "awr"]


def per_row(num_rows: int, seed: int) -> Tensor:
    return normal(num_rows, seed=seed)


def plain_loss(
    logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    *,
    kind: str,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    awr_beta: float = 1.0,
    awr_max_weight: float = 20.0,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    num_actions: float | None = None,
) -> Tensor:
    """The docstring's equation, differentiated by autograd."""
    if kind == "reinforce":
        loss = -advantages * logprobs
    elif kind == "awr":
        loss = -(awr_beta * advantages).exp().clamp(max=awr_max_weight) * logprobs
    else:
        assert rollout_logprobs is not None
        ratio = (logprobs - rollout_logprobs).exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if ref_logprobs is not None:
        loss = loss + kl_coef * 0.5 * (logprobs - ref_logprobs) ** 2
    loss = loss - entropy_coef * entropy
    return loss.sum() / (max(loss.numel(), 1) if num_actions is None else num_actions)


def cases(num_rows: int, logprobs: Tensor) -> dict[str, Any]:
    """Everything on: ratios on both sides of the clip, a reference, an entropy bonus."""
    return {
        "rollout_logprobs": (logprobs + 0.3 * per_row(num_rows, 3)).detach().float(),
        "ref_logprobs": (logprobs + 0.5 * per_row(num_rows, 4)).detach().float(),
        "clip_low": 0.2,
        "clip_high": 0.28,
        "kl_coef": 0.1,
        "entropy_coef": 0.05,
        "num_actions": 7,
    }


@pytest.mark.parametrize("temperature", [1.0, 0.8])  # 1 / .8 is exact: ops hold the inverse in float32
@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("num_rows", [0, 1, 63])
def test_equals_the_plain_loss(impl: Any, pieces: str, num_rows: int, kind: Any, case: str, temperature: float) -> None:
    hidden, weight, target_ids = problem(num_rows, case)
    advantages = per_row(num_rows, 2)
    wide = (hidden.double(), weight.double())
    exact = plain(*wide, target_ids, temperature)
    settings = cases(num_rows, exact[0])
    out = linear_policy_loss(
        hidden, weight, target_ids, advantages, kind=kind, temperature=temperature, impl=impl, **settings
    )
    assert last_impl("linear_policy_loss") == impl
    yardstick = plain(hidden, weight, target_ids, temperature)
    losses = (
        out.loss,
        plain_loss(*yardstick[:2], advantages, kind=kind, **settings),
        plain_loss(*exact[:2], advantages, kind=kind, **settings),
    )
    # exp(log pi - log rollout) enlarges the rounding of the logits, which is relative to their size; and the gradient
    # of hidden's first column is the sum of numbers near -256 that cancel.
    is_ill = kind == "ppo_clip" or case == "near -256"
    condition = max(1.0, *((wide[0] @ wide[1].T).abs().flatten().tolist() or [1.0])) if is_ill else 1.0
    assert_no_worse(*losses, condition=condition)
    policy_alone = plain_loss(*exact[:2], advantages, **(settings | {"kind": kind, "kl_coef": 0, "entropy_coef": 0}))
    torch.testing.assert_close(out.metrics.policy_loss.double(), policy_alone, rtol=1e-3, atol=1e-4)
    assert_no_worse(out.logprobs, yardstick[0], exact[0])
    assert_no_worse(out.entropy, yardstick[1], exact[1])
    for found in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in losses), strict=True):
        assert_no_worse(*found, condition=condition)


@pytest.mark.parametrize("kind", LOSSES)
def test_equals_the_same_loss_on_linear_logprobs(impl: Any, pieces: str, kind: Any) -> None:
    """With rows, bias, soft cap and a temperature a row: what the issue calls its definition."""
    hidden, weight, _ = problem(30)
    bias = per_row(V, 6).requires_grad_()
    rows = torch.tensor([3, 3, 29, 0, 7, 3, 12, 3, 28, 1, 1])
    target_ids = torch.arange(11) * 90
    head: dict[str, Any] = {
        "rows": rows,
        "bias": bias,
        "temperature": torch.linspace(0.5, 2.0, 11),
        "softcap": 4.0,
        "impl": impl,
    }
    scored = linear_logprobs(hidden, weight, target_ids, return_entropy=True, **head)
    assert scored.entropy is not None
    settings = cases(11, scored.logprobs)
    advantages = per_row(11, 2)
    out = linear_policy_loss(hidden, weight, target_ids, advantages, kind=kind, **head, **settings)
    wanted = plain_loss(scored.logprobs, scored.entropy, advantages, kind=kind, **settings)
    torch.testing.assert_close(out.loss, wanted)
    torch.testing.assert_close(out.logprobs, scored.logprobs)
    torch.testing.assert_close(out.entropy, scored.entropy)
    operands = (hidden, weight, bias)
    found, expected = torch.autograd.grad(3.0 * out.loss, operands), torch.autograd.grad(3.0 * wanted, operands)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert (found[0][[2, 4, 27]] == 0).all()  # nobody scored them


def test_float64_runs_on_the_reference_and_is_exact() -> None:
    hidden, weight, target_ids = (x.detach().double() if x.is_floating_point() else x for x in problem(20))
    hidden.requires_grad_(), weight.requires_grad_()
    advantages = per_row(20, 2).double()
    out = linear_policy_loss(hidden, weight, target_ids, advantages, entropy_coef=0.1)
    assert last_impl("linear_policy_loss") == "reference" and out.loss.dtype == torch.float64
    logprobs, entropy, _ = plain(hidden, weight, target_ids)
    wanted = plain_loss(logprobs, entropy, advantages, kind="reinforce", entropy_coef=0.1)
    torch.testing.assert_close(out.loss, wanted, rtol=1e-12, atol=0)
    found, expected = (torch.autograd.grad(x, (hidden, weight)) for x in (out.loss, wanted))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-14)


def test_the_metrics_by_hand(impl: Any) -> None:
    weight = torch.eye(2, requires_grad=True)
    hidden = torch.tensor([[0.0, 0.0], [0.0, 0.0], [math.log(3.0), 0.0]])
    target_ids = torch.tensor([0, 1, 0])  # probabilities 1/2, 1/2, 3/4
    out = linear_policy_loss(
        hidden,
        weight,
        target_ids,
        torch.tensor([1.0, -1.0, 2.0]),
        kind="ppo_clip",
        rollout_logprobs=torch.tensor([0.5, 0.25, 0.5]).log(),  # ratios 1, 2, 3/2
        ref_logprobs=torch.tensor([0.25, 0.5, 0.75]).log(),
        impl=impl,
    )
    m = out.metrics
    assert out.logprobs.exp().tolist() == pytest.approx([0.5, 0.5, 0.75])
    assert out.loss.item() == pytest.approx(-(1.0 - 2.0 + 1.2 * 2) / 3)
    assert m.ratio is not None and m.ratio.item() == pytest.approx(4.5 / 3)
    assert m.clip_fraction is not None and m.clip_fraction.item() == pytest.approx(2 / 3)
    k3 = [0.0, 1 - math.log(2), 0.5 - math.log(1.5)]
    assert m.approx_kl is not None and m.approx_kl.item() == pytest.approx(sum(k3) / 3)
    assert m.ref_kl is not None and m.ref_kl.item() == pytest.approx(0.5 * math.log(2) ** 2 / 3)


def test_metrics_are_none_where_there_is_nothing_to_compare_with() -> None:
    assert linear_policy_loss(*problem(3), per_row(3, 2)).metrics[1:] == (None, None, None, None)


def test_only_the_loss_carries_a_gradient() -> None:
    out = linear_policy_loss(*problem(5), per_row(5, 2), rollout_logprobs=per_row(5, 3))
    assert out.loss.requires_grad and not out.logprobs.requires_grad and not out.entropy.requires_grad
    assert out.metrics.ratio is not None and not out.metrics.ratio.requires_grad


def test_awr_weights_are_clamped(impl: Any) -> None:
    hidden, weight, target_ids = problem(2)
    out = linear_policy_loss(
        hidden, weight, target_ids, torch.tensor([100.0, -1.0]), kind="awr", awr_beta=2.0, awr_max_weight=5.0, impl=impl
    )
    wanted = -(5.0 * out.logprobs[0] + math.exp(-2.0) * out.logprobs[1]) / 2
    torch.testing.assert_close(out.loss.detach(), wanted)


def test_a_token_of_advantage_zero_that_is_now_excluded_has_no_say(impl: Any) -> None:
    """log pi = -inf times 0 would be NaN."""
    hidden, weight, _ = problem(2)
    bias = torch.zeros(V)
    bias[3] = -torch.inf
    out = linear_policy_loss(hidden, weight, torch.tensor([3, 5]), torch.tensor([0.0, 1.0]), bias=bias, impl=impl)
    assert out.loss.isfinite()
    gradients = torch.autograd.grad(out.loss, (hidden, weight))
    assert (gradients[0][0] == 0).all() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("trained", [0, 1])
def test_one_side_frozen(impl: Any, pieces: str, trained: int) -> None:
    inputs = problem(20)
    wanted = torch.autograd.grad(linear_policy_loss(*inputs, per_row(20, 2), impl=impl).loss, inputs[trained])[0]
    inputs[1 - trained].requires_grad_(False)
    linear_policy_loss(*inputs, per_row(20, 2), impl=impl).loss.backward()
    torch.testing.assert_close(inputs[trained].grad, wanted)
    assert inputs[1 - trained].grad is None


def test_the_weights_gradient_is_handed_out_once() -> None:
    for factor in (1, 2):
        inputs = problem(5)
        loss = linear_policy_loss(*inputs, per_row(5, 2)).loss
        (factor * loss).backward(retain_graph=True)
        with pytest.raises(
            RuntimeError, match="linear_policy_loss: the gradient of weight was handed out by an earlier"
        ):
            loss.backward()
    inputs[1].requires_grad_(False)
    loss = linear_policy_loss(*inputs, per_row(5, 2)).loss
    first, second = (torch.autograd.grad(2 * loss, inputs[0], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_second_derivatives_are_refused() -> None:
    hidden, weight, target_ids = problem(4)
    loss = linear_policy_loss(hidden, weight.detach(), target_ids, per_row(4, 2)).loss
    (gradient,) = torch.autograd.grad(loss**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_float16_under_a_loss_scale_keeps_its_digits(impl: Any) -> None:
    """Divided by 4096 actions before they are rounded, most gradients would underflow; 2^16 itself is not float16."""
    hidden, weight, target_ids = (x.detach() for x in problem(63))
    hidden, weight = hidden.half().requires_grad_(), weight.half().requires_grad_()
    advantages = per_row(63, 2)
    settings: dict[str, Any] = {"kind": "reinforce", "num_actions": 4096}
    out = linear_policy_loss(hidden, weight, target_ids, advantages, impl=impl, **settings)
    losses = [out.loss]
    losses += [
        plain_loss(*plain(h, w, target_ids)[:2], advantages, **settings)
        for h, w in ((hidden, weight), (hidden.double(), weight.double()))
    ]
    gradients = [torch.autograd.grad(loss * 2.0**16, (hidden, weight)) for loss in losses]
    for found in zip(*gradients, strict=True):
        assert found[0].isfinite().all()
        assert_no_worse(*found)


def test_compiled_once_for_any_number_of_tokens() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def loss(*args: Any, num_actions: int | None) -> Tensor:
        return linear_policy_loss(*args, num_actions=num_actions).loss

    for varied in (False, True):
        graphs.clear()
        torch.compiler.reset()
        compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
        for n in range(5, 17):
            inputs, advantages = problem(n), per_row(n, 2)
            num_actions = n - 2 if varied else None
            torch.testing.assert_close(
                compiled(*inputs, advantages, num_actions=num_actions),
                loss(*inputs, advantages, num_actions=num_actions),
            )
        assert len(graphs) <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain_torch(impl: Any, pieces: str, dtype: torch.dtype) -> None:
    hidden, weight, target_ids = (x.detach() for x in problem(63))
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    advantages = per_row(63, 2)
    out = linear_policy_loss(hidden, weight, target_ids, advantages, entropy_coef=0.1, num_actions=3, impl=impl)
    assert out.loss.dtype == out.logprobs.dtype == torch.float32
    yardstick = plain(hidden, weight, target_ids)
    exact = plain(hidden.double(), weight.double(), target_ids)
    losses = [out.loss]
    losses += [
        plain_loss(*x[:2], advantages, kind="reinforce", entropy_coef=0.1, num_actions=3) for x in (yardstick, exact)
    ]
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in losses]
    assert gradients[0][0].dtype == gradients[0][1].dtype == dtype
    for found in zip(*gradients, strict=True):
        assert_no_worse(*found)


def test_autocast(impl: Any) -> None:
    hidden, weight, target_ids = problem(20)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        inside = linear_policy_loss(hidden, weight, target_ids, per_row(20, 2), impl=impl)
    by_hand = linear_policy_loss(hidden.bfloat16(), weight.bfloat16(), target_ids, per_row(20, 2), impl=impl)
    assert torch.equal(inside.loss, by_hand.loss)
    found, wanted = (torch.autograd.grad(x.loss, (hidden, weight)) for x in (inside, by_hand))
    assert all(torch.equal(x, y) and x.dtype == torch.float32 for x, y in zip(found, wanted, strict=True))


def actor(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    advantages = per_row(20, 2).to(hidden.device)
    return linear_policy_loss(hidden * 1.5, weight, target_ids, advantages, entropy_coef=0.1).loss * 2


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"),
        lambda f: lambda *a: checkpoint(f, *a, use_reentrant=False),
    ],
    ids=["compile", "checkpoint"],
)
def test_compiled_and_checkpointed(wrap: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = per_row(20, 2)
    monkeypatch.setitem(globals(), "per_row", lambda *_: fixed)  # a generator is not for dynamo
    inputs = problem(20)
    wanted = torch.autograd.grad(actor(*inputs), inputs[:2])
    wrap(actor)(*inputs).backward()
    for x, gradient in zip(inputs[:2], wanted, strict=True):
        torch.testing.assert_close(x.grad, gradient)
    assert last_impl("linear_policy_loss") == "cpu"


@pytest.mark.filterwarnings("ignore::UserWarning")  # opcheck's own, of torch internals
def test_opcheck(impl: Any) -> None:
    hidden, weight, target_ids = problem(9)
    a, ones = per_row(9, 2), torch.ones(9)
    coefficients = [0.2, 0.2, 1.0, 20.0, 0.1, 0.1]
    needs = [True, True, False]
    # One action: backward scales the op's own output in place, which opcheck compares with a compiled twin's.
    args = (hidden, weight, target_ids, a, None, None, a, a, ones, None, "ppo_clip", coefficients, 1, needs, impl)
    torch.library.opcheck(torch.ops.archer_fast.linear_policy_loss.default, args)


def test_a_reference_that_excludes_a_token_spoils_nothing_but_its_own_metric(impl: Any) -> None:
    """With kl_coef 0 it is there to be looked at: 0 times infinity would make the policy's loss NaN."""
    inputs, advantages = problem(2), torch.tensor([1.0, -1.0])
    out = linear_policy_loss(*inputs, advantages, ref_logprobs=torch.tensor([-torch.inf, -1.0]), impl=impl)
    plain_out = linear_policy_loss(*inputs, advantages, impl=impl)
    assert torch.equal(out.loss, plain_out.loss)
    assert torch.equal(out.metrics.policy_loss, plain_out.metrics.policy_loss)
    assert out.metrics.ref_kl is not None and out.metrics.ref_kl.isinf()
