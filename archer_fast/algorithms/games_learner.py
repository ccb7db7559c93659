"""Steps on whole games with the actions that were taken in them: what PPO, REINFORCE and cloning share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from archer_fast.actor import ScoredActions
from archer_fast.algorithms.learner import Learner, OnStep, by_game
from archer_fast.config import PolicyLoss
from archer_fast.meters import Meters
from archer_fast.packing import Int64


class GamesLearner(Learner):
    """A learner whose advantages are known before its steps: a tensor a game."""

    def step_on_games(
        self,
        games: Int64,
        advantages: Mapping[int, Tensor],
        meters: Meters,
        on_step: OnStep,
        *,
        kind: PolicyLoss = "reinforce",
        max_moved: float = float("inf"),
        **more: float,
    ) -> None:
        """`epochs` steps on minibatches of these games; they end once the policy has moved `max_moved` nats an action.

        advantages: by game id, [turns] or [action tokens] of that game. more: clip, awr_beta.
        """
        ref_logprobs = self._reference_logprobs(games, meters) if self.update.kl_coef > 0 else None
        for chosen in self._minibatches(games):
            passes = []
            for part in self.own_passes(self.buffer.lengths(chosen).tolist()):
                ids = chosen[part].tolist()
                batch = self.collate(chosen[part])
                ref = None if ref_logprobs is None else torch.cat([ref_logprobs[i] for i in ids])
                credit = torch.cat([advantages[i] for i in ids])
                layout = self.actor.layout(batch.cu_seqlens, batch.lengths)
                passes.append(ScoredActions.of_games(batch, layout, ref, credit))
                meters.count(processed_tokens=batch.num_tokens)
            out = self.take_actor_step(passes, chosen, meters, kind=kind, **more)
            on_step()
            if max_moved < float("inf") and out.moved.item() > max_moved:
                break
        self.actor_step.check(meters)

    def _minibatches(self, games: Int64) -> Iterator[Int64]:
        """One a step: `batch_games` of them in a random order, and in a new one once fewer are left than that."""
        order = np.empty(0, np.int64)
        size = min(self.update.batch_games, games.size)
        for _ in range(self.update.epochs if games.size else 0):
            if order.size < size:
                order = self.rng.permutation(games)
            chosen, order = order[:size], order[size:]
            yield np.sort(chosen)

    def _reference_logprobs(self, games: Int64, meters: Meters) -> dict[int, Tensor]:
        """By game id, of its action tokens under the start policy; those of the newest games are known."""
        found: dict[int, Tensor] = {}
        unknown = games[~np.isin(games, list(self.ref_logprobs))]
        if unknown.size:
            for ids, batch, features in self.read_start_policy(unknown):
                found |= by_game(features.token_logprobs, ids, batch)
                meters.count(processed_tokens=batch.num_tokens)
        return self.ref_logprobs | self.gather_by_game(found)
