"""The packer: what every plan promises, the same plan as its plain twin's, and how well it packs games."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archer_fast import _C
from archer_fast.token_packer import pack_tokens, pack_tokens_ref


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths, many alike and many as long as a bin, and the bin."""
    max_tokens = draw(st.one_of(st.integers(1, 40), st.integers(1, 2**31 - 1)))
    choices = draw(st.lists(st.integers(1, max_tokens), min_size=1, max_size=6))
    one = st.one_of(st.sampled_from([*choices, max_tokens]), st.integers(1, max_tokens))
    return draw(st.lists(one, max_size=60)), max_tokens


def first_fit_decreasing(lengths: Any, max_tokens: int) -> list[list[int]]:
    """What everybody does."""
    bins: list[list[int]] = []
    rooms = np.zeros(0, np.int64)
    for i in np.argsort(-np.asarray(lengths), kind="stable"):
        fitting = np.nonzero(rooms >= lengths[i])[0]
        if fitting.size == 0:
            bins.append([])
            rooms = np.append(rooms, max_tokens)
        place = fitting[0] if fitting.size else len(bins) - 1
        bins[place].append(int(i))
        rooms[place] -= lengths[i]
    return bins


def costs(bins: Any, lengths: Any) -> np.ndarray:
    return np.array([sum(float(lengths[i]) ** 2 for i in b) for b in bins])


def game_lengths(num_games: int, *, max_turns: int, min_turns: int = 1) -> np.ndarray:
    """Tokens of games whose turns have about 12 action and 8 observation tokens."""
    rng = np.random.default_rng(0)
    turns = rng.integers(min_turns, max_turns + 1, num_games)
    tokens = rng.lognormal(np.log(20), 0.4, (num_games, max_turns)).round().clip(2)
    return (tokens * (np.arange(max_turns) < turns[:, None])).sum(1).astype(np.int64)


def plain(bins: list[np.ndarray]) -> list[list[int]]:
    return [b.tolist() for b in bins]


@given(cases(), st.integers(1, 5))
@settings(max_examples=300, deadline=None)
def test_every_item_once_in_a_bin_that_is_neither_overfull_nor_empty(case: tuple[list[int], int], ranks: int) -> None:
    lengths, max_tokens = case
    num_needed = len(first_fit_decreasing(lengths, max_tokens))
    try:
        bins = plain(pack_tokens(lengths, max_tokens, ranks))
    except ValueError as error:
        assert "num_ranks: wanted at least one length a bin" in str(error)
        assert -(-num_needed // ranks) * ranks > len(lengths)
        return
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(b == sorted(b) and b for b in bins)
    assert max((sum(lengths[i] for i in b) for b in bins), default=0) <= max_tokens
    assert len(bins) % ranks == 0 and len(bins) <= -(-num_needed // ranks) * ranks
    for rank in np.split(np.arange(len(bins)), ranks):
        keys = [(-sum(lengths[i] ** 2 for i in bins[j]), bins[j][0]) for j in rank]
        assert keys == sorted(keys)


@given(cases(), st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_the_plan_is_the_plain_twins(case: tuple[list[int], int], ranks: int) -> None:
    lengths, max_tokens = case
    try:
        wanted = pack_tokens_ref(lengths, max_tokens, ranks)
    except ValueError as error:
        with pytest.raises(ValueError) as caught:
            pack_tokens(lengths, max_tokens, ranks)
        assert str(caught.value) == str(error)
        return
    assert plain(pack_tokens(lengths, max_tokens, ranks)) == wanted


@pytest.mark.parametrize("max_tokens", [401, 2048, 5000, 8191])
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_plan_of_many_games_is_the_plain_twins(max_tokens: int, ranks: int) -> None:
    """Tight bins: these go through every stage, from cost alone to first-fit decreasing."""
    for lengths in (game_lengths(300, max_turns=20), game_lengths(300, max_turns=20, min_turns=20)):
        fitting = lengths[lengths <= max_tokens]
        wanted = pack_tokens_ref(fitting.tolist(), max_tokens, ranks)
        assert plain(pack_tokens(fitting, max_tokens, ranks)) == wanted


def test_the_worked_example() -> None:
    assert plain(pack_tokens([5, 2, 3, 4, 2], 8)) == [[0, 2], [1, 3, 4]]
    assert pack_tokens_ref([5, 2, 3, 4, 2], 8) == [[0, 2], [1, 3, 4]]


def test_no_lengths_no_bins() -> None:
    assert pack_tokens([], 8) == pack_tokens([], 8, 3) == pack_tokens_ref([], 8, 3) == []


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "worst"),
    [
        (game_lengths(16_384, max_turns=20), 32_768, 1.01),
        (game_lengths(16_384, max_turns=20), 10_000, 1.01),
        (game_lengths(16_384, max_turns=20, min_turns=20), 8192, 1.06),
        (game_lengths(16_384, max_turns=20, min_turns=20), 32_768, 1.02),
        (np.random.default_rng(0).lognormal(6, 1, 16_384).astype(int).clip(1, 8192), 65_000, 1.02),
    ],
    ids=["ragged games", "ragged games, short passes", "long games, short passes", "long games", "lognormal"],
)
def test_bins_are_full_and_cost_the_same(lengths: np.ndarray, max_tokens: int, worst: float) -> None:
    bins, rival = pack_tokens(lengths, max_tokens), first_fit_decreasing(lengths, max_tokens)
    # The number of bins is a whole one: what that alone leaves empty is not the packer's.
    assert len(bins) == -(-lengths.sum() // max_tokens) <= len(rival)
    cost, rival_cost = costs(bins, lengths), costs(rival, lengths)
    assert cost.max() / cost.mean() < worst < 1.25 < rival_cost.max() / rival_cost.mean()


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_cost_the_same(ranks: int) -> None:
    lengths = np.random.default_rng(1).lognormal(6, 1, 2000).astype(int).clip(1, 8192)
    bins = pack_tokens(lengths, 8192, ranks)
    cost = costs(bins, lengths).reshape(ranks, -1).sum(1)
    assert cost.max() / cost.mean() < 1.03


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_any_integers_in_any_memory_will_do(dtype: type) -> None:
    lengths = np.array([5, 0, 2, 0, 3, 0, 4, 0, 2], dtype)[::2]
    assert plain(pack_tokens(lengths, 8)) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([3, 9, 10], 8), ValueError, "lengths[1]: wanted 1 to max_tokens 8, got 9"),
        (([3, 0], 8), ValueError, "lengths[1]: wanted 1 to max_tokens 8, got 0"),
        (([-1], 8), ValueError, "lengths[0]: wanted 1 to max_tokens 8, got -1"),
        (([1], 0), ValueError, "max_tokens: wanted an integer from 1 to 2**31 - 1, got 0"),
        (([1], 2**31), ValueError, "max_tokens: wanted an integer from 1 to 2**31 - 1, got 2147483648"),
        (([1], 8, 0), ValueError, "num_ranks: wanted an integer from 1 to 2**63 - 1, got 0"),
        (
            ([3, 1], 8, 3),
            ValueError,
            "num_ranks: wanted at least one length a bin, got 2 lengths, which need 1 bins or more, on 3 ranks",
        ),
        (([[1, 2]], 8), ValueError, "lengths: wanted 1 dimension, got shape (1, 2)"),
        (([1.0], 8), TypeError, "lengths: wanted integers that fit into int64, got float64"),
        (([True], 8), TypeError, "lengths: wanted integers that fit into int64, got bool"),
        ((np.array([1], np.uint64), 8), TypeError, "lengths: wanted integers that fit into int64, got uint64"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        pack_tokens(*arguments)
    assert str(caught.value) == message


def test_the_core_takes_no_other_dtype_and_no_stride() -> None:
    for lengths in (np.array([1], np.int32), np.array([1, 2, 3])[::2], [1]):
        with pytest.raises(TypeError):
            _C.pack_tokens(lengths, 8, 1)
