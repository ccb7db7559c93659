"""Tiny random decoders."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from archer_fast.backbone import build_causal_lm

# Sizes that share no factor by accident: heads 4 over 2 key-value heads, an odd vocabulary, a head of 6.
_SMALL: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 96,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def tiny_lm(architecture: str = "llama", *, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """tiny_lm("llama", seed=1, max_position_embeddings=64): a random decoder whose distributions are not flat."""
    wanted = _SMALL | sizes
    if architecture == "gpt2":
        del wanted["num_key_value_heads"], wanted["intermediate_size"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_causal_lm(architecture, **wanted)
        for parameter in model.parameters():
            # transformers starts at a standard deviation of .02 and biases of 0: nearly uniform logits, and
            # attention that a wrong mask would hardly change.
            torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
            if parameter.dim() == 1:
                parameter.data.add_(1.0)
    return model.eval()
