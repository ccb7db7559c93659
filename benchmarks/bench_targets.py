"""The draw by priority and the packer, against what was promised of them, on the buffer's page."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from bench_buffer import BETA, make_priorities, prioritised_buffer
from bench_packer import WORK as LENGTHS
from page_sections import SHOWN_HERE
from replay_report import ReplayReport, Target
from replay_sizes import Sizes

from archer_fast.token_packer import pack_tokens


def test_prioritised_draw(benchmark: Any, replay_report: ReplayReport, replay_sizes: Sizes) -> None:
    buffer = prioritised_buffer(make_priorities(replay_sizes.num_prioritised))
    sample = benchmark(buffer.sample_prioritised, replay_sizes.drawn, BETA)
    assert sample.turn_ids.shape == (replay_sizes.drawn,)
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        what = f"draw {replay_sizes.drawn} of {replay_sizes.num_prioritised:,} turns by priority, hot"
        replay_report.other_targets.append(Target(what, "at most 60 us", f"{seconds * 1e6:.1f} us", seconds <= 60e-6))
        benchmark.extra_info[SHOWN_HERE] = True


@pytest.mark.parametrize("max_tokens", [8192, 32_768])
@pytest.mark.parametrize("lengths_of", LENGTHS)
def test_packer(
    benchmark: Any, replay_report: ReplayReport, replay_sizes: Sizes, lengths_of: str, max_tokens: int
) -> None:
    lengths = LENGTHS[lengths_of]().clip(max=max_tokens)
    bins = benchmark.pedantic(pack_tokens, (lengths, max_tokens), rounds=10 * replay_sizes.rounds, warmup_rounds=1)
    assert sorted(itertools.chain(*bins)) == list(range(lengths.size))
    efficiency = float(lengths.sum() / (len(bins) * max_tokens))
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        what = f"pack {lengths.size:,} lengths ({lengths_of}) into bins of {max_tokens:,}"
        got, is_met = f"{seconds * 1e3:.2f} ms, {efficiency:.2%}", seconds <= 1e-3 and efficiency >= 0.995
        replay_report.other_targets.append(Target(what, "at most 1 ms, at least 99.5 % full", got, is_met))
        benchmark.extra_info[SHOWN_HERE] = True
