"""The packer on 16,384 lengths, beside its plain twin's rival: first-fit decreasing, in NumPy.

extra_info: `bins`; `least_bins`, what the tokens alone need; `efficiency`, tokens / (bins * max_tokens);
`max_over_mean` of the bins' sums of squared lengths, and `floor_of_it`, which the longest item alone enforces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from archer_fast.token_packer import pack_tokens

NUM_LENGTHS = 16_384


def game_lengths(min_turns: int, max_turns: int) -> np.ndarray:
    """Games of some turns, each of about 12 action and 8 observation tokens."""
    rng = np.random.default_rng(0)
    turns = rng.integers(min_turns, max_turns + 1, NUM_LENGTHS)
    tokens = sum(rng.lognormal(np.log(mean), 0.5, (NUM_LENGTHS, max_turns)).round().clip(1) for mean in (12, 8))
    return (tokens * (np.arange(max_turns) < turns[:, None])).sum(1).astype(np.int64)


def heavy_tailed() -> np.ndarray:
    lengths = 100 * np.random.default_rng(0).pareto(1.5, NUM_LENGTHS) + 100
    return lengths.astype(np.int64).clip(1, 32_768)


WORK: dict[str, Callable[[], np.ndarray]] = {
    "games of 20 turns": lambda: game_lengths(20, 20),
    "games of 1 to 20 turns": lambda: game_lengths(1, 20),
    "heavy-tailed": heavy_tailed,
}


def first_fit_decreasing(lengths: np.ndarray, max_tokens: int) -> list[list[int]]:
    order = np.argsort(-lengths, kind="stable")
    rooms = np.full(lengths.size, max_tokens)
    bins: list[list[int]] = []
    for i in order.tolist():
        place = int((rooms[: len(bins) + 1] >= lengths[i]).argmax())
        if place == len(bins):
            bins.append([])
        bins[place].append(i)
        rooms[place] -= lengths[i]
    return bins


def note_quality(benchmark: Any, bins: Any, lengths: np.ndarray, max_tokens: int) -> None:
    cost = np.array([np.square(lengths[np.asarray(b)]).sum() for b in bins])
    assert sum(len(b) for b in bins) == lengths.size
    benchmark.extra_info |= {
        "bins": len(bins),
        "least_bins": int(-(-lengths.sum() // max_tokens)),
        "efficiency": round(float(lengths.sum() / (len(bins) * max_tokens)), 4),
        "max_over_mean": round(float(cost.max() / cost.mean()), 3),
        "floor_of_it": round(max(1.0, float(np.square(lengths).max() / cost.mean())), 3),
    }


@pytest.mark.parametrize("max_tokens", [8192, 32_768])
@pytest.mark.parametrize("work", WORK)
def test_pack(benchmark: Any, work: str, max_tokens: int) -> None:
    benchmark.group = f"pack 16,384 lengths, {work}, {max_tokens} a bin"
    lengths = WORK[work]().clip(max=max_tokens)
    note_quality(benchmark, benchmark(pack_tokens, lengths, max_tokens), lengths, max_tokens)


@pytest.mark.parametrize("max_tokens", [8192, 32_768])
@pytest.mark.parametrize("work", WORK)
def test_first_fit_decreasing(benchmark: Any, work: str, max_tokens: int) -> None:
    benchmark.group = f"pack 16,384 lengths, {work}, {max_tokens} a bin"
    lengths = WORK[work]().clip(max=max_tokens)
    bins = benchmark.pedantic(first_fit_decreasing, (lengths, max_tokens), rounds=3)
    note_quality(benchmark, bins, lengths, max_tokens)
