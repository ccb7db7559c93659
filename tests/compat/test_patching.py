"""`accelerate` on a package with the original's names, on a fork of it, on one agent: numbers, reports, undo."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from agents import Accelerator, games, make_agent, make_oracle, recorded
from stand_in import installed

from archer_fast.compat import accelerate
from archer_fast.compat.overrides import is_ours

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = [
    "archer.everything.ArcherAgent.get_action",
    "archer.everything.ArcherAgent.get_log_prob",
    "archer.everything.ArcherAgent.soft_update_target_critic",
    "archer.everything.ArcherTrainer.critic_loss",
    "archer.everything.ArcherTrainer.actor_loss",
    "archer.everything.ArcherTrainer.update",
    "archer.everything.DoubleCritic.forward",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_agent(folder)
    return folder


def their_agent(module: ModuleType, models: Path, name: str = "ArcherAgent", **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"max_new_tokens": 8, "in_dim": 32} | options
    return getattr(module, name)(
        "cpu", Accelerator(), str(models / "gpt2-0-32-True"), str(models / "roberta-0-32"), **options
    )


def their_trainer(agent: Any, cls: Any, **options: Any) -> Any:
    options = {"grad_accum_steps": 2, "epochs": 2, "actor_epochs": 2, "max_grad_norm": 1.0, "lm_lr": 1e-3} | options
    return cls(agent, agent.accelerator, agent.tokenizer, **options)


def their_replay(module: ModuleType, seed: int = 0) -> Any:
    replay = module.ReplayBuffer(4, 100)
    for t in games(np.random.default_rng(seed), 30):
        replay.insert(**t._asdict(), mc_return=0.0)
    return replay


def test_a_whole_package_is_made_fast_and_keeps_its_numbers(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with installed(tmp_path) as archer:
        report = accelerate(archer)
        assert sorted(report.patched) == sorted([*METHODS, "archer.algorithms.offpolicy_train_loop: time.sleep"])
        assert report.left == {}
        assert capsys.readouterr().out.startswith("archer_fast: 8 patched, 0 left\n")
        everything = importlib.import_module("archer.everything")
        for path, name in {
            "archer.models": "ArcherAgent",
            "archer.models.critic": "DoubleCritic",
            "archer.algorithms.archer": "ArcherTrainer",
        }.items():
            assert getattr(importlib.import_module(path), name) is getattr(everything, name), "under its old path"
        begun = time.monotonic()
        assert importlib.import_module("archer.algorithms").offpolicy_train_loop(None) > 0
        assert time.monotonic() - begun < 5

        agent = their_agent(everything, models)
        trainer = their_trainer(agent, everything.ArcherTrainer)
        oracle = make_oracle(trainer, 4)
        np.random.seed(0)  # noqa: NPY002, the original's source
        with recorded(monkeypatch) as record:
            got = trainer.update(their_replay(everything))
        wanted = oracle.update(record.draws, record.actions)
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            assert float(got[key]) == pytest.approx(value, rel=1e-4, abs=1e-5), key
        assert report.left == {} and agent.work.generate_calls == 1, "the one of the comparison"


def test_undo_gives_everything_back(tmp_path: Path, models: Path) -> None:
    with installed(tmp_path) as archer:
        everything = importlib.import_module("archer.everything")
        loop = importlib.import_module("archer.algorithms.offpolicy_train_loop")
        before = {name: dict(vars(getattr(everything, name))) for name in ("ArcherAgent", "ArcherTrainer")}
        accelerate(archer, verbose=False)
        assert vars(everything.ArcherAgent)["get_action"] is not before["ArcherAgent"]["get_action"]
        report = accelerate(archer, undo=True, verbose=False)
        assert report.patched == [] and len(report.left) == 8
        for name, attributes in before.items():
            assert dict(vars(getattr(everything, name))) == attributes
        assert loop.time is time
        agent = their_agent(everything, models)
        agent.get_action(["Questions:\n"])
        assert agent.work.generate_calls == 1


def test_what_a_fork_overrides_is_called_and_told(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed(tmp_path) as archer:
        everything = importlib.import_module("archer.everything")
        lab = importlib.import_module("lab")
        accelerate(archer, verbose=False)
        agent = their_agent(lab, models, "LabAgent", shout=True)
        trainer = their_trainer(agent, everything.ArcherTrainer)
        oracle = make_oracle(trainer, 4)
        np.random.seed(1)  # noqa: NPY002, the original's source
        with recorded(monkeypatch) as record:
            got = trainer.update(their_replay(everything))
        assert record.actions == ["WHAT?"] * (4 * 8)
        assert [len(batch) for batch in agent.asked] == [4] * 8, "as the original calls it, a micro-batch at a time"
        wanted = oracle.update(record.draws, record.actions)
        for key, value in wanted.items():
            assert float(got[key]) == pytest.approx(value, rel=1e-4, abs=1e-5), key

        report = accelerate(agent, verbose=False)
        own = {name.rsplit(".", 1)[1]: why for name, why in report.left.items()}
        assert own == {"get_action": "overridden by LabAgent, which is called"}

        loud = their_trainer(agent, lab.LabTrainer)
        np.random.seed(1)  # noqa: NPY002, the original's source
        loud.update(their_replay(everything), no_update_actor=True)
        assert loud.seen == 2 * 2, "every micro-batch went through the fork's critic_loss"


EDITS = {  # method of the package: its text, edited; what the report says of it
    "ArcherTrainer.critic_loss": ("* self.gamma", "* self.gamma * 0.5", "q1.loss"),
    "ArcherTrainer.actor_loss": ("loss = -torch.mean(log_prob", "loss = 3 * -torch.mean(log_prob", "pg.loss"),
    "ArcherTrainer.update": (
        "metrics = []\n        with",
        "metrics = []\n        self.annealed = True\n        with",
        "does more than the original's: annealed",
    ),
    "ArcherAgent.get_log_prob": ("chosen.log()", "0.5 * chosen.log()", "it says"),
    "ArcherAgent.get_action": ("(self.eos_str)[0]", "(self.eos_str)[0].upper()", "greedily it says"),
    "ArcherAgent.soft_update_target_critic": ("online.data * tau", "online.data * tau * tau", "it says"),
    "DoubleCritic.forward": ("return self.critic1(both),", "return self.critic1(both) + 1,", "it says"),
}


@pytest.mark.parametrize("left", EDITS)
def test_a_method_edited_in_place_is_found_out_and_left(tmp_path: Path, models: Path, left: str) -> None:
    """The fork's own numbers stay: the method is compared before anything rests on it."""
    old, new, why = EDITS[left]
    with installed(tmp_path, {old: new}) as archer:
        everything = importlib.import_module("archer.everything")
        report = accelerate(archer, verbose=False)
        agent = their_agent(everything, models)
        trainer = their_trainer(agent, everything.ArcherTrainer)
        np.random.seed(0)  # noqa: NPY002, the original's source
        weights = [p.detach().clone() for p in agent.parameters()]
        trainer.update(their_replay(everything))
        (name,) = report.left
        assert name == f"archer.everything.{left}" and why in report.left[name]
        cls, method = left.split(".")
        assert not hasattr(vars(getattr(everything, cls))[method], "_archer_fast")
        assert len(report.patched) == 7
        assert any(not torch.equal(p, w) for p, w in zip(agent.parameters(), weights, strict=True))
        if left.endswith("update"):
            assert trainer.annealed


def test_one_trainer_is_made_fast_and_the_class_is_not(tmp_path: Path, models: Path) -> None:
    with installed(tmp_path):
        everything = importlib.import_module("archer.everything")
        agent = their_agent(everything, models)
        trainer = their_trainer(agent, everything.ArcherTrainer)
        before = [(p.detach().clone(), p.grad) for p in agent.parameters()]
        state = torch.random.get_rng_state()
        report = accelerate(trainer, verbose=False)
        assert report.left == {} and len(report.patched) == 8  # two critics
        for p, (weight, gradient) in zip(agent.parameters(), before, strict=True):
            assert torch.equal(p, weight) and p.grad is gradient, "comparing leaves no trace"
        assert torch.equal(torch.random.get_rng_state(), state)
        assert is_ours(trainer, "update") and is_ours(agent, "get_action")
        other = their_agent(everything, models)
        assert not is_ours(other, "get_action")
        calls = agent.work.generate_calls
        trainer.update(their_replay(everything))
        assert agent.work.generate_calls == calls
        accelerate(trainer, undo=True, verbose=False)
        assert not is_ours(trainer, "update") and "get_action" not in vars(agent)


def test_targets_that_are_wrong_are_named_and_nothing_is_exchanged(tmp_path: Path, models: Path) -> None:
    with pytest.raises(TypeError, match="wanted the package archer or a fork of it, 'json' has none of ArcherAgent"):
        accelerate(importlib.import_module("json"))
    with pytest.raises(TypeError, match="wanted a module, an agent or a trainer, got int"):
        accelerate(3)
    with installed(tmp_path) as archer:
        everything = importlib.import_module("archer.everything")
        agent = their_agent(everything, models)
        with pytest.raises(TypeError, match="got the class ArcherAgent"):
            accelerate(archer, everything.ArcherAgent)
        del agent.target_critic
        with pytest.raises(ValueError, match=r"agent: .* ArcherAgent lacks target_critic"):
            accelerate(archer, agent)
        with pytest.raises(ValueError, match="did you mean 'padding'"):
            accelerate(archer, fix=["paddings"])
        assert not is_ours(agent, "get_action"), "nothing half-patched"
        assert sys.modules["archer.algorithms.offpolicy_train_loop"].time is time


def test_a_subclass_without_changes_keeps_the_fast_update(tmp_path: Path, models: Path) -> None:
    """Helpers of `update` are looked for in base classes too."""
    with installed(tmp_path) as archer:
        everything = importlib.import_module("archer.everything")
        report = accelerate(archer, verbose=False)

        class Sub(everything.ArcherTrainer):  # type: ignore[misc, name-defined]
            pass

        their_trainer(their_agent(everything, models), Sub).update(their_replay(everything))
        assert report.left == {}
