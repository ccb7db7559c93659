"""Many games at once between an engine and its environments; knows text and tokens, no tensors."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from archer_fast.envs.base import TextEnv
from archer_fast.rollout.guard import Encode, EnvFault, Guard
from archer_fast.trajectory import Trajectory, Turn

logger = logging.getLogger(__name__)

Decode = Callable[[Sequence[int]], str]


class FinishedAction(NamedTuple):
    """An action that an engine has finished sampling."""

    slot: int
    action_ids: npt.NDArray[np.int32]  # [m], the stop token included where it was reached
    logprobs: npt.NDArray[np.float32]  # [m]


class Engine(Protocol):
    """What a rollout needs of a sampler: slots that observe, and steps that end actions."""

    num_slots: int
    max_new_tokens: int
    stop_token_id: int

    def begin(self, slot: int) -> None: ...
    def observe(self, slot: int, observation_ids: Sequence[int]) -> None: ...
    def room(self, slot: int) -> int: ...
    def release(self, slot: int) -> None: ...
    def step(self) -> list[FinishedAction]: ...


class TooManyDroppedGames(RuntimeError):
    """More games than allowed ended in a fault of their environment; the message names the last cause."""


@dataclass(slots=True)
class Rollout:
    """The games of one call, in the order of their seeds or openings, and what did not become one."""

    trajectories: list[Trajectory]
    num_dropped: int = 0  # games whose environment failed; each is named in the log
    num_truncated_by_window: int = 0  # games cut because the model's window was full
    drop_causes: Counter[str] = field(default_factory=Counter)


class Opening(NamedTuple):
    """A game in mid-air: `Opening(env, [17, 9, 41, 2, 12], 5)` waits for the answer to its last observation.

    `ids` is everything said so far, the first observation's tokens first. It becomes the first turn's observation, and
    so the rewards of the continuation are those from here on. `seed` names the game in logs and in `info`.
    """

    env: TextEnv
    ids: list[int]
    seed: int


@dataclass(slots=True)
class _Game:
    index: int
    seed: int
    env: TextEnv
    pending: list[int]  # observation tokens since the last action
    turns: list[Turn] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)


def play_games(
    engine: Engine,
    make_env: Callable[[], TextEnv],
    encode: Encode,
    decode: Decode,
    seeds: Iterable[int],
    *,
    env_options: Mapping[str, Any] | None = None,
    policy_version: int = 0,
    max_dropped_share: float = 0.1,
    num_games: int | None = None,
    on_game: Callable[[Trajectory], None] | None = None,
    on_call: Callable[[str], None] | None = None,
) -> Rollout:
    """Play one game a seed; finished slots start the next game at once.

    A game whose env raises, returns nonsense, or exceeds its `step_time_limit` is dropped and counted;
    the others go on. Errors: TooManyDroppedGames once more than `max_dropped_share` of all seeds, or
    every one of them, failed.
    A game is truncated when another observation and action no longer fit the engine's window.
    num_games: of which these are a share, where others play the rest. on_game: told of every game that has ended;
    on_call: of every call into the engine or an env that begins.
    """
    guard, all_seeds, told = Guard(), list(seeds), on_call or _nobody

    def open_game(index: int) -> Opening:
        env, seed = make_env(), all_seeds[index]
        told(f"{type(env).__name__}.reset (seed {seed})")
        return Opening(env, guard.reset(env, seed, env_options, encode), seed)

    return _play(
        engine,
        all_seeds,
        open_game,
        guard,
        encode,
        decode,
        policy_version,
        max_dropped_share,
        on_game or _nobody,
        told,
        num_games,
    )


def continue_games(
    engine: Engine,
    openings: Sequence[Opening],
    encode: Encode,
    decode: Decode,
    *,
    policy_version: int = 0,
    max_dropped_share: float = 0.1,
    on_game: Callable[[Trajectory], None] | None = None,
) -> Rollout:
    """Play games on from where they are, as `play_games` does from their beginning; the envs are played to their end.

    The continuation has the distribution of the uninterrupted game's rest: an action depends on the tokens before it
    alone, whoever said them. An opening that leaves no room for an action is dropped.
    """
    seeds = [opening.seed for opening in openings]
    return _play(
        engine,
        seeds,
        openings.__getitem__,
        Guard(),
        encode,
        decode,
        policy_version,
        max_dropped_share,
        on_game or _nobody,
        _nobody,
    )


def check_dropped(rollout: Rollout, num_games: int, max_share: float) -> None:
    """TooManyDroppedGames where more than `max_share` of `num_games`, or all of them, ended in a fault."""
    if rollout.num_dropped and (rollout.num_dropped > max_share * num_games or rollout.num_dropped == num_games):
        raise TooManyDroppedGames(
            f"{rollout.num_dropped} of {num_games} games dropped, more than the allowed share of "
            f"{max_share:g}; the last cause: {list(rollout.drop_causes)[-1]}"
        )


def action_text(action_ids: Sequence[int], stop_token_id: int, decode: Decode) -> str:
    """What the environment hears of an action: its text, the stop token left out."""
    return decode(action_ids[:-1] if action_ids[-1] == stop_token_id else action_ids)


def _play(
    engine: Engine,
    seeds: Sequence[int],
    open_game: Callable[[int], Opening],
    guard: Guard,
    encode: Encode,
    decode: Decode,
    policy_version: int,
    max_dropped_share: float,
    on_game: Callable[[Trajectory], object],
    on_call: Callable[[str], object],
    num_games: int | None = None,
) -> Rollout:
    """Games 0 .. len(seeds) - 1, each opened when a slot is free for it; an EnvFault of opening one drops it."""
    waiting = list(reversed(range(len(seeds))))
    done: dict[int, Trajectory] = {}
    rollout = Rollout([])
    running: dict[int, _Game] = {}

    def drop(seed: int, cause: str) -> None:
        rollout.num_dropped += 1
        rollout.drop_causes[cause] += 1
        logger.warning("game with seed %d dropped: %s", seed, cause)
        check_dropped(rollout, num_games or len(seeds), max_dropped_share)

    def start(slot: int) -> None:
        while waiting:
            index = waiting.pop()
            try:
                env, ids, seed = open_game(index)
            except EnvFault as fault:
                drop(seeds[index], str(fault))
                continue
            engine.begin(slot)
            if engine.room(slot) < len(ids) + engine.max_new_tokens:
                drop(seed, f"the first observation has {len(ids)} tokens: more than the model's window leaves room for")
                continue
            engine.observe(slot, ids)
            running[slot] = _Game(index, seed, env, ids)
            return

    def finish(slot: int, game: _Game, final_ids: list[int], terminated: bool, info: Mapping[str, Any]) -> None:
        notes = {**info, "seed": game.seed, "kinds": dict(game.kinds)}
        trajectory = Trajectory(tuple(game.turns), np.array(final_ids, np.int32), terminated, not terminated, notes)
        done[game.index] = trajectory
        on_game(trajectory)
        engine.release(slot)
        del running[slot]
        start(slot)

    for slot in range(engine.num_slots):
        engine.release(slot)  # an interrupted call may have left games behind
        start(slot)
    engine_step = f"{type(engine).__name__}.step"
    while running:
        on_call(engine_step)
        for slot, action_ids, logprobs in engine.step():
            game = running[slot]
            text = action_text(action_ids.tolist(), engine.stop_token_id, decode)
            on_call(f"{type(game.env).__name__}.step (seed {game.seed})")
            try:
                result, reply = guard.step(game.env, text, encode)
            except EnvFault as fault:
                del running[slot]
                engine.release(slot)
                drop(game.seed, str(fault))
                start(slot)
                continue
            observation_ids = np.array(game.pending, np.int32)
            game.turns.append(Turn(observation_ids, action_ids, logprobs, float(result.reward), policy_version))
            _count(game.kinds, result.info)
            if result.terminated or result.truncated:
                room = engine.room(slot)
                finish(slot, game, reply[:room], result.terminated, result.info)
            elif engine.room(slot) < len(reply) + engine.max_new_tokens:
                rollout.num_truncated_by_window += 1
                finish(slot, game, reply[: engine.room(slot)], False, result.info)
            else:
                game.pending = reply
                engine.observe(slot, reply)
    rollout.trajectories = [done[i] for i in sorted(done)]
    return rollout


def _count(kinds: Counter[str], info: Mapping[str, Any]) -> None:
    """Behaviour of one turn, where the task tells it: info["kind"], info["repeat"]."""
    kinds["turns"] += 1
    if "kind" in info:
        kinds[str(info["kind"])] += 1
    if info.get("repeat"):
        kinds["repeat"] += 1


def _nobody(happened: object) -> None:
    """Who listens where nobody does."""
