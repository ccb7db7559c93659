"""Which prompts share a sequence, and which sequences share a pass."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archer_fast.compat.prefixes import branch_rows, group_trunks, share_prefixes, states_batch

prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), min_size=1, max_size=30)


def test_the_docstrings_example() -> None:
    trunks = share_prefixes([(1,), (1, 2), (1, 2, 3), (1, 4)])
    assert trunks.sequences == [(1, 4), (1, 2, 3)]
    assert trunks.owner.tolist() == [1, 1, 1, 0] and trunks.length.tolist() == [1, 2, 3, 2]


@settings(deadline=None)
@given(prompts)
def test_every_prompt_begins_its_sequence_and_no_sequence_begins_another(asked: list[tuple[int, ...]]) -> None:
    trunks = share_prefixes(asked)
    for prompt, owner, length in zip(asked, trunks.owner, trunks.length, strict=True):
        assert trunks.sequences[owner][:length] == prompt
    own = trunks.sequences
    assert not any(a == b[: len(a)] for i, a in enumerate(own) for j, b in enumerate(own) if i != j), "as few as can be"


def test_states_lie_behind_their_prompts() -> None:
    batch = states_batch([(5, 6, 7), (8, 9)], [np.array([1, 3]), np.array([2])], torch.device("cpu"))
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9] and batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.state_positions.tolist() == [0, 2, 4] and batch.turn.tolist() == [0, 1, 0]
    assert batch.lengths == (3, 2) and batch.num_turns == (2, 1)
    rows = branch_rows(batch, [np.array([1, 0, 1]), np.array([0])])
    assert rows.tolist() == [[1, 0, 1], [2, -1, -1]]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 40)), min_size=1, max_size=30), st.integers(1, 8))
def test_passes_hold_all_sequences_and_waste_less_than_half(sizes: list[tuple[int, int]], each: int) -> None:
    lengths, branches = [n for n, _ in sizes], np.array([b for _, b in sizes])
    groups = group_trunks(lengths, branches, each, 200)
    assert sorted(i for group in groups for i in group.tolist()) == list(range(len(sizes)))
    for group in groups:
        widest = branches[group].max()
        assert 2 * branches[group].min() >= widest
        assert len(group) == 1 or sum(lengths[i] + widest * each for i in group) <= 200
