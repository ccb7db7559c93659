"""The losses against loops by hand, and against exact gradients found by enumerating every action."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from archer_fast.losses import double_critic_loss, kl_penalty, reinforce_loss, td_target


def test_a_terminated_game_does_not_bootstrap_and_a_truncated_one_does() -> None:
    rewards, next_value = torch.tensor([-1.0, -1.0, 2.0]), torch.tensor([10.0, 10.0, -4.0])
    got = td_target(rewards, next_value, torch.tensor([True, False, False]), 0.5)
    assert got.tolist() == [-1.0, 4.0, 0.0]


def test_what_follows_a_terminal_is_not_even_multiplied() -> None:
    """0 * NaN is NaN: the value of a state that does not exist must not reach the target."""
    got = td_target(torch.tensor([3.0]), torch.tensor([torch.nan]), torch.tensor([True]), 0.9)
    assert got.tolist() == [3.0]


def test_gamma_zero_is_the_reward_alone() -> None:
    rewards = torch.tensor([1.0, -2.0])
    assert torch.equal(td_target(rewards, torch.tensor([5.0, 6.0]), torch.tensor([False, False]), 0.0), rewards)


def random_heads(n: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, generator=generator, dtype=torch.float64) for _ in range(4)]


def test_critic_loss_is_the_sum_of_four_means() -> None:
    q, v, q_target, v_target = random_heads()
    got = double_critic_loss(q, v, q_target, v_target)
    by_hand = [
        sum((float(values[head, i]) - float(targets[head, i])) ** 2 for i in range(5)) / 5
        for values, targets in ((q, q_target), (v, v_target))
        for head in (0, 1)
    ]
    assert [got.q1.item(), got.q2.item(), got.v1.item(), got.v2.item()] == pytest.approx(by_hand, rel=1e-12)
    assert got.loss.item() == pytest.approx(sum(by_hand), rel=1e-12)


@pytest.mark.parametrize("other", [0, 1])
def test_no_head_hears_of_the_other_heads_target(other: int) -> None:
    """A minimum over heads, as in TD3, would couple them; the paper's pairs are independent."""

    def gradients(shift: float) -> list[Tensor]:
        q, v, q_target, v_target = random_heads()
        q.requires_grad_(), v.requires_grad_()
        q_target[other] += shift
        v_target[other] += shift
        return list(torch.autograd.grad(double_critic_loss(q, v, q_target, v_target).loss, [q, v]))

    for before, after in zip(gradients(0.0), gradients(-100.0), strict=True):
        assert torch.equal(before[1 - other], after[1 - other])
        assert not torch.equal(before[other], after[other])


class TwoTokens:
    """A policy of actions of one or two tokens out of 3: token 0 ends an action at once, else a second follows."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.first = (2 * torch.randn(3, generator=generator, dtype=torch.float64)).requires_grad_()
        self.second = (2 * torch.randn(3, 3, generator=generator, dtype=torch.float64)).requires_grad_()
        self.parameters = [self.first, self.second]

    actions = ((0,), *itertools.product((1, 2), (0, 1, 2)))

    def logprobs(self, action: tuple[int, ...]) -> Tensor:
        """[tokens]"""
        found = [self.first.log_softmax(0)[action[0]]]
        found += [self.second.log_softmax(1)[action[0], token] for token in action[1:]]
        return torch.stack(found)

    def probability(self, action: tuple[int, ...]) -> Tensor:
        return self.logprobs(action).sum().exp()

    def expected_gradients(self, losses: list[Tensor]) -> list[Tensor]:
        """E over actions of each one's gradient."""
        total = [torch.zeros_like(p) for p in self.parameters]
        for action, loss in zip(self.actions, losses, strict=True):
            for sum_, gradient in zip(total, self.gradients(loss), strict=True):
                sum_ += self.probability(action).detach() * gradient
        return total

    def gradients(self, loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]


def test_reinforce_in_expectation_climbs_the_mean_advantage() -> None:
    policy = TwoTokens(3)
    advantages = [1.0, -2.0, 0.5, 3.0, 0.0, -1.0, 2.0]
    expected = sum(a * policy.probability(x) for a, x in zip(advantages, policy.actions, strict=True))
    losses = []
    for action, advantage in zip(policy.actions, advantages, strict=True):
        logprobs = policy.logprobs(action)
        losses.append(reinforce_loss(logprobs, torch.full_like(logprobs, advantage), 1))
    for got, wanted in zip(policy.expected_gradients(losses), policy.gradients(-expected), strict=True):
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_a_long_action_weighs_as_much_as_a_short_one() -> None:
    """The mean is over actions: two tokens of one action count for one."""
    logprobs = torch.tensor([-1.0, -2.0, -4.0])
    assert reinforce_loss(logprobs, torch.tensor([1.0, 1.0, -1.0]), 2).item() == -(-1.0 - 2.0 + 4.0) / 2


def test_without_actions_both_losses_are_zero() -> None:
    none = torch.zeros(0)
    assert reinforce_loss(none, none, 0).item() == 0.0
    assert kl_penalty(none, none, 0).item() == 0.0


def test_the_penalty_is_zero_with_zero_gradient_where_policy_and_reference_agree() -> None:
    logprobs = torch.tensor([-0.5, -3.0], requires_grad=True)
    penalty = kl_penalty(logprobs, logprobs.detach().clone(), 2)
    penalty.backward()
    assert penalty.item() == 0.0
    assert logprobs.grad is not None and logprobs.grad.tolist() == [0.0, 0.0]


def test_the_penalty_by_hand() -> None:
    got = kl_penalty(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -5.0]), 2)
    assert got.item() == pytest.approx(0.5 * (1 + 9) / 2)


def kl(left: Tensor, right: Tensor) -> Tensor:
    """KL of categoricals given by logits in the last dimension."""
    return (left.log_softmax(-1).exp() * (left.log_softmax(-1) - right.log_softmax(-1))).sum(-1)


def test_the_penalty_in_expectation_has_the_gradient_of_each_tokens_kl() -> None:
    """Each visited prefix's KL(pi(.|prefix) || ref(.|prefix)), the chance of the prefix taken as it is."""
    policy, reference = TwoTokens(3), TwoTokens(4)
    losses = [kl_penalty(policy.logprobs(a), reference.logprobs(a).detach(), 1) for a in policy.actions]
    reach = policy.first.softmax(0).detach()  # of the prefixes (1,) and (2,)
    exact = kl(policy.first, reference.first.detach())
    exact = exact + (reach * kl(policy.second, reference.second.detach()))[1:].sum()
    for got, wanted in zip(policy.expected_gradients(losses), policy.gradients(exact), strict=True):
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_a_step_down_the_penalty_brings_policy_and_reference_together() -> None:
    policy, reference = TwoTokens(3), TwoTokens(4)
    before = kl(policy.first, reference.first).item()
    losses = [kl_penalty(policy.logprobs(a), reference.logprobs(a).detach(), 1) for a in policy.actions]
    with torch.no_grad():
        policy.first -= 0.5 * policy.expected_gradients(losses)[0]
    assert math.isfinite(before) and kl(policy.first, reference.first).item() < before - 0.05
