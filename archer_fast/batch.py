"""Packed batches as tensors: the one door from NumPy to torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from archer_fast.attention import PackedLayout, TreeLayout, branch_grids

if TYPE_CHECKING:
    from archer_fast.packing import PackedArrays


@dataclass(slots=True, eq=False)
class PackedBatch:
    """B trajectories of N turns in all, laid end to end in T tokens; `packing.PackedArrays` as tensors.

    One game of two turns, "Q: | a ? . | yes | b . | no", has T=8, N=2, B=1:
        input_ids       [Q:, a, ?, ., yes, b, ., no]   action_mask  [0, 1, 1, 1, 0, 1, 1, 0]
        turn_ids        [0, 0, 0, 0, 1, 1, 1, 1]       position_ids [0 .. 7]
        state_positions [0, 4] (last token before the action)   action_positions [3, 6] (its stop token)
        final_positions [7]    (the state that a truncated game bootstraps from)
    """

    input_ids: Tensor  # [T] int32
    position_ids: Tensor  # [T] int32
    cu_seqlens: Tensor  # [B+1] int32
    turn_ids: Tensor  # [T] int32, index of the token's turn in this batch
    action_mask: Tensor  # [T] bool
    cu_turns: Tensor  # [B+1] int32
    state_positions: Tensor  # [N] int64
    action_positions: Tensor  # [N] int64
    final_positions: Tensor  # [B] int64
    turn: Tensor  # [N] int32, index of the turn in its trajectory
    rewards: Tensor  # [N] float32
    returns: Tensor  # [N] float32, Monte-Carlo
    policy_versions: Tensor  # [N] int64
    terminated: Tensor  # [B] bool
    truncated: Tensor  # [B] bool
    rollout_logprobs: Tensor  # [T] float32, 0 off the actions
    lengths: tuple[int, ...]  # tokens of each trajectory, on the host
    num_turns: tuple[int, ...]  # turns of each trajectory, on the host

    @classmethod
    def from_arrays(cls, arrays: PackedArrays, device: torch.device | str = "cpu") -> PackedBatch:
        tensors = {
            f.name: torch.from_numpy(getattr(arrays, f.name)).to(device, non_blocking=True)
            for f in fields(cls)
            if f.name not in ("lengths", "num_turns")
        }
        lengths = tuple((arrays.cu_seqlens[1:] - arrays.cu_seqlens[:-1]).tolist())
        num_turns = tuple((arrays.cu_turns[1:] - arrays.cu_turns[:-1]).tolist())
        return cls(**tensors, lengths=lengths, num_turns=num_turns)

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def action_rows(self) -> Tensor:
        """[A] int64: the positions t whose token was sampled."""
        return self.action_mask.nonzero().squeeze(1)

    @property
    def trajectory(self) -> Tensor:
        """[N] int64: the trajectory each turn belongs to."""
        counts = (self.cu_turns[1:] - self.cu_turns[:-1]).long()
        return torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)

    @property
    def is_last(self) -> Tensor:
        """[N] bool: the trajectory's last turn."""
        last = torch.zeros_like(self.turn, dtype=torch.bool)
        last[self.cu_turns[1:].long() - 1] = True
        return last


@dataclass(slots=True, eq=False)
class Alternatives:
    """Fresh actions at some turns of a packed batch: R branches a game, of at most W tokens each.

    Two alternatives "a ." and "b c ." at turn 0 of one game: action_ids=[[[a, ., .], [b, c, .]]],
    lengths=[[2, 3]], turn_ids=[[0, 0]]. Rows a game does not use have length 0 and turn_ids -1.
    """

    action_ids: Tensor  # [B, R, W] int32, the stop token included, padded behind
    logprobs: Tensor  # [B, R, W] float32 under the sampler, 0 behind the end
    lengths: Tensor  # [B, R] int64
    turn_ids: Tensor  # [B, R] int64, index of the turn in the batch

    @property
    def used(self) -> Tensor:
        """[B, R] bool: rows that carry an action."""
        return self.lengths > 0


def prefix_of(batch: PackedBatch, state_position: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Where each game's tokens lie in T, and which of them each branch may see.

    state_position [B, R] int64 (place of the branch's state token in its game), used [B, R] bool ->
    index [B, L] int64 (clamped to the game's last token), mask [B, R, L] bool. An unused row sees
    the first token alone: its numbers are finite, and nobody reads them.
    """
    cu = batch.cu_seqlens.long()
    column = torch.arange(max(batch.lengths), device=cu.device)
    index = torch.minimum(cu[:-1, None] + column, cu[1:, None] - 1)
    return index, column <= torch.where(used, state_position, 0)[..., None]


@dataclass(slots=True, eq=False)
class TreeBatch:
    """A packed batch whose games carry alternatives: every token once, every state and action readable.

    Tokens are the batch's T, then the M of the alternatives, branch after branch. `layout` isolates them.
    """

    input_ids: Tensor  # [T + M] int32
    position_ids: Tensor  # [T + M] int32
    layout: TreeLayout
    rows: Tensor  # [M] int64: the positions that predict an alternative's tokens, branch after branch
    target_ids: Tensor  # [M] int64: those tokens
    branch_ids: Tensor  # [M] int64: the branch (0..num_branches-1) each belongs to
    rollout_logprobs: Tensor  # [M] float32 under the sampler
    state_positions: Tensor  # [num_branches] int64: where the branch's V(s) is read
    action_positions: Tensor  # [num_branches] int64: the branch's last token, where Q(s, a) is read
    turn_ids: Tensor  # [num_branches] int64: the turn of the batch it answers

    @property
    def num_branches(self) -> int:
        return int(self.turn_ids.shape[0])


def plant_tree(batch: PackedBatch, alternatives: Alternatives, trunk: PackedLayout) -> TreeBatch:
    """Join a packed batch and its alternatives into one forward pass over `trunk`'s layout and branches."""
    games, rows, width = alternatives.action_ids.shape
    used = alternatives.used
    state = batch.state_positions[alternatives.turn_ids.clamp(min=0)]  # [B, R] in T
    state_in_game = batch.position_ids[state].long()
    index, mask = prefix_of(batch, state_in_game, used)
    column = torch.arange(width, device=state.device)
    real = column < alternatives.lengths[..., None]  # [B, R, W]
    token = batch.num_tokens - 1 + real.flatten().cumsum(0).view(games, rows, width)  # place in T + M, where real
    # The state token predicts a branch's first token; each branch token predicts the next.
    predicting = torch.cat([state[..., None], token[..., :-1]], -1)
    branch = (used.flatten().cumsum(0) - 1).view(games, rows, 1).expand(games, rows, width)
    last = token.gather(2, (alternatives.lengths - 1).clamp(min=0)[..., None]).squeeze(2)
    positions = (state_in_game[..., None] + 1 + column).int()
    return TreeBatch(
        input_ids=torch.cat([batch.input_ids, alternatives.action_ids[real]]),
        position_ids=torch.cat([batch.position_ids, positions[real]]),
        layout=TreeLayout(trunk, index, branch_grids(alternatives.lengths, mask)),
        rows=predicting[real],
        target_ids=alternatives.action_ids[real].long(),
        branch_ids=branch[real],
        rollout_logprobs=alternatives.logprobs[real],
        state_positions=state[used],
        action_positions=last[used],
        turn_ids=alternatives.turn_ids[used],
    )


def repeated_actions(batch: PackedBatch) -> Tensor:
    """[N] float32: 1 where an action is, token by token, an earlier one of its game."""
    return _said_before(batch, _digests(batch), torch.arange(batch.turn.shape[0], device=batch.turn.device))


def repeated_branches(batch: PackedBatch, tree: TreeBatch) -> Tensor:
    """[num_branches] float32: 1 where an alternative is, token by token, an action of its game before its turn."""
    place = _place_in_run(tree.branch_ids)
    digests = _digest(tree.target_ids, place, tree.branch_ids, tree.num_branches)
    return _said_before(batch, digests, tree.turn_ids, _digests(batch))


def _said_before(batch: PackedBatch, digests: Tensor, turn_ids: Tensor, of_turns: Tensor | None = None) -> Tensor:
    """Whether the game of turn_ids[i] holds an action with digests[i] before that turn."""
    of_turns = digests if of_turns is None else of_turns
    turn = batch.turn[turn_ids].long()
    column = torch.arange(max(batch.num_turns), device=turn.device)
    earlier = (turn_ids - turn)[:, None] + column  # a game's turns lie end to end
    same = of_turns[earlier.clamp(max=of_turns.shape[0] - 1)] == digests[:, None]
    return (same & (column < turn[:, None])).any(1).float()


def _digests(batch: PackedBatch) -> Tensor:
    """[N] int64 of the tokens of each turn's action."""
    rows = batch.action_rows
    turn_ids = batch.turn_ids[rows].long()
    return _digest(batch.input_ids[rows].long(), _place_in_run(turn_ids), turn_ids, batch.turn.shape[0])


def _place_in_run(ids: Tensor) -> Tensor:
    """How many equal ids stand just before: [4 4 4 7 7] -> [0 1 2 0 1]."""
    index = torch.arange(ids.shape[0], device=ids.device)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[1:] = ids[1:] != ids[:-1]
    return index - torch.where(starts, index, 0).cummax(0).values if ids.numel() else index


def _digest(tokens: Tensor, place: Tensor, owner: Tensor, num_owners: int) -> Tensor:
    """[num_owners] int64, equal for equal sequences and else different but for one in 2^60 or so.

    A token and its place are mixed (the finaliser of SplitMix64, Steele et al. 2014, with int64's wrap-around), summed.
    """
    mixed = tokens * -7046029254386353131 + (place + 1) * -4658895280553007687
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return torch.zeros(num_owners, dtype=torch.int64, device=tokens.device).index_add_(0, owner, mixed ^ (mixed >> 31))
