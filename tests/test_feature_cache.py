"""The rings of features against a dictionary, over random pushes and evictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from archer_fast.critic import ActionFeatures, GameFeatures, StateFeatures
from archer_fast.feature_cache import FeatureCache

SIZE = 3


class Twin:
    """What the buffer does to ids, and every feature under its id in a dictionary."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.games: dict[int, range] = {}  # live game -> its turn ids
        self.next_turn = self.next_game = 0
        self.state: dict[int, Tensor] = {}
        self.action: dict[int, Tensor] = {}
        self.logprob: dict[int, Tensor] = {}
        self.final: dict[int, Tensor] = {}

    def features(self, n: int) -> Tensor:
        return torch.randn(n, SIZE, generator=self.generator)

    def push(self, cache: FeatureCache, lengths: list[int], max_games: int) -> None:
        """Games of these lengths arrive, the oldest leave, and the cache is told as `Archer.insert` tells it."""
        first_turn, first_game, turns = self.next_turn, self.next_game, sum(lengths)
        state, action, final = self.features(turns), self.features(turns), self.features(len(lengths))
        logprob = torch.randn(turns, generator=self.generator)
        for i in range(turns):
            ids = first_turn + i
            self.state[ids], self.action[ids], self.logprob[ids] = state[i], action[i], logprob[i]
        for i, length in enumerate(lengths):
            self.final[self.next_game] = final[i]
            self.games[self.next_game] = range(self.next_turn, self.next_turn + length)
            self.next_turn, self.next_game = self.next_turn + length, self.next_game + 1
        while len(self.games) > max_games:
            del self.games[min(self.games)]
        turn = torch.zeros(turns, dtype=torch.int64)  # not stored
        made = GameFeatures(
            StateFeatures(state, turn), ActionFeatures(action, logprob), StateFeatures(final, turn[: len(lengths)])
        )
        cache.insert(made, first_turn, first_game, self.live_turns, self.live_games)

    @property
    def live_turns(self) -> tuple[int, int]:
        return self.games[min(self.games)].start, self.next_turn

    @property
    def live_games(self) -> tuple[int, int]:
        return min(self.games), self.next_game

    def assert_equal(self, cache: FeatureCache) -> None:
        """Every live turn, in random order and one of them twice."""
        turns = [(t, game) for game, span in self.games.items() for t in span]
        order = self.rng.permutation(len(turns))
        turns = [turns[i] for i in [*order, order[0]]]
        ids = torch.tensor([t for t, _ in turns])
        games = torch.tensor([game for _, game in turns])
        turn = torch.tensor([t - self.games[game].start for t, game in turns])
        is_last = torch.tensor([t == self.games[game][-1] for t, game in turns])

        states, actions = cache.states(ids, turn), cache.actions(ids)
        assert torch.equal(states.hidden, torch.stack([self.state[t] for t, _ in turns]))
        assert torch.equal(states.turn, turn)
        assert torch.equal(actions.hidden, torch.stack([self.action[t] for t, _ in turns]))
        assert torch.equal(actions.logprob, torch.stack([self.logprob[t] for t, _ in turns]))
        following = cache.next_states(ids, turn, is_last, games)
        wanted = [
            self.final[game] if last else self.state[t + 1] for (t, game), last in zip(turns, is_last, strict=True)
        ]
        assert torch.equal(following.hidden, torch.stack(wanted))
        assert torch.equal(following.turn, turn + 1)


def make_cache(version: int = 5) -> FeatureCache:
    return FeatureCache(SIZE, torch.device("cpu"), trunk_version=version)


@pytest.mark.parametrize("seed", range(4))
def test_every_live_turn_is_read_back_over_random_pushes_and_evictions(seed: int) -> None:
    cache, twin = make_cache(), Twin(seed)
    max_games = [30, 90, 200, 400][seed]  # 1,024 turns and 128 games fit at first: some of these grow, some wrap
    for _ in range(25):
        lengths = twin.rng.integers(1, 21, twin.rng.integers(1, 60)).tolist()
        twin.push(cache, lengths, max_games)
        twin.assert_equal(cache)
    assert twin.next_turn > 3 * 1024, "the ring was meant to wrap"


def test_growth_keeps_what_was_there() -> None:
    cache, twin = make_cache(), Twin(0)
    for _ in range(3):
        twin.push(cache, [20] * 50, max_games=10_000)  # 1,000, 2,000, 3,000 turns; 50, 100, 150 games
        twin.assert_equal(cache)


def test_a_push_that_evicts_everything_and_grows() -> None:
    cache, twin = make_cache(), Twin(1)
    twin.push(cache, [2] * 5, max_games=200)
    twin.push(cache, [10] * 300, max_games=200)  # the first 100 of these are gone again, and 2,000 turns live
    twin.assert_equal(cache)


def test_a_first_push_larger_than_the_buffer() -> None:
    cache, twin = make_cache(), Twin(2)
    twin.push(cache, [10] * 300, max_games=250)
    twin.assert_equal(cache)


def test_a_saved_cache_is_read_and_goes_on_as_the_first() -> None:
    cache, twin = make_cache(), Twin(3)
    twin.push(cache, [20] * 60, max_games=100)
    other = make_cache()
    other.load_state_dict({name: tensor.clone() for name, tensor in cache.state_dict().items()})
    twin.assert_equal(other)
    for _ in range(3):
        state = twin.generator.get_state()
        before = (dict(twin.games), twin.next_turn, twin.next_game)
        twin.push(cache, [15] * 50, max_games=130)
        twin.generator.set_state(state)
        twin.games, twin.next_turn, twin.next_game = before
        twin.push(other, [15] * 50, max_games=130)
        twin.assert_equal(other)
    for name, tensor in cache.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_features_of_another_trunk_are_refused_and_the_cache_stays() -> None:
    saved, mine = make_cache(version=0xAB), make_cache(version=0xCD)
    Twin(0).push(saved, [3], 10)
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    with pytest.raises(ValueError, match=r"cache\.live: features of a trunk 000000ab, but .* is 000000cd"):
        mine.load_state_dict(saved.state_dict())
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, before[name])
