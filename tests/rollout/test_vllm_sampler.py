"""vLLM as it runs (CPU): what it samples is the trainer's policy, before and after every update."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
from test_sampler_engine import assert_alternatives, some_turns
from tiny_lm import tiny_lm

from archer_fast.backbone import Backbone
from archer_fast.batch import PackedBatch
from archer_fast.config import VllmConfig
from archer_fast.packing import pack_trajectories
from archer_fast.rollout import vllm_sampler
from archer_fast.rollout.interact import Rollout, play_games
from archer_fast.rollout.probe import trainer_logprobs
from archer_fast.rollout.sampler_engine import SamplerEngine
from archer_fast.rollout.token_sampler import SamplerError
from archer_fast.rollout.vllm_sampler import VllmSampler

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_thread")]
SMALL = VllmConfig(kv_cache_gb=0.25)
BOUND = 1e-4  # nats a token, the largest difference between trainer and engine in float32; seen: 2e-5
PROBE = [7, 3, 9, 1, 5, 10, 2, 8, 4, 6] * 6


class NoTokenizer:
    """Nothing is saved beside the model: vLLM gets tokens, and needs none."""

    def save_pretrained(self, folder: Path) -> None: ...


def policy(**sizes: Any) -> Backbone:
    """A random llama with the head size that vLLM's attention on CPUs knows; tied, as our tiny model is."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True} | sizes
    model = tiny_lm(seed=2, vocab_size=VOCAB, max_position_embeddings=200, **sizes)
    return Backbone(model, NoTokenizer())


def change(backbone: Backbone, seed: int) -> None:
    """What an update would do, and more of it."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmSampler]:
    """One for the whole module: every test has it take over its own policy."""
    folder = tmp_path_factory.mktemp("policy")
    backbone = policy()
    backbone.save(folder)
    made = VllmSampler(SMALL, backbone, folder)
    yield made
    made.close()


def make_engine(sampler: VllmSampler, backbone: Backbone, seed: int = 0, **options: Any) -> SamplerEngine:
    generator = torch.Generator().manual_seed(seed)
    return SamplerEngine(
        sampler, backbone, STOP, generator=generator, **({"num_slots": 5, "max_new_tokens": 6} | options)
    )


def play(engine: SamplerEngine, num_games: int, env: type[Babbler] = Babbler) -> Rollout:
    return play_games(engine, env, encode, decode, range(num_games))


def scores(sampler: VllmSampler) -> torch.Tensor:
    """What the engine makes of PROBE."""
    return torch.tensor(sampler._score(PROBE))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_tokens_and_logprobs_are_the_trainers(sampler: VllmSampler, temperature: float) -> None:
    backbone = policy()
    rollout = play(make_engine(sampler, backbone, temperature=temperature), 23)
    games = rollout.trajectories
    assert len(games) == 23 and rollout.num_dropped == 0
    worst = 0.0
    for game, plain in zip(games, assert_scored_right(backbone, games, temperature, atol=BOUND), strict=True):
        actions = torch.from_numpy(np.concatenate([turn.action_ids for turn in game.turns])).long()
        recorded = torch.from_numpy(np.concatenate([turn.rollout_logprobs for turn in game.turns]))
        worst = max(worst, (plain.gather(1, actions[:, None]).squeeze(1) - recorded).abs().max().item())
    print(f"temperature {temperature}: at most {worst:.2g} nats a token apart")
    endings = [int(turn.action_ids[-1]) == STOP for game in games for turn in game.turns]
    assert any(endings) and not all(endings), "actions that stop, the stop token scored, and actions that are cut"
    assert all(t.action_ids.size <= 6 and STOP not in t.action_ids[:-1] for g in games for t in g.turns)


def test_samples_follow_the_full_softmax(sampler: VllmSampler) -> None:
    """A hidden top-k or top-p, or another temperature, would show."""
    backbone = policy()
    batch, _ = some_turns(backbone)
    turn = int(batch.cu_turns[1])
    turn_ids = torch.full((4, 3000), -1)
    turn_ids[1] = turn
    engine = make_engine(sampler, backbone, max_new_tokens=1, temperature=1.7)
    got = engine.sample_alternatives(batch, turn_ids)
    prefix = batch.input_ids[int(batch.cu_seqlens[1]) : int(batch.state_positions[turn]) + 1]
    counts = torch.bincount(got.action_ids[1, :, 0].long(), minlength=VOCAB)
    assert chi_square(counts, full_logprobs(backbone, prefix, 1.7)[-1].exp()) < CHI_SQUARE_10_DOF
    assert chi_square(counts, full_logprobs(backbone, prefix, 1.4)[-1].exp()) > CHI_SQUARE_10_DOF


def test_greedy_takes_the_most_likely_token(sampler: VllmSampler) -> None:
    backbone = policy()
    games = play(make_engine(sampler, backbone, greedy=True, temperature=0.5), 8).trajectories
    for game, plain in zip(games, assert_scored_right(backbone, games, 1.0, atol=BOUND), strict=True):
        actions = torch.from_numpy(np.concatenate([turn.action_ids for turn in game.turns])).long()
        assert (plain.amax(1) - plain.gather(1, actions[:, None]).squeeze(1)).max() < BOUND


def test_alternatives_are_samples_of_their_turns(sampler: VllmSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = policy()
    batch, turn_ids = some_turns(backbone)
    asked = []
    submit = sampler.submit
    monkeypatch.setattr(sampler, "submit", lambda request: (asked.append(request.num_samples), submit(request))[1])
    engine = make_engine(sampler, backbone, temperature=0.6)
    got = engine.sample_alternatives(batch, turn_ids.repeat(1, 4))
    assert_alternatives(backbone, batch, turn_ids.repeat(1, 4), got, 0.6, atol=BOUND)
    branches = torch.bincount(turn_ids[turn_ids >= 0], minlength=sum(batch.num_turns)) * 4
    assert sorted(asked) == sorted(branches[branches > 0].tolist()), "one request a turn, however many samples"
    assert len({tuple(ids) for ids in got.action_ids[0].tolist()}) > 2, "each one by a seed of its own"


def test_the_generator_alone_decides(sampler: VllmSampler) -> None:
    backbone = policy()

    def tokens(seed: int) -> list[list[int]]:
        return [game.input_ids.tolist() for game in play(make_engine(sampler, backbone, seed), 15).trajectories]

    first = tokens(1)
    torch.manual_seed(1)
    assert tokens(1) == first != tokens(2)


def test_a_full_window_truncates(tmp_path: Path, sampler: VllmSampler) -> None:
    rollout = play(make_engine(sampler, policy()), 3, Endless)
    assert rollout.num_truncated_by_window == 3
    assert all(200 - 9 < game.num_tokens <= 200 for game in rollout.trajectories)


def test_a_games_beginning_is_computed_once(sampler: VllmSampler) -> None:
    """Blocks of 32 tokens are kept over turns, and over alternatives of one state; an update drops them."""
    backbone = policy()
    engine = make_engine(sampler, backbone, num_slots=3)
    before = engine.num_forward_tokens
    (game,) = play_games(engine, Endless, encode, decode, [1]).trajectories
    forwarded, again = engine.num_forward_tokens - before, 0
    at = 0
    for turn in game.turns:
        at += turn.observation_ids.size + turn.action_ids.size
        again += at - 1
    num_blocks = game.num_tokens // 32
    assert num_blocks >= 5 and game.num_tokens <= forwarded < again / 3, "a row a turn would compute `again`"
    assert forwarded <= game.num_tokens + 32 * game.num_turns
    # Alternatives of the last state: the first branch computes the prefix, the others its last block alone.
    batch = PackedBatch.from_arrays(pack_trajectories([game]))
    turn_ids = torch.full((1, 8), game.num_turns - 1)
    engine.reset()
    before = engine.num_forward_tokens
    got = engine.sample_alternatives(batch, turn_ids)
    prefix, sampled = int(batch.state_positions[-1]) + 1, int(got.lengths.sum()) - 8
    assert engine.num_forward_tokens - before == prefix + 7 * (prefix - 32 * ((prefix - 1) // 32)) + sampled


def test_after_an_update_the_engine_scores_as_the_trainer_does(sampler: VllmSampler) -> None:
    """And by what the trainer says: the differences that an update made are the same on both sides."""
    backbone = policy()
    sampler.load(backbone)
    engine_before, trainer_before = scores(sampler), trainer_logprobs(backbone, PROBE)
    assert (engine_before - trainer_before).abs().max() < BOUND
    change(backbone, 1)
    assert torch.equal(scores(sampler), engine_before), "the engine's weights are its own until they are loaded"
    sampler.load(backbone)
    moved, by = scores(sampler) - engine_before, trainer_logprobs(backbone, PROBE) - trainer_before
    assert by.abs().mean() > 0.1
    assert (moved - by).abs().max() < 2 * BOUND


@pytest.mark.parametrize("sizes", [{}, {"tie_word_embeddings": False}])
def test_one_step_of_the_optimizer_is_seen(sampler: VllmSampler, sizes: dict[str, Any]) -> None:
    """Small, but it is there: nothing is rounded away, and the lm_head moves too, tied or not."""
    backbone = policy(**sizes)
    sampler.load(backbone)
    before = scores(sampler)
    trainer_before = trainer_logprobs(backbone, PROBE)
    head = torch.zeros_like(backbone.lm_head_weight)
    head[PROBE[1]] = 0.01
    with torch.no_grad():
        backbone.lm_head_weight.add_(head)
    sampler.load(backbone)
    moved, by = scores(sampler) - before, trainer_logprobs(backbone, PROBE) - trainer_before
    assert by.abs().max() > 100 * BOUND
    assert (moved - by).abs().max() < 2 * BOUND


def test_weights_that_nobody_changed_are_not_loaded_again(
    sampler: VllmSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = policy()
    loads = []
    named = vllm_sampler.named_weights
    monkeypatch.setattr(vllm_sampler, "named_weights", lambda policy: (loads.append(policy), named(policy))[1])
    change(backbone, 3)
    for _ in range(3):
        sampler.load(backbone)
    assert len(loads) == 1
    change(backbone, 4)
    sampler.load(backbone)
    assert len(loads) == 2


def test_a_copy_that_is_not_the_trainers_is_refused(sampler: VllmSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix that does not arrive, as vLLM leaves a tied lm_head alone on CPUs."""
    backbone = policy()
    sampler.load(backbone)
    change(backbone, 5)
    named = vllm_sampler.named_weights
    monkeypatch.setattr(
        vllm_sampler, "named_weights", lambda policy: ((n, w) for n, w in named(policy) if n != "lm_head.weight")
    )
    with pytest.raises(SamplerError, match=r"vLLM and the trainer score the same 31 tokens .* nats a token apart"):
        sampler.load(backbone)
    monkeypatch.undo()
    sampler.load(backbone)  # it is not taken for loaded
    assert (scores(sampler) - trainer_logprobs(backbone, PROBE)).abs().max() < BOUND


def test_tokens_of_other_weights_are_refused(sampler: VllmSampler) -> None:
    backbone = policy()
    engine = make_engine(sampler, backbone)
    version = sampler._engine.get_weight_version()
    assert version == f"{backbone.fingerprint():08x}"
    sampler._engine.set_weight_version("somebody's")
    with pytest.raises(SamplerError, match=rf"version {version}, got tokens of \[\"somebody's\"\]"):
        play(engine, 3)
    sampler._engine.set_weight_version(version)
    engine.reset()
    assert len(play(engine, 3).trajectories) == 3


def test_an_interrupted_call_leaves_nothing_behind(sampler: VllmSampler) -> None:
    engine = make_engine(sampler, policy())

    def stop(what: str) -> None:
        if what == "Babbler.step (seed 3)":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play_games(engine, Babbler, encode, decode, range(15), on_call=stop)
    assert sampler._engine.has_unfinished_requests()
    assert len(play(engine, 9).trajectories) == 9
    assert not sampler._engine.has_unfinished_requests()
