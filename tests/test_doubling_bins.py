"""Bins that double, of one number and of tensors."""

from __future__ import annotations

import torch

from archer_fast.doubling_bins import bin_of, bins_of, first_of, shares


def test_a_bin_begins_where_the_one_before_ends() -> None:
    assert [bin_of(value) for value in (0, 1, 2, 3, 4, 7, 8, 1023, 1024)] == [0, 1, 2, 2, 3, 3, 4, 10, 11]
    assert [first_of(index) for index in range(6)] == [0, 1, 2, 4, 8, 16]
    for index in range(20):
        assert bin_of(first_of(index)) == index and (index == 0 or bin_of(first_of(index) - 1) == index - 1)


def test_tensors_are_binned_alike_and_the_last_bin_is_open() -> None:
    values = torch.tensor([*range(70), (1 << 24) - 1])
    assert bins_of(values, 30).tolist() == [bin_of(value) for value in values.tolist()]
    assert bins_of(values, 4).tolist() == [min(bin_of(value), 3) for value in values.tolist()]


def test_shares_of_a_histogram() -> None:
    assert shares({}) == {}
    assert shares({0: 5}) == {0: 1.0}
    assert shares({5: 10, 0: 20, 7: 10}) == {0: 0.5, 1: 0.0, 2: 0.0, 4: 0.5}
