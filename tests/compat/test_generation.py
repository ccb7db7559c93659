"""Packed sampling and scoring against one plain call for each text alone, and against the model's own distribution."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agents import games, make_agent
from oracle import Oracle

from archer_fast.compat.generation import action_logprobs_plain, can_pack, sample_texts, sample_texts_plain
from archer_fast.compat.models import ArcherAgent, CHAIAgent
from archer_fast.compat.policy import policy_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def observations(num: int, seed: int = 3) -> list[str]:
    """Of uneven length, many of them the beginning of others, some equal, one over 512 tokens."""
    return [t.observation for t in games(np.random.default_rng(seed), num, long=True)]


def cut(agent: Any, text: str) -> str:
    return text.removeprefix("\n").removeprefix("\n").removeprefix("\n").split(agent.eos_str)[0]


def test_greedy_actions_are_those_of_generate_for_each_text_alone(folder: Path) -> None:
    agent = make_agent(folder, do_sample=False, max_new_tokens=12)
    asked = observations(40)
    got = agent.get_action(asked)
    assert can_pack(agent, "sample") and policy_of(agent).num_sampled_actions == 40
    assert got == [cut(agent, sample_texts_plain(agent, [text])[0]) for text in asked]
    assert got == [cut(agent, text) for text in sample_texts_plain(agent, asked)], "left padding changes nothing"
    assert len(set(got)) > 3


def test_prompts_that_begin_others_are_computed_once(folder: Path) -> None:
    agent = make_agent(folder, max_new_tokens=4, merge=False)
    longest = "Questions:\nIs it a dog? No.\nIs it big? Yes.\nIs it alive? No.\n"
    history = [longest[: longest.index(end) + len(end)] for end in ("ns:\n", "No.\n", "Yes.\n")] + [longest] * 5
    agent.get_action(history)
    policy = policy_of(agent)
    own = len(agent.tokenizer(longest)["input_ids"])
    assert policy.texts.num_passes == 1 and own < policy.texts.num_tokens <= own + 8 * 3


@pytest.mark.parametrize("top_k", [None, 5])
def test_sampled_actions_follow_the_distribution_of_generate(folder: Path, top_k: int | None) -> None:
    """3,000 hoisted draws at one state among others: chi-square against softmax over the model's top_k logits."""
    agent = make_agent(folder, max_new_tokens=1, temperature=1.5, eos_str=None)
    agent.model.generation_config.top_k = top_k
    state, num = "Questions:\nIs it a dog? No.\n", 3000
    torch.manual_seed(0)
    texts = sample_texts(agent, observations(20) + [state] * num)[20:]
    ids = agent.tokenizer(state, return_tensors="pt")["input_ids"]
    logits = agent.model(ids).logits[0, -1].double() / 1.5
    values, tokens = logits.topk(50 if top_k is None else top_k)
    wanted: Counter[str] = Counter()
    for token, p in zip(tokens.tolist(), values.softmax(-1).tolist(), strict=True):
        wanted[agent.tokenizer.batch_decode([[token]], skip_special_tokens=True)[0]] += p  # type: ignore[assignment]
    found = Counter(texts)
    assert found.keys() <= wanted.keys(), "nothing outside the top k"
    large = [text for text, p in wanted.items() if p * num >= 5]
    pairs = [(found[text], wanted[text] * num) for text in large]
    pairs.append((num - sum(n for n, _ in pairs), num - sum(e for _, e in pairs)))
    chi_square = sum((n - e) ** 2 / e for n, e in pairs if e > 1)
    assert chi_square < len(pairs) + 4 * (2 * len(pairs)) ** 0.5, (chi_square, len(pairs))


def test_nothing_is_sampled_behind_the_text_that_ends_an_action(folder: Path) -> None:
    agent, counted = make_agent(folder, max_new_tokens=32), []
    policy, asked = policy_of(agent), observations(60)
    torch.manual_seed(1)
    texts = sample_texts(agent, asked)
    for text in texts:
        rest = text.lstrip("\n") if len(text) - len(text.lstrip("\n")) <= 3 else text
        counted.append(rest.count("\n"))
    assert set(counted) <= {0, 1, 2, 3, 4} and sum(1 for n in counted if n) > 30
    prefill = sum(len(ids) for ids in policy.texts.tokens(asked))
    assert policy.texts.num_tokens < prefill + 0.8 * 60 * 31, "most actions ended early"


def test_logprobs_are_the_sum_over_each_text_alone(folder: Path) -> None:
    agent = make_agent(folder)
    drawn = games(np.random.default_rng(5), 30, long=True)
    asked, said = [t.observation for t in drawn], [t.action for t in drawn]
    assert "" in said and any(not a.isascii() for a in said)
    oracle = Oracle(agent.model, agent.tokenizer, agent.critic, agent.target_critic)
    wanted = torch.stack([oracle.log_prob(o, a) for o, a in zip(asked, said, strict=True)])
    got = agent.get_log_prob(asked, said)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(action_logprobs_plain(agent, asked, said).double(), wanted, rtol=1e-5, atol=1e-5)
    weights = torch.randn(30, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((got * weights).sum(), list(agent.model.parameters()))
    plain = torch.autograd.grad(
        (action_logprobs_plain(agent, asked, said) * weights).sum(), list(agent.model.parameters())
    )
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_a_model_is_left_as_it_was(folder: Path) -> None:
    agent = make_agent(folder)
    agent.model.train()
    before = agent.model.config._attn_implementation, agent.model.config.use_cache
    agent.get_action(observations(4))
    assert (agent.model.config._attn_implementation, agent.model.config.use_cache) == before
    assert all(module.training for module in agent.model.modules())
    with pytest.warns(UserWarning, match="in padded batches .*: model: it is in training mode, with dropout"):
        agent.get_log_prob(["Questions:\n"], ["Is it big?"])
    assert can_pack(agent, "sample") and not can_pack(agent, "score")
    ids = agent.tokenizer(["Questions:\n", "Questions:\nIs it"], return_tensors="pt", padding=True)
    agent.model(**ids)  # its own padded attention still runs


@torch.no_grad()
def test_the_faults_that_are_kept_are_the_originals(folder: Path) -> None:
    """Behind padding a row's log-prob depends on its batch; bug-for-bug has that, the default does not."""
    asked, said = ["Questions:\n", "Questions:\nIs it a dog? No.\n"], ["Is it big?", "Is it alive?"]
    mended, kept = make_agent(folder), make_agent(folder, compat="bug-for-bug")
    assert not can_pack(kept, "score")
    together, alone = kept.get_log_prob(asked, said), kept.get_log_prob(asked[:1], said[:1])
    assert abs(float(together[0] - alone[0])) > 1e-3
    torch.testing.assert_close(together[1:], mended.get_log_prob(asked, said)[1:], rtol=1e-5, atol=1e-5)  # unpadded
    torch.testing.assert_close(alone, mended.get_log_prob(asked, said)[:1], rtol=1e-5, atol=1e-5)
    ended = make_agent(folder, fix={"padding", "stop_token"})
    torch.testing.assert_close(
        ended.get_log_prob(asked, said), mended.get_log_prob(asked, [a + "\n" for a in said]), rtol=1e-5, atol=1e-5
    )


def test_a_setting_that_packed_passes_lack_is_left_to_generate_with_a_warning(folder: Path) -> None:
    agent = make_agent(folder, do_sample=False)
    agent.model.generation_config.repetition_penalty = 1.7
    asked = observations(6)
    with pytest.warns(UserWarning, match="generation_config: repetition_penalty"):
        got = agent.get_action(asked)
    assert got == [cut(agent, sample_texts_plain(agent, [text])[0]) for text in asked]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert agent.get_action(asked) == got, "said once"


def test_chai_plays_the_candidate_that_its_target_critic_likes_best(folder: Path, monkeypatch: Any) -> None:
    agent, asked = make_agent(folder, CHAIAgent), observations(12)
    from archer_fast.compat.models import chai_agent

    seen: list[list[list[str]]] = []
    sample = chai_agent.sample_candidates
    monkeypatch.setattr(chai_agent, "sample_candidates", lambda *a: seen.append(sample(*a)) or seen[-1])
    got = agent.get_action(asked)
    (candidates,) = seen
    assert len(candidates) == 5 and all(action.endswith("\n") for row in candidates for action in row)
    for i, text in enumerate(asked):
        own = [row[i] for row in candidates]
        q = torch.minimum(*agent.target_critic([text] * 5, own)[:2]).flatten().detach()
        assert q[own.index(got[i])] == pytest.approx(q.max().item(), abs=1e-5)


def test_arguments_that_are_wrong_are_named(folder: Path) -> None:
    agent = make_agent(folder)
    with pytest.raises(ValueError, match=r"observation: wanted text of at least one token, got ''"):
        agent.get_action([""])
    with pytest.raises(ValueError, match=r"fix: .*'paddin'; did you mean 'padding'"):
        make_agent(folder, fix=["paddin"])
    with pytest.raises(ValueError, match="compat: wanted None or 'bug-for-bug', got 'exact'"):
        make_agent(folder, compat="exact")
    with pytest.warns(UserWarning, match="ArcherAgent: these keywords are accepted and not used: my_flag"):
        make_agent(folder, ArcherAgent, my_flag=3)


def test_greedy_play_does_not_divide_by_the_temperature(folder: Path) -> None:
    asked = observations(5)
    cold, warm = (make_agent(folder, do_sample=False, temperature=t) for t in (0.0, 1.0))
    assert cold.get_action(asked) == warm.get_action(asked)
