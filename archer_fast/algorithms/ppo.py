"""PPO with a value head of its own, a time step being a token or a turn (Schulman et al. 2017, arXiv 1707.06347)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from archer_fast.advantages import turn_gae
from archer_fast.algorithms.games_learner import GamesLearner
from archer_fast.algorithms.learner import OnStep, ignore
from archer_fast.backbone import Backbone
from archer_fast.batch import PackedBatch
from archer_fast.buffer import TrajectoryBuffer
from archer_fast.config import Config
from archer_fast.critic import StateFeatures, StateValue
from archer_fast.meters import Meters
from archer_fast.optim import GuardedStep
from archer_fast.ranks import ALONE, Ranks
from archer_fast.rollout.policy_engine import PolicyEngine


class TimeSteps(NamedTuple):
    """The S time steps of B packed games: their turns, or the tokens of their actions."""

    before: StateFeatures  # [S] the state in which each is taken
    final: StateFeatures  # [B] the state after the last of each game
    rewards: Tensor  # [S]
    discounts: Tensor  # [S] gamma where a turn ends, 1 inside it
    cu_steps: Tensor  # [B+1] int32

    @classmethod
    def of_turns(cls, hidden: Tensor, batch: PackedBatch, gamma: float) -> TimeSteps:
        before = StateFeatures(hidden[batch.state_positions], batch.turn.long())
        discounts = torch.full_like(batch.rewards, gamma)
        return cls(before, _final(hidden, batch), batch.rewards, discounts, batch.cu_turns)

    @classmethod
    def of_tokens(cls, hidden: Tensor, batch: PackedBatch, gamma: float) -> TimeSteps:
        """A turn's reward comes with the last token of its action."""
        rows = batch.action_rows
        turn_ids = batch.turn_ids[rows].long()
        ends_turn = rows == batch.action_positions[turn_ids]
        before = StateFeatures(hidden[rows - 1], batch.turn[turn_ids].long())
        num_tokens = batch.action_mask.cumsum(0, dtype=torch.int32)[batch.cu_seqlens[1:].long() - 1]
        return cls(
            before,
            _final(hidden, batch),
            torch.where(ends_turn, batch.rewards[turn_ids], 0.0),
            torch.where(ends_turn, gamma, 1.0),
            torch.cat([num_tokens.new_zeros(1), num_tokens]),
        )


def _final(hidden: Tensor, batch: PackedBatch) -> StateFeatures:
    return StateFeatures(hidden[batch.final_positions], (batch.cu_turns[1:] - batch.cu_turns[:-1]).long())


class PPO(GamesLearner):
    """Clipped policy steps on this iteration's games, credited by generalised advantage estimation.

    The value head reads what ArCHer's critic reads: the start policy's hidden states and the index of the turn.
    """

    needs_logprobs = True

    def __init__(
        self,
        config: Config,
        actor: Backbone,
        reference: Backbone,
        engine: PolicyEngine,
        buffer: TrajectoryBuffer,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(config, actor, reference, engine, buffer, ranks)
        p = config.ppo
        self.critic_epochs = p.value_epochs
        generator = torch.Generator().manual_seed(config.seed + 1)
        self.value = StateValue(actor.hidden_size, config.critic.hidden_size, generator).to(actor.device)
        group = [{"params": list(self.value.parameters()), "lr": p.value_lr}]
        self.value_step = GuardedStep("value", group, p.max_grad_norm, config.max_skipped_steps)
        self._advantages: dict[int, Tensor] = {}

    def modules(self) -> dict[str, nn.Module]:
        return {"value": self.value}

    def steps(self) -> dict[str, GuardedStep]:
        return {"value": self.value_step, **super().steps()}

    def update_critic(self, meters: Meters, on_step: OnStep = ignore) -> None:
        """Advantages by the value head as it is, then `value_epochs` passes of it over this iteration's games."""
        self._advantages = {}
        found = []
        with self.reference.gathered():
            for part in self.own_passes(self.buffer.lengths(self.newest).tolist()):
                state, target = self._credit(part, meters)
                found.append((*state, target))
        self._advantages = self.gather_by_game(self._advantages)
        # The head is small and has every time step of every rank: each fits the same one.
        every = [parts for theirs in self.ranks.gather(self.ranks.movable(found)) for parts in theirs]
        hidden, turn, together = (torch.cat(parts).to(self.actor.device) for parts in zip(*every, strict=True))
        p = self.config.ppo
        for _ in range(p.value_epochs):
            for chosen in np.array_split(
                self.rng.permutation(together.shape[0]), -(-together.shape[0] // p.value_batch)
            ):
                at = torch.from_numpy(chosen).to(together.device)
                v = self.value(StateFeatures(hidden[at], turn[at]))  # [2, n], each head on its own
                loss = (v - together[at]).square().mean()
                meters.add(critic_loss=loss.detach())
                self.value_step(loss, meters, self.newest)
            on_step()
        self.value_step.check(meters)
        self.ranks.take_first(self.value.parameters())

    @torch.no_grad()
    def _credit(self, part: np.ndarray, meters: Meters) -> tuple[StateFeatures, Tensor]:
        """Keeps the advantages of a part of the newest games; what V is to be fitted to, and where."""
        p, ids = self.config.ppo, self.newest[part]
        batch = self.collate(ids)
        layout = self.reference.layout(batch.cu_seqlens, batch.lengths)
        hidden = self.reference(batch.input_ids, batch.position_ids, layout)
        meters.count(processed_tokens=batch.num_tokens)
        time = (TimeSteps.of_turns if p.level == "turn" else TimeSteps.of_tokens)(hidden, batch, p.gamma)
        v, v_final = self.value(time.before).mean(0), self.value(time.final).mean(0)
        advantages = turn_gae(time.rewards, v, v_final, batch.terminated, time.cu_steps, time.discounts, p.gae_lambda)
        returns = advantages + v
        meters.add(explained_variance=1 - advantages.var(correction=0) / returns.var(correction=0).clamp(min=1e-6))
        sizes = (time.cu_steps[1:] - time.cu_steps[:-1]).tolist()
        self._advantages |= dict(zip(ids.tolist(), advantages.split(sizes), strict=True))
        return time.before, returns

    def update_actor(self, meters: Meters, on_step: OnStep = ignore) -> None:
        """Clipped steps; the iteration's advantages are centred and divided by their standard deviation."""
        p = self.config.ppo
        together = torch.cat(list(self._advantages.values()))
        mean, std = together.mean(), together.std(correction=0).clamp(min=1e-6)
        meters.add(advantage_std=std)
        credit = {game: (own - mean) / std for game, own in self._advantages.items()}
        self.step_on_games(self.newest, credit, meters, on_step, kind="ppo_clip", max_moved=p.max_kl_step, clip=p.clip)
