"""Learners of random tiny models and games without environments, and what plain passes make of one sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archer_fast.adapted_backbone import AdaptedBackbone
from archer_fast.algorithms import make_learner as learner_of
from archer_fast.algorithms.archer import Archer
from archer_fast.backbone import Backbone
from archer_fast.batch import Alternatives, PackedBatch
from archer_fast.buffer import TrajectoryBuffer
from archer_fast.config import Config
from archer_fast.critic import ActionFeatures, StateFeatures, ValueHeads
from archer_fast.ranks import ALONE, Ranks
from archer_fast.rollout.embedded import EmbeddedEngine
from archer_fast.trajectory import Trajectory, Turn
from archer_fast.turn_features import FeatureLayout

STOP, VOCAB = 0, 11
MakeLM = Callable[..., Any]


def random_games(num_games: int = 9, seed: int = 0) -> list[Trajectory]:
    """Games of 1 to 4 turns with rewards of their own; every third is truncated. Each has its own seed."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(1, VOCAB, rng.integers(low, high))

    games = []
    for game in range(num_games):
        turns = []
        for _ in range(1 + game % 4):
            action = np.append(ids(0, 3), STOP)
            turns.append(Turn(ids(1, 6), action, -rng.random(action.size), float(rng.normal()), 0))
        truncated = game % 3 == 1
        games.append(Trajectory(tuple(turns), ids(0, 3), not truncated, truncated, {"seed": game}))
    return games


def make_learner(make_lm: MakeLM, config: Config, seed: int = 0, flatten: float = 1.0, ranks: Ranks = ALONE) -> Any:
    """The learner that `config` names; `flatten` below 1 brings the policy nearer to uniform."""
    reference = Backbone(make_lm(seed=2, vocab_size=VOCAB), None).requires_grad_(False)
    reference.lm_head_weight.mul_(flatten)
    actor: Backbone
    if config.model.lora.rank:
        actor = AdaptedBackbone(reference, "actor", config.model.lora, seed=seed).requires_grad_(True)
    else:
        actor = reference.frozen_copy().requires_grad_(True)
    with torch.no_grad():  # the actor has left the start policy: whoever reads the wrong one is seen
        for p in actor.parameters():
            p.mul_(1.05).add_(0.01 * bool(config.model.lora.rank))  # half of an adapter is 0 at its start
    engine = EmbeddedEngine(actor, STOP, num_slots=8, max_new_tokens=4, generator=torch.Generator().manual_seed(seed))
    row_bytes = FeatureLayout.of(reference).row_bytes if config.keeps_features else 0
    buffer = TrajectoryBuffer(
        config.buffer.max_tokens, config.buffer.max_trajectories, seed, feature_bytes=row_bytes, max_feature_memory=0
    )
    return learner_of(config, actor, reference, engine, buffer, ranks)


def all_hidden(backbone: Backbone, ids: np.ndarray) -> Tensor:
    """Hidden states [n, H] of one sequence alone."""
    tokens = torch.from_numpy(np.asarray(ids, np.int64))
    n = tokens.numel()
    return backbone(tokens, torch.arange(n), backbone.layout(torch.tensor([0, n], dtype=torch.int32), (n,)))


def plain(backbone: Backbone, ids: np.ndarray, num_scored: int = 0) -> tuple[Tensor, Tensor]:
    """Last hidden state [H] of one sequence alone, and the summed log-prob of its last `num_scored` tokens."""
    tokens = torch.from_numpy(np.asarray(ids, np.int64))
    n = tokens.numel()
    with torch.no_grad():
        hidden = all_hidden(backbone, ids)
        logprobs = (hidden @ backbone.lm_head_weight.T).log_softmax(-1)
    scored = logprobs[:-1].gather(1, tokens[1:, None]).squeeze(1)[n - 1 - num_scored :]
    return hidden[-1], scored.sum()


def action_places(game: Trajectory) -> tuple[list[int], list[int]]:
    """Where the tokens of its actions lie in its stream, and the turn of each."""
    places, turns, at = [], [], 0
    for i, turn in enumerate(game.turns):
        at += turn.observation_ids.size
        places += range(at, at + turn.action_ids.size)
        turns += [i] * turn.action_ids.size
        at += turn.action_ids.size
    return places, turns


def action_logprobs(backbone: Backbone, game: Trajectory) -> Tensor:
    """Log-probs of the tokens of its actions, differentiable, from a pass over this game alone."""
    places = torch.tensor(action_places(game)[0])
    tokens = torch.from_numpy(game.input_ids.astype(np.int64))
    logits = all_hidden(backbone, game.input_ids)[places - 1] @ backbone.lm_head_weight.T
    return logits.log_softmax(-1).gather(1, tokens[places][:, None]).squeeze(1)


def sampled_logprobs(game: Trajectory) -> Tensor:
    """Of the same tokens, as they are stored."""
    return torch.from_numpy(np.concatenate([turn.rollout_logprobs for turn in game.turns]))


def prefix(game: Trajectory, turn: int) -> np.ndarray:
    """Tokens up to and including the observation that turn `turn` answers."""
    parts = [x for t in game.turns[:turn] for x in (t.observation_ids, t.action_ids)]
    return np.concatenate([*parts, game.turns[turn].observation_ids])


def said_before(game: Trajectory, turn: int, action: Sequence[int]) -> float:
    """1 where the game's earlier turns hold this action."""
    return float(list(action) in [t.action_ids.tolist() for t in game.turns[:turn]])


def twin_of(buffer: TrajectoryBuffer, folder: Path) -> TrajectoryBuffer:
    """A buffer that will draw the same samples."""
    buffer.save(folder / "twin")
    return TrajectoryBuffer.load(folder / "twin")


def turns_of(games: list[Trajectory]) -> list[tuple[Trajectory, int]]:
    """By the buffer's turn id."""
    return [(game, i) for game in games for i in range(game.num_turns)]


def gradients(backbone: Backbone, loss: Tensor) -> dict[str, Tensor]:
    """By parameter, as plain torch has them."""
    backbone.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}
    backbone.zero_grad()
    return found


def assert_gradients(backbone: Backbone, wanted: dict[str, Tensor]) -> None:
    """The gradient that the last step left behind (clipping must not have bitten)."""
    found = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() and len(found) > 10
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def q_and_v(heads: ValueHeads, trunk: Backbone, game: Trajectory) -> tuple[Tensor, Tensor, Tensor]:
    """Q, V [2, turns] of a game's turns and V [2] of its end, by plain passes."""
    q, v = [], []
    with torch.no_grad():
        for i, turn in enumerate(game.turns):
            before = prefix(game, i)
            state = StateFeatures(plain(trunk, before)[0][None], torch.tensor([i]))
            q.append(q_of(heads, trunk, game, i, turn.action_ids))
            v.append(heads.value(state)[:, 0])
        end = StateFeatures(plain(trunk, game.input_ids)[0][None], torch.tensor([game.num_turns]))
        return torch.stack(q, 1), torch.stack(v, 1), heads.value(end)[:, 0]


def q_of(heads: ValueHeads, trunk: Backbone, game: Trajectory, turn: int, action: Any) -> Tensor:
    """Q [2] of an action at a turn's state."""
    before, ids = prefix(game, turn), np.asarray(action)
    hidden, logprob = plain(trunk, np.concatenate([before, ids]), ids.size)
    features = ActionFeatures(hidden[None], logprob[None], torch.tensor([said_before(game, turn, ids.tolist())]))
    with torch.no_grad():
        return heads.q_value(StateFeatures(plain(trunk, before)[0][None], torch.tensor([turn])), features)[:, 0]


def credit_by_hand(learner: Archer, game: Trajectory) -> Tensor:
    """The advantages [turns] of the actions that were taken."""
    a, gamma = learner.config.actor, learner.config.critic.gamma
    q, v, end = q_and_v(learner.critic.heads, learner.critic.trunk, game)

    def one(values: Tensor) -> Tensor:
        return values.amin(0) if a.pessimistic else values.mean(0)

    if a.advantage == "q_minus_v":
        return one(q) - one(v)
    behind = torch.cat([one(v)[1:], one(end[:, None]) * (not game.terminated)])
    credit = torch.tensor([turn.reward for turn in game.turns]) + gamma * behind - one(v)
    for i in reversed(range(game.num_turns - 1)):
        credit[i] += gamma * a.gae_lambda * credit[i + 1]
    return credit


def by_token(of_turns: Tensor, game: Trajectory) -> Tensor:
    return of_turns.repeat_interleave(torch.tensor([turn.action_ids.size for turn in game.turns]))


class FreshActions:
    """What a learner's engine samples from now on at states of `games`, which its buffer holds alone or newest."""

    def __init__(self, learner: Archer, games: Sequence[Trajectory]) -> None:
        self.found: list[tuple[Trajectory, int, np.ndarray]] = []  # the game, the turn answered, the action
        by_stream = {tuple(game.input_ids.tolist()): game for game in games}
        sample = learner.engine.sample_alternatives

        def spy(batch: PackedBatch, turn_ids: Tensor) -> Alternatives:
            made = sample(batch, turn_ids)
            streams = batch.input_ids.split(list(batch.lengths))
            for row, column in made.used.nonzero().tolist():
                action = made.action_ids[row, column, : made.lengths[row, column]].numpy()
                turn = int(batch.turn[made.turn_ids[row, column]])
                self.found.append((by_stream[tuple(streams[row].tolist())], turn, action))
            return made

        learner.engine.sample_alternatives = spy  # type: ignore[method-assign]

    def q_values(self, heads: ValueHeads, trunk: Backbone) -> Tensor:
        """The lesser Q [n] of each."""
        return torch.stack([q_of(heads, trunk, *one).amin() for one in self.found])

    def logprobs(self, backbone: Backbone) -> Tensor:
        """Of all their tokens, differentiable, from a pass for each action alone."""
        return torch.cat([action_logprobs(backbone, _answered(*one))[-one[2].size :] for one in self.found])

    def by_token(self, of_actions: Tensor) -> Tensor:
        return of_actions.repeat_interleave(torch.tensor([action.size for _, _, action in self.found]))


def _answered(game: Trajectory, turn: int, action: np.ndarray) -> Trajectory:
    """The game up to this turn, which is answered otherwise and ends it."""
    last = Turn(game.turns[turn].observation_ids, action, np.zeros(action.size), 0.0, 0)
    return Trajectory((*game.turns[:turn], last), np.array([]), True, False)
