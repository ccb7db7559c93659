"""Each string is tokenised once, by the tokenizer as it is set, and the oldest are forgotten first."""

from __future__ import annotations

from typing import Any

import pytest

from archer_fast.compat import token_cache
from archer_fast.compat.token_cache import TokenCache


class Letters:
    """A tokenizer whose ids are code points; it remembers what it was asked."""

    truncation_side = "left"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: list[str], max_length: int, truncation: bool) -> dict[str, Any]:
        assert truncation
        self.asked += texts
        cut = slice(-max_length, None) if self.truncation_side == "left" else slice(max_length)
        return {"input_ids": [[ord(c) for c in text][cut] for text in texts]}


def test_a_string_is_tokenised_once() -> None:
    letters = Letters()
    tokens = TokenCache(letters)
    assert tokens(["ab", "c", "ab"]) == [(97, 98), (99,), (97, 98)]
    assert tokens(["c", "", "d"]) == [(99,), (), (100,)]
    assert letters.asked == ["ab", "c", "", "d"] and tokens.num_tokenised == 4


def test_the_tokenizers_truncation_side_counts() -> None:
    letters = Letters()
    tokens, text = TokenCache(letters), "a" * 10 + "b" * 512
    assert tokens([text]) == [(98,) * 512]
    letters.truncation_side = "right"
    assert tokens([text]) == [(97,) * 10 + (98,) * 502]


def test_the_oldest_strings_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_CAPACITY", 2)
    letters = Letters()
    tokens = TokenCache(letters)
    assert tokens(["a", "b", "c"]) == [(97,), (98,), (99,)], "more than it keeps"
    tokens(["b", "c"])
    assert letters.asked == ["a", "b", "c"]
    tokens(["a"])
    assert letters.asked == ["a", "b", "c", "a"]
