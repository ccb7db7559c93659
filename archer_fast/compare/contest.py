"""The processes of a comparison: so many at once, each a run of its own that can be stopped and go on."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from archer_fast.compare.plan import RunPlan
from archer_fast.compare.progress import Standing, Watcher
from archer_fast.run_folder import is_run

PAUSE = 0.2  # seconds between two looks at the processes
TAIL = 12  # lines of a failed run's log that are shown
STOPPED = (130, -signal.SIGINT)  # what `archer-fast train` exits with after Ctrl-C; killed by it before it could


@dataclass(slots=True)
class Outcome:
    """What became of the runs that were not finished before."""

    failed: dict[str, str] = field(default_factory=dict)
    """Name of a run: why, and the end of its log."""
    interrupted: bool = False


def run_contest(runs: Sequence[RunPlan], command: Sequence[str], jobs: int, watcher: Watcher) -> Outcome:
    """Run what is not finished yet, in order, `jobs` at once; a failure of one stops none of the others.

    `command` runs `archer-fast` when arguments follow. SIGINT, SIGTERM and SIGHUP are handed on to the runs as SIGINT,
    each time: the first lets them save what they have, a second stops them at once.
    """
    outcome = Outcome()
    standings = {run: Standing(run) for run in runs}
    waiting = deque(run for run in runs if not run.finished)
    running: dict[RunPlan, subprocess.Popen[bytes]] = {}
    with _forwarded_signals() as signals, _none_left(running):
        handed_on = 0
        while running or (waiting and not signals()):
            while waiting and len(running) < jobs and not signals():
                run = waiting.popleft()
                running[run] = _start(run, command)
                standings[run].state = "running"
                watcher.message(f"{run.name}: {'goes on' if standings[run].iteration else 'starts'}, log {run.log}")
            if signals() > handed_on:
                handed_on = signals()
                _interrupt(running.values())
                watcher.message("stopping: each run ends its iteration and saves; once more stops them at once")
            for run, process in list(running.items()):
                if process.poll() is not None:
                    del running[run]
                    _note_end(run, process.returncode, outcome, standings[run], watcher, stopping=bool(signals()))
            watcher.show(list(standings.values()), jobs)
            time.sleep(PAUSE if running else 0)
        outcome.interrupted = bool(signals()) and not all(run.finished or run.name in outcome.failed for run in runs)
    return outcome


def _start(run: RunPlan, command: Sequence[str]) -> subprocess.Popen[bytes]:
    # What was begun is gone on with by its own config.json, which check_folder has found equal to what is asked.
    arguments = ("--resume", "--out", str(run.folder)) if is_run(run.folder) else run.arguments
    whole = [*command, "train", *arguments]
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        log.write(f"$ {shlex.join(whole)}\n".encode())
        log.flush()
        # A session of its own: the terminal's Ctrl-C would reach it beside ours, and two of them stop it at once.
        return subprocess.Popen(
            whole,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            start_new_session=True,
        )


def _note_end(
    run: RunPlan, code: int, outcome: Outcome, standing: Standing, watcher: Watcher, *, stopping: bool
) -> None:
    standing.read()
    if code == 0 and run.finished:
        standing.state = "finished"
        watcher.message(f"{run.name}: finished, return {standing.last_return:.2f} in its last iterations")
    elif stopping and code in STOPPED:
        standing.state = "stopped"
    else:
        standing.state = "failed"
        cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        lines = [line for line in run.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        outcome.failed[run.name] = cause
        watcher.message("\n  ".join([f"{run.name}: failed ({cause}); the end of {run.log}:", *lines[-TAIL:]]))


def _interrupt(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)


@contextlib.contextmanager
def _none_left(running: dict[RunPlan, subprocess.Popen[bytes]]) -> Iterator[None]:
    """Whatever ends this process ends its runs too, saved."""
    try:
        yield
    finally:
        _interrupt(running.values())
        for process in running.values():
            process.wait()


@contextlib.contextmanager
def _forwarded_signals() -> Iterator[Callable[[], int]]:
    """How many of SIGINT, SIGTERM and SIGHUP have come."""
    count = 0

    def handle(number: int, frame: object) -> None:
        nonlocal count
        count += 1

    if threading.current_thread() is not threading.main_thread():
        yield lambda: count
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: a closed terminal is to change nothing
        numbers.append(signal.SIGHUP)
    old = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: count
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
