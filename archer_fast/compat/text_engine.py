"""Sampling of texts as `generate` does it, in packed passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archer_fast.backbone import Backbone
from archer_fast.rollout.embedded import EmbeddedEngine


def strip_newlines(text: str) -> str:
    """`text` without its first newlines, three at most."""
    for _ in range(3):
        text = text.removeprefix("\n")
    return text


class TextEngine(EmbeddedEngine):
    """Sampling as `generate` does it, ended by a text instead of a token."""

    def __init__(
        self, backbone: Backbone, agent: Any, may_end: Tensor | None, eos_ids: list[int], *, top_k: int
    ) -> None:
        super().__init__(
            backbone, eos_ids[0] if eos_ids else 0, num_slots=1, max_new_tokens=int(agent.max_new_tokens),
            temperature=float(agent.temperature), greedy=not agent.do_sample,
        )  # fmt: skip
        self.tokenizer, self.eos_str, self.top_k = agent.tokenizer, agent.eos_str, top_k
        self.may_end = None if may_end is None else may_end.to(backbone.device)
        self.eos_ids = torch.tensor(eos_ids, dtype=torch.int64, device=backbone.device)

    def texts(self, ids: list[list[int]]) -> list[str]:
        found: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return found

    def _sample(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [n, H] -> token ids [n]; the log-probs [n], which nobody reads, are 0."""
        weight = self.backbone.lm_head_weight
        k = min(self.top_k, weight.shape[0])
        if not self.greedy and k == 0:
            return super()._sample(hidden)
        found = []
        for part in hidden.split(max(1, (1 << 24) // weight.shape[0])):
            logits = (part @ weight.T).float()
            if self.greedy:
                found.append(logits.argmax(-1))
            else:
                values, ids = (logits / self.temperature).topk(k)
                found.append(ids.gather(1, values.softmax(-1).multinomial(1)).squeeze(1))
        tokens = torch.cat(found)
        return tokens, torch.zeros(tokens.shape, device=tokens.device)

    def _ends(self, tokens: Tensor, action_ids: Tensor) -> Tensor:
        ended = torch.isin(tokens, self.eos_ids)
        if self.may_end is not None:
            doubtful = (self.may_end[tokens] & ~ended).nonzero().squeeze(1)
            if doubtful.numel():
                texts = self.texts(action_ids[doubtful].tolist())
                over = [self.eos_str in strip_newlines(text) for text in texts]
                ended[doubtful] = torch.tensor(over, device=ended.device)
        return ended
