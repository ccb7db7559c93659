"""Exact mode against the formulas: losses, gradients, weights and metrics, update after update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agents import fill, games, make_agent, make_oracle, recorded
from torch import Tensor

from archer_fast.compat import critic_phase, encoder, packed_texts, policy
from archer_fast.compat.algorithms.archer import ArcherTrainer
from archer_fast.compat.data import ReplayBuffer

pytestmark = pytest.mark.usefixtures("one_thread")


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
    # Steps as small as the original's: where a gradient is of rounding's size, Adam makes a whole step of it.
    trainer = ArcherTrainer(
        agent, agent.accelerator, agent.tokenizer, critic_lr=1e-4, lm_lr=1e-4,
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
    assert_gradients(record.gradients, oracle, 5e-5)  # of the second epoch's too, steps five times the original's
    assert_same_functions(agent, oracle, 1e-4)


def test_twenty_updates_are_those_of_the_formulas(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the step sizes of the original's Twenty Questions, the buffer growing between updates as it does there."""
    agent = make_agent(folder, seed=2)
    trainer = ArcherTrainer(
        agent, agent.accelerator, agent.tokenizer, critic_lr=2e-5, lm_lr=1e-5, grad_accum_steps=2, gamma=0.95,
        epochs=2, actor_epochs=1, max_grad_norm=1.0,
    )  # fmt: skip
    oracle, told = make_oracle(trainer, 4), games(np.random.default_rng(2), 120)
    replay = ReplayBuffer(4, 50)
    np.random.seed(2)  # noqa: NPY002, the original's source
    for i in range(20):
        fill(replay, told[6 * i : 6 * i + 6])
        with recorded(monkeypatch) as record:
            got = trainer.update(replay)
        wanted = oracle.update(record.draws, record.actions)
        for key, value in wanted.items():
            assert float(got[key]) == pytest.approx(value, rel=1e-5, abs=1e-5), (i, key)
        assert_gradients(record.gradients, oracle, 2e-5)
    assert_same_functions(agent, oracle, 1e-5)


@pytest.mark.parametrize("replaced", ["critic", "get_log_prob"])
def test_what_a_fork_replaces_is_asked_and_the_numbers_stay(
    folder: Path, monkeypatch: pytest.MonkeyPatch, replaced: str
) -> None:
    """A critic class of its own goes through the plain twin of the critic's epoch, `get_log_prob` of the actor's."""
    agent = make_agent(folder)
    if replaced == "critic":
        for critic in (agent.critic, agent.target_critic):
            forward = type(critic).forward
            critic.forward = lambda o, a, detach_model=False, c=critic, f=forward: f(c, o, a)
    else:
        own = type(agent).get_log_prob
        monkeypatch.setattr(type(agent), "get_log_prob", lambda self, o, a: own(self, o, a))
    trainer = ArcherTrainer(
        agent, agent.accelerator, agent.tokenizer, grad_accum_steps=2, epochs=2, actor_epochs=2, max_grad_norm=1.0
    )
    oracle = make_oracle(trainer, 4)
    np.random.seed(0)  # noqa: NPY002, the original's source
    replay = fill(ReplayBuffer(4, 100), games(np.random.default_rng(0), 30))
    asked: list[str] = []
    plain = trainer.critic_loss

    def get_action(observation: list[str]) -> list[str]:
        found = [f"Is it {len(asked) + i}?" for i in range(len(observation))]
        asked.extend(found)
        return found

    agent.get_action = get_action
    with recorded(monkeypatch) as record:
        got = trainer.update(replay)
    wanted = oracle.update(record.draws, asked)
    for key, value in wanted.items():
        assert float(got[key]) == pytest.approx(value, rel=1e-4, abs=1e-5), key
    assert_gradients(record.gradients, oracle, 2e-5)
    assert plain.__func__ is ArcherTrainer.critic_loss


@pytest.mark.parametrize("fixed", ["sum", "clip"])
def test_faults_of_the_step_can_be_mended(folder: Path, monkeypatch: pytest.MonkeyPatch, fixed: str) -> None:
    """sum: a step on the mean of micro-batches; clip: over the network that is stepped alone."""
    agent = make_agent(folder)
    trainer = ArcherTrainer(
        agent, agent.accelerator, agent.tokenizer, grad_accum_steps=4, epochs=1, actor_epochs=1,
        max_grad_norm=1e9 if fixed == "sum" else 1e-3, fix={"padding", fixed},
    )  # fmt: skip
    replay = fill(ReplayBuffer(4, 100), games(np.random.default_rng(0), 30))
    with recorded(monkeypatch) as record:
        trainer.update(replay)
    critic, actor = record.gradients
    left = {name: p.grad for name, p in agent.critic.named_parameters() if p.grad is not None}
    if fixed == "sum":
        for name, gradient in critic.items():
            torch.testing.assert_close(left[name], gradient / 4)
    else:
        norms = [torch.stack([g.norm() for g in grads]).norm() for grads in (critic.values(), actor.values())]
        assert all(norm > 1e-2 for norm in norms)
        for network in (agent.critic, agent.model):
            norm = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()
            assert norm.item() == pytest.approx(1e-3, rel=1e-2)


def test_wrong_agents_and_replays_are_named(folder: Path) -> None:
    agent = make_agent(folder)
    trainer = ArcherTrainer(agent, agent.accelerator, agent.tokenizer)
    replay = fill(ReplayBuffer(4, 100), games(np.random.default_rng(0), 3))
    with pytest.raises(ValueError, match="replay_buffer: wanted at least batch_size = 4 transitions, got 3"):
        trainer.update(replay)
    assert trainer.step == 0
    with pytest.raises(
        ValueError, match=r"agent: wanted the attributes of ArcherAgent, Linear lacks accelerator, model, critic"
    ):
        ArcherTrainer(torch.nn.Linear(1, 1), agent.accelerator, agent.tokenizer)
    agent.accelerator.num_processes = 2
    with pytest.raises(ValueError, match="accelerator: wanted one process, got 2"):
        ArcherTrainer(agent, agent.accelerator, agent.tokenizer)


def test_many_small_passes_are_one_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of the encoder, its batches, and passes of the policy, all smaller than an epoch."""
    monkeypatch.setattr(critic_phase, "MAX_CHUNK_TOKENS", 60)
    monkeypatch.setattr(encoder, "MAX_BATCH_TOKENS", {"cpu": 80})
    monkeypatch.setattr(packed_texts, "MAX_PASS_TOKENS", {"cpu": 90})
    agent = make_agent(folder, seed=1)
    trainer = ArcherTrainer(
        agent, agent.accelerator, agent.tokenizer, grad_accum_steps=3, epochs=1, actor_epochs=1, max_grad_norm=1.0
    )
    oracle, chunks = make_oracle(trainer, 4), list[int]()
    split = critic_phase.chunks_of_pairs
    monkeypatch.setattr(critic_phase, "chunks_of_pairs", lambda *a: chunks.append(len(out := split(*a))) or out)
    replay = fill(ReplayBuffer(4, 100), games(np.random.default_rng(1), 30))
    with recorded(monkeypatch) as record:
        got = trainer.update(replay)
    assert chunks[0] > 3 and policy.policy_of(agent).texts.num_passes > 6
    wanted = oracle.update(record.draws, record.actions)
    for key, value in wanted.items():
        assert float(got[key]) == pytest.approx(value, rel=1e-4, abs=1e-5), key
    assert_gradients(record.gradients, oracle, 2e-5)
