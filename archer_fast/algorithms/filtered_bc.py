"""Behaviour cloning of the best games (filtered BC), or of all of them."""

from __future__ import annotations

import numpy as np
import torch

from archer_fast.algorithms.games_learner import GamesLearner
from archer_fast.algorithms.learner import OnStep, ignore
from archer_fast.meters import Meters
from archer_fast.packing import Int64


class FilteredBC(GamesLearner):
    """Maximum likelihood on the actions of the replayed games with the highest returns."""

    def update_actor(self, meters: Meters, on_step: OnStep = ignore) -> None:
        """`epochs` steps on minibatches of the best games."""
        games = self.best_games()
        _, num_turns = self.buffer.turn_span(games)
        ones = torch.ones(int(num_turns.sum()), device=self.actor.device)
        credit = dict(zip(games.tolist(), ones.split(num_turns.tolist()), strict=True))
        self.step_on_games(games, credit, meters, on_step)

    def best_games(self) -> Int64:
        """The best `share` by undiscounted return, at least one; of equal ones the newest."""
        f = self.config.filtered_bc
        games = self.newest if f.newest else np.arange(*self.buffer.trajectory_range)
        _, num_turns = self.buffer.turn_span(games)
        rewards = self.buffer.turn_records(self.turns_of(games)).rewards.astype(np.float64)
        returns = np.add.reduceat(rewards, np.cumsum(num_turns) - num_turns)
        best_last = np.lexsort((games, returns))
        chosen: Int64 = np.sort(games[best_last[games.size - max(1, round(f.share * games.size)) :]])
        return chosen
