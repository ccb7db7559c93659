"""Collation beside memcpy: how much of the memory's bandwidth it has, from the caches and from the memory itself."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from buffer_batches import num_bytes
from buffer_work import Work
from cold_cache import reader
from interleaved import Repeated, medians_in_turn
from memcpy_floor import Copying
from page_sections import SHOWN_HERE
from replay_report import BandwidthRow, Copied, ReplayReport, Target
from replay_sizes import Sizes

from archer_fast.buffer import TrajectoryBuffer
from archer_fast.staging import StagingSlots

pytestmark = pytest.mark.usefixtures("one_torch_thread")

BYTES_A_TOKEN = 8  # of our buffer, about
# Which buffer, what is drawn from it, and the share of memcpy's bandwidth that is wanted. Games are as many as the
# work has: all of it, or as many of the large buffer.
BATCHES = (
    ("work", "transitions", 0.7),
    ("work", "many transitions", 0.7),
    ("work", "games", 0.7),
    ("large", "transitions", 0.5),
    ("large", "many transitions", 0.5),
    ("large", "games", 0.5),
)


@pytest.fixture(scope="module")
def buffers(replay_work: Work, replay_report: ReplayReport, replay_sizes: Sizes) -> dict[str, TrajectoryBuffer]:
    """The work's own, and one that holds it so many times that it is large."""
    small = TrajectoryBuffer(replay_work.num_tokens, replay_work.num_games)
    large = TrajectoryBuffer(replay_sizes.large_bytes // BYTES_A_TOKEN, 1 << 40)
    for buffer in (small, large):
        while buffer.num_evicted < buffer.num_trajectories or not buffer.num_trajectories:  # everything once replaced
            buffer.extend_arrays(replay_work.arrays)
    stats = large.stats()
    held = (
        stats.num_bytes - replay_report.logprob_bytes * stats.num_tokens / replay_work.num_tokens
    ) / stats.num_tokens
    what = f"bytes a stored token without log-probs, {stats.num_tokens / 1e6:,.0f} M tokens"
    replay_report.other_targets.append(Target(what, "at most 6", f"{held:.2f}", held <= 6))
    return {"work": small, "large": large}


@pytest.mark.parametrize("threads", [1, 2])
def test_large_memcpy(benchmark: Any, replay_report: ReplayReport, replay_sizes: Sizes, threads: int) -> None:
    """From memory that no cache holds into memory that none holds."""
    torch.set_num_threads(threads)
    copying = Copying(replay_sizes.cold_bytes, replay_sizes.cold_bytes)
    by_numpy, by_torch = map(Repeated, copying.ways())
    timed = medians_in_turn(benchmark, by_numpy, {"torch": by_torch}, rounds=replay_sizes.rounds)
    if timed is not None:
        own, rest = timed
        replay_report.large_copies[threads] = Copied(copying.num_bytes, min(own, rest["torch"]))
        benchmark.extra_info |= {SHOWN_HERE: True, **rest}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("is_cold", [False, True], ids=["hot", "cold"])
@pytest.mark.parametrize(("source", "batch", "wanted"), BATCHES)
def test_bandwidth(
    benchmark: Any,
    buffers: dict[str, TrajectoryBuffer],
    replay_report: ReplayReport,
    replay_sizes: Sizes,
    source: str,
    batch: str,
    wanted: float,
    is_cold: bool,
    threads: int,
) -> None:
    buffer = buffers[source]
    stats = buffer.stats()
    if batch == "games":
        num_games = buffers["work"].num_trajectories
        ids = itertools.cycle([buffer.sample_trajectories(num_games) for _ in range(32)])
        function, drawn = buffer.collate, f"{num_games:,} games"
    else:
        n = replay_sizes.drawn if batch == "transitions" else replay_sizes.many_drawn
        ids = itertools.cycle(buffer.sample_turns(256 * n).reshape(256, n))
        function, drawn = buffer.collate_transitions, f"{n:,} transitions"
    memory = StagingSlots()
    torch.set_num_threads(threads)
    evict = reader(replay_sizes.cold_bytes) if is_cold else lambda: None
    seconds = 0.0 if is_cold else replay_sizes.hot_seconds
    written = [num_bytes(function(next(ids), memory=memory)) for _ in range(32)]
    copying = Copying(stats.num_bytes, int(np.mean(written)))
    candidate = Repeated(
        lambda: function(next(ids), memory=memory, threads=threads),
        seconds,
        prepare=lambda: (evict(), function(next(ids)[:1], memory=memory)),
    )
    copies = {
        f"memcpy {i}": Repeated(way, seconds, prepare=lambda: (evict(), copying.a_little()))
        for i, way in enumerate(copying.ways())
    }
    timed = medians_in_turn(benchmark, candidate, copies, rounds=replay_sizes.rounds)
    if timed is None:
        return
    own, rest = timed
    name = f"{stats.num_tokens / 1e6:,.1f} M tokens, {stats.num_bytes / 1e6:,.0f} MB"
    copied = Copied(copying.num_bytes, min(rest.values()))
    row = BandwidthRow(name, drawn, threads, is_cold, copying.num_bytes, own, copied, wanted)
    replay_report.bandwidth.append(row)
    benchmark.extra_info |= {SHOWN_HERE: True, **row._asdict(), "share": row.share}
