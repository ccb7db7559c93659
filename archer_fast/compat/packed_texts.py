"""Texts laid on few packed passes of a causal LM: prompts, and actions behind them, each text tokenised once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from archer_fast.backbone import Backbone
from archer_fast.batch import Alternatives, PackedBatch, TreeBatch, plant_tree
from archer_fast.compat.prefixes import branch_rows, group_trunks, share_prefixes, states_batch
from archer_fast.compat.token_cache import TokenCache
from archer_fast.packing import Int64

# Of a pass whose activations are kept for a backward pass: on a CPU more of them only leave its caches. A pass without
# gradients may have NO_GRAD times as many.
MAX_PASS_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 15}
NO_GRAD = 4


class Score(NamedTuple):
    """One pass over some (observation, action) pairs."""

    pairs: Int64  # [n] which of the pairs asked for
    tree: TreeBatch  # whose branch b is pair `pairs[b]`
    hidden: Tensor  # [T + M, H]


class PackedTexts:
    """The packed passes of one tokenizer. A prompt that begins another is computed as part of it.

    `num_*` count what was done.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokens = TokenCache(tokenizer)
        self.num_passes = self.num_tokens = 0

    def scores(self, backbone: Backbone, prompts: Sequence[str], actions: Sequence[str]) -> Iterator[Score]:
        """Passes over all pairs whose action has a token."""
        prompts, ids = list(prompts), self.tokens(actions)
        scored = [i for i, own in enumerate(ids) if own]
        unique, inverse = np.unique(np.array([prompts[i] for i in scored], object), return_inverse=True)
        waiting: list[list[int]] = [[] for _ in unique]
        for place, prompt in zip(scored, inverse.tolist(), strict=True):
            waiting[prompt].append(place)
        counts = np.array([len(own) for own in waiting], np.int64)
        widest = max((len(ids[i]) for i in scored), default=0)
        for batch, rows, asked in self.states(unique.tolist(), counts, widest, backbone.device):
            pairs = np.array([waiting[prompt].pop() for prompt in asked.tolist()], np.int64)
            alternatives = _alternatives([ids[i] for i in pairs], rows)
            tree = plant_tree(batch, alternatives, backbone.layout(batch.cu_seqlens, batch.lengths))
            self.num_tokens += tree.input_ids.numel()
            yield Score(pairs, tree, backbone(tree.input_ids, tree.position_ids, tree.layout))

    def states(
        self, prompts: Sequence[str], counts: Int64, tokens_each: int, device: torch.device
    ) -> Iterator[tuple[PackedBatch, Tensor, Int64]]:
        """Passes in which prompt i gets counts[i] branches of at most `tokens_each` tokens: the states, the branches
        [B, R] as `sample_alternatives` wants them, and the prompt of each used branch, row after row."""
        ids = self.tokens(prompts)
        if empty := [text for text, own in zip(prompts, ids, strict=True) if not own]:
            raise ValueError(f"observation: wanted text of at least one token, got {empty[0]!r}")
        trunks = share_prefixes(ids)
        members: list[list[int]] = [[] for _ in trunks.sequences]
        for prompt, owner in enumerate(trunks.owner.tolist()):
            members[owner].append(prompt)
        max_tokens = MAX_PASS_TOKENS.get(device.type, MAX_PASS_TOKENS["cpu"])
        max_tokens *= 1 if torch.is_grad_enabled() else NO_GRAD
        most = max(1, max_tokens // max(1, tokens_each))  # branches of one sequence in a pass
        pieces: list[tuple[int, Int64]] = []  # sequence, and the prompt of each branch
        for owner, own in enumerate(members):
            asked = np.repeat(own, counts[own])
            pieces += [(owner, part) for part in np.array_split(asked, -(-asked.size // most)) if part.size]
        sizes = [len(trunks.sequences[owner]) for owner, _ in pieces]
        widths = np.array([part.size for _, part in pieces], np.int64)
        for group in group_trunks(sizes, widths, tokens_each, max_tokens):
            sequences, lengths, branches = [], [], []
            for owner, part in (pieces[i] for i in group.tolist()):
                states, turn = np.unique(trunks.length[part], return_inverse=True)
                sequences.append(trunks.sequences[owner])
                lengths.append(states)
                branches.append(turn)
            batch = states_batch(sequences, lengths, device)
            self.num_passes += 1
            yield batch, branch_rows(batch, branches), np.concatenate([pieces[i][1] for i in group.tolist()])


def _alternatives(ids: Sequence[tuple[int, ...]], rows: Tensor) -> Alternatives:
    """Given actions on the used branches of rows [B, R], row after row."""
    device, used = rows.device, rows >= 0
    own = torch.tensor([len(a) for a in ids], device=device)
    action_ids = torch.zeros(*rows.shape, int(own.max()), dtype=torch.int32, device=device)
    lengths = torch.zeros(rows.shape, dtype=torch.int64, device=device)
    lengths[used] = own
    real = torch.arange(action_ids.shape[2], device=device) < lengths[..., None]
    flat = np.concatenate([np.array(a, np.int32) for a in ids])
    action_ids[real] = torch.from_numpy(flat).to(device)
    return Alternatives(action_ids, torch.zeros(action_ids.shape, device=device), lengths, rows)
