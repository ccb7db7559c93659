"""A critic read back from a checkpoint: its weights, the trunk it reads, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from archer_fast.backbone import Backbone
from archer_fast.checkpoint import CheckpointError, save_checkpoint
from archer_fast.config import Config, CriticConfig
from archer_fast.critic import TurnCritic
from archer_fast.envs.guess_number import vocabulary
from archer_fast.run_folder import RunFolder
from archer_fast.saved_critic import config_of, find_checkpoint, load_saved_critic
from archer_fast.tiny_model import TinyModel, build_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def write_run(path: Path, trunk: Any = "frozen", without: str | None = None) -> tuple[Config, TurnCritic]:
    """The folder of a run with one checkpoint, of a critic that has learned something."""
    sizes = TinyModel(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, max_positions=64)
    start, actor = (build_tiny_model(vocabulary(4), sizes, seed=seed)[0] for seed in (0, 1))
    config = Config(out=str(path), critic=CriticConfig(trunk=trunk, hidden_size=8))
    critic = TurnCritic(config.critic, actor, start, seed=7)
    with torch.no_grad():
        for i, parameter in enumerate(critic.parameters()):
            parameter.add_(0.1 * i)
    folder = RunFolder(path)
    folder.save_config(config)
    start.save(folder.start)
    tensors = {f"critic.{k}": v for k, v in critic.state_dict().items() if without is None or without not in k}
    write_checkpoint(folder, 3, actor, tensors)
    return config, critic


def write_checkpoint(folder: RunFolder, iteration: int, actor: Backbone, tensors: dict[str, Tensor]) -> None:
    tensors = tensors | {"optimizer.actor.lr": torch.zeros(1)}
    save_checkpoint(folder.checkpoints, iteration, actor.save, lambda to, before: to.mkdir(), tensors, {})


def equal(one: Any, other: Any) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("trunk", ["frozen", "shared", "separate"])
def test_it_is_the_critic_that_was_saved_and_reads_the_trunk_it_read(tmp_path: Path, trunk: Any) -> None:
    config, critic = write_run(tmp_path / "run", trunk)
    checkpoint = find_checkpoint(tmp_path / "run")
    assert checkpoint.name == "iteration-000003"
    assert config_of(checkpoint).critic == config.critic
    saved = load_saved_critic(checkpoint, config)
    assert equal(saved.critic, critic) and equal(saved.critic.trunk, critic.trunk)
    assert equal(saved.policy, critic._actor) and not equal(saved.policy, critic._reference)
    assert (saved.critic.trunk is saved.policy) == (trunk == "shared")
    assert not any(p.requires_grad for p in [*saved.critic.parameters(), *saved.policy.parameters()])


def test_the_last_checkpoint_or_the_one_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, critic = write_run(tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    write_checkpoint(folder, 12, critic._actor, {})
    first, last = sorted(folder.checkpoints.iterdir())
    assert find_checkpoint(folder.path) == last and find_checkpoint(first) == first
    monkeypatch.chdir(first)
    assert find_checkpoint(".").absolute() == first


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wanted the folder of a run, but .*nowhere' does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is none: it has no config.json of a run"):
        find_checkpoint(tmp_path)
    RunFolder(tmp_path / "run").save_config(Config())
    with pytest.raises(ValueError, match=r"wanted the folder of a run with a checkpoint, but .*run' has none yet"):
        find_checkpoint(tmp_path / "run")


def test_a_run_without_a_turn_critic_is_refused(tmp_path: Path) -> None:
    config, _ = write_run(tmp_path / "run", without="heads.q.")
    with pytest.raises(
        ValueError, match=r"wanted a run with a turn critic, got .*, whose algorithm \(archer\) keeps none"
    ):
        load_saved_critic(find_checkpoint(tmp_path / "run"), config)


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    config, _ = write_run(tmp_path / "a", without="target_heads.q.weights.0")
    where = r"state.safetensors: field 'critic.target_heads.q.weights.0': wanted shape \[2, \d+, 8\], got None"
    with pytest.raises(CheckpointError, match=where):
        load_saved_critic(find_checkpoint(tmp_path / "a"), config)
    config, _ = write_run(tmp_path / "b", "separate")
    config.critic.trunk = "frozen"
    with pytest.raises(CheckpointError, match=r"field 'critic.own_trunk.*': wanted shape None, got \[.*another archer"):
        load_saved_critic(find_checkpoint(tmp_path / "b"), config)
    file = find_checkpoint(tmp_path / "b") / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="its content is not what was written"):
        load_saved_critic(file.parent, config)
