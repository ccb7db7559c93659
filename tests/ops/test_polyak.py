"""polyak_ against the formula in float64, and every bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from archer_fast.ops import polyak_


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((), (3,), (2, 5), (0,))]


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_targets_move_by_tau_and_params_stay(tau: float) -> None:
    targets, params = tensors(0), tensors(1)
    before, kept = [x.clone() for x in targets], [x.clone() for x in params]
    places = [x.data_ptr() for x in targets]
    polyak_(targets, params, tau)
    for target, old, param, same in zip(targets, before, params, kept, strict=True):
        torch.testing.assert_close(target.double(), (1 - tau) * old.double() + tau * param.double())
        assert torch.equal(param, same)
    assert places == [x.data_ptr() for x in targets], "in place"


@pytest.mark.parametrize(("tau", "wanted"), [(0.0, 0), (1.0, 1)])
def test_both_ends_are_exact(tau: float, wanted: int) -> None:
    targets, params = tensors(0), [1e6 * x for x in tensors(1)]
    ends = ([x.clone() for x in targets], params)
    polyak_(targets, params, tau)
    assert all(torch.equal(x, y) for x, y in zip(targets, ends[wanted], strict=True))


def test_parameters_that_train_are_followed_without_a_graph() -> None:
    online, target = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)
    polyak_(list(target.parameters()), list(online.parameters()), 1.0)
    assert torch.equal(target.weight, online.weight)
    assert not target.weight.requires_grad and target.weight.grad_fn is None


def test_nothing_to_do() -> None:
    polyak_([], [], 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.zeros(2)], [torch.zeros(2)], -0.1), r"tau: wanted a number in \[0, 1\], got -0\.1"),
        (([torch.zeros(2)], [torch.zeros(2)], 1.5), r"tau: wanted a number in \[0, 1\], got 1\.5"),
        (([torch.zeros(2)], [torch.zeros(2)], math.nan), r"tau: wanted a number in \[0, 1\], got nan"),
        (([torch.zeros(2)] * 2, [torch.zeros(2)], 0.1), r"params: wanted one a target \(2\), got 1"),
        (
            ([torch.zeros(2), torch.zeros(2, 3)], [torch.zeros(2), torch.zeros(3)], 0.1),
            r"params\[1\]: wanted \(2, 3\) as its target, got \(3,\)",
        ),
    ],
)
def test_bad_input_is_refused(arguments: tuple[Any, Any, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        polyak_(*arguments)
