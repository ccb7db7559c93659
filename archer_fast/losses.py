"""The losses of ArCHer as pure functions of tensors and numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CriticLoss(NamedTuple):
    loss: Tensor  # [] the sum of the four
    q1: Tensor  # [] each head's mean squared error
    q2: Tensor
    v1: Tensor
    v2: Tensor


def td_target(rewards: Tensor, next_value: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """r + gamma V(s'), and r alone where the game terminated (a truncated game bootstraps).

    rewards, next_value [n] float32, terminated [n] bool -> [n].
    """
    return rewards + gamma * torch.where(terminated, 0.0, next_value)


def double_critic_loss(q: Tensor, v: Tensor, q_target: Tensor, v_target: Tensor) -> CriticLoss:
    """ArCHer's turn-level critic loss (Zhou et al. 2024, arXiv 2402.19446, eq. 2-3), heads paired.

        loss = sum_i mean (Q_i(s, a) - y_i)^2 + mean (V_i(s) - Qbar_i(s, a'))^2,   i = 1, 2

    q, v, q_target, v_target: [2, n], row i the i-th head; targets carry no gradient. There is no
    minimum over heads in the targets: the paper's pairs are independent.
    """
    q_error = (q - q_target).square().mean(1)
    v_error = (v - v_target).square().mean(1)
    return CriticLoss(q_error.sum() + v_error.sum(), q_error[0], q_error[1], v_error[0], v_error[1])


def reinforce_loss(logprobs: Tensor, advantages: Tensor, num_actions: int) -> Tensor:
    """-1/n sum_b A_b sum_t log pi(a_t | s, a_<t): the paper's actor loss.

    logprobs: [M] float32 of the actions' tokens; advantages: [M], each token's action's advantage;
    num_actions: n, the actions averaged over (not their tokens: long actions do not weigh less).
    """
    return -(advantages * logprobs).sum() / max(num_actions, 1)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, num_actions: int) -> Tensor:
    """1/(2n) sum (log pi - log ref)^2 over tokens sampled from pi.

    Its gradient is an unbiased estimate of that of each token's KL(pi || ref) at the prefixes that were sampled,
    how likely those are taken as given (the "k2" estimator, Schulman 2020, joschu.net/blog/kl-approx.html).
    Zero where pi = ref.
    """
    return 0.5 * (logprobs - ref_logprobs).square().sum() / max(num_actions, 1)
