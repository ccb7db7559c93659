"""Many games at once between an engine and its environments; knows text and tokens, no tensors."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from archer_fast.envs.base import StepResult, TextEnv
from archer_fast.trajectory import Trajectory, Turn

logger = logging.getLogger(__name__)

_MAX_REWARD = float(np.finfo(np.float32).max)  # rewards are stored as float32


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
    """The games of one `play_games` call, in the order of their seeds, and what did not become one."""

    trajectories: list[Trajectory]
    num_dropped: int = 0  # games whose environment failed; each is named in the log
    num_truncated_by_window: int = 0  # games cut because the model's window was full
    drop_causes: Counter[str] = field(default_factory=Counter)


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
    encode: Callable[[str], list[int]],
    decode: Callable[[Sequence[int]], str],
    seeds: Iterable[int],
    *,
    env_options: Mapping[str, Any] | None = None,
    policy_version: int = 0,
    max_dropped_share: float = 0.1,
    on_game: Callable[[Trajectory], None] | None = None,
) -> Rollout:
    """Play one game a seed; finished slots start the next game at once.

    A game whose env raises, returns nonsense, or exceeds its `step_time_limit` is dropped and counted;
    the others go on. Errors: TooManyDroppedGames once more than `max_dropped_share` of all seeds, or
    every one of them, failed.
    A game is truncated when another observation and action no longer fit the engine's window.
    """
    waiting = list(enumerate(seeds))
    num_games = len(waiting)
    waiting.reverse()
    done: dict[int, Trajectory] = {}
    rollout = Rollout([])
    running: dict[int, _Game] = {}
    guard = _Guard()

    def drop(seed: int, cause: str) -> None:
        rollout.num_dropped += 1
        rollout.drop_causes[cause] += 1
        logger.warning("game with seed %d dropped: %s", seed, cause)
        if rollout.num_dropped > max_dropped_share * num_games or rollout.num_dropped == num_games:
            raise TooManyDroppedGames(
                f"{rollout.num_dropped} of {num_games} games dropped, more than the allowed share of "
                f"{max_dropped_share:g}; the last cause: {cause}"
            )

    def start(slot: int) -> None:
        while waiting:
            index, seed = waiting.pop()
            env = make_env()
            try:
                first = guard.call(env, env.reset, seed, env_options)
                if not isinstance(first, str):
                    raise _EnvFault(f"reset: wanted text of type str, got {type(first).__name__}")
                ids = encode(first)
                if not ids:
                    raise _EnvFault(f"reset: wanted an observation of at least one token, got {first!r:.80}")
            except _EnvFault as fault:
                drop(seed, str(fault))
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
        if on_game is not None:
            on_game(trajectory)
        engine.release(slot)
        del running[slot]
        start(slot)

    for slot in range(engine.num_slots):
        engine.release(slot)  # an interrupted call may have left games behind
        start(slot)
    while running:
        for slot, action_ids, logprobs in engine.step():
            game = running[slot]
            ids: list[int] = action_ids.tolist()
            text = decode(ids[:-1] if ids[-1] == engine.stop_token_id else ids)
            try:
                result = _checked(guard.call(game.env, game.env.step, text))
                reply = encode(result.text)
                if not (reply or result.terminated or result.truncated):
                    raise _EnvFault(f"step: wanted an observation of at least one token, got {result.text!r:.80}")
            except _EnvFault as fault:
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


class _EnvFault(Exception):
    """An environment raised, hung or answered nonsense; str() is one line that names it."""


def _checked(result: Any) -> StepResult:
    try:
        text, reward, terminated, truncated, info = result
    except (TypeError, ValueError):
        raise _EnvFault(f"step: wanted (text, reward, terminated, truncated, info), got {result!r:.80}") from None
    if not isinstance(text, str):
        raise _EnvFault(f"step: wanted text of type str, got {type(text).__name__}")
    try:
        reward = float(reward)
    except (TypeError, ValueError):
        raise _EnvFault(f"step: wanted a number for reward, got {reward!r:.80}") from None
    if not abs(reward) <= _MAX_REWARD:  # NaN too
        raise _EnvFault(f"step: wanted a finite float32 reward, got {reward}")
    info = {} if info is None else info
    if not isinstance(info, Mapping):
        raise _EnvFault(f"step: wanted a mapping for info, got {type(info).__name__}")
    return StepResult(text, reward, bool(terminated), bool(truncated), dict(info))


class _Guard:
    """Calls an env, in a thread of its own where it may block, and turns every fault into _EnvFault."""

    def __init__(self) -> None:
        self._worker: _Worker | None = None

    def call(self, env: TextEnv, function: Callable[..., Any], *args: Any) -> Any:
        where = f"{type(env).__name__}.{function.__name__}"
        limit = env.step_time_limit
        try:
            if limit is None:
                return function(*args)
            if self._worker is None:
                self._worker = _Worker()
            return self._worker.call(function, args, limit)
        except TimeoutError:
            self._worker = None  # its thread is stuck in the env: leave it behind, start another
            raise _EnvFault(f"{where} exceeded its time limit of {limit:g} s") from None
        except Exception as error:
            raise _EnvFault(f"{where} raised {type(error).__name__}: {error}") from error


class _Worker:
    """One daemon thread that runs calls one after the other (a stuck one never blocks the exit)."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]]] = SimpleQueue()
        self._results: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="archer-fast-env").start()

    def _run(self) -> None:
        while True:
            function, args = self._calls.get()
            try:
                self._results.put((function(*args), None))
            except Exception as error:
                self._results.put((None, error))

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], limit: float) -> Any:
        self._calls.put((function, args))
        try:
            result, error = self._results.get(timeout=limit)
        except Empty:
            raise TimeoutError from None
        if error is not None:
            raise error
        return result
