"""The guard of a rollout: calls an environment, checks what it answers, and turns every fault into one exception."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from archer_fast.envs.base import StepResult, TextEnv

Encode = Callable[[str], list[int]]

_MAX_REWARD = float(np.finfo(np.float32).max)  # rewards are stored as float32


class EnvFault(Exception):
    """An environment raised, hung or answered nonsense; str() is one line that names it."""


class Guard:
    """Calls an env, in a thread of its own where it may block; every fault is an EnvFault."""

    def __init__(self) -> None:
        self._worker: _Worker | None = None

    def reset(self, env: TextEnv, seed: int, options: Mapping[str, Any] | None, encode: Encode) -> list[int]:
        """A new game's first observation as tokens, at least one."""
        text = self.call(env, env.reset, seed, options)
        if not isinstance(text, str):
            raise EnvFault(f"reset: wanted text of type str, got {type(text).__name__}")
        ids = encode(text)
        if not ids:
            raise EnvFault(f"reset: wanted an observation of at least one token, got {text!r:.80}")
        return ids

    def step(self, env: TextEnv, action: str, encode: Encode) -> tuple[StepResult, list[int]]:
        """One step, and its text as tokens: at least one, unless the game is over."""
        result = _checked(self.call(env, env.step, action))
        ids = encode(result.text)
        if not (ids or result.terminated or result.truncated):
            raise EnvFault(f"step: wanted an observation of at least one token, got {result.text!r:.80}")
        return result, ids

    def call(self, env: TextEnv, function: Callable[..., Any], *args: Any) -> Any:
        """A method of `env`, within its `step_time_limit`."""
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
            raise EnvFault(f"{where} exceeded its time limit of {limit:g} s") from None
        except Exception as error:
            raise EnvFault(f"{where} raised {type(error).__name__}: {error}") from error


def _checked(result: Any) -> StepResult:
    try:
        text, reward, terminated, truncated, info = result
    except (TypeError, ValueError):
        raise EnvFault(f"step: wanted (text, reward, terminated, truncated, info), got {result!r:.80}") from None
    if not isinstance(text, str):
        raise EnvFault(f"step: wanted text of type str, got {type(text).__name__}")
    try:
        reward = float(reward)
    except (TypeError, ValueError):
        raise EnvFault(f"step: wanted a number for reward, got {reward!r:.80}") from None
    if not abs(reward) <= _MAX_REWARD:  # NaN too
        raise EnvFault(f"step: wanted a finite float32 reward, got {reward}")
    info = {} if info is None else info
    if not isinstance(info, Mapping):
        raise EnvFault(f"step: wanted a mapping for info, got {type(info).__name__}")
    return StepResult(text, reward, bool(terminated), bool(truncated), dict(info))


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
