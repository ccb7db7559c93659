"""The token-level actor: the actions of one forward pass with what credits them, and the loss on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from archer_fast.attention import Layout
from archer_fast.backbone import Backbone
from archer_fast.batch import PackedBatch, TreeBatch
from archer_fast.config import PolicyLoss
from archer_fast.doubling_bins import bins_of
from archer_fast.ops import linear_policy_loss

TURN_BINS = 8  # of `doubling_bins`: turns 0, 1, 2 to 3, ..., 64 and later


class ScoredActions(NamedTuple):
    """T tokens of one forward pass, and the M of them that are scored: those of `num_actions` actions."""

    input_ids: Tensor  # [T] int32
    position_ids: Tensor  # [T] int32
    layout: Layout
    rows: Tensor  # [M] int64: the positions that predict the actions' tokens
    target_ids: Tensor  # [M] int64: those tokens
    rollout_logprobs: Tensor  # [M] of them under the policy that sampled
    ref_logprobs: Tensor | None  # [M] under the start policy; None where nothing asks for them
    advantages: Tensor  # [M] of each token's action, or of the token
    turn: Tensor  # [M] int64: index, in its game, of the turn that the token's action is of
    action_turn: Tensor  # [num_actions] int64: the same of each action

    @property
    def num_actions(self) -> int:
        return int(self.action_turn.shape[0])

    @classmethod
    def of_tree(
        cls, tree: TreeBatch, batch: PackedBatch, ref_logprobs: Tensor | None, advantages: Tensor
    ) -> ScoredActions:
        """The branches of a tree on `batch`; ref_logprobs [M], advantages [num_branches]."""
        action_turn = batch.turn[tree.turn_ids].long()
        return cls(
            tree.input_ids,
            tree.position_ids,
            tree.layout,
            tree.rows,
            tree.target_ids,
            tree.rollout_logprobs,
            ref_logprobs,
            advantages[tree.branch_ids],
            action_turn[tree.branch_ids],
            action_turn,
        )

    @classmethod
    def of_games(
        cls, batch: PackedBatch, layout: Layout, ref_logprobs: Tensor | None, advantages: Tensor
    ) -> ScoredActions:
        """The actions that were taken in whole games; ref_logprobs [A], advantages [A] of the batch's action tokens or
        [N] of its turns."""
        rows = batch.action_rows
        turn_ids = batch.turn_ids[rows].long()
        return cls(
            batch.input_ids,
            batch.position_ids,
            layout,
            rows - 1,
            batch.input_ids[rows].long(),
            batch.rollout_logprobs[rows],
            ref_logprobs,
            advantages if advantages.shape == rows.shape else advantages[turn_ids],
            batch.turn[turn_ids].long(),
            batch.turn.long(),
        )

    @classmethod
    def none(cls, backbone: Backbone) -> ScoredActions:
        """A pass over one token that scores nothing, all of whose gradients are 0: of a rank that has fewer passes than
        the others, where each must take as many."""
        device = backbone.device
        token = torch.zeros(1, dtype=torch.int32, device=device)
        ends = torch.tensor([0, 1], dtype=torch.int32, device=device)
        ids, values = torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, device=device)
        return cls(token, token, backbone.layout(ends, (1,)), ids, ids, values, values, values, ids, ids)

    def joined(self, taken: ScoredActions) -> ScoredActions:
        """These and the actions that were taken in the games which carry them, in one pass: this one's, whose tokens
        begin with those of `taken`."""
        refs = (self.ref_logprobs, taken.ref_logprobs)
        return self._replace(
            rows=torch.cat([self.rows, taken.rows]),
            target_ids=torch.cat([self.target_ids, taken.target_ids]),
            rollout_logprobs=torch.cat([self.rollout_logprobs, taken.rollout_logprobs]),
            ref_logprobs=None if refs[0] is None or refs[1] is None else torch.cat([refs[0], refs[1]]),
            advantages=torch.cat([self.advantages, taken.advantages]),
            turn=torch.cat([self.turn, taken.turn]),
            action_turn=torch.cat([self.action_turn, taken.action_turn]),
        )


class ActorLoss(NamedTuple):
    loss: Tensor  # [] what is minimised
    policy_loss: Tensor  # [] without its KL and entropy terms
    entropy: Tensor  # [] mean over scored tokens, nats
    clip_fraction: Tensor  # [] of the scored tokens, whose ratio to the policy that sampled is outside the clip
    moved: Tensor  # [] KL(policy that sampled || this one), nats an action
    moved_by_turn: Tensor  # [2, TURN_BINS] by the turn of the action: the sum of that KL, nats, and the actions


def actor_loss(
    backbone: Backbone,
    scored: ScoredActions,
    *,
    temperature: float,
    kind: PolicyLoss = "reinforce",
    clip: float = 0.2,
    awr_beta: float = 1.0,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    num_actions: int | None = None,
) -> ActorLoss:
    """One forward pass of the actor, scored at the actions' tokens alone.

    num_actions: what the sums over tokens are divided by; None: this pass's own. ref_logprobs are read where
    kl_coef is above 0.
    """
    hidden = backbone(scored.input_ids, scored.position_ids, scored.layout)
    backbone.counts.of(hidden).rows += scored.rows.numel()
    out = linear_policy_loss(
        hidden,
        backbone.lm_head_weight,
        scored.target_ids,
        scored.advantages,
        rows=scored.rows,
        kind=kind,
        rollout_logprobs=scored.rollout_logprobs,
        ref_logprobs=scored.ref_logprobs if kl_coef > 0 else None,
        clip_low=clip,
        clip_high=clip,
        awr_beta=awr_beta,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        num_actions=max(scored.num_actions, 1) if num_actions is None else num_actions,
        temperature=temperature,
    )
    assert out.metrics.clip_fraction is not None and out.metrics.approx_kl is not None
    num_tokens = max(scored.rows.numel(), 1)
    moved = out.metrics.approx_kl * (num_tokens / max(scored.num_actions, 1))
    return ActorLoss(
        out.loss,
        out.metrics.policy_loss,
        out.entropy.sum() / num_tokens,
        out.metrics.clip_fraction,
        moved,
        _moved_by_turn(scored, out.logprobs),
    )


@torch.no_grad()
def _moved_by_turn(scored: ScoredActions, logprobs: Tensor) -> Tensor:
    """[2, TURN_BINS] of `ActorLoss`, by the estimator of `ops.PolicyMetrics.approx_kl`."""
    log_ratio = logprobs - scored.rollout_logprobs
    by_turn = logprobs.new_zeros(2, TURN_BINS)
    by_turn[0].index_add_(0, bins_of(scored.turn, TURN_BINS), log_ratio.exp() - 1 - log_ratio)
    ones = by_turn.new_ones(scored.num_actions)
    by_turn[1].index_add_(0, bins_of(scored.action_turn, TURN_BINS), ones)
    return by_turn


def accumulated_actor_loss(
    backbone: Backbone,
    passes: Sequence[ScoredActions],
    *,
    kind: PolicyLoss = "reinforce",
    totals: tuple[int, int] | None = None,
    **coefficients: float,
) -> ActorLoss:
    """`actor_loss` of all passes as if they were one, with the activations of one at a time.

    The gradient is taken here, pass by pass; `loss.backward()` hands it out.
    totals: actions and scored tokens of the whole step, where these passes are a share of it; every number is the
    share's part of the whole then. coefficients: temperature, kl_coef, entropy_coef, clip, awr_beta.
    """
    num_actions, num_tokens = (max(total, 1) for total in totals or count_scored(passes))
    device = backbone.lm_head_weight.device
    policy_losses, means = [torch.zeros((), device=device)], [torch.zeros(3, device=device)]
    by_turn = [torch.zeros(2, TURN_BINS, device=device)]

    def losses() -> Iterator[Tensor]:
        for scored in passes:
            out = actor_loss(backbone, scored, kind=kind, num_actions=num_actions, **coefficients)
            if scored.rows.numel() == 0:  # of a rank that keeps the others company: nothing to tell
                yield out.loss
                continue
            policy_losses.append(out.policy_loss)
            of_tokens, of_actions = scored.rows.numel() / num_tokens, scored.num_actions / num_actions
            means.append(torch.stack([out.entropy * of_tokens, out.clip_fraction * of_tokens, out.moved * of_actions]))
            by_turn.append(out.moved_by_turn)
            yield out.loss

    trained = [p for p in backbone.parameters() if p.requires_grad]  # before a pass, in which they may be others
    loss = accumulate(losses(), trained, by_backward=backbone.sharding is not None)
    entropy, clip_fraction, moved = torch.stack(means).sum(0)
    policy_loss = torch.stack(policy_losses).sum()
    return ActorLoss(loss, policy_loss, entropy, clip_fraction, moved, torch.stack(by_turn).sum(0))


def count_scored(passes: Sequence[ScoredActions]) -> tuple[int, int]:
    """The actions of these passes, and their tokens."""
    return sum(scored.num_actions for scored in passes), sum(scored.rows.numel() for scored in passes)


def accumulate(losses: Iterator[Tensor], parameters: Sequence[Tensor], *, by_backward: bool = False) -> Tensor:
    """The sum of the losses, each differentiated and forgotten before the next is asked for.

    by_backward: through the parameters' `grad`, which is cleared: a sharded model gives its gradients nowhere else.
    """
    return cast(Tensor, cast(Any, _Accumulate).apply(losses, by_backward, *parameters))


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Iterator[Tensor], by_backward: bool, *parameters: Tensor) -> Tensor:
        total = torch.zeros((), device=parameters[0].device)
        gradients: list[Tensor | None] = [None] * len(parameters)
        if by_backward:
            _forget(parameters)
        with torch.enable_grad():
            for loss in losses:
                if by_backward:
                    loss.backward()
                    total = total + loss.detach()
                    continue
                found = list(torch.autograd.grad(loss, parameters, allow_unused=True))
                total = total + loss.detach()
                # One by one, so that there are never three gradients of all weights; not in place: two parameters may
                # share one tensor of gradient.
                while found:
                    new, old = found.pop(), gradients[len(found)]
                    gradients[len(found)] = old if new is None else new if old is None else old + new
                    del new, old
        ctx.gradients = gradients
        if by_backward:
            ctx.gradients = [p.grad for p in parameters]
            _forget(parameters)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if g is None else g * grad_loss for g in gradients)


def _forget(parameters: Sequence[Tensor]) -> None:
    for p in parameters:
        p.grad = None
