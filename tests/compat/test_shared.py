"""mode="shared": the critic's epochs beside their plain twin, files, forks, the way in."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from agents import fill, games, make_agent, recorded
from stand_in import installed
from test_patching import their_agent, their_replay, their_trainer

from archer_fast.compat import accelerate
from archer_fast.compat.actor_phase import actor_loss_plain
from archer_fast.compat.algorithms.archer import ArcherTrainer
from archer_fast.compat.critic_phase import critic_loss_plain
from archer_fast.compat.data import ReplayBuffer
from archer_fast.compat.models import ArcherAgent, CHAIAgent
from archer_fast.compat.models.shared_critic import SharedCritic, share_trunk

pytestmark = pytest.mark.usefixtures("one_thread")

OBSERVATIONS = [
    "Questions:\n",
    "Questions:\nIs it a dog? No.\n",
    "Questions:\n",
    "Questions:\nIs it 犬? No.\nIs it? No.\n",
]
ACTIONS = ["Is it a dog?", "Is it a dog?", "", "Is it alive?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def models(folder: Path) -> Path:
    make_agent(folder)
    return folder


def make_trainer(agent: Any, **options: Any) -> ArcherTrainer:
    options = {"grad_accum_steps": 2, "epochs": 2, "actor_epochs": 1, "max_grad_norm": 1.0, "mode": "shared"} | options
    return ArcherTrainer(agent, agent.accelerator, agent.tokenizer, **options)


def make_replay(seed: int = 0) -> ReplayBuffer:
    return fill(ReplayBuffer(4, 100), games(np.random.default_rng(seed), 40))


def test_the_trunk_stays_what_the_policy_was(folder: Path) -> None:
    agent = make_agent(folder)
    share_trunk(agent)
    before = agent.critic(OBSERVATIONS, ACTIONS)
    with torch.no_grad():
        for p in agent.model.parameters():
            p.mul_(0.5)
    after = agent.critic(OBSERVATIONS, ["It flies?", *ACTIONS[1:]])
    for b, a in zip(before, after, strict=True):
        torch.testing.assert_close(b[1:], a[1:], rtol=1e-5, atol=1e-6)
    for b, target in zip(before, agent.target_critic(OBSERVATIONS, ACTIONS), strict=True):
        torch.testing.assert_close(b, target)
    trained = {id(p) for p in agent.critic.parameters()}
    assert not trained & {id(p) for p in agent.critic.features.trunk._copy.parameters()}


def test_epochs_are_those_of_the_plain_twin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was read before the first epoch gives what `critic_loss_plain` gives, micro-batch by micro-batch."""
    agent = make_agent(folder, mode="shared")
    trainer = make_trainer(agent)
    twin = copy.deepcopy(agent.critic), copy.deepcopy(agent.target_critic)
    for part in twin:
        part.features = agent.critic.features
    np.random.seed(0)  # noqa: NPY002, the original's source
    with recorded(monkeypatch) as record:
        info = trainer.update(make_replay(), no_update_actor=True)

    agent.critic, agent.target_critic = twin
    plain = make_trainer(agent)
    rows, actions = [], iter(record.actions)
    draws = [record.draws[i : i + 8] for i in (0, 8)]
    for gradients, drawn in zip(record.gradients, draws, strict=True):
        plain.critic_optimizer.zero_grad()
        for part in (drawn[:4], drawn[4:]):
            columns = {name: [getattr(t, name) for t in part] for name in part[0]._fields}
            columns |= {name: torch.tensor(columns[name]) for name in ("reward", "done")} | {
                "mc_return": torch.zeros(4)
            }
            rows.append(critic_loss_plain(plain, columns, [next(actions) for _ in part]))
        for name, p in agent.critic.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6)
        torch.nn.utils.clip_grad_norm_(agent.critic.parameters(), 1.0)
        plain.critic_optimizer.step()
        agent.soft_update_target_critic(trainer.tau)
    for key, value in info.items():
        assert float(value) == pytest.approx(float(sum(row[key] for row in rows)) / 4, rel=1e-3, abs=1e-4), key


def test_the_heads_learn_a_reward(folder: Path) -> None:
    """gamma 0: Q is the mean reward of an action; before, it explains nothing."""
    agent = make_agent(folder)
    trainer = make_trainer(agent, gamma=0.0, epochs=150, critic_lr=3e-3, grad_accum_steps=8)
    told = games(np.random.default_rng(0), 40)
    told = [t._replace(reward=float("dog" in t.action) - float("big" in t.action)) for t in told]
    replay = fill(ReplayBuffer(8, 100), told)
    variance, losses = float(np.var([t.reward for t in told])), []
    for trainer.epochs in (1, 150, 1):
        losses.append(float(trainer.update(replay, no_update_actor=True)["q1.loss"]))
    assert losses[0] > 0.5 * variance and losses[2] < 0.02 * variance


def test_a_whole_update_moves_the_actor_by_its_own_advantages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent(folder)
    trainer = make_trainer(agent, lm_lr=1e-3)
    start = copy.deepcopy(agent.model)
    before = [p.clone() for p in agent.model.parameters()]
    replay = make_replay()
    with recorded(monkeypatch) as record:
        info = trainer.update(replay)
    assert {"q1.loss", "v2.std", "target_q1.mean", "pg.loss", "advantages.mean"} <= info.keys()
    assert all(np.isfinite(float(value)) for value in info.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, agent.model.parameters(), strict=True))
    moved, agent.model = agent.model, start
    drawn, actions = record.draws[-8:], record.actions[-8:]
    q1, q2, v1, v2 = agent.critic([t.observation for t in drawn], actions)
    advantages = (torch.minimum(q1, q2) - torch.minimum(v1, v2)).flatten().detach()
    for part in (slice(0, 4), slice(4, 8)):
        actor_loss_plain(trainer, [t.observation for t in drawn[part]], actions[part], advantages[part])
    for name, p in start.named_parameters():
        torch.testing.assert_close(record.gradients[-1][name], p.grad, rtol=1e-3, atol=1e-5)
    agent.model = moved
    q1, q2, v1, v2 = agent.critic(OBSERVATIONS[:1], ACTIONS[:1])
    assert torch.equal(agent.get_q(OBSERVATIONS[:1], ACTIONS[:1])[1], q2) and q1.shape == (1, 1)
    torch.testing.assert_close(torch.cat(agent.get_v(OBSERVATIONS[:1])), torch.cat([v1, v2]))


@pytest.mark.parametrize("kind", ["chai", "own get_action", "own critic_loss"])
def test_what_cannot_be_known_ahead_is_asked_in_time(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent(folder, CHAIAgent) if kind == "chai" else make_agent(folder)
    trainer, asked = make_trainer(agent, actor_epochs=0 if kind == "chai" else 1), []
    if kind == "own get_action":
        agent.get_action = lambda observation: asked.append(len(observation)) or ["Is it?"] * len(observation)
    if kind == "own critic_loss":
        own = trainer.critic_loss
        trainer.critic_loss = lambda **batch: asked.append(len(batch["observation"])) or own(**batch)  # type: ignore
    info = trainer.update(make_replay())
    assert np.isfinite(float(info["q1.loss"]))
    assert asked == {"chai": [], "own get_action": [4] * 6, "own critic_loss": [4] * 4}[kind]


def test_clipping_spans_the_heads_alone_and_replayed_actions_are_read_once(folder: Path) -> None:
    """Stale gradients of the policy, which exact mode would count, are huge."""
    agent = make_agent(folder)
    trainer, replay = make_trainer(agent, epochs=1), make_replay()
    for p in agent.model.parameters():
        p.grad = torch.full_like(p, 1e6)
    np.random.seed(0)  # noqa: NPY002, the original's source
    trainer.update(replay, no_update_actor=True)
    norm = torch.stack([p.grad.norm() for p in agent.critic.parameters()]).norm()
    assert 0.1 < float(norm) <= 1.001 and float(next(agent.model.parameters()).grad.abs().max()) == 1e6
    features = agent.critic.features
    drawn = set(features._actions._place)
    assert 0 < len(drawn) <= 8 and drawn <= {(t.observation, t.action) for t in games(np.random.default_rng(0), 40)}
    assert "clip" not in trainer.fixes and trainer.fixes == agent.fixes


def test_a_critic_whose_forward_was_wrapped_is_still_the_original_s(folder: Path) -> None:
    """As Hugging Face's `prepare` does it under mixed precision."""
    agent = make_agent(folder)
    for critic in (agent.critic, agent.target_critic):
        critic._original_forward = own = critic.forward
        critic.forward = lambda *texts, own=own: own(*texts)
    assert accelerate(agent, mode="shared", verbose=False).left == {} and isinstance(agent.critic, SharedCritic)
    accelerate(agent, undo=True, verbose=False)


def test_an_exact_trainer_is_shared_and_all_of_it_given_back(tmp_path: Path, models: Path) -> None:
    with installed(tmp_path):
        everything = importlib.import_module("archer.everything")
        trainer = their_trainer(their_agent(everything, models), everything.ArcherTrainer)
        critic = trainer.agent.critic
        accelerate(trainer, verbose=False)
        assert "forward" in vars(critic)
        assert accelerate(trainer, mode="shared", verbose=False).left == {}
        assert isinstance(trainer.agent.critic, SharedCritic)
        accelerate(trainer, undo=True, verbose=False)
        assert trainer.agent.critic is critic and "forward" not in vars(critic)


def test_a_trainer_of_the_old_critic_is_refused(folder: Path) -> None:
    agent = make_agent(folder)
    trainer = make_trainer(agent, mode="exact")
    accelerate(agent, mode="shared", verbose=False)
    with pytest.raises(ValueError, match=r'critic_optimizer: wanted one of the critic of mode="shared"'):
        trainer.update(make_replay())
    accelerate(agent, undo=True, verbose=False)
    assert np.isfinite(float(trainer.update(make_replay())["q1.loss"]))


def test_edges_of_an_update(folder: Path) -> None:
    """No critic step; a game that ends in silence, through a fork's own loss."""
    agent = make_agent(folder)
    assert "q1.loss" not in make_trainer(agent, epochs=0).update(make_replay())
    trainer = make_trainer(agent)
    own = trainer.critic_loss
    trainer.critic_loss = lambda **batch: own(**batch)  # type: ignore[method-assign]
    told = [t._replace(next_observation="") if t.done else t for t in games(np.random.default_rng(0), 40)]
    assert np.isfinite(float(trainer.update(fill(ReplayBuffer(4, 100), told))["q1.loss"]))


@pytest.mark.parametrize("kind", [ArcherAgent, CHAIAgent])
def test_with_hugging_face_s_accelerator(folder: Path, kind: Any) -> None:
    accelerator = Accelerator(cpu=True)
    make_agent(folder)
    policy = str(folder / "gpt2-0-32-True")
    agent = kind(accelerator.device, accelerator, policy, "no encoder", None, max_new_tokens=4, mode="shared")
    trainer = make_trainer(agent, actor_epochs=0 if kind is CHAIAgent else 1)
    agent.prepare()
    weights = [p.clone() for p in agent.critic.parameters()]
    assert np.isfinite(float(trainer.update(make_replay())["q1.loss"]))
    assert any(not torch.equal(a, b) for a, b in zip(weights, agent.critic.parameters(), strict=True))


def test_hugging_face_s_accelerator_forgets_the_optimizer_of_the_encoder(folder: Path) -> None:
    agent = make_agent(folder)
    agent.accelerator = Accelerator(cpu=True)
    trainer = make_trainer(agent, mode="exact")
    before, kept = trainer.critic_optimizer, agent.accelerator._optimizers
    assert before in kept
    accelerate(trainer, mode="shared", verbose=False)
    assert before not in kept and trainer.critic_optimizer in kept and trainer.lm_optimizer in kept
    accelerate(trainer, undo=True, verbose=False)


def test_files_go_round_and_others_are_refused(folder: Path, tmp_path: Path) -> None:
    agent = make_agent(folder, mode="shared")
    trainer = make_trainer(agent)
    trainer.update(make_replay())
    trainer.save(str(tmp_path / "trainer.pt"))
    wanted = torch.cat(agent.critic(OBSERVATIONS, ACTIONS))

    other = make_trainer(make_agent(folder))
    assert not torch.allclose(torch.cat(other.agent.critic(OBSERVATIONS, ACTIONS)), wanted)
    other.load(str(tmp_path / "trainer.pt"))
    torch.testing.assert_close(torch.cat(other.agent.critic(OBSERVATIONS, ACTIONS)), wanted)

    elsewhere = make_trainer(make_agent(folder, seed=1))
    with pytest.raises(ValueError, match=r"critic_state_dict: its heads were trained on another start policy"):
        elsewhere.load(str(tmp_path / "trainer.pt"))
    with pytest.raises(ValueError, match="state_dict: its heads were trained on another start policy"):
        elsewhere.agent.critic.load_state_dict(agent.critic.state_dict())  # as a fork's own load does it
    exact = make_trainer(make_agent(folder), mode="exact")
    exact.save(str(tmp_path / "exact.pt"))
    with pytest.raises(ValueError, match=r'wanted the heads of mode="shared", got a critic with an encoder of its own'):
        other.load(str(tmp_path / "exact.pt"))
    with pytest.raises(ValueError, match=r'wanted a critic with an encoder \(mode="exact"\), got heads'):
        exact.load(str(tmp_path / "trainer.pt"))


def test_modes_are_named_and_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent = make_agent(folder)
    with pytest.raises(ValueError, match="mode: wanted 'exact' or 'shared', got 'fast'"):
        make_trainer(agent, mode="fast")
    with pytest.raises(ValueError, match="mode: wanted 'exact' or 'shared', got 'fast'"):
        make_agent(folder, mode="fast")
    assert not isinstance(agent.critic, SharedCritic)
    make_trainer(agent, critic_lr=2e-5)
    said = capsys.readouterr().out
    assert "its numbers are not the original's" in said and "critic_lr=2e-05 suits an encoder" in said
    make_trainer(agent, mode=None)
    assert "its numbers" not in capsys.readouterr().out, "the agent is shared already"
    with pytest.raises(ValueError, match="mode: wanted 'shared', which the agent is, got 'exact'"):
        make_trainer(agent, mode="exact")
    biased = make_agent(folder)
    biased.model.lm_head = torch.nn.Linear(32, biased.model.lm_head.out_features)
    with pytest.raises(ValueError, match='mode="shared": model: its lm_head has a bias'):
        make_trainer(biased)
    assert not isinstance(biased.critic, SharedCritic)


def test_a_package_is_shared_and_given_back(tmp_path: Path, models: Path) -> None:
    with installed(tmp_path) as archer:
        everything = importlib.import_module("archer.everything")
        before = dict(vars(everything.ArcherTrainer))
        report = accelerate(archer, mode="shared", verbose=False)
        assert "archer.everything.ArcherTrainer.__init__" in report.patched and report.left == {}
        trainer = their_trainer(their_agent(everything, models), everything.ArcherTrainer, critic_lr=1e-2)
        critic = trainer.agent.critic
        assert isinstance(critic, SharedCritic) and critic is not trainer.agent.target_critic
        assert trainer.critic_optimizer.param_groups[0]["lr"] == 1e-2
        weights = [p.clone() for p in critic.parameters()]
        info = trainer.update(their_replay(everything))
        assert np.isfinite(float(info["v1.loss"])) and report.left == {}
        assert all(not torch.equal(a, b) for a, b in zip(weights, critic.parameters(), strict=True) if b.numel() > 32)
        accelerate(archer, undo=True, verbose=False)
        assert dict(vars(everything.ArcherTrainer)) == before
        assert not isinstance(
            their_trainer(their_agent(everything, models), everything.ArcherTrainer).agent.critic, SharedCritic
        )


def test_one_trainer_is_shared_and_given_back(tmp_path: Path, models: Path) -> None:
    with installed(tmp_path):
        everything = importlib.import_module("archer.everything")
        trainer = their_trainer(their_agent(everything, models), everything.ArcherTrainer)
        before = trainer.agent.critic, trainer.agent.target_critic, trainer.critic_optimizer
        with pytest.raises(ValueError, match="mode: wanted 'exact' or 'shared', got 'faster'"):
            accelerate(trainer, mode="faster", verbose=False)
        report = accelerate(trainer, mode="shared", verbose=False)
        assert report.left == {} and isinstance(trainer.agent.critic, SharedCritic)
        assert np.isfinite(float(trainer.update(their_replay(everything))["q2.loss"]))
        accelerate(trainer, undo=True, verbose=False)
        assert (trainer.agent.critic, trainer.agent.target_critic, trainer.critic_optimizer) == before
        assert np.isfinite(float(trainer.update(their_replay(everything))["q2.loss"]))


def test_a_critic_of_the_user_s_own_is_kept(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with installed(tmp_path) as archer:
        everything = importlib.import_module("archer.everything")

        class OwnCritic(everything.DoubleCritic):  # type: ignore[misc, name-defined]
            def forward(self, observation: Any, action: Any) -> Any:
                return tuple(value + 1 for value in super().forward(observation, action))

        class OwnAgent(everything.ArcherAgent):  # type: ignore[misc, name-defined]
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                self.critic.__class__ = self.target_critic.__class__ = OwnCritic

        everything.OwnAgent = OwnAgent
        agent = their_agent(everything, models, "OwnAgent")
        with pytest.raises(
            ValueError, match=r"wanted the original's DoubleCritic as agent\.critic, .* \(.*OwnCritic\)"
        ):
            make_trainer(agent)
        report = accelerate(archer, mode="shared", verbose=False)
        trainer = their_trainer(their_agent(everything, models, "OwnAgent"), everything.ArcherTrainer)
        assert type(trainer.agent.critic) is OwnCritic
        assert [name.rpartition(".")[2] for name, why in report.left.items() if "OwnCritic" in why] == [
            "critic", "target_critic"
        ]  # fmt: skip
        assert 'OwnAgent.target_critic: mode="shared": wanted' in capsys.readouterr().out
        assert np.isfinite(float(trainer.update(their_replay(everything))["q1.loss"]))
