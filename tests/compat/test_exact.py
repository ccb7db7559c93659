"""Exact mode against the formulas: losses, gradients, weights and metrics, update after update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agents import fill, games, make_agent, make_oracle, recorded
from torch import Tensor

from archer_fast.compat.algorithms.archer import ArcherTrainer
from archer_fast.compat.data import ReplayBuffer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def assert_gradients(found: list[dict[str, Tensor]], oracle: Any, rtol: float) -> None:
    """Of every epoch, before clipping: each parameter's, beside the largest of its network."""
    assert len(found) == len(oracle.history)
    for epoch, gradients in zip(oracle.history, found, strict=True):
        scale = max(float(g.abs().max()) for g in epoch.gradients.values())
        assert scale > 0 and epoch.gradients.keys() == gradients.keys()
        for name, wanted in epoch.gradients.items():
            torch.testing.assert_close(
                gradients[name].double(), wanted, rtol=rtol, atol=rtol * scale,
                msg=lambda m, k=f"{epoch.phase} {name}": f"{k}: {m}",
            )  # fmt: skip


def assert_same_functions(agent: Any, oracle: Any, rtol: float) -> None:
    """What both say after training. (A weight whose gradient is 0 in theory, Adam moves wherever rounding points.)"""
    for observation, action in (("Questions:\n", "Is it big?"), ("Questions:\nIs it a dog? No.\n", "Is it alive?")):
        for ours, theirs in ((agent.critic, oracle.critic_values), (agent.target_critic, oracle.target_values)):
            got = torch.cat(ours([observation], [action])).flatten()
            torch.testing.assert_close(
                got.double(), torch.stack(list(theirs(observation, action))), rtol=rtol, atol=rtol
            )
        got = agent.get_log_prob([observation], [action])
        torch.testing.assert_close(got.double(), oracle.log_prob(observation, action)[None], rtol=rtol, atol=rtol)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch of 1": {"batch_size": 1, "grad_accum_steps": 3},
    "all done": {"done": True},
    "none done": {"done": False},
    "long texts": {"long": True},
    "template": {"TEMPLATE": "<s>{obs}</s>"},
    "strong clipping": {"max_grad_norm": 1e-3},
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_an_update_is_that_of_the_formulas(folder: Path, monkeypatch: pytest.MonkeyPatch, case: str, seed: int) -> None:
    options = dict(CASES[case])
    batch_size, done, long = options.pop("batch_size", 4), options.pop("done", None), options.pop("long", False)
    template = {"TEMPLATE": options.pop("TEMPLATE")} if "TEMPLATE" in options else {}
    agent = make_agent(folder, seed=seed, **template)
    trainer = ArcherTrainer(
        agent, agent.accelerator, agent.tokenizer, critic_lr=1e-3, lm_lr=1e-3,
        **{"grad_accum_steps": 2, "epochs": 2, "actor_epochs": 2, "max_grad_norm": 1.0} | options,
    )  # fmt: skip
    oracle = make_oracle(trainer, batch_size)
    np.random.seed(seed)  # noqa: NPY002, the original's source
    replay = fill(ReplayBuffer(batch_size, 100), games(np.random.default_rng(seed), 30, done=done, long=long))
    with recorded(monkeypatch) as record:
        got = trainer.update(replay)
    wanted = oracle.update(record.draws, record.actions)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert float(got[key]) == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), key
    assert_gradients(record.gradients, oracle, 2e-5)
    assert_same_functions(agent, oracle, 1e-4)
