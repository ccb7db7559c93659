"""The embedded default model: a tiny Llama with a tokenizer trained on the task's own text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from archer_fast.backbone import Backbone, build_causal_lm, wrap_tokenizer
from archer_fast.config import AttentionImpl, TinyModel

STOP_TOKEN = "<|stop|>"
# About 1/sqrt(hidden_size); at the usual .02 attention starts uniform and evidence is learned late.
INITIALIZER_RANGE = 0.08

# Pieces that merges may not cross: up to three words with their punctuation, as superword tokenizers allow
# (SuperBPE, Liu et al. 2025). "Is it a | common pet? | <stop>" is three tokens and " No.\n" one, so a turn of
# Twenty Questions is five where words alone would make it ten, and every pass over it half as long.
_PIECES = r" ?\p{L}+(?: \p{L}+){0,2}[.?!:]?\n?| ?\p{N}+|[^\s\p{L}\p{N}]+\n?|\s"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer (any text round-trips) whose merges come from `texts`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[STOP_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap_tokenizer(tokenizer, eos_token=STOP_TOKEN)


def build_tiny_model(
    texts: Iterable[str], sizes: TinyModel, *, seed: int, attention: AttentionImpl = "auto"
) -> tuple[Backbone, int]:
    """A randomly initialised tiny Llama for `texts`; returns it with the id of its stop token."""
    tokenizer = train_tokenizer(texts, sizes.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_causal_lm(
            "llama",
            vocab_size=len(tokenizer),
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            num_key_value_heads=sizes.num_kv_heads,
            intermediate_size=sizes.intermediate_size,
            max_position_embeddings=sizes.max_positions,
            initializer_range=INITIALIZER_RANGE,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=int(tokenizer.eos_token_id),
            pad_token_id=int(tokenizer.eos_token_id),
        )
    return Backbone(model, tokenizer, attention), int(tokenizer.eos_token_id)
