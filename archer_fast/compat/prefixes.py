"""Prompts that begin alike, computed once: every state of a game lies on the game's longest prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from archer_fast.batch import PackedBatch
from archer_fast.packing import Int64, PackedArrays, empty_arrays, packed_sizes


class Trunks(NamedTuple):
    """n prompts laid on few sequences.

    "Q:", "Q: a", "Q: a b", "Q: c": sequences=["Q: c", "Q: a b"], owner=[1, 1, 1, 0], length=[1, 2, 3, 2].
    """

    sequences: list[tuple[int, ...]]  # token ids
    owner: Int64  # [n] which sequence begins with the prompt
    length: Int64  # [n] tokens of the prompt


def share_prefixes(prompts: Sequence[tuple[int, ...]]) -> Trunks:
    """Lay each prompt on a longer one that begins with it, where there is one. Prompts have at least one token."""
    owner, sequences = np.empty(len(prompts), np.int64), list[tuple[int, ...]]()
    # In lexicographic order a prompt that begins any other begins the next one.
    for i in sorted(range(len(prompts)), key=prompts.__getitem__, reverse=True):
        prompt = prompts[i]
        if not sequences or sequences[-1][: len(prompt)] != prompt:
            sequences.append(prompt)
        owner[i] = len(sequences) - 1
    return Trunks(sequences, owner, np.array([len(p) for p in prompts], np.int64))


def states_batch(sequences: Sequence[tuple[int, ...]], lengths: Sequence[Int64], device: torch.device) -> PackedBatch:
    """Sequences as games in which nobody has acted yet; turn j of game b is the state behind its first
    `lengths[b][j]` tokens."""
    num_states, num_tokens = sum(own.size for own in lengths), sum(map(len, sequences))
    a = empty_arrays(PackedArrays, packed_sizes(len(sequences), num_states, num_tokens))
    sizes, counts = [len(s) for s in sequences], [own.size for own in lengths]
    a.cu_seqlens[:] = np.concatenate([[0], np.cumsum(sizes)])
    a.cu_turns[:] = np.concatenate([[0], np.cumsum(counts)])
    starts = a.cu_seqlens[:-1].astype(np.int64)
    a.input_ids[:] = np.concatenate([np.array(s, np.int32) for s in sequences])
    a.position_ids[:] = np.arange(num_tokens) - np.repeat(starts, sizes)
    a.state_positions[:] = np.repeat(starts, counts) + np.concatenate(lengths) - 1
    a.action_positions[:] = a.state_positions
    a.final_positions[:] = a.cu_seqlens[1:] - 1
    a.turn[:] = np.concatenate([np.arange(n) for n in counts])
    for nothing in (a.turn_ids, a.action_mask, a.rewards, a.returns, a.policy_versions, a.rollout_logprobs):
        nothing[:] = 0
    a.terminated[:], a.truncated[:] = True, False
    return PackedBatch.from_arrays(a, device)


def branch_rows(batch: PackedBatch, branches: Sequence[Int64]) -> Tensor:
    """[B, R] int64: the turn of the batch that each branch answers, -1 behind a game's last.

    branches: for each game the turn of the game (0, 1, ..) that each of its branches answers.
    """
    first = np.concatenate([[0], np.cumsum(batch.num_turns)])
    rows = np.full((len(branches), max(own.size for own in branches)), -1, np.int64)
    for b, own in enumerate(branches):
        rows[b, : own.size] = first[b] + own
    return torch.from_numpy(rows).to(batch.input_ids.device)


def group_trunks(lengths: Sequence[int], num_branches: Int64, tokens_each: int, max_tokens: int) -> list[Int64]:
    """Which sequences share a pass: about equally many branches each, at most `max_tokens` tokens with them.

    Attention lays branches on a grid of games times the most branches of any, so no game of a pass has fewer than half
    of that. tokens_each: of a branch, at most.
    """
    groups, own, tokens, widest = list[Int64](), list[int](), 0, 0
    for i in np.argsort(-num_branches, kind="stable").tolist():
        cost = lengths[i] + (widest or int(num_branches[i])) * tokens_each
        if own and (tokens + cost > max_tokens or 2 * num_branches[i] < widest):
            groups.append(np.array(own))
            own, tokens = [], 0
        if not own:
            widest = int(num_branches[i])
            cost = lengths[i] + widest * tokens_each
        own.append(i)
        tokens += cost
    return [*groups, np.array(own)] if own else groups
