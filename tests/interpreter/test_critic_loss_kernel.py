"""The critic's loss kernel against float64, over several tiles."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

BLOCK = 32
KINDS = ["mse", "expectile", "huber"]
EXPECTILE, DELTA = 0.7, 0.6
NAN, INF = float("nan"), float("inf")


class Found(NamedTuple):
    losses: Tensor  # [4]
    stats: Tensor  # [4, 4] mean, min, max, std
    grads: Tensor  # [4, n]


@pytest.fixture
def turns() -> ModuleType:
    from archer_fast.ops import triton_turns

    return triton_turns


@pytest.fixture
def small_tiles(turns: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "critic_block", lambda num_values: (BLOCK, 4))


def run(turns: ModuleType, values: Tensor, targets: Tensor, kind: str) -> Found:
    found = Found(torch.full((4,), NAN), torch.full((4, 4), NAN), torch.full_like(values, NAN))
    turns.critic_loss(values, targets, kind, EXPECTILE, DELTA, *found)
    return found


def truth(values: Tensor, targets: Tensor, kind: str) -> Found:
    """In float64, the gradients by autograd."""
    x = values.double().requires_grad_()
    u = targets.double() - x
    if kind == "huber":
        each = torch.nn.functional.huber_loss(x, targets.double(), reduction="none", delta=DELTA)
    else:
        each = u.square()
        if kind == "expectile":
            weight = torch.where(u < 0, 1 - EXPECTILE, EXPECTILE)
            weight[:2] = 1
            each = weight * each
    losses = each.mean(1)
    (grads,) = torch.autograd.grad(losses.sum(), x)
    x = x.detach()
    stats = torch.stack([x.mean(1), x.amin(1), x.amax(1), x.std(1, unbiased=False)], 1)
    return Found(losses.detach(), stats, grads)


def assert_close(found: Found, wanted: Found, rtol: float = 2e-6) -> None:
    for got, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=rtol, atol=1e-7, equal_nan=True)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 1003])
def test_losses_statistics_and_gradients(turns: ModuleType, n: int, kind: str) -> None:
    values, targets = torch.randn(4, n), torch.randn(4, n)
    assert_close(run(turns, values, targets, kind), truth(values, targets, kind))


@pytest.mark.parametrize("n", [512, 1024, 1025, 8192])
def test_with_the_tiles_of_a_launch(turns: ModuleType, n: int) -> None:
    values, targets = torch.randn(4, n), torch.randn(4, n)
    assert_close(run(turns, values, targets, "expectile"), truth(values, targets, "expectile"))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("first", ["typical", "far off"])
def test_the_deviation_is_right_far_from_zero(turns: ModuleType, first: str) -> None:
    """Mean 1e4 and spread 1e-2: mean of squares less square of mean would be off by some 10."""
    values = 1e4 + torch.randn(4, 1000) * 1e-2
    if first == "far off":  # the number that the kernel shifts by
        values[:, 0] = -3e4
    found, wanted = run(turns, values, values + 1, "mse"), truth(values, values + 1, "mse")
    torch.testing.assert_close(found.stats.double(), wanted.stats, rtol=2e-6, atol=0)


@pytest.mark.usefixtures("small_tiles")
def test_equal_values_do_not_deviate(turns: ModuleType) -> None:
    values = torch.full((4, 77), 0.1)
    assert (run(turns, values, values, "mse").stats[:, 3] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_literal_values(turns: ModuleType, kind: str) -> None:
    """u = 1, -1 in every row; delta 0.6: 0.6 (1 - 0.3) = 0.42."""
    values, targets = torch.tensor([[0.0, 2.0]]).expand(4, 2).contiguous(), torch.ones(4, 2)
    losses, stats, grads = run(turns, values, targets, kind)
    expected = {"mse": [1.0] * 4, "expectile": [1.0, 1.0, 0.5, 0.5], "huber": [0.42] * 4}
    slopes = {"mse": [[-1.0, 1.0]] * 4, "expectile": [[-1.0, 1.0]] * 2 + [[-0.7, 0.3]] * 2, "huber": [[-0.3, 0.3]] * 4}
    torch.testing.assert_close(losses, torch.tensor(expected[kind]))
    torch.testing.assert_close(grads, torch.tensor(slopes[kind]))
    assert stats.tolist() == [[1.0, 0.0, 2.0, 1.0]] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_kinks(turns: ModuleType, kind: str) -> None:
    """u = 0 and |u| = delta, where the formulas change."""
    targets = torch.tensor([0.0, DELTA, -DELTA, 1.0]).expand(4, 4).contiguous()
    values = torch.zeros(4, 4)
    assert_close(run(turns, values, targets, kind), truth(values, targets, kind))


def test_nothing_to_learn_from(turns: ModuleType) -> None:
    losses, stats, grads = run(turns, torch.empty(4, 0), torch.empty(4, 0), "mse")
    assert losses.tolist() == [0.0] * 4 and grads.shape == (4, 0)
    assert stats.shape == (4, 4) and stats.isnan().all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, BLOCK + 3])
def test_a_value_that_is_no_number_stays_in_its_row(turns: ModuleType, place: int, bad: float, kind: str) -> None:
    values, targets = torch.randn(4, 70), torch.randn(4, 70)
    clean = run(turns, values, targets, kind)
    values[2, place] = bad
    found, wanted = run(turns, values, targets, kind), truth(values, targets, kind)
    assert_close(found, wanted)
    assert not found.losses[2].isfinite()
    others = [0, 1, 3]
    assert all(torch.equal(got[others], was[others]) for got, was in zip(found, clean, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_that_is_no_number_shows(turns: ModuleType, kind: str) -> None:
    values, targets = torch.randn(4, 5), torch.randn(4, 5)
    targets[1, 3] = NAN
    assert_close(run(turns, values, targets, kind), truth(values, targets, kind))
    assert run(turns, values, targets, kind).losses[1].isnan()
