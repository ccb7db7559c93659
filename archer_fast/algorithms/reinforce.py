"""REINFORCE with returns to go, and with whole games compared in groups (RLOO, arXiv 2402.14740)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from archer_fast.advantages import discounted_returns, normalise
from archer_fast.algorithms.games_learner import GamesLearner
from archer_fast.algorithms.learner import OnStep, ignore
from archer_fast.meters import Meters
from archer_fast.trajectory import Trajectory


class Reinforce(GamesLearner):
    """Policy gradients on this iteration's games, credited by what was earned after each action."""

    def insert(self, trajectories: list[Trajectory], meters: Meters) -> None:
        super().insert(trajectories, meters)
        seeds = np.array([game.info["seed"] for game in trajectories])
        self._seeds = seeds[seeds.size - self.newest.size :]  # where the buffer could not hold them all

    def update_actor(self, meters: Meters, on_step: OnStep = ignore) -> None:
        """`epochs` steps on minibatches of this iteration's games."""
        r = self.config.reinforce
        turn_ids = self.turns_of(self.newest)
        records, (_, num_turns) = self.buffer.turn_records(turn_ids), self.buffer.turn_span(self.newest)
        cu_turns = torch.from_numpy(np.concatenate([[0], np.cumsum(num_turns)]).astype(np.int32))
        returns = discounted_returns(torch.from_numpy(records.rewards).double(), cu_turns, r.gamma).numpy()
        if r.baseline == "group":
            first = np.cumsum(num_turns) - num_turns
            advantages = np.repeat(leave_one_out(returns[first], self._seeds), num_turns)
        else:
            advantages = returns - (mean_by(returns, records.turn) if r.baseline == "batch" else 0.0)
        credit = torch.from_numpy(advantages.astype(np.float32)).to(self.actor.device)
        meters.add(advantage_std=credit.std(correction=0))
        if r.normalise_advantages:
            credit = normalise(credit)
        by_game: dict[int, Tensor] = dict(zip(self.newest.tolist(), credit.split(num_turns.tolist()), strict=True))
        self.step_on_games(self.newest, by_game, meters, on_step, max_moved=r.max_kl_step)


def mean_by(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The mean of the values that share a key, for each: values [1, 3, 5], keys [7, 7, 2] -> [2, 2, 5]."""
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    means: np.ndarray = (np.bincount(inverse, values) / counts)[inverse]
    return means


def leave_one_out(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Each value minus the mean of the others that share its key; 0 where there are none.

    values [1, 3, 5], keys [7, 7, 2] -> [-2, 2, 0].
    """
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    size = counts[inverse]
    apart: np.ndarray = (values - mean_by(values, keys)) * size / np.maximum(size - 1, 1)
    return apart
