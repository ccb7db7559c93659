"""Means and counts of an iteration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from archer_fast.meters import Meters
from archer_fast.ranks import Ranks


def test_means_and_counts_are_read_once() -> None:
    meters = Meters()
    meters.add(loss=torch.tensor(1.0), kl=torch.tensor(5.0))
    meters.add(loss=torch.tensor(4.0))
    meters.count(games=3, dropped=0)
    meters.count(games=4)
    assert meters.read() == {"loss": 2.5, "kl": 5.0, "games": 7, "dropped": 0}
    assert meters.read() == {}
    meters.add(loss=torch.tensor(7.0))
    assert meters.read() == {"loss": 7.0}  # nothing of the last iteration is in it


def test_a_mean_is_over_its_own_adds() -> None:
    meters = Meters()
    for value in (1.0, 2.0, 3.0):
        meters.add(often=torch.tensor(value))
    meters.add(once=torch.tensor(9.0))
    assert meters.read() == {"often": 2.0, "once": 9.0}


def test_dtypes_mix() -> None:
    meters = Meters()
    meters.add(half=torch.tensor(1.5, dtype=torch.bfloat16), double=torch.tensor(0.1, dtype=torch.float64))
    assert meters.read() == pytest.approx({"half": 1.5, "double": 0.1})


def test_what_is_added_later_in_place_is_not_in_the_sum() -> None:
    meters = Meters()
    value = torch.tensor(1.0)
    meters.add(x=value)
    meters.add(x=torch.tensor(3.0))
    assert value.item() == 1.0  # the caller's tensor is not the accumulator
    assert meters.read() == {"x": 2.0}


def test_a_ratio_is_of_sums_and_left_out_where_nothing_was_counted() -> None:
    meters = Meters()
    meters.divide(kl=torch.tensor([1.0, 2.0]), nothing=torch.zeros(2))
    meters.divide(kl=torch.tensor([5.0, 1.0]), nothing=torch.zeros(2))
    meters.add(loss=torch.tensor(4.0))
    assert meters.read() == {"loss": 4.0, "kl": 2.0}
    assert meters.read() == {}


class Pair(Ranks):
    """The other rank has read these."""

    def gather(self, mine: Any) -> list[Any]:
        return [mine, ({"tokens": 5}, {"loss": 3.0, "theirs": 7.0}, {"loss": 0.5, "theirs": 2.0})]


@pytest.mark.parametrize(("rank", "steps"), [(0, 2), (1, None)])
def test_over_ranks_means_are_averaged_and_counts_summed(rank: int, steps: int | None) -> None:
    meters = Meters(Pair(rank, 2))
    meters.add(1.5, loss=torch.tensor(1.0))
    meters.divide(theirs=torch.tensor([6.0, 6.0]), nothing=torch.zeros(2))
    meters.count(tokens=4)
    meters.count_once(steps=2)
    row = meters.read()
    assert row.pop("steps", None) == steps, "what all do together is the first rank's to count"
    assert row == {"tokens": 9, "loss": 1.5, "theirs": 2.5}, "(1.5 x 1 + .5 x 3) / 2, (6 + 2 x 7) / 8"
