"""The turn-level double critic: Q1, Q2, V1, V2 read from a trunk at the ends of observations and actions."""

from __future__ import annotations

import copy
from contextlib import ExitStack, nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archer_fast.adapted_backbone import AdaptedBackbone
from archer_fast.backbone import Backbone
from archer_fast.batch import PackedBatch, TreeBatch, repeated_actions, repeated_branches
from archer_fast.config import CriticConfig, LoRAConfig
from archer_fast.ops import linear_logprobs, polyak_
from archer_fast.ranks import Ranks
from archer_fast.sharding import local

TURN_BUCKETS = 64  # turn indices the heads tell apart; later turns share the last


class StateFeatures(NamedTuple):
    """What V(s) reads of n states."""

    hidden: Tensor  # [n, H] trunk state at the observation's last token
    turn: Tensor  # [n] int64, index of the turn: known to the critic, so that it need not spend capacity on it


class ActionFeatures(NamedTuple):
    """What Q(s, a) reads of n actions beside the state."""

    hidden: Tensor  # [n, H] trunk state at the action's last token
    logprob: Tensor  # [n] log p(action) under the trunk's own policy: the language model's belief in it
    repeated: Tensor  # [n] float32, 1 where the same tokens were an earlier action of the game, else 0

    def at(self, rows: np.ndarray) -> ActionFeatures:
        """Those of some of the actions."""
        index = torch.from_numpy(rows).to(self.hidden.device)
        return ActionFeatures(*(one[index] for one in self))


class GameFeatures(NamedTuple):
    """Everything the critic reads of a packed batch, from one pass of its trunk."""

    state: StateFeatures  # [N]
    action: ActionFeatures  # [N]
    final: StateFeatures  # [B], the state after the last action
    token_logprobs: Tensor  # [A] of the action tokens under the trunk's own policy


class TreeFeatures(NamedTuple):
    """Everything the critic reads of a tree, from one pass of its trunk."""

    state: StateFeatures  # [num_branches]
    action: ActionFeatures  # [num_branches]
    token_logprobs: Tensor  # [M] of the branches' tokens under the trunk's own policy
    taken: GameFeatures | None  # of the games that carry the branches, where asked for


class PairedMLP(nn.Module):
    """Two independent MLPs with two hidden layers, run as one batched product: x [n, in] -> [2, n]."""

    def __init__(self, in_features: int, hidden_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        sizes = [(in_features, hidden_size), (hidden_size, hidden_size), (hidden_size, 1)]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, fan_out in sizes:
            bound = fan_in**-0.5
            self.weights.append((torch.rand(2, fan_in, fan_out, generator=generator) * 2 - 1) * bound)
            self.biases.append(torch.zeros(2, 1, fan_out))
        self.flops = 0  # of all passes so far, with their backward

    def forward(self, x: Tensor) -> Tensor:
        h = x.expand(2, *x.shape)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            gradients = weight.requires_grad + h.requires_grad
            h = torch.baddbmm(bias, h, weight)
            self.flops += (1 + h.requires_grad * gradients) * 2 * x.shape[0] * weight.numel()
            if i < len(self.weights) - 1:
                h = F.gelu(h)
        return h.squeeze(-1)


class StateValue(nn.Module):
    """V1, V2 on state features: the hidden state normalised to unit variance, and an embedding of the turn's index."""

    def __init__(
        self, trunk_size: int, hidden_size: int, generator: torch.Generator | None = None, *, reads_turn: bool = True
    ) -> None:
        super().__init__()
        self.reads_turn = reads_turn
        self.turn_embedding = nn.Parameter(torch.randn(TURN_BUCKETS, 16, generator=generator) * 0.5)
        self.size = trunk_size + self.turn_embedding.shape[1]  # of `embed`
        self.mlp = PairedMLP(self.size, hidden_size, generator)

    def embed(self, state: StateFeatures) -> Tensor:
        """[n, size]"""
        turn = self.turn_embedding[state.turn.clamp(max=TURN_BUCKETS - 1)]
        return torch.cat([_unit(state.hidden), turn if self.reads_turn else torch.zeros_like(turn)], -1)

    def forward(self, state: StateFeatures) -> Tensor:
        """V1, V2: [2, n]."""
        out: Tensor = self.mlp(self.embed(state))
        return out


class ValueHeads(nn.Module):
    """Q1, Q2 on (state, action) features and V1, V2 on state features.

    Q reads what V reads, the action's hidden state likewise, and two numbers: the action's reference log-prob, and
    whether it was taken before in this game, which a frozen trunk hardly tells (NOTES.md, 2026-11-26).
    """

    reads: Tensor  # [2] 1 for the numbers that are read, 0 for the others

    def __init__(self, trunk_size: int, config: CriticConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        reads = torch.tensor([config.reads_logprob, config.reads_repeated], dtype=torch.float32)
        self.register_buffer("reads", reads, persistent=False)
        self.v = StateValue(trunk_size, config.hidden_size, generator, reads_turn=config.reads_turn)
        self.q = PairedMLP(self.v.size + trunk_size + 2, config.hidden_size, generator)

    def value(self, state: StateFeatures) -> Tensor:
        """V1, V2: [2, n]."""
        out: Tensor = self.v(state)
        return out

    def q_value(self, state: StateFeatures, action: ActionFeatures) -> Tensor:
        """Q1, Q2: [2, n]."""
        numbers = torch.stack([action.logprob.float().clamp(min=-20) / 5, action.repeated.float()], -1)
        numbers = numbers * self.reads
        out: Tensor = self.q(torch.cat([self.v.embed(state), _unit(action.hidden), numbers], -1))
        return out


def _unit(hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden.float(), hidden.shape[-1:])


class TurnCritic(nn.Module):
    """Online and target heads, and the trunk they read.

    trunk `frozen`: the start policy, which is also the reference (no copy); `shared`: the actor's backbone;
    `lora`: an adapter on the start policy that the critic trains, and a target adapter; `separate`: a copy of the
    start policy that the critic trains, with a target copy of its own. shard_over: who holds such copies in parts.
    """

    _actor: Backbone
    _reference: Backbone

    def __init__(
        self,
        config: CriticConfig,
        actor: Backbone,
        reference: Backbone,
        seed: int,
        lora: LoRAConfig | None = None,
        shard_over: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.heads = ValueHeads(actor.hidden_size, config, generator).to(actor.device)
        self.target_heads = copy.deepcopy(self.heads).requires_grad_(False)
        self.own_trunk: Backbone | None = None
        self.target_trunk: Backbone | None = None
        if config.trunk == "separate":
            # Divided alike, since the one follows the other part by part; each before the next is made whole.
            self.own_trunk = _copy(reference, shard_over).requires_grad_(True)
            self.target_trunk = _copy(reference, shard_over)
        elif config.trunk == "lora":
            assert lora is not None  # Config sees to it
            self.own_trunk = AdaptedBackbone(reference, "critic", lora, seed=seed)
            self.target_trunk = AdaptedBackbone(reference, "target_critic", lora, seed=seed).requires_grad_(False)
        # Borrowed, not owned: not in state_dict(), not moved with this module.
        object.__setattr__(self, "_actor", actor)
        object.__setattr__(self, "_reference", reference)
        self._online, self._target = _pairs(self)

    @property
    def trunk(self) -> Backbone:
        """The backbone whose hidden states the online heads read."""
        if self.own_trunk is not None:
            return self.own_trunk
        if self.config.trunk == "shared":
            return self._actor
        return self._reference

    @property
    def trains_trunk(self) -> bool:
        return self.config.trunk != "frozen"

    def trained_trunk_parameters(self) -> list[nn.Parameter]:
        """Parameters of the trunk that the critic's optimizer moves."""
        return [p for p in self.trunk.parameters() if p.requires_grad] if self.trains_trunk else []

    def update_targets(self) -> None:
        """target <- (1 - tau) target + tau online, heads and a trunk of its own alike."""
        polyak_([local(one) for one in self._target], [local(one) for one in self._online], self.config.tau)

    def streamed(self) -> ExitStack:
        """Inside, every rank takes the same number of passes of a trunk that trains, and of its target."""
        with ExitStack() as stack:
            for trunk in (self.trunk, self.target_trunk) if self.trains_trunk else ():
                stack.enter_context(trunk.streamed() if trunk is not None else nullcontext())
            return stack.pop_all()


def _copy(backbone: Backbone, shard_over: Ranks | None) -> Backbone:
    twin = backbone.frozen_copy()
    return twin if shard_over is None else twin.shard(shard_over)


def _pairs(critic: TurnCritic) -> tuple[list[Tensor], list[Tensor]]:
    online: list[Tensor] = [*critic.heads.parameters()]
    target: list[Tensor] = [*critic.target_heads.parameters()]
    if critic.own_trunk is not None and critic.target_trunk is not None:
        online += critic.own_trunk.parameters()
        target += critic.target_trunk.parameters()
    return online, target


def token_logprobs(backbone: Backbone, hidden: Tensor, batch: PackedBatch, temperature: float) -> Tensor:
    """Log-probs [A] of the batch's action tokens; the token at t is predicted by the state at t - 1."""
    rows = batch.action_rows
    targets = batch.input_ids[rows].long()
    backbone.counts.of(hidden).rows += rows.numel()
    return linear_logprobs(hidden, backbone.lm_head_weight, targets, rows=rows - 1, temperature=temperature).logprobs


def read_games(trunk: Backbone, batch: PackedBatch, temperature: float) -> GameFeatures:
    """One packed pass of `trunk` -> what the critic reads of every turn."""
    hidden = trunk(batch.input_ids, batch.position_ids, trunk.layout(batch.cu_seqlens, batch.lengths))
    return _game_features(trunk, hidden, batch, temperature)


def _game_features(trunk: Backbone, hidden: Tensor, batch: PackedBatch, temperature: float) -> GameFeatures:
    """hidden [>= T, H]: of a pass that begins with the batch's T tokens."""
    with torch.no_grad():
        logprobs = token_logprobs(trunk, hidden.detach(), batch, temperature)
        per_turn = logprobs.new_zeros(batch.turn.shape[0])
        per_turn.index_add_(0, batch.turn_ids[batch.action_rows].long(), logprobs)
    turns_each = (batch.cu_turns[1:] - batch.cu_turns[:-1]).long()
    return GameFeatures(
        StateFeatures(hidden[batch.state_positions], batch.turn.long()),
        ActionFeatures(hidden[batch.action_positions], per_turn, repeated_actions(batch)),
        StateFeatures(hidden[batch.final_positions], turns_each),
        logprobs,
    )


def next_states(state: StateFeatures, final: StateFeatures, batch: PackedBatch) -> StateFeatures:
    """The state behind each turn of whole games: the next turn's, or the game's final one [N]."""
    following = state.hidden.roll(-1, 0)  # of a game's last turn: not the next state
    hidden = torch.where(batch.is_last[:, None], final.hidden[batch.trajectory], following)
    return StateFeatures(hidden, state.turn + 1)


@torch.no_grad()
def read_tree(
    trunk: Backbone, batch: PackedBatch, tree: TreeBatch, temperature: float, *, taken: bool = False
) -> TreeFeatures:
    """One pass over a tree -> what Q reads of each branch; taken: and what the critic reads of the games themselves."""
    hidden = trunk(tree.input_ids, tree.position_ids, tree.layout)
    trunk.counts.of(hidden).rows += tree.rows.numel()
    logprobs = linear_logprobs(
        hidden, trunk.lm_head_weight, tree.target_ids, rows=tree.rows, temperature=temperature
    ).logprobs
    per_branch = logprobs.new_zeros(tree.num_branches).index_add_(0, tree.branch_ids, logprobs)
    return TreeFeatures(
        StateFeatures(hidden[tree.state_positions], batch.turn[tree.turn_ids].long()),
        ActionFeatures(hidden[tree.action_positions], per_branch, repeated_branches(batch, tree)),
        logprobs,
        _game_features(trunk, hidden, batch, temperature) if taken else None,
    )
