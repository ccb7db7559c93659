"""WebShop under the original's name: a task that this package does not have yet."""

from __future__ import annotations

from typing import Any


class BatchedWebShopEnv:
    """Not here yet."""

    def __init__(
        self,
        env_load_path: str | None = None,
        lower: int | None = None,
        upper: int | None = None,
        bsize: int = 32,
        **kwargs: Any,
    ) -> None:
        """NotImplementedError that says what to bring instead."""
        raise NotImplementedError(
            "BatchedWebShopEnv: archer_fast has no WebShop yet. Give offpolicy_train_loop the original's "
            "(archer.environment.BatchedWebShopEnv), or any env with .bsize, .reset(idx=None) -> list of str and "
            ".step(list of str) -> list of (next_observation, reward, done), None for a game that is over"
        )
