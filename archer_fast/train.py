"""The training loop of every algorithm: rollout, insert, critic epochs, actor epochs."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from archer_fast.config import Config
from archer_fast.evaluation import summarise
from archer_fast.meters import Meters
from archer_fast.optim import NonFiniteLoss
from archer_fast.run_folder import RunFolder
from archer_fast.run_state import RunState
from archer_fast.stall_watch import StallWatch
from archer_fast.trajectory import Trajectory
from archer_fast.watcher import Watcher


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the checkpoint at `path` holds every iteration that was run."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


def train(config: Config, folder: RunFolder, watcher: Watcher) -> dict[str, Any]:
    """Run the algorithm of `config` and return the summary (before, after, best, what stopped it early).

    One iteration: play games with the actor, store them, let the critic learn from replayed turns, then let
    the actor learn from the critic, once the critic's warm-up is over. Other algorithms have no critic phase, or
    use it for their value head.
    Errors: ValueError where `folder` holds a run that `config.resume` does not ask for, or is being written.
    """
    with folder.lock():
        folder.check_free(resume=config.resume)
        folder.save_config(config)
        with StallWatch(watcher, config.stall, folder.stalls) as watched:
            run = RunState.start(config, folder, watched)
            with run.loggers:
                iterate(run, watched)
                return run.finish()


def iterate(run: RunState, watcher: Watcher) -> None:
    """Iterations until the run is over; after Ctrl-C, Interrupted once the present one is saved."""
    config, learner, meters = run.config, run.learner, Meters()
    clock = Clock(meters)
    saved: Path | None = None  # where the present iteration lies
    with StopRequest(watcher) as stop:
        while not run.over and not stop.requested:
            try:
                with clock("rollout"):
                    games = run.play_games(meters)
                    learner.insert(games, meters)
                with clock("critic"):
                    watcher.phase("critic", learner.critic_epochs)
                    learner.update_critic(meters, watcher.advance)
                with clock("actor"):
                    if run.iteration >= learner.warmup_iterations:
                        watcher.phase("actor", config.update.epochs)
                        learner.update_actor(meters, watcher.advance)
            except NonFiniteLoss as error:
                raise dumped(run, error) from error
            run.iteration += 1
            saved = None
            with clock("other"):
                evaluation = run.evaluate_if_due()
            row = {**measure(games, meters, clock), **run.staleness(), **evaluation}
            run.record(row | run.check_collapse(row))  # which may end the run, or give the actor its best policy back
            if run.iteration % config.checkpoint_every == 0 or run.over:
                with clock("other"):  # in the next iteration's row: this one is written
                    saved = run.save()
    if stop.requested:
        raise Interrupted(saved or run.save())


class StopRequest:
    """Ctrl-C or SIGTERM lets the iteration end and be saved; a second one stops at once, the last checkpoint stays."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher
        self.requested = False

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.watcher.message("stopping after this iteration, then saving; once more stops at once")

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._old = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, old in self._old.items():
                signal.signal(number, old)


class Clock:
    """Seconds by phase since the last read, and the tokens that passed a model in them by the meters' count."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters
        self.seconds: dict[str, float] = {}
        self.tokens: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, before = time.perf_counter(), self._meters.counted("processed_tokens")
        yield
        tokens = self._meters.counted("processed_tokens") - before
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        self.tokens[phase] = self.tokens.get(phase, 0.0) + tokens

    def read(self) -> dict[str, float]:
        """`seconds_PHASE`, and `tokens_per_second_PHASE` where any token passed, and of all phases together."""
        seconds, tokens = self.seconds, self.tokens
        self.seconds, self.tokens = {}, {}
        row = {f"seconds_{phase}": round(value, 4) for phase, value in seconds.items()}
        row |= {f"tokens_per_second_{phase}": n / max(seconds[phase], 1e-9) for phase, n in tokens.items() if n > 0}
        return row | {"tokens_per_second": sum(tokens.values()) / max(sum(seconds.values()), 1e-9)}


def measure(games: list[Trajectory], meters: Meters, clock: Clock) -> dict[str, float]:
    """One iteration's row of metrics: what was played, what was learned, where the time went."""
    row = summarise(games).as_metrics("") if games else {}  # offline: nothing was played
    return row | meters.read() | clock.read()


def dumped(run: RunState, error: NonFiniteLoss) -> NonFiniteLoss:
    """Write the games of the faulty batch, packed as the learner saw them, and say where."""
    path = run.folder.path / "faulty_batch.safetensors"
    arrays = run.learner.buffer.collate(np.unique(error.trajectory_ids))
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in arrays._asdict().items()}, path)
    return NonFiniteLoss(f"{error}; the batch is in {path}", error.trajectory_ids)
