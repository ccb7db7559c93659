"""Returns and advantages as pure functions of tensors: over the turns of games, and over the actions of one state.

Over turns, the N turns of B games lie end to end as in `batch.PackedBatch`: rewards and values [N], cu_turns [B+1],
terminated and final_values [B]. A game may have no turns. Beyond its last turn a game is worth

    end = 0 where it terminated, else final_values: V of the observation after the last action

and so a truncated game bootstraps. Half precision is computed and returned in float32. All are differentiable;
targets and advantages for training are made of detached values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from archer_fast.ops import segment_scan
from archer_fast.ops.segment_scan import checked_offsets


def td_target(rewards: Tensor, next_value: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """r + gamma V(s'), and r alone where the game terminated (a truncated game bootstraps).

    For transitions drawn from replay, each with its own V(s'): rewards, next_value [n] or [heads, n] float32,
    terminated [n] bool -> as next_value.
    """
    return rewards + gamma * torch.where(terminated, 0.0, next_value)


def discounted_returns(rewards: Tensor, cu_turns: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma G_{t+1}, G = 0 beyond the game's last turn -> [N] (Sutton and Barto 2018, eq. 3.9).

    gamma 0: the rewards. gamma 1: their sum from t on. What a truncated game would still have earned is not in it:
    `td_lambda` at gae_lambda 1 is the return with that.
    """
    rewards = _wide(rewards)
    return segment_scan(torch.full_like(rewards, gamma), rewards, cu_turns)


def turn_gae(
    rewards: Tensor,
    values: Tensor,
    final_values: Tensor,
    terminated: Tensor,
    cu_turns: Tensor,
    gamma: float | Tensor,
    gae_lambda: float,
) -> Tensor:
    """A_t = delta_t + gamma gae_lambda A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t,  V_{t+1} = end at the last turn.

    Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16), a turn a time step -> [N].
    gamma: a number, or one a time step [N] where these are of several kinds (PPO's tokens: 1 but at a turn's end).
    gae_lambda 0: the TD error delta_t. gae_lambda 1: the discounted return, `end` included, minus V_t.
    One game, rewards [1, 2], values [4, 8], end 16, gamma = gae_lambda = 0.5: delta = [1, 2], A = [1.5, 2].
    """
    games = _Games.of(rewards, values, final_values, terminated, cu_turns)
    delta = games.rewards + gamma * games.next_values - games.values
    return segment_scan(torch.full_like(delta, gae_lambda) * gamma, delta, cu_turns)


def td_lambda(
    rewards: Tensor,
    values: Tensor,
    final_values: Tensor,
    terminated: Tensor,
    cu_turns: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """G_t = r_t + gamma ((1 - gae_lambda) V_{t+1} + gae_lambda G_{t+1}),  V = G = end beyond the last turn -> [N].

    The lambda-return (Sutton and Barto 2018, eq. 12.2), what V_t is trained towards: `turn_gae` + V_t.
    gae_lambda 0: r_t + gamma V_{t+1}. gae_lambda 1: the discounted return, `end` included; no V_t is read.
    One game, rewards [1, 2], values [4, 8], end 16, gamma = gae_lambda = 0.5: G = [1 + (4 + 5) / 2, 2 + 16 / 2].
    """
    games = _Games.of(rewards, values, final_values, terminated, cu_turns)
    # At 1 values are not even multiplied: 0 * NaN is NaN.
    later = 0.0 if gae_lambda == 1 else (1 - gae_lambda) * games.next_values
    bootstrap = torch.where(games.left == 1, games.end, later)  # the last turn has nothing but the end to mix
    b = games.rewards + gamma * bootstrap
    return segment_scan(torch.full_like(b, gamma * gae_lambda), b, cu_turns)


def n_step(
    rewards: Tensor,
    values: Tensor,
    final_values: Tensor,
    terminated: Tensor,
    cu_turns: Tensor,
    gamma: float,
    n: int,
) -> Tensor:
    """G_t = r_t + gamma r_{t+1} + ... + gamma^{n-1} r_{t+n-1} + gamma^n V_{t+n} -> [N]; the game's end cuts it short.

    Where only m <= n turns are left, their rewards are summed and gamma^m end follows (Sutton and Barto 2018, eq. 7.1).
    n = 1: r_t + gamma V_{t+1}. n of the game's length or more: the discounted return, `end` included.
    One game, rewards [1, 2, 4], values [8, 8, 8], end 16, gamma 0.5, n = 2: G = [1 + 1 + 2, 2 + 2 + 4, 4 + 8].
    """
    if n < 1:
        raise ValueError(f"n: wanted a number of turns from 1 on, got {n}")
    games = _Games.of(rewards, values, final_values, terminated, cu_turns)
    n = min(n, max(1, rewards.shape[0]))
    # The sum of n rewards, put together of those of 1, 2, 4, ... rewards.
    total, window = torch.zeros_like(games.rewards), games.rewards
    covered, width = 0, 1
    while covered < n:
        if n & width:
            total = total + gamma**covered * games.ahead(window, covered)
            covered += width
        window = window + gamma**width * games.ahead(window, width)
        width *= 2
    left = games.left.to(total.dtype)
    return total + torch.where(left <= n, gamma**left * games.end, gamma**n * games.ahead(games.values, n))


def broadcast_to_tokens(turn_values: Tensor, turn_ids: Tensor) -> Tensor:
    """Each token's turn's value: turn_values [N], turn_ids [T] in [0, N) -> [T].

    turn_values [5, 7], turn_ids [0, 0, 1] -> [5, 5, 7].
    """
    return turn_values.index_select(0, turn_ids)


def sum_by_turn(token_values: Tensor, cu: Tensor) -> Tensor:
    """Sum of each turn's tokens, cu[k] .. cu[k+1] those of turn k: token_values [T], cu [N+1] -> [N].

    log p(action) is the sum of its tokens' log-probs where the others' are 0. A turn without tokens sums to 0.
    token_values [5, 7, 1], cu [0, 2, 2, 3] -> [12, 0, 1].
    """
    token_values = _wide(token_values)
    suffix_sums = segment_scan(torch.ones_like(token_values), token_values, cu)
    suffix_sums = torch.cat([suffix_sums, suffix_sums.new_zeros(1)])  # where an empty turn at the end would read
    return torch.where(cu[1:] > cu[:-1], suffix_sums[cu[:-1].long()], 0.0)


class _Games(NamedTuple):
    """Turns of games end to end, in float32 or float64, and what follows each."""

    rewards: Tensor  # [N]
    values: Tensor  # [N]
    end: Tensor  # [N] what the turn's game is worth beyond its last turn
    left: Tensor  # [N] int64 turns to the game's end, this one included

    @classmethod
    def of(cls, rewards: Tensor, values: Tensor, final_values: Tensor, terminated: Tensor, cu_turns: Tensor) -> _Games:
        num_turns, num_games = rewards.shape, (cu_turns.shape[0] - 1,)
        for name, x, shape in (
            ("values", values, num_turns),
            ("final_values", final_values, num_games),
            ("terminated", terminated, num_games),
        ):
            if x.shape != shape:
                clock = "turn" if name == "values" else "game"
                raise ValueError(f"{name}: wanted one a {clock} {tuple(shape)}, got {tuple(x.shape)}")
        if terminated.dtype != torch.bool:
            raise TypeError(f"terminated: wanted bool, got {terminated.dtype}")
        index = torch.arange(rewards.shape[0], device=rewards.device)
        cu = checked_offsets(cu_turns, rewards.shape[0])[1:].long()
        game = torch.bucketize(index, cu, right=True)  # games without turns are nobody's
        end = torch.where(terminated, 0.0, _wide(final_values))
        return cls(_wide(rewards), _wide(values), end[game], cu[game] - index)

    @property
    def next_values(self) -> Tensor:
        """[N] V_{t+1}, `end` after the last turn."""
        return torch.where(self.left == 1, self.end, self.values.roll(-1))

    def ahead(self, x: Tensor, n: int) -> Tensor:
        """x_{t+n}, 0 where the game has ended by then."""
        return torch.where(self.left > n, x.roll(-n), 0.0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def centre_by_state(values: Tensor, state_ids: Tensor, num_states: int) -> Tensor:
    """A_k = Q(s, a_k) - mean_j Q(s, a_j) over the actions j at the same state.

    values [n] float32, state_ids [n] int64 in [0, num_states) -> [n]. A state with one action gets 0:
    with nothing to compare there is nothing to learn. The mean is the Monte-Carlo estimate of
    V(s) = E_{a ~ pi} Q(s, a), so no lag or bias between Q and V heads can tilt it.
    """
    total = values.new_zeros(num_states).index_add(0, state_ids, values)
    count = values.new_zeros(num_states).index_add(0, state_ids, torch.ones_like(values))
    return values - (total / count.clamp(min=1))[state_ids]


def normalise(advantages: Tensor) -> Tensor:
    """Divide by the root mean square (the sign and the zero stay: centring is not this function's business)."""
    return advantages / advantages.square().mean().sqrt().clamp(min=1e-6)
