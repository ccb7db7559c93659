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


@runtime_checkable
class ResamplableEnv(TextEnv, Protocol):
    """An env whose game can be tried out from where it stands: `archer-fast diagnose` needs it, nothing else does.

    A clone alone knows what is hidden from the agent, and so its future is not that of the agent's state: the value of
    an action is its mean over everything that may be hidden, given what was said.
    """

    def clone(self) -> ResamplableEnv:
        """Another env of the same kind in the same state; nothing that is done to one is seen in the other."""
        ...

    def resample_hidden(self, seed: int) -> None:
        """Draw what is hidden anew by `seed`, from its distribution given all that was said in this game.

        Had it been hidden from the start, every text, reward and end so far would have been the same. RuntimeError
        where no game is on.
        """
        ...
