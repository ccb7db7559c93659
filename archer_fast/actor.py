"""The token-level actor: its loss on trees of games and alternatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from archer_fast.advantages import normalise
from archer_fast.backbone import Backbone
from archer_fast.batch import TreeBatch
from archer_fast.ops import linear_policy_loss


class ActorLoss(NamedTuple):
    loss: Tensor  # [] what is minimised
    policy_loss: Tensor  # [] the REINFORCE part
    entropy: Tensor  # [] mean over scored tokens, nats


class ScoredTree(NamedTuple):
    """A tree and what its branches are worth."""

    tree: TreeBatch
    advantages: Tensor  # [num_branches] of each alternative
    ref_logprobs: Tensor  # [M] of their tokens under the start policy; not read where kl_coef is 0


def actor_loss(
    backbone: Backbone,
    tree: TreeBatch,
    advantages: Tensor,
    ref_logprobs: Tensor,
    *,
    temperature: float,
    kl_coef: float,
    entropy_coef: float,
    normalise_advantages: bool,
    num_actions: int | None = None,
) -> ActorLoss:
    """One forward pass of the actor over the tree, scored at the branches' tokens alone.

    advantages [num_branches] of each alternative; ref_logprobs [M] of their tokens under the start policy
    (not read where kl_coef is 0); num_actions: what the sums over tokens are divided by, None for this tree's branches.
    """
    if normalise_advantages:
        advantages = normalise(advantages)
    hidden = backbone(tree.input_ids, tree.position_ids, tree.layout)
    out = linear_policy_loss(
        hidden,
        backbone.lm_head_weight,
        tree.target_ids,
        advantages[tree.branch_ids],
        rows=tree.rows,
        ref_logprobs=ref_logprobs if kl_coef > 0 else None,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        num_actions=max(tree.num_branches, 1) if num_actions is None else num_actions,
        temperature=temperature,
    )
    return ActorLoss(out.loss, out.metrics.policy_loss, out.entropy.sum() / max(tree.rows.numel(), 1))


def accumulated_actor_loss(
    backbone: Backbone, trees: Sequence[ScoredTree], *, normalise_advantages: bool, **coefficients: float
) -> ActorLoss:
    """`actor_loss` of all trees as if they were one, with the activations of one at a time.

    The gradient is taken here, tree by tree; `loss.backward()` hands it out.
    coefficients: temperature, kl_coef, entropy_coef.
    """
    advantages = torch.cat([scored.advantages for scored in trees])
    if normalise_advantages:
        advantages = normalise(advantages)
    num_actions, num_tokens = max(advantages.numel(), 1), max(sum(s.tree.rows.numel() for s in trees), 1)
    policy_losses, entropies = [], []

    def losses() -> Iterator[Tensor]:
        for scored, own in zip(trees, advantages.split([s.tree.num_branches for s in trees]), strict=True):
            out = actor_loss(
                backbone,
                scored.tree,
                own,
                scored.ref_logprobs,
                normalise_advantages=False,
                num_actions=num_actions,
                **coefficients,
            )
            policy_losses.append(out.policy_loss)
            entropies.append(out.entropy * (scored.tree.rows.numel() / num_tokens))
            yield out.loss

    loss = accumulate(losses(), [p for p in backbone.parameters() if p.requires_grad])
    return ActorLoss(loss, torch.stack(policy_losses).sum(), torch.stack(entropies).sum())


def accumulate(losses: Iterator[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """The sum of the losses, each differentiated and forgotten before the next is asked for."""
    total: Tensor = _Accumulate.apply(losses, *parameters)  # type: ignore[no-untyped-call]
    return total


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Iterator[Tensor], *parameters: Tensor) -> Tensor:
        total = torch.zeros((), device=parameters[0].device)
        gradients: list[Tensor | None] = [None] * len(parameters)
        with torch.enable_grad():
            for loss in losses:
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
                # Not in place: two parameters may share one tensor of gradient.
                gradients = [
                    a if b is None else b if a is None else a + b for a, b in zip(gradients, found, strict=True)
                ]
                total = total + loss.detach()
        ctx.gradients = gradients
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(None if g is None else g * grad_loss for g in gradients)
