"""The embedded engine against plain full-prefix forwards: every token and log-prob of many uneven games."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from archer_fast.backbone import Backbone
from archer_fast.batch import PackedBatch
from archer_fast.envs.base import StepResult
from archer_fast.packing import pack_trajectories
from archer_fast.rollout import kv_cache
from archer_fast.rollout.embedded import EmbeddedEngine
from archer_fast.rollout.interact import Opening, Rollout, continue_games, play_games
from archer_fast.trajectory import Trajectory

pytestmark = pytest.mark.usefixtures("one_thread")
STOP, VOCAB = 0, 11  # small, and seed 2 below: random policies of each family that stop soon, but not at once


def encode(text: str) -> list[int]:
    return [ord(c) - ord("a") + 1 for c in text]


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(ord("a") + i - 1) for i in ids)


class Babbler:
    """Says random letters: mostly a few, now and then many; a game lasts 1 to 12 turns."""

    name: ClassVar[str] = "babbler"
    step_time_limit: float | None = None
    max_turns = 12

    def _say(self) -> str:
        length = self.rng.choice([1, 2, 3, 5, 8, 9, 25])
        return "".join(self.rng.choice("abcdefghij") for _ in range(length))

    def reset(self, seed: int, options: Mapping[str, Any] | None = None) -> str:
        self.rng = random.Random(seed)
        self.turns_left = 1 if seed % 5 == 0 else self.rng.randint(1, self.max_turns)
        return self._say()

    def step(self, action: str) -> StepResult:
        assert set(action) <= set("abcdefghij")
        self.turns_left -= 1
        over = self.turns_left == 0
        return StepResult("" if over and self.rng.random() < 0.5 else self._say(), -1.0, over, False, {})


class Endless(Babbler):
    def step(self, action: str) -> StepResult:
        return StepResult("abc", 0.0, False, False, {})


@pytest.fixture
def backbone(make_lm: Callable[..., Any]) -> Backbone:
    return Backbone(make_lm(seed=2, vocab_size=VOCAB, max_position_embeddings=200), None)


def make_engine(backbone: Backbone, seed: int = 0, **options: Any) -> EmbeddedEngine:
    generator = torch.Generator().manual_seed(seed)
    return EmbeddedEngine(backbone, STOP, generator=generator, **({"num_slots": 5, "max_new_tokens": 6} | options))


def play(engine: EmbeddedEngine, num_games: int, env: type[Babbler] = Babbler) -> Rollout:
    return play_games(engine, env, encode, decode, range(num_games))


def full_logprobs(backbone: Backbone, ids: Tensor, temperature: float) -> Tensor:
    """[n, V] from one plain pass over the whole sequence; row i predicts token i + 1."""
    n = ids.numel()
    with torch.no_grad():
        hidden = backbone(ids, torch.arange(n), backbone.layout(torch.tensor([0, n], dtype=torch.int32), (n,)))
        return (hidden @ backbone.lm_head_weight.T / temperature).log_softmax(-1)


def assert_scored_right(
    backbone: Backbone, trajectories: Sequence[Trajectory], temperature: float, atol: float = 1e-5
) -> list[Tensor]:
    """Each recorded log-prob is the plain pass's; returns the plain log-probs [m, V] at each game's action tokens."""
    batch = pack_trajectories(trajectories)
    found = []
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        ids = torch.from_numpy(batch.input_ids[start:end])
        rows = batch.action_mask[start:end].nonzero()[0]
        plain = full_logprobs(backbone, ids, temperature)[rows - 1]
        wanted = plain.gather(1, ids[rows].long()[:, None]).squeeze(1)
        recorded = torch.from_numpy(batch.rollout_logprobs[start:end][rows])
        torch.testing.assert_close(recorded, wanted, rtol=1e-5, atol=atol)
        found.append(plain)
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_tokens_and_logprobs_are_those_of_a_full_prefix(
    make_lm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, family: str, temperature: float
) -> None:
    groups: list[tuple[bool, bool]] = []  # (every game at once, wide)
    add_group = kv_cache._SlotPass._add_group

    def spy(self: Any, tokens: Tensor | None, slots: Any, rows: Any, num_rows: int, width: int) -> None:
        groups.append((tokens is None, width > self.WIDE))
        add_group(self, tokens, slots, rows, num_rows, width)

    monkeypatch.setattr(kv_cache._SlotPass, "_add_group", spy)
    backbone = Backbone(make_lm(family, seed=2, vocab_size=VOCAB, max_position_embeddings=200), None)
    engine = make_engine(backbone, temperature=temperature)
    rollout = play(engine, 43)
    games = rollout.trajectories
    assert len(games) == 43 and rollout.num_dropped == 0
    assert_scored_right(backbone, games, temperature)

    # What was meant to happen did: both group kinds, rows grown twice, refills, stopped and cut actions.
    assert {(True, False), (False, False), (False, True)} == set(groups)
    assert engine._cache._capacity_of(0) == 200
    endings = [int(t.action_ids[-1]) == STOP for game in games for t in game.turns]
    assert any(endings) and not all(endings)
    assert all(t.action_ids.size <= 6 and STOP not in t.action_ids[:-1] for g in games for t in g.turns)
    assert {g.num_turns for g in games} >= {1, 2, 5, 10}

    # Each token met the model once; a game's last action token and final observation never did.
    expected = sum(g.num_tokens - g.final_observation_ids.size - 1 for g in games)
    assert engine.num_forward_tokens == expected


def test_greedy_takes_the_most_likely_token(backbone: Backbone) -> None:
    games = play(make_engine(backbone, greedy=True), 12).trajectories
    for game, plain in zip(games, assert_scored_right(backbone, games, 1.0), strict=True):
        actions = np.concatenate([t.action_ids for t in game.turns])
        chosen = plain.gather(1, torch.from_numpy(actions).long()[:, None]).squeeze(1)
        torch.testing.assert_close(chosen, plain.amax(1), rtol=1e-5, atol=1e-5)
    again = play(make_engine(backbone, seed=9, greedy=True), 12).trajectories
    assert [g.input_ids.tolist() for g in games] == [g.input_ids.tolist() for g in again]


def openings_of(games: Sequence[Trajectory]) -> list[Opening]:
    """Every game at every turn; the seed says which."""
    openings = []
    for g, game in enumerate(games):
        for turn in range(game.num_turns):
            env = Babbler()
            said = encode(env.reset(game.info["seed"]))
            for played in game.turns[:turn]:
                ids = played.action_ids.tolist()
                reply = env.step(decode(ids[:-1] if ids[-1] == STOP else ids)).text
                said += ids + encode(reply)
            openings.append(Opening(env, said, 100 * g + turn))
    return openings


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_greedy_game_in_mid_air_goes_on_as_if_it_had_not_stopped(make_lm: Callable[..., Any], family: str) -> None:
    backbone = Backbone(make_lm(family, seed=2, vocab_size=VOCAB, max_position_embeddings=200), None)
    games = play(make_engine(backbone, greedy=True), 12).trajectories
    openings = openings_of(games)
    rests = continue_games(make_engine(backbone, greedy=True), openings, encode, decode).trajectories
    assert len(rests) == len(openings) == sum(game.num_turns for game in games) > 40
    for rest in rests:
        g, turn = divmod(rest.info["seed"], 100)
        assert rest.input_ids.tolist() == games[g].input_ids.tolist()
        wanted = [t.action_ids.tolist() for t in games[g].turns[turn:]]
        assert [t.action_ids.tolist() for t in rest.turns] == wanted
        for ours, theirs in zip(rest.turns, games[g].turns[turn:], strict=True):
            np.testing.assert_allclose(ours.rollout_logprobs, theirs.rollout_logprobs, atol=1e-5)


def test_a_sampled_continuation_has_the_distribution_of_the_uninterrupted_game(backbone: Backbone) -> None:
    openings = openings_of(play(make_engine(backbone), 12).trajectories)
    rests = continue_games(make_engine(backbone, seed=5, temperature=0.7), openings, encode, decode).trajectories
    assert_scored_right(backbone, rests, 0.7)


def test_the_generator_alone_decides(backbone: Backbone) -> None:
    def tokens(seed: int) -> list[list[int]]:
        return [g.input_ids.tolist() for g in play(make_engine(backbone, seed), 15).trajectories]

    torch.manual_seed(0)
    first = tokens(1)
    torch.manual_seed(1)
    assert tokens(1) == first
    assert tokens(2) != first


def test_one_engine_plays_again_after_new_weights(backbone: Backbone) -> None:
    engine = make_engine(backbone)
    play(engine, 7)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(0.9)
    engine.reset()
    assert_scored_right(backbone, play(engine, 7).trajectories, 1.0)


def test_a_full_window_truncates_and_is_counted(make_lm: Callable[..., Any]) -> None:
    backbone = Backbone(make_lm(seed=2, vocab_size=VOCAB, max_position_embeddings=61), None)
    rollout = play(make_engine(backbone, num_slots=3), 7, Endless)
    assert rollout.num_truncated_by_window == 7 == len(rollout.trajectories)
    assert_scored_right(backbone, rollout.trajectories, 1.0)
    for game in rollout.trajectories:
        assert game.truncated and not game.terminated
        assert game.num_tokens <= 61
        assert game.num_tokens + 3 + 6 > 61  # not before there was need
        assert game.final_observation_ids.size == min(3, 61 - (game.num_tokens - game.final_observation_ids.size))


def test_a_prompt_longer_than_the_window_is_dropped_not_cut(make_lm: Callable[..., Any]) -> None:
    class LongFirst(Babbler):
        def reset(self, seed: int, options: Mapping[str, Any] | None = None) -> str:
            return super().reset(seed) if seed else "a" * 15

    backbone = Backbone(make_lm(seed=2, vocab_size=VOCAB, max_position_embeddings=20), None)
    rollout = play_games(make_engine(backbone), LongFirst, encode, decode, [1, 0, 2], max_dropped_share=0.5)
    assert [g.info["seed"] for g in rollout.trajectories] == [1, 2]
    assert list(rollout.drop_causes) == [
        "the first observation has 15 tokens: more than the model's window leaves room for"
    ]


def test_slots_by_hand(backbone: Backbone) -> None:
    engine = make_engine(backbone, num_slots=2, max_new_tokens=1)
    assert engine.step() == []
    assert engine.room(1) == 200
    engine.begin(1)
    engine.observe(1, [3, 4, 5])
    assert engine.room(1) == 197
    (action,) = engine.step()
    assert action.slot == 1 and action.action_ids.shape == action.logprobs.shape == (1,)
    assert engine.room(1) == 196  # the sampled token is not in the cache yet, but it has its place
    assert engine.step() == []  # owes nothing until the environment speaks
    engine.release(1)
    assert engine.room(1) == 200
    with pytest.raises(ValueError, match="a game of 201 tokens does not fit the cache of max_tokens=200"):
        engine.observe(0, [1] * 201)
        engine.step()


def test_a_sliding_window_is_refused_once_it_would_matter(make_lm: Callable[..., Any]) -> None:
    backbone = Backbone(make_lm("mistral", vocab_size=VOCAB, sliding_window=8), None)
    engine = make_engine(backbone, max_new_tokens=1)
    engine.observe(0, [1] * 8)
    engine.step()
    engine.observe(0, [1])
    with pytest.raises(ValueError, match=r"keeps no sliding window \(8 tokens\) and this game has 10"):
        engine.step()


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


CHI_SQUARE_10_DOF = 35.6  # exceeded by a true sampler once in 10,000 seeds


def test_samples_follow_the_softmax(backbone: Backbone) -> None:
    engine = make_engine(backbone, num_slots=500, max_new_tokens=1, temperature=1.7)
    counts = torch.zeros(VOCAB)
    for _ in range(12):
        for slot in range(500):
            engine.begin(slot)
            engine.observe(slot, [3, 7])
        tokens = torch.tensor([int(action.action_ids[0]) for action in engine.step()])
        counts += torch.bincount(tokens, minlength=VOCAB)
    probabilities = full_logprobs(backbone, torch.tensor([3, 7]), 1.7)[-1].exp()
    assert chi_square(counts, probabilities) < CHI_SQUARE_10_DOF
    assert chi_square(counts, full_logprobs(backbone, torch.tensor([3, 7]), 1.5)[-1].exp()) > CHI_SQUARE_10_DOF


def test_a_token_of_probability_zero_is_never_drawn(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last column are the edges of the inverse CDF, 0 and nearly 1 those of the random number."""
    engine = make_engine(backbone)
    with torch.no_grad():
        backbone.lm_head_weight.zero_()
        backbone.lm_head_weight[[0, 4, VOCAB - 1], 0] = -2000.0
    tokens, logprobs = engine._sample(torch.ones(20_000, 24))
    assert set(tokens.tolist()) == set(range(VOCAB)) - {0, 4, VOCAB - 1}
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -np.log(VOCAB - 3)))
    for point, token in ((0.0, 1), (1 - 2**-53, VOCAB - 2)):
        monkeypatch.setattr(
            torch, "rand", lambda *shape, point=point, **_: torch.full(shape, point, dtype=torch.double)
        )
        assert engine._sample(torch.ones(1, 24))[0].tolist() == [token]


def replayed(backbone: Backbone, num_games: int) -> PackedBatch:
    return PackedBatch.from_arrays(pack_trajectories(play(make_engine(backbone), num_games).trajectories))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_alternatives_are_scored_by_the_plain_forward(
    make_lm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, family: str, temperature: float
) -> None:
    grids: list[tuple[int, ...]] = []
    keep = kv_cache.BranchCache.keep
    monkeypatch.setattr(
        kv_cache.BranchCache,
        "keep",
        lambda self, rows: grids.append((keep(self, rows), self._prefix_mask.shape[:2])[1]),
    )
    backbone = Backbone(make_lm(family, seed=2, vocab_size=VOCAB, max_position_embeddings=400), None)
    batch = replayed(backbone, 9)
    rng = np.random.default_rng(0)
    turn_ids = torch.full((9, 16), -1)
    for game, first in enumerate(batch.cu_turns[:-1].tolist()):
        used = 0 if game == 4 else int(rng.integers(1, 17))
        turn_ids[game, :used] = torch.from_numpy(first + rng.integers(0, batch.num_turns[game], used))
    engine = make_engine(backbone, max_new_tokens=100, temperature=temperature)
    got = engine.sample_alternatives(batch, turn_ids)
    games, widths = map(set, zip(*grids, strict=True))
    assert len(games) > 1 and len(widths) > 2, "the grid was meant to shrink with the branches that are left"

    assert torch.equal(got.turn_ids, turn_ids)
    assert torch.equal(got.used, turn_ids >= 0)
    assert got.action_ids.dtype == torch.int32 and got.lengths.max() == got.action_ids.shape[2]
    behind = torch.arange(got.action_ids.shape[2]) >= got.lengths[..., None]
    assert (got.action_ids[behind] == STOP).all() and (got.logprobs[behind] == 0).all()
    for game, row in got.used.nonzero().tolist():
        n = int(got.lengths[game, row])
        action = got.action_ids[game, row, :n]
        assert STOP not in action[:-1] and (n == 100 or action[-1] == STOP)
        state = int(batch.state_positions[turn_ids[game, row]])
        ids = torch.cat([batch.input_ids[int(batch.cu_seqlens[game]) : state + 1], action])
        plain = full_logprobs(backbone, ids, temperature)[-n - 1 : -1]
        wanted = plain.gather(1, action.long()[:, None]).squeeze(1)
        torch.testing.assert_close(got.logprobs[game, row, :n], wanted, rtol=1e-5, atol=1e-5)


def test_alternatives_follow_the_softmax(backbone: Backbone) -> None:
    batch = replayed(backbone, 3)
    turn = int(batch.cu_turns[1]) + 1  # the second turn of game 1
    turn_ids = torch.full((3, 6000), -1)
    turn_ids[1] = turn
    got = make_engine(backbone, max_new_tokens=1).sample_alternatives(batch, turn_ids)
    prefix = batch.input_ids[int(batch.cu_seqlens[1]) : int(batch.state_positions[turn]) + 1]
    counts = torch.bincount(got.action_ids[1, :, 0].long(), minlength=VOCAB)
    assert chi_square(counts, full_logprobs(backbone, prefix, 1.0)[-1].exp()) < CHI_SQUARE_10_DOF


def test_alternatives_by_seed_and_none_at_all(backbone: Backbone) -> None:
    batch = replayed(backbone, 4)
    turn_ids = batch.cu_turns[:-1].long()[:, None].repeat(1, 5)
    first, second, other = (make_engine(backbone, s).sample_alternatives(batch, turn_ids) for s in (1, 1, 2))
    assert torch.equal(first.action_ids, second.action_ids) and torch.equal(first.logprobs, second.logprobs)
    assert first.action_ids.shape != other.action_ids.shape or not torch.equal(first.action_ids, other.action_ids)
    none = make_engine(backbone).sample_alternatives(batch, torch.full((4, 2), -1))
    assert not none.used.any() and none.action_ids.shape == (4, 2, 1)


def test_forward_tokens_of_alternatives(backbone: Backbone) -> None:
    """The prefill once, then the branches that are still carried."""
    batch = replayed(backbone, 4)
    engine = make_engine(backbone, max_new_tokens=1)
    engine.sample_alternatives(batch, batch.cu_turns[:-1].long()[:, None].repeat(1, 3))
    assert engine.num_forward_tokens == batch.num_tokens


@pytest.mark.parametrize("window", [8, 90])
def test_alternatives_know_a_sliding_window_only_where_it_hides_nothing(
    make_lm: Callable[..., Any], window: int
) -> None:
    backbone, free = (Backbone(make_lm("mistral", vocab_size=VOCAB, sliding_window=w), None) for w in (window, None))
    batch = replayed(free, 1)
    turn_ids = torch.zeros(1, 3, dtype=torch.int64)
    if window < batch.num_tokens:
        with pytest.raises(ValueError, match=r"branches keep no sliding window \(8 tokens\)"):
            make_engine(backbone).sample_alternatives(batch, turn_ids)
    else:
        got, wanted = (make_engine(b).sample_alternatives(batch, turn_ids) for b in (backbone, free))
        assert torch.equal(got.action_ids, wanted.action_ids) and torch.equal(got.logprobs, wanted.logprobs)
