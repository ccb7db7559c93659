"""The actor's side of the original's update: an epoch of micro-batches as one sum, and one micro-batch plainly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from archer_fast.compat.generation import prompts_of, scored_actions
from archer_fast.compat.micro_metrics import mean_of, statistics
from archer_fast.compat.policy import policy_of
from archer_fast.compat.transitions import Transitions


@torch.no_grad()
def advantages_of(agent: Any, observations: Sequence[str], actions: Sequence[str]) -> Tensor:
    """min(Q1, Q2) - min(V1, V2) [n] of the online critic."""
    q1, q2, v1, v2 = agent.critic(list(observations), list(actions))
    return (torch.minimum(q1, q2) - torch.minimum(v1, v2)).flatten()


def actor_epoch(
    trainer: Any, drawn: Transitions, pi_actions: Sequence[str], advantages: Tensor, micro_batch: int
) -> dict[str, Any]:
    """Gradients of sum over micro-batches of -mean_b( A_b log pi(a_b | s_b) ), in packed passes; advantages [n]."""
    agent, parts = trainer.agent, drawn.micro_batches(micro_batch)
    sizes = torch.tensor([part.stop - part.start for part in parts])
    share = torch.repeat_interleave(1 / sizes, sizes).to(advantages.device)
    logprobs = policy_of(agent).policy_gradient(
        agent, prompts_of(agent, drawn.observation), scored_actions(agent, pi_actions), advantages * share,
        agent.accelerator.backward,
    )  # fmt: skip
    rows = [_metrics(-(logprobs[part] * advantages[part]).mean(), advantages[part]) for part in parts]
    return mean_of(rows)


def actor_loss_plain(
    trainer: Any, observation: Sequence[str], pi_action: Sequence[str], advantage: Tensor
) -> dict[str, Any]:
    """One micro-batch by whatever `get_log_prob` the agent has: `actor_epoch`'s plain twin.

    An agent whose model has values gives (values [n, A, 1], log-probs [n, A], mask [n, A]); then the advantage less the
    value credits a token, and the values are fitted to the advantage.
    """
    agent = trainer.agent
    like = next(agent.model.parameters())
    advantage = torch.as_tensor(advantage).to(like.device, like.dtype)
    scored = agent.get_log_prob(list(observation), list(pi_action))
    if isinstance(scored, tuple):
        values, logprobs, mask = scored[0].squeeze(-1), scored[1], scored[2]
        advantage = advantage.reshape(-1, 1).expand(values.shape)
        value_loss = (((advantage - values) * mask) ** 2).mean()
        residual = (advantage - values).detach()
        policy_loss = -(residual * logprobs * mask).sum(1).mean()
        agent.accelerator.backward(policy_loss + value_loss)
        return _metrics(
            policy_loss.detach(),
            advantage.flatten(),
            value_loss.detach(),
            values.detach().flatten(),
            residual.flatten(),
        )
    policy_loss = -(scored.flatten() * advantage.flatten()).mean()
    agent.accelerator.backward(policy_loss)
    return _metrics(policy_loss.detach(), advantage.flatten())


def _metrics(
    policy_loss: Tensor, advantage: Tensor, value_loss: Tensor | None = None, values: Tensor | None = None,
    residual: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Of one micro-batch; what only a model with values has is 0 elsewhere, as the original has it."""
    nothing = torch.zeros_like(advantage)
    return {
        "pg.loss": float(policy_loss),
        "values.loss": 0.0 if value_loss is None else float(value_loss),
        **statistics("values", (nothing if values is None else values)[None]),
        **statistics("advantages", advantage[None]),
        **statistics("residual_advantages", (nothing if residual is None else residual)[None]),
    }
