"""From packed arrays to tensors, and the tree of alternatives: by hand, and against branches scored alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from archer_fast.attention import PackedLayout
from archer_fast.backbone import Backbone
from archer_fast.batch import Alternatives, PackedBatch, _digest, plant_tree, repeated_actions, repeated_branches
from archer_fast.ops import linear_logprobs
from archer_fast.packing import pack_trajectories
from archer_fast.trajectory import Trajectory, Turn

pytestmark = pytest.mark.usefixtures("one_thread")


def turn(observation: list[int], action: list[int], reward: float = 0.0) -> Turn:
    logprobs = -np.arange(1, len(action) + 1)
    return Turn(np.array(observation), np.array(action), logprobs, reward, policy_version=3)


def two_games() -> PackedBatch:
    """T = 12: 10 11 12 1 13 14 15 1 16 | 20 21 1."""
    first = Trajectory((turn([10, 11], [12, 1], -1.0), turn([13], [14, 15, 1])), np.array([16]), True, False)
    second = Trajectory((turn([20], [21, 1], 2.0),), np.array([]), False, True)
    return PackedBatch.from_arrays(pack_trajectories([first, second]))


def some_alternatives() -> Alternatives:
    """Turn 1 of game 0: 17 18 1; turn 0 of game 0: 19 1; turn 2 (game 1): 22, cut before its stop."""
    return Alternatives(
        action_ids=torch.tensor([[[17, 18, 1], [19, 1, 1]], [[22, 1, 1], [1, 1, 1]]], dtype=torch.int32),
        logprobs=torch.tensor([[[-1.0, -2.0, -3.0], [-4.0, -5.0, 0.0]], [[-6.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]),
        lengths=torch.tensor([[3, 2], [1, 0]]),
        turn_ids=torch.tensor([[1, 0], [2, -1]]),
    )


def test_a_batch_as_tensors() -> None:
    batch = two_games()
    as_lists = {name: getattr(batch, name).tolist() for name in PackedBatch.__slots__ if name[0] not in "ln"}
    assert as_lists == {
        "input_ids": [10, 11, 12, 1, 13, 14, 15, 1, 16, 20, 21, 1],
        "position_ids": [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2],
        "cu_seqlens": [0, 9, 12],
        "turn_ids": [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2],
        "action_mask": [False, False, True, True, False, True, True, True, False, False, True, True],
        "cu_turns": [0, 2, 3],
        "state_positions": [1, 4, 9],
        "action_positions": [3, 7, 11],
        "final_positions": [8, 11],
        "turn": [0, 1, 0],
        "rewards": [-1.0, 0.0, 2.0],
        "returns": [-1.0, 0.0, 2.0],
        "policy_versions": [3, 3, 3],
        "terminated": [True, False],
        "truncated": [False, True],
        "rollout_logprobs": [0, 0, -1, -2, 0, -1, -2, -3, 0, 0, -1, -2],
    }
    assert (batch.lengths, batch.num_turns, batch.num_tokens) == ((9, 3), (2, 1), 12)
    assert batch.action_rows.tolist() == [2, 3, 5, 6, 7, 10, 11]
    assert batch.trajectory.tolist() == [0, 0, 1]
    assert batch.is_last.tolist() == [False, True, True]


def test_a_tree_by_hand(make_lm: Callable[..., Any]) -> None:
    batch = two_games()
    backbone = Backbone(make_lm(), None)
    tree = plant_tree(batch, some_alternatives(), backbone.layout(batch.cu_seqlens, batch.lengths))
    assert tree.input_ids.tolist() == [*batch.input_ids.tolist(), 17, 18, 1, 19, 1, 22]
    assert tree.position_ids.tolist() == [*batch.position_ids.tolist(), 5, 6, 7, 2, 3, 1]
    assert tree.rows.tolist() == [4, 12, 13, 1, 15, 9]
    assert tree.target_ids.tolist() == [17, 18, 1, 19, 1, 22]
    assert tree.branch_ids.tolist() == [0, 0, 0, 1, 1, 2]
    assert tree.rollout_logprobs.tolist() == [-1, -2, -3, -4, -5, -6]
    assert tree.state_positions.tolist() == [4, 1, 9]
    assert tree.action_positions.tolist() == [14, 16, 17]
    assert tree.turn_ids.tolist() == [1, 0, 2]
    assert tree.num_branches == 3


def random_game(rng: np.random.Generator, num_turns: int) -> Trajectory:
    def ids(low: int, high: int) -> list[int]:
        return rng.integers(0, 37, rng.integers(low, high)).tolist()

    turns = tuple(turn(ids(1, 7), ids(1, 5)) for _ in range(num_turns))
    return Trajectory(turns, np.array(ids(0, 3)), True, False)


def random_tree(rng: np.random.Generator) -> tuple[PackedBatch, Alternatives]:
    batch = PackedBatch.from_arrays(pack_trajectories([random_game(rng, n) for n in (3, 1, 5, 1, 2)]))
    rows, width = 4, 5
    turn_ids = torch.full((5, rows), -1)
    for game, first in enumerate(batch.cu_turns[:-1].tolist()):
        used = int(rng.integers(0, rows + 1)) if game else rows
        turn_ids[game, :used] = torch.from_numpy(first + rng.integers(0, batch.num_turns[game], used))
    lengths = torch.from_numpy(rng.integers(1, width + 1, (5, rows))) * (turn_ids >= 0)
    action_ids = torch.from_numpy(rng.integers(0, 37, (5, rows, width))).int()
    return batch, Alternatives(action_ids, torch.zeros(5, rows, width), lengths, turn_ids)


def parameter_gradients(backbone: Backbone) -> list[Tensor]:
    found = [p.grad.clone() for p in backbone.parameters() if p.grad is not None]
    backbone.zero_grad()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_branches_score_as_sequences_of_their_own(make_lm: Callable[..., Any], family: str) -> None:
    """Log-probs at every alternative's tokens, hidden states at its end, and all parameters' gradients."""
    backbone = Backbone(make_lm(family), None)
    batch, alternatives = random_tree(np.random.default_rng(2))
    tree = plant_tree(batch, alternatives, backbone.layout(batch.cu_seqlens, batch.lengths))
    hidden = backbone(tree.input_ids, tree.position_ids, tree.layout)
    got = linear_logprobs(hidden, backbone.lm_head_weight, tree.target_ids, rows=tree.rows).logprobs
    got_ends = hidden[tree.action_positions]

    wanted, wanted_ends, wanted_states = [], [], []
    for game, row in alternatives.used.nonzero().tolist():
        own = alternatives.action_ids[game, row, : alternatives.lengths[game, row]]
        state = int(batch.state_positions[alternatives.turn_ids[game, row]])
        prefix = batch.input_ids[int(batch.cu_seqlens[game]) : state + 1]
        ids = torch.cat([prefix, own])
        n = ids.numel()
        layout = backbone.layout(torch.tensor([0, n], dtype=torch.int32), (n,))
        alone = backbone(ids, torch.arange(n), layout)
        logprobs = (alone @ backbone.lm_head_weight.T).log_softmax(-1)
        wanted += [logprobs[i - 1, ids[i]] for i in range(prefix.numel(), n)]
        wanted_ends.append(alone[-1])
        wanted_states.append(alone[prefix.numel() - 1])
    assert len(wanted_ends) == tree.num_branches > 8
    torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_ends, torch.stack(wanted_ends), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden[tree.state_positions], torch.stack(wanted_states), rtol=1e-5, atol=1e-5)

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(got.shape, generator=generator)
    end_weight = torch.randn(got_ends.shape, generator=generator)
    ((got * weight).sum() + (got_ends * end_weight).sum()).backward()
    found = parameter_gradients(backbone)
    ((torch.stack(wanted) * weight).sum() + (torch.stack(wanted_ends) * end_weight).sum()).backward()
    for left, right in zip(found, parameter_gradients(backbone), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5 * right.abs().max().item())


def test_the_trunk_of_a_tree_is_the_plain_batch(make_lm: Callable[..., Any]) -> None:
    backbone = Backbone(make_lm(), None)
    batch, alternatives = random_tree(np.random.default_rng(2))
    layout = backbone.layout(batch.cu_seqlens, batch.lengths)
    tree = plant_tree(batch, alternatives, layout)
    with_branches = backbone(tree.input_ids, tree.position_ids, tree.layout)[: batch.num_tokens]
    torch.testing.assert_close(
        with_branches, backbone(batch.input_ids, batch.position_ids, layout), rtol=1e-5, atol=1e-5
    )


def test_a_tree_without_branches(make_lm: Callable[..., Any]) -> None:
    backbone = Backbone(make_lm(), None)
    batch = two_games()
    none = Alternatives(
        action_ids=torch.zeros(2, 3, 2, dtype=torch.int32),
        logprobs=torch.zeros(2, 3, 2),
        lengths=torch.zeros(2, 3, dtype=torch.int64),
        turn_ids=torch.full((2, 3), -1),
    )
    layout = backbone.layout(batch.cu_seqlens, batch.lengths)
    tree = plant_tree(batch, none, layout)
    assert tree.num_branches == tree.rows.numel() == tree.action_positions.numel() == 0
    torch.testing.assert_close(
        backbone(tree.input_ids, tree.position_ids, tree.layout),
        backbone(batch.input_ids, batch.position_ids, layout),
    )


# -- actions that were taken before ----------------------------------------------------------------

ACTION = st.lists(st.integers(0, 2), min_size=1, max_size=3)


@given(st.lists(st.lists(ACTION, min_size=1, max_size=5), min_size=1, max_size=4), st.data())
def test_what_was_said_before_is_found_token_by_token(games: list[list[list[int]]], data: st.DataObject) -> None:
    """Among few short actions of three tokens many are equal, prefixes or anagrams; other games do not count."""
    batch = PackedBatch.from_arrays(
        pack_trajectories([Trajectory(tuple(turn([5], a) for a in g), np.array([6]), True, False) for g in games])
    )
    wanted = [float(action in game[:i]) for game in games for i, action in enumerate(game)]
    assert repeated_actions(batch).tolist() == wanted

    branches = [data.draw(st.lists(st.tuples(st.integers(0, len(g) - 1), ACTION), max_size=3)) for g in games]
    first = np.cumsum([0, *map(len, games)])
    alternatives = Alternatives(
        torch.zeros(len(games), 3, 3, dtype=torch.int32),
        torch.zeros(len(games), 3, 3),
        torch.zeros(len(games), 3, dtype=torch.int64),
        torch.full((len(games), 3), -1),
    )
    for game, own in enumerate(branches):
        for row, (at, action) in enumerate(own):
            alternatives.action_ids[game, row, : len(action)] = torch.tensor(action)
            alternatives.lengths[game, row], alternatives.turn_ids[game, row] = len(action), int(first[game]) + at
    tree = plant_tree(batch, alternatives, PackedLayout(batch.cu_seqlens, batch.lengths, "sdpa"))
    wanted = [float(action in games[g][:at]) for g, own in enumerate(branches) for at, action in own]
    assert repeated_branches(batch, tree).tolist() == wanted


def test_no_two_actions_share_a_digest() -> None:
    """All of one to three of 60 tokens, neighbours in a vocabulary, in every order and length; of half a digest, 2^32,
    as few are equal as by chance (5.6)."""
    tokens, own = torch.arange(60), []
    for length in (1, 2, 3):
        columns = torch.cartesian_prod(*[tokens] * length).view(-1, length)
        places = torch.arange(length).expand_as(columns)
        owner = torch.arange(columns.shape[0]).repeat_interleave(length)
        own.append(_digest(columns.flatten(), places.flatten(), owner, columns.shape[0]))
    digests = torch.cat(own)
    assert digests.unique().numel() == digests.numel() == 60 + 60**2 + 60**3
    for half in (digests >> 32, digests & (1 << 32) - 1):
        assert half.numel() - half.unique().numel() < 20
