"""What a game of a plan is like."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Workload:
    """What a game is like; the rest of the work stands in the run's settings."""

    turns: int = 20
    """Turns of a game."""
    observation_tokens: int = 16
    """Tokens that the environment says a turn."""
    action_tokens: int = 8
    """Tokens that the policy says a turn, the stop token included."""

    @property
    def game_tokens(self) -> int:
        """One game as one sequence, its last observation included."""
        return self.turns * (self.observation_tokens + self.action_tokens) + self.observation_tokens

    @property
    def history_tokens(self) -> float:
        """All that stands before an action, mean over turns."""
        k, o, a = self.turns, self.observation_tokens, self.action_tokens
        return o * (k + 1) / 2 + a * (k - 1) / 2

    @property
    def game_actions(self) -> int:
        """Action tokens of a game."""
        return self.turns * self.action_tokens

    @property
    def game_pairs(self) -> float:
        """Queries and keys of one game's causal attention."""
        return self.game_tokens * (self.game_tokens + 1) / 2
