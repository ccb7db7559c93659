"""A task as the registry knows it: how to make its env, who can play it, which words it speaks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from archer_fast.envs.base import TextEnv
from archer_fast.envs.checks import unknown
from archer_fast.envs.players import ScriptedPlayer


@dataclass(slots=True, frozen=True)
class TaskSpec:
    """One task.

    TaskSpec(
        name="guess-number",
        summary="find a number in 1..high from Higher / Lower",
        env_factory=GuessNumber,                    # its keywords are the task's options
        players={"random": RandomNumberPlayer, "bisection": BisectionPlayer},
        default_player="random",                    # the teacher of behaviour cloning
        reference_player="bisection",               # the strongest: a yardstick for returns
        vocabulary=vocabulary,                      # same keywords as env_factory
    )
    """

    name: str
    summary: str
    env_factory: Callable[..., TextEnv]
    players: Mapping[str, Callable[[], ScriptedPlayer]]
    default_player: str
    reference_player: str
    vocabulary: Callable[..., list[str]]

    def __post_init__(self) -> None:
        for role in (self.default_player, self.reference_player):
            if role not in self.players:
                raise unknown(f"player of task {self.name!r}", role, sorted(self.players))

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its default: `{"high": 32, "max_turns": 20}`."""
        return {p.name: p.default for p in inspect.signature(self.env_factory).parameters.values()}

    def make_env(self, **options: Any) -> TextEnv:
        """A fresh env; ValueError for an option the task does not have."""
        self._check(options)
        return self.env_factory(**options)

    def make_player(self, name: str | None = None) -> ScriptedPlayer:
        """A fresh player; None is `default_player`."""
        name = self.default_player if name is None else name
        if name not in self.players:
            raise unknown(f"player of task {self.name!r}", name, sorted(self.players))
        return self.players[name]()

    def vocabulary_text(self, **options: Any) -> list[str]:
        """Texts that hold every word of the task, for training a tokenizer."""
        self._check(options)
        return self.vocabulary(**options)

    def _check(self, options: Mapping[str, Any]) -> None:
        accepted = list(self.options)
        for option in options:
            if option not in accepted:
                raise unknown(f"option of task {self.name!r}", option, accepted)
