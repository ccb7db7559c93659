"""REINFORCE with returns to go, and with whole games compared in groups (RLOO, arXiv 2402.14740)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from archer_fast.advantages import normalise
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
        returns = returns_to_go(records.rewards, records.is_last, r.gamma)
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


def returns_to_go(rewards: np.ndarray, is_last: np.ndarray, gamma: float) -> np.ndarray:
    """G_t = r_t + gamma G_{t+1} of games laid end to end: rewards [N], is_last [N] bool -> [N] float64.

    rewards [1, 2, 4], is_last [F, T, T], gamma 0.5 -> [2, 2, 4].
    """
    returns = rewards.astype(np.float64)
    for t in range(returns.size - 2, -1, -1):
        if not is_last[t]:
            returns[t] += gamma * returns[t + 1]
    return returns


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
