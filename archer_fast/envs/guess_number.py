"""Guess the number: the env of finding a hidden number in 1..high from Higher and Lower."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from archer_fast.envs.base import StepResult
from archer_fast.envs.checks import check_count, check_seed, unknown
from archer_fast.envs.guess_number_players import BisectionPlayer, RandomNumberPlayer
from archer_fast.envs.task_spec import TaskSpec

_DIGITS = re.compile(r"[0-9]{1,18}")


class GuessNumber:
    """Guess 1 to `high`; -1 a turn, 0 for the winning turn, `max_turns` at most.

    As in Twenty Questions the limit is a rule of the game, so its last turn terminates.

    >>> env = GuessNumber(high=32)
    >>> env.reset(seed=0, options={"number": 20})
    'Guess 1 to 32.\\n'
    >>> env.step("16").text, env.step("20").text
    (' Higher.\\n', ' Correct.\\n')
    """

    name: ClassVar[str] = "guess-number"
    step_time_limit: float | None = None

    def __init__(self, high: int = 32, max_turns: int = 20) -> None:
        self.high = check_count("high", high)
        self.max_turns = check_count("max_turns", max_turns)
        self._turn = -1  # turns played; -1 = no game
        self._asked: set[int | str] = set()

    @property
    def options(self) -> dict[str, Any]:
        """The keywords that make this env again."""
        return {"high": self.high, "max_turns": self.max_turns}

    def reset(self, seed: int, options: Mapping[str, Any] | None = None) -> str:
        """Hide a number drawn by `seed`, or `options["number"]`."""
        number = random.Random(check_seed(seed)).randint(1, self.high)
        for key, value in (options or {}).items():
            if key != "number":
                raise unknown("reset option of guess-number", key, ["number"])
            number = check_count("number", value)
            if number > self.high:
                raise ValueError(f"number: wanted 1 to {self.high}, got {number}")
        self._number = number
        self._turn = 0
        self._asked = set()
        return opening(self.high)

    def step(self, action: str) -> StepResult:
        """Answer a guess. info: kind ("guess", "invalid"), repeat, won; number once the game is over."""
        if self._turn < 0:
            raise RuntimeError("step: no game is on; call reset first")
        self._turn += 1
        text = action.strip()
        guess = int(text) if _DIGITS.fullmatch(text) else 0
        valid = 1 <= guess <= self.high
        won = guess == self._number
        asked = guess if valid else text
        info: dict[str, Any] = {"won": won, "kind": "guess" if valid else "invalid", "repeat": asked in self._asked}
        self._asked.add(asked)
        if not valid:
            answer = " Invalid.\n"
        elif won:
            answer = " Correct.\n"
        else:
            answer = " Higher.\n" if guess < self._number else " Lower.\n"
        over = won or self._turn == self.max_turns
        if over:
            info["number"] = self._number
            self._turn = -1
        return StepResult(answer, 0.0 if won else -1.0, over, False, info)

    def clone(self) -> GuessNumber:
        """See `ResamplableEnv`."""
        twin = copy.copy(self)
        twin._asked = set(self._asked)
        return twin

    def resample_hidden(self, seed: int) -> None:
        """Uniform over the numbers between the last Higher and the last Lower."""
        if self._turn < 0:
            raise RuntimeError("resample_hidden: no game is on; call reset first")
        guesses = [guess for guess in self._asked if isinstance(guess, int)]
        low = max((guess for guess in guesses if guess < self._number), default=0)
        high = min((guess for guess in guesses if guess > self._number), default=self.high + 1)
        self._number = random.Random(check_seed(seed)).randint(low + 1, high - 1)


def opening(high: int) -> str:
    """The first text of a game."""
    return f"Guess 1 to {high}.\n"


def bisection_return(high: int, max_turns: int = 20) -> float:
    """Exact expected return of optimal play: minus the mean number of misses in the balanced search tree.

    A number at depth d of that tree (root: d = 1) is found after d - 1 misses, or not at all where
    d > max_turns, which costs max_turns. Depth d holds min(2^(d-1), what is left) numbers.
    bisection_return(1) = 0, bisection_return(3) = -2/3, bisection_return(32) = -103/32.
    """
    left, misses, depth = high, 0, 1
    while left:
        here = min(2 ** (depth - 1), left)
        misses += here * min(depth - 1, max_turns)
        left -= here
        depth += 1
    return -misses / high


def vocabulary(high: int = 32, max_turns: int = 20) -> list[str]:
    """Every text an env or an agent needs: opening, numbers, answers."""
    answers = [" Higher.\n", " Lower.\n", " Correct.\n", " Invalid.\n"]
    return [opening(high), *(str(number) for number in range(1, high + 1)), *answers]


TASK = TaskSpec(
    name=GuessNumber.name,
    summary="find a number in 1..high from Higher / Lower",
    env_factory=GuessNumber,
    players={"random": RandomNumberPlayer, "bisection": BisectionPlayer},
    default_player="random",
    reference_player="bisection",
    vocabulary=vocabulary,
)
