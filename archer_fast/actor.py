"""The token-level actor: its loss on a tree of games and alternatives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from archer_fast.advantages import normalise
from archer_fast.backbone import Backbone
from archer_fast.batch import TreeBatch
from archer_fast.ops import linear_policy_loss


class ActorLoss(NamedTuple):
    loss: Tensor  # [] what is minimised
    policy_loss: Tensor  # [] the REINFORCE part
    entropy: Tensor  # [] mean over scored tokens, nats


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
) -> ActorLoss:
    """One forward pass of the actor over the tree, scored at the branches' tokens alone.

    advantages [num_branches] of each alternative; ref_logprobs [M] of their tokens under the start policy
    (not read where kl_coef is 0).
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
        num_actions=max(tree.num_branches, 1),
        temperature=temperature,
    )
    return ActorLoss(out.loss, out.metrics.policy_loss, out.entropy.sum() / max(tree.rows.numel(), 1))
