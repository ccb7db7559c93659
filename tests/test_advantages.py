"""Advantages of actions against their state's mean."""

from __future__ import annotations

import pytest
import torch

from archer_fast.advantages import centre_by_state, normalise


def test_centred_by_hand() -> None:
    values = torch.tensor([1.0, 10.0, 3.0, 20.0, 5.0, 7.0])
    states = torch.tensor([0, 2, 0, 2, 0, 3])  # state 1 has no action, state 3 one
    assert centre_by_state(values, states, 4).tolist() == [-2.0, -5.0, 0.0, 5.0, 2.0, 0.0]


def test_a_state_with_one_action_learns_nothing_from_it() -> None:
    assert centre_by_state(torch.tensor([-7.0, 4.0]), torch.tensor([1, 0]), 2).tolist() == [0.0, 0.0]


def test_advantages_of_a_state_sum_to_zero_and_keep_their_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, generator=generator, dtype=torch.float64)
    states = torch.randint(7, (60,), generator=generator)
    got = centre_by_state(values, states, 7)
    for state in range(7):
        own = states == state
        assert own.sum() > 2
        assert got[own].sum().item() == pytest.approx(0, abs=1e-12)
        torch.testing.assert_close(got[own] - got[own][0], values[own] - values[own][0])


def test_what_a_state_is_worth_does_not_matter() -> None:
    """Adding a constant to all Q of one state changes nothing: the baseline removes it."""
    values, states = torch.tensor([1.0, 2.0, 5.0, 9.0]), torch.tensor([0, 0, 1, 1])
    raised = values + torch.tensor([0.0, 0.0, 64.0, 64.0])
    assert torch.equal(centre_by_state(values, states, 2), centre_by_state(raised, states, 2))


def test_normalised_by_hand_keeps_sign_and_zero() -> None:
    got = normalise(torch.tensor([3.0, -4.0, 0.0, 0.0]))
    torch.testing.assert_close(got, torch.tensor([1.2, -1.6, 0.0, 0.0]))


def test_normalise_of_all_zeros_is_zeros() -> None:
    assert normalise(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
