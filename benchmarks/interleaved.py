"""Functions timed in turn, a candidate with the floor that its ratio is of: what else the machine does meets all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

MIN_ROUNDS, MAX_ROUNDS = 3, 200


class Timing(NamedTuple):
    seconds: float  # median
    floor_seconds: float  # median
    ratio: float  # median of the rounds' ratios
    best_seconds: float  # of the fastest round, which a busy machine disturbs least
    best_floor_seconds: float
    rounds: int


def synchronize() -> None:
    """Wait for the GPU, where one is in use: its kernels run on after the call that started them."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], Any]) -> float:
    synchronize()
    begin = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - begin


def time_against(
    benchmark: Any,
    candidate: Callable[[], object],
    floor: Callable[[], object],
    *,
    budget: float,
    prepare: Callable[[], object] = lambda: None,
    one_round: float | None = None,
) -> Timing | None:
    """Rounds of `prepare`, `floor`, `candidate` for about `budget` seconds; None under --benchmark-disable.

    one_round: how long a round takes, where the caller knows; otherwise one is tried.
    pytest-benchmark times the candidate, so its own files hold the same rounds.
    """
    floors: list[float] = []

    def run() -> None:
        candidate()  # its result is dropped here, not held while the next round runs
        synchronize()

    def setup() -> None:
        prepare()
        floors.append(seconds_of(floor))

    if one_round is None:
        setup()
        one_round = seconds_of(run) + floors.pop()
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, round(budget / one_round)))
    benchmark.pedantic(run, setup=setup, rounds=rounds)
    if benchmark.stats is None:
        return None
    times = benchmark.stats.stats.data
    ratios = [t / f for t, f in zip(times, floors, strict=True)]
    medians = map(statistics.median, (times, floors, ratios))
    return Timing(*medians, min(times), min(floors), rounds)


def seconds_in_turn(*functions: Callable[[], object], rounds: int, prepare: Callable[[], object]) -> list[list[float]]:
    """Each function's times, `prepare` run before every call; a first round does not count."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):
        for column, function in zip(times, functions, strict=True):
            prepare()
            column.append(seconds_of(function))
    return [column[1:] for column in times]


class Repeated:
    """A function called so often that it takes about `seconds`; once at least, `most` times at most.

    prepare: what is done, and not timed, before these calls.
    """

    def __init__(
        self,
        function: Callable[[], object],
        seconds: float = 0.0,
        *,
        most: int = 1 << 20,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        self.function, self.prepare = function, prepare
        function()
        self.calls = min(most, max(1, round(seconds / seconds_of(function))))

    def __call__(self) -> None:
        for _ in range(self.calls):
            self.function()


def medians_in_turn(
    benchmark: Any, candidate: Repeated, others: Mapping[str, Repeated], *, rounds: int
) -> tuple[float, dict[str, float]] | None:
    """Median over rounds of a call's mean time, the candidate's and the others'; None under --benchmark-disable.

    In each round every function's turn comes; a first round does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in others}

    def setup() -> None:
        for name, function in others.items():
            function.prepare()
            times[name].append(seconds_of(function) / function.calls)
        candidate.prepare()

    benchmark.pedantic(candidate, setup=setup, rounds=rounds, warmup_rounds=1)
    if benchmark.stats is None:
        return None
    own = statistics.median(benchmark.stats.stats.data) / candidate.calls
    return own, {name: statistics.median(column[-rounds:]) for name, column in times.items()}
