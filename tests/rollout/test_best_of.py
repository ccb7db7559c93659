"""The critic's choice among sampled actions: what is chosen, from which history, with whose log-probs; a whole run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
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
    make_engine,
    openings_of,
)
from test_train import tiny_config
from tiny_learners import make_learner, plain, prefix, random_games
from torch import Tensor

from archer_fast import evaluation, run_state
from archer_fast.backbone import Backbone
from archer_fast.batch import Alternatives, PackedBatch
from archer_fast.config import ActorConfig, Config, CriticConfig, EvalConfig, RolloutConfig, WarmStartConfig
from archer_fast.critic import ActionFeatures, StateFeatures
from archer_fast.loggers import read_rows
from archer_fast.packing import pack_trajectories
from archer_fast.rollout.best_of import BestOfEngine
from archer_fast.rollout.embedded import EmbeddedEngine
from archer_fast.rollout.interact import Engine, FinishedAction, Rollout, continue_games, play_games
from archer_fast.run_folder import RunFolder
from archer_fast.train import train
from archer_fast.trajectory import Trajectory
from archer_fast.watcher import SilentWatcher

pytestmark = pytest.mark.usefixtures("one_thread")
LIKED = 3


def indifferent(batch: PackedBatch, candidates: Alternatives) -> Tensor:
    return torch.zeros(candidates.lengths.shape)


def likes_a_token(batch: PackedBatch, candidates: Alternatives) -> Tensor:
    """How often LIKED is among a candidate's own tokens, and a longer one before a shorter."""
    own = torch.arange(candidates.action_ids.shape[2]) < candidates.lengths[..., None]
    return ((candidates.action_ids == LIKED) & own).sum(2) + 0.01 * candidates.lengths


class Watched(BestOfEngine):
    """Keeps what each step saw and made of it."""

    def __init__(self, engine: EmbeddedEngine, num_candidates: int, score: Any) -> None:
        self.seen: list[tuple[PackedBatch, Alternatives, Tensor]] = []
        self.made: list[list[FinishedAction]] = []

        def kept(batch: PackedBatch, candidates: Alternatives) -> Tensor:
            self.seen.append((batch, candidates, score(batch, candidates)))
            return self.seen[-1][2]

        super().__init__(engine, num_candidates, kept)

    def step(self) -> list[FinishedAction]:
        actions = super().step()
        self.made += [actions] if actions else []
        return actions


@pytest.fixture
def backbone(make_lm: Callable[..., Any]) -> Backbone:
    return Backbone(make_lm(seed=2, vocab_size=VOCAB, max_position_embeddings=200), None)


def play(engine: Engine, num_games: int, env: type[Babbler] = Babbler) -> Rollout:
    return play_games(engine, env, encode, decode, range(num_games))


def liked_share(games: list[Trajectory]) -> float:
    """Of the actions, those with LIKED in them."""
    actions = [turn.action_ids for game in games for turn in game.turns]
    return sum(LIKED in action for action in actions) / len(actions)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("num_candidates", [1, 3])
def test_logprobs_are_those_of_the_sampler(backbone: Backbone, num_candidates: int, temperature: float) -> None:
    """Of the chosen actions, whatever they were chosen for; games are refilled into slots, long and short."""
    engine = BestOfEngine(make_engine(backbone, temperature=temperature), num_candidates, likes_a_token)
    rollout = play(engine, 23)
    assert len(rollout.trajectories) == 23 and rollout.num_dropped == 0
    assert_scored_right(backbone, rollout.trajectories, temperature)
    endings = [int(t.action_ids[-1]) == STOP for game in rollout.trajectories for t in game.turns]
    assert any(endings) and not all(endings)
    assert all(t.action_ids.size <= 6 and STOP not in t.action_ids[:-1] for g in rollout.trajectories for t in g.turns)


@pytest.mark.parametrize("num_candidates", [1, 3])
def test_a_choice_without_a_preference_follows_the_softmax(backbone: Backbone, num_candidates: int) -> None:
    """At the second turn, as a history matters; one that prefers a token does not."""

    def counts(score: Any) -> Tensor:
        engine = BestOfEngine(make_engine(backbone, num_slots=500, max_new_tokens=1), num_candidates, score)
        found = torch.zeros(VOCAB)
        for _ in range(6):
            for slot in range(500):
                engine.begin(slot)
                engine.observe(slot, [3, 7])
            firsts = {action.slot: int(action.action_ids[0]) for action in engine.step()}
            for slot in range(500):
                engine.observe(slot, [5])
            seconds = {action.slot: int(action.action_ids[0]) for action in engine.step()}
            found += torch.bincount(
                torch.tensor([seconds[s] for s in seconds if firsts[s] == commonest]), minlength=VOCAB
            )
        return found

    commonest = int(full_logprobs(backbone, torch.tensor([3, 7]), 1.0)[-1].argmax())
    probabilities = full_logprobs(backbone, torch.tensor([3, 7, commonest, 5]), 1.0)[-1].exp()
    assert chi_square(counts(indifferent), probabilities) < CHI_SQUARE_10_DOF
    if num_candidates > 1:
        preferred = counts(likes_a_token)
        assert chi_square(preferred, probabilities) > 3 * CHI_SQUARE_10_DOF
        assert preferred[LIKED] / preferred.sum() > 1.5 * probabilities[LIKED]


def test_what_is_played_is_the_candidate_with_the_highest_score(backbone: Backbone) -> None:
    engine = Watched(make_engine(backbone), 4, likes_a_token)
    games = play(engine, 23).trajectories
    num_choices = 0
    for (_, candidates, scores), actions in zip(engine.seen, engine.made, strict=True):
        assert candidates.used.all() and candidates.lengths.shape == (len(actions), 4)
        for row, action in enumerate(actions):
            own = [candidates.action_ids[row, k, : candidates.lengths[row, k]].tolist() for k in range(4)]
            best = scores[row].tolist().index(float(scores[row].max()))
            assert action.action_ids.tolist() == own[best]
            wanted = candidates.logprobs[row, best, : len(own[best])].numpy()
            np.testing.assert_array_equal(action.logprobs, wanted)
            num_choices += len({*map(tuple, own)}) > 1
    assert num_choices > 50
    alone = play(make_engine(backbone), 23).trajectories
    assert liked_share(games) > 1.5 * liked_share(alone) > 0


def test_it_reads_the_whole_history_of_each_game(backbone: Backbone) -> None:
    """Turn by turn: the critic is told how many actions were taken, and which."""
    engine = Watched(make_engine(backbone), 2, likes_a_token)
    games = play(engine, 23).trajectories
    read: Counter[tuple[int, tuple[int, ...], tuple[int, ...]]] = Counter()
    for batch, candidates, _ in engine.seen:
        due = batch.cu_turns[1:].long() - 1
        assert torch.equal(candidates.turn_ids, due[:, None].expand(-1, 2))
        for row, last in enumerate(due.tolist()):
            begin, end = int(batch.cu_seqlens[row]), int(batch.state_positions[last]) + 1
            tokens, is_action = batch.input_ids[begin:end].tolist(), batch.action_mask[begin:end].int().tolist()
            read[int(batch.turn[last]), tuple(tokens), tuple(is_action)] += 1
    wanted: Counter[tuple[int, tuple[int, ...], tuple[int, ...]]] = Counter()
    for game in games:
        spoken: list[int] = []
        for i, turn in enumerate(game.turns):
            spoken += [0] * turn.observation_ids.size
            wanted[i, tuple(prefix(game, i).tolist()), tuple(spoken)] += 1
            spoken += [1] * turn.action_ids.size
    assert read == wanted and max(turn for turn, _, _ in read) >= 9


@pytest.mark.parametrize(("env", "window"), [(Babbler, 200), (Endless, 61)])
def test_greedy_it_plays_the_games_of_the_embedded_engine(
    make_lm: Callable[..., Any], env: type[Babbler], window: int
) -> None:
    """Token by token and to the same full window, from the beginning and from mid-air."""
    backbone = Backbone(make_lm(seed=2, vocab_size=VOCAB, max_position_embeddings=window), None)
    embedded = make_engine(backbone, greedy=True)
    chosen = BestOfEngine(make_engine(backbone, greedy=True), 2, indifferent)

    def assert_same_games(left: Any, right: Any) -> None:
        assert left.num_truncated_by_window == right.num_truncated_by_window
        for a, b in zip(left.trajectories, right.trajectories, strict=True):
            assert a.input_ids.tolist() == b.input_ids.tolist() and a.info == b.info
            assert [t.action_ids.tolist() for t in a.turns] == [t.action_ids.tolist() for t in b.turns]
            assert (a.terminated, a.truncated) == (b.terminated, b.truncated)
            for mine, theirs in zip(a.turns, b.turns, strict=True):
                np.testing.assert_allclose(mine.rollout_logprobs, theirs.rollout_logprobs, atol=1e-5)

    games = play(embedded, 17, env)
    assert_same_games(play(chosen, 17, env), games)
    assert games.num_truncated_by_window == (17 if env is Endless else 0)
    if env is Babbler:
        rests = [
            continue_games(engine, openings_of(games.trajectories), encode, decode) for engine in (embedded, chosen)
        ]
        assert_same_games(rests[1], rests[0])


def test_slots_by_hand(backbone: Backbone) -> None:
    engine = Watched(make_engine(backbone, num_slots=3, max_new_tokens=2), 2, indifferent)
    assert (engine.num_slots, engine.max_new_tokens, engine.stop_token_id) == (3, 2, STOP)
    assert engine.step() == [] and engine.room(1) == 200
    engine.begin(1)
    engine.observe(1, [3, 4])
    engine.observe(1, [5])  # one observation, said in two parts
    engine.begin(2)
    engine.observe(2, [6])
    assert (engine.room(1), engine.room(2)) == (197, 199)
    first, other = engine.step()
    assert (first.slot, other.slot) == (1, 2), "all that wait are answered at once"
    assert first.action_ids.dtype == np.int32 and first.logprobs.dtype == np.float32
    assert engine.room(1) == 197 - first.action_ids.size
    assert engine.step() == []  # owes nothing until the environment speaks
    engine.observe(1, [8])
    (second,) = engine.step()
    assert second.slot == 1
    assert engine.room(1) == 196 - first.action_ids.size - second.action_ids.size
    assert engine.seen[-1][0].input_ids.tolist() == [3, 4, 5, *first.action_ids, 8, STOP]
    engine.release(1)
    engine.begin(1)  # another game in the same slot knows nothing of the first
    engine.observe(1, [9])
    engine.step()
    assert engine.seen[-1][0].input_ids.tolist() == [9, STOP] and engine.seen[-1][0].turn.tolist() == [0]
    engine.observe(0, [1])
    engine.reset()
    assert engine.step() == [] and [engine.room(slot) for slot in range(3)] == [200] * 3


@pytest.mark.parametrize(("trunk", "pessimistic"), [("frozen", True), ("shared", False), ("separate", True)])
def test_the_score_is_the_critics_q_of_each_candidate(
    make_lm: Callable[..., Any], trunk: Any, pessimistic: bool
) -> None:
    """Read from a plain pass over the game that played it; the turn's number and repeats are known."""
    config = Config(
        actor=ActorConfig(pessimistic=pessimistic),
        critic=CriticConfig(hidden_size=8, trunk=trunk),
        rollout=RolloutConfig(best_of=3, temperature=0.7),
    )
    learner = make_learner(make_lm, config)
    games = random_games(5)
    batch = PackedBatch.from_arrays(pack_trajectories(games))
    due = batch.cu_turns[1:].long() - 1
    candidates = learner.engine.sample_alternatives(batch, due[:, None].repeat(1, 3))
    said = games[3].turns[0].action_ids  # the first candidate of a game of four turns is a repeated action
    candidates.action_ids[3, 0, : said.size] = torch.from_numpy(said)
    candidates.lengths[3, 0] = said.size
    got = learner.score(batch, candidates)

    wanted = torch.empty(5, 3)
    read = learner.critic.trunk
    for g, game in enumerate(games):
        before = prefix(game, game.num_turns - 1)
        for k in range(3):
            action = candidates.action_ids[g, k, : candidates.lengths[g, k]].numpy()
            hidden, _ = plain(read, np.concatenate([before, action]))
            ids = torch.from_numpy(np.concatenate([before, action]).astype(np.int64))
            logprobs = full_logprobs(read, ids, 0.7)[before.size - 1 : -1]
            logprob = logprobs.gather(1, ids[before.size :, None]).sum()
            repeated = action.tolist() in [turn.action_ids.tolist() for turn in game.turns[:-1]]
            q = learner.critic.heads.q_value(
                StateFeatures(plain(read, before)[0][None], torch.tensor([game.num_turns - 1])),
                ActionFeatures(hidden[None], logprob[None], torch.tensor([float(repeated)])),
            )
            wanted[g, k] = q.amin() if pessimistic else q.mean()
    assert not got.requires_grad and got.std() > 1e-3
    torch.testing.assert_close(got, wanted.detach(), rtol=1e-4, atol=1e-5)


def test_a_run_plays_and_is_evaluated_by_the_critics_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHER_FAST_CACHE", str(tmp_path / "cache"))
    players: list[tuple[str, Any]] = []
    for module in (run_state, evaluation):
        original = module.play_shared

        def spy(
            ranks: Any, engine: Any, *args: Any, name: str = module.__name__, do: Any = original, **more: Any
        ) -> Any:
            players.append((name.rpartition(".")[2], engine))
            return do(ranks, engine, *args, **more)

        monkeypatch.setattr(module, "play_shared", spy)
    out = tmp_path / "run"
    config = tiny_config(
        out,
        iterations=2,
        rollout=RolloutConfig(games=8, num_slots=4, max_new_tokens=4, best_of=3),
        critic=CriticConfig(hidden_size=16, epochs=4, batch_turns=32, warmup_iterations=0),
        actor=ActorConfig(epochs=0),
        eval=EvalConfig(every=1, games=4, final_games=8),
        warm_start=WarmStartConfig(games=50, steps=20, batch_games=8, lr=1e-2),
    )
    summary = train(config, RunFolder(out), SilentWatcher())
    rows = read_rows(out / "metrics.jsonl")
    assert [row["games"] for row in rows] == [0, 8, 16, 16] and summary["games"] == 16
    assert all("critic_loss" in row and np.isfinite(row["critic_loss"]) for row in rows[1:3])

    # Before, an evaluation an iteration but the last, three at the end; two rollouts by one engine.
    assert Counter(name for name, _ in players) == {"evaluation": 5, "run_state": 2}
    name, alone = players.pop(0)
    assert name == "evaluation" and type(alone) is EmbeddedEngine, "before, by the policy: no critic has learned yet"
    assert all(type(engine) is BestOfEngine and engine.num_candidates == 3 for _, engine in players)
    assert len({id(engine) for name, engine in players if name == "run_state"}) == 1
    assert all(engine.num_slots == 4 for _, engine in players)
    below = [engine.engine for name, engine in players if name == "evaluation"]
    assert sum(engine.greedy for engine in below) == 1, "the engine that the evaluation made is the one that samples"
    scorers = {engine.score.__self__ for _, engine in players}
    assert len(scorers) == 1, "the run's own critic"

    weights = [safetensors.torch.load_file(out / name / "model.safetensors") for name in ("start", "final", "best")]
    for key, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][key]) and torch.equal(tensor, weights[2][key]), "the actor rests"
