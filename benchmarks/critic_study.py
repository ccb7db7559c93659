"""What helps the critic to rank the actions of a state: one factor at a time, on the same games and the same truth.

The start policy plays 20 iterations of games; a critic of each kind learns from them alone, and `diagnose` says how its
advantages within states correlate with the returns of that policy.

    .venv/bin/python benchmarks/critic_study.py --objects 10 --seeds 0 1 2 --out runs/critic_study.jsonl
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from archer_fast import backbone
from archer_fast.algorithms.archer import Archer
from archer_fast.config import BufferConfig, Config, CriticConfig, EvalConfig, RolloutConfig, TaskConfig
from archer_fast.diagnosis_play import measure_states
from archer_fast.diagnosis_score import critic_score, diagnose_critic
from archer_fast.meters import Meters
from archer_fast.run_folder import RunFolder
from archer_fast.run_state import RunState
from archer_fast.watcher import SilentWatcher

FACTORS: dict[str, dict[str, Any]] = {
    "base": {},
    "without the repeat": {"reads_repeated": False},
    "without the log-prob": {"reads_logprob": False},
    "without the turn": {"reads_turn": False},
    "without any of the three": {"reads_repeated": False, "reads_logprob": False, "reads_turn": False},
    "TD(.5)": {"td_lambda": 0.5},
    "TD(.9)": {"td_lambda": 0.9},
    "Monte-Carlo": {"td_lambda": 1.0},
    "V by fresh actions": {"value_target": "resample"},
    "V by expectile .7": {"value_target": "expectile", "expectile": 0.7},
    "tau .01": {"tau": 0.01},
    "heads of 1024": {"hidden_size": 1024},
    "lr 3e-4": {"lr": 3e-4},
    "separate trunk": {"trunk": "separate", "trunk_lr": 3e-4},
    "separate trunk, no repeat": {"trunk": "separate", "trunk_lr": 3e-4, "reads_repeated": False},
}
ITERATIONS, UPDATES = 20, 20  # 2,560 games, 1,000 critic steps


def study(objects: int, seed: int, factor: str, states: Any, folder: Path) -> tuple[dict[str, Any], Any]:
    config = Config(
        out=str(folder),
        seed=seed,
        task=TaskConfig("twenty-questions", {"objects": objects}),
        critic=CriticConfig(**FACTORS[factor]),
        rollout=RolloutConfig(games=128),
        buffer=BufferConfig(max_trajectories=4096),
        eval=EvalConfig(final_games=1),
    )
    run = RunState.start(config, RunFolder(str(folder)), SilentWatcher())
    with run.loggers:
        learner, meters = run.learner, Meters()
        assert isinstance(learner, Archer)
        for _ in range(ITERATIONS):
            learner.insert(run.play_games(meters), meters)
        begin = time.process_time()
        for _ in range(UPDATES):
            learner.update_critic(meters)
        seconds = time.process_time() - begin
        if states is None:
            states = measure_states(
                run.actor, run.stop_token_id, config.task, config.rollout,
                gamma=config.critic.gamma, num_states=384, num_actions=8, num_continuations=32, seed=seed,
            )  # fmt: skip
        found, _ = diagnose_critic(states, critic_score(learner.critic, 1.0), run.actor)
    w = found.within
    row = {
        "objects": objects, "seed": seed, "factor": factor, "correlation": w.correlation, "ceiling": w.ceiling,
        "corrected": w.corrected, "explained_variance": found.explained_variance, "turn_share": found.turn_share,
        "seconds": seconds,
    }  # fmt: skip
    return row, states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=list(FACTORS), choices=list(FACTORS))
    parser.add_argument("--out", type=Path, default=Path("runs/critic_study.jsonl"))
    args = parser.parse_args()
    backbone.quiet()
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        states = None
        for factor in args.only:
            with tempfile.TemporaryDirectory() as folder:
                row, states = study(args.objects, seed, factor, states, Path(folder) / "run")
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


if __name__ == "__main__":
    main()
