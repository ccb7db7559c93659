"""Log-probabilities of given tokens straight from hidden states, the logits never whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from archer_fast.ops.reference import linear_logprobs_ref

CHUNK_BYTES = 32 << 20  # of float32 logits alive at a time


class LinearLogprobs(NamedTuple):
    logprobs: Tensor  # [N] float32
    entropy: Tensor | None  # [N] float32, None unless asked for


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> LinearLogprobs:
    """log p(target_ids[i] | hidden[rows[i]]) under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: [T, H], the states that predict; gathered by `rows` here, so that positions nobody
            scores never meet the vocabulary.
        weight: [V, H], the lm_head.
        target_ids: [N] int64, each in [0, V).
        rows: [N] int64 positions in `hidden`; None scores every row.
        temperature: > 0, that of the sampler.
    Errors: ValueError naming the argument, what was wanted and what came.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden, weight: wanted [T, H] and [V, H], got {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if target_ids.dtype != torch.int64:
        raise TypeError(f"target_ids: wanted int64, got {target_ids.dtype}")
    num_rows = hidden.shape[0] if rows is None else rows.shape[0]
    if target_ids.shape != (num_rows,):
        raise ValueError(f"target_ids: wanted one a scored row ({num_rows}), got {tuple(target_ids.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature: wanted a number above 0, got {temperature}")
    scored = hidden if rows is None else hidden.index_select(0, rows)
    chunk_rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    logprobs, entropy = linear_logprobs_ref(scored, weight, target_ids, temperature, chunk_rows)
    return LinearLogprobs(logprobs, entropy if return_entropy else None)
