"""`archer-fast compare`: several algorithms, several seeds, one page that says which learned faster."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from archer_fast.checkout import commit
from archer_fast.cli_args import TaskChoice, check_task, parse, parse_train
from archer_fast.compare import plan as plans
from archer_fast.compare.contest import Outcome, run_contest
from archer_fast.compare.figures import NothingYet
from archer_fast.compare.page import findings, warnings
from archer_fast.compare.plan import Plan, RunPlan
from archer_fast.compare.progress import make_watcher
from archer_fast.compare.report import build_comparison
from archer_fast.folder_lock import folder_lock

COMMAND = (sys.executable, "-m", "archer_fast")
Say = Callable[[str], None]


@dataclass(slots=True)
class CompareArgs:
    """Train several algorithms with several seeds, all on the same number of games, and compare what they learned.

    `archer-fast compare --algorithms archer,ppo --task.options objects=32 --out runs/32 -- --actor.lr 1e-4`: what
    follows `--` is given to every `archer-fast train`. The same command again goes on where it was stopped, and
    with more seeds or algorithms it runs those that are new.
    """

    algorithms: str = ""
    """Presets of `archer-fast train`, commas between; the first is raced against each of the others."""
    seeds: int = 3
    """Seeds of each: `first_seed`, the next one, ..."""
    first_seed: int = 0
    """The smallest seed: settings that were chosen by looking at some seeds are better shown with others."""
    trajectories: int = 10240
    """Games that each run plays to learn from."""
    out: Path = Path("runs/compare")
    """Folder of the comparison: report.md, comparison.json, pictures, and ALGORITHM/seed-N of every run."""
    jobs: int | None = None
    """Runs at once; None: as many as there are cores that this process may use."""
    window: int | None = None
    """Games that a point of a smoothed curve is the mean of; None: five iterations, less where the budget is short."""
    report_only: bool = False
    """Run nothing: make the report from what is there, also beside a comparison that runs; with --out, --window."""
    task: TaskChoice = field(default_factory=TaskChoice)

    def check(self) -> None:
        for name in ("seeds", "trajectories", "jobs", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: wanted at least 1, got {value}")
        if self.first_seed < 0:
            raise ValueError(f"first_seed: wanted at least 0, got {self.first_seed}")


def compare(
    argv: Sequence[str],
    prog: str,
    presets: Mapping[str, Any],
    tuning: Mapping[str, str],
) -> None:
    """Run what is missing and report; SystemExit 1 where a run failed, 130 after Ctrl-C.

    `presets`: the known algorithms. `tuning`: how each was tuned, where that is known.
    """
    own, extra = _split(argv)
    args = parse(CompareArgs, own, prog=prog)
    args.check()
    plans.check_extra(extra)
    console = Console()

    def say(text: str) -> None:
        console.print(escape(text), soft_wrap=True, highlight=False)

    if args.report_only:
        asked = dataclasses.replace(CompareArgs(), out=args.out, window=args.window, report_only=True)
        if args != asked or extra:
            raise ValueError("report-only: wanted with --out and --window alone, got settings of runs too")
        _report(args.out, tuning, say, args.window)
        return
    names = plans.parse_names(args.algorithms, presets)
    shared = [*_task_arguments(args.task), *extra]
    settings = functools.partial(parse_train, prog=f"{prog} ... --")
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = plans.plan_runs(names, seeds, args.trajectories, args.out, shared, settings)
    for run in runs[: len(names)]:
        check_task(run.config.task, run.config.warm_start.player)
    window = args.window or plans.default_window(runs, args.trajectories)
    plan = Plan(tuple(names), args.seeds, args.trajectories, window, first_seed=args.first_seed)
    again = shlex.join([*prog.split(), *argv])
    _make_folder(args.out)
    with folder_lock(args.out):
        plans.check_folder(args.out, runs)
        jobs = args.jobs or plans.usable_cores()
        outcome = _run(args.out, plan, runs, jobs, again)
        with contextlib.suppress(NothingYet):  # stopped or failed so soon: what follows says so
            _report(args.out, tuning, say)
    if outcome.interrupted:
        print(f"archer-fast: stopped; go on with: {again}", file=sys.stderr)
        raise SystemExit(130)
    if outcome.failed:
        causes = "; ".join(f"{name} ({cause})" for name, cause in outcome.failed.items())
        print(f"archer-fast: error: {len(outcome.failed)} of {len(runs)} runs failed: {causes}", file=sys.stderr)
        raise SystemExit(1)


def _run(out: Path, plan: Plan, runs: Sequence[RunPlan], jobs: int, again: str) -> Outcome:
    """Run what is not finished; the plan says who asked, where, and at which commit."""
    made = Plan.load(out).made if (out / plans.FILE).is_file() else ()
    if not all(run.finished for run in runs):
        now = {
            "command": again,
            "commit": commit(),
            "machine": f"{platform.machine()}, {plans.usable_cores()} usable cores, {jobs} runs at once",
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        }
        made = made if made and made[-1] == now else (*made, now)
    dataclasses.replace(plan, made=made).save(out)
    with make_watcher(Console()) as watcher:
        return run_contest(runs, COMMAND, jobs, watcher)


def _report(out: Path, tuning: Mapping[str, str], say: Say, window: int | None = None) -> None:
    figures, said = build_comparison(out, tuning, window)
    for line in [*findings(figures), *warnings(figures), *said]:
        say(line)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """["--seeds", "2", "--", "--actor.lr", "1e-4"] -> what is ours, what is every run's."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def _task_arguments(task: TaskChoice) -> list[str]:
    name = [] if task.name is None else ["--task.name", task.name]
    options = [f"{key}={json.dumps(value)}" for key, value in task.options.items()]
    return [*name, *(["--task.options", *options] if options else [])]


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"out: wanted a folder, got {str(out)!r}, where a file is in the way") from None
