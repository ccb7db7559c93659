"""The actor's loss and gradient, on a tree and on whole games, against plain passes over every action alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from archer_fast.actor import ActorLoss, ScoredActions, accumulated_actor_loss, actor_loss
from archer_fast.advantages import centre_by_state
from archer_fast.backbone import Backbone
from archer_fast.batch import Alternatives, PackedBatch, TreeBatch, plant_tree
from archer_fast.packing import pack_trajectories
from archer_fast.trajectory import Trajectory, Turn

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 37
MakeLM = Callable[..., Any]


def random_batch(rng: np.random.Generator) -> PackedBatch:
    """Games of 3, 1 and 2 turns."""

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(0, VOCAB, rng.integers(low, high))

    games = []
    for num_turns in (3, 1, 2):
        turns = []
        for _ in range(num_turns):
            action = ids(1, 4)
            turns.append(Turn(ids(1, 5), action, np.zeros(action.size), 0.0, 0))
        games.append(Trajectory(tuple(turns), ids(0, 3), True, False))
    return PackedBatch.from_arrays(pack_trajectories(games))


def random_alternatives(rng: np.random.Generator) -> Alternatives:
    """Two or three branches at turns 0 and 2 (game 0), 3 (game 1), 5 (game 2); the second game leaves rows unused."""
    turn_ids = torch.tensor([[0, 0, 2, 2], [3, 3, 3, -1], [5, 5, -1, -1]])
    lengths = torch.from_numpy(rng.integers(1, 5, (3, 4))) * (turn_ids >= 0)
    lengths[0, 1], lengths[0, 2] = 4, 1  # uneven for certain
    action_ids = torch.from_numpy(rng.integers(0, VOCAB, (3, 4, 4))).int()
    return Alternatives(action_ids, torch.zeros(3, 4, 4), lengths, turn_ids)


class Case:
    """One tree, its branches as (prefix, action) pairs, advantages and reference log-probs."""

    def __init__(self, backbone: Backbone) -> None:
        rng = np.random.default_rng(4)
        self.batch, alternatives = random_batch(rng), random_alternatives(rng)
        layout = backbone.layout(self.batch.cu_seqlens, self.batch.lengths)
        self.tree: TreeBatch = plant_tree(self.batch, alternatives, layout)
        self.branches: list[tuple[Tensor, Tensor]] = []
        for game, row in alternatives.used.nonzero().tolist():
            start = int(self.batch.cu_seqlens[game])
            state = int(self.batch.state_positions[alternatives.turn_ids[game, row]])
            action = alternatives.action_ids[game, row, : alternatives.lengths[game, row]]
            self.branches.append((self.batch.input_ids[start : state + 1].long(), action.long()))
        generator = torch.Generator().manual_seed(5)
        q = torch.randn(self.tree.num_branches, generator=generator)
        self.advantages = centre_by_state(q, self.tree.turn_ids, self.batch.turn.shape[0])
        self.reference = -4 * torch.rand(self.tree.rows.numel(), generator=generator)

    @property
    def scored(self) -> ScoredActions:
        return ScoredActions.of_tree(self.tree, self.batch, self.reference, self.advantages)

    def distributions(self, backbone: Backbone, temperature: float) -> list[Tensor]:
        """Log-probs [m, V] at each branch's m tokens, from a plain pass over prefix and branch."""
        found = []
        for prefix, action in self.branches:
            ids = torch.cat([prefix, action])
            n = ids.numel()
            layout = backbone.layout(torch.tensor([0, n], dtype=torch.int32), (n,))
            logits = backbone(ids, torch.arange(n), layout) @ backbone.lm_head_weight.T / temperature
            found.append(logits.log_softmax(-1)[prefix.numel() - 1 : -1])
        return found


@pytest.fixture
def backbone(make_lm: MakeLM) -> Backbone:
    return Backbone(make_lm(tie_word_embeddings=True), None)


def loss_of(backbone: Backbone, case: Case, **options: Any) -> ActorLoss:
    return actor_loss(backbone, case.scored, **({"temperature": 1.0} | options))


def gradients(backbone: Backbone, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}
    backbone.zero_grad()
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "policy alone": {},
    "temperature": {"temperature": 0.7},
    "kl": {"kl_coef": 0.3},
    "entropy": {"entropy_coef": 0.2},
    "awr": {"kind": "awr", "awr_beta": 0.7},
    "all": {"temperature": 1.3, "kl_coef": 0.5, "entropy_coef": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradient_are_those_of_branches_passed_alone(backbone: Backbone, name: str) -> None:
    options, case = OPTIONS[name], Case(backbone)
    got = loss_of(backbone, case, **options)

    advantages = case.advantages.tolist()
    if options.get("kind") == "awr":
        advantages = np.exp(0.7 * np.array(advantages)).tolist()
    policy, penalty, entropy = torch.zeros(()), torch.zeros(()), torch.zeros(())
    token = 0
    distributions = case.distributions(backbone, options.get("temperature", 1.0))
    for (_, action), logprobs, advantage in zip(case.branches, distributions, advantages, strict=True):
        for i, chosen in enumerate(action.tolist()):
            policy = policy - advantage * logprobs[i, chosen]
            penalty = penalty + 0.5 * (logprobs[i, chosen] - case.reference[token]) ** 2
            entropy = entropy - (logprobs[i].exp() * logprobs[i]).sum()
            token += 1
    n = len(case.branches)
    assert n == 9 and token == case.tree.rows.numel() > 12
    loss = policy + options.get("kl_coef", 0.0) * penalty - options.get("entropy_coef", 0.0) * entropy
    torch.testing.assert_close(got.loss, loss / n, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.policy_loss, policy.detach() / n, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy, entropy.detach() / token, rtol=1e-5, atol=1e-5)
    assert not got.policy_loss.requires_grad and not got.entropy.requires_grad

    found, wanted = gradients(backbone, got.loss), gradients(backbone, loss / n)
    assert found.keys() == wanted.keys() and len(found) > 10
    for parameter, gradient in wanted.items():
        scale = gradient.abs().max().item()
        assert scale > 0, parameter
        torch.testing.assert_close(
            found[parameter], gradient, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, p=parameter: f"{p}: {m}"
        )


def test_terms_of_weight_zero_are_not_there(backbone: Backbone) -> None:
    """Not even as 0 * NaN: reference log-probs are not read where kl_coef is 0."""
    case = Case(backbone)
    wanted = loss_of(backbone, case)
    case.reference = torch.full_like(case.reference, torch.nan)
    got = loss_of(backbone, case)
    assert torch.equal(got.loss, wanted.loss) and torch.equal(got.loss.detach(), got.policy_loss)


def test_no_advantage_no_gradient(backbone: Backbone) -> None:
    case = Case(backbone)
    case.advantages = torch.zeros_like(case.advantages)
    for found in gradients(backbone, loss_of(backbone, case).loss).values():
        assert found.abs().max() == 0


def test_a_step_raises_what_was_better_than_its_neighbours_and_lowers_the_rest(backbone: Backbone) -> None:
    """At one state at a time: the advantages of all others are 0."""
    case = Case(backbone)
    for turn in (0, 2, 3, 5):
        model = backbone.frozen_copy().requires_grad_(True)
        own = (case.tree.turn_ids == turn).nonzero().squeeze(1).tolist()
        advantages = torch.zeros(case.tree.num_branches)
        advantages[own[0]], advantages[own[1]] = 1.0, -1.0
        before = [
            d.gather(1, a[:, None]).sum().item()
            for d, (_, a) in zip(case.distributions(model, 1.0), case.branches, strict=True)
        ]
        scored = case.scored._replace(advantages=advantages[case.tree.branch_ids])
        actor_loss(model, scored, temperature=1.0).loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 1e-3 * p.grad
        after = [
            d.gather(1, a[:, None]).sum().item()
            for d, (_, a) in zip(case.distributions(model, 1.0), case.branches, strict=True)
        ]
        gained = [y - x for x, y in zip(before, after, strict=True)]
        assert gained[own[0]] > gained[own[1]], turn


def test_centred_advantages_sum_to_zero_in_each_state(backbone: Backbone) -> None:
    case = Case(backbone)
    for turn, count in ((0, 2), (2, 2), (3, 3), (5, 2)):
        own = case.advantages[case.tree.turn_ids == turn]
        assert own.numel() == count and own.abs().max() > 0.01
        assert own.sum().item() == pytest.approx(0, abs=1e-6)


# -- whole games -----------------------------------------------------------------------------------


class Games:
    """Six actions of three games as they were taken, by a policy that has moved since."""

    def __init__(self, backbone: Backbone) -> None:
        rng = np.random.default_rng(7)
        self.batch = random_batch(rng)
        self.layout = backbone.layout(self.batch.cu_seqlens, self.batch.lengths)
        at, self.temperature = self.batch.action_rows, 1.3
        self.logprobs = self.of(backbone).detach()
        self.batch.rollout_logprobs[at] = self.logprobs + torch.from_numpy(rng.normal(0, 0.3, at.numel())).float()
        self.turn_of_token = self.batch.turn_ids[at].long()
        self.reference = self.logprobs - torch.from_numpy(rng.random(at.numel())).float()

    def of(self, backbone: Backbone) -> Tensor:
        """Log-probs [A] of the action tokens from plain passes, game by game."""
        found = []
        for begin, end in zip(self.batch.cu_seqlens[:-1].tolist(), self.batch.cu_seqlens[1:].tolist(), strict=True):
            ids, n = self.batch.input_ids[begin:end].long(), end - begin
            layout = backbone.layout(torch.tensor([0, n], dtype=torch.int32), (n,))
            logits = backbone(ids, torch.arange(n), layout) @ backbone.lm_head_weight.T / self.temperature
            of_tokens = logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
            found.append(of_tokens[self.batch.action_mask[begin + 1 : end]])
        return torch.cat(found)


def test_a_clipped_step_on_whole_games_is_that_of_plain_passes(backbone: Backbone) -> None:
    games, clip = Games(backbone), 0.2
    advantages = torch.randn(6, generator=torch.Generator().manual_seed(1))
    scored = ScoredActions.of_games(games.batch, games.layout, games.reference, advantages)
    assert scored.num_actions == 6 < scored.rows.numel()
    assert scored.turn.tolist() == [[0, 1, 2, 0, 0, 1][t] for t in games.turn_of_token.tolist()]
    got = actor_loss(backbone, scored, temperature=1.3, kind="ppo_clip", clip=clip, kl_coef=0.4)

    logprobs = games.of(backbone)
    log_ratio = logprobs - games.batch.rollout_logprobs[games.batch.action_rows]
    ratio, credit = log_ratio.exp(), advantages[games.turn_of_token]
    policy = -torch.minimum(ratio * credit, ratio.clamp(1 - clip, 1 + clip) * credit).sum() / 6
    loss = policy + 0.4 * 0.5 * (logprobs - games.reference).square().sum() / 6
    outside = ((ratio < 1 - clip) | (ratio > 1 + clip)).float()
    assert 0 < outside.mean() < 1
    torch.testing.assert_close(got.loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.policy_loss, policy.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.clip_fraction, outside.mean())
    torch.testing.assert_close(got.moved, (ratio - 1 - log_ratio).sum().detach() / 6, rtol=1e-4, atol=1e-5)
    kl_of_turns = torch.zeros(6).index_add(0, games.turn_of_token, (ratio - 1 - log_ratio).detach())
    of_bins = [[0, 3, 4], [1, 5], [2]]  # turns of games of 3, 1 and 2: first, second, and third
    assert got.moved_by_turn[1].tolist() == [3, 2, 1, 0, 0, 0, 0, 0]
    sums = torch.tensor([float(kl_of_turns[turns].sum()) for turns in of_bins] + [0.0] * 5)
    torch.testing.assert_close(got.moved_by_turn[0], sums, rtol=1e-4, atol=1e-5)

    found, wanted = gradients(backbone, got.loss), gradients(backbone, loss)
    for parameter, gradient in wanted.items():
        scale = gradient.abs().max().item()
        assert scale > 0, parameter
        torch.testing.assert_close(
            found[parameter], gradient, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, p=parameter: f"{p}: {m}"
        )


def test_advantages_of_turns_are_those_of_their_tokens(backbone: Backbone) -> None:
    games = Games(backbone)
    by_turn = torch.arange(6.0)
    of_turns = ScoredActions.of_games(games.batch, games.layout, None, by_turn)
    of_tokens = ScoredActions.of_games(games.batch, games.layout, None, by_turn[games.turn_of_token])
    assert torch.equal(of_turns.advantages, of_tokens.advantages)
    assert of_turns.advantages.tolist() == [float(t) for t in games.turn_of_token.tolist()]
    assert of_turns.target_ids.tolist() == games.batch.input_ids[games.batch.action_mask].tolist()


def test_passes_are_summed_as_if_they_were_one(backbone: Backbone) -> None:
    """Loss, gradient and every mean of a tree and of games, passed one after the other."""
    case, games = Case(backbone), Games(backbone)
    case.tree.rollout_logprobs = case.reference + 0.1
    ours = [
        case.scored,
        ScoredActions.of_games(games.batch, games.layout, games.reference, torch.arange(6.0) - 2),
    ]
    options: dict[str, Any] = {"temperature": 1.3, "kl_coef": 0.3, "entropy_coef": 0.1}
    got = accumulated_actor_loss(backbone, ours, **options)
    alone = [actor_loss(backbone, scored, **options) for scored in ours]
    actions, tokens = [9, 6], [scored.rows.numel() for scored in ours]
    for name, weights in {
        "loss": actions, "policy_loss": actions, "moved": actions, "entropy": tokens, "clip_fraction": tokens,
    }.items():  # fmt: skip
        wanted = sum(w * getattr(part, name) for w, part in zip(weights, alone, strict=True)) / sum(weights)
        torch.testing.assert_close(getattr(got, name), wanted, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    wanted_gradients = gradients(backbone, (9 * alone[0].loss + 6 * alone[1].loss) / 15)
    for parameter, gradient in gradients(backbone, got.loss).items():
        scale = wanted_gradients[parameter].abs().max().item()
        torch.testing.assert_close(gradient, wanted_gradients[parameter], rtol=1e-4, atol=1e-5 * scale)
