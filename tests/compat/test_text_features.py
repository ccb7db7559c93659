"""What the shared critic reads of texts: beside one plain pass over each, read once, and whoever asks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from agents import make_agent
from test_shared import ACTIONS, OBSERVATIONS, make_replay, make_trainer
from torch import Tensor

from archer_fast.compat import text_features
from archer_fast.compat.generation import prompts_of
from archer_fast.compat.text_features import TextFeatures

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def plainly(agent: Any, observation: str, action: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden at the observation's end, at the action's, and log p(action), by one pass over both alone."""
    (prompt,) = prompts_of(agent, [observation])
    before, own = (agent.tokenizer(text, return_tensors="pt")["input_ids"].long()[0] for text in (prompt, action))
    out = agent.model(torch.cat([before, own])[None], output_hidden_states=True)
    predicted = out.logits[0, before.numel() - 1 : -1].log_softmax(-1)
    logprob = predicted.gather(1, own[:, None]).sum() if own.numel() else torch.zeros(())
    return out.hidden_states[-1][0, before.numel() - 1], out.hidden_states[-1][0, -1], logprob


@pytest.mark.parametrize("template", [None, "<s>{obs}Now you:"])
@torch.no_grad()
def test_features_are_those_of_each_text_alone(folder: Path, template: str | None) -> None:
    agent = make_agent(folder, TEMPLATE=template)
    features = TextFeatures(agent)
    for _ in range(2):
        state, action = features.pairs(OBSERVATIONS, ACTIONS, keep=True)
        for i, wanted in enumerate(map(plainly, [agent] * 4, OBSERVATIONS, ACTIONS)):
            for got, exact in zip((state.hidden[i], action.hidden[i], action.logprob[i]), wanted, strict=True):
                torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
    assert state.turn.tolist() == [1, 2, 1, 3]
    assert action.repeated.tolist() == [0, 1, 0, 0]
    others = ["Is it a dog?\n", "dog?", "Is it a do"]  # CHAI keeps the ending
    assert features.pairs(OBSERVATIONS[1:2] * 3, others)[1].repeated.tolist() == [1, 0, 0]


def test_a_text_is_read_once_and_room_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent(folder)
    features = TextFeatures(agent)
    features.pairs(OBSERVATIONS, ACTIONS, keep=True)
    read = features.num_tokens
    wanted = features.pairs(OBSERVATIONS[::-1], ACTIONS[::-1], keep=True)
    features.states(OBSERVATIONS)
    assert features.num_tokens == read > 0
    features.pairs(OBSERVATIONS, ACTIONS)
    assert features.num_tokens > read, "actions that are not kept are read again"

    monkeypatch.setattr(text_features, "MAX_BYTES", 3 * 4 * 32)  # three states
    small = TextFeatures(agent)
    for first in (0, 2, 0):
        small.pairs(OBSERVATIONS[first : first + 2], ACTIONS[first : first + 2], keep=True)
        assert len(small._states._place) <= 3 and len(small._actions._place) <= 3
    for got, exact in zip(small.pairs(OBSERVATIONS[::-1], ACTIONS[::-1], keep=True), wanted, strict=True):
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_remembered_does_not_depend_on_who_asked(folder: Path) -> None:
    """Under autocast and in inference mode, where tensors are made that nobody may write to later."""
    agent = make_agent(folder)
    features, wanted = TextFeatures(agent), TextFeatures(agent).states(OBSERVATIONS).hidden
    others = [f"Questions:\n{n}?\n" for n in range(5)]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        features.pairs(OBSERVATIONS[:1], ACTIONS[:1], keep=True)
        features.states(others[:4])
        features.states(others[4:])  # there is room for more now
    torch.testing.assert_close(features.states(OBSERVATIONS).hidden, wanted, rtol=1e-5, atol=1e-6)
    features.pairs(OBSERVATIONS, ACTIONS, keep=True)


@pytest.fixture
def adapted(folder: Path) -> Iterator[Any]:
    """A policy with LoRA on its attention, which has moved."""
    agent = make_agent(folder)
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    base = copy.deepcopy(agent.model)
    agent.model = peft.get_peft_model(agent.model, config)
    agent.base = [base]
    yield agent


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft 0.21
def test_of_a_lora_policy_the_trunk_is_its_base_uncopied(adapted: Any) -> None:
    trainer = make_trainer(adapted, lm_lr=1e-3)
    features = adapted.critic.features
    assert features.trunk._copy is None
    plain, state = adapted.base[0], features.states(OBSERVATIONS).hidden
    adapted.model, model = plain, adapted.model
    for i, observation in enumerate(OBSERVATIONS):
        torch.testing.assert_close(state[i], plainly(adapted, observation, "Is it?")[0], rtol=1e-4, atol=1e-5)
    adapted.model = model
    assert any(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
    kept = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    features.states(["Questions:\nOnce more?\n"])
    assert not any(p.requires_grad for p in model.parameters()), "as they were"
    for p, requires_grad in kept:
        p.requires_grad_(requires_grad)
    checksum = features.trunk.fingerprint()
    trainer.update(make_replay())
    assert features.trunk.fingerprint() == checksum, "only adapters moved"
    with features.trunk.open() as backbone:
        assert backbone.model is model.get_base_model()
