"""Scores: what a critic says of the actions of measured states, and of those that their games took."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from archer_fast.backbone import Backbone
from archer_fast.batch import Alternatives, PackedBatch, TreeBatch, plant_tree
from archer_fast.critic import TurnCritic, read_tree
from archer_fast.diagnosis import Diagnosis, Float64, diagnose
from archer_fast.diagnosis_play import MeasuredStates
from archer_fast.packing import pack_trajectories
from archer_fast.token_packer import pack_tokens

Score = Callable[[PackedBatch, TreeBatch], Tensor]  # of a batch of games and their branches: values [num_branches]


class Scores(NamedTuple):
    """Values of actions by one critic."""

    fresh: Float64  # [S, K] of the fresh actions, also of those that are drawn twice
    taken: Float64  # [N] of the actions that the S games took, game after game


def diagnose_critic(
    states: MeasuredStates, score: Score, trunk: Backbone, max_pass_tokens: int = 32768
) -> tuple[Diagnosis, Scores]:
    """What `score` says of these states, against what they returned; several critics can share the states."""
    scores = score_states(states, score, trunk, max_pass_tokens)
    packed = pack_trajectories(states.games, states.gamma)
    returns = packed.returns.astype(np.float64)
    return diagnose(scores.fresh, states.returns, states.valid, scores.taken, returns, packed.turn), scores


def critic_score(critic: TurnCritic, temperature: float, *, pessimistic: bool = True) -> Score:
    """min(Q1, Q2), what the actor's advantages are made of, or their mean."""

    @torch.no_grad()
    def score(batch: PackedBatch, tree: TreeBatch) -> Tensor:
        read = read_tree(critic.trunk, batch, tree, temperature)
        q = critic.heads.q_value(read.state, read.action)
        return q.amin(0) if pessimistic else q.mean(0)

    return score


def score_states(states: MeasuredStates, score: Score, trunk: Backbone, max_pass_tokens: int = 32768) -> Scores:
    """One pass over games with all their actions as branches, fresh and taken; `trunk` says how attention is laid out.

    A pass holds at most `max_pass_tokens`, or as many as the longest game needs.
    """
    num_states, num_actions, width = states.action_ids.shape
    width = max([width, *(turn.action_ids.size for game in states.games for turn in game.turns)])
    fresh, taken = np.empty((num_states, num_actions)), [np.empty(game.num_turns) for game in states.games]
    sizes = [
        2 * game.num_tokens + int(branches.sum()) for game, branches in zip(states.games, states.lengths, strict=True)
    ]
    for part in pack_tokens(sizes, max(max_pass_tokens, *sizes)):
        games = [states.games[i] for i in part]
        packed = pack_trajectories(games)
        num_rows = num_actions + max(game.num_turns for game in games)
        action_ids = np.zeros((part.size, num_rows, width), np.int32)
        lengths, turn_ids = np.zeros((part.size, num_rows), np.int64), np.full((part.size, num_rows), -1, np.int64)
        action_ids[:, :num_actions, : states.action_ids.shape[2]] = states.action_ids[part]
        lengths[:, :num_actions] = states.lengths[part]
        turn_ids[:, :num_actions] = (packed.cu_turns[:-1] + states.turn[part])[:, None]
        for b, game in enumerate(games):
            for t, turn in enumerate(game.turns):
                action_ids[b, num_actions + t, : turn.action_ids.size] = turn.action_ids
                lengths[b, num_actions + t] = turn.action_ids.size
                turn_ids[b, num_actions + t] = packed.cu_turns[b] + t
        batch = PackedBatch.from_arrays(packed, trunk.device)
        on_device = [torch.from_numpy(x).to(trunk.device) for x in (action_ids, lengths, turn_ids)]
        alternatives = Alternatives(on_device[0], torch.zeros(action_ids.shape, device=trunk.device), *on_device[1:])
        tree = plant_tree(batch, alternatives, trunk.layout(batch.cu_seqlens, batch.lengths))
        values = np.full((part.size, num_rows), np.nan)
        values[lengths > 0] = score(batch, tree).double().cpu().numpy()
        fresh[part] = values[:, :num_actions]
        for i, row in zip(part, values, strict=True):
            taken[i][:] = row[num_actions : num_actions + taken[i].size]
    return Scores(fresh, np.concatenate(taken))
