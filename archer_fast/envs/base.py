"""The protocol of a text task: Gymnasium's order and words, with strings for spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable


class StepResult(NamedTuple):
    """What `TextEnv.step` returns: Gymnasium's five.

    >>> StepResult(" Yes.\\n", -1.0, False, False, {})
    StepResult(text=' Yes.\\n', reward=-1.0, terminated=False, truncated=False, info={})
    """

    text: str  # only what is new since the action; the caller keeps the history
    reward: float
    terminated: bool  # the task ended
    truncated: bool  # a limit of the task cut it
    info: dict[str, Any]


@runtime_checkable
class TextEnv(Protocol):
    """One game at a time; many games are many instances. Instances share no mutable state.

    `step_time_limit`: seconds a call of `reset` or `step` may take before the game is dropped;
    None promises that the env cannot block (pure Python on a table), and it is then called inline.
    """

    name: ClassVar[str]
    max_turns: int
    step_time_limit: float | None

    def reset(self, seed: int, options: Mapping[str, Any] | None = None) -> str:
        """Start a new game, wholly determined by `seed` and `options`; return the first text."""
        ...

    def step(self, action: str) -> StepResult:
        """Answer one action (any string: never raises for what an agent may say)."""
        ...
