"""Which runs a comparison consists of, where each lies, and what it must have been asked for."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archer_fast.config import Config, from_dict, to_dict
from archer_fast.resume import leaves
from archer_fast.run_folder import is_run, read_config, read_json, write_json

Settings = Callable[[Sequence[str]], Config]  # what `archer-fast train` would make of these arguments
OF_COMPARE = ("preset", "seed", "out", "iterations", "resume", "config", "task.name", "task.options")
FILE = "plan.json"


@dataclass(slots=True, frozen=True, eq=False)
class RunPlan:
    """One run: `RunPlan("ppo", 0, Path("runs/compare/ppo/seed-0"), config, ("--preset", "ppo", ...))`."""

    algorithm: str
    seed: int
    folder: Path
    config: Config = field(repr=False)
    arguments: tuple[str, ...] = field(repr=False)
    """Of `archer-fast train`."""

    @property
    def name(self) -> str:
        return f"{self.algorithm} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()


@dataclass(slots=True, frozen=True)
class Plan:
    """The comparison as its folder remembers it: `Plan(("archer", "ppo"), seeds=3, trajectories=10240, window=640)`."""

    algorithms: tuple[str, ...]
    """The first is compared with each of the others."""
    seeds: int
    trajectories: int
    window: int
    """Games that a point of a smoothed curve is the mean of."""
    made: tuple[dict[str, Any], ...] = ()
    """Commit, machine, jobs and command of every call that ran something."""
    first_seed: int = 0

    def seed_range(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def save(self, out: Path) -> None:
        write_json(out / FILE, dataclasses.asdict(self))

    @staticmethod
    def load(out: Path) -> Plan:
        """ValueError where no comparison was begun in `out`."""
        file = out / FILE
        if not file.is_file():
            raise ValueError(f"out: wanted the folder of a comparison, but {str(out)!r} has no {FILE}")
        plan = from_dict(Plan, read_json(file), str(file))
        assert isinstance(plan, Plan)
        return plan


def parse_names(text: str, known: Collection[str]) -> list[str]:
    """ "archer, ppo" -> ["archer", "ppo"]; ValueError for none, one that does not exist, or one given twice."""
    names = [name for name in (part.strip() for part in text.split(",")) if name]
    if not names:
        raise ValueError(f"algorithms: wanted names of presets with commas between, got none ({', '.join(known)})")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"algorithms: unknown preset {name!r}{hint} (presets: {', '.join(known)})")
        if names.count(name) > 1:
            raise ValueError(f"algorithms: {name!r} is given twice")
    return names


def check_extra(arguments: Sequence[str]) -> None:
    """ValueError for an option of `train` that the comparison itself decides."""
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("_", "-")
        if argument.startswith("--") and name in OF_COMPARE:
            instead = {"seed": "--seeds", "iterations": "--trajectories", "preset": "--algorithms"}.get(name)
            instead = f"--{name} before the --" if name.startswith("task.") or name == "out" else instead
            raise ValueError(
                f"--{name}: not an option for all runs of a comparison" + f"; see {instead}" * bool(instead)
            )


def plan_runs(
    algorithms: Sequence[str],
    seeds: Sequence[int],
    trajectories: int,
    out: Path,
    shared: Sequence[str],
    settings: Settings,
) -> list[RunPlan]:
    """Every run, seed by seed, so that a comparison that is stopped has the same seeds of each algorithm.

    `shared`: arguments of `train` that all runs get. ValueError where an algorithm cannot play just that many games.
    """
    of = {name: settings(["--preset", name, *shared]) for name in algorithms}
    runs = []
    for seed in seeds:
        for name, config in of.items():
            iterations, rest = divmod(trajectories, config.rollout.games)
            if rest:
                near = [n * config.rollout.games for n in (iterations, iterations + 1) if n]
                raise ValueError(
                    f"trajectories: {name} plays {config.rollout.games} an iteration; wanted a multiple of it "
                    f"({' or '.join(map(str, near))}), got {trajectories}"
                )
            folder = out / name / f"seed-{seed}"
            its_own = ["--preset", name, "--seed", str(seed), "--iterations", str(iterations), "--out", str(folder)]
            config = dataclasses.replace(config, seed=seed, iterations=iterations, out=str(folder), resume=False)
            runs.append(RunPlan(name, seed, folder, config, (*its_own, *shared)))
    return runs


def default_window(runs: Sequence[RunPlan], trajectories: int) -> int:
    """Five iterations of the contestant with the largest ones; fewer where that is over a quarter of the budget."""
    largest = max(run.config.rollout.games for run in runs)
    return max(largest, min(5 * largest, trajectories // 4 // largest * largest))


def check_folder(out: Path, runs: Sequence[RunPlan]) -> None:
    """ValueError where `out` holds runs that are not those of `runs`; changes nothing."""
    for run in runs:
        if is_run(run.folder):
            clashes = clashing_settings(read_config(run.folder), run.config)
            if clashes:
                state = "finished" if run.finished else "begun"
                raise ValueError(
                    f"{run.folder}: holds a {state} run with other settings ({'; '.join(clashes)}); "
                    "ask for the same, or give another --out"
                )
    wanted = {run.folder for run in runs}
    others = [path for path in sorted(out.glob("*/seed-*")) if path not in wanted and is_run(path)]
    if others:
        raise ValueError(
            f"out: {str(out)!r} also holds {', '.join(str(path.relative_to(out)) for path in others)}, which this "
            "comparison would leave out; ask for those algorithms and seeds too, or give another --out"
        )


def clashing_settings(saved: Config, wanted: Config) -> list[str]:
    """["iterations: 80, wanted 40"]: where a run was asked for something else."""
    old, new = dict(leaves(to_dict(saved))), dict(leaves(to_dict(wanted)))
    unlike = [name for name in new if name not in ("out", "resume") and old[name] != new[name]]
    said = {"iterations": "iterations (trajectories / rollout.games)"}
    return [f"{said.get(name, name)}: {old[name]!r}, wanted {new[name]!r}" for name in unlike]


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))
