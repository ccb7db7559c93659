"""linear_logprobs against float64 truth: values and gradients where peers went wrong, and every bad input."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from archer_fast.ops import linear_logprobs, reference

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")
V, H = 1003, 17  # an odd vocabulary: no tile divides it
module = importlib.import_module("archer_fast.ops.linear_logprobs")  # its name in the package is the function's


@pytest.fixture(params=["whole", "chunked"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each chunk that was checkpointed: none in one piece; at most 4 at a time when CHUNK_BYTES says so."""
    seen: list[int] = []
    checkpoint = reference.checkpoint

    def spy(function: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(hidden.shape[0])
        return checkpoint(function, hidden, *args, **kwargs)

    monkeypatch.setattr(reference, "checkpoint", spy)
    if request.param == "chunked":
        monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 4 * V + 7)
    request.node.chunked = request.param == "chunked"
    return seen


def problem(num_rows: int, kind: str = "random", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V, H], target_ids [N]; `kind` is what the logits look like."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) / H**0.5
    target_ids = torch.randint(V, (num_rows,), generator=generator)
    if kind == "peaked":
        weight = weight * 200
    elif kind == "peaked at the target":
        weight = weight * 50
        target_ids = (hidden @ weight.T).argmax(-1)
    elif kind == "near -256":
        hidden[:, 0], weight[:, 0] = 1.0, -256.0
        weight[:, 1:] *= 0.1
    elif kind == "last column":
        target_ids[:] = V - 1
    elif kind == "first column":
        target_ids[:] = 0
    elif kind == "flat":
        weight = torch.zeros(V, H)
    return hidden.requires_grad_(), weight.requires_grad_(), target_ids


KINDS = ["random", "peaked", "peaked at the target", "near -256", "last column", "first column", "flat"]


def truth(hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The docstring's formula in float64."""
    logits = hidden.double() @ weight.double().T / temperature
    m = logits.amax(-1, keepdim=True)
    log_sum = (logits - m).exp().sum(-1, keepdim=True).log() + m
    logprobs = logits - log_sum
    return logprobs.gather(1, target_ids[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


def upstream(num_rows: int, seed: int = 1) -> Tensor:
    """Both signs, and every fourth row 0."""
    weight = torch.randn(num_rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight[::4] = 0
    return weight


def plain(hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same in whole torch, in the dtype given: how exact one can be there."""
    logprobs = (hidden @ weight.T / temperature).log_softmax(-1)
    return logprobs.gather(1, target_ids[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


def assert_no_worse(got: Tensor, yardstick: Tensor, wanted: Tensor, factor: float = 2.0) -> None:
    """|got - wanted| <= factor |yardstick - wanted| + a few units in the last place."""
    assert got.shape == wanted.shape
    wanted = wanted.double()
    error, theirs = (got.double() - wanted).norm(), (yardstick.double() - wanted).norm()
    floor = 3e-7 * (wanted.norm() + wanted.numel() ** 0.5)
    assert error <= factor * theirs + floor, f"error {error:.3g}, plain torch's {theirs:.3g}"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [0, 1, 4, 63])
def test_values_and_gradients(
    request: pytest.FixtureRequest, chunks: list[int], num_rows: int, kind: str, temperature: float
) -> None:
    inputs = problem(num_rows, kind)
    got = linear_logprobs(*inputs, temperature=temperature, return_entropy=True)
    assert chunks == ([4] * 15 + [3] if request.node.chunked and num_rows == 63 else [])
    assert got.entropy is not None
    assert got.logprobs.dtype == got.entropy.dtype == torch.float32
    assert (got.logprobs <= 0).all()  # phantom columns would lift them
    assert (got.entropy >= -1e-6).all() and (got.entropy <= math.log(V) + 1e-5).all()

    g = upstream(num_rows)
    yardsticks, truths = plain(*inputs, temperature), truth(*inputs, temperature)
    for mine, theirs, exact in zip((got.logprobs, got.entropy), yardsticks, truths, strict=True):
        assert_no_worse(mine, theirs, exact)
        gradients = [
            torch.autograd.grad(y, inputs[:2], g.to(y.dtype), retain_graph=True) for y in (mine, theirs, exact)
        ]
        for found in zip(*gradients, strict=True):
            assert_no_worse(*found)


def test_known_numbers(chunks: list[int]) -> None:
    flat = linear_logprobs(*problem(9, "flat"), return_entropy=True)
    torch.testing.assert_close(flat.logprobs, torch.full((9,), -math.log(V)))
    torch.testing.assert_close(flat.entropy, torch.full((9,), math.log(V)))
    sure = linear_logprobs(torch.eye(5) * 1000, torch.eye(5), torch.tensor([0, 1, 2, 3, 0]), return_entropy=True)
    assert sure.logprobs.tolist() == [0, 0, 0, 0, -1000]
    assert sure.entropy is not None and sure.entropy.tolist() == [0] * 5


def test_zero_upstream_gradients_are_zero_not_nan(chunks: list[int]) -> None:
    hidden, weight, target_ids = problem(63, "peaked")
    logprobs = linear_logprobs(hidden, weight, target_ids).logprobs
    for gradient in torch.autograd.grad(logprobs, (hidden, weight), torch.zeros(63)):
        assert (gradient == 0).all()


def test_rows_are_gathered_and_may_repeat(chunks: list[int]) -> None:
    hidden, weight, _ = problem(20)
    rows = torch.tensor([3, 3, 19, 0, 7, 3])
    target_ids = torch.tensor([1, 2, V - 1, 0, 5, 1])
    got = linear_logprobs(hidden, weight, target_ids, rows=rows).logprobs
    wanted, _ = truth(hidden[rows], weight, target_ids, 1.0)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)
    g = upstream(6)
    found = torch.autograd.grad(got, hidden, g.float())[0]
    expected = torch.autograd.grad(wanted, hidden, g)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found[[1, 2, 18]] == 0).all()  # nobody scored them
    none = linear_logprobs(hidden, weight, target_ids[:0], rows=rows[:0], return_entropy=True)
    assert none.logprobs.shape == (0,) and none.entropy is not None and none.entropy.shape == (0,)


def test_chunked_equals_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target_ids = problem(63, "peaked")
    results = []
    for chunk_bytes in (1 << 30, 4 * V * 10, 1):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
        out = linear_logprobs(hidden, weight, target_ids, return_entropy=True)
        assert out.entropy is not None
        gradients = torch.autograd.grad((out.logprobs + out.entropy).sum(), (hidden, weight))
        results.append((out.logprobs, out.entropy, *gradients))
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            scale = max(1.0, right.abs().max().item())
            torch.testing.assert_close(left, right, rtol=0, atol=2e-5 * scale)


def test_entropy_only_where_asked_for(chunks: list[int]) -> None:
    assert linear_logprobs(*problem(9)).entropy is None


def test_without_gradients(chunks: list[int]) -> None:
    hidden, weight, target_ids = problem(9)
    with torch.no_grad():
        frozen = linear_logprobs(hidden, weight, target_ids).logprobs
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, linear_logprobs(hidden, weight, target_ids).logprobs)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_one_side_frozen(chunks: list[int], trained: str) -> None:
    hidden, weight, target_ids = problem(9)
    wanted = torch.autograd.grad(truth(hidden, weight, target_ids, 1.0)[0].sum(), (hidden, weight))
    (weight if trained == "hidden" else hidden).requires_grad_(False)
    linear_logprobs(hidden, weight, target_ids).logprobs.sum().backward()
    for x, gradient, name in ((hidden, wanted[0], "hidden"), (weight, wanted[1], "weight")):
        if name == trained:
            torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=1e-5)
        else:
            assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain_torch(chunks: list[int], dtype: torch.dtype) -> None:
    hidden, weight, target_ids = (x.detach() for x in problem(63))
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    got = linear_logprobs(hidden, weight, target_ids).logprobs
    assert got.dtype == torch.float32
    outputs = (got, plain(hidden, weight, target_ids, 1.0)[0], truth(hidden, weight, target_ids, 1.0)[0])
    assert_no_worse(*outputs)
    g = upstream(63)
    gradients = [torch.autograd.grad(y, (hidden, weight), g.to(y.dtype)) for y in outputs]
    for found in zip(*gradients, strict=True):
        assert_no_worse(*found)


GOOD: dict[str, Any] = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(5, 3), "target_ids": torch.zeros(4).long()}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"hidden": torch.zeros(4, 2)},
            ValueError,
            r"hidden, weight: wanted \[T, H\] and \[V, H\], got \(4, 2\), \(5, 3",
        ),
        ({"hidden": torch.zeros(2, 2, 3)}, ValueError, r"hidden, weight: .* got \(2, 2, 3\)"),
        ({"weight": torch.zeros(3)}, ValueError, r"hidden, weight: .* got \(4, 3\), \(3,\)"),
        ({"target_ids": torch.zeros(4).int()}, TypeError, "target_ids: wanted int64, got torch.int32"),
        ({"target_ids": torch.zeros(3).long()}, ValueError, r"target_ids: wanted one a scored row \(4\), got \(3,\)"),
        (
            {"target_ids": torch.zeros(4, 1).long()},
            ValueError,
            r"target_ids: wanted one a scored row \(4\), got \(4, 1",
        ),
        ({"rows": torch.tensor([0, 1])}, ValueError, r"target_ids: wanted one a scored row \(2\), got \(4,\)"),
        ({"temperature": 0.0}, ValueError, r"temperature: wanted a number above 0, got 0\.0"),
        ({"temperature": -1.0}, ValueError, "temperature: wanted a number above 0, got -1"),
        ({"temperature": math.nan}, ValueError, "temperature: wanted a number above 0, got nan"),
        ({"target_ids": torch.tensor([0, 1, 2, 5])}, RuntimeError, "index 5 is out of bounds"),  # torch's own check
        ({"target_ids": torch.tensor([0, 1, 2, -1])}, RuntimeError, "index -1 is out of bounds"),
        ({"rows": torch.tensor([0, 1, 2, 4])}, IndexError, "index out of range"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_logprobs(**(GOOD | changes))
