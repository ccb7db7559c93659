"""The token-level actor: log-probs of alternatives on a tree of games, and its loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from archer_fast.advantages import normalise
from archer_fast.backbone import Backbone
from archer_fast.batch import TreeBatch
from archer_fast.losses import kl_penalty, reinforce_loss
from archer_fast.ops import linear_logprobs


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
    scored = linear_logprobs(
        hidden, backbone.lm_head_weight, tree.target_ids, rows=tree.rows, temperature=temperature, return_entropy=True
    )
    assert scored.entropy is not None
    policy_loss = reinforce_loss(scored.logprobs, advantages[tree.branch_ids], tree.num_branches)
    loss = policy_loss
    if kl_coef > 0:
        loss = loss + kl_coef * kl_penalty(scored.logprobs, ref_logprobs, tree.num_branches)
    if entropy_coef > 0:
        loss = loss - entropy_coef * scored.entropy.sum() / max(tree.num_branches, 1)
    entropy = scored.entropy.detach().sum() / max(tree.rows.numel(), 1)
    return ActorLoss(loss, policy_loss.detach(), entropy)
