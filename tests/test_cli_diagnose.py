"""`archer-fast diagnose` on a tiny real run: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from archer_fast import cli
from archer_fast.backbone import load_backbone
from archer_fast.cli_diagnose import _with_interval, _without_nan
from archer_fast.config import RolloutConfig, TaskConfig
from archer_fast.diagnosis import within_state
from archer_fast.envs import registry
from archer_fast.envs.guess_number import TASK
from archer_fast.evaluation import evaluate_policy
from archer_fast.packing import pack_trajectories

TRAIN = [
    *("--task.name", "guess-number", "--task.options", "high=6", "max_turns=4", "--iterations", "2"),
    *("--warm-start.games", "300", "--warm-start.steps", "60", "--warm-start.lr", "1e-2"),
    *("--model.tiny.hidden-size", "16", "--model.tiny.num-heads", "2", "--model.tiny.num-layers", "1"),
    *("--rollout.games", "32", "--rollout.max-new-tokens", "3", "--eval.games", "4", "--eval.final-games", "4"),
    *("--critic.epochs", "30", "--critic.hidden-size", "8", "--critic.warmup-iterations", "1", "--actor.epochs", "1"),
]
SMALL = ["--states", "20", "--actions", "5", "--continuations", "4"]


def run_cli(*argv: str) -> tuple[int, str, str]:
    """main([...]) in this process: exit status, output, errors."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(list(argv))
        except SystemExit as stop:
            code = 0 if stop.code is None else int(stop.code)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run. Nobody writes into it."""
    logger, threads = logging.getLogger("archer_fast"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARCHER_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("COLUMNS", "120")
        torch.set_num_threads(1)
        path = tmp_path_factory.mktemp("runs") / "tiny"
        code, _, err = run_cli("train", *TRAIN, "--out", str(path))
        assert (code, err) == (0, "")
        yield path
    torch.set_num_threads(threads)
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)


def cell(table: str, name: str) -> str:
    row = next(line for line in table.splitlines() if line.startswith(f"│ {name} "))
    return row.strip("│").split("│")[1].strip()


def test_it_prints_the_figures_and_writes_everything(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    code, out, err = run_cli("diagnose", str(run), *SMALL, "--json", str(file))
    assert (code, err) == (0, "")
    told = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    measured = told["measured"]
    assert len(measured) == 20 and {len(state["actions"]) for state in measured} == {5}
    assert {state["turn"] for state in measured} >= {0, 1, 2} and all(
        s["said"][:13] == "Guess 1 to 6." for s in measured
    )

    def array(key: str, **more: Any) -> np.ndarray:
        return np.array([[action[key] for action in state["actions"]] for state in measured], **more)

    q, returns, valid = array("q"), array("returns", dtype=float), array("valid")
    assert returns.shape == (20, 5, 4) and (np.isnan(returns).any(2) == ~valid).all()
    within = within_state(q, returns, valid)
    assert within.num_states > 10 and within.critic_spread > 0 and within.true_spread > 0
    for name, value in within._asdict().items():
        assert told[name] == _without_nan(list(value) if isinstance(value, tuple) else value), name
    assert cell(out, "states, of one game each") == "20"
    shown = _with_interval(within.correlation, within.correlation_interval)
    assert cell(out, "correlation with returns within states") == shown
    assert cell(out, "explained variance of Q, actions taken") == f"{told['explained_variance']:.3f}"
    assert cell(out, "variance of returns that the turn explains") == f"{told['turn_share']:.3f}"
    assert [cell(out, str(row["turn"])) for row in told["calibration"]] == [
        str(row["num_turns"]) for row in told["calibration"]
    ]

    # The games are those of `archer-fast eval`, played by the last checkpoint's policy.
    policy, stop = load_backbone(str(run / "checkpoints" / "iteration-000002" / "policy"))
    games = evaluate_policy(
        policy, stop, TaskConfig(**told["task"]), RolloutConfig(max_new_tokens=3), games=20, seed=0
    ).trajectories
    packed = pack_trajectories(games, told["critic"]["gamma"])
    assert [row["num_turns"] for row in told["calibration"]] == np.bincount(packed.turn).tolist()
    means = [packed.returns[packed.turn == t].astype(float).mean() for t in range(4)]
    assert [row["mean_return"] for row in told["calibration"]] == pytest.approx(means)


def test_a_checkpoint_can_be_named_and_the_seed_decides(run: Path, tmp_path: Path) -> None:
    found = []
    sources = [str(run), str(run / "checkpoints" / "iteration-000002"), str(run)]
    for i, source in enumerate(sources):
        file = tmp_path / f"{i}.json"
        code, out, _ = run_cli("diagnose", source, *SMALL, "--seed", str(i // 2), "--json", str(file))
        assert code == 0 and "iteration-000002, critic trunk frozen" in out
        found.append({k: v for k, v in json.loads(file.read_text()).items() if k not in ("seconds", "checkpoint")})
    assert found[0] == found[1] and found[0]["measured"] != found[2]["measured"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--states", "1"], "states: wanted at least 2, got 1"),
        (["--actions", "1"], "actions: wanted at least 2, got 1"),
        (["--continuations", "0"], "continuations: wanted at least 2, got 0"),
        (["--seed", "-1"], "seed: wanted at least 0, got -1"),
        (
            ["--json", "/no/such/folder/a.json"],
            "json: wanted a file in a folder that is there, got '/no/such/folder/a.json'",
        ),
        (["--json", "/"], "json: wanted a file in a folder that is there, got '/'"),
        (["--load.device", "gpu"], "device: wanted auto, cpu, cuda or cuda:N, got 'gpu'"),
    ],
)
def test_nonsense_gets_one_line(run: Path, argv: list[str], message: str) -> None:
    code, out, err = run_cli("diagnose", str(run), *argv)
    assert (code, out, err) == (2, "", f"archer-fast: error: {message}\n")


def test_what_cannot_be_diagnosed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run_cli("diagnose", str(run / "best"))
    assert code == 2 and "is none: it has no config.json of a run" in err
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    without = {k: v for k, v in vars(TASK.env_factory).items() if k not in ("clone", "__dict__")}
    plain = type("Plain", (), without)
    monkeypatch.setattr(registry, "_BUILTIN", {})
    monkeypatch.setitem(registry._registered, "guess-number", dataclasses.replace(TASK, env_factory=plain))
    code, _, err = run_cli("diagnose", str(copy))
    assert code == 2 and "task 'guess-number': wanted clone() and resample_hidden(), which diagnose needs" in err
    assert "got an env without clone\n" in err
    shutil.rmtree(copy / "checkpoints")
    code, _, err = run_cli("diagnose", str(copy))
    assert code == 2 and "wanted the folder of a run with a checkpoint, but" in err
