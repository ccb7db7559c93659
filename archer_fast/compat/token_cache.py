"""Token ids of strings, each string tokenised once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

MAX_LENGTH = 512  # tokens of one string, of the original's policy and critic alike
_CAPACITY = 1 << 18  # strings


class TokenCache:
    """`tokenizer(text, max_length=512, truncation=True)`, remembered; the oldest strings go first.

    The tokenizer's own truncation side counts: "left" keeps the newest of a history.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.num_tokenised = 0
        self._ids: dict[tuple[str, str], tuple[int, ...]] = {}

    def __call__(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The ids of each text."""
        side = self.tokenizer.truncation_side
        missing = [text for text in dict.fromkeys(texts) if (side, text) not in self._ids]
        if missing:
            found = self.tokenizer(missing, max_length=MAX_LENGTH, truncation=True)["input_ids"]
            new = {(side, text): tuple(ids) for text, ids in zip(missing, found, strict=True)}
            self.num_tokenised += len(new)
        out = [self._ids[key] if (key := (side, text)) in self._ids else new[key] for text in texts]
        if missing:
            self._ids |= new
            for key in list(islice(self._ids, max(0, len(self._ids) - _CAPACITY))):
                del self._ids[key]
        return out
