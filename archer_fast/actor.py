"""The token-level actor: log-probs of alternatives on a tree of games, and its loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from archer_fast.advantages import normalise
from archer_fast.backbone import Backbone
from archer_fast.batch import PackedBatch, TreeBatch
from archer_fast.losses import kl_penalty, reinforce_loss
from archer_fast.ops import linear_logprobs


class ActorLoss(NamedTuple):
    loss: Tensor  # [] what is minimised
    policy_loss: Tensor  # [] the REINFORCE part
    entropy: Tensor  # [] mean over scored tokens, nats
    observation_loss: Tensor  # [] mean -log p of the environment's tokens, nats


def actor_loss(
    backbone: Backbone,
    batch: PackedBatch,
    tree: TreeBatch,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    *,
    temperature: float,
    kl_coef: float,
    entropy_coef: float,
    observation_coef: float,
    normalise_advantages: bool,
) -> ActorLoss:
    """One forward pass of the actor over the tree, scored at the branches' tokens alone.

    advantages [num_branches] of each alternative; ref_logprobs [M] of their tokens under the start policy
    (None where kl_coef is 0). `observation_coef` weighs an auxiliary loss on the environment's tokens of the
    same pass: what the environment will answer is what Q(s, a) is about, and predicting it keeps the
    trunk able to tell actions apart where the policy has gone since the start.
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
        assert ref_logprobs is not None
        loss = loss + kl_coef * kl_penalty(scored.logprobs, ref_logprobs, tree.num_branches)
    if entropy_coef > 0:
        loss = loss - entropy_coef * scored.entropy.sum() / max(tree.num_branches, 1)
    predicted = hidden.new_zeros(())
    if observation_coef > 0:
        predicted = observation_loss(backbone, hidden, batch)
        loss = loss + observation_coef * predicted
    entropy = scored.entropy.detach().sum() / max(tree.rows.numel(), 1)
    return ActorLoss(loss, policy_loss.detach(), entropy, predicted.detach())


def observation_loss(backbone: Backbone, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Mean -log p of the environment's tokens, [] nats; hidden [>= T, H] begins with the batch's T states."""
    rows = batch.observation_rows
    targets = batch.input_ids[rows].long()
    logprobs = linear_logprobs(hidden, backbone.lm_head_weight, targets, rows=rows - 1).logprobs
    return -logprobs.sum() / max(rows.numel(), 1)
