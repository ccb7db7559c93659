"""The engine over a sampler with weights of its own: what it asks, and where the answers go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from plain_sampler import PlainSampler
from test_engine import (
    CHI_SQUARE_10_DOF,
    STOP,
    VOCAB,
    Babbler,
    Endless,
    assert_scored_right,
    chi_square,
    decode,
    encode,
    full_logprobs,
)

from archer_fast.backbone import Backbone
from archer_fast.batch import PackedBatch
from archer_fast.config import RolloutConfig, VllmConfig
from archer_fast.packing import pack_trajectories
from archer_fast.rollout import vllm_sampler
from archer_fast.rollout.engines import Engines, check_engine
from archer_fast.rollout.interact import Rollout, play_games
from archer_fast.rollout.probe import check_scores, probe_ids, trainer_logprobs
from archer_fast.rollout.sampler_engine import SamplerEngine
from archer_fast.rollout.token_sampler import SamplerError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def backbone(make_lm: Callable[..., Any]) -> Backbone:
    return Backbone(make_lm(seed=2, vocab_size=VOCAB, max_position_embeddings=200), None)


def make_engine(
    backbone: Backbone, sampler: PlainSampler | None = None, seed: int = 0, **options: Any
) -> SamplerEngine:
    generator = torch.Generator().manual_seed(seed)
    options = {"num_slots": 5, "max_new_tokens": 6} | options
    return SamplerEngine(sampler or PlainSampler(), backbone, STOP, generator=generator, **options)


def play(engine: SamplerEngine, num_games: int, env: type[Babbler] = Babbler) -> Rollout:
    return play_games(engine, env, encode, decode, range(num_games))


def double(backbone: Backbone) -> None:
    """Another policy."""
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(1.5)


def some_turns(backbone: Backbone) -> tuple[PackedBatch, torch.Tensor]:
    """Four games, and [4, 5] turns of them: unsorted, several times, none of the third."""
    games = play(make_engine(backbone), 4).trajectories
    batch = PackedBatch.from_arrays(pack_trajectories(games))
    first = batch.cu_turns[:-1].long()
    last = batch.cu_turns[1:].long() - 1
    turn_ids = torch.stack([last, first, last, torch.full_like(first, -1), last], 1)
    turn_ids[2] = -1
    return batch, turn_ids


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_and_logprobs_are_those_of_a_full_prefix(backbone: Backbone, temperature: float) -> None:
    sampler = PlainSampler()
    engine = make_engine(backbone, sampler, temperature=temperature)
    rollout = play(engine, 23)
    assert len(rollout.trajectories) == 23 and rollout.num_dropped == 0
    assert_scored_right(backbone, rollout.trajectories, temperature)
    assert len(sampler.asked) == sum(game.num_turns for game in rollout.trajectories)
    assert engine.num_forward_tokens == sampler.num_forward_tokens > 0
    endings = [int(turn.action_ids[-1]) == STOP for game in rollout.trajectories for turn in game.turns]
    assert any(endings) and not all(endings)


def test_greedy_asks_for_the_most_likely_token(backbone: Backbone) -> None:
    sampler = PlainSampler()
    games = play(make_engine(backbone, sampler, greedy=True, temperature=0.5), 8).trajectories
    assert {request.temperature for request in sampler.asked} == {0.0}
    for game, plain in zip(games, assert_scored_right(backbone, games, 1.0), strict=True):
        actions = np.concatenate([turn.action_ids for turn in game.turns])
        assert torch.equal(plain.argmax(1), torch.from_numpy(actions).long())


def test_the_generator_alone_decides(backbone: Backbone) -> None:
    def tokens(seed: int) -> list[list[int]]:
        return [game.input_ids.tolist() for game in play(make_engine(backbone, seed=seed), 15).trajectories]

    torch.manual_seed(0)
    first = tokens(1)
    torch.manual_seed(1)
    assert tokens(1) == first != tokens(2)


def test_a_full_window_truncates(backbone: Backbone) -> None:
    """That of the sampler, where it is the smaller one."""
    rollout = play(make_engine(backbone, PlainSampler(max_tokens=40)), 6, Endless)
    assert rollout.num_truncated_by_window == 6
    assert all(40 - 9 < game.num_tokens <= 40 for game in rollout.trajectories)
    assert make_engine(backbone, PlainSampler(max_tokens=1000)).max_tokens == 200


def test_an_interrupted_call_leaves_nothing_behind(backbone: Backbone) -> None:
    sampler = PlainSampler()
    engine = make_engine(backbone, sampler)

    def stop(what: str) -> None:
        if what == "Babbler.step (seed 3)":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play_games(engine, Babbler, encode, decode, range(15), on_call=stop)
    assert len(sampler.requests) > 0
    assert len(play(engine, 9).trajectories) == 9  # the same engine goes on, without the games of before
    assert sampler.calls["cancel"] > 0 and not sampler.requests
    engine.reset()
    assert sampler.calls["forget"] == 2


def test_weights_follow_the_policy(backbone: Backbone) -> None:
    """At a reset and before alternatives, and only where they have changed."""
    sampler = PlainSampler()
    engine = make_engine(backbone, sampler)
    batch, turn_ids = some_turns(backbone)
    for _ in range(2):
        engine.reset()
        engine.sample_alternatives(batch, turn_ids)
    assert sampler.calls["load"] == 1
    double(backbone)
    got = engine.sample_alternatives(batch, turn_ids)
    assert sampler.calls["load"] == 2
    assert_alternatives(backbone, batch, turn_ids, got, 1.0)
    double(backbone)
    engine.reset()
    assert sampler.calls["load"] == 3
    assert_scored_right(backbone, play(engine, 5).trajectories, 1.0)


def assert_alternatives(
    backbone: Backbone, batch: PackedBatch, turn_ids: torch.Tensor, got: Any, temp: float, atol: float = 1e-5
) -> None:
    """Every branch answers its own turn, and is scored by a plain pass."""
    assert torch.equal(got.turn_ids, turn_ids) and torch.equal(got.used, turn_ids >= 0)
    assert got.action_ids.dtype == torch.int32 and got.lengths.max() == got.action_ids.shape[2]
    behind = torch.arange(got.action_ids.shape[2]) >= got.lengths[..., None]
    assert (got.action_ids[behind] == STOP).all() and (got.logprobs[behind] == 0).all()
    for game, row in got.used.nonzero().tolist():
        n = int(got.lengths[game, row])
        action = got.action_ids[game, row, :n]
        state = int(batch.state_positions[turn_ids[game, row]])
        ids = torch.cat([batch.input_ids[int(batch.cu_seqlens[game]) : state + 1], action])
        wanted = full_logprobs(backbone, ids, temp)[-n - 1 : -1].gather(1, action.long()[:, None]).squeeze(1)
        torch.testing.assert_close(got.logprobs[game, row, :n], wanted, rtol=1e-5, atol=atol)


def test_alternatives_are_one_request_a_turn(backbone: Backbone) -> None:
    batch, turn_ids = some_turns(backbone)
    sampler = PlainSampler()
    engine = make_engine(backbone, sampler, temperature=0.6)
    got = engine.sample_alternatives(batch, turn_ids)
    assert_alternatives(backbone, batch, turn_ids, got, 0.6)
    branches = torch.bincount(turn_ids[turn_ids >= 0], minlength=sum(batch.num_turns))
    assert sorted(request.num_samples for request in sampler.asked) == sorted(branches[branches > 0].tolist())
    of_one_turn = got.action_ids[[0, 1, 3]][:, [0, 2, 4]]
    assert not torch.equal(of_one_turn[:, 0], of_one_turn[:, 1]), "each branch is a sample of its own"
    greedy = make_engine(backbone, sampler, greedy=True).sample_alternatives(batch, turn_ids)
    assert sampler.asked[-1].num_samples == 1 and torch.equal(greedy.used, turn_ids >= 0)
    assert torch.equal(greedy.action_ids[:, 0], greedy.action_ids[:, 4]), "the most likely action is one"
    none = engine.sample_alternatives(batch, torch.full((4, 2), -1))
    assert not none.used.any() and none.action_ids.shape == (4, 2, 1)


def test_alternatives_follow_the_softmax(backbone: Backbone) -> None:
    batch, _ = some_turns(backbone)
    turn = int(batch.cu_turns[1])
    turn_ids = torch.full((4, 2000), -1)
    turn_ids[1] = turn
    got = make_engine(backbone, max_new_tokens=1).sample_alternatives(batch, turn_ids)
    prefix = batch.input_ids[int(batch.cu_seqlens[1]) : int(batch.state_positions[turn]) + 1]
    counts = torch.bincount(got.action_ids[1, :, 0].long(), minlength=VOCAB)
    assert chi_square(counts, full_logprobs(backbone, prefix, 1.0)[-1].exp()) < CHI_SQUARE_10_DOF


# -- the probe, and what is refused ----------------------------------------------------------------


def test_the_probe_scores_as_a_plain_pass_does(backbone: Backbone) -> None:
    ids = probe_ids(backbone, 1000)
    assert len(ids) == 32 and set(ids) == set(range(VOCAB)), "the whole vocabulary"
    assert len(probe_ids(backbone, 7)) == 7
    tokens = torch.tensor(ids)
    wanted = full_logprobs(backbone, tokens, 1.0)[:-1].gather(1, tokens[1:, None]).squeeze(1)
    torch.testing.assert_close(trainer_logprobs(backbone, ids), wanted)
    check_scores("it", backbone, ids, wanted.tolist())
    check_scores("it", backbone, ids, (wanted + 9e-4).tolist())


@pytest.mark.parametrize("shift", [2e-3, -2e-3, float("nan")])
def test_the_probe_refuses_other_weights(backbone: Backbone, shift: float) -> None:
    ids = probe_ids(backbone, 1000)
    theirs = (trainer_logprobs(backbone, ids) + shift).tolist()
    with pytest.raises(SamplerError, match=r"vLLM and the trainer score the same 31 tokens .* wanted at most 0.001"):
        check_scores("vLLM", backbone, ids, theirs)


def test_the_probe_allows_for_half_precision(make_lm: Callable[..., Any]) -> None:
    backbone = Backbone(make_lm(seed=2, vocab_size=VOCAB).to(torch.bfloat16), None)
    ids = probe_ids(backbone, 1000)
    scores = trainer_logprobs(backbone, ids)
    check_scores("it", backbone, ids, (scores + 0.4).tolist())
    with pytest.raises(SamplerError, match=r"wanted at most 0\.5"):
        check_scores("it", backbone, ids, (scores + 0.6).tolist())


def test_engines_are_embedded_unless_asked(backbone: Backbone, tmp_path: Any) -> None:
    engines = Engines(RolloutConfig(), backbone, tmp_path, tmp_path)
    assert engines.sampler is None and type(engines.make(backbone, STOP)).__name__ == "EmbeddedEngine"
    engines.close()


def test_vllm_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    check_engine(RolloutConfig(), 2)
    with pytest.raises(ValueError, match=r"rollout\.engine: wanted 'embedded' for 2 ranks, got 'vllm'"):
        check_engine(RolloutConfig(engine="vllm"), 2)
    monkeypatch.setattr(vllm_sampler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed; pip install 'archer-fast\[vllm\]'"):
        check_engine(RolloutConfig(engine="vllm"), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_cache_gb": 0}, "kv_cache_gb: wanted more than 0, got 0"),
        ({"kv_cache_gb": float("inf")}, "kv_cache_gb: wanted more than 0, got inf"),
        ({"max_model_len": 1}, "max_model_len: wanted at least 2, got 1"),
        ({"url": "node7:8000"}, "url: wanted http://HOST:PORT, got 'node7:8000'"),
        ({"exchange": "/dev/shm/x"}, "exchange: wanted None where no url is given"),
        ({"max_num_seqs": 0}, "max_num_seqs: wanted at least 1, got 0"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VllmConfig(**settings)
