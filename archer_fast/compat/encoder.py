"""The original critic's text encoder: each string encoded once, in batches of strings of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from archer_fast.compat.token_cache import TokenCache
from archer_fast.packing import Int64

# Of one encoder batch, padding included: on a CPU what stays in its caches (1.14 times as fast as 8,192).
MAX_BATCH_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 14}

_CACHES: WeakKeyDictionary[Any, TokenCache] = WeakKeyDictionary()


def tokens_of(critic: Any) -> TokenCache:
    """The token cache of a critic's own tokenizer."""
    found = _CACHES.get(critic)
    if found is None or found.tokenizer is not critic.base_tokenizer:
        found = _CACHES[critic] = TokenCache(critic.base_tokenizer)
    return found


def encode(critic: Any, texts: Sequence[str], tokens: TokenCache) -> Tensor:
    """The encoder's pooled states [n, in_dim] of n texts, equal texts encoded once; differentiable.

    Batches are padded on the right as far as their longest text asks for, and masked: a text's state does not depend
    on who shares its batch.
    """
    unique = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(unique)}
    ids = tokens(unique)
    pad = critic.base_tokenizer.pad_token_id
    states: list[Tensor] = []
    order: list[int] = []
    device = torch.device(critic.device)
    most = MAX_BATCH_TOKENS.get(device.type, MAX_BATCH_TOKENS["cpu"])
    for batch in by_length([len(own) for own in ids], most):
        width = max(len(ids[i]) for i in batch)
        rows = np.full((len(batch), width), 0 if pad is None else pad, np.int64)
        mask = np.zeros((len(batch), width), np.int64)
        for row, i in enumerate(batch):
            rows[row, : len(ids[i])], mask[row, : len(ids[i])] = ids[i], 1
        out = critic.base_lm(
            input_ids=torch.from_numpy(rows).to(device), attention_mask=torch.from_numpy(mask).to(device)
        )
        states.append(out.pooler_output)
        order += batch
    where = torch.empty(len(unique), dtype=torch.int64)
    where[torch.tensor(order)] = torch.arange(len(unique))
    wanted = where[torch.tensor([place[text] for text in texts])]
    return torch.cat(states)[wanted.to(states[0].device)]


def by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of at most `max_tokens` padded tokens, none padded by more than a sixteenth."""
    batch: list[int] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        longest = lengths[batch[0]] if batch else 0
        if batch and ((len(batch) + 1) * longest > max_tokens or 16 * lengths[i] < 15 * longest):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def chunks_of_pairs(observations: Sequence[int], actions: Sequence[int], max_tokens: int) -> list[Int64]:
    """Transitions in groups whose observations and actions together have at most `max_tokens` tokens, equal and
    equally long observations beside one another.

    observations, actions: [n] their tokens.
    """
    cost = np.asarray(observations, np.int64) + np.asarray(actions, np.int64)
    order = np.argsort(-np.asarray(observations), kind="stable")
    group = np.cumsum(cost[order]) // max(max_tokens, int(cost.max(initial=1)))
    return [order[group == g] for g in np.unique(group)]


def heads(critic: Any, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q1, q2 of (state, action) and v1, v2 of the state: states [n, in_dim] -> [n, out_dim] each."""
    both = torch.cat([state, action], dim=1)
    return critic.critic1(both), critic.critic2(both), critic.v_critic1(state), critic.v_critic2(state)
