"""critic_loss against scalars in float64: each kind's values and gradients, its statistics, every bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm_head_cases import assert_no_worse, normal
from torch import Tensor

from archer_fast.ops import CriticLoss, critic_loss, last_impl

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")

KINDS = ["mse", "expectile", "huber"]
NAMES = ["q1", "q2", "v1", "v2"]


def problem(n: int, scale: float = 1.0, centre: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
    """Heads that wait for gradients, and targets on both sides of them."""
    numbers = [centre + scale * normal(n, seed=seed) for seed in range(8)]
    return [x.requires_grad_() for x in numbers[:4]], numbers[4:]


def per_value(name: str, u: Tensor, kind: str, expectile: float, delta: float) -> Tensor:
    """l(u) as the docstring writes it."""
    if kind == "huber":
        return torch.where(u.abs() <= delta, u**2 / 2, delta * (u.abs() - delta / 2))
    if kind == "expectile" and name.startswith("v"):
        return torch.where(u < 0, 1 - expectile, expectile) * u**2
    return u**2


def plain(heads: list[Tensor], targets: list[Tensor], kind: str, expectile: float, delta: float) -> list[Tensor]:
    """Each head's loss, differentiated by autograd, in the dtype given."""
    return [
        per_value(name, y - x, kind, expectile, delta).sum() / max(1, x.numel())
        for name, x, y in zip(NAMES, heads, targets, strict=True)
    ]


def op(impl: str) -> Any:
    """What the public function calls."""
    if impl != "triton":
        return torch.ops.archer_fast.critic_loss.default
    critic_loss(*[torch.zeros(1)] * 8)  # registers it
    return torch.ops.archer_fast.critic_loss_triton.default


def settings(impl: str, kind: str) -> tuple[Any, ...]:
    return (kind, 0.8, 0.9) if impl == "triton" else (kind, 0.8, 0.9, impl)


def losses_of(out: CriticLoss) -> Tensor:
    return torch.stack([out.q1, out.q2, out.v1, out.v2])


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 63, 1024, 3001])
def test_losses_and_gradients(impl: Any, n: int, kind: Any, scale: float) -> None:
    heads, targets = problem(n, scale)
    out = critic_loss(*heads, *targets, kind=kind, expectile=0.8, huber_delta=0.9, impl=impl)
    assert last_impl("critic_loss") == impl
    yardstick = torch.stack(plain(heads, targets, kind, 0.8, 0.9))
    wide = [x.detach().double().requires_grad_() for x in heads]
    exact = torch.stack(plain(wide, [x.double() for x in targets], kind, 0.8, 0.9))
    assert_no_worse(losses_of(out), yardstick, exact, condition=scale)
    assert_no_worse(out.loss, yardstick.sum(), exact.sum(), condition=scale)
    gradients = zip(
        torch.autograd.grad(out.loss, heads),
        torch.autograd.grad(yardstick.sum(), heads),
        torch.autograd.grad(exact.sum(), wide),
        strict=True,
    )
    for found, theirs, wanted in gradients:
        assert_no_worse(found, theirs, wanted)


@pytest.mark.parametrize(("scale", "centre"), [(1.0, 0.0), (1.0, -1000.0), (1e-3, 10.0), (0.0, 5.5)])
@pytest.mark.parametrize("n", [1, 2, 63, 1025, 3001])
def test_statistics(impl: Any, n: int, scale: float, centre: float) -> None:
    """The deviation too where the mean is a thousand times larger: mean of squares less square of mean is no way."""
    heads, targets = problem(n, scale, centre)
    stats = critic_loss(*heads, *targets, impl=impl).stats
    wide = torch.stack(heads).detach().double()
    torch.testing.assert_close(stats.mean.double(), wide.mean(1), rtol=1e-6, atol=1e-6)
    assert torch.equal(stats.min.double(), wide.amin(1)) and torch.equal(stats.max.double(), wide.amax(1))
    rounding = 3e-7 * abs(centre)
    torch.testing.assert_close(stats.std.double(), wide.std(1, correction=0), rtol=1e-5, atol=1e-7 + rounding)


def test_stacked_heads_learn_by_the_papers_formula(impl: Any) -> None:
    """As the trainer calls it, [2, n] for Q and for V: loss and gradients of plain torch, to float32 rounding."""
    q, v = (torch.stack(x).detach().requires_grad_() for x in (problem(256)[0][:2], problem(256)[0][2:]))
    q_target, v_target = (torch.stack(x) for x in (problem(256)[1][:2], problem(256)[1][2:]))
    loss = critic_loss(*q, *v, *q_target, *v_target, impl=impl).loss
    formula = (q - q_target).square().mean(1).sum() + (v - v_target).square().mean(1).sum()
    torch.testing.assert_close(loss, formula, rtol=1e-6, atol=0)
    for found, wanted in zip(torch.autograd.grad(loss, (q, v)), torch.autograd.grad(formula, (q, v)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_by_hand(impl: Any) -> None:
    heads = [torch.tensor(x) for x in ([1.0, 3.0], [0.0, 0.0], [2.0, -2.0], [5.0, 5.0])]
    targets = [torch.tensor(x) for x in ([2.0, 1.0], [0.0, 0.5], [4.0, -6.0], [5.0, 1.0])]

    def losses(**chosen: Any) -> list[float]:
        return losses_of(critic_loss(*heads, *targets, impl=impl, **chosen)).tolist()

    assert losses() == [2.5, 0.125, 10.0, 8.0]
    assert losses(kind="expectile", expectile=0.75) == [2.5, 0.125, (0.75 * 4 + 0.25 * 16) / 2, 2.0]
    assert losses(kind="expectile", expectile=0.5) == [2.5, 0.125, 5.0, 4.0]
    assert losses(kind="huber", huber_delta=1.0) == [1.0, 0.0625, 2.5, 1.75]
    stats = critic_loss(*heads, *targets, impl=impl).stats
    assert stats.mean.tolist() == [2.0, 0.0, 0.0, 5.0]
    assert stats.min.tolist() == [1.0, 0.0, -2.0, 5.0]
    assert stats.max.tolist() == [3.0, 0.0, 2.0, 5.0]
    assert stats.std.tolist() == [1.0, 0.0, 2.0, 0.0]


def test_half_at_an_expectile_of_a_half_and_at_a_wide_huber(impl: Any) -> None:
    heads, targets = problem(40)
    mse = losses_of(critic_loss(*heads, *targets, impl=impl))
    even = losses_of(critic_loss(*heads, *targets, kind="expectile", expectile=0.5, impl=impl))
    wide = losses_of(critic_loss(*heads, *targets, kind="huber", huber_delta=1e4, impl=impl))
    torch.testing.assert_close(even, mse * torch.tensor([1.0, 1.0, 0.5, 0.5]))
    torch.testing.assert_close(wide, mse / 2)


def test_the_minimum_of_the_expectile_loss_is_the_expectile(impl: Any) -> None:
    """Of targets 0 and 1, equally likely, it is the expectile itself: 0.9 (1 - v) = 0.1 v at v = 0.9."""
    v = torch.full((2,), 0.9, requires_grad=True)
    targets = torch.tensor([0.0, 1.0])
    zero = torch.zeros(2)
    out = critic_loss(zero, zero, v, v, zero, zero, targets, targets, kind="expectile", expectile=0.9, impl=impl)
    (gradient,) = torch.autograd.grad(out.loss, v)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-6) and gradient[0].item() > 0.1


@pytest.mark.parametrize("other", range(4))
def test_no_head_hears_of_another_heads_target(impl: Any, other: int) -> None:
    """A minimum over heads, as in TD3, would couple them; the paper's pairs are independent."""

    def gradients(shift: float) -> tuple[Tensor, ...]:
        heads, targets = problem(5)
        targets[other] += shift
        return torch.autograd.grad(critic_loss(*heads, *targets, impl=impl).loss, heads)

    for head, (before, after) in enumerate(zip(gradients(0.0), gradients(-100.0), strict=True)):
        assert torch.equal(before, after) == (head != other)


def test_only_the_loss_carries_a_gradient(impl: Any) -> None:
    heads, targets = problem(5)
    out = critic_loss(*heads, *targets, impl=impl)
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in (out.q1, out.q2, out.v1, out.v2, *out.stats))
    frozen = critic_loss(*(x.detach() for x in heads), *targets, impl=impl)
    assert not frozen.loss.requires_grad and torch.equal(frozen.loss, out.loss.detach())


def test_a_frozen_head_beside_trained_ones(impl: Any) -> None:
    heads, targets = problem(5)
    wanted = torch.autograd.grad(critic_loss(*heads, *targets, impl=impl).loss, heads)
    heads[2].requires_grad_(False)
    (3 * critic_loss(*heads, *targets, impl=impl).loss).backward()
    assert heads[2].grad is None
    for head in (0, 1, 3):
        torch.testing.assert_close(heads[head].grad, 3 * wanted[head])


@pytest.mark.parametrize("kind", KINDS)
def test_the_op_takes_any_upstream_gradient_of_each_row(impl: Any, kind: str) -> None:
    heads, targets = problem(11)
    upstream = torch.tensor([2.0, 0.0, -1.5, 0.5])
    values, wanted_values = torch.stack(heads).detach().requires_grad_(), torch.stack(targets)
    losses, stats, grads = op(impl)(values, wanted_values, *settings(impl, kind))
    assert losses.requires_grad and not stats.requires_grad and not grads.requires_grad
    (found,) = torch.autograd.grad(losses, values, upstream)
    wanted = torch.autograd.grad(torch.stack(plain(heads, targets, kind, 0.8, 0.9)), heads, upstream)
    torch.testing.assert_close(found, torch.stack(wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_by_differences(kind: Any) -> None:
    heads, targets = problem(6)
    wide = [x.detach().double().requires_grad_() for x in heads]
    assert torch.autograd.gradcheck(lambda *x: critic_loss(*x, *targets, kind=kind).loss, wide)
    assert last_impl("critic_loss") == "reference"


def test_second_derivatives_are_refused(impl: Any) -> None:
    heads, targets = problem(6)
    loss = critic_loss(*heads, *targets, impl=impl).loss
    (gradient,) = torch.autograd.grad(loss.square(), heads[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_nan_is_its_own_heads_affair(impl: Any) -> None:
    heads, targets = problem(40)
    clean = critic_loss(*heads, *targets, impl=impl)
    with torch.no_grad():
        heads[1][7] = torch.nan
    targets[3][39] = torch.nan
    out = critic_loss(*heads, *targets, impl=impl)
    assert losses_of(out).isnan().tolist() == [False, True, False, True] and out.loss.isnan()
    for x, y in zip(out.stats, clean.stats, strict=True):
        assert x.isnan().tolist() == [False, True, False, False]
        assert torch.equal(x[[0, 2, 3]], y[[0, 2, 3]])
    gradients = torch.autograd.grad(out.loss, heads)
    assert [int(g.isnan().sum()) for g in gradients] == [0, 1, 0, 1]
    assert gradients[1][7].isnan() and gradients[3][39].isnan()


def test_no_turns_cost_nothing(impl: Any) -> None:
    heads, targets = problem(0)
    out = critic_loss(*heads, *targets, impl=impl)
    out.loss.backward()
    assert out.loss.item() == 0.0 and losses_of(out).tolist() == [0.0] * 4
    assert all(x.isnan().all() for x in out.stats)
    assert all(head.grad is not None and head.grad.shape == (0,) for head in heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(impl: Any, dtype: torch.dtype) -> None:
    heads, targets = problem(63)
    halves = [x.detach().to(dtype).requires_grad_() for x in heads]
    out = critic_loss(*halves, *targets, impl=impl)
    wanted = critic_loss(*(x.float() for x in halves), *targets, impl=impl)
    assert out.loss.dtype == out.stats.mean.dtype == torch.float32 and torch.equal(out.loss, wanted.loss)
    for found, exact in zip(
        torch.autograd.grad(out.loss, halves), torch.autograd.grad(wanted.loss, halves), strict=True
    ):
        assert found.dtype == dtype and torch.equal(found, exact)


def test_strided_views(impl: Any) -> None:
    heads, targets = problem(40)
    columns = torch.stack([*heads, *targets], 1).detach()  # [n, 8]
    assert torch.equal(
        critic_loss(*columns.unbind(1), impl=impl).loss, critic_loss(*heads, *targets, impl=impl).loss.detach()
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"),
        lambda f: torch.autocast(torch.get_default_device().type, torch.bfloat16)(f),
    ],
    ids=["compile", "autocast"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_under_autocast(impl: Any, kind: Any, wrap: Callable[..., Any]) -> None:
    heads, targets = problem(20)

    def loss(*heads: Tensor) -> CriticLoss:
        return critic_loss(*heads, *targets, kind=kind, impl=impl)

    plainly, wrapped = loss(*heads), wrap(loss)(*heads)
    for x, y in zip((*plainly[:5], *plainly.stats), (*wrapped[:5], *wrapped.stats), strict=True):
        assert torch.equal(x, y) and x.requires_grad == y.requires_grad
    for x, y in zip(torch.autograd.grad(plainly.loss, heads), torch.autograd.grad(wrapped.loss, heads), strict=True):
        assert torch.equal(x, y)
    assert last_impl("critic_loss") == impl


@pytest.mark.filterwarnings("ignore::UserWarning")  # opcheck's own, of torch internals
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(impl: Any, kind: str) -> None:
    heads, targets = problem(9)
    values = torch.stack(heads).detach().requires_grad_()
    torch.library.opcheck(op(impl), (values, torch.stack(targets), *settings(impl, kind)))


def test_a_cpu_runs_the_cpp_kernel() -> None:
    heads, targets = problem(9)
    critic_loss(*heads, *targets)
    assert last_impl("critic_loss") == "cpu"


GOOD: dict[str, Any] = {name: torch.zeros(4) for name in [*NAMES, *(f"{name}_target" for name in NAMES)]}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"v1": torch.zeros(5)}, ValueError, r"v1: wanted \[n\] = \(4,\) as q1, got \(5,\)"),
        ({"v2_target": torch.zeros(4, 1)}, ValueError, r"v2_target: wanted \[n\] = \(4,\) as q1, got \(4, 1\)"),
        ({"q1": torch.zeros(4, 1)}, ValueError, r"q1: wanted \[n\], got \(4, 1\)"),
        ({"q2": torch.zeros(4).int()}, TypeError, "q2: wanted a float tensor, got torch.int32"),
        ({"q2_target": torch.zeros(4, device="meta")}, ValueError, "q2_target: wanted cpu, where q1 is, got meta"),
        (
            {"q1_target": torch.zeros(4, requires_grad=True)},
            ValueError,
            "q1_target: targets carry no gradient, got a tensor that requires one; detach it",
        ),
        ({"kind": "mae"}, ValueError, "kind: wanted one of mse, expectile, huber, got 'mae'"),
        ({"expectile": 0.0}, ValueError, r"expectile: wanted a number between 0 and 1, got 0\.0"),
        ({"expectile": 1.0}, ValueError, r"expectile: wanted a number between 0 and 1, got 1\.0"),
        ({"expectile": math.nan}, ValueError, "expectile: wanted a number between 0 and 1, got nan"),
        ({"huber_delta": 0.0}, ValueError, r"huber_delta: wanted a finite number above 0, got 0\.0"),
        ({"huber_delta": math.inf}, ValueError, "huber_delta: wanted a finite number above 0, got inf"),
        ({"impl": "cuda"}, ValueError, "impl: wanted one of reference, cpu, triton or None, got 'cuda'"),
        ({"impl": "triton"}, ValueError, r"impl: 'triton' wants CUDA tensors \(or TRITON_INTERPRET=1\), got cpu"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        critic_loss(**(GOOD | changes))
