"""The C++ row functions, scan and critic loss against float64 truth, with every instruction set of this machine."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from archer_fast import _C
from archer_fast.ops import cpu, reference

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")
V = 1003


@pytest.fixture(params=_C.simd_levels(), autouse=True)
def simd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu, "SIMD", request.param)
    return request.param


def problem(kind: str, n: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits [n, v], target_ids [n], inv_temperature [n]."""
    generator = torch.Generator().manual_seed(n * 7 + v)
    logits = torch.randn(n, v, generator=generator)
    target_ids = torch.randint(v, (n,), generator=generator)
    inv_temperature = 0.5 + torch.rand(n, generator=generator)
    if kind == "peaked":
        logits *= 100
    elif kind == "peaked at the target":
        logits[torch.arange(n), target_ids] += 1000
    elif kind == "near -256":
        logits -= 256
    elif kind == "last column":
        target_ids[:] = v - 1
    elif kind == "masked":
        logits[:, : v // 2] = -torch.inf
        target_ids[:] = v - 1
    return logits, target_ids, inv_temperature


KINDS = ["random", "peaked", "peaked at the target", "near -256", "last column", "masked"]


def columns_contiguous(logits: Tensor) -> Tensor:
    """As the op lays them out on a CPU."""
    return logits.T.contiguous().T


def scores(rows: Any, dtype: torch.dtype, inputs: tuple[Tensor, ...], softcap: float | None, tile: int) -> Tensor:
    """[4, n]: logprobs, entropy, row_max, log_sum, by the row functions of a module, over tiles of columns."""
    logits, target_ids, inv_temperature = inputs
    return scores_of(rows, (columns_contiguous(logits.to(dtype)), target_ids, inv_temperature.to(dtype)), softcap, tile)


def scores_of(rows: Any, inputs: tuple[Tensor, ...], softcap: float | None, tile: int) -> Tensor:
    """`scores` of logits where they lie."""
    logits, target_ids, inv_temperature = inputs
    state = torch.tensor([-torch.inf, 0, 0, torch.nan], dtype=logits.dtype).repeat(len(logits), 1)
    for start in range(0, logits.shape[1], tile):
        rows.softmax_update(logits[:, start : start + tile], start, target_ids, inv_temperature, softcap, state)
    m, s, t, at_target = state.unbind(1)
    return torch.stack([(at_target - m) - s.log(), s.log() - t / s, m, s.log()])


def gradient(
    rows: Any,
    dtype: torch.dtype,
    inputs: tuple[Tensor, ...],
    softcap: float | None,
    given: Tensor,
    upstream: Tensor,
    tile: int = 1 << 20,
) -> Tensor:
    """[n, v] out of `scores` [4, n] and upstream gradients [3, n] of log-prob, entropy, lse; in place, tile by tile."""
    logits, target_ids, inv_temperature = inputs
    logits = columns_contiguous(logits.to(dtype)).clone()
    _, entropy, row_max, log_sum = given.to(dtype).unbind()
    of_logprobs, of_entropy, of_lse = upstream.to(dtype).unbind()
    statistics = row_max, log_sum, entropy, of_logprobs
    others = of_entropy if of_entropy.any() else None, of_lse if of_lse.any() else None
    for start in range(0, logits.shape[1], tile):
        part = logits[:, start : start + tile]
        rows.softmax_backward(part, start, target_ids, inv_temperature.to(dtype), softcap, *statistics, *others, part)
    return logits


def truth(inputs: tuple[Tensor, ...], softcap: float | None, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """`scores` and `gradient` by float64 autograd through log_softmax."""
    logits, target_ids, inv_temperature = (x.double() if x.is_floating_point() else x for x in inputs)
    logits.requires_grad_()
    z = (logits if softcap is None else softcap * (logits / softcap).tanh()) * inv_temperature[:, None]
    lse, m = z.logsumexp(1), z.amax(1)
    log_p = z.log_softmax(1)
    entropy = -(log_p.exp() * log_p.masked_fill(z == -torch.inf, 0)).sum(1)
    logprobs = log_p.gather(1, target_ids[:, None]).squeeze(1)
    values = torch.stack([logprobs, entropy, m, lse - m])
    loss = (torch.stack([logprobs, entropy, lse]) * upstream.double()).sum()
    return values.detach(), torch.autograd.grad(loss, logits)[0].nan_to_num(0)


def assert_no_worse(got: Tensor, yardstick: Tensor, wanted: Tensor) -> None:
    """|got - wanted| <= 2 |yardstick - wanted| + a few units in the last place, as norms."""
    error, theirs = (got.double() - wanted).norm(), (yardstick.double() - wanted).norm()
    floor = 3e-7 * (wanted.norm() + wanted.numel() ** 0.5)
    assert error <= 2 * theirs + floor, f"error {error:.3g}, plain torch's {theirs:.3g}"


@pytest.mark.parametrize("upstream", ["all", "log-probs"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "v", "tile"), [(1, 1, 1), (3, 15, 15), (5, 16, 5), (3, 17, 16), (7, V, 64), (4, V, V)])
def test_softmax(n: int, v: int, tile: int, kind: str, softcap: float | None, upstream: str) -> None:
    inputs = problem(kind, n, v)
    given = torch.randn(3, n, generator=torch.Generator().manual_seed(1))
    if upstream == "log-probs":
        given[1:] = 0
    exact_scores, exact_gradient = truth(inputs, softcap, given)
    mine = scores(cpu, torch.float32, inputs, softcap, tile)
    plain = scores(reference, torch.float32, inputs, softcap, tile)
    for row in range(4):
        assert_no_worse(mine[row], plain[row], exact_scores[row])
    assert (mine[0] <= 0).all() and (mine[1] >= -1e-6).all()
    found = gradient(cpu, torch.float32, inputs, softcap, mine, given, tile)
    assert_no_worse(found, gradient(reference, torch.float32, inputs, softcap, plain, given, tile), exact_gradient)


def test_rows_of_a_larger_matrix_and_its_other_rows_are_left_alone() -> None:
    """In place, and from there into other memory: where the weight's gradient lends its own, rows are H apart."""
    inputs = problem("random", 70, V)
    given = scores(cpu, torch.float32, inputs, None, 100)
    _, entropy, row_max, log_sum = given.unbind()
    wanted = gradient(cpu, torch.float32, inputs, None, given, torch.tensor([[1.0], [0], [0]]).repeat(1, 70))
    for is_in_place in (True, False):
        wide = torch.full((V, 100), torch.nan)
        view = wide[:, 20:90].T
        view.copy_(inputs[0])
        assert torch.equal(given, scores_of(cpu, (view, *inputs[1:]), None, 100))
        out = view if is_in_place else torch.full((V, 75), torch.nan)[:, :70].T
        cpu.softmax_backward(view, 0, *inputs[1:], None, row_max, log_sum, entropy, torch.ones(70), None, None, out)
        assert torch.equal(out, wanted)
        assert is_in_place or torch.equal(view, inputs[0])
        assert wide[:, :20].isnan().all() and wide[:, 90:].isnan().all()


def test_threads_do_not_change_a_bit() -> None:
    inputs = problem("random", 200, 30_001)  # enough elements for threads to be made
    upstream = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        values = scores(cpu, torch.float32, inputs, None, 30_001)
        results.append((values, gradient(cpu, torch.float32, inputs, None, values, upstream)))
    for values, grad in results[1:]:
        assert torch.equal(values, results[0][0]) and torch.equal(grad, results[0][1])


def test_nan_stays_in_its_row() -> None:
    inputs = problem("random", 5, V)
    clean = scores(cpu, torch.float32, inputs, None, 100)
    inputs[0][2, 700] = torch.nan
    values = scores(cpu, torch.float32, inputs, None, 100)
    others = torch.tensor([0, 1, 3, 4])
    assert values[[0, 1, 3], 2].isnan().all()
    assert torch.equal(values[:, others], clean[:, others])
    grad = gradient(cpu, torch.float32, inputs, None, values, torch.ones(3, 5))
    assert grad[2].isnan().any() and grad[others].isfinite().all()


def test_no_upstream_gradient_is_zero_even_of_a_sure_row() -> None:
    inputs = problem("peaked at the target", 5, V)
    values = scores(cpu, torch.float32, inputs, None, V)
    assert (gradient(cpu, torch.float32, inputs, None, values, torch.zeros(3, 5)) == 0).all()


LENGTHS = [[], [0], [1], [2], [0, 1, 0, 2, 0, 5000, 3, 0], [64] * 8 + [63, 65], [13] * 500]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_segment_scan(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(3)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    a = torch.rand(sum(lengths), generator=generator) * 1.2 - 0.2
    b = torch.randn(sum(lengths), generator=generator)
    a[(cu[1:].long() - 1)[torch.tensor(lengths) > 0] if lengths else []] = torch.nan  # nobody may read these
    outputs = [torch.empty_like(b), torch.empty_like(b), torch.empty_like(b, dtype=torch.float64)]
    cpu.segment_scan(a, b, cu, outputs[0])
    reference.segment_scan(a, b, cu, outputs[1])
    reference.segment_scan(a.double(), b.double(), cu, outputs[2])
    assert_no_worse(*outputs)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[128] * 40_000, [4_500_000, 3, 0, 50_000]], ids=["x 128", "one long"])
def test_long_segment_scan(lengths: list[int], threads: int) -> None:
    """y_t - a y_{t+1} = b_t, checked without a loop; enough tokens for threads to be made."""
    torch.set_num_threads(threads)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    b = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(3))
    a = torch.full_like(b, 0.97)
    y = torch.empty_like(b)
    cpu.segment_scan(a, b, cu, y)
    ends = (cu[1:].long() - 1)[torch.tensor(lengths) > 0]
    following = torch.cat([y[1:], y.new_zeros(1)]).index_fill(0, ends, 0)
    assert torch.equal(y[ends], b[ends])
    torch.testing.assert_close(y - a * following, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["mse", "expectile", "huber"])
@pytest.mark.parametrize("n", [0, 1, 2, 3000])
def test_critic_loss(n: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    values = 1e4 + 1e-2 * torch.randn(4, n, generator=generator)
    targets = values + torch.randn(4, n, generator=generator)
    results = []
    for rows, dtype in ((cpu, torch.float32), (reference, torch.float32), (reference, torch.float64)):
        out = torch.empty(4, dtype=dtype), torch.empty(4, 4, dtype=dtype), torch.empty(4, n, dtype=dtype)
        rows.critic_loss(values.to(dtype), targets.to(dtype), kind, 0.7, 0.5, *out)
        results.append(out)
    for mine, plain, exact in zip(*results, strict=True):
        if n == 0 and mine.numel() == 16:
            assert mine.isnan().all()
        else:
            assert_no_worse(mine, plain, exact)
    if n > 1:
        torch.testing.assert_close(results[0][1][:, 3].double(), results[2][1][:, 3], rtol=1e-6, atol=0)


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    out = torch.zeros(4), torch.zeros(4, 4), torch.zeros(4, 2)
    with pytest.raises(ValueError, match="kind: wanted mse, expectile or huber, got 'l1'"):
        cpu.critic_loss(torch.zeros(4, 2), torch.zeros(4, 2), "l1", 0.7, 0.5, *out)
    monkeypatch.setattr(cpu, "SIMD", "sse9")
    with pytest.raises(ValueError, match=r"simd: wanted one of auto, .*baseline on this machine, got 'sse9'"):
        cpu.segment_scan(torch.zeros(2), torch.zeros(2), torch.tensor([0, 2]).int(), torch.zeros(2))


def test_memory_that_would_be_misread_never_reaches_the_core() -> None:
    inputs = problem("random", 4, 16)
    state = torch.zeros(4, 4)
    logits = columns_contiguous(inputs[0])
    for bad in (logits.double(), inputs[0], columns_contiguous(torch.zeros(8, 16))[::2], logits[:3]):
        with pytest.raises(AssertionError):
            cpu.softmax_update(bad, 0, *inputs[1:], None, state)
    with pytest.raises(AssertionError):
        cpu.softmax_update(logits, 0, inputs[1].int(), inputs[2], None, state)
    logits = torch.zeros(100).as_strided((4, 16), (1, 4))
    for out in (inputs[0], logits[:, :8], logits.as_strided((4, 16), (1, 5)), torch.zeros(16, 4).T.double()):
        with pytest.raises(AssertionError):
            cpu.softmax_backward(logits, 0, *inputs[1:], None, *torch.zeros(4, 4), None, None, out)
    with pytest.raises(AssertionError):
        cpu.segment_scan(torch.zeros(4)[::2], torch.zeros(2), torch.tensor([0, 2]).int(), torch.zeros(2))


def test_runs_without_numpy() -> None:
    code = """
import sys
sys.modules["numpy"] = None  # importing it now fails
import warnings
warnings.simplefilter("ignore")
import torch
from archer_fast.ops import cpu
y = torch.empty(3)
cpu.segment_scan(torch.ones(3), torch.ones(3), torch.tensor([0, 3], dtype=torch.int32), y)
assert y.tolist() == [3, 2, 1], y
"""
    subprocess.run([sys.executable, "-c", code], check=True)
