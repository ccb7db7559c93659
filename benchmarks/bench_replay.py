"""The replay buffer beside the original's design, torchrl, cpprb and a NumPy arena.

The page of it, of bench_bandwidth.py and of bench_targets.py, as `archer-fast bench buffer` prints it:

.venv/bin/pytest benchmarks/bench_{replay,bandwidth,targets}.py --benchmark-only --buffer-table FILE
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from buffer_batches import check_transitions, num_bytes, transitions_of_packed
from buffer_rivals import Rival, Store
from buffer_work import Work
from busy_thread import busy_thread
from cold_cache import reader
from interleaved import Repeated, medians_in_turn, seconds_of
from lm_head_rivals import Unavailable, brief
from memcpy_floor import Copying
from page_sections import SHOWN_HERE
from replay_report import CONDITIONS, OURS, Condition, Copied, Form, ReplayReport, ReplayRow
from replay_sizes import Sizes

# Other people's packages may warn.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_torch_thread")]

CHECKED_BATCHES = 3


@dataclass
class Entrant:
    """A store that holds the work, and its row."""

    rival: Rival
    store: Store
    row: ReplayRow

    def draw(self, form: Form, n: int) -> Callable[[], Any]:
        sample = self.store.sample_collate_packed if form == "packed" else self.store.sample_collate_padded
        return lambda: sample(n)

    def can(self, condition: Condition) -> bool:
        return (condition.threads == 1 or self.rival.has_threads) and (
            condition.form == "packed" or self.rival.has_padded
        )

    def set_threads(self, threads: int) -> None:
        if self.rival.has_threads:
            self.store.set_threads(threads)


@pytest.fixture(scope="module")
def entrants(
    pytestconfig: pytest.Config, replay_work: Work, replay_report: ReplayReport, replay_sizes: Sizes
) -> list[Entrant]:
    """All who can run here and hold the work as it is. Ours must."""
    np.random.seed(0)  # noqa: NPY002, cpprb and the original draw by it
    torch.manual_seed(0)
    found = []
    for rival in importlib.import_module(pytestconfig.getoption("--buffer-rivals")).RIVALS:
        row = ReplayRow(rival.name, rival.family, rival.remark)
        replay_report.rows.append(row)
        try:
            entrant = Entrant(rival, rival.store(replay_work), row)
            entrant.set_threads(1)
            for part in replay_work.parts():
                entrant.store.insert(entrant.store.prepare(part))
            check(entrant, replay_work, replay_sizes.drawn)
        except Exception as error:
            if rival.is_ours:
                raise
            row.remark = fault(error)
            continue
        row.batch_bytes = num_bytes(entrant.draw("packed", replay_sizes.drawn)())
        found.append(entrant)
    return found


def check(entrant: Entrant, work: Work, n: int) -> None:
    """AssertionError where a batch is not what the work has under its numbers, or is always the same one."""
    seen = set()
    for _ in range(CHECKED_BATCHES):
        batches = [transitions_of_packed(entrant.draw("packed", n)())]
        if entrant.rival.has_padded:
            batches.append(entrant.store.padded_transitions(entrant.draw("padded", n)()))
        for transitions in batches:
            check_transitions(transitions, work, n)
            seen |= {transition.reward for transition in transitions}
    assert len(seen) > n


def fault(error: Exception) -> str:
    if isinstance(error, Unavailable):
        return str(error)
    if isinstance(error, AssertionError):
        return "WRONG: its batch is not the work's, not timed"
    return f"cannot run here: {brief(error)}"


def split(entrants: list[Entrant]) -> tuple[Entrant, list[Entrant]]:
    """The one that the targets are about, and the others."""
    (ours,) = (entrant for entrant in entrants if entrant.rival.name == OURS)
    return ours, [entrant for entrant in entrants if entrant is not ours]


def test_insert(benchmark: Any, entrants: list[Entrant], replay_work: Work, replay_sizes: Sizes) -> None:
    """Part after part, each into every store; what a part takes is made just before."""
    ours, others = split(entrants)
    parts = list(replay_work.parts())
    turns = itertools.cycle(parts)
    seconds: dict[str, list[float]] = {entrant.rival.name: [] for entrant in others}

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        part = next(turns)
        for entrant in others:
            prepared = entrant.store.prepare(part)
            seconds[entrant.rival.name].append(seconds_of(lambda: entrant.store.insert(prepared)))  # noqa: B023
        return (ours.store.prepare(part),), {}

    benchmark.pedantic(ours.store.insert, setup=setup, rounds=replay_sizes.insert_passes * len(parts))
    for entrant in entrants:
        check(entrant, replay_work, replay_sizes.drawn)
        entrant.row.num_bytes = entrant.store.num_bytes()
    if benchmark.stats is None:
        return
    seconds[OURS] = benchmark.stats.stats.data
    for entrant in entrants:
        passes = np.reshape(seconds[entrant.rival.name], (replay_sizes.insert_passes, len(parts)))
        entrant.row.insert_seconds = float(np.median(passes.sum(1)))
    benchmark.extra_info |= {SHOWN_HERE: True, "M_tokens_per_s": replay_work.num_tokens / ours.row.insert_seconds / 1e6}


@pytest.mark.parametrize("condition", CONDITIONS, ids=str)
def test_draw_and_collate(
    benchmark: Any, entrants: list[Entrant], replay_report: ReplayReport, replay_sizes: Sizes, condition: Condition
) -> None:
    ours, others = split([entrant for entrant in entrants if entrant.can(condition)])
    torch.set_num_threads(condition.threads)
    for entrant in (ours, *others):
        entrant.set_threads(condition.threads)
    evict = reader(replay_sizes.cold_bytes) if condition.is_cold else lambda: None
    # One call a round where the next one would find in the caches what this one left there.
    seconds = 0.0 if condition.is_cold else replay_sizes.hot_seconds
    most = 20 if condition.is_disturbed else 1 << 20  # each may wait 5 ms and more

    def repeated(function: Callable[[], Any], a_little: Callable[[], Any]) -> Repeated:
        return Repeated(function, seconds, most=most, prepare=lambda: (evict(), a_little()))

    functions = {
        e.rival.name: repeated(e.draw(condition.form, replay_sizes.drawn), e.draw(condition.form, 1))
        for e in (ours, *others)
    }
    copying = Copying(ours.store.num_bytes(), ours.row.batch_bytes or 0)
    copies = {f"memcpy {i}": repeated(way, copying.a_little) for i, way in enumerate(copying.ways())}
    candidate = functions.pop(OURS)
    with busy_thread() if condition.is_disturbed else contextlib.nullcontext():
        timed = medians_in_turn(benchmark, candidate, functions | copies, rounds=replay_sizes.rounds)
    for entrant in (ours, *others):
        entrant.set_threads(1)
    if timed is None:
        return
    own, rest = timed
    ours.row.seconds[condition] = own
    for entrant in others:
        entrant.row.seconds[condition] = rest[entrant.rival.name]
    replay_report.copied[condition] = Copied(copying.num_bytes, min(rest[name] for name in copies))
    benchmark.extra_info |= {SHOWN_HERE: True, "seconds": own, **rest}
