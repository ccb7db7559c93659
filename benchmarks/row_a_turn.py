"""The plain baseline of an update: a row for each turn, padded, four models, logits of every token.

What a straightforward program does with ArCHer's losses (arXiv 2402.19446), without what the original does worse: the
state, the action and the next state share one row, values of the critic's own pass serve the actor too, and rows go in
batches.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from archer_fast.trajectory import Trajectory

GAMMA, TAU, KL = 0.95, 0.1, 0.05


class Rows(NamedTuple):
    ids: Tensor  # [n, L], padded on the right
    mask: Tensor  # [n, L]
    state: Tensor  # [n] the last token before the action
    action_end: Tensor  # [n]
    next_state: Tensor  # [n] the last token before the next action
    reward: Tensor  # [n]
    done: Tensor  # [n]


class Critic(nn.Module):
    """An encoder of its own and two pairs of heads."""

    def __init__(self, encoder: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.encoder = encoder

        def head() -> nn.Module:
            return nn.Sequential(nn.Linear(hidden_size, 64), nn.GELU(), nn.Linear(64, 1))

        self.q, self.v = nn.ModuleList([head(), head()]), nn.ModuleList([head(), head()])

    def forward(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Q(s, a), V(s), V(s'): [2, n] each."""
        hidden = self.encoder(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False).last_hidden_state
        every = torch.arange(len(rows.ids))
        at = [hidden[every, place] for place in (rows.action_end, rows.state, rows.next_state)]
        q, v, v_next = (
            torch.stack([head(x).squeeze(1) for head in heads])
            for heads, x in zip((self.q, self.v, self.v), at, strict=True)
        )
        return q, v, v_next


class RowATurn:
    """An actor, its reference, a critic, its target: four copies of the model."""

    def __init__(self, model: PreTrainedModel, batch_rows: int = 16) -> None:
        self.actor, self.reference = model, copy.deepcopy(model).requires_grad_(False)
        self.critic = Critic(copy.deepcopy(model.base_model), model.config.hidden_size)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.batch_rows = batch_rows
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=1e-4)
        self.actor_optimizer = torch.optim.AdamW(self.actor.parameters(), lr=1e-4)

    def update(self, games: Sequence[Trajectory]) -> None:
        """One step of the critic over all turns, then one of the actor."""
        rows = make_rows(games)
        batches = [Rows(*(x[i : i + self.batch_rows] for x in rows)) for i in range(0, len(rows.ids), self.batch_rows)]
        num_rows, advantages = len(rows.ids), []
        for batch in batches:
            q, v, _ = self.critic(batch)
            with torch.no_grad():
                target_q, _, target_v = self.target(batch)
                wanted = batch.reward + GAMMA * (1 - batch.done) * target_v
            loss = ((q - wanted).square().sum() + (v - target_q).square().sum()) / num_rows
            loss.backward()
            advantages.append((q.amin(0) - v.amin(0)).detach())
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.critic.parameters()), TAU)
        for batch, advantage in zip(batches, advantages, strict=True):
            logprobs = self.logprobs(self.actor, batch)
            with torch.no_grad():
                reference = self.logprobs(self.reference, batch)
            column = torch.arange(batch.ids.shape[1] - 1)
            is_action = (column >= batch.state[:, None]) & (column < batch.action_end[:, None])
            terms = -advantage[:, None] * logprobs + KL * 0.5 * (logprobs - reference).square()
            (terms[is_action].sum() / num_rows).backward()
        self.actor_optimizer.step()
        self.actor_optimizer.zero_grad()

    @staticmethod
    def logprobs(model: PreTrainedModel, rows: Rows) -> Tensor:
        """[n, L - 1] of each next token."""
        logits = model(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False).logits[:, :-1]
        return logits.log_softmax(-1).gather(2, rows.ids[:, 1:, None]).squeeze(2)


def make_rows(games: Sequence[Trajectory]) -> Rows:
    """Every turn with all that was said before it, and the observation that follows."""
    texts: list[Tensor] = []
    numbers: list[tuple[int, int, int, float, float]] = []
    for game in games:
        said: list[int] = []
        observations = [turn.observation_ids for turn in game.turns[1:]] + [game.final_observation_ids]
        for i, (turn, after) in enumerate(zip(game.turns, observations, strict=True)):
            said += turn.observation_ids.tolist()
            state = len(said) - 1
            said += turn.action_ids.tolist()
            texts.append(torch.tensor(said + after.tolist()))
            done = float(i + 1 == len(game.turns))
            numbers.append((state, len(said) - 1, len(texts[-1]) - 1, turn.reward, done))
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    state, action_end, next_state, reward, done = (torch.tensor(column) for column in zip(*numbers, strict=True))
    return Rows(ids, mask, state, action_end, next_state, reward, done)
