"""Returns and advantages over turns against Python loops, their limits, and actions against their state's mean."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from archer_fast.advantages import (
    broadcast_to_tokens,
    centre_by_state,
    discounted_returns,
    n_step,
    normalise,
    sum_by_turn,
    td_lambda,
    td_target,
    turn_gae,
)
from archer_fast.ops import last_impl

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")


class Games(NamedTuple):
    """Arguments of the functions over turns, by their names."""

    rewards: Tensor
    values: Tensor
    final_values: Tensor
    terminated: Tensor
    cu_turns: Tensor


def random_games(seed: int, dtype: torch.dtype = torch.float64, lengths: list[int] | None = None) -> Games:
    """Ragged games, some of them without turns, about half of them truncated."""
    generator = torch.Generator().manual_seed(seed)
    if lengths is None:
        lengths = [*torch.randint(0, 9, (12,), generator=generator).tolist(), 0, 33, 1, 0]
    total, games = sum(lengths), len(lengths)
    return Games(
        torch.randn(total, generator=generator, dtype=dtype),
        torch.randn(total, generator=generator, dtype=dtype),
        torch.randn(games, generator=generator, dtype=dtype),
        torch.rand(games, generator=generator) < 0.5,
        torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
    )


def by_game(games: Games, of_game: Callable[[list[float], list[float], float], list[float]]) -> list[float]:
    """`of_game(rewards, values, end)` of each game, end to end."""
    out: list[float] = []
    cu = games.cu_turns.tolist()
    for game, (start, stop) in enumerate(pairwise(cu)):
        end = 0.0 if games.terminated[game] else float(games.final_values[game])
        out += of_game(games.rewards[start:stop].tolist(), games.values[start:stop].tolist(), end)
    return out


def td_errors(games: Games, gamma: float) -> list[float]:
    def of_game(r: list[float], v: list[float], end: float) -> list[float]:
        return [r[t] + gamma * ([*v, end][t + 1]) - v[t] for t in range(len(r))]

    return by_game(games, of_game)


def returns_with_end(games: Games, gamma: float) -> list[float]:
    """Discounted returns, what the game is worth beyond its last turn included."""

    def of_game(r: list[float], v: list[float], end: float) -> list[float]:
        n = len(r)
        return [sum(gamma ** (k - t) * r[k] for k in range(t, n)) + gamma ** (n - t) * end for t in range(n)]

    return by_game(games, of_game)


def assert_equals(got: Tensor, wanted: list[float]) -> None:
    """To the rounding of `got`'s dtype."""
    exact = torch.tensor(wanted, dtype=torch.float64)
    tolerance = 1e-12 if got.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_returns(seed: int, gamma: float, dtype: torch.dtype) -> None:
    games = random_games(seed, dtype)
    got = discounted_returns(games.rewards, games.cu_turns, gamma)
    over = games._replace(terminated=torch.ones_like(games.terminated))
    assert_equals(got, returns_with_end(over, gamma))
    assert last_impl("segment_scan") == ("cpu" if dtype == torch.float32 else "reference")
    if gamma == 0:
        assert torch.equal(got, games.rewards)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gae_lambda", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_gae_and_lambda_returns(seed: int, gamma: float, gae_lambda: float, dtype: torch.dtype) -> None:
    games = random_games(seed, dtype)
    deltas = iter(td_errors(games, gamma))

    def advantages(r: list[float], v: list[float], end: float) -> list[float]:
        """Equation 16 of the paper: the sum of (gamma lambda)^l delta_{t+l}."""
        delta = [next(deltas) for _ in r]
        return [sum((gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, len(r))) for t in range(len(r))]

    wanted = by_game(games, advantages)
    assert_equals(turn_gae(*games, gamma, gae_lambda), wanted)
    targets = td_lambda(*games, gamma, gae_lambda)
    assert_equals(targets, [a + v for a, v in zip(wanted, games.values.tolist(), strict=True)])

    def mixed(r: list[float], v: list[float], end: float) -> list[float]:
        """Equation 12.2 of the book, from the back."""
        out = [end] * (len(r) + 1)
        following = [*v, end]
        for t in reversed(range(len(r))):
            out[t] = r[t] + gamma * ((1 - gae_lambda) * following[t + 1] + gae_lambda * out[t + 1])
        return out[:-1]

    assert_equals(targets, by_game(games, mixed))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_limits_of_lambda(gamma: float) -> None:
    games = random_games(5)
    deltas, returns = td_errors(games, gamma), returns_with_end(games, gamma)
    values = games.values.tolist()
    assert_equals(turn_gae(*games, gamma, 0.0), deltas)
    assert_equals(turn_gae(*games, gamma, 1.0), [g - v for g, v in zip(returns, values, strict=True)])
    assert_equals(td_lambda(*games, gamma, 0.0), [d + v for d, v in zip(deltas, values, strict=True)])
    assert_equals(td_lambda(*games, gamma, 1.0), returns)
    if gamma == 0:
        assert_equals(td_lambda(*games, gamma, 0.7), games.rewards.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 13, 32, 33, 34, 10**9])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_n_step(gamma: float, n: int, dtype: torch.dtype) -> None:
    games = random_games(7, dtype)

    def of_game(r: list[float], v: list[float], end: float) -> list[float]:
        out, length = [], len(r)
        for t in range(length):
            last = min(t + n, length)
            total = sum(gamma ** (k - t) * r[k] for k in range(t, last))
            out.append(total + gamma ** (last - t) * (v[last] if last < length else end))
        return out

    got = n_step(*games, gamma, n)
    assert got.dtype == dtype
    assert_equals(got, by_game(games, of_game))
    if n == 1:
        assert_equals(got, [d + v for d, v in zip(td_errors(games, gamma), games.values.tolist(), strict=True)])
    if n >= 33:  # the longest game's length
        assert_equals(got, returns_with_end(games, gamma))


def test_literal_numbers() -> None:
    """The docstrings' examples, and a game before and behind that must not be heard."""
    rewards = torch.tensor([100.0, 1.0, 2.0, 100.0])
    values = torch.tensor([100.0, 4.0, 8.0, 100.0])
    ends = torch.tensor([7.0, 7.0, 16.0, 7.0])
    terminated = torch.tensor([False, True, False, True])
    cu_turns = torch.tensor([0, 1, 1, 3, 4], dtype=torch.int32)
    games = Games(rewards, values, ends, terminated, cu_turns)
    assert discounted_returns(rewards, cu_turns, 0.5).tolist() == [100.0, 2.0, 2.0, 100.0]
    assert turn_gae(*games, 0.5, 0.5).tolist() == [3.5, 1.5, 2.0, 0.0]
    assert td_lambda(*games, 0.5, 0.5).tolist() == [103.5, 5.5, 10.0, 100.0]
    steps = Games(
        torch.tensor([1.0, 2.0, 4.0]), torch.full((3,), 8.0), ends[2:3], terminated[2:3], torch.tensor([0, 3])
    )
    assert n_step(*steps, 0.5, 2).tolist() == [4.0, 8.0, 12.0]


@pytest.mark.parametrize("function", [turn_gae, td_lambda, n_step])
def test_truncated_bootstraps_and_terminated_does_not(function: Callable[..., Tensor]) -> None:
    rewards, values = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0])
    cu, last = torch.tensor([0, 2], dtype=torch.int32), 1 if function is n_step else 0.5

    def final(terminated: bool, end: float) -> float:
        got = function(rewards, values, torch.tensor([end]), torch.tensor([terminated]), cu, 0.5, last)
        return float(got[-1])

    assert final(False, 8.0) == 5.0  # a time-out goes on: 1 + 8 / 2
    assert final(True, 8.0) == 1.0
    assert final(True, torch.nan) == 1.0, "what follows a terminal is not even multiplied"


def test_values_that_have_no_share_are_not_read() -> None:
    games = random_games(1)
    blind = games._replace(values=torch.full_like(games.values, torch.nan))
    assert_equals(td_lambda(*blind, 0.9, 1.0), returns_with_end(games, 0.9))
    assert_equals(n_step(*blind, 0.9, 33), returns_with_end(games, 0.9))


@pytest.mark.parametrize(
    "function",
    [
        lambda g: discounted_returns(g.rewards, g.cu_turns, 0.9),
        lambda g: turn_gae(*g, 0.9, 0.8),
        lambda g: td_lambda(*g, 0.9, 0.8),
        lambda g: n_step(*g, 0.9, 3),
    ],
)
def test_of_any_batch(function: Callable[[Games], Tensor]) -> None:
    """No games, games without turns, half precision computed in float32, and each game as if it were alone."""
    for lengths in ([], [0, 0]):
        assert function(random_games(0, torch.float32, lengths)).shape == (0,)
    games = random_games(2, torch.float32)
    together = function(games)
    cu = games.cu_turns.tolist()
    for i, (start, stop) in enumerate(pairwise(cu)):
        alone = Games(
            games.rewards[start:stop],
            games.values[start:stop],
            games.final_values[i : i + 1],
            games.terminated[i : i + 1],
            torch.tensor([0, stop - start]),
        )
        torch.testing.assert_close(function(alone), together[start:stop])
    half = Games(*(x.bfloat16() if x.is_floating_point() else x for x in games))
    got, wanted = function(half), function(Games(*(x.float() if x.is_floating_point() else x for x in half)))
    assert got.dtype == torch.float32 and torch.equal(got, wanted)


def test_gradients_reach_rewards_and_values() -> None:
    games = random_games(3, lengths=[3, 0, 4])
    wide = [x.clone().requires_grad_() for x in games[:3]]
    for function, number in ((turn_gae, 0.8), (td_lambda, 0.8), (n_step, 2)):
        assert torch.autograd.gradcheck(lambda *x, f=function, n=number: f(*x, *games[3:], 0.9, n), wide)


GOOD = random_games(0, lengths=[2, 3])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"values": torch.zeros(4)}, ValueError, r"values: wanted one a turn \(5,\), got \(4,\)"),
        ({"final_values": torch.zeros(5)}, ValueError, r"final_values: wanted one a game \(2,\), got \(5,\)"),
        ({"terminated": torch.zeros(5).bool()}, ValueError, r"terminated: wanted one a game \(2,\), got \(5,\)"),
        ({"terminated": torch.zeros(2)}, TypeError, "terminated: wanted bool, got torch.float32"),
        ({"cu_turns": torch.tensor([0, 2, 4])}, ValueError, "cu: wanted offsets that rise from 0 to 5"),
    ],
)
@pytest.mark.parametrize(("function", "number"), [(turn_gae, 0.5), (td_lambda, 0.5), (n_step, 2)])
def test_bad_input_is_refused(
    function: Callable[..., Tensor], number: float, changes: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(*GOOD._replace(**changes), 0.9, number)


@pytest.mark.parametrize("n", [0, -1])
def test_n_steps_are_at_least_one(n: int) -> None:
    with pytest.raises(ValueError, match=rf"n: wanted a number of turns from 1 on, got {n}"):
        n_step(*GOOD, 0.9, n)


# -- tokens ----------------------------------------------------------------------------------------


def test_values_go_to_the_tokens_of_their_turn() -> None:
    got = broadcast_to_tokens(torch.tensor([5.0, 7.0, 9.0]), torch.tensor([0, 0, 2, 2, 2], dtype=torch.int32))
    assert got.tolist() == [5.0, 5.0, 9.0, 9.0, 9.0]


def test_the_order_of_tokens_does_not_matter_to_what_they_get() -> None:
    generator = torch.Generator().manual_seed(0)
    values, turn_ids = torch.randn(7, generator=generator), torch.randint(7, (40,), generator=generator)
    order = torch.randperm(40, generator=generator)
    assert torch.equal(broadcast_to_tokens(values, turn_ids)[order], broadcast_to_tokens(values, turn_ids[order]))


def test_a_turn_hears_of_all_its_tokens() -> None:
    values = torch.zeros(3, requires_grad=True)
    broadcast_to_tokens(values, torch.tensor([0, 2, 2, 2])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [1.0, 0.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 4, 0, 1, 900, 0], [3]])
def test_sums_by_turn(lengths: list[int], dtype: torch.dtype) -> None:
    tokens = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    cu = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
    got = sum_by_turn(tokens, cu)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_equals(got, [part.double().sum().item() for part in tokens.detach().split(lengths)] if lengths else [])
    weights = torch.arange(1.0, len(lengths) + 1).to(got.dtype)
    (gradient,) = torch.autograd.grad((weights * got).sum(), tokens)
    assert torch.equal(gradient.to(got.dtype), weights.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)))


def test_the_order_of_a_turns_tokens_does_not_matter_to_their_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, cu = torch.randn(50, generator=generator, dtype=torch.float64), torch.tensor([0, 7, 7, 50])
    order = torch.cat([torch.randperm(7, generator=generator), 7 + torch.randperm(43, generator=generator)])
    torch.testing.assert_close(sum_by_turn(tokens[order], cu), sum_by_turn(tokens, cu))


def test_what_was_broadcast_sums_to_the_value_times_the_tokens() -> None:
    values, counts = torch.tensor([5.0, 7.0, 9.0]), torch.tensor([2, 0, 3])
    tokens = broadcast_to_tokens(values, torch.arange(3).repeat_interleave(counts))
    assert sum_by_turn(tokens, torch.tensor([0, 2, 2, 5])).tolist() == [10.0, 0.0, 27.0]


# -- actions at one state --------------------------------------------------------------------------


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


def test_a_terminated_game_does_not_bootstrap_and_a_truncated_one_does() -> None:
    rewards, next_value = torch.tensor([-1.0, -1.0, 2.0]), torch.tensor([10.0, 10.0, -4.0])
    got = td_target(rewards, next_value, torch.tensor([True, False, False]), 0.5)
    assert got.tolist() == [-1.0, 4.0, 0.0]


def test_what_follows_a_terminal_is_not_even_multiplied() -> None:
    """0 * NaN is NaN: the value of a state that does not exist must not reach the target."""
    got = td_target(torch.tensor([3.0]), torch.tensor([torch.nan]), torch.tensor([True]), 0.9)
    assert got.tolist() == [3.0]


def test_gamma_zero_is_the_reward_alone() -> None:
    rewards = torch.tensor([1.0, -2.0])
    assert torch.equal(td_target(rewards, torch.tensor([5.0, 6.0]), torch.tensor([False, False]), 0.0), rewards)
