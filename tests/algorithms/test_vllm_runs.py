"""Whole runs whose rollouts are vLLM's (CPU): they train, resume bit by bit, and say what they ran on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_train import Listener, tiny_config
from test_whole_runs import MODES, iterations_of, rows_of

from archer_fast.checkpoint import list_checkpoints, load_checkpoint
from archer_fast.config import (
    ActorConfig,
    Config,
    CriticConfig,
    EvalConfig,
    LoRAConfig,
    ModelConfig,
    RolloutConfig,
    TaskConfig,
    TinyModel,
    VllmConfig,
    WarmStartConfig,
)
from archer_fast.loggers import read_rows
from archer_fast.rollout.best_of import BestOfEngine
from archer_fast.rollout.vllm_sampler import VllmSampler
from archer_fast.run_folder import RunFolder
from archer_fast.train import train

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_thread_and_one_cache")]
ROLLOUT: dict[str, Any] = {"games": 8, "num_slots": 8, "max_new_tokens": 4, "engine": "vllm"}
ROLLOUT |= {"vllm": VllmConfig(kv_cache_gb=0.25)}


def model(**more: Any) -> ModelConfig:
    """That of `tiny_config` with heads of 32, the smallest that vLLM's attention on CPUs knows."""
    sizes = TinyModel(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=48, max_positions=128)
    return ModelConfig(tiny=sizes, device="cpu", **more)


def config_of(out: Path, mode: str = "archer", **changes: Any) -> Config:
    changes = {"rollout": RolloutConfig(**ROLLOUT), "model": model()} | changes
    return tiny_config(out, **MODES[mode] | changes)


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []
    load = VllmSampler.load

    def spy(self: VllmSampler, backbone: Any) -> None:
        before = self._fingerprint
        load(self, backbone)
        if before != self._fingerprint:
            loaded.append(backbone.fingerprint())

    monkeypatch.setattr(VllmSampler, "load", spy)
    listener = Listener()
    config = config_of(tmp_path / "run")
    summary = train(config, RunFolder(config.out), listener)
    assert "rollouts by the engine vllm" in listener.messages
    assert not torch.distributed.is_initialized(), "vLLM has ended with the run"
    rows = read_rows(RunFolder(config.out).metrics)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4, 4]
    for row in rows[1:5]:
        assert abs(row["mismatch_kl"]) < 1e-5, "the trainer scores what vLLM sampled as vLLM did"
        assert row["dropped_games"] == row["skipped_steps"] == 0 and row["processed_tokens"] > row["useful_tokens"]
    assert rows[4]["kl"] > 1e-3 > abs(rows[1]["kl"]), "what plays is the policy as it is now"
    # The start; an iteration has two steps of the actor, whose fresh actions are drawn by the weights before each, and
    # then a rollout or an evaluation; at the end best/ is evaluated, which is none of the last.
    assert len(set(loaded)) == 9 and len(loaded) in (9, 10)
    assert abs(summary["before_kl"]) < 1e-5 < summary["last_kl"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["rollout"]["engine"] == "vllm"


@pytest.mark.parametrize("adapters", [False, True])
def test_two_iterations_are_one_and_a_checkpoint_and_one(tmp_path: Path, adapters: bool) -> None:
    """Whatever vLLM had in its prefix cache, and whatever it had been asked before."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    small: dict[str, Any] = {
        "iterations": 2,
        "checkpoint_every": 1,
        "eval": EvalConfig(every=0, games=4, final_games=4),
    }
    small |= {"model": model(lora=LoRAConfig(rank=4 * adapters))}
    run = iterations_of(config_of(whole, **small))
    run.engines.close()
    parted.mkdir()
    for name in ("start", "best", "metrics.jsonl", "before.json", "checkpoints"):
        source = whole / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, parted / name)
    shutil.rmtree(list_checkpoints(parted / "checkpoints")[-1])
    resumed = iterations_of(config_of(parted, resume=True, **small))
    resumed.engines.close()
    left, right = (load_checkpoint(list_checkpoints(x / "checkpoints")[-1]) for x in (whole, parted))
    assert left.tensors.keys() == right.tensors.keys()
    assert all(torch.equal(left.tensors[k], right.tensors[k]) for k in left.tensors)
    name = "adapter_model.safetensors" if adapters else "model.safetensors"
    ours, theirs = (safetensors.torch.load_file(x.policy / name) for x in (left, right))
    start = safetensors.torch.load_file(list_checkpoints(parted / "checkpoints")[0] / "policy" / name)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert any(not torch.equal(ours[k], start[k]) for k in ours), "the second iteration moved the policy"
    assert rows_of(whole) == rows_of(parted)


def test_a_run_of_the_embedded_engine_goes_on_with_vllm(tmp_path: Path) -> None:
    small: dict[str, Any] = {"checkpoint_every": 1, "eval": EvalConfig(every=0, games=4, final_games=4)}
    embedded = RolloutConfig(**ROLLOUT | {"engine": "embedded"})
    iterations_of(config_of(tmp_path, iterations=1, rollout=embedded, **small))
    train(config_of(tmp_path, iterations=2, resume=True, **small), RunFolder(tmp_path), Listener())
    rows = read_rows(RunFolder(tmp_path).metrics)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 2]
    assert all(abs(row["mismatch_kl"]) < 1e-5 for row in rows[1:3]) and rows[2]["kl"] > 1e-3


def test_a_critic_chooses_among_vllms_actions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step = BestOfEngine.step
    monkeypatch.setattr(BestOfEngine, "step", lambda self: (steps.append(type(self.engine).__name__), step(self))[1])
    small: dict[str, Any] = {"iterations": 1, "eval": EvalConfig(every=0, games=4, final_games=4)}
    config = config_of(tmp_path / "run", "chai", rollout=RolloutConfig(**ROLLOUT, best_of=3), **small)
    summary = train(config, RunFolder(config.out), Listener())
    assert summary["games"] == 8 and set(steps) == {"SamplerEngine"}


def test_it_learns_to_listen(tmp_path: Path) -> None:
    """The run of tests/test_train.py of that name, and its margin, with vLLM's rollouts."""
    sizes = TinyModel(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=96, max_positions=128)
    config = tiny_config(
        tmp_path,
        seed=4,
        iterations=28,
        checkpoint_every=28,
        task=TaskConfig("guess-number", {"high": 4}),
        model=ModelConfig(tiny=sizes, device="cpu"),
        warm_start=WarmStartConfig(games=1500, steps=400, batch_games=16, lr=5e-3),
        rollout=RolloutConfig(**ROLLOUT | {"games": 96, "num_slots": 96}),
        critic=CriticConfig(hidden_size=64, epochs=60, batch_turns=128, warmup_iterations=6),
        actor=ActorConfig(batch_games=32, states_per_game=4, alternatives=4, epochs=6, lr=2e-4, kl_coef=0.05),
        eval=EvalConfig(every=0, final_games=512),
    )
    summary = train(config, RunFolder(config.out), Listener())
    rows = read_rows(RunFolder(config.out).metrics)
    print({name: value for name, value in summary.items() if "return" in name})
    print({name: [round(row[name], 4) for row in rows if name in row] for name in ("return", "seconds_rollout")})
    assert -3.6 < summary["before_return"] < -2.4, "the clone is as deaf as its teacher"
    gain = summary["last_return"] - summary["before_return"]
    error = (summary["last_return_se"] ** 2 + summary["before_return_se"] ** 2) ** 0.5
    assert gain > 0.9 > 4 * error, (gain, error)
    assert all(abs(row["mismatch_kl"]) < 1e-5 for row in rows if "mismatch_kl" in row)
