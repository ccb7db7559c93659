"""Warm start: language modelling on a scripted player's dialogues before any reinforcement."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from archer_fast.backbone import Backbone
from archer_fast.batch import PackedBatch
from archer_fast.config import WarmStartConfig
from archer_fast.envs.players import ScriptedGame
from archer_fast.ops import linear_logprobs
from archer_fast.packing import pack_trajectories
from archer_fast.trajectory import Trajectory, Turn


def to_trajectory(game: ScriptedGame, encode: Callable[[str], list[int]], stop_token_id: int) -> Trajectory:
    """A scripted game as tokens: each action is followed by the stop token; log-probs are unknown, so 0."""
    turns = []
    for observation, action, reward in zip(game.observations, game.actions, game.rewards, strict=True):
        action_ids = np.array([*encode(action), stop_token_id], np.int32)
        turns.append(
            Turn(np.array(encode(observation), np.int32), action_ids, np.zeros(action_ids.size, np.float32), reward, -1)
        )
    final = np.array(encode(game.final_observation), np.int32)
    return Trajectory(tuple(turns), final, game.terminated, game.truncated)


def clone(
    backbone: Backbone,
    games: Sequence[Trajectory],
    config: WarmStartConfig,
    seed: int,
    on_step: Callable[[int], object] = lambda step: None,
) -> dict[str, float]:
    """Train every weight of `backbone` to predict the games' tokens; returns the last metrics.

    Action tokens teach the player's habits; observation tokens, weighted by `observation_weight`,
    teach what the environment answers, which is what a critic on this trunk later needs to read.
    """
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
    ramp = max(1, config.steps // 20)

    def scale(step: int) -> float:
        if step < ramp:
            return (step + 1) / ramp
        progress = (step - ramp) / max(1, config.steps - ramp)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    rng = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    metrics: dict[str, float] = {}
    for step in range(config.steps):
        if order.size < config.batch_games:
            order = np.concatenate([order, rng.permutation(len(games))])
        chosen, order = order[: config.batch_games], order[config.batch_games :]
        batch = PackedBatch.from_arrays(pack_trajectories([games[i] for i in chosen]), backbone.device)
        hidden = backbone(batch.input_ids, batch.position_ids, backbone.layout(batch.cu_seqlens, batch.lengths))
        rows = (batch.position_ids > 0).nonzero().squeeze(1)  # every token with a predecessor
        targets = batch.input_ids[rows].long()
        logprobs = linear_logprobs(hidden, backbone.lm_head_weight, targets, rows=rows - 1).logprobs
        is_action = batch.action_mask[rows]
        action_loss = -logprobs[is_action].mean()
        observation_loss = -logprobs[~is_action].mean()
        loss = action_loss + config.observation_weight * observation_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step == config.steps - 1:
            metrics = {"action_loss": action_loss.item(), "observation_loss": observation_loss.item()}
        on_step(step)
    return metrics
