"""A watcher that notices when nothing moves any more, and says where."""

from __future__ import annotations

import datetime
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from archer_fast.config import StallConfig
from archer_fast.watcher import Watcher

EXIT_STATUS = 1
_LAST_WORDS = 10.0  # seconds for the message of a process that ends; a terminal that takes no text may be what hangs


class StallWatch:
    """Hands everything on to `watcher`; told nothing for `config.seconds`, it names the phase and the last call.

        with StallWatch(watcher, StallConfig(seconds=60), Path("runs/a/stalls.txt")) as watcher:
            watcher.phase("rollout", 32)
            watcher.calling("WebShop.step (seed 12)")
            time.sleep(70)  # no movement for 60 s: rollout 0/32, in WebShop.step (seed 12); stacks: runs/a/stalls.txt

    A stall is told once, and once more after the next movement. Where Python's lock is held, so that no thread of
    Python can speak, faulthandler's own thread writes the stacks after twice the time, and ends the process where that
    is asked for. Time that the whole process was stopped (Ctrl-Z) does not count, up to twice `config.seconds`.
    is_waiting: for another process, which has a watch of its own; say: where a stall is told, `watcher.message` unless
    given.
    """

    def __init__(
        self,
        watcher: Watcher,
        config: StallConfig,
        stacks: Path,
        *,
        is_waiting: Callable[[], bool] = lambda: False,
        say: Callable[[str], object] | None = None,
    ) -> None:
        self._watcher, self._config, self._path = watcher, config, stacks
        self._is_waiting, self._say = is_waiting, say or watcher.message
        self._beats = 0
        self._phase, self._call = "start", ""
        self._done = 0
        self._total: int | None = None
        self._ended, self._looks = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="archer-fast-stall-watch")

    # -- what it is told ---------------------------------------------------------------------------

    def message(self, text: str) -> None:
        self._beats += 1
        self._watcher.message(text)

    def phase(self, name: str, total: int | None) -> None:
        self._beats += 1
        self._phase, self._done, self._total, self._call = name, 0, total, ""
        self._watcher.phase(name, total)

    def advance(self, steps: int = 1) -> None:
        self._beats += 1
        self._done += steps
        self._watcher.advance(steps)

    def calling(self, what: str) -> None:
        self._beats += 1
        self._call = what
        self._watcher.calling(what)

    def iteration(self, number: int, total: int, metrics: dict[str, float]) -> None:
        self._beats += 1
        self._watcher.iteration(number, total, metrics)

    # -- the look-out ------------------------------------------------------------------------------

    def __enter__(self) -> StallWatch:
        if self._config.seconds:
            self._path.touch()  # where that cannot be written, it is said here and not in the thread
            self._thread.start()
            self._looks.wait()  # what follows may hold Python's lock for good
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _look(self) -> None:
        limit = self._config.seconds
        interval = min(limit / 5, 5.0)
        seen, quiet, told, last = self._beats, 0.0, False, time.monotonic()
        with self._path.open("a", encoding="utf-8") as stacks:
            # Begun anew at every look: it runs out where this thread cannot look any more.
            stops = self._config.action == "stop"
            faulthandler.dump_traceback_later(2 * limit, file=stacks, exit=stops)
            self._looks.set()
            while not self._ended.wait(interval):
                faulthandler.dump_traceback_later(2 * limit, file=stacks, exit=stops)
                now = time.monotonic()
                passed, last = min(now - last, 2 * interval), now
                if self._beats != seen or self._is_waiting():
                    seen, quiet, told = self._beats, 0.0, False
                    continue
                quiet += passed
                if quiet >= limit and not told:
                    told = True
                    stacks.write(f"== {datetime.datetime.now().isoformat(timespec='seconds')}: {self._where()}\n")
                    stacks.flush()
                    faulthandler.dump_traceback(file=stacks)
                    self._tell(limit)
            faulthandler.cancel_dump_traceback_later()
            said = stacks.tell() > 0
        if not said:
            self._path.unlink(missing_ok=True)

    def _tell(self, limit: float) -> None:
        stops = self._config.action == "stop"
        if stops:
            last_words = threading.Timer(_LAST_WORDS, os._exit, [EXIT_STATUS])
            last_words.daemon = True
            last_words.start()
        end = "; the process ends here, --resume goes on from the last checkpoint" if stops else ""
        self._say(f"no movement for {limit:g} s: {self._where()}; stacks of all threads: {self._path}{end}")
        if stops:
            os._exit(EXIT_STATUS)  # whatever hangs would also hang an orderly end

    def _where(self) -> str:
        of = "" if self._total is None else f"/{self._total}"
        return f"{self._phase} {self._done}{of}" + (f", in {self._call}" if self._call else "")
