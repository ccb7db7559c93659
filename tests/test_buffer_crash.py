"""When a buffer's writer is killed, its disk is full, or any call to the system fails, the last commit stays.

`writer`, `die_at_every_step` and `fail_at_every_step` run in processes of their own, started by the tests.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from saved_buffers import assert_same_state, filled, learn, names_in, push, read_again, state_of

from archer_fast.buffer import TrajectoryBuffer
from archer_fast.segment_manifest import read_manifest

TESTS = Path(__file__).parent
NEW = functools.partial(TrajectoryBuffer, 120, 9, 5, feature_bytes=20)  # small, so that commits delete files too


def step(buffer: TrajectoryBuffer) -> None:
    """Until the next commit: what is pushed and drawn follows from what the buffer holds."""
    push(buffer, 1 + buffer.trajectory_range[1] % 4)
    buffer.sample_turns(3)
    learn(buffer)
    read_again(buffer)


class Course:
    """The states that a writer nobody kills goes through, by the trajectories pushed so far."""

    def __init__(self) -> None:
        self.buffer = NEW()
        self.states: dict[int, dict[str, Any]] = {}

    def state_at(self, end: int) -> dict[str, Any] | None:
        """Of the commit that holds trajectories up to `end`; None if there was never one."""
        while self.buffer.trajectory_range[1] < end:
            step(self.buffer)
            self.states[self.buffer.trajectory_range[1]] = state_of(self.buffer)
        return self.states.get(end)


def opened(folder: Path) -> TrajectoryBuffer:
    return TrajectoryBuffer.load(folder) if (folder / "manifest.json").exists() else NEW()


def swept(folder: Path) -> bool:
    return set(names_in(folder)) == read_manifest(folder).names() | {"manifest.json"}


# -- kill -9 at random moments ---------------------------------------------------------------------


def writer(folder: Path) -> None:
    """Go on with the folder, commit after commit, saying when each begins and is done."""

    def say(text: str) -> None:
        os.write(1, f"{text}\n".encode())  # in one piece, at once

    say(f"pid {os.getpid()}")
    buffer = opened(folder)
    while True:
        step(buffer)
        end = buffer.trajectory_range[1]
        say(f"begin {end}")
        buffer.save(folder)
        say(f"done {end}")


_NURSERY = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_buffer_crash import writer

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        writer(Path(line.strip()))
    os.waitpid(pid, 0)
    os.write(1, b"dead\\n")
"""


def kill_writers(folder: Path, rounds: int) -> int:
    """Kill that many writers, each after a few commits, checking the folder after each; how many died in a commit."""
    rng, course = random.Random(0), Course()
    last_done, in_commit = 0, 0
    command = [sys.executable, "-c", _NURSERY.format(tests=str(TESTS))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as nursery:
        assert nursery.stdin is not None and nursery.stdout is not None
        for _ in range(rounds):
            nursery.stdin.write(f"{folder}\n")
            pid = int(nursery.stdout.readline().removeprefix("pid "))
            begun, commits = last_done, rng.randint(1, 3)
            lines = []
            while commits:
                lines.append(nursery.stdout.readline())
                commits -= lines[-1].startswith("begin")
            time.sleep(rng.uniform(0, 0.012))
            os.kill(pid, signal.SIGKILL)
            lines.extend(iter(nursery.stdout.readline, "dead\n"))
            for line in lines:
                word, end = line.split()
                if word == "begin":
                    begun = int(end)
                else:
                    assert word == "done"
                    last_done = int(end)
            in_commit += begun > last_done

            if last_done == 0 and not (folder / "manifest.json").exists():
                continue
            loaded = TrajectoryBuffer.load(folder)
            end = loaded.trajectory_range[1]
            assert end in (last_done, begun)
            wanted = course.state_at(end)
            assert wanted is not None
            assert_same_state(loaded, wanted)
            last_done = end  # it may have been killed before it could say so
        nursery.stdin.close()
    return in_commit


@pytest.mark.parametrize("rounds", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_writers_killed_at_random_moments(tmp_path: Path, rounds: int) -> None:
    folder = tmp_path / "buffer"
    in_commit = kill_writers(folder, rounds)
    assert in_commit >= rounds // 5, "most were killed between commits, which proves little"
    buffer = opened(folder)
    step(buffer)
    buffer.save(folder)
    assert swept(folder)


# -- every step ------------------------------------------------------------------------------------

# What Python tells its audit hooks of, each just before it is done: together every change to a folder.
EVENTS = {
    "open",
    "os.rename",
    "os.link",
    "os.remove",
    "os.mkdir",
    "os.truncate",
    "fcntl.flock",
    "os.listdir",
    "os.scandir",
}


def scene(folder: Path) -> TrajectoryBuffer:
    """Three commits in folder/a; the next commit, to a or to b, links or keeps, writes, evicts and sweeps."""
    shutil.rmtree(folder, ignore_errors=True)
    buffer = filled(4, max_trajectories=7, feature_bytes=20)
    buffer.save(folder / "a")
    for _ in range(2):
        push(buffer, 2)
        buffer.save(folder / "a")
    (folder / "a" / ".manifest.json.tmp").write_text("left by a kill")
    push(buffer, 4)  # the first segment goes
    read_again(buffer)  # the oldest one's features, in the second segment
    return buffer


def last_commit() -> TrajectoryBuffer:
    return filled(8, max_trajectories=7, feature_bytes=20)


def commit_to(which: str, folder: Path, buffer: TrajectoryBuffer) -> None:
    buffer.save(folder / which, previous=folder / "a")


class Hook:
    """Runs `act` before the `at`-th step of what is done while `at` is set."""

    def __init__(self, act: Any) -> None:
        self.at, self.act = -1, act
        sys.addaudithook(self)  # for the rest of the process

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.at >= 0 and event in EVENTS:
            self.at -= 1
            if self.at < 0:
                self.act()


def die_at_every_step(folder: Path, which: str) -> None:
    """Prints how many steps a commit has, having killed one before each."""
    hook = Hook(lambda: os.kill(os.getpid(), signal.SIGKILL))
    for at in range(1000):
        buffer = scene(folder)
        before, after = last_commit(), state_of(buffer)
        pid = os.fork()
        if pid == 0:
            hook.at = at
            commit_to(which, folder, buffer)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if status == 0:
            print(at)
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        a, there = TrajectoryBuffer.load(folder / "a"), folder / which / "manifest.json"
        if which == "b":
            assert_same_state(a, before)
            if there.exists():
                assert_same_state(TrajectoryBuffer.load(folder / "b"), after)
        else:
            assert_same_state(a, before if a.trajectory_range[1] == 8 else after)
        commit_to(which, folder, buffer)  # the one that was not killed goes on
        assert_same_state(TrajectoryBuffer.load(folder / which), after)
        assert swept(folder / which)


def fail_at_every_step(folder: Path, which: str) -> None:
    """Prints how many steps a commit has, having failed one at each."""

    def fail() -> None:
        raise OSError(28, "No space left on device")

    hook = Hook(fail)
    for at in range(1000):
        buffer = scene(folder)
        (folder / "a" / ".manifest.json.tmp").unlink()
        before, after = last_commit(), state_of(buffer)
        names = set(names_in(folder / "a"))
        try:
            hook.at = at
            commit_to(which, folder, buffer)
            if hook.at >= 0:  # there was no such step
                print(at)
                return
            assert_same_state(TrajectoryBuffer.load(folder / which), after)  # it found another way
            continue
        except OSError as error:
            assert error.errno == 28
        assert_same_state(buffer, after)
        there = TrajectoryBuffer.load(folder / "a")
        if which == "b" or there.trajectory_range[1] == 8:
            assert_same_state(there, before)
            assert set(names_in(folder / "a")) == names
        else:
            assert_same_state(there, after)  # what failed was to clear up behind the commit
        if which == "b" and (folder / "b").exists() and not (folder / "b" / "manifest.json").exists():
            assert names_in(folder / "b") == []
        commit_to(which, folder, buffer)
        assert_same_state(TrajectoryBuffer.load(folder / which), after)
        assert swept(folder / which)


def in_a_process(call: str, *before: str) -> str:
    """What that call of this module's functions prints."""
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r})\nfrom test_buffer_crash import *\n{call}"
    done = subprocess.run([*before, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize("what", ["die_at_every_step", "fail_at_every_step"])
def test_every_step_of_a_commit_may_be_the_last(tmp_path: Path, what: str, which: str) -> None:
    steps = int(in_a_process(f"{what}(Path({str(tmp_path / 'x')!r}), {which!r})"))
    assert steps >= 16, "lock, manifest, 2 links or none, 5 files opened and renamed, folder, sweep"


_ORDER = """
from saved_buffers import *
steps = []
fsync = os.fsync
def spy(descriptor):
    steps.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{{descriptor}}")))
    fsync(descriptor)
os.fsync = spy
def hook(event, args):
    if event in ("os.rename", "os.remove"):
        steps.append(event.removeprefix("os.") + " " + os.path.basename(str(args[0])))
folder = Path({folder!r})
buffer = scene(folder)
sys.addaudithook(hook)
steps.clear()
commit_to("a", folder, buffer)
print("\\n".join(steps))
"""


def test_nothing_is_named_before_it_lasts_and_nothing_deleted_before_its_successor_does(tmp_path: Path) -> None:
    steps = in_a_process(_ORDER.format(folder=str(tmp_path / "x"))).splitlines()
    written = [
        ".segment-000000000008-000000000012.safetensors.tmp",
        ".features-000000000005-000000000006.safetensors.tmp",
        ".features-000000000008-000000000012.safetensors.tmp",
        ".priorities-000000004.safetensors.tmp",
    ]
    assert steps[:8] == [f"{what} {name}" for name in written for what in ("sync", "rename")]
    assert steps[8:12] == [
        "sync a",
        "sync .manifest.json.tmp",
        "rename .manifest.json.tmp",
        "sync a",
    ]
    assert sorted(steps[12:]) == [
        "remove features-000000000000-000000000004.safetensors",
        "remove features-000000000004-000000000006.safetensors",
        "remove priorities-000000003.safetensors",
        "remove segment-000000000000-000000000004.safetensors",
    ]


# -- disks -----------------------------------------------------------------------------------------


def on_a_disk_of(size: str, disk: Path, call: str) -> str:
    """What that call prints, with a file system of that size at `disk`, in a mount namespace of its own."""
    disk.mkdir()
    mount = f'mount -t tmpfs -o size={size} tmpfs "{disk}"'
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip("user namespaces are off here; runs where they are on. The tests above let every call fail once")
    return in_a_process(call, *inside, f'{mount} && exec "$@"', "sh")


def fill_the_disk(disk: Path) -> None:
    folder = disk / "buffer"
    buffer = TrajectoryBuffer(1 << 20, 1 << 20)
    push(buffer, 20)
    buffer.save(folder)
    before, names = state_of(buffer), names_in(folder)
    push(buffer, 2000)
    for _ in range(2):
        try:
            buffer.save(folder)
        except OSError as error:
            print(error.strerror)
        assert names_in(folder) == names
        assert_same_state(TrajectoryBuffer.load(folder), before)
    assert_same_state(buffer, filled(2020, 1 << 20, 1 << 20))
    (disk / "ballast").unlink()
    buffer.save(folder)
    assert_same_state(TrajectoryBuffer.load(folder), buffer)
    print("whole")


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    call = f"""
disk = Path({str(disk)!r})
(disk / "ballast").write_bytes(bytes(1 << 20))
fill_the_disk(disk)
"""
    assert on_a_disk_of("1200k", disk, call).splitlines() == ["No space left on device"] * 2 + ["whole"]


def save_read_only(disk: Path) -> None:
    folder = disk / "buffer"
    buffer = filled(5)
    buffer.save(folder)
    names = names_in(folder)
    push(buffer, 5)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        buffer.save(folder)
    except OSError as error:
        print(error)
    assert names_in(folder) == names
    assert_same_state(TrajectoryBuffer.load(folder), filled(5))
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    buffer.save(folder)
    assert_same_state(TrajectoryBuffer.load(folder), filled(10))


def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    said = on_a_disk_of("1m", disk, f"save_read_only(Path({str(disk)!r}))")
    assert said == f"[Errno 30] Read-only file system: '{disk}/buffer/.lock'\n"


def save_without_permission(folder: Path) -> None:
    buffer = filled(5)
    buffer.save(folder)
    names = names_in(folder)
    push(buffer, 5)
    folder.chmod(0o555)
    if is_root := os.geteuid() == 0:  # who may write everywhere
        os.chown(folder / ".lock", 65534, -1)
        os.seteuid(65534)
    try:
        buffer.save(folder)
    except PermissionError as error:
        print(error)
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)
    assert names_in(folder) == names
    assert_same_state(TrajectoryBuffer.load(folder), filled(5))
    buffer.save(folder)
    assert_same_state(TrajectoryBuffer.load(folder), filled(10))


def test_a_folder_without_permission() -> None:
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)  # pytest's own folder lets nobody else in
        folder = Path(top) / "buffer"
        said = in_a_process(f"save_without_permission(Path({str(folder)!r}))")
        name = ".segment-000000000005-000000000010.safetensors.tmp"
        assert said == f"[Errno 13] Permission denied: '{folder}/{name}'\n"
