"""Scripted games as tokens, and what cloning them teaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from archer_fast import warm_start
from archer_fast.backbone import Backbone
from archer_fast.batch import PackedBatch
from archer_fast.config import WarmStartConfig
from archer_fast.critic import token_logprobs
from archer_fast.envs import registry
from archer_fast.envs.players import ScriptedGame, play_scripted
from archer_fast.evaluation import encoder
from archer_fast.packing import pack_trajectories
from archer_fast.tiny_model import TinyModel, build_tiny_model
from archer_fast.trajectory import Trajectory
from archer_fast.warm_start import clone, to_trajectory

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = TinyModel(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, max_positions=256)


def scripted(num_games: int, first_seed: int = 0, player: str = "random") -> list[ScriptedGame]:
    spec = registry.get("guess-number")
    return [play_scripted(spec.make_env(high=8), spec.make_player(player), first_seed + i) for i in range(num_games)]


def make_model(seed: int = 0) -> tuple[Backbone, int]:
    return build_tiny_model(registry.get("guess-number").vocabulary_text(high=8), SIZES, seed=seed)


def as_tokens(games: list[ScriptedGame], backbone: Backbone, stop: int) -> list[Trajectory]:
    return [to_trajectory(game, encoder(backbone.tokenizer), stop) for game in games]


def losses(backbone: Backbone, games: list[Trajectory]) -> tuple[float, float]:
    """Mean -log p of the action tokens, and of the environment's."""
    batch = PackedBatch.from_arrays(pack_trajectories(games))
    with torch.no_grad():
        hidden = backbone(batch.input_ids, batch.position_ids, backbone.layout(batch.cu_seqlens, batch.lengths))
        actions = token_logprobs(backbone, hidden, batch, 1.0)
        rows = (~batch.action_mask & (batch.position_ids > 0)).nonzero().squeeze(1)
        logits = hidden[rows - 1] @ backbone.lm_head_weight.T
        answers = logits.log_softmax(-1).gather(1, batch.input_ids[rows].long()[:, None])
    return -actions.mean().item(), -answers.mean().item()


def test_a_scripted_game_as_tokens() -> None:
    backbone, stop = make_model()
    game = ScriptedGame(
        observations=["Guess 1 to 8.\n", " Higher.\n"],
        actions=["3", "7"],
        rewards=[-1.0, 0.0],
        infos=[{}, {}],
        final_observation=" Correct.\n",
        terminated=True,
        truncated=False,
    )
    encode = encoder(backbone.tokenizer)
    got = to_trajectory(game, encode, stop)
    for turn, observation, action, reward in zip(got.turns, game.observations, game.actions, game.rewards, strict=True):
        assert turn.observation_ids.tolist() == encode(observation)
        assert turn.action_ids.tolist() == [*encode(action), stop]
        assert turn.rollout_logprobs.tolist() == [0.0] * turn.action_ids.size
        assert (turn.reward, turn.policy_version) == (reward, -1)
    assert got.final_observation_ids.tolist() == encode(" Correct.\n")
    assert (got.terminated, got.truncated) == (True, False)


def test_a_whole_game_decodes_to_its_text() -> None:
    backbone, stop = make_model()
    for game, tokens in zip(scripted(20), as_tokens(scripted(20), backbone, stop), strict=True):
        text = backbone.tokenizer.decode(tokens.input_ids, skip_special_tokens=True)
        assert text == game.text
        assert tokens.episode_return == game.episode_return


def test_cloning_lowers_the_loss_on_games_it_has_not_seen() -> None:
    backbone, stop = make_model()
    seen, unseen = as_tokens(scripted(150), backbone, stop), as_tokens(scripted(50, 10_000), backbone, stop)
    before = losses(backbone, unseen)
    steps: list[int] = []
    config = WarmStartConfig(steps=60, batch_games=8, lr=1e-2)
    metrics = clone(backbone, seen, config, seed=0, on_step=steps.append)
    after = losses(backbone, unseen)
    assert steps == list(range(60))
    # An action is one of 8 numbers, then the stop token: no model predicts it better than log(8) / 2 = 1.04 a token.
    assert 1.03 < after[0] < 1.15 < before[0] - 1
    assert after[1] < 0.5 < before[1] - 1
    assert metrics == pytest.approx({"action_loss": after[0], "observation_loss": after[1]}, rel=0.2)


def test_without_weight_on_observations_answers_are_not_learned() -> None:
    backbone, stop = make_model()
    games = as_tokens(scripted(100), backbone, stop)
    before = losses(backbone, games)
    clone(backbone, games, WarmStartConfig(steps=40, batch_games=8, lr=1e-2, observation_weight=0.0), seed=0)
    after = losses(backbone, games)
    assert after[0] < before[0] - 1
    assert after[1] > before[1] - 0.5


def cloned_weights(seed: int, num_games: int = 5) -> list[torch.Tensor]:
    backbone, stop = make_model()
    games = as_tokens(scripted(num_games), backbone, stop)
    clone(backbone, games, WarmStartConfig(steps=4, batch_games=3), seed=seed)
    return list(backbone.parameters())


def test_the_seed_decides_the_order_of_games() -> None:
    first, again, other = cloned_weights(1), cloned_weights(1), cloned_weights(2)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def test_every_game_is_seen_once_before_one_is_seen_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[int]] = []
    backbone, stop = make_model()
    games = as_tokens(scripted(7), backbone, stop)
    pack = warm_start.pack_trajectories

    def spy(chosen: list[Trajectory]) -> object:
        batches.append([games.index(game) for game in chosen])
        return pack(chosen)

    monkeypatch.setattr(warm_start, "pack_trajectories", spy)
    clone(backbone, games, WarmStartConfig(steps=7, batch_games=3), seed=0)
    drawn = [i for batch in batches for i in batch]
    assert [len(batch) for batch in batches] == [3] * 7
    assert [sorted(drawn[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert len(np.unique(drawn[:7])) == 7


def test_fewer_games_than_a_batch_are_all_taken() -> None:
    assert all(torch.isfinite(p).all() for p in cloned_weights(0, num_games=2))


def test_no_steps_change_nothing() -> None:
    backbone, stop = make_model()
    before = [p.detach().clone() for p in backbone.parameters()]
    assert clone(backbone, as_tokens(scripted(3), backbone, stop), WarmStartConfig(steps=0), seed=0) == {}
    assert all(torch.equal(x, y) for x, y in zip(before, backbone.parameters(), strict=True))
