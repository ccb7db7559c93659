"""What a turn critic says an action is worth: the advantages of ArCHer's actor, and the paper's token baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from archer_fast.actor import ScoredActions
from archer_fast.advantages import centre_by_state, turn_gae
from archer_fast.backbone import Backbone
from archer_fast.batch import PackedBatch
from archer_fast.config import ActorConfig, Config
from archer_fast.critic import ActionFeatures, GameFeatures, StateFeatures, StateValue, ValueHeads
from archer_fast.meters import Meters
from archer_fast.optim import GuardedStep
from archer_fast.packing import Int64
from archer_fast.ranks import ALONE, Ranks


def estimate(values: Tensor, config: ActorConfig) -> Tensor:
    """One number of two heads: values [2, n] -> [n]."""
    return values.amin(0) if config.pessimistic else values.mean(0)


@torch.no_grad()
def credit_alternatives(
    heads: ValueHeads, state: StateFeatures, action: ActionFeatures, state_ids: Tensor, config: ActorConfig
) -> tuple[Tensor, Tensor]:
    """Advantages [n] and Q [n] of n fresh actions; state_ids [n] int64: which of them answer the same state.

    centred: Q(s, a_k) - mean_j Q(s, a_j); q_minus_v: min Q - min V (Zhou et al. 2024, arXiv 2402.19446, eq. 4).
    """
    q = estimate(heads.q_value(state, action), config)
    if config.advantage != "q_minus_v":
        return centre_by_state(q, state_ids, int(state_ids.max()) + 1 if state_ids.numel() else 0), q
    return q - estimate(heads.value(state), config), q


@torch.no_grad()
def credit_logged(
    heads: ValueHeads, features: GameFeatures, batch: PackedBatch, config: ActorConfig, gamma: float
) -> Tensor:
    """Advantages [N] of the actions that were taken: min Q - min V, or the residual r + gamma V(s') - V(s), which
    `gae_lambda` stretches over the turns that followed."""
    v = estimate(heads.value(features.state), config)
    if config.advantage == "q_minus_v":
        return estimate(heads.q_value(features.state, features.action), config) - v
    final = estimate(heads.value(features.final), config)
    return turn_gae(batch.rewards, v, final, batch.terminated, batch.cu_turns, gamma, config.gae_lambda)


def return_spread(returns: Tensor, turn: Tensor) -> Tensor:
    """Standard deviation [] of the returns-to-go [N] of games that stand at the same turn, turn [N] int64, pooled over
    turns; inf where no two stand at one.

    E[A^2] <= Var(G | turn) by the law of total variance: a critic whose advantages are larger speaks of its own error.
    """
    num_turns = int(turn.max()) + 1 if turn.numel() else 0
    freedom = turn.numel() - int((turn.bincount(minlength=num_turns) > 0).sum())
    if freedom == 0:
        return returns.new_tensor(torch.inf)
    return (centre_by_state(returns, turn, num_turns).square().sum() / freedom).sqrt()


def normalised(passes: list[ScoredActions], spread: Tensor, ranks: Ranks = ALONE) -> tuple[list[ScoredActions], Tensor]:
    """Their advantages divided by the root mean square over all of them, and times the trust [] in [0, 1] in them:
    `spread` [] / that root, at most 1."""
    together = torch.cat([scored.advantages for scored in passes])
    count = torch.full((), together.numel(), dtype=together.dtype, device=together.device)
    squares, count = ranks.sum(torch.stack([together.square().sum(), count]))
    rms = (squares / count).sqrt().clamp(min=1e-6)
    trust = (spread / rms).clamp(max=1.0)
    parts = (trust * (together / rms)).split([scored.advantages.numel() for scored in passes])
    return [scored._replace(advantages=own) for scored, own in zip(passes, parts, strict=True)], trust


class TokenBaseline:
    """b(s, a_<t), a value a token on the start policy's hidden states, fitted to the advantages it is subtracted from
    (Zhou et al. 2024, arXiv 2402.19446, section 3.3)."""

    def __init__(self, config: Config, reference: Backbone, ranks: Ranks = ALONE) -> None:
        self.reference, self.ranks = reference, ranks
        generator = torch.Generator().manual_seed(config.seed + 3)
        self.value = StateValue(reference.hidden_size, config.critic.hidden_size, generator).to(reference.device)
        group = [{"params": list(self.value.parameters()), "lr": config.critic.lr}]
        self.step = GuardedStep("baseline", group, config.critic.max_grad_norm, config.max_skipped_steps, ranks)

    def __call__(self, passes: list[ScoredActions], games: Int64, meters: Meters) -> list[ScoredActions]:
        """The passes with b subtracted, as it was before its own step towards their advantages."""
        values = []
        with self.reference.gathered():
            for scored in passes:
                with torch.no_grad():
                    hidden = self.reference(scored.input_ids, scored.position_ids, scored.layout)[scored.rows]
                values.append(self.value(StateFeatures(hidden, scored.turn)).mean(0))
                meters.count(processed_tokens=scored.input_ids.numel())
        advantages = torch.cat([scored.advantages for scored in passes])
        squares = (torch.cat(values) - advantages).square()
        loss = squares.sum() / self.ranks.sum(torch.tensor(squares.numel())).item()
        meters.add(baseline_loss=squares.detach().mean())
        self.step(loss, meters, games)
        return [s._replace(advantages=s.advantages - v.detach()) for s, v in zip(passes, values, strict=True)]
