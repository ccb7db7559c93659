"""`archer-fast compare` as a user meets it: a whole comparison, nonsense, Ctrl-C, and real training under it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from archer_fast import cli, cli_compare
from archer_fast.folder_lock import folder_lock

STUB = (sys.executable, str(Path(__file__).parent / "compare" / "stub_train.py"))
ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--rollout.games", "10"]
TINY = [
    *("--warm-start.games", "40", "--warm-start.steps", "8", "--model.tiny.hidden-size", "16"),
    *("--model.tiny.num-heads", "2", "--model.tiny.intermediate-size", "16", "--model.tiny.num-layers", "1"),
    *("--rollout.games", "4", "--rollout.max-new-tokens", "4", "--eval.games", "4", "--eval.final-games", "8"),
    *("--critic.epochs", "2", "--critic.hidden-size", "8", "--critic.warmup-iterations", "1", "--actor.epochs", "1"),
    *("--checkpoint-every", "1000"),
]
TASK = ["--task.name", "guess-number", "--task.options", "high=8", "max_turns=6"]


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs that learn nothing, in this process's own words."""
    monkeypatch.setattr(cli_compare, "COMMAND", STUB)
    monkeypatch.setenv("COLUMNS", "120")
    yield


def run_cli(*argv: str | Path) -> Said:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(a) for a in argv])
        except SystemExit as stop:
            code = 0 if stop.code is None else int(stop.code)
    return Said(code, out.getvalue(), err.getvalue())


def compare(out: Path, *more: str, algorithms: str = "archer,ppo", extra: Sequence[str] = SMALL) -> Said:
    return run_cli(
        *("compare", "--algorithms", algorithms, "--seeds", "2", "--trajectories", "40"),
        *("--out", out, *more, "--", *extra),
    )


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_comparison_from_nothing_to_the_report(tmp_path: Path) -> None:
    said = compare(tmp_path / "c", "--jobs", "2")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert sum(line.endswith("in its last iterations") for line in lines) == 4
    assert any(
        line.startswith("At the end archer is 1.00 above ppo (95 % interval +1.00 to +1.00, 2") for line in lines
    )
    assert lines[-1] == f"report: {tmp_path}/c/report.md"
    figures = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert figures["plan"]["trajectories"] == 40 and figures["plan"]["window"] == 10
    (made,) = figures["plan"]["made"]
    assert made["command"].startswith("archer-fast compare --algorithms archer,ppo --seeds 2") and made["commit"]
    before = contents(tmp_path / "c" / "ppo")
    again = compare(tmp_path / "c", "--jobs", "1")
    assert again.code == 0 and "starts" not in again.out and contents(tmp_path / "c" / "ppo") == before
    only = run_cli("compare", "--report-only", "--out", tmp_path / "c", "--window", "20")
    assert only.code == 0 and "mean return of the last 20 games" in " ".join(
        (tmp_path / "c" / "report.md").read_text().split()
    )


def test_other_seeds_than_those_that_were_looked_at(tmp_path: Path) -> None:
    said = compare(tmp_path / "c", "--first-seed", "3")
    assert (said.code, said.err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "c" / "ppo").glob("seed-?")) == ["seed-3", "seed-4"]
    page = (tmp_path / "c" / "report.md").read_text()
    assert "40 trajectories a run, seeds 3 to 4." in page and "| 3, 4 |" in page
    clash = compare(tmp_path / "c")
    assert clash.code != 0 and "also holds archer/seed-3, archer/seed-4, ppo/seed-3, ppo/seed-4" in clash.err


def test_a_failed_run_is_told_and_the_report_is_of_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_FAILS", "*/ppo/seed-1")
    said = compare(tmp_path)
    assert said.code == 1
    assert said.err == "archer-fast: error: 1 of 4 runs failed: ppo seed 1 (exit status 1)\n"
    assert "  RuntimeError: out of luck\n" in said.out
    assert "**Not finished**, and in no mean where another seed is: ppo seed 1 (1 of 4 iterations)." in said.out


def test_runs_that_all_fail_at_once_leave_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_compare, "COMMAND", (sys.executable, "-c", "raise SystemExit('no luck at all')"))
    said = compare(tmp_path)
    assert said.code == 1 and "error: 4 of 4 runs failed: archer seed 0 (exit status 1); ppo seed 0" in said.err
    assert said.out.count("\n  no luck at all\n") == 4 and not (tmp_path / "report.md").exists()
    assert run_cli("compare", "--report-only", "--out", tmp_path).err.endswith("no run has ended an iteration yet\n")


def test_the_task_and_what_follows_the_dashes_reach_every_run(tmp_path: Path) -> None:
    said = compare(
        tmp_path, "--task.name", "guess-number", "--task.options", "high=9", extra=[*SMALL, "--actor.lr", "1e-5"]
    )
    assert said.code == 0, said.err
    for path in tmp_path.glob("*/seed-*/config.json"):
        config = json.loads(path.read_text())
        assert config["task"] == {"name": "guess-number", "options": {"high": 9}}
        assert (config["actor"]["lr"], config["rollout"]["games"], config["iterations"]) == (1e-5, 10, 4)
    assert len(list(tmp_path.glob("*/seed-*/config.json"))) == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "algorithms: wanted names of presets with commas between, got none (archer, archer-exact, "),
        (["--algorithms", " , "], "algorithms: wanted names of presets with commas between, got none"),
        (["--algorithms", "archer,pppo"], "algorithms: unknown preset 'pppo'; did you mean 'ppo'? (presets: archer, "),
        (["--algorithms", "ppo,ppo"], "algorithms: 'ppo' is given twice"),
        (["--algorithms", "ppo", "--seeds", "0"], "seeds: wanted at least 1, got 0"),
        (["--algorithms", "ppo", "--first-seed", "-1"], "first_seed: wanted at least 0, got -1"),
        (["--algorithms", "ppo", "--trajectories", "-5"], "trajectories: wanted at least 1, got -5"),
        (["--algorithms", "ppo", "--jobs", "-1"], "jobs: wanted at least 1, got -1"),
        (["--algorithms", "ppo", "--window", "0"], "window: wanted at least 1, got 0"),
        (["--algorithms", "ppo", "--trajectories", "100"], "wanted a multiple of it (64 or 128), got 100"),
        (
            ["--algorithms", "archer,offline-iql", "--trajectories", "2560"],
            "iterations: wanted more than rollout.iterations = 20, after which the learning from the replay begins, "
            "got 20",
        ),
        (["--algorithms", "ppo", "--task.name", "guess-numbr"], "task.name: "),
        (["--algorithms", "ppo", "--task.options", "objects=0"], "task.options: "),
        (
            ["--algorithms", "ppo", "--", "--seed", "3"],
            "--seed: not an option for all runs of a comparison; see --seeds",
        ),
        (["--algorithms", "ppo", "--", "--iterations=3"], "see --trajectories"),
        (["--algorithms", "ppo", "--", "--preset", "bc"], "see --algorithms"),
        (["--algorithms", "ppo", "--", "--task.name", "x"], "see --task.name before the --"),
        (["--algorithms", "ppo", "--", "--task.options", "a=1"], "see --task.options before the --"),
        (["--algorithms", "ppo", "--", "--resume"], "--resume: not an option for all runs of a comparison"),
        (["--algorithms", "ppo", "--", "--critic.tau", "-1"], "tau: wanted a number from 0 to 1, got -1"),
        (["--report-only", "--algorithms", "ppo"], "report-only: wanted with --out and --window alone"),
        (["--report-only", "--seeds", "2"], "report-only: wanted with --out and --window alone"),
        (["--report-only"], "out: wanted the folder of a comparison, but "),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_made(argv: list[str], message: str, tmp_path: Path) -> None:
    out = tmp_path / "c"
    at = argv.index("--") if "--" in argv else len(argv)
    code, _, err = run_cli("compare", "--out", out, *argv[:at], *argv[at:])
    assert code == 2 and message in " ".join(err.replace("│", " ").split()), err
    assert not out.exists()


def test_an_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    for out in (tmp_path / "f", tmp_path / "f" / "c"):
        code, _, err = compare(out)
        assert code == 2 and f"out: wanted a folder, got {str(out)!r}, where a file is in the way" in err
    assert (tmp_path / "f").read_text() == "mine"


def test_a_clash_with_what_is_there_changes_nothing(tmp_path: Path) -> None:
    assert compare(tmp_path).code == 0
    before = contents(tmp_path)
    code, _, err = compare(tmp_path, "--task.options", "objects=32")
    assert code == 2 and "holds a finished run with other settings (task.options: {'objects': 10}, wanted" in err
    code, _, err = compare(tmp_path, algorithms="archer")
    assert code == 2 and "also holds ppo/seed-0, ppo/seed-1, which this comparison would leave out" in err
    code, _, err = compare(tmp_path, "--seeds", "1")
    assert code == 2 and "also holds archer/seed-1, ppo/seed-1, which this comparison would leave out" in err
    assert contents(tmp_path) == before


def test_one_comparison_a_folder(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        code, _, err = compare(tmp_path)
    assert code == 2 and f"another writer is in {str(tmp_path)!r} (pid {os.getpid()}" in err


def _process(out: Path, cache: Path, *argv: str, algorithms: str = "archer,ppo") -> subprocess.Popen[str]:
    """The real thing, as a process."""
    command = [
        sys.executable,
        "-m",
        "archer_fast",
        "compare",
        "--algorithms",
        algorithms,
        *TASK,
        "--out",
        str(out),
        *argv,
    ]
    return subprocess.Popen(
        [*command, "--", *TINY],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ARCHER_FAST_CACHE": str(cache), "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _learned(out: Path) -> dict[str, list[dict[str, float]]]:
    """Every run's metrics without the times."""
    logs = {str(path.relative_to(out)): path.read_text().splitlines() for path in sorted(out.glob("*/*/metrics.jsonl"))}
    timed = ("seconds", "tokens_per_second")
    return {
        name: [{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines]
        for name, lines in logs.items()
    }


@pytest.mark.timeout(300)
def test_real_training_under_it(tmp_path: Path) -> None:
    process = _process(tmp_path / "c", tmp_path / "cache", "--seeds", "1", "--trajectories", "12")
    out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, ""), out + err
    figures = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert figures["missing"] == figures["faulty"] == {} and figures["task_options"] == {"high": 8, "max_turns": 6}
    for name, one in figures["contestants"].items():
        summary = json.loads((tmp_path / "c" / name / "seed-0" / "summary.json").read_text())
        ends = {"start": "before_return", "end": "last_return", "best": "best_return", "greedy": "last_greedy_return"}
        assert {end: one["ends"][end]["mean"] for end in ends} == {end: summary[key] for end, key in ends.items()}
        assert one["curve"]["x"] == [4, 8, 12] and one["behaviour"]["kl"] is not None
        assert one["curve_in_seconds"]["x"][-1] == one["ends"]["seconds"]["mean"] > 0
    assert figures["settings"]["algorithm"] == {"archer": "archer", "ppo": "ppo"}
    assert (tmp_path / "c" / "return_by_trajectories.png").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_runs_stopped_by_ctrl_c_go_on_as_if_nothing_was(tmp_path: Path) -> None:
    budget = ("--seeds", "2", "--trajectories", "160")
    whole = _process(tmp_path / "a", tmp_path / "cache", *budget)
    out, err = whole.communicate(timeout=400)
    assert (whole.returncode, err) == (0, ""), out + err
    assert "report: " in out and "At the end archer is" in (tmp_path / "a" / "report.md").read_text()

    log = tmp_path / "b" / "archer" / "seed-0" / "metrics.jsonl"
    stopped = _process(tmp_path / "b", tmp_path / "cache", *budget)
    end = time.monotonic() + 100
    while not (log.exists() and log.read_text().count("\n") > 4):
        assert stopped.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    stopped.send_signal(signal.SIGINT)
    out, err = stopped.communicate(timeout=100)
    assert stopped.returncode == 130, out + err
    assert err.startswith("archer-fast: stopped; go on with: archer-fast compare --algorithms archer,ppo")
    half = _learned(tmp_path / "b")
    assert len(half["archer/seed-0/metrics.jsonl"]) < 40

    again = _process(tmp_path / "b", tmp_path / "cache", *budget)
    out, err = again.communicate(timeout=400)
    assert (again.returncode, err) == (0, ""), out + err
    assert "archer seed 0: goes on" in out
    assert _learned(tmp_path / "b") == _learned(tmp_path / "a")
    assert len(json.loads((tmp_path / "b" / "plan.json").read_text())["made"]) == 1, "the same command, machine and day"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_preset_can_be_compared(tmp_path: Path) -> None:
    from archer_fast.presets import PRESETS

    names = [name for name in PRESETS if name not in ("rloo",)]  # groups of 8 games do not fit into 4
    games = ("--trajectories", str(4 * 21))  # offline presets play in the first 20 iterations
    done = _process(tmp_path / "c", tmp_path / "cache", "--seeds", "1", *games, algorithms=",".join(names))
    out, err = done.communicate(timeout=800)
    assert (done.returncode, err) == (0, ""), out + err
    figures = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert list(figures["contestants"]) == names and figures["missing"] == {}
    assert set(figures["offline"]) == {"offline-iql", "offline-sarsa"}
