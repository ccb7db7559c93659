"""Guess My City under the original's name: a task that this package does not have yet."""

from __future__ import annotations

from typing import Any


class BatchedGuessMyCityEnv:
    """Not here yet."""

    def __init__(
        self,
        env_load_path: str | None = None,
        device: Any = None,
        cache_dir: str | None = None,
        max_conversation_length: int = 20,
        bsize: int = 32,
        **kwargs: Any,
    ) -> None:
        """NotImplementedError that says what to bring instead."""
        raise NotImplementedError(
            "BatchedGuessMyCityEnv: archer_fast has no Guess My City yet. Give offpolicy_train_loop the original's "
            "(archer.environment.BatchedGuessMyCityEnv), or any env with .bsize, .reset(idx=None) -> list of str and "
            ".step(list of str) -> list of (next_observation, reward, done), None for a game that is over"
        )
