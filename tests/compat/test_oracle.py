"""The oracle against numbers made by hand and against torch's own; and the tiny models it is run with."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import Adam, CriticCopy, Oracle, TokenBaseline, Transition, last_token_ids
from tiny_models import make_gpt2, make_roberta
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

pytestmark = pytest.mark.usefixtures("one_thread")

OBSERVATION = "Questions:\nIs it a dog? No.\n"
ACTION = "Is it a crème brûlée?"


class Letters:
    """A tokenizer whose tokens are the letters a to d."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": ["abcd".index(letter) for letter in text]}


class Unigram(nn.Module):
    """A policy that writes letter i with probability softmax(scores)_i, whatever was read; values: a value a token."""

    def __init__(self, scores: list[float], values: list[float] | None = None) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores))
        self.values = None if values is None else nn.Parameter(torch.tensor(values))

    def forward(self, input_ids: Tensor) -> Any:
        outputs = SimpleNamespace(logits=self.scores.expand(*input_ids.shape, len(self.scores)))
        return outputs if self.values is None else (self.values[input_ids].unsqueeze(2), outputs)


class Counted(nn.Module):
    """An encoder: a text is [number of its letters, 1]."""

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(pooler_output=torch.tensor([[input_ids.shape[1], 1.0]], dtype=torch.float64))


def linear(*weights: float) -> nn.Linear:
    layer = nn.Linear(len(weights), 1, bias=False)
    layer.weight.data.copy_(torch.tensor([weights]))
    return layer


def summary(name: str, mean: float, smallest: float, largest: float, std: float) -> dict[str, float]:
    return {f"{name}.mean": mean, f"{name}.min": smallest, f"{name}.max": largest, f"{name}.std": std}


def counting_critic(q1: float = 1.0, q2: float = 2.0, v1: float = 0.5, v2: float = 0.25) -> Any:
    """Q1 = q1 |action|, Q2 = q2 |observation| + |action|, V1 = v1 |observation|, V2 = v2 |observation|."""
    critic = nn.Module()
    critic.base_lm, critic.base_tokenizer = Counted(), Letters()
    critic.critic1, critic.critic2 = linear(0.0, 0.0, q1, 0.0), linear(q2, 0.0, 1.0, 0.0)
    critic.v_critic1, critic.v_critic2 = linear(v1, 0.0), linear(v2, 0.0)
    return critic


def counting_oracle(policy: nn.Module | None = None, target: Any = None, **keywords: Any) -> Oracle:
    keywords = {"batch_size": 2, "grad_accum_steps": 1, "epochs": 1, "actor_epochs": 1, "max_grad_norm": 1e9} | keywords
    return Oracle(
        policy or Unigram([0.0, 0.0, 0.0, 0.0]), Letters(), counting_critic(), target or counting_critic(), **keywords
    )


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gpt2(tmp_path_factory.mktemp("gpt2"), seed=1, initializer_range=0.3, newline_boost=6.0)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_roberta(tmp_path_factory.mktemp("roberta"), seed=2, initializer_range=0.1)


@pytest.fixture(scope="module")
def policy(policy_folder: Path) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    return AutoModelForCausalLM.from_pretrained(policy_folder), AutoTokenizer.from_pretrained(policy_folder)


@pytest.fixture(scope="module")
def critic(encoder_folder: Path) -> Any:
    """As DoubleCritic: the heads are Linear-ReLU-Linear-ReLU-Linear."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = nn.Module()
        made.base_lm = AutoModel.from_pretrained(encoder_folder)
        for name, width in (("critic1", 64), ("critic2", 64), ("v_critic1", 32), ("v_critic2", 32)):
            layers = (nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
            made.add_module(name, nn.Sequential(*layers))
    made.base_tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    return made


@pytest.fixture
def oracle(policy: Any, critic: Any) -> Oracle:
    return Oracle(*policy, critic, critic, batch_size=2, grad_accum_steps=2, epochs=2, actor_epochs=1)


# log pi


@pytest.mark.parametrize("action", ["Yes.", ACTION, "物体 🎉\n", "\n"])
def test_log_prob_is_minus_hugging_faces_loss(oracle: Oracle, policy: Any, action: str) -> None:
    tokenizer = policy[1]
    read, said = (tokenizer(text)["input_ids"] for text in (OBSERVATION, action))
    labels = torch.tensor([[-100] * len(read) + said])
    loss = copy.deepcopy(policy[0]).double()(torch.tensor([read + said]), labels=labels).loss
    assert oracle.log_prob(OBSERVATION, action).item() == pytest.approx(-loss.item() * len(said), rel=1e-6)


def test_log_prob_by_hand() -> None:
    """p = (1/10, 2/10, 3/10, 4/10): log pi("bad") = log(2/10 1/10 4/10)."""
    oracle = counting_oracle(Unigram([math.log(n) for n in (1, 2, 3, 4)]))
    assert oracle.log_prob("c", "bad").item() == pytest.approx(math.log(0.008), rel=1e-6)


def test_the_template_is_the_policys_alone(policy: Any, critic: Any) -> None:
    plain = Oracle(*policy, critic, critic)
    templated = Oracle(*policy, critic, critic, template="Ask!\n{obs}You: ")
    assert templated.log_prob("No.\n", ACTION).item() == plain.log_prob("Ask!\nNo.\nYou: ", ACTION).item()
    assert templated.log_prob("No.\n", ACTION).item() != pytest.approx(plain.log_prob("No.\n", ACTION).item(), rel=0.01)
    assert templated.critic_values("No.\n", ACTION) == plain.critic_values("No.\n", ACTION)


def test_an_action_without_tokens_has_log_prob_0_and_gradients_of_0(oracle: Oracle) -> None:
    log_prob = oracle.log_prob(OBSERVATION, "")
    assert log_prob.item() == 0.0
    log_prob.backward()
    for name, weight in oracle.model.named_parameters():
        assert weight.grad is not None and not weight.grad.any(), name


def test_an_observation_without_tokens_is_refused(oracle: Oracle) -> None:
    with pytest.raises(ValueError, match="observation: wanted a text with tokens"):
        oracle.log_prob("", ACTION)


@pytest.mark.parametrize("text", [OBSERVATION * 60, "x", "", "<s> 物体\n" * 300, "<s>" * 600])
def test_long_texts_lose_their_beginning(policy_folder: Path, encoder_folder: Path, text: str) -> None:
    for folder in (policy_folder, encoder_folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left")
        theirs = tokenizer(text, truncation=True, max_length=512)["input_ids"]
        assert last_token_ids(AutoTokenizer.from_pretrained(folder), text) == theirs
        assert len(theirs) == 512 or len(text) < 2


def test_log_prob_reads_the_last_512_tokens_of_both(oracle: Oracle, policy: Any) -> None:
    model, tokenizer = policy
    observation, action = OBSERVATION * 50, ACTION * 50
    read, said = (tokenizer(text)["input_ids"][-512:] for text in (observation, action))
    logits = copy.deepcopy(model).double()(torch.tensor([read + said])).logits[0, 511:-1]
    expected = logits.log_softmax(1).gather(1, torch.tensor(said)[:, None]).sum().item()
    assert oracle.log_prob(observation, action).item() == pytest.approx(expected, rel=1e-12)


# The critic


def test_critic_values_by_hand() -> None:
    values = counting_oracle().critic_values("abc", "ab")
    assert [value.item() for value in values] == [2.0, 2 * 3.0 + 2.0, 1.5, 0.75]


def test_critic_values_are_those_of_a_batched_double_critic(oracle: Oracle, critic: Any) -> None:
    """The original's forward in float32, both texts padded."""
    observations, actions = [OBSERVATION, "Questions:\n", "物体"], [ACTION, "", "Is it a lamp?"]
    critic.base_tokenizer.truncation_side = "left"
    with torch.no_grad():
        state, said = (
            critic.base_lm(**critic.base_tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
            for texts in (observations, actions)
        )
        both = torch.cat([state, said], 1)
        batched = torch.cat(
            [critic.critic1(both), critic.critic2(both), critic.v_critic1(state), critic.v_critic2(state)], 1
        )
    for row, pair in zip(batched, zip(observations, actions, strict=True), strict=True):
        alone = torch.stack(oracle.critic_values(*pair))
        torch.testing.assert_close(row.double(), alone, rtol=1e-5, atol=1e-6)


def test_critic_loss_by_hand() -> None:
    """Two transitions, gamma .5; the target's heads are those of the critic with q1 = 3, q2 = 0, v1 = 2, v2 = -1.

    |s|, |a|, |s'|, |a'|:  1, 2, 3, 1 with r = -1, not done;  2, 4, 5, 3 with r = .7, done.
    Q1 = |a| = 2, 4         wanted r + .5 (2 |s'|) = -1 + 3 = 2;  .7     errors 0, 3.3
    Q2 = 2|s| + |a| = 4, 8  wanted r + .5 (-|s'|) = -2.5;  .7           errors 6.5, 7.3
    V1 = |s| / 2 = .5, 1    wanted 3 |a'| = 3, 9                        errors -2.5, -8
    V2 = |s| / 4 = .25, .5  wanted |a'| = 1, 3                          errors -.75, -2.5
    """
    oracle = counting_oracle(target=counting_critic(q1=3.0, q2=0.0, v1=2.0, v2=-1.0), gamma=0.5)
    transitions = [Transition("a", "bb", -1.0, "abc", False), Transition("ab", "dddd", 0.7, "abcda", True)]
    metrics = oracle.critic_loss(transitions, ["c", "cab"])
    expected = {"q1.loss": 3.3**2 / 2, "q2.loss": (6.5**2 + 7.3**2) / 2}
    expected |= {"v1.loss": (2.5**2 + 8**2) / 2, "v2.loss": (0.75**2 + 2.5**2) / 2}
    expected |= summary("q1", 3.0, 2.0, 4.0, math.sqrt(2)) | summary("q2", 6.0, 4.0, 8.0, math.sqrt(8))
    expected |= summary("v1", 0.75, 0.5, 1.0, math.sqrt(0.125)) | summary("v2", 0.375, 0.25, 0.5, math.sqrt(0.03125))
    expected |= summary("target_q1", 6.0, 3.0, 9.0, math.sqrt(18)) | summary("target_q2", 2.0, 1.0, 3.0, math.sqrt(2))
    assert metrics == pytest.approx(expected, rel=1e-12)
    # d q1.loss / d weights = mean of 2 error (|s|, 1, |a|, 1)
    gradient = oracle.critic.critic1.weight.grad
    assert gradient.tolist() == [pytest.approx([3.3 * 2, 3.3, 3.3 * 4, 3.3])]
    assert oracle.critic.v_critic1.weight.grad.tolist() == [pytest.approx([-2.5 - 16, -2.5 - 8])]
    assert all(weight.grad is None for weight in oracle.target_critic.parameters())


def test_critic_gradients_add_up(oracle: Oracle) -> None:
    """Of two micro-batches, and of a batch of one, whose standard deviations are nan."""
    parts = [
        [Transition(OBSERVATION, ACTION, -1.0, OBSERVATION + ACTION, False)],
        [Transition("Questions:\n", "", 0.0, "", True), Transition("a", "b", -1.0, "c", False)],
    ]
    sums: dict[str, Tensor] = {}
    for part in parts:
        oracle.critic_optimizer.zero_grad()
        metrics = oracle.critic_loss(part, ["Yes."] * len(part))
        assert math.isnan(metrics["q1.std"]) == (len(part) == 1)
        for name, weight in oracle.critic.named_parameters():
            sums[name] = sums.get(name, 0) + weight.grad
    oracle.critic_optimizer.zero_grad()
    for part in parts:
        oracle.critic_loss(part, ["Yes."] * len(part))
    for name, weight in oracle.critic.named_parameters():
        torch.testing.assert_close(weight.grad, sums[name], rtol=1e-12, atol=1e-15)
    assert weight.grad.abs().sum() > 0


# The actor


def test_advantage_by_hand() -> None:
    """|s| = 3, |a| = 2: min(2, 8) - min(1.5, .75)."""
    assert counting_oracle().advantage("abc", "ab") == 1.25


def test_actor_loss_by_hand() -> None:
    """p = (1, 2, 3, 4)/10, actions "ab" and "d", advantages 2 and -1.

    loss = -(2 log .02 - log .4) / 2; its gradient by score i is -(2 (n_i - 2 p_i) - (m_i - p_i)) / 2, with n and m the
    numbers of letter i in the actions: n = (1, 1, 0, 0), m = (0, 0, 0, 1).
    """
    oracle = counting_oracle(Unigram([math.log(n) for n in (1, 2, 3, 4)]))
    metrics = oracle.actor_loss(["a", "bc"], ["ab", "d"], [2.0, -1.0])
    losses = {"pg.loss": -(2 * math.log(0.02) - math.log(0.4)) / 2, "values.loss": 0.0}
    advantages = summary("advantages", 0.5, -1.0, 2.0, math.sqrt(4.5))
    nothing = summary("values", 0.0, 0.0, 0.0, 0.0) | summary("residual_advantages", 0.0, 0.0, 0.0, 0.0)
    assert metrics == pytest.approx(losses | advantages | nothing, rel=1e-6)
    expected = [-(1.6 + 0.1) / 2, -(1.2 + 0.2) / 2, -(-1.2 + 0.3) / 2, -(-1.6 - 0.6) / 2]
    assert oracle.model.scores.grad.tolist() == pytest.approx(expected, rel=1e-6)


def test_actor_loss_with_a_value_a_token_by_hand() -> None:
    """As above; the value after "a" is .5, after "b" .25, after "c" -1, after "d" 2.

    "a" + "ab" is valued .5, .5 (before each of its tokens), "bc" + "d" -1 and, behind its end, 0: 2 x 2 places.
    residuals 1.5, 1.5; 0, -1 (masked).   values.loss = (1.5^2 + 1.5^2 + 0^2 + 0) / 4
    pg.loss = -(1.5 log .1 + 1.5 log .2 + 0 log .4) / 2, to which the values are constants.
    """
    oracle = counting_oracle(Unigram([math.log(n) for n in (1, 2, 3, 4)], values=[0.5, 0.25, -1.0, 2.0]))
    metrics = oracle.actor_loss(["a", "bc"], ["ab", "d"], [2.0, -1.0])
    expected = {"pg.loss": -1.5 * math.log(0.02) / 2, "values.loss": 4.5 / 4}
    expected |= summary("values", 0.0, -1.0, 0.5, math.sqrt(0.5))
    expected |= summary("advantages", 0.5, -1.0, 2.0, math.sqrt(3))
    expected |= summary("residual_advantages", 0.5, -1.0, 1.5, math.sqrt(4.5 / 3))
    assert metrics == pytest.approx(expected, rel=1e-6)
    assert oracle.model.values.grad.tolist() == pytest.approx([2 * -2 * 1.5 / 4, 0.0, 0.0, 0.0])
    by_score = [-1.5 * (1 - 0.2) / 2, -1.5 * (1 - 0.4) / 2, 1.5 * 0.6 / 2, 1.5 * 0.8 / 2]
    assert oracle.model.scores.grad.tolist() == pytest.approx(by_score, rel=1e-6)


def test_a_log_prob_of_ones_own_is_used() -> None:
    class Own(Oracle):
        def get_log_prob(self, observations: Any, actions: Any) -> TokenBaseline:
            zeros = 0 * self.model.scores[:1].expand(len(actions), 1)
            return TokenBaseline(zeros + 1.0, zeros - 3.0, zeros + 1.0)

    oracle = Own(Unigram([0.0, 0.0, 0.0, 0.0]), Letters(), counting_critic(), counting_critic())
    metrics = oracle.actor_loss(["a"], ["b"], [3.0])
    assert (metrics["pg.loss"], metrics["values.loss"]) == (6.0, 4.0)


# A step


def test_clip_counts_stale_gradients_and_scales_them() -> None:
    oracle = counting_oracle(max_grad_norm=1.0)
    oracle.model.scores.grad = torch.tensor([3.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    oracle.critic.v_critic2.weight.grad = torch.tensor([[0.0, 4.0]], dtype=torch.float64)
    epoch = oracle._clip("critic", oracle.critic, [])
    assert epoch.norm == 5.0
    assert {name: gradient.tolist() for name, gradient in epoch.gradients.items()} == {"v_critic2.weight": [[0.0, 4.0]]}
    assert oracle.model.scores.grad.tolist() == pytest.approx([0.6, 0, 0, 0], rel=1e-6)
    assert oracle.critic.v_critic2.weight.grad.tolist() == [pytest.approx([0, 0.8], rel=1e-6)]
    oracle._clip("critic", oracle.critic, [])  # its norm is 1 / (1 + 2e-7) now: nothing to clip
    assert oracle.model.scores.grad.tolist() == pytest.approx([0.6, 0, 0, 0], rel=1e-6)


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
def test_clip_is_torchs(oracle: Oracle, max_norm: float) -> None:
    oracle.critic_loss([Transition(OBSERVATION, ACTION, -1.0, OBSERVATION, False)], ["Yes."])
    oracle.actor_loss([OBSERVATION], ["Yes."], [1.0])
    theirs = copy.deepcopy([oracle.model, oracle.critic, oracle.target_critic])
    for ours, other in zip((oracle.model, oracle.critic), theirs, strict=False):
        for weight, copied in zip(ours.parameters(), other.parameters(), strict=True):
            copied.grad = None if weight.grad is None else weight.grad.clone()
    held = [weight for network in theirs for weight in network.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(held, max_norm)
    oracle.max_grad_norm = max_norm
    assert oracle._clip("actor", oracle.model, []).norm == pytest.approx(norm.item(), rel=1e-12)
    for ours, other in zip((oracle.model, oracle.critic), theirs, strict=False):
        for weight, copied in zip(ours.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(weight.grad, copied.grad, rtol=1e-12, atol=0)


def test_adam_is_torchs() -> None:
    """Over steps with gradients small and large, of zeros, and none, which stop one clock but not another."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)] for _ in range(2))
    adam, torchs = Adam(ours, lr=0.1), torch.optim.Adam(theirs, lr=0.1)
    for step in range(12):
        gradients: list[Tensor | None] = [
            torch.randn(3, generator=generator, dtype=torch.float64) * 10.0 ** (-step) for _ in ours
        ]
        if step % 3 == 1:
            gradients[0] = None
        if step % 4 == 2:
            gradients[1] = torch.zeros(3, dtype=torch.float64)
        for weight, other, gradient in zip(ours, theirs, gradients, strict=True):
            weight.grad, other.grad = gradient, None if gradient is None else gradient.clone()
        adam.step()
        torchs.step()
        for weight, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-13, atol=0)
    assert adam.t == [8, 12]


def test_soft_update_by_hand() -> None:
    oracle = counting_oracle(target=counting_critic(q1=3.0, v2=-1.0))
    oracle.soft_update_target_critic(0.1)
    assert oracle.target_critic.critic1.weight.tolist() == [pytest.approx([0, 0, 0.9 * 3 + 0.1 * 1, 0])]
    assert oracle.target_critic.v_critic2.weight.tolist() == [pytest.approx([0.9 * -1 + 0.1 * 0.25, 0])]
    assert oracle.critic.critic1.weight.tolist() == [[0, 0, 1, 0]]


def test_the_critic_steps_before_the_target_moves() -> None:
    """Adam's first step is the learning rate, against the gradient's sign: the target takes tau of the new weights."""
    oracle = counting_oracle(critic_lr=0.125, tau=0.5)
    transitions = [Transition("a", "bb", 9.0, "abc", True)]
    oracle.critic_epoch(transitions, ["c"])  # Q1 = 2 is too small
    expected = [0.125, 0.125, 1.125, 0.125]
    assert oracle.critic.critic1.weight.tolist() == [pytest.approx(expected)]
    assert oracle.target_critic.critic1.weight.tolist() == [pytest.approx([0.0625, 0.0625, 1.0625, 0.0625])]


def test_gradients_of_an_epoch_are_sums_and_stay_for_the_others_clip() -> None:
    """Two micro-batches of one; the actor's epoch comes after, so the critic's clipped gradients are in its norm."""
    oracle = counting_oracle(batch_size=1, grad_accum_steps=2, max_grad_norm=1.0, lm_lr=0.0)
    transitions = [Transition("a", "bb", 9.0, "abc", True), Transition("ab", "b", 3.0, "c", True)]
    epoch = oracle.critic_epoch(transitions, ["c", "d"])
    # Q1: errors 2 - 9 and 1 - 3; 2 error (|s|, 1, |a|, 1) each
    assert epoch.gradients["critic1.weight"].tolist() == [[-14 - 8, -14 - 4, -28 - 4, -14 - 4]]
    assert len(epoch.metrics) == 2 and "model.scores" not in epoch.gradients
    actor = oracle.actor_epoch(["a", "ab"], ["b", "cc"])
    assert list(actor.gradients) == ["scores"]
    own = actor.gradients["scores"].norm().item()
    assert actor.norm == pytest.approx(math.hypot(own, 1.0), rel=1e-6)
    assert oracle.critic.critic1.weight.grad is not None
    oracle.critic_epoch(transitions, ["c", "d"])
    assert oracle.model.scores.grad.norm().item() < own / actor.norm * 0.1  # clipped again by the critic's epoch


# An update


def test_update_takes_draws_in_order() -> None:
    """Two epochs of the critic, one of the actor, with two micro-batches of two each."""
    draws = [Transition("abcd"[i % 4] * (i + 1), "ab", float(i), "a", True) for i in range(12)]
    actions = ["abcd"[i % 4] * (i % 3 + 1) for i in range(12)]
    keywords = {"grad_accum_steps": 2, "epochs": 2, "critic_lr": 0.01, "lm_lr": 0.02, "max_grad_norm": 3.0}
    whole, stepped = counting_oracle(**keywords), counting_oracle(**keywords)
    means = whole.update(draws, actions)
    epochs = [stepped.critic_epoch(draws[:4], actions[:4]), stepped.critic_epoch(draws[4:8], actions[4:8])]
    epochs.append(stepped.actor_epoch([draw.observation for draw in draws[8:]], actions[8:]))
    assert [epoch.phase for epoch in whole.history] == ["critic", "critic", "actor"]
    assert [epoch.metrics for epoch in whole.history] == [epoch.metrics for epoch in epochs]
    assert [len(epoch.metrics) for epoch in epochs] == [2, 2, 2]
    for network in ("model", "critic", "target_critic"):
        for one, other in zip(*(getattr(o, network).parameters() for o in (whole, stepped)), strict=True):
            assert torch.equal(one, other)
    # |s| are 1 2 | 3 4 | 5 6 | 7 8 by micro-batch: Q1 = 2 in the first epoch
    assert epochs[0].metrics[0]["q2.max"] == 2 * 2 + 2 and epochs[0].metrics[1]["q2.min"] == 2 * 3 + 2
    assert means["q1.max"] == pytest.approx(sum(m["q1.max"] for epoch in epochs[:2] for m in epoch.metrics) / 4)
    assert means["pg.loss"] == pytest.approx(sum(m["pg.loss"] for m in epochs[2].metrics) / 2)


def test_update_without_the_actor() -> None:
    oracle = counting_oracle(lm_lr=1.0)
    draws = [Transition("a", "bb", 9.0, "abc", True)] * 2
    assert "pg.loss" not in oracle.update(draws, ["a", "b"], no_update_actor=True)
    assert not oracle.model.scores.any() and [epoch.phase for epoch in oracle.history] == ["critic"]
    with pytest.raises(ValueError, match="wanted 2 x 2 of both, got 2 and 2"):
        oracle.update(draws, ["a", "b"])


def test_a_mistral_is_trained_two_at_a_time() -> None:
    oracle = counting_oracle(policy_lm="mistralai/Mistral-7B-v0.1".lower(), batch_size=3, grad_accum_steps=2)
    epoch = oracle.actor_epoch(["a"] * 6, ["b", "c", "d"] * 2)
    assert len(epoch.metrics) == 3


def test_copies_are_float64_and_nobody_elses(oracle: Oracle, policy: Any, critic: Any) -> None:
    before = {name: weight.clone() for name, weight in (*policy[0].named_parameters(), *critic.named_parameters())}
    draws = [Transition(OBSERVATION, ACTION, -1.0, OBSERVATION + ACTION, False)] * 12
    oracle.update(draws, ["Is it a cat?"] * 12)
    for network in (oracle.model, oracle.critic, oracle.target_critic):
        assert {weight.dtype for weight in network.parameters()} == {torch.float64}
    for name, weight in (*policy[0].named_parameters(), *critic.named_parameters()):
        assert torch.equal(weight, before[name]) and weight.grad is None
    names = [name for name, _ in critic.named_parameters()]
    assert [name for name, _ in CriticCopy(critic).named_parameters()] == names


# The tiny models


def test_the_same_folder_for_the_same_arguments(tmp_path: Path, policy_folder: Path, encoder_folder: Path) -> None:
    again = make_gpt2(tmp_path / "a", seed=1, initializer_range=0.3, newline_boost=6.0)
    other = make_gpt2(tmp_path / "b", seed=2, initializer_range=0.3, newline_boost=6.0)
    roberta = make_roberta(tmp_path / "c", seed=2, initializer_range=0.1)
    for made, folder in ((again, policy_folder), (roberta, encoder_folder)):
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            assert (made / name).read_bytes() == (folder / name).read_bytes(), name
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()


def test_every_text_comes_back_from_its_tokens(policy: Any, critic: Any) -> None:
    for tokenizer in (policy[1], critic.base_tokenizer):
        for text in ("", "\n", " Is it?\n", "héllo  物体は 🎉 , no .\n\n", "\x00ÿ"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(policy[1]("\n")["input_ids"]) == 1
    assert policy[1].pad_token is None and policy[1].eos_token == "<|endoftext|>"
    assert critic.base_tokenizer("")["input_ids"] == [0, 2] and critic.base_tokenizer.pad_token_id == 1


@pytest.mark.parametrize("merge_newlines", [False, True])
def test_newlines_are_sampled_and_actions_vary(tmp_path: Path, merge_newlines: bool) -> None:
    folder = make_gpt2(
        tmp_path, initializer_range=0.3, newline_boost=4.0, fragment_boost=-3.0, merge_newlines=merge_newlines
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with_newline = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
    assert ("?\n" in map(tokenizer.decode, with_newline)) == merge_newlines
    read = torch.tensor([tokenizer(OBSERVATION)["input_ids"]] * 64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        written = model.generate(
            read, attention_mask=torch.ones_like(read), max_new_tokens=16, do_sample=True, pad_token_id=0
        )[:, read.shape[1] :]
    share = torch.isin(written, torch.tensor(with_newline)).float().mean()
    assert 0.08 < share < 0.3
    actions = [tokenizer.decode(row).lstrip("\n").split("\n")[0] for row in written]
    assert len(set(actions)) > 48
    assert sum("\ufffd" in action for action in actions) < 8


def test_a_bigger_one_can_be_made(tmp_path: Path) -> None:
    folder = make_gpt2(tmp_path / "gpt2", width=48, layers=3, heads=4, vocab_size=500)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.n_embd, model.config.n_layer, model.config.n_head) == (48, 3, 4)
    assert model.transformer.wpe.weight.shape == (1024, 48) and len(AutoTokenizer.from_pretrained(folder)) <= 500
    encoder = AutoModel.from_pretrained(make_roberta(tmp_path / "roberta", width=48, layers=3, heads=4))
    assert encoder.pooler.dense.weight.shape == (48, 48) and len(encoder.encoder.layer) == 3
