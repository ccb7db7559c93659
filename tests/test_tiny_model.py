"""The embedded default model: a tokenizer that loses nothing, and weights that the seed alone decides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archer_fast.backbone import Backbone
from archer_fast.envs import get, play_scripted
from archer_fast.tiny_model import STOP_TOKEN, TinyModel, build_tiny_model, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["Questions:\n", "Is it an animal? Yes.\n", "Is it bigger than a car? No.\n", "Is it a cat? No.\n"] * 5
SIZES = TinyModel(hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=40, max_positions=77)
TOKENIZER = train_tokenizer(TEXTS, 300)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_a_turn_of_the_task_is_short() -> None:
    """Question, stop token and answer: five tokens on average, which is what a rollout costs."""
    task = get("twenty-questions")
    tokenizer = train_tokenizer(task.vocabulary_text(objects=10), 2048)
    games = [play_scripted(task.make_env(objects=10), task.make_player(), seed) for seed in range(20)]
    actions = [action for game in games for action in game.actions]
    answers = [text for game in games for text in (*game.observations[1:], game.final_observation)]
    own = sum(len(tokenizer.encode(text)) for text in (*actions, *answers)) + len(actions)
    assert own / len(actions) < 5


def test_no_token_reaches_beyond_a_line() -> None:
    texts = [TOKENIZER.decode([i]) for i in range(len(TOKENIZER))]
    assert [text for text in texts if "\n" in text[:-1]] == []


def test_turns_tokenise_alone_as_they_do_together() -> None:
    """Pieces end at line breaks and before spaces, so a dialogue in parts has the tokens of the whole."""
    parts = ["Questions:\n", "Is it an animal?", " Yes.\n", "Is it a cat?", " No.\n"]
    assert [i for part in parts for i in TOKENIZER.encode(part)] == TOKENIZER.encode("".join(parts))


def test_the_stop_token_is_one_token_of_its_own() -> None:
    stop = TOKENIZER.eos_token_id
    assert TOKENIZER.encode(STOP_TOKEN) == [stop]
    assert stop not in TOKENIZER.encode(" ".join(TEXTS))
    assert TOKENIZER.pad_token_id == stop


def test_the_vocabulary_stays_within_its_bound() -> None:
    assert len(train_tokenizer(["ab"], 2048)) == 258  # 256 bytes, the stop token, "ab"
    assert len(train_tokenizer(TEXTS, 270)) == 270


def weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    return backbone.model.state_dict()


def test_sizes_reach_the_model() -> None:
    backbone, stop = build_tiny_model(TEXTS, SIZES, seed=0)
    config = backbone.model.config
    assert config.model_type == "llama"
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 40)
    assert (backbone.hidden_size, backbone.num_layers, backbone.max_positions) == (24, 2, 77)
    assert backbone.vocab_size == len(backbone.tokenizer)
    assert backbone.lm_head_weight is backbone.model.get_input_embeddings().weight
    assert stop == backbone.tokenizer.eos_token_id == config.eos_token_id


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, _ = build_tiny_model(TEXTS, SIZES, seed=1)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers are untouched
    torch.manual_seed(6)
    second, _ = build_tiny_model(TEXTS, SIZES, seed=1)
    other, _ = build_tiny_model(TEXTS, SIZES, seed=2)
    assert weights(first).keys() == weights(second).keys()
    assert all(torch.equal(x, weights(second)[name]) for name, x in weights(first).items())
    assert not torch.equal(first.lm_head_weight, other.lm_head_weight)
    assert first.tokenizer.get_vocab() == other.tokenizer.get_vocab()


def test_the_attention_is_handed_on() -> None:
    backbone, _ = build_tiny_model(TEXTS, SIZES, seed=0, attention="reference")
    assert backbone.attention_impl == "reference"
