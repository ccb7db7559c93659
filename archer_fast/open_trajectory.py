"""A game that is being played, on its way into the buffer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from archer_fast import _C
from archer_fast.arguments import (
    MAX_INT32,
    MAX_INT64,
    MIN_INT32,
    MIN_INT64,
    as_flag,
    as_int32,
    as_integer,
    as_numbers,
    as_real,
)


class OpenTrajectory:
    """What `TrajectoryBuffer.begin` gives: turns are added as they are played, and `end` pushes them at one moment.

    For one thread at a time. Where a method raises, the game is as it was before and can go on. After `end` the
    object is of no more use: ValueError.
    """

    def __init__(self, buffer: _C.TrajectoryBuffer, task_id: int) -> None:
        self._buffer = buffer
        task_id = as_integer("task_id", task_id, MIN_INT32, MAX_INT32)
        self._game: _C.OpenTrajectory | None = _C.OpenTrajectory(buffer.vocab_size, task_id)

    @property
    def num_turns(self) -> int:
        """Turns played so far."""
        return self._open().num_turns

    def add_turn(
        self,
        observation_ids: npt.ArrayLike,
        action_ids: npt.ArrayLike,
        rollout_logprobs: npt.ArrayLike,
        reward: float,
        policy_version: int,
    ) -> None:
        """One exchange: what `trajectory.Turn` holds. ValueError or TypeError names the argument at fault."""
        self._open().add_turn(
            as_int32("observation_ids", observation_ids),
            as_int32("action_ids", action_ids),
            as_numbers("rollout_logprobs", rollout_logprobs, np.float32),
            as_real("reward", reward),
            as_integer("policy_version", policy_version, MIN_INT64, MAX_INT64),
        )

    def end(
        self, final_observation_ids: npt.ArrayLike = (), *, terminated: bool = False, truncated: bool = False
    ) -> int:
        """Push the game and return its trajectory id.

        final_observation_ids: what the last action was answered with, if anything. Exactly one of `terminated` (the
        task ended) and `truncated` (something cut it) is True, or ValueError.
        """
        trajectory_id = self._open().end(
            self._buffer,
            as_int32("final_observation_ids", final_observation_ids),
            as_flag("terminated", terminated),
            as_flag("truncated", truncated),
        )
        self._game = None
        return trajectory_id

    def _open(self) -> _C.OpenTrajectory:
        if self._game is None:
            raise ValueError("this game has ended: begin another")
        return self._game
