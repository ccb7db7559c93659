"""The training loop of every algorithm: rollout, insert, critic epochs, actor epochs."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from archer_fast.config import Config
from archer_fast.evaluation import summarise
from archer_fast.flop_meter import FlopMeter
from archer_fast.meters import Meters
from archer_fast.optim import NonFiniteLoss
from archer_fast.ranks import ALONE, Ranks
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


def train(config: Config, folder: RunFolder, watcher: Watcher, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Run the algorithm of `config` and return the summary (before, after, best, what stopped it early).

    One iteration: play games with the actor, store them, let the critic learn from replayed turns, then let
    the actor learn from the critic, once the critic's warm-up is over. Other algorithms have no critic phase, or
    use it for their value head.
    ranks: the processes of this run, each of which calls this with the same arguments; the first writes the folder.
    Errors: ValueError where `folder` holds a run that `config.resume` does not ask for, or is being written.
    """
    with ExitStack() as stack:
        ranks.led(lambda: claim(folder, stack, resume=config.resume))
        ranks.led(lambda: folder.save_config(config))
        stacks, say = folder.stalls_of(ranks.rank), None if ranks.leads else ranks.say
        with StallWatch(watcher, config.stall, stacks, is_waiting=lambda: ranks.is_waiting, say=say) as watched:
            run = RunState.start(config, folder, watched, ranks)
            stack.callback(run.engines.close)
            with run.loggers or nullcontext():
                iterate(run, watched)
                return run.finish()


def claim(folder: RunFolder, stack: ExitStack, *, resume: bool) -> None:
    """Keep others out of the folder until `stack` ends; ValueError where it is not free."""
    stack.enter_context(folder.lock())
    folder.check_free(resume=resume)


def iterate(run: RunState, watcher: Watcher) -> None:
    """Iterations until the run is over; after Ctrl-C, Interrupted once the present one is saved."""
    config, learner, meters = run.config, run.learner, Meters(run.ranks)
    clock = Clock(meters, run.flop_meter, run.peak_flops)
    saved: Path | None = None  # where the present iteration lies
    with StopRequest(watcher, run.ranks) as stop:
        while not (stop.asked() or run.over):
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
    if stop.asked():  # also of what was asked for since the loop last did
        raise Interrupted(saved or run.save())


class StopRequest:
    """Ctrl-C or SIGTERM lets the iteration end and be saved; a second one stops at once, the last checkpoint stays.

    Of several ranks one that was told is enough. torchrun hands a Ctrl-C on that the terminal has sent already: within
    `_ECHO` seconds it is the same one there.
    """

    _ECHO = 2.0

    def __init__(self, watcher: Watcher, ranks: Ranks = ALONE) -> None:
        self.watcher, self.ranks = watcher, ranks
        self.requested = False
        self._when = 0.0

    def asked(self) -> bool:
        """On any rank; the same answer on all."""
        return self.ranks.any(self.requested)

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.requested and self.ranks.size > 1 and now - self._when < self._ECHO:
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested, self._when = True, now
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
    """Seconds by phase since the last read, the tokens that passed a model in them by the meters' count, and FLOPs.

    flop_meter: None where nobody counts them; peak: FLOP/s of this rank's device, None where it is not known.
    """

    def __init__(self, meters: Meters, flop_meter: FlopMeter | None = None, peak: float | None = None) -> None:
        self._meters, self._flop_meter, self._peak = meters, flop_meter, peak
        self.seconds: dict[str, float] = {}
        self.tokens: dict[str, float] = {}
        self.flops: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, tokens, flops = time.perf_counter(), *self._so_far()
        yield
        tokens_now, flops_now = self._so_far()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        self.tokens[phase] = self.tokens.get(phase, 0.0) + tokens_now - tokens
        self.flops[phase] = self.flops.get(phase, 0.0) + flops_now - flops

    def _so_far(self) -> tuple[float, float]:
        return self._meters.counted("processed_tokens"), self._flop_meter.total() if self._flop_meter else 0.0

    def read(self) -> dict[str, float]:
        """`seconds_PHASE`, and where any token or FLOP was `tokens_per_second_PHASE`, `tflop_per_second_PHASE` and its
        share of the peak of all ranks' devices, `utilisation_PHASE`; and all of it of all phases together."""
        seconds = self.seconds
        every = self._meters.ranks.gather((self.tokens, self.flops, self._peak))
        self.seconds, self.tokens, self.flops = {}, {}, {}
        row = {f"seconds_{phase}": round(value, 4) for phase, value in seconds.items()}
        tokens, flops = (_rates([theirs[kind] for theirs in every], seconds) for kind in (0, 1))
        row |= {f"tokens_per_second{phase}": rate for phase, rate in tokens.items()}
        if self._flop_meter is None:
            return row
        row |= {f"tflop_per_second{phase}": rate / 1e12 for phase, rate in flops.items()}
        if all(peak is not None for _, _, peak in every):
            peak = sum(peak for _, _, peak in every)
            row |= {f"utilisation{phase}": rate / peak for phase, rate in flops.items()}
        return row


def _rates(amounts: list[dict[str, float]], seconds: dict[str, float]) -> dict[str, float]:
    """What all ranks did in a second of each phase, by "_PHASE" where it is not 0, and by "" of all phases together."""
    total = {phase: sum(theirs.get(phase, 0.0) for theirs in amounts) for phase in seconds}
    rates = {f"_{phase}": amount / max(seconds[phase], 1e-9) for phase, amount in total.items() if amount > 0}
    return rates | {"": sum(total.values()) / max(sum(seconds.values()), 1e-9)}


def measure(games: list[Trajectory], meters: Meters, clock: Clock) -> dict[str, float]:
    """One iteration's row of metrics: what was played, what was learned, where the time went."""
    row = summarise(games).as_metrics("") if games else {}  # offline: nothing was played
    return row | meters.read() | clock.read()


def dumped(run: RunState, error: NonFiniteLoss) -> NonFiniteLoss:
    """Write the games of the faulty batch, packed as the learner saw them, and say where."""
    path = run.folder.path / "faulty_batch.safetensors"
    arrays = run.learner.buffer.collate(np.unique(error.trajectory_ids))
    tensors = {k: np.ascontiguousarray(v) for k, v in arrays._asdict().items()}
    run.ranks.led(lambda: safetensors.numpy.save_file(tensors, path))
    return NonFiniteLoss(f"{error}; the batch is in {path}", error.trajectory_ids)
