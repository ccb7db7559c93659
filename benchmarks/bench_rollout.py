"""Twenty Questions (10 objects) by the default tiny model on one thread: the embedded engine beside the plain way.

The model is untrained, so a game is the worst there is: every turn played, most actions as long as allowed.
extra_info: `ms_per_game`, `tokens` met by the model, `tokens_per_s` of the games' own tokens.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from archer_fast.backbone import Backbone
from archer_fast.envs import get
from archer_fast.rollout.embedded import EmbeddedEngine
from archer_fast.rollout.interact import Engine, FinishedAction, Rollout, play_games
from archer_fast.tiny_model import TinyModel, build_tiny_model

MAX_NEW_TOKENS = 8  # a question of a trained policy
OPTIONS = {"objects": 10}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and on a busy machine waiting for it costs a factor."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy() -> tuple[Backbone, int]:
    return build_tiny_model(get("twenty-questions").vocabulary_text(**OPTIONS), TinyModel(), seed=0)


class FullPrefixEngine:
    """The rival: transformers' `generate` on every game's whole history, left-padded, once a turn."""

    def __init__(self, backbone: Backbone, stop_token_id: int, num_slots: int) -> None:
        self.model = copy.deepcopy(backbone.model)
        self.model.set_attn_implementation("sdpa")
        self.stop_token_id, self.num_slots, self.max_new_tokens = stop_token_id, num_slots, MAX_NEW_TOKENS
        self.max_tokens = backbone.max_positions
        self.num_forward_tokens = 0
        self.histories: list[list[int]] = [[] for _ in range(num_slots)]
        self.answering = [False] * num_slots

    def begin(self, slot: int) -> None:
        self.histories[slot], self.answering[slot] = [], False

    release = begin

    def observe(self, slot: int, observation_ids: Sequence[int]) -> None:
        self.histories[slot] += observation_ids
        self.answering[slot] = True

    def room(self, slot: int) -> int:
        return self.max_tokens - len(self.histories[slot])

    def step(self) -> list[FinishedAction]:
        slots = [s for s in range(self.num_slots) if self.answering[s]]
        width = max(len(self.histories[s]) for s in slots)
        ids = torch.full((len(slots), width), self.stop_token_id)
        for row, slot in enumerate(slots):
            ids[row, width - len(self.histories[slot]) :] = torch.tensor(self.histories[slot])
        starts = torch.tensor([width - len(self.histories[s]) for s in slots])
        mask = (torch.arange(width) >= starts[:, None]).long()
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.stop_token_id,
            use_cache=True,
        )[:, width:]
        self.num_forward_tokens += out.shape[0] * (width + out.shape[1] - 1)
        finished = []
        for row, slot in enumerate(slots):
            action = out[row].tolist()
            if self.stop_token_id in action:
                action = action[: action.index(self.stop_token_id) + 1]
            self.histories[slot] += action
            self.answering[slot] = False
            # generate returns no log-probs; getting them costs the rival another pass, not charged here.
            finished.append(FinishedAction(slot, np.array(action, np.int32), np.zeros(len(action), np.float32)))
        return finished


def play(engine: Engine, tokenizer: Any, num_games: int) -> Rollout:
    task = get("twenty-questions")
    return play_games(
        engine,
        functools.partial(task.make_env, **OPTIONS),
        functools.partial(tokenizer.encode, add_special_tokens=False),
        tokenizer.decode,
        range(num_games),
    )


def measure(benchmark: Any, engine: Any, backbone: Backbone, num_games: int) -> None:
    rollout = benchmark.pedantic(play, (engine, backbone.tokenizer, num_games), rounds=3, warmup_rounds=1)
    assert len(rollout.trajectories) == num_games
    if benchmark.stats is not None:
        best = benchmark.stats.stats.min
        own = sum(game.num_tokens for game in rollout.trajectories)
        benchmark.extra_info["ms_per_game"] = round(best * 1e3 / num_games, 2)
        benchmark.extra_info["tokens"] = engine.num_forward_tokens // 4  # of one round in four
        benchmark.extra_info["tokens_per_s"] = round(own / best)


@pytest.mark.benchmark(group="32 games together")
def test_embedded(benchmark: Any, policy: tuple[Backbone, int]) -> None:
    backbone, stop = policy
    measure(benchmark, EmbeddedEngine(backbone, stop, num_slots=32, max_new_tokens=MAX_NEW_TOKENS), backbone, 32)


@pytest.mark.benchmark(group="32 games together")
def test_generate_on_the_full_prefix(benchmark: Any, policy: tuple[Backbone, int]) -> None:
    backbone, stop = policy
    measure(benchmark, FullPrefixEngine(backbone, stop, 32), backbone, 32)


@pytest.mark.benchmark(group="128 games together")
def test_embedded_128(benchmark: Any, policy: tuple[Backbone, int]) -> None:
    backbone, stop = policy
    measure(benchmark, EmbeddedEngine(backbone, stop, max_new_tokens=MAX_NEW_TOKENS), backbone, 128)
