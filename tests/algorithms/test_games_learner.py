"""Steps on whole games: which games a step takes, and that cutting it into passes changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_learners import MakeLM, action_logprobs, assert_gradients, gradients, make_learner, random_games

from archer_fast.config import BufferConfig, Config, CriticConfig, FilteredBCConfig, RolloutConfig
from archer_fast.meters import Meters

pytestmark = pytest.mark.usefixtures("one_thread")


def make_config(**update: Any) -> Config:
    return Config(
        algorithm="filtered-bc",
        filtered_bc=FilteredBCConfig(**{"max_grad_norm": 1e9} | update),
        critic=CriticConfig(hidden_size=16),
        rollout=RolloutConfig(games=3, max_new_tokens=4),
        buffer=BufferConfig(max_trajectories=64, max_tokens=4096),
    )


def test_minibatches_go_through_the_games_and_then_anew(make_lm: MakeLM) -> None:
    learner = make_learner(make_lm, make_config(batch_games=3, epochs=5))
    games = np.array([4, 5, 9, 11, 12, 20, 21])
    batches = [own.tolist() for own in learner._minibatches(games)]
    assert [len(own) for own in batches] == [3] * 5 and all(own == sorted(own) for own in batches)
    for first, second in ((0, 1), (2, 3)):  # the seventh game waits for the next order
        assert len({*batches[first], *batches[second]}) == 6
    assert {game for own in batches for game in own} <= set(games.tolist())
    assert batches != [own.tolist() for own in learner._minibatches(games)], "another order the next time"
    assert [own.tolist() for own in learner._minibatches(games[:2])] == [[4, 5]] * 5
    assert list(learner._minibatches(games[:0])) == []


@pytest.mark.parametrize("max_pass_tokens", [32768, 1, 40])
def test_credit_and_reference_go_with_their_games_through_every_pass(make_lm: MakeLM, max_pass_tokens: int) -> None:
    """Every game has another advantage, turn by turn or token by token; against plain torch game by game."""
    config = make_config(batch_games=16, epochs=1, kl_coef=0.2, entropy_coef=0.0)
    config.model.max_pass_tokens = max_pass_tokens
    games = random_games()
    for by_token in (False, True):
        learner = make_learner(make_lm, config)
        learner.insert(random_games(2, seed=5), Meters())
        learner.insert(games, Meters())
        credit, loss = {}, torch.zeros(())
        for i, game in enumerate(games):
            of_turns = torch.arange(game.num_turns) + 10.0 * i - 30
            of_tokens = torch.cat([of_turns[k].repeat(t.action_ids.size) for k, t in enumerate(game.turns)])
            of_tokens = of_tokens + by_token * torch.linspace(0, 1, of_tokens.numel())
            credit[2 + i] = of_tokens if by_token else of_turns
            logprobs = action_logprobs(learner.actor, game)
            reference = action_logprobs(learner.reference, game).detach()
            loss = loss + (0.2 * 0.5 * (logprobs - reference).square() - of_tokens * logprobs).sum()
        wanted = gradients(learner.actor, loss / sum(game.num_turns for game in games))
        learner.step_on_games(np.arange(2, 11), credit, Meters(), lambda: None)
        assert_gradients(learner.actor, wanted)


@pytest.mark.parametrize(("kl_coef", "newest", "num_reads"), [(0.0, False, 0), (0.1, False, 1), (0.1, True, 0)])
def test_the_start_policy_is_read_where_it_pulls_at_games_that_it_has_not_read(
    make_lm: MakeLM, kl_coef: float, newest: bool, num_reads: int
) -> None:
    """The newest were read as they came; older ones are, once for all steps."""
    learner = make_learner(make_lm, make_config(epochs=3, kl_coef=kl_coef, share=1.0, newest=newest))
    sizes: list[int] = []
    learner.insert(random_games(4, seed=5), Meters())
    learner.insert(random_games(), Meters())
    learner.reference.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].numel()))
    learner.update_actor(Meters())
    assert sizes == [sum(game.num_tokens for game in random_games(4, seed=5))] * num_reads
