"""What every algorithm has: the KL to the start policy, of stored games and of others."""

from __future__ import annotations

import pytest
import torch
from tiny_learners import MakeLM, action_logprobs, make_learner, random_games, sampled_logprobs

from archer_fast.config import Config
from archer_fast.meters import Meters

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("max_pass_tokens", [32768, 1, 40])
def test_the_kl_to_the_start_is_nats_an_action_and_the_same_stored_or_not(
    make_lm: MakeLM, max_pass_tokens: int
) -> None:
    config, games, meters = Config(algorithm="filtered-bc"), random_games(), Meters()
    config.model.max_pass_tokens = max_pass_tokens
    learner = make_learner(make_lm, config)
    with torch.no_grad():
        moved = [(sampled_logprobs(game) - action_logprobs(learner.reference, game)).sum() for game in games]
    wanted = float(sum(moved)) / sum(game.num_turns for game in games)
    assert abs(wanted) > 1
    assert learner.kl_to_start(games) == pytest.approx(wanted, rel=1e-5)
    assert len(learner.buffer) == 0
    learner.insert(games, meters)
    assert meters.read()["kl"] == pytest.approx(wanted, rel=1e-5)
