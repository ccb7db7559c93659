"""The benchmark's rival against the oracle: where nothing is padded, it is the original's update."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from oracle import Epoch, Oracle, Transition
from tiny_models import make_gpt2, make_roberta
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks" / "compat"
WIDTH = 32
# As long in either tokenizer, so that no row of a micro-batch is padded; GPT-2 takes positions through padding.
OBSERVATIONS = tuple(f"Questions:\nIs it a {thing}? {answer}.\n" for thing in "degijklm" for answer in ("Yes", "No"))
ACTIONS = tuple(f"Is it a {thing}?" for thing in "degijklm")
KEYWORDS = {"critic_lr": 1e-3, "lm_lr": 1e-3, "grad_accum_steps": 3, "epochs": 2, "actor_epochs": 2} | {
    "gamma": 0.9,
    "tau": 0.1,
    "max_grad_norm": 0.5,
}
BATCH = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "policy_lm": make_gpt2(folder / "gpt2", seed=1, width=WIDTH, initializer_range=0.3, newline_boost=4.0),
        "critic_lm": make_roberta(folder / "roberta", seed=2, width=WIDTH, initializer_range=0.2),
    }


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/compat/original.py"""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("original")


@pytest.fixture
def make(original: Any, folders: dict[str, Path]) -> Any:
    """make(seed) -> agent, trainer, buffer, all of whose observations and actions have one length each."""

    def made(
        seed: int, accelerator: Any = None, dtype: torch.dtype = torch.float32, observations: Any = OBSERVATIONS
    ) -> tuple[Any, Any, Any]:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002, what the original draws with
        accelerator = accelerator or original.PlainAccelerator()
        agent = original.PlainAgent("cpu", accelerator, **folders, in_dim=WIDTH, max_new_tokens=6).to(dtype)
        agent.prepare()
        trainer = original.PlainTrainer(agent, accelerator, agent.tokenizer, **KEYWORDS)
        buffer = original.PlainBuffer(batch_size=BATCH, capacity=16)
        for i in range(20):  # more than it holds
            buffer.insert(
                observation=observations[i % len(observations)],
                action=ACTIONS[(3 * i) % len(ACTIONS)],
                reward=-1.0 if i % 3 else 0.5,
                next_observation=observations[(i + 1) % len(observations)],
                done=i % 4 == 0,
                mc_return=0.0,
                trajectory_reward=-3.0,
            )
        return agent, trainer, buffer

    return made


@pytest.fixture
def real_accelerator() -> Any:
    return accelerate.Accelerator(cpu=True)


class Recorder:
    """What the plain update drew and did: transitions, sampled actions, losses, gradients before they are clipped."""

    def __init__(self, agent: Any, trainer: Any, buffer: Any) -> None:
        self.draws: list[Transition] = []
        self.actions: list[str] = []
        self.metrics: list[dict[str, Any]] = []
        self.gradients: list[dict[str, Tensor]] = []
        sample, get_action, clip = buffer.sample, agent.get_action, trainer.accelerator.clip_grad_norm_
        critic_loss, actor_loss = trainer.critic_loss, trainer.actor_loss

        def record_sample(size: int) -> Any:
            drawn = sample(size)
            self.draws.append(Transition(*(drawn[name][0] for name in Transition._fields)))
            return drawn

        def record_action(observation: Any) -> list[str]:
            self.actions += get_action(observation)
            return self.actions[-len(observation) :]

        def record_clip(parameters: Any, max_norm: float) -> Tensor:
            kept = {name: w.grad.clone() for name, w in agent.named_parameters() if w.grad is not None}
            self.gradients.append(kept)
            return clip(parameters, max_norm)

        def record_loss(loss: Any) -> Any:
            def recorded(**batch: Any) -> dict[str, Any]:
                self.metrics.append(loss(**batch))
                return self.metrics[-1]

            return recorded

        buffer.sample, agent.get_action = record_sample, record_action
        trainer.accelerator.clip_grad_norm_ = record_clip
        trainer.critic_loss, trainer.actor_loss = record_loss(critic_loss), record_loss(actor_loss)

    def clear(self) -> None:
        for recorded in (self.draws, self.actions, self.metrics, self.gradients):
            recorded.clear()


def oracle_of(agent: Any) -> Oracle:
    return Oracle(agent.model, agent.tokenizer, agent.critic, agent.target_critic, batch_size=BATCH, **KEYWORDS)


def assert_near(got: Tensor, wanted: Tensor, tolerance: float, what: str, also: float = 1e-12) -> None:
    """Relative to the tensor's own size, not to each number: what is near 0 by cancelling is not known better."""
    error = (got.detach().double() - wanted.detach()).norm().item()
    assert error <= tolerance * wanted.norm().item() + also, f"{what}: error {error:.2e} of {wanted.norm():.2e}"


def without_key_bias(name: str, weight: Tensor) -> Tensor:
    """A softmax does not see its keys' bias: the gradient is rounding alone, and Adam makes whole steps of it."""
    if name.endswith("c_attn.bias"):  # queries, keys, values
        return torch.cat([weight[:WIDTH], weight[2 * WIDTH :]])
    return weight[:0] if name.endswith("self.key.bias") else weight


def assert_same_epochs(recorder: Recorder, epochs: list[Epoch], tolerance: float) -> None:
    metrics = [one for epoch in epochs for one in epoch.metrics]
    assert len(metrics) == len(recorder.metrics) > 0
    for got, wanted in zip(recorder.metrics, metrics, strict=True):
        assert {name: float(value) for name, value in got.items()} == pytest.approx(
            wanted, rel=tolerance, abs=tolerance
        )
    assert len(epochs) == len(recorder.gradients)
    for number, (epoch, found) in enumerate(zip(epochs, recorder.gradients, strict=True)):
        prefix = {"critic": "critic.", "actor": "model."}[epoch.phase]
        own = {name.removeprefix(prefix): grad for name, grad in found.items() if name.startswith(prefix)}
        assert own.keys() == epoch.gradients.keys()
        size = math.sqrt(sum(grad.norm().item() ** 2 for grad in epoch.gradients.values()))
        for name, wanted in epoch.gradients.items():
            error = (own[name].double() - wanted).norm().item()
            # The floor is for the bias of keys, whose gradient is 0 but for rounding.
            allowed = max(wanted.norm().item(), 1e-3 * size)
            assert error <= tolerance * allowed, f"epoch {number}, {name}: {error:.2e} of {allowed:.2e}"
        norm = math.sqrt(sum(grad.double().norm().item() ** 2 for grad in found.values()))
        assert norm == pytest.approx(epoch.norm, rel=tolerance)  # stale ones too


def networks(agent: Any, oracle: Oracle) -> list[tuple[str, nn.Module, nn.Module]]:
    return [(name, getattr(agent, name), getattr(oracle, name)) for name in ("model", "critic", "target_critic")]


def test_nothing_is_padded_here(make: Any) -> None:
    agent, _, _ = make(0)
    for tokenizer in (agent.tokenizer, agent.critic.base_tokenizer):
        assert len({len(ids) for ids in tokenizer(list(OBSERVATIONS))["input_ids"]}) == 1
        assert len({len(ids) for ids in tokenizer(list(ACTIONS))["input_ids"]}) == 1


@pytest.mark.parametrize("seed", range(2))
def test_in_float64_all_is_equal(make: Any, seed: int) -> None:
    """Three updates: every loss, summed gradient, norm, mean and weight, the first without the actor."""
    agent, trainer, buffer = make(seed, dtype=torch.float64)
    oracle, recorder = oracle_of(agent), Recorder(agent, trainer, buffer)
    for step in range(3):
        recorder.clear()
        means = trainer.update(buffer, no_update_actor=step == 0)
        wanted = oracle.update(recorder.draws, recorder.actions, no_update_actor=step == 0)
        assert_same_epochs(recorder, oracle.history, 1e-9)
        assert {name: float(mean) for name, mean in means.items()} == pytest.approx(wanted, rel=1e-9, abs=1e-11)
        for network, got, exact in networks(agent, oracle):
            for (name, weight), truth in zip(got.named_parameters(), exact.parameters(), strict=True):
                # A key's bias has gradient 0 in theory: Adam moves it by what rounding leaves.
                assert_near(weight, truth, 1e-9, f"{network}.{name}", also=1e-10)
    assert len(set(recorder.actions)) > len(recorder.actions) / 4


@pytest.mark.parametrize("with_accelerate", [False, True])
def test_in_float32_losses_gradients_and_weights_are_equal(
    make: Any, with_accelerate: bool, request: pytest.FixtureRequest
) -> None:
    """Two updates in a row. A weight may be off by a hundredth of a step more: where a gradient is as small as
    Adam's epsilon, its rounding is a part of the step. (What float64 finds equal to 1e-9 is compared above.)"""
    accelerator = request.getfixturevalue("real_accelerator") if with_accelerate else None
    agent, trainer, buffer = make(7, accelerator)
    oracle, recorder = oracle_of(agent), Recorder(agent, trainer, buffer)
    for _ in range(2):
        recorder.clear()
        trainer.update(buffer)
        oracle.update(recorder.draws, recorder.actions)
        assert_same_epochs(recorder, oracle.history, 1e-5)
        for network, got, exact in networks(agent, oracle):
            for (name, weight), truth in zip(got.named_parameters(), exact.parameters(), strict=True):
                got_values, exact_values = (without_key_bias(name, w) for w in (weight, truth))
                assert_near(got_values, exact_values, 1e-5, f"{network}.{name}", also=0.01 * KEYWORDS["critic_lr"])


def test_it_counts_its_work(make: Any) -> None:
    """Of 2 x 3 micro-batches of the critic and 2 x 3 of the actor, 4 rows each; 6 new tokens a row."""
    agent, trainer, buffer = make(0)
    recorder = Recorder(agent, trainer, buffer)
    trainer.update(buffer)
    work = agent.work
    assert work.generate_calls == 12
    assert work.policy_passes == 12 * 6 + 6  # and log pi
    assert work.encoder_passes == 6 * 6 + 6 * 2  # s, a, s, a', s', a; the actor's phase reads s, a'
    assert work.encoder_sequences == BATCH * work.encoder_passes

    def padded(tokenizer: Any, actions: list[str]) -> int:
        return sum(
            BATCH * max(map(len, tokenizer(actions[i : i + BATCH])["input_ids"])) for i in range(0, len(actions), BATCH)
        )

    read, reader = agent.tokenizer, agent.critic.base_tokenizer
    observation, action = (len(read(texts[0])["input_ids"]) for texts in (OBSERVATIONS, ACTIONS))
    # The last token that is written is not read by `generate`; both specials of the critic's are.
    generated, scored = 12 * BATCH * (observation + 5), 6 * BATCH * observation + padded(read, recorder.actions[24:])
    assert work.policy_tokens == generated + scored
    encoded = 24 * (3 * (observation + 2) + 2 * (action + 2)) + 24 * (observation + 2)
    assert work.encoder_tokens == encoded + padded(reader, recorder.actions)
    sampled = sum(len(reader(text)["input_ids"]) for text in recorder.actions)
    assert work.encoder_padding == padded(reader, recorder.actions) - sampled > 0
    assert work.tokens == work.policy_tokens + work.encoder_tokens
    work.clear()
    assert work == type(work)()


def test_right_padding_changes_the_originals_log_prob_but_not_that_of_the_longest(make: Any) -> None:
    """Fault 1 of the original, which the rival keeps: a shorter row is not scored as it would be alone."""
    agent, _, _ = make(0, dtype=torch.float64)
    oracle = oracle_of(agent)
    observations, actions = ["Questions:\n", OBSERVATIONS[0]], ["Is it a lamp?", "No."]
    short, longest = agent.get_log_prob(observations, actions)
    alone = agent.get_log_prob(observations[:1], actions[:1])
    assert alone.item() == pytest.approx(oracle.log_prob(observations[0], actions[0]).item(), rel=1e-9)
    assert longest.item() == pytest.approx(oracle.log_prob(observations[1], actions[1]).item(), rel=1e-9)
    assert abs(short.item() - alone.item()) > 0.01


def test_right_padding_changes_nothing_for_the_critic(make: Any) -> None:
    agent, _, _ = make(0, dtype=torch.float64)
    oracle = oracle_of(agent)
    observations, actions = ["", OBSERVATIONS[0] * 60, "物体"], ["Is it a lamp?", "", "No."]
    batched = torch.cat(agent.critic(observations, actions), dim=1)
    for row, pair in zip(batched, zip(observations, actions, strict=True), strict=True):
        torch.testing.assert_close(row, torch.stack(oracle.critic_values(*pair)), rtol=1e-9, atol=1e-12)


def test_generate_writes_to_the_end_and_the_text_is_cut(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to three newlines go from the front, one by one; what is behind the next is dropped, end of text too."""
    agent, _, _ = make(0)
    written = ["\n\nIs it?\nYes", "\n\n\n\nIs it?", "a<|endoftext|>b", "Is it a\n"]
    read = agent.tokenizer([OBSERVATIONS[0]] * 4, return_tensors="pt")["input_ids"]
    new = agent.tokenizer(written, return_tensors="pt", padding=True)["input_ids"]
    given: dict[str, Any] = {}

    def generate(**kwargs: Any) -> Tensor:
        given.update(kwargs)
        return torch.cat([read, new], dim=1)

    monkeypatch.setattr(agent.model, "generate", generate)
    assert agent.get_action([OBSERVATIONS[0]] * 4) == ["Is it?", "", "ab", "Is it a"]
    settings = {name: value for name, value in given.items() if name not in ("input_ids", "attention_mask")}
    pad = agent.tokenizer.eos_token_id
    assert settings == {"max_new_tokens": 6, "do_sample": True, "temperature": 1.0, "pad_token_id": pad}
    agent.eos_str = None
    assert agent.get_action([OBSERVATIONS[0]] * 4)[1] == "\nIs it?"


def test_sampling_is_among_the_50_likeliest(make: Any) -> None:
    """transformers' hidden default, and nothing else: shares are those of the 50 best scores, renormalised."""
    agent, _, _ = make(0)
    read = agent.tokenizer([OBSERVATIONS[0]], return_tensors="pt")
    with torch.no_grad():
        logits = agent.model(**read).logits[0, -1]
    best = logits.topk(50)
    torch.manual_seed(0)
    with torch.no_grad():
        written = agent.model.generate(
            **{name: tensor.expand(8_000, -1) for name, tensor in read.items()},
            max_new_tokens=1,
            do_sample=True,
            temperature=1.0,
            pad_token_id=agent.tokenizer.eos_token_id,
        )[:, -1]
    counts = torch.bincount(written, minlength=len(logits))
    assert counts[best.indices].sum() == 8_000
    expected = best.values.softmax(0) * 8_000
    kept = expected > 5
    chi_square = ((counts[best.indices][kept] - expected[kept]) ** 2 / expected[kept]).sum().item()
    assert chi_square < 2 * kept.sum().item() + 20


def test_the_buffer_draws_as_the_original_does(original: Any) -> None:
    """Capacity 4, six inserted: size goes on counting, so that places 0 and 1 are drawn twice as often (fault 5)."""
    buffer = original.PlainBuffer(batch_size=3, capacity=4)
    for i in range(6):
        buffer.insert(
            observation=str(i), action="a", reward=0.7, next_observation="n", done=True, mc_return=i, agent="ignored"
        )
    assert len(buffer) == 6 and list(buffer.columns["observation"]) == ["4", "5", "2", "3"]
    np.random.seed(0)  # noqa: NPY002
    places = np.random.randint(0, 6, size=(3,)) % 4  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    drawn = buffer.sample()
    assert list(drawn["observation"]) == [["4", "5", "2", "3"][place] for place in places]
    assert drawn["reward"].tolist() == [0.7] * 3 and drawn["done"].dtype == np.bool_


def test_the_standin_is_the_real_accelerator(make: Any, real_accelerator: Any) -> None:
    """The same seeds, the same draws, actions and weights after an update, to the bit."""
    ends = []
    for accelerator in (None, real_accelerator):
        agent, trainer, buffer = make(3, accelerator)
        recorder = Recorder(agent, trainer, buffer)
        trainer.update(buffer)
        ends.append((recorder, list(agent.parameters())))
    (ours, our_weights), (theirs, their_weights) = ends
    assert ours.draws == theirs.draws and ours.actions == theirs.actions
    for one, other in zip(our_weights, their_weights, strict=True):
        assert torch.equal(one, other)
