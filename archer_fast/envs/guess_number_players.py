"""Players of Guess the number: one that ignores the answers, one that is optimal."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any


class RandomNumberPlayer:
    """Any number of 1..high, each turn anew."""

    def reset(self, seed: int, env_options: Mapping[str, Any]) -> None:
        """Begin a game."""
        self._rng = random.Random(f"random {seed}")  # text: its stream is not the env's
        self._high = int(env_options.get("high", 32))

    def act(self, observation: str) -> str:
        """A uniform number."""
        return str(self._rng.randint(1, self._high))


class BisectionPlayer:
    """The middle of what is left: no strategy needs fewer guesses on average."""

    def reset(self, seed: int, env_options: Mapping[str, Any]) -> None:
        """Begin a game; nothing is random."""
        self._low = 1
        self._high = int(env_options.get("high", 32))
        self._guess = 0  # none yet

    def act(self, observation: str) -> str:
        """Halve the range by the newest answer."""
        if observation == " Higher.\n":
            self._low = self._guess + 1
        elif observation == " Lower.\n":
            self._high = self._guess - 1
        self._guess = (self._low + self._high) // 2
        return str(self._guess)
