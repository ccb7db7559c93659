"""Measured states: fresh actions at states of held-out games, and what each returns when the policy plays on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from archer_fast.backbone import Backbone
from archer_fast.batch import PackedBatch
from archer_fast.config import RolloutConfig, TaskConfig
from archer_fast.diagnosis import Bool, Float64
from archer_fast.envs import registry
from archer_fast.envs.base import ResamplableEnv, TextEnv
from archer_fast.evaluation import encoder, evaluation_seeds
from archer_fast.packing import Int32, Int64, monte_carlo_returns, pack_trajectories
from archer_fast.rollout.embedded import EmbeddedEngine
from archer_fast.rollout.guard import Encode, EnvFault, Guard
from archer_fast.rollout.interact import Decode, Opening, action_text, continue_games, play_games
from archer_fast.token_packer import pack_tokens
from archer_fast.trajectory import Trajectory

logger = logging.getLogger(__name__)

STATES_TOGETHER = 32  # whose continuations are in memory at once: K M envs a state


@dataclass(slots=True, eq=False)
class MeasuredStates:
    """S states, one a game, with K fresh actions each and M returns of each action.

    An action that was drawn twice counts once: of equal rows of `action_ids` the first alone is valid, and the others
    have no returns. Two states of two actions of at most three tokens (the second state's two are the same):

        turn        [0, 4]
        lengths     [[2, 3], [1, 1]]
        valid       [[T, T], [T, .]]
        returns     [[[-4, -9], [-3, -3]], [[-7, -8], [nan, nan]]]
    """

    games: list[Trajectory]  # S, held out, each played to its end by the same policy
    turn: Int64  # [S], the turn of its game at which the state stands
    action_ids: Int32  # [S, K, W], the stop token included, 0 behind the end
    lengths: Int64  # [S, K]
    valid: Bool  # [S, K]
    returns: Float64  # [S, K, M], discounted by gamma a turn from the action's own reward on
    gamma: float
    num_truncated: int = 0  # continuations that a limit cut: what they would still have earned is not in `returns`

    def action(self, state: int, k: int) -> list[int]:
        """The tokens of one action."""
        ids: list[int] = self.action_ids[state, k, : self.lengths[state, k]].tolist()
        return ids

    def said(self, state: int) -> list[int]:
        """The tokens that the state's actions answer: everything from the game's first observation on."""
        turns, turn = self.games[state].turns, int(self.turn[state])
        parts = [ids for t in turns[:turn] for ids in (t.observation_ids, t.action_ids)]
        ids: list[int] = np.concatenate([*parts, turns[turn].observation_ids]).tolist()
        return ids


def check_resamplable(task: TaskConfig) -> None:
    """ValueError for a task whose env does not keep the protocol that measuring needs."""
    env = registry.get(task.name).make_env(**task.options)
    if not isinstance(env, ResamplableEnv):
        lacking = [name for name in ("clone", "resample_hidden") if not hasattr(env, name)]
        raise ValueError(
            f"task {task.name!r}: wanted clone() and resample_hidden(), which diagnose needs, "
            f"got an env without {' and '.join(lacking)}"
        )


def measure_states(
    policy: Backbone,
    stop_token_id: int,
    task: TaskConfig,
    rollout: RolloutConfig,
    *,
    gamma: float,
    num_states: int = 256,
    num_actions: int = 8,
    num_continuations: int = 8,
    seed: int = 0,
    max_pass_tokens: int = 32768,
    on_continuation: Callable[[], object] = lambda: None,
) -> MeasuredStates:
    """Play `num_states` held-out games, choose one turn of each, try fresh actions there and see how they end.

    Games are those of `evaluate_policy` with this seed. A game's turn is uniform over its turns, and spread: over all
    games its place between first and last turn takes every S-th of the unit interval once. Actions and continuations
    are sampled as the games are, at the rollout's temperature. The m-th continuation of every action of a state has the
    same hidden state of the game, drawn from what the dialogue leaves possible: common random numbers, which make the
    differences between actions less noisy. Everything depends on `seed` alone.
    gamma: the critic's discount a turn. A pass over whole games holds `max_pass_tokens`, or those of the longest.
    `on_continuation` is called once a return, of S K M, also where none had to be played.
    Errors: ValueError for a number below 1, or a task without clone() and resample_hidden(); TooManyDroppedGames as in
    `play_games`.
    """
    wanted = {"num_states": num_states, "num_actions": num_actions, "num_continuations": num_continuations}
    for name, count in wanted.items():
        if count < 1:
            raise ValueError(f"{name}: wanted at least 1, got {count}")
    check_resamplable(task)
    spec, rng = registry.get(task.name), np.random.default_rng([seed, 3])
    encode, decode = encoder(policy.tokenizer), policy.tokenizer.decode
    engine = EmbeddedEngine(
        policy,
        stop_token_id,
        num_slots=rollout.num_slots,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        generator=torch.Generator(policy.device).manual_seed(seed),
    )

    def make_env() -> TextEnv:
        return spec.make_env(**task.options)

    seeds, allowed = evaluation_seeds(seed, num_states), rollout.max_dropped_share
    games = play_games(engine, make_env, encode, decode, seeds, max_dropped_share=allowed).trajectories
    turn = spread_turns([game.num_turns for game in games], rng)
    action_ids, lengths = draw_actions(engine, games, turn, num_actions, max_pass_tokens)
    valid = first_of_each(action_ids, lengths)
    hidden_seeds = rng.integers(0, 1 << 62, (len(games), num_continuations))
    returns = np.full((*valid.shape, num_continuations), np.nan)
    states = MeasuredStates(games, turn, action_ids, lengths, valid, returns, gamma)
    player = _Player(engine, make_env, encode, decode, allowed, on_continuation)
    for at in range(0, len(games), STATES_TOGETHER):
        player.measure(states, range(at, min(at + STATES_TOGETHER, len(games))), hidden_seeds)
    states.valid &= ~np.isnan(states.returns).any(2)
    return states


def spread_turns(num_turns: Sequence[int], rng: np.random.Generator) -> Int64:
    """One turn of each game, uniform over its turns, that all together are spread over early and late ones alike."""
    count = len(num_turns)
    place = (rng.permutation(count) + rng.random(count)) / count
    turn: Int64 = (place * num_turns).astype(np.int64)
    return turn.clip(max=np.asarray(num_turns) - 1)  # a place of 1 - 2^-53 may round to 1


def draw_actions(
    engine: EmbeddedEngine, games: Sequence[Trajectory], turn: Int64, num_actions: int, max_pass_tokens: int
) -> tuple[Int32, Int64]:
    """K fresh actions at one turn of each game: ids [S, K, W] and lengths [S, K]."""
    action_ids = np.zeros((len(games), num_actions, engine.max_new_tokens), np.int32)
    lengths = np.zeros((len(games), num_actions), np.int64)
    sizes = [game.num_tokens + num_actions * engine.max_new_tokens for game in games]
    for part in pack_tokens(sizes, max(max_pass_tokens, *sizes)):
        packed = pack_trajectories([games[i] for i in part])
        rows = np.repeat((packed.cu_turns[:-1] + turn[part])[:, None], num_actions, 1)
        batch = PackedBatch.from_arrays(packed, engine.backbone.device)
        drawn = engine.sample_alternatives(batch, torch.from_numpy(rows).to(engine.backbone.device))
        lengths[part] = drawn.lengths.cpu().numpy()
        width = drawn.action_ids.shape[2]
        real = np.arange(width) < lengths[part][..., None]
        action_ids[part, :, :width] = np.where(real, drawn.action_ids.cpu().numpy(), 0)
    return action_ids, lengths


def first_of_each(action_ids: Int32, lengths: Int64) -> Bool:
    """[S, K] True where no action before it in its state has the same tokens."""
    rows = np.concatenate([lengths[..., None], action_ids], 2)
    same = (rows[:, :, None] == rows[:, None]).all(3)  # [S, K, K]
    made: Bool = same.argmax(2) == np.arange(same.shape[1])
    return made


@dataclass(slots=True)
class _Player:
    """Plays actions, and the policy's games after them."""

    engine: EmbeddedEngine
    make_env: Callable[[], TextEnv]
    encode: Encode
    decode: Decode
    max_dropped_share: float
    on_continuation: Callable[[], object]

    def measure(self, states: MeasuredStates, part: range, hidden_seeds: Int64) -> None:
        """Fill in the returns of these states' valid actions, nan where an env failed; hidden_seeds [S, M]."""
        openings: list[Opening] = []
        for s in part:
            try:
                openings += self._open(states, s, hidden_seeds[s])
            except EnvFault as fault:
                states.returns[s] = np.nan
                logger.warning("state of the game with seed %d left out: %s", states.games[s].info["seed"], fault)
        for _ in range(states.returns[part.start : part.stop].size - len(openings)):
            self.on_continuation()

        def add(rest: Trajectory) -> None:
            later = monte_carlo_returns([turn.reward for turn in rest.turns], states.gamma)[0]
            unfinished.remove(rest.info["seed"])
            states.returns.flat[rest.info["seed"]] += states.gamma * later
            states.num_truncated += rest.truncated
            self.on_continuation()

        unfinished = {opening.seed for opening in openings}
        if openings:
            continue_games(
                self.engine, openings, self.encode, self.decode, max_dropped_share=self.max_dropped_share, on_game=add
            )
        states.returns.flat[list(unfinished)] = np.nan  # dropped

    def _open(self, states: MeasuredStates, s: int, hidden_seeds: Int64) -> list[Opening]:
        """Play every valid action of a state under every hidden state and note its reward; the games that go on.

        An opening's seed is the place of its return in `states.returns`.
        """
        guard, stop = Guard(), self.engine.stop_token_id
        env, said = self._replay(guard, states.games[s], int(states.turn[s])), states.said(s)
        openings = []
        for m, hidden_seed in enumerate(hidden_seeds.tolist()):
            guard.call(env, env.resample_hidden, hidden_seed)
            for k in states.valid[s].nonzero()[0].tolist():
                action, twin = states.action(s, k), guard.call(env, env.clone)
                result, reply = guard.step(twin, action_text(action, stop, self.decode), self.encode)
                states.returns[s, k, m] = result.reward
                now = said + action + reply
                full = len(now) + self.engine.max_new_tokens > self.engine.max_tokens
                if not (result.terminated or result.truncated or full):
                    place = np.ravel_multi_index((s, k, m), states.returns.shape)
                    openings.append(Opening(twin, now, int(place)))
                states.num_truncated += not result.terminated and (result.truncated or full)
        return openings

    def _replay(self, guard: Guard, game: Trajectory, turn: int) -> ResamplableEnv:
        """A game's env as it was when turn `turn` was to be answered."""
        env = self.make_env()
        assert isinstance(env, ResamplableEnv)
        reply = guard.reset(env, game.info["seed"], None, self.encode)
        for i, played in enumerate(game.turns[: turn + 1]):
            if reply != played.observation_ids.tolist():
                raise EnvFault(f"turn {i}: wanted what was said when it was played, got {self.decode(reply)!r:.80}")
            if i < turn:
                text = action_text(played.action_ids.tolist(), self.engine.stop_token_id, self.decode)
                _, reply = guard.step(env, text, self.encode)
        return env
