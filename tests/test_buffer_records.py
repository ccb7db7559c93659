"""What a buffer tells of itself: the docstring's example is a real buffer's."""

from __future__ import annotations

import re

import numpy as np

from archer_fast.buffer import TrajectoryBuffer
from archer_fast.buffer_records import BufferStats
from archer_fast.trajectory import Trajectory, Turn


def nine_tokens(version: int) -> Trajectory:
    turns = (
        Turn(np.array([17, 9]), np.array([41, 2]), np.array([-1.0, -2.0]), -1.0, version),
        Turn(np.array([12]), np.array([5, 2]), np.array([-3.0, -4.0]), 0.0, version),
    )
    return Trajectory(turns, np.array([30, 31]), terminated=True, truncated=False)


def test_the_example_of_buffer_stats() -> None:
    example = re.search(r"BufferStats\(num.*?\}\)", BufferStats.__doc__ or "", re.DOTALL)
    assert example is not None
    buffer = TrajectoryBuffer(1000, 3)
    buffer.extend([nine_tokens(version) for version in (6, 6, 7, 7)])
    assert buffer.stats() == eval(example.group(), {"BufferStats": BufferStats})
