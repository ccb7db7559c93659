"""What a trajectory buffer tells of its turns and of itself."""

from __future__ import annotations

from typing import NamedTuple

from archer_fast.packing import Bool, Float32, Int32, Int64
from archer_fast.staging import UInt8


class TurnRecords(NamedTuple):
    """What is known of some turns without their tokens.

    The last turn of a three-turn game that the task ended, then a middle turn of another:

        TurnRecords(rewards=[0., -1.], turn=[2, 4], is_last=[True, False],
                    terminated=[True, False], truncated=[False, False])
    """

    rewards: Float32  # [n]
    turn: Int32  # [n], index of the turn in its game
    is_last: Bool  # [n]
    terminated: Bool  # [n], is_last and the game terminated
    truncated: Bool  # [n], is_last and the game was truncated


class PrioritisedSample(NamedTuple):
    """Turns drawn in proportion to their priorities, in ascending order, and what undoes it in a mean.

    Four turns of priorities 2, 1, 1, 4, so of probabilities .25, .125, .125, .5, with beta=1:

        PrioritisedSample(turn_ids=[0, 2, 3, 3], weights=[.5, 1., .25, .25])
    """

    turn_ids: Int64  # [n]
    weights: Float32  # [n], (smallest live priority above 0 / the turn's own)**beta, at most 1


class FeatureRows(NamedTuple):
    """Features of some turns, as `TrajectoryBuffer.read_features` gives them.

    Rows of four bytes, two for the state and two for the action. Of a game of two turns, set to [[1, 2, 3, 4],
    [5, 6, 7, 8], [9, 10, 0, 0]], the last turn and then the first, with what is known of the state behind each:

        FeatureRows(rows=[[5, 6, 7, 8], [1, 2, 3, 4]], next_rows=[[9, 10], [5, 6]])
    """

    rows: UInt8  # [n, feature_bytes]
    next_rows: UInt8  # [n, next_bytes], the front of the rows behind them


class BufferStats(NamedTuple):
    """One consistent look at the buffer.

    Four games of two turns and nine tokens each, the first two of them played by policy version 6 and the others by 7,
    in a TrajectoryBuffer(1000, 3):

        BufferStats(num_trajectories=3, num_turns=6, num_tokens=27, num_evicted=1, num_bytes=65744,
                    turns_by_age={0: 2, 1: 2, 2: 2}, turns_by_version={6: 2, 7: 4})
    """

    num_trajectories: int
    num_turns: int
    num_tokens: int
    num_evicted: int  # trajectories evicted since the buffer was made
    num_bytes: int  # memory held, what is reserved for the next trajectories included
    turns_by_age: dict[int, int]  # {a: turns} with a to 2 a - 1 games pushed after their own; a = 0, 1, 2, 4, 8, ...
    turns_by_version: dict[int, int]  # {policy version: turns}
    num_mapped_bytes: int = 0  # of features in files, beside num_bytes
