"""The fused forward against float64, in tiles of 16: several in every dimension, each way of loading them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TILE = 16


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 that load as the real ones do, groups of 2 row blocks, unless the test is about the real choices."""
    if "launched" in request.fixturenames:
        return
    from archer_fast.ops import triton_choices as choices

    real = choices.fused_tile

    def small(*question: object) -> choices.Tile:
        return real(*question)._replace(rows=TILE, columns=TILE, depth=TILE)

    monkeypatch.setattr(choices, "fused_tile", small)
    monkeypatch.setattr(choices, "GROUP", 2)
    choices.linear_logprobs_variant.cache_clear()
    request.addfinalizer(choices.linear_logprobs_variant.cache_clear)


@pytest.fixture
def on_chip(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """on_chip(90): choose as a launch on that chip would, with few processors so that a split has several tiles."""
    from archer_fast.ops import triton_choices as choices

    def set_(capability: int) -> None:
        monkeypatch.setattr(choices, "chip_of", lambda device: choices.Chip(capability, 2))

    set_(80)
    return set_


class Problem(NamedTuple):
    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    target_ids: Tensor  # [N]
    rows: Tensor | None
    bias: Tensor | None
    inv_temperature: Tensor  # [N] float32
    softcap: float | None = None


def make(
    n: int = 19,
    v: int = 71,
    h: int = 24,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    num_hidden: int = 0,
) -> Problem:
    """`num_hidden` > 0: rows drawn among as many hidden states, repeated and in no order."""
    target_ids = torch.randint(0, v, (n,))
    target_ids[: n // 2] = v - 1
    return Problem(
        torch.randn(num_hidden or n, h).to(dtype),
        torch.randn(v, h).to(dtype),
        target_ids,
        torch.randint(0, num_hidden, (n,)) if num_hidden else None,
        torch.randn(v).to(dtype) if bias else None,
        torch.rand(n) + 0.5,
    )


def plain(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, entropy, lse) by definition; in float64 the truth."""
    hidden = problem.hidden if problem.rows is None else problem.hidden[problem.rows]
    x = hidden.to(dtype) @ problem.weight.to(dtype).T
    if problem.bias is not None:
        x = x + problem.bias.to(dtype)
    if problem.softcap is not None:
        x = problem.softcap * torch.tanh(x / problem.softcap)
    z = x * problem.inv_temperature.to(dtype)[:, None]
    logp = z.log_softmax(-1)
    entropy = -torch.where(logp == -torch.inf, 0.0, logp.exp() * logp).sum(-1)
    return logp.gather(1, problem.target_ids[:, None])[:, 0], entropy, z.logsumexp(-1)


def scores(launch: ModuleType, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    state = launch.linear_logprobs_fwd(*problem)
    assert state.shape == (*problem.target_ids.shape, 4) and state.dtype == torch.float32
    m, s, t, at_target = state.unbind(1)
    return (at_target - m) - s.log(), s.log() - t / s, m + s.log()


@pytest.fixture
def assert_right(launch: ModuleType, assert_no_worse: Callable[..., None], on_chip: object) -> Callable[..., Tensor]:
    """assert_right(problem): the log-probs, after comparison of all three scores."""

    def check(problem: Problem) -> Tensor:
        found, same, exact = scores(launch, problem), plain(problem, torch.float32), plain(problem, torch.float64)
        largest = exact[2].abs().max().item() if exact[2].numel() else 0.0
        for one in zip(found, same, exact, strict=True):
            assert_no_worse(*one, given=largest)  # sums in another order than plain torch's
        return found[0]

    return check


@pytest.mark.parametrize("num_hidden", [0, 7])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_no_worse_than_plain_torch(assert_right, on_chip, dtype, chip, softcap, num_hidden):
    """Pointers and tensor descriptors, rows gathered or all, with a bias."""
    on_chip(chip)
    assert_right(make(dtype=dtype, bias=True, num_hidden=num_hidden)._replace(softcap=softcap))


@pytest.mark.parametrize(("n", "v", "h"), [(1, 1, 1), (1, 16, 16), (17, 15, 33), (35, 33, 7), (3, 203, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_shapes(assert_right, dtype, n, v, h):
    assert_right(make(n, v, h, dtype))


def test_a_thousand_and_three_columns(assert_right, on_chip):
    on_chip(90)
    assert_right(make(5, 1003, 16, torch.bfloat16))


@pytest.mark.parametrize("num_hidden", [0, 5])
@pytest.mark.parametrize("n", [0, 1, 63])
def test_any_number_of_rows(assert_right, n, num_hidden):
    assert_right(make(n, 20, 16, num_hidden=num_hidden))


@pytest.mark.parametrize("num_processors", [1, 3, 1000])
@pytest.mark.parametrize("n", [5, 16, 17, 80])
def test_every_row_block_meets_every_split_once(launch, assert_right, monkeypatch, n, num_processors):
    """Whole groups and a part of one, one split and many; what no program wrote is NaN (poisoned)."""
    from archer_fast.ops import triton_choices as choices

    monkeypatch.setattr(choices, "chip_of", lambda device: choices.Chip(80, num_processors))
    assert_right(make(n, 100, 8))


@pytest.mark.parametrize("num_processors", [1, 108, 132])
def test_splits_cover_the_vocabulary(num_processors):
    """No tile is left out, none of the splits is empty, and large problems fill the chip at least twice."""
    from archer_fast.ops.triton_choices import vocab_splits

    for num_blocks in (1, 3, 16, 512, 8192):
        for num_tiles in (1, 2, 7, 393, 1187):
            tiles, splits = vocab_splits(num_blocks, num_tiles, num_processors)
            assert tiles >= 1 and (splits - 1) * tiles < num_tiles <= splits * tiles
            assert splits >= min(8, num_tiles) / 2
            if num_blocks * num_tiles >= 8 * num_processors:
                assert num_blocks * splits >= 2 * num_processors


# -- numerics that others got wrong --------------------------------------------------------------------


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("v", [TILE - 1, TILE + 1, 5 * TILE + 3])
def test_phantom_columns_do_not_count(launch, on_chip, v, chip):
    """All logits near -256: a column that does not exist, at logit 0, would hold all the mass."""
    on_chip(chip)
    problem = make(v, v, 16, torch.bfloat16, num_hidden=1)._replace(
        target_ids=torch.arange(v), inv_temperature=torch.ones(v)
    )
    logprobs = scores(launch, problem._replace(bias=torch.full((v,), -256.0)))[0]
    assert (logprobs <= 0).all()
    assert torch.allclose(logprobs.exp().sum(), torch.tensor(1.0), atol=1e-5)


def test_all_logits_near_minus_256(assert_right):
    problem = make(n=5)
    assert (assert_right(problem._replace(bias=torch.full((71,), -256.0))) <= 0).all()


def test_peaked_logits(launch, on_chip):
    problem = make(4, 71, 16)._replace(inv_temperature=torch.ones(4), target_ids=torch.tensor([40, 40, 3, 70]))
    bias = torch.zeros(71)
    bias[40] = 1e4
    found = scores(launch, problem._replace(hidden=torch.zeros(4, 16), bias=bias))
    assert found[0].tolist() == [0.0, 0.0, -1e4, -1e4]
    assert found[1].tolist() == [0.0] * 4


def test_entropy_of_a_peaked_policy(launch, on_chip):
    bias = torch.full((100,), 1000.0)
    bias[77] = 1020.0
    problem = make(2, 100)._replace(hidden=torch.zeros(2, 24), bias=bias, inv_temperature=torch.ones(2))
    exact = plain(problem, torch.float64)[1]
    assert torch.allclose(scores(launch, problem)[1].double(), exact, rtol=1e-5, atol=2.4e-7)
    assert (exact > 4e-6).all()


@pytest.mark.parametrize("v", [TILE, 4 * TILE, 4 * TILE + 1])
def test_target_in_the_last_column(assert_right, v):
    assert_right(make(3, v)._replace(target_ids=torch.full((3,), v - 1)))


@pytest.mark.parametrize("masked", [slice(0, TILE), slice(0, 70), slice(TILE, 3 * TILE), slice(30, 71)])
def test_masked_columns_even_a_whole_first_tile(assert_right, masked):
    """-inf in the bias; the target is masked in the last case."""
    problem = make(3, bias=True)
    problem.bias[masked] = -torch.inf
    assert_right(problem._replace(target_ids=torch.full((3,), 70)))


def test_a_vocabulary_masked_entirely(launch, on_chip):
    state = launch.linear_logprobs_fwd(*make(2)._replace(bias=torch.full((71,), -torch.inf)))
    assert state.tolist() == [[-torch.inf, 0.0, 0.0, -torch.inf]] * 2


@pytest.mark.parametrize("num_hidden", [0, 19])
@pytest.mark.parametrize("chip", [80, 90])
def test_nan_in_hidden_stays_in_its_own_row(launch, on_chip, chip, num_hidden):
    on_chip(chip)
    problem = make(dtype=torch.bfloat16, num_hidden=num_hidden)
    if num_hidden:
        problem = problem._replace(rows=torch.arange(num_hidden).flip(0))
    clean = launch.linear_logprobs_fwd(*problem)
    problem.hidden[9, 20] = torch.nan  # row 9 either way round
    state = launch.linear_logprobs_fwd(*problem)
    assert state[9, 1:3].isnan().all() and scores(launch, problem)[0][9].isnan()
    others = torch.arange(19) != 9
    assert torch.equal(state[others], clean[others])


def test_nan_in_one_column_reaches_every_row(launch, on_chip):
    problem = make(3)
    problem.weight[40] = torch.nan
    assert all(x.isnan().all() for x in scores(launch, problem))


def test_temperature_is_each_row_s_own(assert_right):
    problem = make(3)._replace(inv_temperature=torch.tensor([0.1, 1.0, 10.0]))
    together = assert_right(problem)
    for i in range(3):
        alone = problem._replace(
            hidden=problem.hidden[i : i + 1],
            target_ids=problem.target_ids[i : i + 1],
            inv_temperature=problem.inv_temperature[i : i + 1],
        )
        assert torch.equal(assert_right(alone), together[i : i + 1])


def test_rows_gathered_and_repeated(launch, on_chip):
    """Scoring rows equals scoring the gathered states; a row given twice is scored twice, against its own target."""
    problem = make(6, num_hidden=3)._replace(rows=torch.tensor([2, 0, 2, 2, 1, 0]))
    gathered = problem._replace(hidden=problem.hidden[problem.rows], rows=None)
    assert torch.equal(launch.linear_logprobs_fwd(*problem), launch.linear_logprobs_fwd(*gathered))


def test_states_nobody_scores_are_not_read(launch, on_chip):
    problem = make(4, num_hidden=9)._replace(rows=torch.tensor([1, 5, 1, 8]))
    clean = launch.linear_logprobs_fwd(*problem)
    problem.hidden[[0, 2, 3, 4, 6, 7]] = torch.nan
    assert torch.equal(launch.linear_logprobs_fwd(*problem), clean)


@pytest.mark.parametrize("chip", [80, 90])
def test_operands_need_not_be_contiguous(launch, on_chip, chip):
    on_chip(chip)
    problem = make(dtype=torch.float16, num_hidden=9)
    clean = launch.linear_logprobs_fwd(*problem)
    wide = torch.full((9, 40), torch.nan, dtype=torch.float16)
    wide[:, 8:32] = problem.hidden
    spread = torch.stack([problem.rows, problem.rows + 1], 1)
    views = problem._replace(hidden=wide[:, 8:32], rows=spread[:, 0], weight=problem.weight.T.contiguous().T)
    assert not views.rows.is_contiguous() and views.weight.stride(0) == 1
    assert torch.equal(launch.linear_logprobs_fwd(*views), clean)


def test_expanded_rows_are_no_tensor_descriptor(launch, launched, on_chip):
    on_chip(90)
    problem = make(3, dtype=torch.bfloat16)
    same = problem._replace(hidden=problem.hidden[:1].expand(3, -1))
    repeated = problem._replace(hidden=problem.hidden[:1].repeat(3, 1))
    found = launch.linear_logprobs_fwd(*same)
    assert not launched[0][0].constexprs["HIDDEN_TMA"]
    assert torch.allclose(found, launch.linear_logprobs_fwd(*repeated), rtol=1e-5)
    assert launched[1][0].constexprs["HIDDEN_TMA"]


def test_merging_states_is_the_softmax_of_all_columns(launch):
    """Splits of 0, 1 and many columns that are not -inf, one that holds NaN."""
    z = torch.randn(4, 3, 10).double() * 5  # [splits, rows, columns]
    z[0], z[1, :, 1:], z[3, 1, 4] = -torch.inf, -torch.inf, torch.nan
    m = z.nan_to_num(nan=-torch.inf).amax(-1)
    distance = z - m.clamp(min=-1e9)[..., None]
    p = distance.exp()
    t = torch.where(z == -torch.inf, 0.0, p * distance).sum(-1)
    z_target = torch.zeros_like(m)
    z_target[2] = z[2, :, 0]
    merged = launch.merge_states(torch.stack([m, p.sum(-1), t, z_target], -1))
    row = z.transpose(0, 1).reshape(3, 40)[[0, 2]]
    logp = row.log_softmax(-1)
    top, s, t, at_target = merged[[0, 2]].unbind(-1)
    assert torch.allclose(top + s.log(), row.logsumexp(-1))
    assert torch.allclose(s.log() - t / s, -torch.where(row == -torch.inf, 0.0, logp.exp() * logp).sum(-1))
    assert torch.equal(at_target, z[2, [0, 2], 0])
    assert merged[1, 1:3].isnan().all()


# -- choices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_hidden", [0, 5])
@pytest.mark.parametrize("h", [72, 71])
@pytest.mark.parametrize("chip", [80, 90, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_launch_chooses_is_listed(assert_right, launched, assert_listed, on_chip, dtype, chip, h, num_hidden):
    """The real tiles, on two tiles of columns and two of depth."""
    on_chip(chip)
    assert_right(make(3, 130, h, dtype, num_hidden=num_hidden)._replace(softcap=9.0 if num_hidden else None))
    ((variant, args),) = launched
    assert_listed((variant, args))
    assert chip in variant.capabilities
    by_tma = chip >= 90 and h == 72 and dtype != torch.float32
    assert variant.constexprs["WEIGHT_TMA"] == by_tma
    assert variant.constexprs["HIDDEN_TMA"] == (by_tma and not num_hidden)
    assert variant.needs_tensor_core == (dtype != torch.float32)


def test_every_listed_configuration_of_a_chip_can_be_chosen(launch):
    """`variants()` names no capability for which the choice would be another."""
    from archer_fast.ops import triton_choices as choices

    dtypes = {name: dtype for dtype, name in choices.TRITON_TYPES.items()}
    seen = set()
    for variant in launch.variants():
        if variant.kernel is choices.linear_logprobs_fwd_kernel:
            dtype = dtypes[variant.name.split("[")[1].split(",")[0]]
            for chip in variant.capabilities:
                wanted = [variant.constexprs[x] for x in ("BLOCK_N", "BLOCK_V", "BLOCK_H")] + [variant.num_warps]
                vector = variant.constexprs["VECTOR"]
                tiles = [choices.fused_tile(chip, dtype, vector, has_rows) for has_rows in (False, True)]
                assert wanted in [list(tile[:4]) for tile in tiles]
                seen.add(chip)
    assert seen == {80, 90, 100}
