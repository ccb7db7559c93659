"""The original's update in few large passes instead of thousands of small ones.

What is reordered is what the numbers do not depend on: the policy rests while the critic is trained, so all a' ~ pi of
that phase are drawn at once (the same distribution); the gradients of micro-batches are summed, so an epoch is one sum;
equal texts are read once a set of weights. A method that a fork has overridden is called as the original calls it.
With `mode="shared"` the critic is another one, and reads everything before its first epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from archer_fast.compat import shared_phase
from archer_fast.compat.actor_phase import actor_epoch, advantages_of
from archer_fast.compat.critic_phase import critic_epoch
from archer_fast.compat.generation import can_pack, finish_action, fixes_of, prompts_of, sample_texts
from archer_fast.compat.micro_metrics import mean_of
from archer_fast.compat.models.chai_agent import choose_candidates, sample_candidates
from archer_fast.compat.models.shared_critic import is_shared
from archer_fast.compat.overrides import is_ours, mark_of
from archer_fast.compat.policy import autocast_of
from archer_fast.compat.transitions import Transitions, check_size, draw


def update(trainer: Any, replay_buffer: Any, no_update_actor: bool = False) -> dict[str, Any]:
    """`epochs` critic steps and then `actor_epochs` actor steps; the original's metrics."""
    check_size(replay_buffer)
    _check_optimizer(trainer)
    trainer.step = getattr(trainer, "step", 0) + 1
    info = _critic_phase(trainer, replay_buffer)
    return info if no_update_actor else info | _actor_phase(trainer, replay_buffer)


def _check_optimizer(trainer: Any) -> None:
    """ValueError where the trainer was made before its agent's critic was exchanged: nothing would move the new one."""
    stepped = {id(p) for group in trainer.critic_optimizer.param_groups for p in group["params"]}
    if is_shared(trainer.agent) and not any(id(p) in stepped for p in trainer.agent.critic.parameters()):
        raise ValueError(
            'critic_optimizer: wanted one of the critic of mode="shared", got one of the critic that it replaced; make '
            "the trainer after the agent is shared, or hand the trainer itself to accelerate"
        )


def _critic_phase(trainer: Any, replay_buffer: Any) -> dict[str, Any]:
    agent, size, rows = trainer.agent, replay_buffer.batch_size, []
    draws = [draw(replay_buffer, trainer.grad_accum_steps * size) for _ in range(trainer.epochs)]
    whole_epoch = _critic_epochs(trainer, draws, size)
    for i, drawn in enumerate(draws):
        trainer.critic_optimizer.zero_grad()
        if whole_epoch is not None:
            rows.append(whole_epoch(i))
        else:
            rows += [trainer.critic_loss(**drawn.part(part)) for part in drawn.micro_batches(size)]
        _step(trainer, trainer.critic_optimizer, agent.critic)
        agent.soft_update_target_critic(tau=trainer.tau)
    return {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in mean_of(rows).items()}


def _critic_epochs(
    trainer: Any, draws: Sequence[Transitions], size: int
) -> Callable[[int], dict[str, torch.Tensor]] | None:
    """`epoch(i)` on draw i; None where micro-batches go through a fork's own loss or critic."""
    agent = trainer.agent
    if not (draws and is_ours(trainer, "critic_loss") and _has_our_critic(agent)):
        return None
    actions_of = _ask_ahead(agent, draws, size)
    if is_shared(agent):
        return shared_phase.critic_epochs(trainer, draws, actions_of, _knows_ahead(agent), size)
    return lambda i: critic_epoch(trainer, draws[i], actions_of(i), size)


def _actor_phase(trainer: Any, replay_buffer: Any) -> dict[str, Any]:
    agent, rows = trainer.agent, []
    size = 2 if "mistral" in agent.policy_lm else replay_buffer.batch_size
    whole = is_ours(trainer, "actor_loss") and is_ours(agent, "get_log_prob")
    for _ in range(trainer.actor_epochs):
        drawn = draw(replay_buffer, trainer.grad_accum_steps * replay_buffer.batch_size)
        trainer.lm_optimizer.zero_grad()
        actions = _ask_ahead(agent, [drawn], size)(0)
        parts = drawn.micro_batches(size)
        if _has_our_critic(agent):
            with autocast_of(agent):
                advantages = advantages_of(agent, drawn.observation, actions)
        else:
            advantages = torch.cat([advantages_of(agent, drawn.observation[p], actions[p]) for p in parts])
        if whole and can_pack(agent, "score"):
            rows.append(actor_epoch(trainer, drawn, actions, advantages, size))
        else:
            batches = [(drawn.part(part), actions[part], advantages[part]) for part in parts]
            rows += [trainer.actor_loss(**batch, pi_action=own, advantage=a) for batch, own, a in batches]
        _step(trainer, trainer.lm_optimizer, agent.model)
    return {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in mean_of(rows).items()}


def _ask_ahead(agent: Any, draws: Sequence[Transitions], micro_batch: int) -> Callable[[int], list[str]]:
    """Actions a' ~ pi(.|s) of each draw, all sampled now where the agent's get_action allows it.

    CHAI's candidates are sampled now and chosen when they are asked for, by the target critic as it is then. A
    get_action of a fork is called when its draw is asked for, a micro-batch at a time.
    """
    if not _knows_ahead(agent) and not _is_chai(agent):
        return lambda i: [
            action
            for part in draws[i].micro_batches(micro_batch)
            for action in agent.get_action(list(draws[i].observation[part]))
        ]
    observations = [text for drawn in draws for text in drawn.observation]
    starts = [sum(drawn.num for drawn in draws[:i]) for i in range(len(draws) + 1)]
    if _is_chai(agent):
        candidates = sample_candidates(agent, observations)
        return lambda i: choose_candidates(
            agent, draws[i].observation, [row[starts[i] : starts[i + 1]] for row in candidates]
        )
    actions = [finish_action(agent, text) for text in sample_texts(agent, prompts_of(agent, observations))]
    return lambda i: actions[starts[i] : starts[i + 1]]


def _knows_ahead(agent: Any) -> bool:
    """Whether a' may be sampled before the critic moves; behind padding the batch matters."""
    return mark_of(agent, "get_action") == "ArcherAgent.get_action" and "padding" in fixes_of(agent)


def _is_chai(agent: Any) -> bool:
    return mark_of(agent, "get_action") == "CHAIAgent.get_action" and "padding" in fixes_of(agent)


def _has_our_critic(agent: Any) -> bool:
    return all(is_ours(agent.accelerator.unwrap_model(c), "forward") for c in (agent.critic, agent.target_critic))


def _step(trainer: Any, optimizer: Any, network: Any) -> None:
    """Clip and step; clipping spans the agent, stale gradients of the network that rests included, unless mended."""
    mended = fixes_of(trainer)
    if is_shared(trainer.agent):  # else the norm of a whole language model, at each step of a few small heads
        mended |= {"clip"}
    if "sum" in mended:
        for p in network.parameters():
            if p.grad is not None:
                p.grad.div_(trainer.grad_accum_steps)
    clipped = network if "clip" in mended else trainer.agent
    trainer.accelerator.clip_grad_norm_(clipped.parameters(), trainer.max_grad_norm)
    optimizer.step()
