"""The critic's side of the original's update: an epoch of micro-batches as one sum, and one micro-batch plainly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from archer_fast.compat.encoder import chunks_of_pairs, encode, heads, tokens_of
from archer_fast.compat.micro_metrics import statistics
from archer_fast.compat.models.shared_critic import is_shared
from archer_fast.compat.policy import autocast_of
from archer_fast.compat.transitions import Transitions

MAX_CHUNK_TOKENS = 1 << 11  # encoded with activations for backward at a time

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def critic_epoch(trainer: Any, drawn: Transitions, pi_actions: Sequence[str], micro_batch: int) -> dict[str, Tensor]:
    """Gradients, summed over micro-batches, of MSE(Q_i, r + gamma (1 - d) Vbar_i(s')) + MSE(V_i, Qbar_i(s, a'))

    drawn.num is a multiple of micro_batch; pi_actions [n]: a' ~ pi(.|s). The target critic encodes each text once, the
    critic once a chunk.
    """
    agent = trainer.agent
    critic, target = (agent.accelerator.unwrap_model(c) for c in (agent.critic, agent.target_critic))
    tokens, n = tokens_of(critic), drawn.num
    with autocast_of(agent):
        with torch.no_grad():
            states = encode(target, [*drawn.observation, *following_texts(drawn), *pi_actions], tokens)
            state, behind, action = states.split(n)
            target_q = [q.flatten() for q in heads(target, state, action)[:2]]
            returns = [backup(trainer, drawn, v) for v in (target.v_critic1(behind), target.v_critic2(behind))]
        sizes = [[len(ids) for ids in tokens(texts)] for texts in (drawn.observation, drawn.action)]
        found = [torch.empty(n, device=state.device) for _ in range(4)]
        for chunk in chunks_of_pairs(sizes[0], sizes[1], MAX_CHUNK_TOKENS):
            rows = torch.from_numpy(chunk).to(state.device)
            texts = [*(drawn.observation[i] for i in chunk), *(drawn.action[i] for i in chunk)]
            values = [v.flatten() for v in heads(critic, *encode(critic, texts, tokens).split(len(chunk)))]
            wanted = [w[rows] for w in (*returns, *target_q)]
            loss = sum(((v - w) ** 2).sum() for v, w in zip(values, wanted, strict=True)) / micro_batch
            agent.accelerator.backward(loss)
            for whole, part in zip(found, values, strict=True):
                whole[rows] = part.detach().float()
    return metrics(found, target_q, returns, micro_batch)


def following_texts(drawn: Transitions) -> list[str]:
    """The next observations. Where a game is done nothing rests on V(s'): the observation, which is read anyway, stands
    for s'."""
    texts = zip(drawn.observation, drawn.next_observation, drawn.done.tolist(), strict=True)
    return [here if done else behind for here, behind, done in texts]


def critic_loss_plain(trainer: Any, batch: dict[str, Any], pi_actions: Sequence[str]) -> dict[str, Tensor]:
    """One micro-batch by whatever critic the agent has: `critic_epoch`'s plain twin."""
    agent = trainer.agent
    drawn = Transitions(**{name: batch[name] for name in Transitions._fields})
    observation, action = list(drawn.observation), list(drawn.action)
    with torch.no_grad():
        target_q = [q.flatten() for q in agent.target_critic(observation, list(pi_actions))[:2]]
        following = following_texts(drawn) if is_shared(agent) else list(drawn.next_observation)
        target_v = agent.target_critic(following, action)[2:]
        returns = [backup(trainer, drawn, v) for v in target_v]
    values = [v.flatten() for v in agent.critic(observation, action)]
    losses = [F.mse_loss(v, w) for v, w in zip(values, (*returns, *target_q), strict=True)]
    agent.accelerator.backward(sum(losses))
    return metrics([v.detach() for v in values], target_q, returns, len(observation))


def backup(trainer: Any, drawn: Transitions, value: Tensor) -> Tensor:
    """r + gamma (1 - done) V(s') [n]; rewards in the policy's dtype, as the original has them."""
    like = next(trainer.agent.model.parameters())
    reward, done = (torch.as_tensor(x, dtype=like.dtype, device=value.device) for x in (drawn.reward, drawn.done))
    returns: Tensor = reward.flatten() + (1 - done.flatten()) * value.flatten() * trainer.gamma
    return returns


def metrics(
    values: Sequence[Tensor], target_q: Sequence[Tensor], returns: Sequence[Tensor], size: int
) -> dict[str, Tensor]:
    """Of q1, q2, v1, v2 [n] and what they were to be, in micro-batches of `size`."""
    info: dict[str, Tensor] = {}
    for name, value, wanted in zip(("q1", "q2", "v1", "v2"), values, (*returns, *target_q), strict=True):
        info[f"{name}.loss"] = ((value - wanted) ** 2).mean()  # equal micro-batches: the mean of their means
        info |= statistics(name, value.view(-1, size))
    for name, value in zip(("target_q1", "target_q2"), target_q, strict=True):
        info |= statistics(name, value.float().view(-1, size))
    return info
