"""Scripted play: a player that needs no model, and the record of its game."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from archer_fast.envs.base import TextEnv


class ScriptedPlayer(Protocol):
    """A fixed strategy that sees what an agent sees: texts, and the public rules of the task."""

    def reset(self, seed: int, env_options: Mapping[str, Any]) -> None:
        """Begin a game of the env made with `env_options`; `seed` settles every later choice."""
        ...

    def act(self, observation: str) -> str:
        """Answer the newest text with an action, without a stop token."""
        ...


@dataclass(slots=True, frozen=True)
class ScriptedGame:
    """One recorded game; `observations[i]` is what `actions[i]` answered and `rewards[i]`, `infos[i]` followed.

    ScriptedGame(
        observations=["Guess 1 to 32.\\n", " Higher.\\n"],
        actions=["16", "24"],
        rewards=[-1.0, 0.0],
        infos=[{"kind": "guess", "won": False, ...}, {"kind": "guess", "won": True, ...}],
        final_observation=" Correct.\\n",
        terminated=True,
        truncated=False,
    )
    """

    observations: list[str]
    actions: list[str]
    rewards: list[float]
    infos: list[dict[str, Any]]
    final_observation: str
    terminated: bool
    truncated: bool

    @property
    def episode_return(self) -> float:
        """Undiscounted sum of rewards."""
        return float(sum(self.rewards))

    @property
    def text(self) -> str:
        """The transcript as an agent without special tokens would read it."""
        return "".join(o + a for o, a in zip(self.observations, self.actions, strict=True)) + self.final_observation


def play_scripted(
    env: TextEnv, player: ScriptedPlayer, seed: int, env_options: Mapping[str, Any] | None = None
) -> ScriptedGame:
    """Play one game to its end; env and player both draw from `seed`, so the same call gives the same game.

    `env_options` are what the env was made with; None reads the env's own `options`, which the
    tasks of this package have.
    """
    if env_options is None:
        env_options = getattr(env, "options", None)
        if env_options is None:
            raise ValueError(f"env_options: wanted a mapping, as {type(env).__name__} has no `options`, got None")
    player.reset(seed, env_options)
    observation = env.reset(seed)
    observations: list[str] = []
    actions: list[str] = []
    rewards: list[float] = []
    infos: list[dict[str, Any]] = []
    while True:
        action = player.act(observation)
        result = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(result.reward)
        infos.append(result.info)
        observation = result.text
        if result.terminated or result.truncated:
            return ScriptedGame(observations, actions, rewards, infos, observation, result.terminated, result.truncated)
