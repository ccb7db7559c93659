"""The drop-in's critic and agents as modules: values, names of weights, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from agents import Accelerator, make_agent
from oracle import Oracle

from archer_fast.compat.models import ArcherAgent
from archer_fast.compat.models.critic import DoubleCritic


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_agent(folder)
    return folder


def test_the_critic_is_the_formulas_and_equal_texts_are_encoded_once(folder: Path) -> None:
    agent = make_agent(folder)
    oracle = Oracle(agent.model, agent.tokenizer, agent.critic, agent.target_critic)
    observations = [
        "Questions:\n",
        "Questions:\nIs it a dog? No.\n" * 90,
        "Questions:\n",
        "Questions:\nIs it 犬? No.\n",
    ]
    actions = ["Is it big?", "", "Is it big?", "Is it big?"]
    sizes: list[int] = []
    agent.critic.base_lm.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    got = agent.critic(observations, actions)
    assert sum(sizes) == 3 + 2
    for i, pair in enumerate(zip(observations, actions, strict=True)):
        for ours, theirs in zip(got, oracle.critic_values(*pair), strict=True):
            assert ours.shape == (4, 1)
            assert ours[i].item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-5)
    q, v = agent.get_q(observations, actions), agent.get_v(observations)
    assert all(torch.equal(a, b) for a, b in zip(q, got[:2], strict=True))
    for a, b in zip(v, got[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    detached = agent.critic(observations, actions, detach_model=True)
    detached[0].sum().backward()
    assert all(p.grad is None for p in agent.critic.base_lm.parameters()) and agent.critic.critic1[0].weight.grad.any()


def test_weights_have_the_originals_names(folder: Path) -> None:
    names = {name.split(".")[0] for name in make_agent(folder).critic.state_dict()}
    assert names == {"base_lm", "critic1", "critic2", "v_critic1", "v_critic2"}
    heads = {name for name in make_agent(folder).critic.state_dict() if name.startswith("critic1")}
    assert heads == {f"critic1.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}


def test_the_target_moves_by_tau(folder: Path) -> None:
    agent = make_agent(folder)
    for target, online in zip(agent.target_critic.parameters(), agent.critic.parameters(), strict=True):
        assert torch.equal(target, online)
    with torch.no_grad():
        for p in agent.critic.parameters():
            p.add_(1.0)
    before = [p.clone() for p in agent.target_critic.parameters()]
    agent.soft_update_target_critic(tau=0.1)
    for p, old in zip(agent.target_critic.parameters(), before, strict=True):
        torch.testing.assert_close(p, old + 0.1)


def test_a_critic_that_does_not_fit_is_named(folder: Path) -> None:
    roberta, gpt2 = str(folder / "roberta-0-32"), str(folder / "gpt2-0-32-True")
    with pytest.raises(ValueError, match=r"in_dim: wanted 32, the width of critic_lm .*, got 768"):
        DoubleCritic("cpu", Accelerator(), roberta, None, 768, 1)
    with pytest.raises(ValueError, match="critic_lm: wanted an encoder with a pooled output such as roberta-base"):
        DoubleCritic("cpu", Accelerator(), gpt2)


def test_a_tokenizer_without_an_end_is_named(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "policy"
    shutil.copytree(folder / "gpt2-0-32-True", broken)
    for path in broken.glob("*token*.json"):
        settings = json.loads(path.read_text())
        if isinstance(settings, dict):
            for name in ("eos_token", "pad_token", "bos_token", "unk_token"):
                settings.pop(name, None)
            path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="policy_lm: wanted a tokenizer with an eos_token"):
        ArcherAgent("cpu", Accelerator(), str(broken), str(folder / "roberta-0-32"), None)
