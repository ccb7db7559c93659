"""Behaviour cloning against a loss written row by row in float64: values, gradients, weights after training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agents import Accelerator, fill, games, make_agent
from oracle import Transition
from torch import Tensor

from archer_fast.compat.algorithms.archer import ArcherTrainer
from archer_fast.compat.algorithms.bc import plain_bc_loss, train_loop
from archer_fast.compat.algorithms.online_filteredbc import BCTrainer
from archer_fast.compat.data import ReplayBuffer
from archer_fast.compat.policy import PackedPolicy, Unsupported

pytestmark = pytest.mark.usefixtures("one_thread")

UNEVEN = [
    ("Questions:\n", "Is it a dog?"),
    ("Questions:\nIs it something that you can hold in one hand? Yes.\n", "?"),
    ("Questions:\nIs it a cat? No.\n", "Is it made of metal, 犬?"),
    ("Questions:\n", ""),
]
EVEN = [
    (f"Questions:\nIs it a {thing}? No.\n", f"Is it a {other}?") for thing, other in zip("bdik", "amju", strict=True)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def agent(folder: Path) -> Any:
    return make_agent(folder)


def row_loss(model: Any, tokenizer: Any, observation: str, action: str) -> Tensor:
    """-log p(action | observation) of a row by itself."""
    read, said = (tokenizer(text)["input_ids"] for text in (observation, action))
    logprobs = model(input_ids=torch.tensor([read + said])).logits[0].log_softmax(-1)
    return -sum((logprobs[len(read) + t - 1, token] for t, token in enumerate(said)), 0 * logprobs.sum())


def mean_loss(model: Any, tokenizer: Any, rows: list[tuple[str, str]]) -> Tensor:
    return torch.stack([row_loss(model, tokenizer, *row) for row in rows]).mean()


def original_loss(model: Any, tokenizer: Any, rows: list[tuple[str, str]]) -> Tensor:
    """The original's formula: right padding, softmax, then its logarithm."""
    texts = [list(column) for column in zip(*rows, strict=True)]
    read, said = (tokenizer(column, return_tensors="pt", padding=True, padding_side="right") for column in texts)
    ids, mask = (torch.cat([read[key], said[key]], dim=1) for key in ("input_ids", "attention_mask"))
    probs = model(input_ids=ids, attention_mask=mask).logits.softmax(-1)[:, read["input_ids"].shape[1] - 1 : -1]
    chosen = probs.gather(2, said["input_ids"].unsqueeze(2)).squeeze(2)
    return -(chosen.log() * said["attention_mask"]).sum(1).mean()


def our_loss(model: Any, tokenizer: Any, rows: list[tuple[str, str]], **options: Any) -> Tensor:
    observation, action = (list(column) for column in zip(*rows, strict=True))
    return plain_bc_loss(model, tokenizer, observation=observation, action=action, reward=[0.0] * len(rows), **options)


def gradients(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("rows", [UNEVEN, EVEN, UNEVEN[1:2], UNEVEN[3:], EVEN[:1]], ids=range(5))
def test_the_loss_is_that_of_each_row_alone(agent: Any, rows: list[tuple[str, str]]) -> None:
    exact = copy.deepcopy(agent.model).double()
    wanted = mean_loss(exact, agent.tokenizer, rows)
    found = our_loss(agent.model, agent.tokenizer, rows)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    if any(action for _, action in rows):
        slope = gradients(exact, wanted)
        torch.testing.assert_close(
            gradients(agent.model, found).double(), slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max())
        )
    else:
        assert found.item() == 0 and float(gradients(agent.model, found).abs().max()) == 0


def test_it_is_the_original_s_wherever_nothing_is_padded(agent: Any) -> None:
    kept = our_loss(agent.model, agent.tokenizer, UNEVEN, compat="bug-for-bug")
    torch.testing.assert_close(kept, original_loss(agent.model, agent.tokenizer, UNEVEN), rtol=1e-5, atol=0)
    mended = our_loss(agent.model, agent.tokenizer, UNEVEN)
    assert abs((kept - mended).item()) > 2e-3
    for column in zip(*EVEN, strict=True):
        assert len({len(ids) for ids in agent.tokenizer(list(column))["input_ids"]}) == 1
    even = original_loss(agent.model, agent.tokenizer, EVEN)
    for options in ({}, {"compat": "bug-for-bug"}, {"compat": "bug-for-bug", "fix": ["padding"]}):
        torch.testing.assert_close(our_loss(agent.model, agent.tokenizer, EVEN, **options), even, rtol=1e-5, atol=0)


def test_long_texts_are_read_whole(agent: Any) -> None:
    """More than the 512 tokens that the agent itself reads of an observation."""
    rows = [("Questions:\n" * 300, "Is it a dog?"), UNEVEN[0]]
    assert len(agent.tokenizer(rows[0][0])["input_ids"]) > 600
    wanted = mean_loss(copy.deepcopy(agent.model).double(), agent.tokenizer, rows)
    torch.testing.assert_close(our_loss(agent.model, agent.tokenizer, rows).double(), wanted, rtol=1e-6, atol=1e-6)


def test_rare_tokens_do_not_underflow(agent: Any) -> None:
    """The original's softmax gives 0, whose logarithm is -inf."""
    with torch.no_grad():
        agent.model.transformer.ln_f.weight.mul_(200)
    assert original_loss(agent.model, agent.tokenizer, EVEN).item() == float("inf")
    wanted = mean_loss(copy.deepcopy(agent.model).double(), agent.tokenizer, EVEN)
    torch.testing.assert_close(our_loss(agent.model, agent.tokenizer, EVEN).double(), wanted, rtol=1e-5, atol=0)


def test_no_padding_token_is_needed(agent: Any) -> None:
    wanted = our_loss(agent.model, agent.tokenizer, UNEVEN)
    tokenizer = copy.deepcopy(agent.tokenizer)
    tokenizer.pad_token = None
    torch.testing.assert_close(our_loss(agent.model, tokenizer, UNEVEN), wanted)


def test_bad_rows(agent: Any) -> None:
    def loss(observation: Any, action: Any) -> Tensor:
        return plain_bc_loss(agent.model, agent.tokenizer, observation, action)

    with pytest.raises(ValueError, match="observation, action: wanted equally many rows, at least one, got 2 and 1"):
        loss(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="at least one, got 0 and 0"):
        loss([], [])
    with pytest.raises(ValueError, match="observation: wanted text of at least one token, got ''"):
        loss(["a", ""], ["b", "c"])
    with pytest.raises(TypeError, match="action: wanted str alone, got 3"):
        loss(["a"], [3])
    with pytest.raises(ValueError, match="observation, action: wanted at most 1024 tokens together, got"):
        loss(["Questions:\n" * 600], ["a"])
    torch.testing.assert_close(loss("Questions:\n", "Is it a dog?"), loss(["Questions:\n"], ("Is it a dog?",)))


# -- train_loop ----------------------------------------------------------------------------------------


def batches(rows: list[tuple[str, str]], size: int) -> list[dict[str, Any]]:
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [{"observation": [o for o, _ in part], "action": [a for _, a in part]} for part in parts]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_train_loop_takes_the_original_s_steps(agent: Any, accumulated: int, tmp_path: Path) -> None:
    """Gradients of micro-batches are summed, a step is Adam's at 1e-5, the rest of an odd number is dropped."""
    rows = [*EVEN, *UNEVEN[:2]]
    model, twin = agent.model.double(), copy.deepcopy(agent.model).double()  # Adam makes steps of rounding errors
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-5)
    order = batches(rows, 2) * 3
    for i in range(0, len(order) - len(order) % accumulated, accumulated):
        optimizer.zero_grad()
        for batch in order[i : i + accumulated]:
            pairs = list(zip(batch["observation"], batch["action"], strict=True))
            mean_loss(twin, agent.tokenizer, pairs).backward()
        optimizer.step()
    path = tmp_path / "bc.pt"
    train_loop(model, batches(rows, 2), agent.tokenizer, 3, accumulated, save_path=path, use_tqdm=False)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, twin.state_dict()[name], rtol=0, atol=1e-9, msg=name)
    assert sum(float((weight - before[name]).abs().max()) > 2e-5 for name, weight in twin.state_dict().items()) > 20

    saved = torch.load(path, weights_only=True)
    assert set(saved) == {"model_state_dict", "optimizer_state_dict"}
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(saved["model_state_dict"][name], weight, rtol=0, atol=0)
    torch.optim.Adam(model.parameters()).load_state_dict(saved["optimizer_state_dict"])


def test_train_loop_writes_nothing_by_itself(agent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.warns(UserWarning, match="train_loop: .* not used: lr"):
        train_loop(agent.model, batches(EVEN, 4), agent.tokenizer, iterations=1, lr=1)
    assert [*tmp_path.rglob("*.pt")] == []
    with pytest.raises(ValueError, match="grad_accum_steps: wanted at least 1, got 0"):
        train_loop(agent.model, batches(EVEN, 4), agent.tokenizer, grad_accum_steps=0)


# -- BCTrainer -----------------------------------------------------------------------------------------

SETTINGS = {"lm_lr": 1e-3, "epochs": 2, "max_grad_norm": 0.5, "grad_accum_steps": 3}


def replay_of(transitions: list[Transition], batch_size: int = 4) -> ReplayBuffer:
    return fill(ReplayBuffer(batch_size=batch_size, capacity=len(transitions)), transitions)


def seed(number: int) -> None:
    np.random.seed(number)  # noqa: NPY002, what the replay draws from


def by_the_formulas(agent: Any, replay: ReplayBuffer, size: int) -> tuple[Any, list[float], list[float]]:
    """Two epochs in float64, micro-batch after micro-batch: the model, all losses, the gradients' norms."""
    twin, losses, norms = copy.deepcopy(agent.model).double(), [], []
    optimizer = torch.optim.Adam(twin.parameters(), lr=SETTINGS["lm_lr"])
    for _ in range(2):
        drawn = [replay.sample(1) for _ in range(3 * replay.batch_size)]
        rows = [(d["observation"][0], d["action"][0]) for d in drawn]
        optimizer.zero_grad()
        for i in range(0, len(rows), size):
            loss = mean_loss(twin, agent.tokenizer, rows[i : i + size])
            loss.backward()
            losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5).item())
        optimizer.step()
    return twin, losses, norms


def recorded_norms(accelerator: Any) -> list[float]:
    """Filled with the norm that gradients have whenever they are clipped."""
    norms: list[float] = []
    clip = accelerator.clip_grad_norm_
    accelerator.clip_grad_norm_ = lambda parameters, most: norms.append(float(clip(parameters, most)))
    return norms


def assert_says_the_same(model: Any, twin: Any, tokenizer: Any) -> None:
    for row in (*UNEVEN, *EVEN):
        torch.testing.assert_close(
            row_loss(model, tokenizer, *row).double(), row_loss(twin, tokenizer, *row).double(), rtol=2e-3, atol=2e-3
        )


@pytest.mark.parametrize("policy_lm, size", [("gpt2", 4), ("llama-2", 1)])
@pytest.mark.parametrize("way", ["packed", "plain", "long"])
def test_update_is_the_original_s(folder: Path, policy_lm: str, size: int, way: str, monkeypatch: Any) -> None:
    agent, passes = make_agent(folder), []
    agent.policy_lm = policy_lm
    transitions = games(np.random.default_rng(1), 20)
    if way == "long":  # than what the packed policy reads
        transitions = [t._replace(observation="Questions:\n" * 280 + t.observation) for t in transitions[:5]]
    replay = replay_of(transitions)

    policy_gradient = PackedPolicy.policy_gradient

    def counted(*arguments: Any) -> Tensor:
        passes.append(1)
        if way == "plain":
            raise Unsupported("for this test")
        return policy_gradient(*arguments)

    monkeypatch.setattr(PackedPolicy, "policy_gradient", counted)
    trainer = BCTrainer(agent, agent.tokenizer, agent.accelerator, **SETTINGS)
    seed(3)
    twin, losses, norms = by_the_formulas(agent, replay, size)
    found = recorded_norms(agent.accelerator)
    start = mean_loss(agent.model, agent.tokenizer, EVEN).item()
    seed(3)
    info = trainer.update(replay)
    assert info.keys() == {"bc.loss"} and type(info["bc.loss"]) is float
    assert info["bc.loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert found == pytest.approx(norms, rel=1e-3)  # Adam does not see the scale, nor does it behind clipping
    assert_says_the_same(agent.model, twin, agent.tokenizer)
    assert abs(mean_loss(agent.model, agent.tokenizer, EVEN).item() - start) > 0.05
    assert len(passes) == {"packed": 2, "plain": 2, "long": 0}[way]
    assert trainer.step == 1


def test_without_the_actor_nothing_moves(agent: Any) -> None:
    before = copy.deepcopy(agent.model.state_dict())
    trainer = BCTrainer(agent, agent.tokenizer, agent.accelerator, **SETTINGS)
    assert trainer.update(ReplayBuffer(), no_update_actor=True) == {}
    assert all(torch.equal(weight, before[name]) for name, weight in agent.model.state_dict().items())


def test_a_fork_s_loss_is_called_a_micro_batch_at_a_time(agent: Any) -> None:
    """With all that the original gives it; and what it returns is averaged."""
    seen: list[dict[str, Any]] = []

    class Fork(BCTrainer):
        def actor_loss(self, observation: Any, action: Any, **kwargs: Any) -> dict[str, Any]:
            seen.append({"observation": observation, "action": action} | kwargs)
            return super().actor_loss(observation, action) | {"rows": len(observation) + len(seen)}

    replay = replay_of(games(np.random.default_rng(2), 9))
    trainer = Fork(agent, agent.tokenizer, agent.accelerator, **SETTINGS)
    seed(3)
    twin, losses, _ = by_the_formulas(agent, replay, 4)
    seed(3)
    info = trainer.update(replay)
    assert info == {"bc.loss": pytest.approx(np.mean(losses), rel=1e-4), "rows": 4 + 3.5}
    assert len(seen) == 6
    assert set(seen[0]) == {"observation", "action", "reward", "next_observation", "done", "mc_return"}
    seed(3)
    assert list(seen[0]["observation"]) == [replay.sample(1)["observation"][0] for _ in range(4)]
    assert_says_the_same(agent.model, twin, agent.tokenizer)


def test_kept_and_mended_faults_change_the_numbers(folder: Path) -> None:
    replay = replay_of(games(np.random.default_rng(1), 20))

    def trained(**options: Any) -> tuple[float, float]:
        agent = make_agent(folder)
        trainer = BCTrainer(agent, agent.tokenizer, agent.accelerator, **SETTINGS | {"epochs": 1}, **options)
        norms = recorded_norms(agent.accelerator)
        seed(3)
        return trainer.update(replay)["bc.loss"], norms[0]

    loss, norm = trained()
    padded_loss, _ = trained(compat="bug-for-bug")
    assert abs(loss - padded_loss) > 0.05
    averaged_loss, averaged_norm = trained(fix=["padding", "sum"])
    assert averaged_loss == pytest.approx(loss) and averaged_norm == pytest.approx(norm / 3, rel=1e-4)


def test_clipping_spans_the_agent_unless_mended(folder: Path) -> None:
    replay = replay_of(games(np.random.default_rng(1), 20))
    for options, stale in (({}, 0.01), ({"fix": ["padding", "clip"]}, 7.0)):
        agent = make_agent(folder)
        trainer = BCTrainer(agent, agent.tokenizer, agent.accelerator, **SETTINGS | {"epochs": 1}, **options)
        weight = next(agent.critic.parameters())
        weight.grad = torch.full_like(weight, 7.0)  # left by the critic's phase
        trainer.update(replay)
        assert float(weight.grad.max()) == pytest.approx(7.0) if stale == 7.0 else float(weight.grad.max()) < 0.5


def test_save_and_load(folder: Path, tmp_path: Path) -> None:
    """What the original cannot: its trainer has no optimizer of the critic to save. A second run goes on alike."""
    replay, path = replay_of(games(np.random.default_rng(1), 20)), tmp_path / "trainer.pt"
    agent, other = make_agent(folder), make_agent(folder, seed=1)
    trainer = BCTrainer(agent, agent.tokenizer, agent.accelerator, **SETTINGS)
    trainer.update(replay)
    trainer.save(path)
    found = torch.load(path, weights_only=True)
    assert set(found) == {f"{name}_state_dict" for name in ("model", "critic", "target_critic", "lm_optimizer")}

    restored = BCTrainer(other, other.tokenizer, other.accelerator, **SETTINGS)
    assert restored.load(path) is other
    for network in ("model", "critic", "target_critic"):
        for name, weight in getattr(agent, network).state_dict().items():
            assert torch.equal(getattr(other, network).state_dict()[name], weight), f"{network} {name}"
    losses = []
    for each in (trainer, restored):
        seed(4)
        losses.append(each.update(replay)["bc.loss"])
        seed(5)
        losses.append(each.update(replay)["bc.loss"])
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-6)


def test_loads_what_an_archer_trainer_saved(folder: Path, tmp_path: Path) -> None:
    agent, other = make_agent(folder), make_agent(folder, seed=1)
    ArcherTrainer(agent, agent.accelerator, agent.tokenizer).save(tmp_path / "trainer.pt")
    BCTrainer(other, other.tokenizer, other.accelerator).load(tmp_path / "trainer.pt")
    assert torch.equal(next(other.critic.parameters()), next(agent.critic.parameters()))
    assert torch.equal(next(other.model.parameters()), next(agent.model.parameters()))


class Malicious:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_a_bad_checkpoint_loads_nothing(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wide, agent = make_agent(folder, seed=2, width=16), make_agent(folder)
    BCTrainer(wide, wide.tokenizer, wide.accelerator).save(tmp_path / "wide.pt")
    torch.save({"model_state_dict": Malicious()}, tmp_path / "code.pt")
    torch.save({"model_state_dict": agent.model.state_dict()}, tmp_path / "part.pt")
    trainer = BCTrainer(agent, agent.tokenizer, agent.accelerator)
    before = copy.deepcopy(agent.state_dict())
    for name, message in (("wide", "nothing was loaded"), ("code", "no plain data"), ("part", "is missing")):
        with pytest.raises(ValueError, match=rf"{name}\.pt: .*{message}"):
            trainer.load(tmp_path / f"{name}.pt")
        assert all(torch.equal(weight, before[key]) for key, weight in agent.state_dict().items())
    assert "code ran" not in capfd.readouterr().out


def test_bad_arguments(agent: Any) -> None:
    with pytest.raises(ValueError, match=r"accelerator: wanted an Accelerator, got .*; here the tokenizer comes first"):
        BCTrainer(agent, agent.accelerator, agent.tokenizer)
    with pytest.raises(ValueError, match="agent: wanted the attributes of ArcherAgent, Accelerator lacks model"):
        BCTrainer(Accelerator(), agent.tokenizer, agent.accelerator)
    many = Accelerator()
    many.num_processes = 4
    with pytest.raises(ValueError, match="accelerator: wanted one process, got 4"):
        BCTrainer(agent, agent.tokenizer, many)
    with pytest.warns(UserWarning, match="BCTrainer: .* not used: beta"):
        trainer = BCTrainer(agent, agent.tokenizer, agent.accelerator, beta=1.0)
    with pytest.raises(ValueError, match="replay_buffer: wanted at least batch_size = 2 transitions, got 0"):
        trainer.update(ReplayBuffer())
