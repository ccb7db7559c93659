"""segment_scan against a Python loop in float64: values, gradients of any order, every layout, every bad input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from lm_head_cases import assert_no_worse, normal
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from archer_fast.ops import last_impl, segment_scan

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")

LAYOUTS: dict[str, list[int]] = {
    "no segments": [],
    "empty ones": [0, 0],
    "one token": [1],
    "of all kinds": [0, 0, 3, 0, 1, 17, 0, 2, 0],
    "single tokens": [1] * 37,
    "over the tiles of every kernel": [1023, 1, 0, 1025, 2048, 7],
    "one long": [4099],
}


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def problem(lengths: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """a in [-1, 1], some 0 and some 1; b normal; float32 and waiting for gradients."""
    total = sum(lengths)
    a = normal(total, seed=seed).clamp(-1, 1)
    a[3::7], a[5::7] = 0.0, 1.0
    b = normal(total, seed=seed + 1)
    return a.requires_grad_(), b.requires_grad_(), offsets(lengths)


def loop(a: Tensor, b: Tensor, cu: Tensor) -> Tensor:
    """The recurrence, token after token, in the dtype given."""
    y: list[Tensor] = [b.new_zeros(())] * b.shape[0]
    for start, end in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        for t in range(end - 1, start - 1, -1):
            y[t] = b[t] + a[t] * y[t + 1] if t + 1 < end else b[t]
    return torch.stack(y) if y else a + b


def upstream(total: int) -> Tensor:
    weight = normal(total, seed=9).double()
    weight[::4] = 0
    return weight


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients(impl: Any, layout: str) -> None:
    a, b, cu = problem(LAYOUTS[layout])
    got = segment_scan(a, b, cu, impl=impl)
    assert last_impl("segment_scan") == impl
    assert got.dtype == torch.float32
    outputs = (got, loop(a, b, cu), loop(a.double(), b.double(), cu))
    assert_no_worse(*outputs)
    g = upstream(b.shape[0])
    gradients = [torch.autograd.grad(y, (a, b), g.to(y.dtype), allow_unused=True) for y in outputs]
    for found, theirs, exact in zip(*gradients, strict=True):
        # No segment of two tokens: the loop does not read a.
        assert_no_worse(found, *(torch.zeros_like(a) if x is None else x for x in (theirs, exact)))


def test_the_docstrings_example(impl: Any) -> None:
    a, b, cu = torch.full((4,), 0.5), torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 3, 4])
    assert segment_scan(a, b, cu, impl=impl).tolist() == [3.0, 4.0, 4.0, 8.0]
    forward = segment_scan(a.flip(0), b.flip(0), (4 - cu).flip(0), impl=impl).flip(0)
    assert forward.tolist() == [1.0, 2.5, 5.25, 8.0]


@pytest.mark.parametrize("factor", [0.0, 1.0, -1.0, 2.0])
def test_constant_factors(impl: Any, factor: float) -> None:
    """Itself, suffix sums, alternating sums, and sums that grow: exact in float32, as all are small integers."""
    lengths = [5, 0, 1, 11, 20]
    b = (2 * normal(37, seed=0)).round()
    a, cu = torch.full((37,), factor), offsets(lengths)
    assert torch.equal(segment_scan(a, b, cu, impl=impl), loop(a, b, cu))


FAST = ["cpu", pytest.param("triton", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("impl", FAST, indirect=True)
@pytest.mark.parametrize("lengths", [[100_000], [4] * 50_000, [0] * 50_000 + [3], [99_999, 0, 1, 60_001]])
def test_many_and_long_segments(impl: Any, lengths: list[int]) -> None:
    a, b, cu = (x.detach() for x in problem(lengths))
    a = 0.9 + 0.1 * a.abs()
    got = segment_scan(a, b, cu)
    assert last_impl("segment_scan") == impl, "the device's own"
    wanted, factors, values = [0.0] * b.shape[0], a.double().tolist(), b.double().tolist()
    ends = set((cu[1:] - 1).tolist())
    for t in range(b.shape[0] - 1, -1, -1):
        wanted[t] = values[t] if t in ends else values[t] + factors[t] * wanted[t + 1]
    torch.testing.assert_close(got.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_at_a_segments_end_is_not_read(impl: Any, bad: float) -> None:
    lengths = [3, 0, 1, 40, 2]
    a, b, cu = problem(lengths)
    ends = (cu[1:] - 1)[torch.tensor(lengths) > 0].long()
    poisoned = a.detach().clone()
    poisoned[ends] = bad
    poisoned.requires_grad_()
    got, wanted = segment_scan(poisoned, b, cu, impl=impl), segment_scan(a, b, cu, impl=impl)
    assert torch.equal(got, wanted)
    g = upstream(b.shape[0]).float()
    for found, exact in zip(
        torch.autograd.grad(got, (poisoned, b), g), torch.autograd.grad(wanted, (a, b), g), strict=True
    ):
        assert torch.equal(found, exact)
    assert (torch.autograd.grad(segment_scan(a, b, cu, impl=impl).sum(), a)[0][ends] == 0).all()


def test_nan_stays_in_its_segment_and_goes_left(impl: Any) -> None:
    a, b, cu = (x.detach() for x in problem([4, 20, 30]))
    a.fill_(0.5)
    clean = segment_scan(a, b, cu, impl=impl)
    b[10] = torch.nan
    got = segment_scan(a, b, cu, impl=impl)
    assert got[4:11].isnan().all()
    assert torch.equal(got[:4], clean[:4]) and torch.equal(got[11:], clean[11:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(impl: Any, dtype: torch.dtype) -> None:
    a, b, cu = problem([3, 0, 50, 1])
    a, b = a.detach().to(dtype).requires_grad_(), b.detach().to(dtype).requires_grad_()
    got, wanted = segment_scan(a, b, cu, impl=impl), segment_scan(a.float(), b.float(), cu, impl=impl)
    assert got.dtype == torch.float32 and torch.equal(got, wanted)
    for found, exact in zip(
        torch.autograd.grad(got.sum(), (a, b)), torch.autograd.grad(wanted.sum(), (a, b)), strict=True
    ):
        assert found.dtype == dtype and torch.equal(found, exact)


def test_float64_is_the_references(impl: Any) -> None:
    a, b, cu = problem([5, 6])
    got = segment_scan(a.double(), b, cu)  # one is enough
    assert last_impl("segment_scan") == "reference" and got.dtype == torch.float64
    torch.testing.assert_close(got, loop(a.double(), b.double(), cu), rtol=1e-14, atol=1e-14)
    if impl != "reference":
        with pytest.raises(ValueError, match=r"impl: .* float64 operands need 'reference'"):
            segment_scan(a.double(), b, cu, impl=impl)


def test_strided_views_and_long_offsets(impl: Any) -> None:
    a, b, cu = (x.detach() for x in problem([3, 0, 50, 1]))
    spread = torch.full((54, 3), torch.nan)
    spread[:, 0], spread[:, 2] = a, b
    wide_cu = torch.stack([cu, cu], 1).long()
    got = segment_scan(spread[:, 0], spread[:, 2], wide_cu[:, 1], impl=impl)
    assert torch.equal(got, segment_scan(a, b, cu, impl=impl))


@pytest.mark.parametrize("trained", ["a", "b", ""])
def test_gradients_only_where_asked(impl: Any, trained: str) -> None:
    a, b, cu = problem([3, 0, 50, 1])
    wanted = torch.autograd.grad(segment_scan(a, b, cu, impl=impl).sum(), (a, b))  # an expanded upstream gradient
    a.requires_grad_(trained == "a"), b.requires_grad_(trained == "b")
    got = segment_scan(a, b, cu, impl=impl)
    assert got.requires_grad == bool(trained)
    if trained:
        got.sum().backward()
    for name, x, exact in (("a", a, wanted[0]), ("b", b, wanted[1])):
        assert (x.grad is None) if name != trained else torch.equal(x.grad, exact)  # type: ignore[arg-type]


def test_derivatives_by_differences() -> None:
    a, b, cu = problem([0, 3, 0, 1, 5, 0])
    wide = [x.detach().double().requires_grad_() for x in (a, b)]
    assert torch.autograd.gradcheck(lambda a, b: segment_scan(a, b, cu), wide)
    assert torch.autograd.gradgradcheck(lambda a, b: segment_scan(a, b, cu), wide)


def test_second_derivatives(impl: Any) -> None:
    a, b, cu = problem([4, 1, 20])

    def second(y: Tensor) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (a, b))

    for got, wanted in zip(second(segment_scan(a, b, cu, impl=impl)), second(loop(a, b, cu)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"),
        lambda f: lambda *x: checkpoint(f, *x, use_reentrant=False),
        lambda f: torch.autocast(torch.get_default_device().type, torch.bfloat16)(f),
    ],
    ids=["compile", "checkpoint", "autocast"],
)
def test_compiled_checkpointed_and_under_autocast(impl: Any, wrap: Callable[..., Any]) -> None:
    a, b, cu = problem([3, 0, 50, 1])

    def total(a: Tensor, b: Tensor) -> Tensor:
        return segment_scan(a, b, cu, impl=impl).sin().sum()

    plainly, wrapped = total(a, b), wrap(total)(a, b)
    torch.testing.assert_close(wrapped, plainly)
    for found, exact in zip(torch.autograd.grad(wrapped, (a, b)), torch.autograd.grad(plainly, (a, b)), strict=True):
        torch.testing.assert_close(found, exact)
    assert last_impl("segment_scan") == impl


@pytest.mark.parametrize("impl", FAST, indirect=True)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own imports
def test_inductor_compiles_it_for_any_length(impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", True)  # else it asks the compiler, for half the time
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b, cu: 2 * segment_scan(a, b, cu), fullgraph=True, dynamic=True)
    for lengths in ([3, 0, 50, 1], [7, 2]):
        a, b, cu = (x.detach() for x in problem(lengths))
        assert torch.equal(compiled(a, b, cu), 2 * segment_scan(a, b, cu))


@pytest.mark.filterwarnings("ignore::UserWarning")  # opcheck's own, of torch internals
def test_opcheck(impl: Any) -> None:
    a, b, cu = problem([3, 0, 50, 1])
    for arguments in ((a, b, cu), (a.detach(), b, cu)):
        if impl == "triton":
            segment_scan(*arguments)  # registers it
            torch.library.opcheck(torch.ops.archer_fast.segment_scan_triton.default, arguments)
        else:
            torch.library.opcheck(torch.ops.archer_fast.segment_scan.default, (*arguments, impl))
    torch.library.opcheck(torch.ops.archer_fast.segment_offsets.default, (cu.long(), 54))


GOOD: dict[str, Any] = {"a": torch.ones(9), "b": torch.ones(9), "cu": torch.tensor([0, 4, 9])}
RISE = "cu: wanted offsets that rise from 0 to 9"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"a": torch.ones(8)}, ValueError, r"a, b: wanted \[T\] both, got \(8,\) and \(9,\)"),
        ({"a": torch.ones(3, 3), "b": torch.ones(3, 3)}, ValueError, r"a, b: wanted \[T\] both, got \(3, 3\) and"),
        ({"a": torch.ones(9).int()}, TypeError, "a: wanted a float tensor, got torch.int32"),
        ({"b": torch.ones(9, dtype=torch.complex64)}, TypeError, "b: wanted a float tensor, got torch.complex64"),
        ({"cu": torch.tensor([0.0, 9.0])}, TypeError, "cu: wanted int32 or int64, got torch.float32"),
        ({"cu": torch.tensor([[0, 9]])}, ValueError, r"cu: wanted \[B\+1\], got \(1, 2\)"),
        ({"cu": torch.tensor([], dtype=torch.int32)}, ValueError, r"cu: wanted \[B\+1\], got \(0,\)"),
        ({"cu": torch.tensor([1, 9])}, ValueError, rf"{RISE}, got \[1, 9\]"),
        ({"cu": torch.tensor([0, 8])}, ValueError, rf"{RISE}, got \[0, 8\]"),
        (dict.fromkeys("ab", torch.ones(1).expand(2**31)), ValueError, r"b: wanted fewer than 2\*\*31 tokens, .* 2147"),
        ({"cu": torch.tensor([0, 10])}, ValueError, rf"{RISE}, got \[0, 10\]"),
        ({"cu": torch.tensor([0, 9 + 2**32])}, ValueError, rf"{RISE}, got \[0, 4294967305\]"),
        ({"cu": torch.tensor([0, 5, 3, 9])}, ValueError, rf"{RISE}, got \[0, 5, 3, 9\]"),
        ({"cu": torch.tensor([0, -1, 9])}, ValueError, rf"{RISE}, got \[0, -1, 9\]"),
        (
            {"cu": torch.tensor([0, 1, 2, 3, 4, 3, 6, 7, 8, 9])},
            ValueError,
            rf"{RISE}, got 10 from 0 to 9, falling at \[5\]",
        ),
        ({"a": torch.ones(9, device="meta")}, ValueError, "a: wanted cpu, where b is, got meta"),
        ({"cu": torch.ones(3, device="meta").int()}, ValueError, "cu: wanted cpu, where b is, got meta"),
        ({"impl": "cuda"}, ValueError, "impl: wanted one of reference, cpu, triton or None, got 'cuda'"),
        ({"impl": "triton"}, ValueError, r"impl: 'triton' wants CUDA tensors \(or TRITON_INTERPRET=1\), got cpu"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        segment_scan(**(GOOD | changes))
