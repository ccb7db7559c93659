"""The row kernels against float64, a few columns at a time."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

BLOCK = 32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in a short row, unless the test is about the real ones."""
    if "launched" not in request.fixturenames:
        from archer_fast.ops import triton_choices

        monkeypatch.setattr(triton_choices, "row_tile", lambda num_columns, vector: (BLOCK, 4))


class Problem(NamedTuple):
    logits: Tensor  # [n, V]
    target_ids: Tensor  # [n]
    inv_temperature: Tensor  # [n] float32
    softcap: float | None = None


Grads = tuple[Tensor, Tensor | None, Tensor | None]  # of log-probs, entropy, lse; each [n]


class Scores(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    lse: Tensor


def make(n: int, v: int, dtype: torch.dtype = torch.float32, softcap: float | None = None) -> Problem:
    target_ids = torch.randint(0, v, (n,))
    target_ids[: n // 2] = v - 1
    return Problem((torch.randn(n, v) * 4).to(dtype), target_ids, torch.rand(n) + 0.5, softcap)


def plain(problem: Problem, dtype: torch.dtype) -> Scores:
    """The definition; in float64 it is the truth."""
    x = problem.logits.to(dtype)
    if problem.softcap is not None:
        x = problem.softcap * torch.tanh(x / problem.softcap)
    z = x * problem.inv_temperature.to(dtype)[:, None]
    logp = z.log_softmax(-1)
    entropy = -torch.where(logp == -torch.inf, 0.0, logp.exp() * logp).sum(-1)
    return Scores(logp.gather(1, problem.target_ids[:, None])[:, 0], entropy, z.logsumexp(-1))


def maximum_and_log_sum(problem: Problem) -> tuple[Tensor, Tensor]:
    """float32 each; their sum is lse."""
    x = problem.logits.double()
    if problem.softcap is not None:
        x = problem.softcap * torch.tanh(x / problem.softcap)
    z = x * problem.inv_temperature.double()[:, None]
    row_max = z.amax(1).float() if z.shape[1] else z.new_zeros(len(z)).float()
    return row_max, (z.logsumexp(1) - row_max.double()).float()


def fresh_state(n: int) -> Tensor:
    return torch.tensor([[-torch.inf, 0.0, 0.0, torch.nan]]).repeat(n, 1)


def update(launch: ModuleType, problem: Problem, first_columns: tuple[int, ...] = (0,)) -> Tensor:
    """The state after tiles that start at `first_columns`, in that order."""
    logits, (n, v) = problem.logits, problem.logits.shape
    state = fresh_state(n)
    for first in first_columns:
        last = min((c for c in (*first_columns, v) if c > first), default=v)
        tile = logits[:, first:last]
        launch.softmax_update(tile, first, problem.target_ids, problem.inv_temperature, problem.softcap, state)
    return state


def scores(state: Tensor) -> Scores:
    m, s, t, at_target = state.unbind(1)
    return Scores((at_target - m) - s.log(), s.log() - t / s, m + s.log())


def backward(
    launch: ModuleType,
    problem: Problem,
    grads: Grads,
    out: Tensor | None = None,
    tiles: list[tuple[int, int]] | None = None,
) -> Tensor:
    """In place on a copy of the logits where no `out` is given; a tile of columns at a time, or all of them."""
    exact, row_max, log_sum = plain(problem, torch.float64), *maximum_and_log_sum(problem)
    out = problem.logits.clone() if out is None else out
    logits = out if out.dtype == problem.logits.dtype else problem.logits
    target_ids, inv_temperature, softcap = problem[1:]
    entropy = exact.entropy.float()
    for first, end in tiles or [(0, problem.logits.shape[1])]:
        tile = logits[:, first:end], first, target_ids, inv_temperature, softcap
        launch.softmax_backward(*tile, row_max, log_sum, entropy, *grads, out[:, first:end])
    return out


def plain_backward(problem: Problem, grads: Grads, dtype: torch.dtype) -> Tensor:
    logits = problem.logits.to(dtype).requires_grad_()
    found = plain(problem._replace(logits=logits), dtype)
    total = sum((x * g.to(dtype)).sum() for x, g in zip(found, grads, strict=True) if g is not None)
    return torch.autograd.grad(total, logits)[0].detach()


@pytest.fixture
def assert_backward(launch: ModuleType, assert_no_worse: Callable[..., None]) -> Callable[..., Tensor]:
    """assert_backward(problem, grads): the gradient, after comparison."""

    def check(problem: Problem, grads: Grads) -> Tensor:
        found = backward(launch, problem, grads)
        same, exact = (plain_backward(problem, grads, dtype) for dtype in (torch.float32, torch.float64))
        assert_no_worse(found, same, exact)
        return found

    return check


# -- forward -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("v", [1, 31, 32, 203])
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_is_no_worse_than_plain_torch(launch, assert_no_worse, dtype, v, softcap):
    problem = make(5, v, dtype, softcap)
    for actual, same, exact in zip(
        scores(update(launch, problem)), plain(problem, torch.float32), plain(problem, torch.float64), strict=True
    ):
        assert_no_worse(actual, same, exact)


@pytest.mark.parametrize("first_columns", [(0, 496), (496, 0), (0, 1, 40, 1002)])
def test_column_tiles_add_up_in_any_order(launch, assert_no_worse, first_columns):
    problem = make(4, 1003)
    found = scores(update(launch, problem, first_columns))
    for actual, same, exact in zip(found, plain(problem, torch.float32), plain(problem, torch.float64), strict=True):
        assert_no_worse(actual, same, exact)


@pytest.mark.parametrize("n", [0, 1, 63])
def test_any_number_of_rows(launch, assert_no_worse, n):
    problem = make(n, 45)
    assert_no_worse(
        scores(update(launch, problem)).logprobs, *(plain(problem, d).logprobs for d in (torch.float, torch.double))
    )


def test_peaked_logits(launch):
    """One column holds all the mass: log-prob 0 there, the distance elsewhere, entropy 0 and not a rounding of 0."""
    logits = torch.zeros(2, 70)
    logits[:, 40] = torch.tensor([1e4, 200.0])
    found = scores(update(launch, Problem(logits.repeat(2, 1), torch.tensor([40, 40, 3, 3]), torch.ones(4))))
    assert found.logprobs.tolist() == [0.0, 0.0, -1e4, -200.0]
    assert found.entropy.tolist() == [0.0] * 4


def test_entropy_of_a_peaked_policy(launch):
    """lse - sum p x of float32 is noise here (6e-5 at 1000); s = 1 + 2e-7 alone is rounded, to one eps."""
    logits = torch.full((1, 100), 1000.0)
    logits[0, 7] = 1020.0
    problem = Problem(logits, torch.tensor([7]), torch.ones(1))
    exact = plain(problem, torch.float64).entropy
    assert torch.allclose(scores(update(launch, problem)).entropy.double(), exact, rtol=1e-5, atol=1.2e-7)
    assert exact > 4e-6


def test_all_logits_near_minus_256(launch, assert_no_worse):
    problem = make(3, 203)
    problem = problem._replace(logits=problem.logits - 256.0, inv_temperature=torch.ones(3))
    found = scores(update(launch, problem))
    assert_no_worse(found.logprobs, *(plain(problem, d).logprobs for d in (torch.float, torch.double)))
    assert (found.logprobs <= 0).all()


@pytest.mark.parametrize("v", [BLOCK - 1, BLOCK + 1, 2 * BLOCK + 5])
def test_phantom_columns_do_not_count(launch, v):
    """The probabilities of all columns sum to 1, though the last tile ends in columns that do not exist."""
    row = torch.randn(1, v) - 50.0
    problem = Problem(row.repeat(v, 1), torch.arange(v), torch.ones(v))
    logprobs = scores(update(launch, problem)).logprobs
    assert (logprobs <= 0).all()
    assert torch.allclose(logprobs.exp().sum(), torch.tensor(1.0), atol=1e-6)


def test_columns_outside_the_view_are_not_read(launch):
    problem = make(3, 45)
    wide = torch.full((3, 64), torch.nan)
    wide[:, 5:50] = problem.logits
    assert torch.equal(update(launch, problem._replace(logits=wide[:, 5:50])), update(launch, problem))


def test_target_in_the_last_column(launch, assert_no_worse):
    problem = make(3, 2 * BLOCK)._replace(target_ids=torch.full((3,), 2 * BLOCK - 1))
    assert_no_worse(
        scores(update(launch, problem)).logprobs, *(plain(problem, d).logprobs for d in (torch.float, torch.double))
    )


def test_target_is_written_by_its_own_tile_alone(launch):
    problem = make(2, 90)._replace(target_ids=torch.tensor([3, 70]))
    state = fresh_state(2)
    launch.softmax_update(problem.logits[:, :45], 0, problem.target_ids, problem.inv_temperature, None, state)
    assert state[:, 3].isnan().tolist() == [False, True]
    launch.softmax_update(problem.logits[:, 45:], 45, problem.target_ids, problem.inv_temperature, None, state)
    at_target = problem.logits.gather(1, problem.target_ids[:, None])[:, 0] * problem.inv_temperature
    assert torch.equal(state[:, 3], at_target)


def test_masked_columns_even_a_whole_first_tile(launch, assert_no_worse):
    problem = make(3, 100)
    problem.logits[0, :BLOCK] = -torch.inf
    problem.logits[1, :99] = -torch.inf
    problem.logits[2, BLOCK : 2 * BLOCK] = -torch.inf
    problem = problem._replace(target_ids=torch.tensor([99, 99, 40]))
    for first_columns in ((0,), (0, BLOCK)):
        found = scores(update(launch, problem, first_columns))
        for actual, same, exact in zip(
            found, plain(problem, torch.float32), plain(problem, torch.float64), strict=True
        ):
            assert_no_worse(actual, same, exact)
    assert found.logprobs[2] == -torch.inf


def test_a_row_of_masked_columns_alone(launch):
    state = update(launch, Problem(torch.full((1, 40), -torch.inf), torch.tensor([1]), torch.ones(1)))
    assert state.tolist() == [[-torch.inf, 0.0, 0.0, -torch.inf]]


@pytest.mark.parametrize("column", [0, BLOCK + 3, 99, slice(None)])
def test_nan_stays_in_its_own_row(launch, column):
    problem = make(3, 100)
    clean = update(launch, problem)
    problem.logits[1, column] = torch.nan
    for first_columns in ((0,), (0, 50)):
        state = update(launch, problem, first_columns)
        assert state[1, 1:3].isnan().all()
        assert torch.allclose(state[[0, 2]], clean[[0, 2]])
        assert all(x[1].isnan() for x in scores(state))


def test_temperature_is_each_row_s_own(launch, assert_no_worse):
    problem = make(3, 45)._replace(inv_temperature=torch.tensor([0.1, 1.0, 20.0]))
    found = scores(update(launch, problem))
    for actual, same, exact in zip(found, plain(problem, torch.float32), plain(problem, torch.float64), strict=True):
        for i in range(3):
            assert_no_worse(actual[i], same[i], exact[i])


def test_softcap_is_right_where_tanh_is_nearly_linear_and_where_it_is_flat(launch):
    """2 sigmoid(2x) - 1 would lose half its digits at 1e-4."""
    logits = torch.tensor([[1e-4, -1e-4, 0.0, 7.4, -7.6, 31.0, -900.0, 900.0]])
    for target in range(logits.shape[1]):
        state = update(launch, Problem(logits, torch.tensor([target]), torch.ones(1), 30.0))
        exact = 30.0 * torch.tanh(logits[0, target].double() / 30.0)
        assert torch.allclose(state[0, 3].double(), exact, rtol=4e-7, atol=0.0)


# -- backward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("v", [1, 31, 203])
def test_backward_is_no_worse_than_plain_torch(assert_backward, v, softcap):
    """All three upstream gradients, of either sign and zero."""
    problem = make(6, v, softcap=softcap)
    grads = tuple(torch.randn(6) for _ in range(3))
    for g in grads:
        g[2] = 0.0
    assert_backward(problem, grads)


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_each_upstream_gradient_counts_where_it_is_given(assert_backward, with_entropy, with_lse):
    problem = make(4, 70)
    grads = (torch.randn(4), torch.randn(4) if with_entropy else None, torch.randn(4) if with_lse else None)
    assert assert_backward(problem, grads).abs().max() > 0.01


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_zero_and_negative_upstream_gradients(assert_backward, sign):
    problem = make(3, 70)
    grads = (torch.tensor([0.0, sign, 2 * sign]), None, None)
    found = assert_backward(problem, grads)
    assert (found[0] == 0).all()
    assert (found[1:].gather(1, problem.target_ids[1:, None]).sign() == sign).all()


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16,) * 2, (torch.float16,) * 2],
)
def test_backward_in_half_precision(launch, dtype, out_dtype):
    """One rounding of the float32 result (the interpreter truncates to bfloat16: a unit in the last place)."""
    problem = make(3, 70, dtype, softcap=5.0)
    grads = tuple(torch.randn(3) for _ in range(3))
    out = None if dtype == out_dtype else torch.full((3, 70), torch.nan, dtype=out_dtype)
    found = backward(launch, problem, grads, out)
    assert found.dtype == out_dtype
    exact = plain_backward(problem, grads, torch.float64)
    smallest = 1e-6 if out_dtype == torch.bfloat16 else 1e-7 + torch.finfo(torch.float16).smallest_normal * 1e-3
    assert ((found.double() - exact).abs() <= torch.finfo(out_dtype).eps * exact.abs() + smallest).all()


@pytest.mark.parametrize("n", [0, 1, 63])
def test_backward_of_any_number_of_rows(assert_backward, n):
    assert_backward(make(n, 40), tuple(torch.randn(n) for _ in range(3)))


def test_backward_of_masked_columns_is_zero(launch, assert_no_worse):
    """0 * inf has no place: p log p of an impossible column is 0, and so is its slope."""
    problem = make(2, 70)._replace(target_ids=torch.tensor([60, 69]))
    problem.logits[0, :40] = -torch.inf
    problem.logits[1, :69] = -torch.inf
    grads = tuple(torch.tensor([1.5, -2.0]) for _ in range(3))
    found = backward(launch, problem, grads)
    assert (found[problem.logits == -torch.inf] == 0).all() and not found.isnan().any()
    kept = problem._replace(logits=problem.logits[:1, 40:], target_ids=torch.tensor([20]))
    kept = kept._replace(inv_temperature=problem.inv_temperature[:1])
    grads = tuple(g[:1] for g in grads)
    assert_no_worse(
        found[:1, 40:], plain_backward(kept, grads, torch.float32), plain_backward(kept, grads, torch.float64)
    )


def test_backward_of_a_peaked_policy(launch):
    logits = torch.zeros(1, 70)
    logits[0, 3] = 1e4
    found = backward(
        launch, Problem(logits, torch.tensor([3]), torch.ones(1)), (torch.ones(1), torch.ones(1), torch.zeros(1))
    )
    assert (found == 0).all()


def test_backward_keeps_nan_in_its_own_row(launch):
    problem = make(3, 70)
    grads = tuple(torch.ones(3) for _ in range(3))
    clean = backward(launch, problem, grads)
    problem.logits[1, 5] = torch.nan
    found = backward(launch, problem, grads)
    assert found[1].isnan().any() and torch.equal(found[[0, 2]], clean[[0, 2]])


def test_backward_writes_its_view_alone(launch):
    """Rows of a wider buffer: what lies between them stays."""
    problem, grads = make(3, 45), tuple(torch.randn(3) for _ in range(3))
    wide = torch.full((3, 64), torch.nan)
    wide[:, 5:50] = problem.logits
    found = backward(launch, problem, grads, wide[:, 5:50])
    assert torch.equal(found, backward(launch, problem, grads))
    assert wide[:, :5].isnan().all() and wide[:, 50:].isnan().all()


# -- choices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("v", "vector"), [(7, 1), (1003, 1), (3001, 1), (64, 8), (2100, 4), (4104, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_launch_chooses_is_listed(launch, launched, assert_listed, assert_no_worse, dtype, v, vector):
    problem = make(1, v, dtype, 5.0 if v % 3 else None)
    found = scores(update(launch, problem))
    assert_no_worse(found.logprobs, *(plain(problem, d).logprobs for d in (torch.float, torch.double)))
    backward(launch, problem, (torch.ones(1), None, None))
    if dtype == torch.float32:
        backward(launch, problem, (torch.ones(1), None, None), torch.empty(1, v, dtype=torch.bfloat16))
    for one in launched:
        assert_listed(one)
    expected = min(vector, 16 // dtype.itemsize)
    assert launched[0][0].constexprs["VECTOR"] == (expected if v % (16 // dtype.itemsize) == 0 else 1)


def test_rows_that_start_off_alignment_are_read_one_by_one(launch, launched, assert_listed):
    problem = make(2, 65)
    found = update(launch, problem._replace(logits=problem.logits[:, 1:], target_ids=torch.tensor([0, 63])))
    assert launched[0][0].constexprs["VECTOR"] == 1 and not found.isnan().any()
    assert_listed(launched[0])


def test_every_variant_has_a_name_of_its_own(launch):
    names = [variant.name for variant in launch.variants()]
    assert len(names) == len(set(names)) > 50
