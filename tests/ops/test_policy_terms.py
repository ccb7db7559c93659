"""policy_terms: derivatives against autograd, and against exact gradients found by enumerating every action."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from archer_fast.ops.linear_policy_loss import PolicyTerms, policy_terms

pytestmark = pytest.mark.usefixtures("one_thread")


def terms(
    kind: str,
    logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None = None,
    *,
    entropy: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
) -> PolicyTerms:
    entropy = torch.zeros_like(logprobs) if entropy is None else entropy
    coefficients = [0.2, 0.3, 1.5, 4.0, kl_coef, entropy_coef]
    return policy_terms(kind, logprobs, entropy, advantages, rollout_logprobs, ref_logprobs, coefficients)


def reinforce_loss(logprobs: Tensor, advantages: Tensor, num_actions: int) -> Tensor:
    return terms("reinforce", logprobs, advantages).loss.sum() / num_actions


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, num_actions: int) -> Tensor:
    """What kl_coef = 1 adds where nothing is to be gained."""
    return terms("reinforce", logprobs, torch.zeros_like(logprobs), ref_logprobs, kl_coef=1.0).loss.sum() / num_actions


@pytest.mark.parametrize("kind", ["reinforce", "ppo_clip", "awr"])
def test_the_derivatives_by_hand_are_those_of_autograd(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, entropy, advantages, rollout, ref = torch.randn(5, 200, generator=generator, dtype=torch.float64)
    logprobs.requires_grad_(), entropy.requires_grad_()
    found = terms(
        kind, logprobs, advantages, ref, entropy=entropy, rollout_logprobs=rollout, kl_coef=0.3, entropy_coef=0.2
    )
    wanted = torch.autograd.grad(found.loss.sum(), (logprobs, entropy))
    assert found.grad_entropy is not None
    torch.testing.assert_close(found.grad_logprobs, wanted[0])
    torch.testing.assert_close(found.grad_entropy, wanted[1])
    if kind == "ppo_clip":  # every case of the clip is among the 200
        ratio = (logprobs - rollout).exp()
        for sign in (1, -1):
            ours = ratio[advantages * sign > 0]
            assert min((ours < 0.8).sum(), (ours > 1.3).sum(), ((ours > 0.8) & (ours < 1.3)).sum()) > 0


def test_an_infinite_ratio_of_advantage_zero_has_no_say() -> None:
    """The rollout policy excluded what this one would say: infinity times 0 would be NaN."""
    rollout = torch.tensor([-torch.inf, -1.0])
    found = terms("ppo_clip", torch.tensor([-1.0, -1.0]), torch.tensor([0.0, 2.0]), rollout_logprobs=rollout)
    assert found.loss.tolist() == [0, -2] and found.grad_logprobs.tolist() == [0, -2]


def test_without_an_entropy_bonus_nothing_is_asked_of_the_entropy() -> None:
    assert terms("reinforce", torch.zeros(2), torch.ones(2)).grad_entropy is None


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
