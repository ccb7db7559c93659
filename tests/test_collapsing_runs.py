"""Whole runs, small, whose actor is driven into a collapse: they warn, stop, or go back to their best policy."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_train import Listener, assert_same_run, rows_of, run, tiny_config

from archer_fast.best_policy import OPTIMIZER, BestPolicy
from archer_fast.checkpoint import list_checkpoints, load_checkpoint
from archer_fast.config import ActorConfig, CollapseConfig, Config, CriticConfig, EvalConfig
from archer_fast.evaluation import Evaluation
from archer_fast.meters import Meters
from archer_fast.run_state import RunState
from archer_fast.trajectory import Trajectory

pytestmark = pytest.mark.usefixtures("one_thread_and_one_cache")


def config_of(out: Path, action: str, warmup: int = 1, **changes: Any) -> Config:
    """An absurd learning rate: the actor waits one iteration for the critic, so that the third is all invalid."""
    settings: dict[str, Any] = {
        "actor": ActorConfig(
            batch_games=4, epochs=2, states_per_game=2, alternatives=3, kl_coef=0.0, max_kl_step=1e9, lr=0.05
        ),
        "critic": CriticConfig(hidden_size=16, epochs=2, batch_turns=16, warmup_iterations=warmup),
        "eval": EvalConfig(every=1, games=8, final_games=8),
        "collapse": CollapseConfig(action=action, window=1),  # type: ignore[arg-type]
    }
    return tiny_config(out, **settings | changes)


def of_policy(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key]), key


def test_a_run_that_warns_goes_on(tmp_path: Path) -> None:
    listener = Listener()
    summary = run(config_of(tmp_path, "warn", iterations=4), listener)
    rows = rows_of(tmp_path)
    assert [row.get("collapsed") for row in rows] == [None, 0.0, 0.0, 1.0, 1.0, None]
    told = [text for text in listener.messages if text.startswith("collapse ")]
    assert told == summary["collapses"] and len(told) >= 1 and told[0].startswith("collapse in iteration 3: ")
    assert "stopped_by" not in summary and not (tmp_path / "best" / OPTIMIZER).exists()
    assert not list_checkpoints(tmp_path / "checkpoints")[-1].joinpath("best").exists()


def test_a_run_that_stops_is_finished_and_says_why(tmp_path: Path) -> None:
    listener = Listener()
    summary = run(config_of(tmp_path, "stop", iterations=9, checkpoint_every=9), listener)
    assert summary["stopped_by"].startswith("collapse in iteration 3: ") and "invalid" in summary["stopped_by"]
    assert f"stopped by the {summary['stopped_by']}" in listener.messages
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert [row["iteration"] for row in rows_of(tmp_path)] == [0, 1, 2, 3, 3]
    (saved,) = list_checkpoints(tmp_path / "checkpoints")
    assert saved.name == "iteration-000003"
    assert summary["best_return"] > summary["last_return"], "best/ holds what was before the collapse"

    # Going on: nothing more where it is still to stop, the rest where it is to warn.
    again = run(config_of(tmp_path, "stop", iterations=9, checkpoint_every=9, resume=True))
    assert again["stopped_by"] == summary["stopped_by"] and again["games"] == summary["games"] == 24
    rest = run(config_of(tmp_path, "warn", iterations=4, resume=True))
    assert "stopped_by" not in rest and rest["games"] == 32


def state_of_actor(run: RunState) -> dict[str, torch.Tensor]:
    """Its weights, and what its optimizer remembers."""
    moments = run.learner.actor_step.state_tensors()
    return {key: value.clone() for key, value in {**run.actor.state_dict(), **moments}.items()}


def state_of_others(run: RunState) -> dict[str, torch.Tensor]:
    tensors = run.learner.state_tensors()
    return {key: value.clone() for key, value in tensors.items() if not key.startswith("optimizer.actor.")}


def test_a_collapsed_actor_gets_its_best_policy_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step is a careful one, whose policy is the best there is; then they are absurd."""
    runs: list[RunState] = []
    best: list[dict[str, torch.Tensor]] = []
    num_restored = 0
    evaluate, restore, play = RunState.evaluate_if_due, BestPolicy.give_back, RunState.play_games

    def evaluate_and_remember(run: RunState) -> dict[str, float]:
        row = evaluate(run)
        runs.append(run)
        best.append(state_of_actor(run))
        return row

    def check_and_restore(policy: BestPolicy) -> str:
        nonlocal num_restored
        num_restored += 1
        run = runs[-1]
        assert run.best is policy
        others, step, games = state_of_others(run), run.learner.actor_step, len(run.learner.buffer)
        num_steps, collapsed = step.num_steps, state_of_actor(run)
        words = restore(policy)
        assert words == f"the actor is again that of iteration 1 (return {run.best.found[1]:.2f} ± 0.00)"  # type: ignore[index]
        assert_equal(state_of_actor(run), best[0])
        assert not torch.equal(collapsed["model.lm_head.weight"], best[0]["model.lm_head.weight"])
        assert_equal(state_of_others(run), others)
        assert len(run.learner.buffer) == games == 24 and step.num_steps == num_steps == 6
        assert [group["lr"] for group in step.optimizer.param_groups] == [0.05]
        return words

    def play_and_hurry(run: RunState, meters: Meters) -> list[Trajectory]:
        run.learner.actor_step.optimizer.param_groups[0]["lr"] = 1e-4 if run.iteration == 0 else 0.05
        return play(run, meters)

    def keep_the_first(best: BestPolicy, iteration: int, evaluation: Evaluation) -> None:
        if iteration <= 1:
            best.keep(iteration, replace(evaluation, standard_error=0.0))

    monkeypatch.setattr(RunState, "evaluate_if_due", evaluate_and_remember)
    monkeypatch.setattr(BestPolicy, "give_back", check_and_restore)
    monkeypatch.setattr(RunState, "play_games", play_and_hurry)
    monkeypatch.setattr(BestPolicy, "keep_if_better", keep_the_first)
    summary = run(config_of(tmp_path, "restore", warmup=0, iterations=3))
    assert num_restored == summary["restores"] == 1
    assert "restore 1 of 3: the actor is again that of iteration 1" in summary["collapses"][1]
    assert_equal(of_policy(tmp_path / "final"), of_policy(tmp_path / "best"))


@pytest.mark.parametrize("warmup", [0, 1], ids=["restored before the checkpoint", "restored after it"])
def test_a_run_with_restores_goes_on_bit_by_bit(tmp_path: Path, warmup: int) -> None:
    """From the checkpoint of the second iteration, while best/ is what the whole run left there."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run(config_of(whole, "restore", warmup))
    collapsed = [row["iteration"] for row in rows_of(whole) if row.get("collapsed")]
    assert collapsed[0] == 2 + warmup
    shutil.copytree(whole, parted)
    (parted / "summary.json").unlink()
    first, last = list_checkpoints(parted / "checkpoints")
    assert [load_checkpoint(x).number("collapse")["num_restores"] for x in (first, last)] == [
        1 - warmup,
        len(collapsed),
    ]
    shutil.rmtree(last)
    for file in ("model.safetensors", OPTIMIZER):
        (parted / "best" / file).unlink()  # not merely another policy
    run(config_of(parted, "restore", warmup, resume=True))
    assert_same_run(whole, parted)


def test_a_best_policy_without_its_optimizer_is_given_back_with_a_new_one(tmp_path: Path) -> None:
    """As where a run was started to warn, and goes on to restore."""
    run(config_of(tmp_path, "warn", iterations=2))
    shutil.rmtree(tmp_path / "final")
    summary = run(config_of(tmp_path, "restore", iterations=3, resume=True))
    assert summary["collapses"][-1].endswith(", its optimizer anew")
