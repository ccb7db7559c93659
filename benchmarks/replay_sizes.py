"""How much the buffer's benchmarks measure."""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    num_games: int
    drawn: int  # transitions
    many_drawn: int
    rounds: int
    insert_passes: int
    hot_seconds: float  # of one round of calls that follow one another
    cold_bytes: int  # read between cold calls
    large_bytes: int  # of the large buffer
    num_prioritised: int  # turns


SIZES = {
    "full": Sizes(4000, 256, 4096, 15, 3, 0.02, 768 << 20, 1 << 30, 1_000_000),
    "tiny": Sizes(160, 64, 128, 2, 1, 0.0, 1 << 20, 1 << 24, 20_000),
}
