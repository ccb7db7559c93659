"""The specification of every op in plain torch: chunked, any dtype, autograd by torch itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def linear_logprobs_ref(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy of each row.

    hidden [N, H], weight [V, H], target_ids [N] int64 -> logprobs [N], entropy [N], both float32.
    At most `chunk_rows` rows of logits exist at a time; each chunk is computed again in backward.
    """

    def chunk(h: Tensor, w: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = (h @ w.T).float() / temperature  # [n, V]
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, targets[:, None]).squeeze(1), entropy

    if hidden.shape[0] <= chunk_rows:
        return chunk(hidden, weight, target_ids)
    parts = [
        checkpoint(chunk, h, weight, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk_rows), target_ids.split(chunk_rows), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
