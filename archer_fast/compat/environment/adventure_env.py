"""The text adventures of Jericho under the original's name: a task that this package does not have yet."""

from __future__ import annotations

from typing import Any


class BatchedAdventureEnv:
    """Not here yet."""

    def __init__(self, env_load_path: str | None = None, bsize: int = 32, max_steps: int = 60, **kwargs: Any) -> None:
        """NotImplementedError that says what to bring instead."""
        raise NotImplementedError(
            "BatchedAdventureEnv: archer_fast has no Jericho games yet. Give offpolicy_train_loop the original's "
            "(archer.environment.BatchedAdventureEnv), or any env with .bsize, .reset(idx=None) -> list of str and "
            ".step(list of str) -> list of (next_observation, reward, done), None for a game that is over"
        )
