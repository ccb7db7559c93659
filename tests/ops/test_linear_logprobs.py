"""linear_logprobs against float64 truth: values and gradients where peers went wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm_head_cases import KINDS, H, V, assert_no_worse, normal, plain, problem, upstream
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from archer_fast.ops import last_impl, linear_logprobs, lm_head

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")


def as_tuple(out: Any) -> tuple[Tensor, Tensor, Tensor]:
    assert out.entropy is not None and out.lse is not None
    return out.logprobs, out.entropy, out.lse


def double(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in tensors)


@pytest.mark.parametrize("temperature", [1.0, 0.8])  # 1 / .8 is exact: ops hold the inverse in float32
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [0, 1, 63])
def test_values_and_gradients(impl: Any, pieces: str, num_rows: int, kind: str, temperature: float) -> None:
    inputs = problem(num_rows, kind)
    got = linear_logprobs(*inputs, temperature=temperature, return_entropy=True, return_lse=True, impl=impl)
    assert last_impl("linear_logprobs") == impl
    mine = as_tuple(got)
    assert all(x.dtype == torch.float32 for x in mine)
    assert (got.logprobs <= 0).all()  # phantom columns would lift them
    assert got.entropy is not None and (got.entropy >= 0).all() and (got.entropy <= math.log(V) + 1e-5).all()

    g = upstream(num_rows)
    yardsticks, truths = plain(*inputs, temperature), plain(*double(*inputs), temperature)
    for outputs in zip(mine, yardsticks, truths, strict=True):
        assert_no_worse(*outputs)
        gradients = [torch.autograd.grad(y, inputs[:2], g.to(y.dtype), retain_graph=True) for y in outputs]
        for found in zip(*gradients, strict=True):
            assert_no_worse(*found)


def test_all_three_upstream_gradients_at_once(impl: Any, pieces: str) -> None:
    inputs = problem(20, "peaked")
    mine = as_tuple(linear_logprobs(*inputs, return_entropy=True, return_lse=True, impl=impl))
    gs = [upstream(20, seed) for seed in (1, 2, 3)]

    def gradients(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, inputs[:2], [g.to(y.dtype) for g, y in zip(gs, outputs, strict=True)])

    found = [gradients(outputs) for outputs in (mine, plain(*inputs), plain(*double(*inputs)))]
    for each in zip(*found, strict=True):
        assert_no_worse(*each)


def test_the_reference_passes_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*size, dtype=torch.float64, generator=generator).requires_grad_()
        for size in ((6, 5), (11, 5), (11,))
    )
    rows, target_ids = torch.tensor([3, 3, 0, 5]), torch.tensor([10, 0, 4, 4])

    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return as_tuple(
            linear_logprobs(
                hidden,
                weight,
                target_ids,
                rows=rows,
                bias=bias,
                temperature=torch.tensor([0.5, 1.0, 2.0, 0.9]),
                softcap=2.0,
                return_entropy=True,
                return_lse=True,
            )
        )

    assert torch.autograd.gradcheck(op, (hidden, weight, bias))
    assert last_impl("linear_logprobs") == "reference"  # what float64 runs on


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("per_row", [False, True])
def test_bias_softcap_and_a_temperature_each(impl: Any, pieces: str, softcap: float | None, per_row: bool) -> None:
    hidden, weight, target_ids = problem(20)
    bias = normal(V, seed=5).requires_grad_()
    temperature: Any = torch.linspace(0.3, 2.0, 20) if per_row else 0.3
    out = linear_logprobs(
        hidden,
        weight,
        target_ids,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        return_entropy=True,
        return_lse=True,
        impl=impl,
    )
    operands = (hidden, weight, bias)
    g = upstream(20)
    yardsticks = plain(hidden, weight, target_ids, temperature, bias=bias, softcap=softcap)
    wide = double(hidden, weight)
    truths = plain(*wide, target_ids, temperature, bias=bias.double(), softcap=softcap)
    for outputs in zip(as_tuple(out), yardsticks, truths, strict=True):
        assert_no_worse(*outputs)
        gradients = [torch.autograd.grad(y, operands, g.to(y.dtype), retain_graph=True) for y in outputs]
        for found in zip(*gradients, strict=True):
            assert_no_worse(*found)


def test_known_numbers(impl: Any, pieces: str) -> None:
    flat = linear_logprobs(*problem(9, "flat"), return_entropy=True, return_lse=True, impl=impl)
    torch.testing.assert_close(flat.logprobs, torch.full((9,), -math.log(V)))
    torch.testing.assert_close(flat.entropy, torch.full((9,), math.log(V)))
    torch.testing.assert_close(flat.lse, torch.full((9,), math.log(V)))
    sure = linear_logprobs(
        torch.eye(5) * 1000, torch.eye(5), torch.tensor([0, 1, 2, 3, 0]), return_entropy=True, impl=impl
    )
    assert sure.logprobs.tolist() == [0, 0, 0, 0, -1000]
    assert sure.entropy is not None and sure.entropy.tolist() == [0] * 5


def test_the_entropy_of_a_peaked_policy_keeps_its_digits(impl: Any, pieces: str) -> None:
    """lse - sum p z would be 30 - 30 here: 0, or its rounding of 1e-6, instead of 3e-9."""
    weight = torch.zeros(V, 1)
    weight[7] = 30.0
    out = linear_logprobs(torch.ones(1, 1), weight, torch.tensor([7]), return_entropy=True, impl=impl)
    p = math.exp(-30.0)
    exact = (V - 1) * p * (30.0 + 1)  # to first order in p; float32 loses the 1, log(1 + p)
    assert out.entropy is not None and out.entropy.item() == pytest.approx(exact, rel=0.04)


@pytest.mark.parametrize("masked", [slice(0, 250), slice(500, V)])
def test_tokens_masked_out_by_a_bias(impl: Any, pieces: str, masked: slice) -> None:
    """A whole tile of -inf, the first one too, says nothing and spoils nothing."""
    hidden, weight, _ = problem(9)
    target_ids = torch.full((9,), 300)
    bias = torch.zeros(V)
    bias[masked] = -torch.inf
    mine = as_tuple(
        linear_logprobs(hidden, weight, target_ids, bias=bias, return_entropy=True, return_lse=True, impl=impl)
    )
    kept = torch.ones(V, dtype=torch.bool)
    kept[masked] = False
    new_ids = torch.full((9,), int(kept[:300].sum()))
    truths = plain(hidden.double(), weight.double()[kept], new_ids)
    for found, exact in zip(mine, truths, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(sum(x.sum() for x in mine), (hidden, weight))
    wanted = torch.autograd.grad(sum(x.sum() for x in truths), (hidden, weight))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_nan_stays_in_its_row(impl: Any, pieces: str) -> None:
    hidden, weight, target_ids = problem(20)
    hidden = hidden.detach().clone()
    hidden[13] = torch.nan
    hidden.requires_grad_()
    mine = as_tuple(linear_logprobs(hidden, weight, target_ids, return_entropy=True, return_lse=True, impl=impl))
    others = torch.arange(20) != 13
    for x in mine:
        assert x[13].isnan() and x[others].isfinite().all()
    (gradient,) = torch.autograd.grad(mine[0].sum(), hidden)
    assert gradient[13].isnan().all() and gradient[others].isfinite().all()


def test_zero_upstream_gradients_are_zero_not_nan(impl: Any, pieces: str) -> None:
    hidden, weight, target_ids = problem(63, "peaked")
    logprobs = linear_logprobs(hidden, weight, target_ids, impl=impl).logprobs
    for gradient in torch.autograd.grad(logprobs, (hidden, weight), torch.zeros(63)):
        assert (gradient == 0).all()


def test_rows_are_gathered_and_may_repeat(impl: Any, pieces: str) -> None:
    hidden, weight, _ = problem(20)
    rows = torch.tensor([3, 3, 19, 0, 7, 3, 3, 3, 12, 3])
    target_ids = torch.tensor([1, 2, V - 1, 0, 5, 1, 9, 9, 9, 1])
    got = linear_logprobs(hidden, weight, target_ids, rows=rows, impl=impl).logprobs
    wanted = plain(hidden.double()[rows], weight.double(), target_ids)[0]
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)
    g = upstream(10)
    found = torch.autograd.grad(got, hidden, g.float())[0]
    expected = torch.autograd.grad(wanted, hidden, g)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found[[1, 2, 18]] == 0).all()  # nobody scored them
    none = linear_logprobs(hidden, weight, target_ids[:0], rows=rows[:0], return_entropy=True, impl=impl)
    assert none.logprobs.shape == (0,) and none.entropy is not None and none.entropy.shape == (0,)
    for gradient in torch.autograd.grad(none.logprobs.sum(), (hidden, weight)):
        assert (gradient == 0).all()


def test_views_of_any_stride(impl: Any, pieces: str) -> None:
    _, weight, target_ids = problem(20)
    wide = normal(40, 2 * H, seed=3).requires_grad_()
    view, transposed = wide[1::2, ::2], weight.detach().T.contiguous().T.requires_grad_()
    assert not view.is_contiguous() and not transposed.is_contiguous()
    got = linear_logprobs(view, transposed, target_ids, impl=impl).logprobs
    found = torch.autograd.grad(got.sum(), (wide, transposed))
    wanted = plain(wide.double()[1::2, ::2], transposed.double(), target_ids)[0]
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    for x, y in zip(found, torch.autograd.grad(wanted.sum(), (wide, transposed)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_ids_of_any_stride(impl: Any, pieces: str) -> None:
    """A column of a padded batch, one id for all: what lies between them in memory is not read."""
    hidden, weight, target_ids = problem(12)
    batch = torch.stack([target_ids, torch.full_like(target_ids, 10**9)], 1)
    strided, one = batch[:, 0], target_ids[:1].expand(12)
    temperature = torch.stack([torch.full((12,), 0.5), torch.full((12,), torch.nan)], 1)[:, 0]
    assert not strided.is_contiguous() and not one.is_contiguous() and not temperature.is_contiguous()
    for ids in (strided, one):
        rows = batch[:, 0] % 12
        got = linear_logprobs(hidden, weight, ids, rows=rows, temperature=temperature, impl=impl).logprobs
        wanted = plain(hidden.double()[rows], weight.double(), ids, 0.5)[0]
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
        found, exact = torch.autograd.grad(got.sum(), hidden)[0], torch.autograd.grad(wanted.sum(), hidden)[0]
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_autocast_leaves_float64_alone() -> None:
    hidden, weight, target_ids = problem(5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_logprobs(hidden.double(), weight.double(), target_ids).logprobs
    assert torch.equal(inside, linear_logprobs(hidden.double(), weight.double(), target_ids).logprobs)


def test_meta_tensors_tell_shapes() -> None:
    hidden, weight, target_ids = (x.detach().to("meta") for x in problem(5))
    out = linear_logprobs(hidden, weight, target_ids, return_entropy=True)
    assert out.logprobs.is_meta and out.logprobs.shape == (5,) and out.logprobs.dtype == torch.float32


def test_a_sure_row_has_no_gradient(impl: Any, pieces: str) -> None:
    """Logits of a thousand made again in other pieces differ in a last bit, worth 6e-5 of a probability."""
    hidden, weight, _ = (x.detach() for x in problem(63))
    weight *= 3000
    top = (hidden @ weight.T).topk(2)
    target_ids, is_sure = top.indices[:, 0], top.values[:, 0] - top.values[:, 1] > 100
    assert is_sure.sum() > 20
    linear_logprobs(hidden.requires_grad_(), weight, target_ids, impl=impl).logprobs.sum().backward()
    assert hidden.grad is not None and (hidden.grad[is_sure] == 0).all()


def test_entropy_and_lse_only_where_asked_for(impl: Any) -> None:
    out = linear_logprobs(*problem(9), impl=impl)
    assert out.entropy is None and out.lse is None


def test_without_gradients(impl: Any, pieces: str) -> None:
    hidden, weight, target_ids = problem(9)
    with torch.no_grad():
        frozen = linear_logprobs(hidden, weight, target_ids, impl=impl).logprobs
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, linear_logprobs(hidden, weight, target_ids, impl=impl).logprobs)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_one_side_frozen(impl: Any, pieces: str, trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that needs no gradient costs no product for it."""
    hidden, weight, target_ids = problem(9)
    wanted = torch.autograd.grad(plain(*double(hidden, weight), target_ids)[0].sum(), (hidden, weight))
    (weight if trained == "hidden" else hidden).requires_grad_(False)
    made: list[str] = []
    add_product = lm_head._add_product

    def spy(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
        is_weight = right.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        made.append("hidden" if is_weight else "weight")
        add_product(total, left, right, is_first)

    monkeypatch.setattr(lm_head, "_add_product", spy)
    linear_logprobs(hidden, weight, target_ids, impl=impl).logprobs.sum().backward()
    assert set(made) == {trained}
    for x, gradient, name in ((hidden, wanted[0], "hidden"), (weight, wanted[1], "weight")):
        if name == trained:
            torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=1e-5)
        else:
            assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain_torch(impl: Any, pieces: str, dtype: torch.dtype) -> None:
    hidden, weight, target_ids = (x.detach() for x in problem(63))
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    got = linear_logprobs(hidden, weight, target_ids, return_entropy=True, return_lse=True, impl=impl)
    assert got.logprobs.dtype == torch.float32
    truths = plain(*double(hidden, weight), target_ids)
    for outputs in zip(as_tuple(got), plain(hidden, weight, target_ids), truths, strict=True):
        assert_no_worse(*outputs)
        g = upstream(63)
        gradients = [torch.autograd.grad(y, (hidden, weight), g.to(y.dtype), retain_graph=True) for y in outputs]
        assert gradients[0][0].dtype == gradients[0][1].dtype == dtype
        for found in zip(*gradients, strict=True):
            assert_no_worse(*found)


def test_autocast_scores_in_its_own_dtype(impl: Any) -> None:
    hidden, weight, target_ids = problem(20)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        inside = linear_logprobs(hidden, weight, target_ids, impl=impl).logprobs
    by_hand = linear_logprobs(hidden.bfloat16(), weight.bfloat16(), target_ids, impl=impl).logprobs
    assert torch.equal(inside, by_hand)
    gradients = torch.autograd.grad(inside.sum(), (hidden, weight))
    assert all(g.dtype == torch.float32 for g in gradients)
    for x, y in zip(gradients, torch.autograd.grad(by_hand.sum(), (hidden, weight)), strict=True):
        assert torch.equal(x, y)


def scored(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    out = linear_logprobs(hidden * 1.5, weight, target_ids, temperature=0.8, return_entropy=True)
    assert out.entropy is not None
    return (out.logprobs - 0.1 * out.entropy).sum()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"),
        lambda f: lambda *a: checkpoint(f, *a, use_reentrant=False),
        lambda f: lambda *a: checkpoint(f, *a, use_reentrant=True),
    ],
    ids=["compile", "checkpoint", "reentrant checkpoint"],
)
def test_compiled_and_checkpointed(wrap: Callable[..., Any]) -> None:
    inputs = problem(20)
    plainly, wrapped = scored(*inputs), wrap(scored)(*inputs)
    torch.testing.assert_close(plainly, wrapped)
    wanted = torch.autograd.grad(plainly, inputs[:2])
    wrapped.backward()
    for x, gradient in zip(inputs[:2], wanted, strict=True):
        torch.testing.assert_close(x.grad, gradient)
    assert last_impl("linear_logprobs") == "cpu"


@pytest.mark.filterwarnings("ignore::UserWarning")  # opcheck's own, of torch internals
def test_opcheck(impl: Any) -> None:
    hidden, weight, target_ids = problem(9)
    bias = normal(V, seed=5).requires_grad_()
    rows = torch.tensor([0, 3, 3, 8, 1, 0, 2, 2, 5])
    for args in (
        (hidden, weight, target_ids, None, None, torch.ones(9), None, False, impl),
        (hidden, weight, target_ids, rows, bias, torch.full((9,), 0.5), 3.0, False, impl),
    ):
        torch.library.opcheck(torch.ops.archer_fast.linear_logprobs.default, args)


def test_second_derivatives_are_refused() -> None:
    hidden, weight, target_ids = problem(4)
    (gradient,) = torch.autograd.grad(
        linear_logprobs(hidden, weight, target_ids).logprobs.sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="linear_logprobs_backward"):
        gradient.sum().backward()
