"""The learner: its critic's loss by two other roads, fresh actions at the right states, what it learns, its state."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tiny_learners import (
    MakeLM,
    make_learner,
    plain,
    prefix,
    random_games,
    said_before,
    turns_of,
    twin_of,
)
from torch import Tensor

from archer_fast.algorithms.archer import Archer
from archer_fast.backbone import Backbone
from archer_fast.batch import Alternatives, PackedBatch
from archer_fast.buffer import TrajectoryBuffer
from archer_fast.config import ActorConfig, BufferConfig, Config, CriticConfig, ModelConfig, RolloutConfig
from archer_fast.critic import ActionFeatures, StateFeatures
from archer_fast.envs.base import StepResult
from archer_fast.meters import Meters
from archer_fast.optim import NonFiniteLoss
from archer_fast.rollout.embedded import EmbeddedEngine
from archer_fast.rollout.interact import play_games
from archer_fast.trajectory import Trajectory, Turn

pytestmark = pytest.mark.usefixtures("one_thread")
TRUNKS = ["frozen", "shared", "separate"]
TARGETS = ["behaviour", "resample"]


def make_config(
    trunk: Any = "frozen", value_target: Any = "behaviour", data: Any = "replay", kl_coef: float = 0.1, **critic: Any
) -> Config:
    """With an actor on fresh actions alone, by REINFORCE; as it is shipped: `algorithms/test_default_actor.py`."""
    settings = {"hidden_size": 16, "batch_turns": 12, "epochs": 3, "gamma": 0.9} | critic
    return Config(
        critic=CriticConfig(trunk=trunk, value_target=value_target, **settings),
        actor=ActorConfig(
            data=data,
            actions="fresh",
            loss="reinforce",
            normalise_advantages=False,
            batch_games=4,
            states_per_game=2,
            alternatives=3,
            epochs=2,
            kl_coef=kl_coef,
            lr=1e-3,
            max_kl_step=1e3,
        ),
        rollout=RolloutConfig(max_new_tokens=4),
        buffer=BufferConfig(max_trajectories=64, max_tokens=4096),
        max_skipped_steps=2,
    )


# -- the critic's loss -----------------------------------------------------------------------------


def loss_by_hand(learner: Archer, turns: list[tuple[Trajectory, int]]) -> dict[str, float]:
    """The critic's loss on some turns, behaviour target: plain passes turn by turn, scalars, no cache, no packing."""
    critic, gamma = learner.critic, learner.config.critic.gamma
    target_trunk = critic.trunk if critic.target_trunk is None else critic.target_trunk
    squares: dict[str, list[float]] = {"q": [], "v": []}
    q_values, v_values = [], []

    def state_of(trunk: Backbone, ids: np.ndarray, turn: int) -> StateFeatures:
        return StateFeatures(plain(trunk, ids)[0][None], torch.tensor([turn]))

    def action_of(trunk: Backbone, game: Trajectory, turn: int) -> ActionFeatures:
        action = game.turns[turn].action_ids
        hidden, logprob = plain(trunk, np.concatenate([prefix(game, turn), action]), action.size)
        return ActionFeatures(hidden[None], logprob[None], torch.tensor([said_before(game, turn, action)]))

    with torch.no_grad():
        for game, i in turns:
            last = i == game.num_turns - 1
            reward = game.turns[i].reward
            after = game.input_ids if last else prefix(game, i + 1)
            bootstrap = critic.target_heads.value(state_of(target_trunk, after, i + 1))[:, 0]
            q_target = reward + (0.0 if last and game.terminated else gamma) * bootstrap
            here, action = state_of(critic.trunk, prefix(game, i), i), action_of(critic.trunk, game, i)
            q, v = critic.heads.q_value(here, action)[:, 0], critic.heads.value(here)[:, 0]
            v_target = critic.target_heads.q_value(
                state_of(target_trunk, prefix(game, i), i), action_of(target_trunk, game, i)
            )[:, 0]
            squares["q"].append(float((q - q_target).square().sum()))
            squares["v"].append(float((v - v_target).square().sum()))
            q_values += q.tolist()
            v_values += v.tolist()
    q_loss, v_loss = (sum(squares[k]) / len(turns) for k in ("q", "v"))
    return {
        "critic_loss": q_loss + v_loss,
        "q_loss": q_loss / 2,
        "v_loss": v_loss / 2,
        "q_mean": sum(q_values) / len(q_values),
        "q_min": min(q_values),
        "q_max": max(q_values),
        "v_mean": sum(v_values) / len(v_values),
    }


def drawn_turns(learner: Archer, buffer: TrajectoryBuffer) -> list[int]:
    """The turn ids that the next critic step will draw from `buffer`'s twin, in no particular order."""
    wanted = learner.config.critic.batch_turns
    if learner.config.critic.trunk == "frozen":
        return buffer.sample_turns(wanted).tolist()
    num_games = max(1, round(wanted * len(buffer) / buffer.num_turns))
    first, count = buffer.turn_span(buffer.sample_trajectories(num_games))
    return [t for f, n in zip(first, count, strict=True) for t in range(f, f + n)]


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_critics_loss_is_that_of_plain_passes(make_lm: MakeLM, trunk: str, tmp_path: Path) -> None:
    """Frozen: from the cache. Shared and separate: from one packed pass. Online and target differ in all parts."""
    learner, games = make_learner(make_lm, make_config(trunk, epochs=1, tau=0.3, trunk_lr=1e-2)), random_games()
    for part in (games[:4], games[4:]):
        learner.insert(part, Meters())
    learner.update_critic(Meters())  # online and target weights part
    turns = turns_of(games)
    chosen = drawn_turns(learner, twin_of(learner.buffer, tmp_path))
    assert len({id(turns[t][0]) for t in chosen}) >= 3
    wanted = loss_by_hand(learner, [turns[t] for t in chosen])
    meters = Meters()
    learner.update_critic(meters)
    got = meters.read()
    assert {name: got[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("trunk", ["frozen", "shared", "separate"])
@pytest.mark.parametrize("value_target", ["behaviour", "resample"])
def test_reading_ahead_changes_nothing(make_lm: MakeLM, trunk: str, value_target: str) -> None:
    """In a thread of its own, as on a GPU; the memory that it writes to is used again."""
    readers: set[str] = set()
    parameters = []
    for reads_ahead in (False, True):
        learner = make_learner(make_lm, make_config(trunk, value_target, epochs=6))
        assert not learner.reads_ahead, "on a CPU"
        learner.reads_ahead = reads_ahead
        learner.insert(random_games(), Meters())
        read = learner.buffer.turn_records

        def noted(turn_ids: np.ndarray, read: Any = read) -> Any:
            readers.add(threading.current_thread().name)
            return read(turn_ids)

        learner.buffer.turn_records = noted  # type: ignore[method-assign]
        learner.update_critic(Meters())
        parameters.append(torch.nn.utils.parameters_to_vector(learner.critic.parameters()).detach().clone())
    assert torch.equal(*parameters)
    assert len(readers) == 2 and any(name.startswith("prefetch") for name in readers)


def test_games_that_left_the_buffer_left_the_critic(make_lm: MakeLM, tmp_path: Path) -> None:
    """Insert in parts, over evictions: ids go on counting, and cached features stay with their turns."""
    config = make_config(epochs=1)
    config.buffer = BufferConfig(max_trajectories=5, max_tokens=4096)
    learner, games = make_learner(make_lm, config), random_games(17)
    for start in (0, 3, 6, 13):
        learner.insert(games[start : {0: 3, 3: 6, 6: 13, 13: 17}[start]], Meters())
    assert learner.buffer.trajectory_range == (12, 17)
    chosen = drawn_turns(learner, twin_of(learner.buffer, tmp_path))
    wanted = loss_by_hand(learner, [turns_of(games)[t] for t in chosen])
    meters = Meters()
    learner.update_critic(meters)
    assert meters.read()["critic_loss"] == pytest.approx(wanted["critic_loss"], rel=1e-4)


def test_the_kl_of_played_games_is_measured_against_the_start_policy(make_lm: MakeLM) -> None:
    learner, games, meters = make_learner(make_lm, make_config()), random_games(), Meters()
    learner.insert(games, meters)
    total = 0.0
    for game, i in turns_of(games):
        action = game.turns[i]
        logprob = plain(learner.reference, np.concatenate([prefix(game, i), action.action_ids]), action.action_ids.size)
        total += float(action.rollout_logprobs.sum()) - float(logprob[1])
    assert meters.read()["kl"] == pytest.approx(total / len(turns_of(games)), rel=1e-4)


# -- fresh actions ---------------------------------------------------------------------------------


class Recorder:
    """Every (prefix, action) that the engine sampled as an alternative."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self.found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.num_calls = 0
        sample = engine.sample_alternatives

        def spy(batch: PackedBatch, turn_ids: Tensor) -> Alternatives:
            made = sample(batch, turn_ids)
            self.num_calls += 1
            for game, row in made.used.nonzero().tolist():
                start, turn = int(batch.cu_seqlens[game]), int(made.turn_ids[game, row])
                before = batch.input_ids[start : int(batch.state_positions[turn]) + 1].tolist()
                action = made.action_ids[game, row, : made.lengths[game, row]].tolist()
                self.found.append((tuple(before), tuple(action)))
            return made

        engine.sample_alternatives = spy  # type: ignore[method-assign]


@pytest.mark.parametrize("trunk", TRUNKS)
def test_fresh_actions_answer_the_states_that_were_drawn(make_lm: MakeLM, trunk: str, tmp_path: Path) -> None:
    """Each feature of a' is that of an action the actor just sampled at that very state, each sample used once."""
    learner, games = make_learner(make_lm, make_config(trunk, "resample")), random_games()
    learner.insert(games, Meters())
    turns = turns_of(games)
    twin = twin_of(learner.buffer, tmp_path)
    draws = [np.array(drawn_turns(learner, twin)) for _ in range(3)]
    recorder = Recorder(learner.engine)
    fresh = learner._fresh_actions(draws, Meters())
    assert recorder.num_calls == 3, "9 games, at most batch_games=4 a call"
    left = list(recorder.found)
    assert len(left) == sum(d.size for d in draws)
    for draw, features in zip(draws, fresh, strict=True):
        assert features.hidden.shape[0] == features.logprob.shape[0] == draw.size
        for row, turn_id in enumerate(draw):
            before = tuple(prefix(*turns[turn_id]).tolist())
            for candidate in {action for state, action in left if state == before}:
                hidden, logprob = plain(learner.critic.trunk, np.array(before + candidate), len(candidate))
                if torch.allclose(features.hidden[row], hidden, atol=1e-4) and torch.allclose(
                    features.logprob[row], logprob, atol=1e-4
                ):
                    assert features.repeated[row] == said_before(*turns[turn_id], candidate)
                    left.remove((before, candidate))
                    break
            else:
                pytest.fail(f"turn {turn_id}: no sampled action at that state has these features")
    assert left == []


def test_fresh_actions_follow_the_actor_and_not_the_start_policy(make_lm: MakeLM) -> None:
    learner, games = make_learner(make_lm, make_config(value_target="resample")), random_games(1)
    with torch.no_grad():  # the actor now says token 7 and stops never
        learner.actor.lm_head_weight.zero_()
        learner.actor.lm_head_weight[7] = 100 * plain(learner.actor, prefix(games[0], 0))[0].sign()
    learner.insert(games, Meters())
    recorder = Recorder(learner.engine)
    learner.update_critic(Meters())
    assert len(recorder.found) == 36
    assert {action[0] for _, action in recorder.found} == {7}


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_resampled_target_is_q_of_the_fresh_action(make_lm: MakeLM, trunk: str, tmp_path: Path) -> None:
    """v_loss by hand: Vi(s) against the target Qi at the state and at the action sampled for that draw."""
    learner, games = make_learner(make_lm, make_config(trunk, "resample", epochs=1)), random_games()
    learner.insert(games, Meters())
    turns, chosen = turns_of(games), drawn_turns(learner, twin_of(learner.buffer, tmp_path))
    recorder, critic = Recorder(learner.engine), learner.critic
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    weights = {name: p.detach().clone() for name, p in learner.actor.named_parameters()}
    meters = Meters()
    learner.update_critic(meters)
    critic.load_state_dict(before)
    with torch.no_grad():
        for name, p in learner.actor.named_parameters():
            p.copy_(weights[name])
        # Samples at one state are exchangeable in the mean over draws only through their own V(s): pair by state.
        total = 0.0
        by_state = {tuple(prefix(*turns[t]).tolist()): turns[t] for t in chosen}
        for state_ids, action in recorder.found:
            game, turn = by_state[state_ids]
            state = StateFeatures(plain(critic.trunk, np.array(state_ids))[0][None], torch.tensor([turn]))
            hidden, logprob = plain(critic.trunk, np.array(state_ids + action), len(action))
            repeated = torch.tensor([said_before(game, turn, action)])
            q = critic.target_heads.q_value(state, ActionFeatures(hidden[None], logprob[None], repeated))
            total += float((critic.heads.value(state) - q).square().sum())
    assert len(recorder.found) == len(chosen)
    assert meters.read()["v_loss"] == pytest.approx(total / len(chosen) / 2, rel=1e-4)


# -- both phases in every mode ---------------------------------------------------------------------


def weights_of(*modules: torch.nn.Module | None) -> list[Tensor]:
    return [p.detach().clone() for module in modules if module is not None for p in module.parameters()]


def differ(left: list[Tensor], right: list[Tensor]) -> bool:
    return any(not torch.equal(x, y) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize("data", ["replay", "on_policy"])
@pytest.mark.parametrize("value_target", TARGETS)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_every_mode_learns_and_moves_what_it_should(make_lm: MakeLM, trunk: str, value_target: str, data: str) -> None:
    learner = make_learner(make_lm, make_config(trunk, value_target, data))
    learner.insert(random_games(6), Meters())
    learner.insert(random_games(3, seed=1), Meters())
    heads, actor = weights_of(learner.critic.heads), weights_of(learner.actor)
    reference, separate = weights_of(learner.reference), weights_of(learner.critic.own_trunk)
    steps: list[str] = []
    meters = Meters()
    learner.update_critic(meters, lambda: steps.append("critic"))
    assert differ(heads, weights_of(learner.critic.heads))
    assert differ(actor, weights_of(learner.actor)) == (trunk == "shared")
    assert differ(separate, weights_of(learner.critic.own_trunk)) == (trunk == "separate")
    heads, actor = weights_of(learner.critic.heads), weights_of(learner.actor)
    learner.update_actor(meters, lambda: steps.append("actor"))
    assert differ(actor, weights_of(learner.actor))
    assert not differ(heads, weights_of(learner.critic.heads)), "the actor's phase leaves the critic alone"
    assert not differ(reference, weights_of(learner.reference))
    assert steps == ["critic"] * 3 + ["actor"] * 2
    row = meters.read()
    assert {"critic_loss", "actor_loss", "actor_entropy", "advantage_std", "skipped_steps"} <= row.keys()
    assert all(np.isfinite(value) for value in row.values()) and row["skipped_steps"] == 0


@pytest.mark.parametrize("data", ["replay", "on_policy"])
def test_the_actor_visits_states_of_the_games_it_should(make_lm: MakeLM, data: str) -> None:
    config = make_config(data=data)
    config.actor.epochs = 12
    learner = make_learner(make_lm, config)
    old, new = random_games(8), random_games(3, seed=1)
    learner.insert(old, Meters())
    learner.insert(new, Meters())
    recorder = Recorder(learner.engine)
    learner.update_actor(Meters())
    states = {tuple(prefix(game, i).tolist()): (kind, game, i) for kind, games in (("old", old), ("new", new))
              for game in games for i in range(game.num_turns)}  # fmt: skip
    visited = [states[state] for state, _ in recorder.found]
    assert {kind for kind, _, _ in visited} == ({"new"} if data == "on_policy" else {"old", "new"})
    assert {i for _, _, i in visited} >= {0, 1, 2}
    if data == "on_policy":  # 12 times all 3 games: 1 + 2 + 2 states, each answered 3 times
        assert len(visited) == 12 * 3 * (1 + 2 + 2)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_penalty_is_against_the_start_policy_whatever_the_trunk(make_lm: MakeLM, trunk: str) -> None:
    """An actor with no advantage to follow and a large penalty goes back towards the start policy."""
    config = make_config(trunk, kl_coef=50.0, lr=0.0, trunk_lr=0.0)
    config.actor.epochs, config.actor.batch_games = 20, 9
    learner = make_learner(make_lm, config)
    with torch.no_grad():
        for p in learner.critic.heads.q.parameters():
            p.zero_()
        if learner.critic.own_trunk is not None:  # a trunk that has gone far away must not be the reference
            for p in learner.critic.own_trunk.parameters():
                p.mul_(0.5)
    learner.insert(random_games(), Meters())

    def distance() -> float:
        total = 0.0
        for game in random_games():
            rows = []
            for model in (learner.actor, learner.reference):
                tokens = torch.from_numpy(game.input_ids.astype(np.int64))
                layout = model.layout(torch.tensor([0, tokens.numel()], dtype=torch.int32), (tokens.numel(),))
                with torch.no_grad():
                    hidden = model(tokens, torch.arange(tokens.numel()), layout)
                    rows.append((hidden @ model.lm_head_weight.T).log_softmax(-1))
            total += float((rows[0].exp() * (rows[0] - rows[1])).sum(-1).mean())
        return total / 9

    before = distance()
    learner.update_actor(Meters())
    assert distance() < 0.7 * before


@pytest.mark.parametrize(("max_kl_step", "num_steps"), [(0.0, 1), (1e3, 5)])
def test_actor_steps_end_once_the_policy_has_moved(make_lm: MakeLM, max_kl_step: float, num_steps: int) -> None:
    config = make_config()
    config.actor.epochs, config.actor.max_kl_step = 5, max_kl_step
    learner, meters = make_learner(make_lm, config), Meters()
    learner.insert(random_games(), meters)
    learner.update_actor(meters)
    assert meters.read()["actor_steps"] == learner.actor_step.num_steps == num_steps


# -- passes of few tokens --------------------------------------------------------------------------


class PassSizes:
    """Tokens of every pass over whole games by the reference, and of every pass of the actor that takes a gradient."""

    def __init__(self, learner: Archer) -> None:
        self.reference: list[int] = []
        self.actor: list[int] = []
        learner.reference.register_forward_pre_hook(lambda _, inputs: self.reference.append(inputs[0].numel()))
        learner.actor.register_forward_pre_hook(
            lambda _, inputs: self.actor.append(inputs[0].numel()) if torch.is_grad_enabled() else None
        )


def stored_features(learner: Archer) -> dict[str, Tensor]:
    """What the buffer keeps of every turn for a frozen trunk; nothing for another."""
    if learner.critic.trains_trunk:
        return {}
    turn_ids = np.arange(*learner.buffer.turn_range)
    rows = learner.buffer.read_features(turn_ids, learner.trunk_version, learner.layout.state_bytes)
    state, action, behind = learner.layout.read(rows, torch.zeros(turn_ids.size, dtype=torch.int64))
    return {"state": state.hidden, "action": action.hidden, "logprob": action.logprob, "behind": behind.hidden}


def iteration_in_passes(
    make_lm: MakeLM, trunk: str, max_pass_tokens: int
) -> tuple[dict[str, float], dict[str, Tensor], PassSizes]:
    """Metrics of one iteration, the gradients of its last steps with the fresh features and the cache, its passes."""
    config = make_config(trunk, "resample")
    config.actor.normalise_advantages, config.actor.entropy_coef, config.actor.epochs = True, 0.1, 1
    config.critic.epochs, config.actor.batch_games = 1, 8
    config.model.max_pass_tokens = max_pass_tokens
    learner, meters = make_learner(make_lm, config), Meters()
    sizes = PassSizes(learner)
    learner.insert(random_games(9), meters)
    learner.insert(random_games(5, seed=1), meters)
    fresh = learner._fresh_actions([np.arange(12)], meters)[0]
    learner.update_critic(meters)
    sizes.actor.clear()  # a shared trunk reads whole games with a gradient
    learner.update_actor(meters)
    found = {f"actor.{n}": p.grad for n, p in learner.actor.named_parameters() if p.grad is not None}
    found |= {f"heads.{n}": p.grad for n, p in learner.critic.heads.named_parameters() if p.grad is not None}
    found |= {f"fresh.{n}": x for n, x in fresh._asdict().items()}
    found |= stored_features(learner)
    return meters.read(), found, sizes


@pytest.mark.parametrize("wrong", [0, 2**31])
def test_a_pass_holds_a_token_or_more_and_has_int32_offsets(wrong: int) -> None:
    with pytest.raises(ValueError, match=r"max_pass_tokens: wanted a number from 1 to 2\.14748e\+09"):
        ModelConfig(max_pass_tokens=wrong)


@pytest.mark.parametrize("max_pass_tokens", [1, 60, 100])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_short_passes_compute_what_one_pass_does(make_lm: MakeLM, trunk: str, max_pass_tokens: int) -> None:
    """1: every pass holds as many tokens as the longest game."""
    row, tensors, whole = iteration_in_passes(make_lm, trunk, 32768)
    short_row, short_tensors, short = iteration_in_passes(make_lm, trunk, max_pass_tokens)
    assert len(whole.actor) == 1 < len(short.actor)
    assert sum(whole.actor) == sum(short.actor) and sum(whole.reference) == sum(short.reference)
    assert len(short.reference) > len(whole.reference) >= 2
    if max_pass_tokens > 1:
        assert max(short.actor + short.reference) <= max_pass_tokens < min(whole.actor)
    assert short_row == pytest.approx(row, rel=1e-4, abs=1e-5)
    assert tensors.keys() == short_tensors.keys() and len(tensors) > 20
    for name, tensor in tensors.items():
        tolerance = 1e-4 * max(float(tensor.abs().max()), 1e-6)
        torch.testing.assert_close(
            short_tensors[name], tensor, rtol=1e-4, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# -- a bandit --------------------------------------------------------------------------------------


class Bandit:
    """One turn: 1 for an answer that begins with "c", 0 for all others."""

    name: ClassVar[str] = "bandit"
    step_time_limit: float | None = None
    max_turns = 1

    def reset(self, seed: int, options: Mapping[str, Any] | None = None) -> str:
        return "ab"

    def step(self, action: str) -> StepResult:
        return StepResult("", float(action.startswith("c")), True, False, {})


def encode(text: str) -> list[int]:
    return [ord(c) - ord("a") + 1 for c in text]


def decode(ids: Any) -> str:
    return "".join(chr(ord("a") + i - 1) for i in ids)


def chance_of_c(learner: Archer) -> float:
    tokens = torch.tensor(encode("ab"))
    layout = learner.actor.layout(torch.tensor([0, 2], dtype=torch.int32), (2,))
    with torch.no_grad():
        hidden = learner.actor(tokens, torch.arange(2), layout)
        return float((hidden[-1] @ learner.actor.lm_head_weight.T).softmax(-1)[3])


def play_bandit(make_lm: MakeLM, trunk: str, value_target: str, seed: int) -> tuple[float, float]:
    """The chance of "c" before and after 8 iterations of 16 games, the actor moving in the last 6."""
    config = make_config(trunk, value_target, kl_coef=0.0, epochs=20, batch_turns=32, lr=3e-3, trunk_lr=1e-3)
    config.actor.batch_games, config.actor.alternatives, config.actor.lr = 16, 8, 4e-3
    config.seed, config.actor.epochs = seed, 4
    learner = make_learner(make_lm, config, seed, flatten=0.2)
    before = chance_of_c(learner)
    for iteration in range(8):
        learner.engine.reset()
        games = play_games(learner.engine, Bandit, encode, decode, range(16 * iteration, 16 * iteration + 16))
        learner.insert(games.trajectories, Meters())
        learner.update_critic(Meters())
        if iteration >= 2:
            learner.update_actor(Meters())
    return before, chance_of_c(learner)


@pytest.mark.parametrize(("trunk", "value_target"), [("frozen", "behaviour"), ("shared", "resample")])
def test_the_better_answer_becomes_likelier(make_lm: MakeLM, trunk: str, value_target: str) -> None:
    # From .07; seeds 0-3 of either mode end between .57 and .83, an actor that learns nothing stays.
    before, after = play_bandit(make_lm, trunk, value_target, seed=0)
    assert after > before + 0.3


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value_target", TARGETS)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_saved_state_continues_bit_by_bit(make_lm: MakeLM, trunk: str, value_target: str, tmp_path: Path) -> None:
    config = make_config(trunk, value_target)
    first = make_learner(make_lm, config)

    def train(learner: Archer, seed: int) -> dict[str, float]:
        meters = Meters()
        learner.insert(random_games(5, seed), meters)
        learner.update_critic(meters)
        learner.update_actor(meters)
        return meters.read()

    train(first, 0)
    second = make_learner(make_lm, config, seed=9)
    second.buffer = twin_of(first.buffer, tmp_path)
    with torch.no_grad():
        for source, target in zip(first.actor.parameters(), second.actor.parameters(), strict=True):
            target.copy_(source)
    assert first.engine.generator is not None and second.engine.generator is not None
    second.engine.generator.set_state(first.engine.generator.get_state())
    second.load_state_tensors({name: tensor.clone() for name, tensor in first.state_tensors().items()})
    second.load_state_numbers(first.state_numbers())
    assert train(first, 1) == train(second, 1)
    assert not differ(weights_of(first.actor), weights_of(second.actor))
    left, right = first.state_tensors(), second.state_tensors()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    assert first.state_numbers() == second.state_numbers()
    assert first.state_numbers()["steps"] == {"critic": [6, 0], "actor": [4, 0]}


def test_a_missing_tensor_is_named(make_lm: MakeLM) -> None:
    learner = make_learner(make_lm, make_config())
    tensors = learner.state_tensors()
    del tensors["critic.heads.q.weights.1"]
    with pytest.raises(KeyError, match=r"critic\.heads\.q\.weights\.1"):
        learner.load_state_tensors(tensors)


def test_a_misshapen_tensor_is_named(make_lm: MakeLM) -> None:
    learner = make_learner(make_lm, make_config())
    tensors = learner.state_tensors()
    tensors["critic.heads.q.weights.1"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"heads\.q\.weights\.1"):
        learner.load_state_tensors(tensors)


def test_features_of_another_start_policy_are_refused(make_lm: MakeLM) -> None:
    learner, other = make_learner(make_lm, make_config()), make_learner(make_lm, make_config())
    with torch.no_grad():
        next(other.reference.parameters())[0, 0] += 1e-3
    other = Archer(other.config, other.actor, other.reference, other.engine, other.buffer)
    with pytest.raises(ValueError, match=r"trunk_version: features of a trunk"):
        learner.load_state_numbers(other.state_numbers())


def test_a_buffer_with_rows_of_another_size_is_refused(make_lm: MakeLM) -> None:
    learner = make_learner(make_lm, make_config())
    buffer = TrajectoryBuffer(4096, 64)
    with pytest.raises(ValueError, match=rf"buffer: wanted feature_bytes = {learner.layout.row_bytes}, got 0"):
        Archer(learner.config, learner.actor, learner.reference, learner.engine, buffer)


def test_games_that_lack_features_are_read_again(make_lm: MakeLM) -> None:
    learner = make_learner(make_lm, make_config())
    learner.insert(random_games(), Meters())
    wanted = stored_features(learner)
    assert learner.complete_features() == 0
    lost = np.array([1, 4, 5])
    num_rows = int((learner.buffer.turn_span(lost)[1] + 1).sum())
    learner.buffer.set_features(lost, 0, np.zeros((num_rows, learner.layout.row_bytes), np.uint8))
    with pytest.raises(
        ValueError, match=r"wanted features of trunk version \d+, got turn \d of trajectory 1, which has"
    ):
        stored_features(learner)
    assert learner.complete_features() == 3
    for name, tensor in stored_features(learner).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-5)


# -- what is not finite ----------------------------------------------------------------------------


def all_weights(learner: Archer) -> list[Tensor]:
    return weights_of(learner.critic.heads, learner.actor, learner.critic.own_trunk)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_reward_too_large_to_square_stops_the_critic_unchanged(make_lm: MakeLM, trunk: str) -> None:
    learner, games = make_learner(make_lm, make_config(trunk)), random_games(3)
    turn = games[0].turns[0]
    huge = Turn(turn.observation_ids, turn.action_ids, turn.rollout_logprobs, 3e38, 0)
    learner.insert([Trajectory((huge,), np.array([1]), True, False)], Meters())
    before, meters = all_weights(learner), Meters()
    with pytest.raises(NonFiniteLoss, match="critic: 2 optimizer steps in a row") as caught:
        learner.update_critic(meters)
    assert set(caught.value.trajectory_ids.tolist()) == {0}
    assert not differ(before, all_weights(learner))
    assert meters.read()["skipped_steps"] == 3


def test_one_bad_batch_is_skipped_and_the_run_goes_on(make_lm: MakeLM) -> None:
    config = make_config(epochs=3)
    learner = make_learner(make_lm, config)
    learner.insert(random_games(), Meters())
    read, calls = learner.layout.read, []

    def faulty(*args: Any) -> tuple[StateFeatures, ActionFeatures, StateFeatures]:
        calls.append(1)
        state, action, behind = read(*args)
        return (state._replace(hidden=state.hidden * torch.nan) if len(calls) == 2 else state), action, behind

    learner.layout.read = faulty  # type: ignore[method-assign]
    meters = Meters()
    learner.update_critic(meters)
    assert meters.read()["skipped_steps"] == 1
    assert all(torch.isfinite(p).all() for p in learner.critic.parameters())


def test_nan_in_the_critic_stops_the_critic(make_lm: MakeLM) -> None:
    learner = make_learner(make_lm, make_config())
    learner.insert(random_games(), Meters())
    with torch.no_grad():
        learner.critic.heads.v.mlp.weights[0][1, 0, 0] = torch.nan
    with pytest.raises(NonFiniteLoss, match="critic: "):
        learner.update_critic(Meters())


def test_nan_in_the_actor_stops_the_actor(make_lm: MakeLM) -> None:
    learner = make_learner(make_lm, make_config())
    learner.insert(random_games(), Meters())
    learner.update_critic(Meters())
    with torch.no_grad():
        learner.actor.lm_head_weight[3, 0] = torch.nan
    meters = Meters()
    with pytest.raises(NonFiniteLoss, match="actor: 2 optimizer steps in a row") as caught:
        learner.update_actor(meters)
    assert len(set(caught.value.trajectory_ids.tolist())) == 4
    assert meters.read()["skipped_steps"] == 2


def test_nan_in_the_critic_does_not_reach_the_actor(make_lm: MakeLM) -> None:
    learner = make_learner(make_lm, make_config())
    learner.insert(random_games(), Meters())
    with torch.no_grad():
        learner.critic.heads.q.weights[0][0, 0, 0] = torch.nan
    before = weights_of(learner.actor)
    with pytest.raises(NonFiniteLoss, match="actor: "):
        learner.update_actor(Meters())
    assert not differ(before, weights_of(learner.actor))
