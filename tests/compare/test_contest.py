"""The processes of a comparison, with runs that learn nothing: order, Ctrl-C, failures, and what may be resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from archer_fast.cli_args import parse_train
from archer_fast.compare.contest import Outcome, run_contest
from archer_fast.compare.plan import RunPlan, check_folder, plan_runs
from archer_fast.compare.progress import Standing
from archer_fast.config import Config

STUB = (sys.executable, str(Path(__file__).parent / "stub_train.py"))
SHARED = ["--rollout.games", "10"]


class Heard:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.most = 0

    def message(self, text: str) -> None:
        self.messages.append(text)

    def show(self, standings: Sequence[Standing], jobs: int) -> None:
        self.most = max(self.most, sum(one.state == "running" for one in standings))

    def __enter__(self) -> Heard:
        return self

    def __exit__(self, *_: object) -> None: ...


def settings(arguments: Sequence[str]) -> Config:
    return parse_train(arguments, prog="train")


def planned(out: Path, *, seeds: int = 2, trajectories: int = 30, shared: Sequence[str] = SHARED) -> list[RunPlan]:
    return plan_runs(["archer", "ppo"], range(seeds), trajectories, out, shared, settings)


def returns(run: RunPlan) -> list[float]:
    return [json.loads(line)["return"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def interrupt(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Sends this process SIGINT once the first run has its second row."""
    code = (
        "import os, signal, sys, time, pathlib\n"
        f"rows = pathlib.Path({str(tmp_path / 'archer' / 'seed-0' / 'metrics.jsonl')!r})\n"
        "while not rows.exists() or rows.read_text().count(chr(10)) < 2: time.sleep(.02)\n"
        f"os.kill({os.getpid()}, signal.SIGINT)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    yield process
    process.kill()
    process.wait()


def test_seeds_interleave_so_that_a_stopped_comparison_is_balanced(tmp_path: Path) -> None:
    runs = planned(tmp_path)
    assert [run.name for run in runs] == ["archer seed 0", "ppo seed 0", "archer seed 1", "ppo seed 1"]
    assert runs[3].folder == tmp_path / "ppo" / "seed-1"
    assert runs[3].config == settings([*runs[3].arguments]), "what is asked is what the run will make of its arguments"
    assert (runs[3].config.algorithm, runs[3].config.seed, runs[3].config.iterations) == ("ppo", 1, 3)


def test_all_runs_end_and_are_not_run_again(tmp_path: Path) -> None:
    runs, heard = planned(tmp_path), Heard()
    assert run_contest(runs, STUB, 2, heard) == Outcome()
    assert all(run.finished for run in runs) and heard.most == 2
    assert returns(runs[2]) == pytest.approx([-8.9, -7.9, -6.9])
    assert heard.messages[0] == f"archer seed 0: starts, log {tmp_path}/archer/seed-0.log"
    assert "ppo seed 1: finished, return -8.90 in its last iterations" in heard.messages
    log = runs[3].log.read_text()
    assert log.startswith(f"$ {sys.executable}") and "--preset ppo --seed 1 --iterations 3" in log
    before, again = contents(tmp_path), Heard()
    check_folder(tmp_path, runs)
    assert run_contest(runs, STUB, 2, again) == Outcome()
    assert contents(tmp_path) == before and again.messages == []


def test_one_job_is_one_run_at_once(tmp_path: Path) -> None:
    heard = Heard()
    run_contest(planned(tmp_path, seeds=1), STUB, 1, heard)
    assert [line.split(",")[0] for line in heard.messages] == [
        "archer seed 0: starts",
        "archer seed 0: finished",
        "ppo seed 0: starts",
        "ppo seed 0: finished",
    ]


def test_a_run_that_fails_stops_none_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_FAILS", "*/ppo/seed-0")
    runs, heard = planned(tmp_path), Heard()
    outcome = run_contest(runs, STUB, 2, heard)
    assert outcome == Outcome({"ppo seed 0": "exit status 1"})
    assert [run.finished for run in runs] == [True, False, True, True]
    (said,) = [line for line in heard.messages if "failed" in line]
    assert said.startswith(f"ppo seed 0: failed (exit status 1); the end of {runs[1].log}:\n  $ ")
    assert said.endswith("\n  RuntimeError: out of luck")
    monkeypatch.delenv("STUB_FAILS")
    check_folder(tmp_path, runs)
    assert run_contest(runs, STUB, 2, Heard()) == Outcome() and returns(runs[1]) == [-10, -9, -8]
    assert "goes on after 1" in runs[1].log.read_text(), "from where it stopped"


def test_a_run_that_is_killed_says_by_what(tmp_path: Path) -> None:
    killer = (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert run_contest(planned(tmp_path, seeds=1)[:1], killer, 1, Heard()) == Outcome(
        {"archer seed 0": "killed by SIGKILL"}
    )


def test_ctrl_c_lets_the_runs_save_and_the_same_plan_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setenv("STUB_SECONDS", "0.3")
    handler = signal.getsignal(signal.SIGINT)
    runs, heard = planned(tmp_path, trajectories=200), Heard()
    outcome = run_contest(runs, STUB, 2, heard)
    assert outcome == Outcome(interrupted=True) and interrupt.wait(5) == 0
    assert signal.getsignal(signal.SIGINT) is handler
    assert heard.messages[-1] == "stopping: each run ends its iteration and saves; once more stops them at once"
    assert 2 <= len(returns(runs[0])) < 20 and "saved" in runs[0].log.read_text()
    assert not runs[2].folder.exists(), "what had not begun does not begin"
    monkeypatch.setenv("STUB_SECONDS", "0")
    check_folder(tmp_path, runs)
    assert run_contest(runs, STUB, 2, Heard()) == Outcome()
    assert returns(runs[0]) == [-10 + i for i in range(1, 21)], "as if nobody had stopped it"


# Writes two rows, then works for a minute, which a first SIGINT does not end.
SLOW_STUB = """
import pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
count = 0
def stop(*_):
    global count
    count += 1
    if count == 2:
        sys.exit(130)
signal.signal(signal.SIGINT, stop)
(out / "metrics.jsonl").write_text('{"iteration": 1, "return": 0}\\n{"iteration": 2, "return": 0}\\n')
end = time.monotonic() + 60
while time.monotonic() < end:
    time.sleep(0.05)
"""


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, interrupt: subprocess.Popen[bytes]) -> None:
    class Impatient(Heard):
        def message(self, text: str) -> None:
            if text.startswith("stopping") and len(self.messages) < 3:
                os.kill(os.getpid(), signal.SIGINT)
            super().message(text)

    runs = planned(tmp_path, seeds=1, trajectories=50)[:1]
    begun = time.monotonic()
    outcome = run_contest(runs, (sys.executable, "-c", SLOW_STUB), 1, Impatient())
    assert outcome.interrupted and time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("more", "clash"),
    [
        (["--trajectories", "60"], r"iterations \(trajectories / rollout\.games\): 3, wanted 6"),
        (["--actor.lr", "1e-5"], "actor.lr: 0.0002, wanted 1e-05"),
        (["--task.name", "guess-number"], "task.name: 'twenty-questions', wanted 'guess-number'; task.options"),
        (["--task.options", "objects=32"], r"task.options: \{'objects': 10\}, wanted \{'objects': 32\}"),
    ],
)
def test_other_settings_than_those_of_the_runs_are_refused(tmp_path: Path, more: list[str], clash: str) -> None:
    run_contest(planned(tmp_path, seeds=1), STUB, 2, Heard())
    before = contents(tmp_path)
    trajectories, more = (60, []) if more[0] == "--trajectories" else (30, more)
    with pytest.raises(ValueError, match=rf"archer/seed-0: holds a finished run with other settings \(.*{clash}"):
        check_folder(tmp_path, planned(tmp_path, seeds=1, trajectories=trajectories, shared=[*SHARED, *more]))
    assert contents(tmp_path) == before


def test_another_seed_in_the_folder_is_refused(tmp_path: Path) -> None:
    (first, *_), (other, *_) = planned(tmp_path), planned(tmp_path / "b")
    run_contest([first], STUB, 1, Heard())
    first.folder.rename(tmp_path / "archer" / "seed-1")
    with pytest.raises(ValueError, match=r"seed-1: holds a finished run with other settings \(seed: 0, wanted 1"):
        check_folder(tmp_path, planned(tmp_path))
    check_folder(tmp_path / "b", [other])


def test_a_comparison_may_grow_but_not_shrink(tmp_path: Path) -> None:
    small = planned(tmp_path, seeds=1)
    run_contest(small, STUB, 2, Heard())
    larger = planned(tmp_path, seeds=2)
    check_folder(tmp_path, larger)
    assert [run.finished for run in larger] == [True, True, False, False]
    with pytest.raises(ValueError, match="also holds ppo/seed-0, which this comparison would leave out"):
        check_folder(tmp_path, plan_runs(["archer"], [0], 30, tmp_path, SHARED, settings))


def test_a_budget_that_is_no_whole_number_of_iterations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"archer plays 10 an iteration; wanted a multiple of it \(30 or 40\), got 35"):
        planned(tmp_path, trajectories=35)
    with pytest.raises(ValueError, match=r"wanted a multiple of it \(10\), got 3"):
        planned(tmp_path, trajectories=3)
