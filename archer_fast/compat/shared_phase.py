"""The critic's epochs of `mode="shared"`: whatever they read of texts is read before the first of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from archer_fast.compat.critic_phase import backup, following_texts, metrics
from archer_fast.compat.transitions import Transitions


def critic_epochs(
    trainer: Any, draws: Sequence[Transitions], actions_of: Callable[[int], list[str]], ahead: bool, micro_batch: int
) -> Callable[[int], dict[str, Tensor]]:
    """`epoch(i)`: gradients of draw i, summed over micro-batches, by the formulas of `critic_phase.critic_epoch`.

    actions_of(i): a' ~ pi(.|s) of draw i; ahead: they may be asked for before the first epoch.
    """
    unwrap = trainer.agent.accelerator.unwrap_model
    critic, target = unwrap(trainer.agent.critic), unwrap(trainer.agent.target_critic)
    features = critic.features
    observations = [text for drawn in draws for text in drawn.observation]
    state, action = features.pairs(observations, [text for drawn in draws for text in drawn.action], keep=True)
    behind = features.states([text for drawn in draws for text in following_texts(drawn)])
    fresh = None
    if ahead:
        fresh = features.pairs(observations, [text for i in range(len(draws)) for text in actions_of(i)])[1]

    def epoch(i: int) -> dict[str, Tensor]:
        drawn, begin = draws[i], sum(other.num for other in draws[:i])
        rows = slice(begin, begin + drawn.num)
        s, a, following = _part(state, rows), _part(action, rows), _part(behind, rows)
        sampled = features.pairs(drawn.observation, actions_of(i))[1] if fresh is None else _part(fresh, rows)
        with torch.no_grad():
            target_q = list(target.heads.q_value(s, sampled))
            returns = [backup(trainer, drawn, v) for v in target.heads.value(following)]
        values = [*critic.heads.q_value(s, a), *critic.heads.value(s)]
        loss = sum(((v - w) ** 2).sum() for v, w in zip(values, (*returns, *target_q), strict=True)) / micro_batch
        trainer.agent.accelerator.backward(loss)
        return metrics([v.detach() for v in values], target_q, returns, micro_batch)

    return epoch


def _part(features: Any, rows: slice) -> Any:
    return type(features)(*(column[rows] for column in features))
