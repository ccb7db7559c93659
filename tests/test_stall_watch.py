"""A run in which nothing moves is told of, with the name of what does not return; one that is slow is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from archer_fast.config import StallConfig
from archer_fast.stall_watch import StallWatch
from archer_fast.watcher import SilentWatcher


class Listener(SilentWatcher):
    def __init__(self) -> None:
        self.told = threading.Event()
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)
        self.told.set()


def blocking_call(until: threading.Event) -> None:
    """Its name must be in the stacks."""
    assert until.wait(60)


def test_a_stall_is_told_once_with_phase_call_and_stacks(tmp_path: Path) -> None:
    listener, path = Listener(), tmp_path / "stalls.txt"
    with StallWatch(listener, StallConfig(seconds=0.2), path) as watch:
        watch.phase("rollout", 32)
        watch.advance(3)
        watch.calling("WebShop.step (seed 12)")
        blocking_call(listener.told)
        time.sleep(0.6)
        assert len(listener.messages) == 1, "once, however long it lasts"
    assert listener.messages[0] == (
        f"no movement for 0.2 s: rollout 3/32, in WebShop.step (seed 12); stacks of all threads: {path}"
    )
    stacks = path.read_text()
    assert stacks.count("rollout 3/32, in WebShop.step (seed 12)") == 1
    assert "blocking_call" in stacks and "test_stall_watch.py" in stacks, stacks


def test_after_a_movement_the_next_stall_is_told_too(tmp_path: Path) -> None:
    listener = Listener()
    with StallWatch(listener, StallConfig(seconds=0.2), tmp_path / "stalls.txt") as watch:
        assert listener.told.wait(60)
        listener.told.clear()
        watch.phase("critic", None)
        assert listener.told.wait(60)
    assert [m.split(";")[0] for m in listener.messages] == [
        "no movement for 0.2 s: start 0",
        "no movement for 0.2 s: critic 0",
    ]


def test_whatever_is_told_is_handed_on_and_is_a_movement(tmp_path: Path) -> None:
    heard: list[object] = []

    class Recorder(SilentWatcher):
        def message(self, text: str) -> None:
            heard.append(text)

        def phase(self, name: str, total: int | None) -> None:
            heard.append((name, total))

        def advance(self, steps: int = 1) -> None:
            heard.append(steps)

        def calling(self, what: str) -> None:
            heard.append(["call", what])

        def iteration(self, number: int, total: int, metrics: dict[str, float]) -> None:
            heard.append((number, total, metrics))

    with StallWatch(Recorder(), StallConfig(seconds=30.0), tmp_path / "stalls.txt") as watch:
        watch.message("a")
        watch.phase("critic", 2)
        watch.advance(2)
        watch.calling("b")
        watch.iteration(1, 2, {"return": 1.0})
        assert watch._beats == 5
    assert heard == ["a", ("critic", 2), 2, ["call", "b"], (1, 2, {"return": 1.0})]
    assert not (tmp_path / "stalls.txt").exists(), "no stall leaves no file"


def test_zero_seconds_watches_nothing(tmp_path: Path) -> None:
    before = threading.active_count()
    with StallWatch(Listener(), StallConfig(seconds=0.0), tmp_path / "stalls.txt") as watch:
        watch.phase("rollout", 1)
        assert threading.active_count() == before
    assert list(tmp_path.iterdir()) == []


def program(folder: Path, seconds: float, action: str, body: str) -> list[str]:
    source = f"""
    import ctypes, sys, time
    from pathlib import Path
    from archer_fast.config import StallConfig
    from archer_fast.stall_watch import StallWatch
    from archer_fast.watcher import SilentWatcher

    class Printer(SilentWatcher):
        def message(self, text):
            print(text, flush=True)

    def stuck():
        {body}

    config = StallConfig(seconds={seconds}, action={action!r})
    with StallWatch(Printer(), config, Path({str(folder)!r}) / "stalls.txt") as w:
        w.phase("actor", 8)
        stuck()
    print("went on")
    """
    return [sys.executable, "-c", textwrap.dedent(source)]


def test_stop_ends_a_process_that_no_exception_would(tmp_path: Path) -> None:
    done = subprocess.run(
        program(tmp_path, 0.3, "stop", "time.sleep(600)"), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.startswith("no movement for 0.3 s: actor 0/8; stacks of all threads: "), done.stdout
    assert done.stdout.endswith("the process ends here, --resume goes on from the last checkpoint\n")
    assert "in stuck" in (tmp_path / "stalls.txt").read_text()


def test_a_hang_that_holds_pythons_lock_still_leaves_its_stacks(tmp_path: Path) -> None:
    # PyDLL calls without releasing the lock: no Python thread runs meanwhile.
    body = "ctypes.PyDLL(None).usleep(900_000); ctypes.PyDLL(None).usleep(900_000)"
    done = subprocess.run(
        program(tmp_path, 0.3, "warn", body), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and done.stdout.endswith("went on\n"), done.stderr
    stacks = (tmp_path / "stalls.txt").read_text()
    assert stacks.startswith("Timeout") and "in stuck" in stacks, stacks


def test_stop_ends_a_hang_that_holds_pythons_lock(tmp_path: Path) -> None:
    body = "ctypes.PyDLL(None).sleep(60)"
    done = subprocess.run(program(tmp_path, 0.3, "stop", body), capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1 and "went on" not in done.stdout
    assert "in stuck" in (tmp_path / "stalls.txt").read_text()


def test_a_stopped_process_does_not_count_as_stalled(tmp_path: Path) -> None:
    body = "print('begun', flush=True); [(w.advance(0), time.sleep(0.05)) for _ in range(40)]"
    process = subprocess.Popen(program(tmp_path, 1.0, "warn", body), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGCONT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and out == "went on\n", out


@pytest.mark.parametrize(("field", "value"), [("seconds", -1.0), ("seconds", float("nan"))])
def test_bad_settings(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        StallConfig(**{field: value})
