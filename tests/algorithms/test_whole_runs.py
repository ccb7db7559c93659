"""Whole runs of every algorithm: they resume bit by bit, play in groups of seeds, learn offline."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from saved_buffers import assert_same_state
from test_train import tiny_config

from archer_fast.algorithms.learner import Learner
from archer_fast.buffer import TrajectoryBuffer
from archer_fast.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from archer_fast.config import (
    ActorConfig,
    BufferConfig,
    Config,
    CriticConfig,
    EvalConfig,
    FilteredBCConfig,
    PPOConfig,
    ReinforceConfig,
    RolloutConfig,
)
from archer_fast.loggers import read_rows
from archer_fast.run_folder import RunFolder
from archer_fast.run_state import RunState
from archer_fast.train import iterate, train
from archer_fast.trajectory import Trajectory
from archer_fast.watcher import SilentWatcher

UPDATE: dict[str, Any] = {"batch_games": 4, "epochs": 2, "max_kl_step": 1e3}
LOGGED: dict[str, Any] = UPDATE | {"actions": "logged", "normalise_advantages": False}
CRITIC: dict[str, Any] = {"hidden_size": 16, "epochs": 3, "batch_turns": 16, "warmup_iterations": 0}
PLAY: dict[str, Any] = {"games": 8, "num_slots": 8, "max_new_tokens": 4}

FRESH: dict[str, Any] = UPDATE | {"data": "replay", "actions": "fresh", "loss": "reinforce"}
FRESH |= {"normalise_advantages": False}

MODES: dict[str, dict[str, Any]] = {
    "archer": {
        "actor": ActorConfig(states_per_game=2, alternatives=3, **UPDATE),
        "critic": CriticConfig(**CRITIC),
    },
    "ppo": {"algorithm": "ppo", "ppo": PPOConfig(value_epochs=2, value_batch=16, **UPDATE)},
    "turn-ppo": {"algorithm": "ppo", "ppo": PPOConfig(level="turn", value_epochs=2, value_batch=16, **UPDATE)},
    "rloo": {"algorithm": "reinforce", "reinforce": ReinforceConfig(baseline="group", group_size=4, **UPDATE)},
    "filtered-bc": {"algorithm": "filtered-bc", "filtered_bc": FilteredBCConfig(share=0.5, **UPDATE)},
    "archer-residual": {
        "actor": ActorConfig(data="on_policy", advantage="residual", loss="ppo_clip", **LOGGED),
        "critic": CriticConfig(td_lambda=0.5, **CRITIC),
    },
    "archer-token-baseline": {
        "actor": ActorConfig(token_baseline=True, states_per_game=2, alternatives=3, **FRESH),
        "critic": CriticConfig(**CRITIC),
    },
    "offline-iql": {
        "actor": ActorConfig(data="replay", advantage="q_minus_v", loss="awr", **LOGGED),
        "critic": CriticConfig(value_target="expectile", **CRITIC),
        "rollout": RolloutConfig(iterations=1, **PLAY),
    },
    "chai": {
        "actor": ActorConfig(**FRESH | {"epochs": 0}),
        "critic": CriticConfig(**CRITIC),
        "rollout": RolloutConfig(best_of=2, **PLAY),
    },
}


pytestmark = pytest.mark.usefixtures("one_thread_and_one_cache")


def config_of(mode: str, out: Path, **changes: Any) -> Config:
    small = {"iterations": 2, "checkpoint_every": 1, "eval": EvalConfig(every=0, games=4, final_games=4, probe_games=4)}
    return tiny_config(out, **small | MODES[mode] | changes)


def iterations_of(config: Config) -> RunState:
    """All of them, without the evaluation at the end."""
    folder = RunFolder(config.out)
    with folder.lock():
        run = RunState.start(config, folder, SilentWatcher())
        with run.loggers:
            iterate(run, SilentWatcher())
    return run


def rows_of(folder: Path) -> list[dict[str, float]]:
    rows = read_rows(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


@pytest.mark.parametrize("mode", MODES)
def test_two_iterations_are_one_and_a_checkpoint_and_one(tmp_path: Path, mode: str) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run = iterations_of(config_of(mode, whole))
    parted.mkdir()
    for name in ("start", "best", "metrics.jsonl", "before.json", "checkpoints"):
        source = whole / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, parted / name)
    shutil.rmtree(list_checkpoints(parted / "checkpoints")[-1])
    resumed = iterations_of(config_of(mode, parted, resume=True))

    left, right = (load_checkpoint(list_checkpoints(x / "checkpoints")[-1]) for x in (whole, parted))
    assert left.path.name == right.path.name == "iteration-000002"
    assert left.tensors.keys() == right.tensors.keys()
    for key, tensor in left.tensors.items():
        assert torch.equal(tensor, right.tensors[key]), key
    assert left.numbers == right.numbers
    policies = [safetensors.torch.load_file(x.policy / "model.safetensors") for x in (left, right)]
    for key, tensor in policies[0].items():
        assert torch.equal(tensor, policies[1][key]), key
    assert_same_state(*(TrajectoryBuffer.load(x.buffer) for x in (left, right)))
    rows = rows_of(whole)
    assert rows == rows_of(parted) and [row["iteration"] for row in rows] == [0, 1, 2]

    behaviour = {"guess", "repeat", "invalid", "turns", "action_length", "entropy", "kl", "collapsed"}
    assert all(behaviour <= row.keys() for row in rows[1:]), "also where nothing was played"

    # The second iteration did learn, with all that the mode has.
    start, modules = run.learner.reference.state_dict(), {*run.learner.modules(), *run.learner.steps()}
    has_moved = any(not torch.equal(tensor, start[key]) for key, tensor in run.actor.state_dict().items())
    assert has_moved == (mode != "chai")
    assert {key.split(".")[0] for key in left.tensors} - {"optimizer", "generator"} == set(run.learner.modules())
    assert left.numbers["learner"]["steps"].keys() == run.learner.steps().keys()
    wanted = {
        "ppo": {"actor", "value"}, "turn-ppo": {"actor", "value"}, "rloo": {"actor"}, "filtered-bc": {"actor"},
        "archer-token-baseline": {"actor", "critic", "baseline"},
    }  # fmt: skip
    assert modules == wanted.get(mode, {"actor", "critic"})
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for name, (num_steps, _) in left.numbers["learner"]["steps"].items():
        assert num_steps > left_steps(whole, name) > 0 or (mode, name) == ("chai", "actor"), name
    assert resumed.num_games == run.num_games == (8 if mode == "offline-iql" else 16)


def left_steps(folder: Path, name: str) -> int:
    """Steps of an optimizer after the first iteration."""
    steps = load_checkpoint(list_checkpoints(folder / "checkpoints")[0]).numbers["learner"]["steps"]
    return int(steps[name][0])


def test_another_algorithm_does_not_go_on_with_a_checkpoint(tmp_path: Path) -> None:
    iterations_of(config_of("filtered-bc", tmp_path, iterations=1))
    with pytest.raises(CheckpointError, match=r"state\.safetensors: field .*value\."):
        iterations_of(config_of("ppo", tmp_path, resume=True))


def test_groups_have_one_seed_each_and_seeds_count_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[list[Trajectory]] = []
    insert = Learner.insert

    def spy(self: Learner, trajectories: list[Trajectory], meters: Any) -> None:
        played.append(trajectories)
        insert(self, trajectories, meters)

    monkeypatch.setattr(Learner, "insert", spy)
    for mode, size in (("rloo", 4), ("ppo", 1)):
        played.clear()
        iterations_of(config_of(mode, tmp_path / mode, seed=1))
        seeds = [Counter(game.info["seed"] for game in games) for games in played]
        assert [sorted(own.values()) for own in seeds] == [[size] * (8 // size)] * 2
        assert not seeds[0].keys() & seeds[1].keys() and min(seeds[0]) == 1_000_000_000


def test_offline_a_whole_run_goes_through_and_says_what_it_did_not_play(tmp_path: Path) -> None:
    config = config_of("offline-iql", tmp_path, iterations=3, buffer=BufferConfig(max_trajectories=8))
    summary = train(config, RunFolder(config.out), SilentWatcher())
    rows = rows_of(tmp_path)[1:4]
    assert ["return" in row for row in rows] == [True, False, False]
    assert ["probe_return" in row and row["probe_return_se"] > 0 for row in rows] == [False, True, True]
    assert [row["games"] for row in rows] == [8, 8, 8]
    assert all(row["actor_steps"] == 2 and "critic_loss" in row for row in rows)
    assert summary["games"] == 8 and math.isfinite(summary["last_return"])


def test_a_warm_up_keeps_the_actor_where_it_is(tmp_path: Path) -> None:
    critic = CriticConfig(value_target="expectile", **CRITIC | {"warmup_iterations": 1})
    iterations_of(config_of("offline-iql", tmp_path, critic=critic))
    assert ["actor_steps" in row for row in rows_of(tmp_path)] == [False, False, True]
