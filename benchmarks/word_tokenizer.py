"""A fast byte-level BPE that is trained on the spot: every word of a made-up language is one of its tokens.

So a text of n words has n tokens, and tokenising it gives back the ids that it was written from.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

NUM_WORDS = 4096
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"


class WordTokenizer(NamedTuple):
    """Three words of a language: WordTokenizer(..., words=[" ba", " doki", " zu"], ids=[260, 391, 288])."""

    tokenizer: Tokenizer
    words: list[str]  # the space before each is part of it
    ids: np.ndarray  # [NUM_WORDS] int32, each word's token

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()


def make_words(rng: np.random.Generator) -> list[str]:
    """Distinct, of 1 to 4 syllables: 6 characters with the space, as a token of GPT-2 has 4 to 5 of English."""
    words: dict[str, None] = {}
    while len(words) < NUM_WORDS:
        syllables = rng.choice([1, 2, 3, 4], p=[0.1, 0.5, 0.3, 0.1])
        words[" " + "".join(rng.choice(list(CONSONANTS)) + rng.choice(list(VOWELS)) for _ in range(syllables))] = None
    return list(words)


def train_word_tokenizer(seed: int = 0) -> WordTokenizer:
    words = make_words(np.random.default_rng(seed))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Room for every merge: training ends when nothing is left to merge, so when every word is a token.
    trainer = trainers.BpeTrainer(
        vocab_size=2**16,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(words)]
    assert all(len(word) == 1 for word in ids)
    return WordTokenizer(tokenizer, words, np.array(ids, np.int32).reshape(-1))
