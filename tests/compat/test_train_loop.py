"""The training loop: what is played, learned from, logged and saved; and a run that is resumed as if never ended."""

from __future__ import annotations

import inspect
import sys
import time
import types
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from agents import Accelerator, make_agent

from archer_fast.compat.algorithms import offpolicy_train_loop
from archer_fast.compat.algorithms.archer import ArcherTrainer
from archer_fast.compat.algorithms.offpolicy_train_loop import _Replay
from archer_fast.compat.algorithms.online_filteredbc import BCTrainer
from archer_fast.compat.data import ReplayBuffer
from archer_fast.compat.environment import BatchedTwentyQuestionsEnv
from archer_fast.compat.models import ArcherAgent, CHAIAgent
from archer_fast.compat.trainer_file import read_replay_buffer, write_replay_buffer

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {
    "rollout_size": 4, "batch_size": 2, "grad_accum_steps": 2, "epochs": 2, "actor_epochs": 1, "warmup_iter": 1,
    "critic_lr": 1e-2, "lm_lr": 1e-3, "max_grad_norm": 1.0, "eval_freq": 100,
}  # fmt: skip
ROLLOUT = {f"rollout.{name}" for name in ("mean", "max", "min", "reward.mean", "reward.max", "reward.min")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def make_env(**options: Any) -> BatchedTwentyQuestionsEnv:
    return BatchedTwentyQuestionsEnv(**{"bsize": 2, "max_conversation_length": 3, "seed": 1} | options)


def seed(number: int) -> None:
    np.random.seed(number)  # noqa: NPY002, what the replay draws from
    torch.manual_seed(number)


def run(agent: Any, env: Any = None, eval_env: Any = None, **options: Any) -> list[dict[str, float]]:
    env = env or make_env()
    return offpolicy_train_loop(env, eval_env or env, agent, agent.tokenizer, agent.accelerator, **SMALL | options)


class Spy:
    """The updates that a trainer was asked for: its class, the buffer's rewards, and whether the actor rested."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.updates: list[tuple[type, int, bool]] = []
        for cls in (ArcherTrainer, BCTrainer):
            monkeypatch.setattr(cls, "update", self._spied(cls, cls.update))

    def _spied(self, cls: type, update: Any) -> Any:
        def spied(trainer: Any, replay: ReplayBuffer, no_update_actor: bool = False) -> Any:
            self.updates.append((cls, len(replay), no_update_actor))
            return update(trainer, replay, no_update_actor)

        return spied


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def test_the_signature_is_the_original_s() -> None:
    parameters = inspect.signature(offpolicy_train_loop).parameters
    positional = {p.name: p.default for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD}
    decode_f = positional.pop("decode_f")
    assert decode_f(["a"]) == ["a"]
    nothing = inspect.Parameter.empty
    assert list(positional.items()) == list(
        {
            "env": nothing, "eval_env": nothing, "agent": nothing, "tokenizer": nothing, "accelerator": nothing,
            "warmup_iter": 20, "rollout_size": 50, "eval_size": 1, "batch_size": 2, "capacity": 500000,
            "iterations": 10, "epochs": 3, "grad_accum_steps": 1, "env_idx": None, "do_sample": False,
            "temperature": 2.0, "critic_lr": 1e-3, "lm_lr": 1e-5, "gamma": 0.9, "tau": 0.1, "use_wandb": False,
            "env_load_path": "", "actor_epochs": 3, "max_grad_norm": 0.01, "save_path": None, "save_freq": 25,
            "eval_freq": 25, "agent_type": "archer",
        }.items()
    )  # fmt: skip


@pytest.mark.parametrize(
    "agent_type, trainer, agent_class",
    [
        ("archer", ArcherTrainer, ArcherAgent),
        ("ArCHer_LLM", ArcherTrainer, ArcherAgent),
        ("chai", ArcherTrainer, CHAIAgent),
        ("online_filteredbc", BCTrainer, ArcherAgent),
    ],
)
def test_each_kind_of_agent_is_trained(
    folder: Path, spy: Spy, agent_type: str, trainer: type, agent_class: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 iterations without a folder, the first without the actor; nobody sleeps."""
    monkeypatch.setattr(time, "sleep", None)
    agent = make_agent(folder, agent_class)
    before = {name: weight.clone() for name, weight in agent.state_dict().items()}
    seed(0)
    metrics = run(agent, iterations=2, agent_type=agent_type)
    assert [(cls, rest) for cls, _, rest in spy.updates] == [(trainer, True), (trainer, False)]
    assert all(set(info) >= ROLLOUT and all(type(value) is float for value in info.values()) for info in metrics)
    assert [{"q1.loss", "v2.std"} <= set(info) for info in metrics] == [trainer is ArcherTrainer] * 2
    assert ["pg.loss" in info for info in metrics] == [False, trainer is ArcherTrainer]
    assert ["bc.loss" in info for info in metrics] == [False, trainer is BCTrainer]
    moved = {name.split(".")[0] for name, weight in agent.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == ({"model", "critic", "target_critic"} if trainer is ArcherTrainer else {"model"})


@pytest.mark.parametrize("agent_type", ["archer", "online_filteredbc"])
def test_settings_reach_the_trainer(folder: Path, agent_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filtered behaviour cloning takes `actor_epochs` steps, and has no critic."""
    trainers: list[Any] = []
    for cls in (ArcherTrainer, BCTrainer):
        monkeypatch.setattr(cls, "update", lambda self, replay, **_: trainers.append((self, replay)) or {})
    settings = {"gamma": 0.7, "tau": 0.3, "epochs": 5, "actor_epochs": 4, "grad_accum_steps": 6, "max_grad_norm": 0.2}
    run(make_agent(folder), agent_type=agent_type, iterations=1, lm_lr=0.11, critic_lr=0.13, batch_size=3, **settings)
    trainer, replay = trainers[0]
    if agent_type == "online_filteredbc":
        settings = {"epochs": 4, "grad_accum_steps": 6, "max_grad_norm": 0.2}
    else:
        assert trainer.critic_optimizer.param_groups[0]["lr"] == 0.13
    assert {name: getattr(trainer, name) for name in settings} == settings
    assert trainer.lm_optimizer.param_groups[0]["lr"] == 0.11
    assert (replay.batch_size, replay.max_size) == (3, 500_000)


def test_what_is_played_is_what_is_learned_from(folder: Path, spy: Spy, tmp_path: Path) -> None:
    """Rewards of the metrics are those in the replay, games of env_idx alone are played, decoded as asked."""
    heard: list[str] = []

    def decode(actions: list[str]) -> list[str]:
        heard.extend(actions)
        return ["Is it a dog?"] * len(actions)

    dog = next(i for i, names in enumerate(make_env().env_list[0].word_list) if "dog" in names)
    metrics = run(make_agent(folder), iterations=2, env_idx=dog, decode_f=decode, save_path=tmp_path, capacity=6)
    assert [info["rollout.mean"] for info in metrics] == [0.0, 0.0]  # won at once
    assert [size for _, size, _ in spy.updates] == [4, 6]
    replay = read_replay_buffer(tmp_path / "replay_buffer.pt")
    assert replay["size"] == 8 and replay["reward"].tolist() == [0.0] * 6
    assert sorted(replay["action"]) == sorted(heard[-6:])  # as the agent said them
    assert set(replay["next_observation"]) == {"Questions:\nIs it a dog? Yes.\n"}


def test_statistics_of_the_games(folder: Path) -> None:
    """Two games of one turn and two of three: returns -1 and -3."""

    class Env:
        bsize = 4

        def reset(self, idx: Any = None) -> list[str]:
            self.turn = 0
            return ["Questions:\n"] * 4

        def step(self, actions: list[str]) -> list[Any]:
            self.turn += 1
            return [
                None if i < 2 and self.turn > 1 else ("Questions:\n a\n", -0.5 * self.turn, i < 2 or self.turn == 3)
                for i in range(4)
            ]

    info = run(make_agent(folder), Env(), iterations=1)[0]
    assert {name: info[name] for name in ROLLOUT} == {
        "rollout.mean": (-0.5 * 2 - 3.0 * 2) / 4, "rollout.max": -0.5, "rollout.min": -3.0,
        "rollout.reward.mean": -7.0 / 8, "rollout.reward.max": -0.5, "rollout.reward.min": -1.5,
    }  # fmt: skip


def test_evaluation_is_greedy_and_gives_sampling_back(folder: Path) -> None:
    agent, asked = make_agent(folder), []

    class EvalEnv(BatchedTwentyQuestionsEnv):
        def reset(self, idx: Any = None) -> list[str]:
            asked.append(agent.do_sample)
            return super().reset(idx)

    metrics = run(agent, eval_env=EvalEnv(bsize=3, max_conversation_length=2), iterations=4, eval_freq=2, eval_size=7)
    assert asked == [False] * 4  # 2 rounds of 3, twice
    assert agent.do_sample is True
    assert ["eval_rollout.mean" in info for info in metrics] == [False, True, False, True]
    assert metrics[1]["eval_rollout.min"] == metrics[1]["eval_rollout.max"] == -2.0

    class Broken(EvalEnv):
        def step(self, questions: Any) -> Any:
            raise OSError("the server is gone")

    with pytest.raises(OSError, match="the server is gone"):
        run(agent, eval_env=Broken(bsize=2), iterations=1, eval_freq=1)
    assert agent.do_sample is True


@pytest.mark.parametrize("agent_type, mode", [("archer", None), ("archer", "shared"), ("online_filteredbc", None)])
def test_a_resumed_run_goes_on_as_if_it_had_not_ended(
    folder: Path, tmp_path: Path, agent_type: str, mode: str | None
) -> None:
    """Weights, optimizers, replay, games, and the count of iterations: of warm-up and evaluation too."""
    options = {"agent_type": agent_type, "eval_freq": 2, "warmup_iter": 3, "capacity": 20, "save_path": tmp_path / "a"}
    options |= {"mode": mode}
    agent, env = make_agent(folder), make_env()
    seed(0)
    whole = run(agent, env, iterations=5, **options)

    options["save_path"] = tmp_path / "b"
    # Another start, whose weights the file replaces; the trunk of "shared" has to be the start policy's.
    first, second, env = make_agent(folder), make_agent(folder, seed=0 if mode == "shared" else 1), make_env()
    seed(0)
    begun = run(first, env, iterations=2, **options)
    resumed = run(second, env, iterations=3, **options)
    for one, other in zip(whole, begun + resumed, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert ["eval_rollout.mean" in info for info in resumed] == [False, True, False]
    key = "pg.loss" if agent_type == "archer" else "bc.loss"
    assert [key in info for info in resumed] == [False, True, True]
    for name, weight in second.model.state_dict().items():
        torch.testing.assert_close(weight, agent.model.state_dict()[name], rtol=1e-4, atol=1e-5)
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert names == {"trainer.pt", "replay_buffer.pt", "progress.json"} | (
        {"trajectories.pt"} if agent_type == "online_filteredbc" else set()
    )
    for name in names - {"progress.json"}:
        torch.load(tmp_path / "b" / name, weights_only=True)


def test_save_freq_and_the_last_iteration(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(ArcherTrainer, "save", lambda trainer, path: saved.append(trainer.step))
    run(make_agent(folder), iterations=5, save_freq=2, save_path=tmp_path / "new" / "folder")
    assert saved == [2, 4, 5]


def test_a_checkpoint_without_its_replay_is_said(folder: Path, tmp_path: Path, spy: Spy) -> None:
    """As when somebody brings the original's trainer.pt alone; warm-up begins anew."""
    agent = make_agent(folder)
    ArcherTrainer(agent, agent.accelerator, agent.tokenizer).save(tmp_path / "trainer.pt")
    other = make_agent(folder, seed=1)
    with pytest.warns(UserWarning, match=r"save_path: .*replay_buffer\.pt is missing beside trainer\.pt"):
        run(other, iterations=1, save_path=tmp_path, epochs=0)
    assert torch.equal(next(other.critic.parameters()), next(agent.critic.parameters()))
    assert [(size > 0, rest) for _, size, rest in spy.updates] == [(True, True)]


def test_unsafe_files_are_refused_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    agent = make_agent(folder)
    ArcherTrainer(agent, agent.accelerator, agent.tokenizer).save(tmp_path / "trainer.pt")
    torch.save(ReplayBuffer(), tmp_path / "replay_buffer.pt")  # an object, as the original saves it
    other = make_agent(folder, seed=1)
    before = {name: weight.clone() for name, weight in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"replay_buffer\.pt: holds .*ReplayBuffer.*trust_pickle"):
        run(other, iterations=1, save_path=tmp_path)
    write_replay_buffer(tmp_path / "replay_buffer.pt", ReplayBuffer().state_dict())
    torch.save([[{"trajectory_reward": np.float64(-1)}]], tmp_path / "trajectories.pt")
    with pytest.raises(ValueError, match=r"trajectories\.pt: wanted games as this loop writes them"):
        run(other, iterations=1, save_path=tmp_path, agent_type="online_filteredbc")
    assert all(torch.equal(weight, before[name]) for name, weight in other.state_dict().items())


def test_filtering_keeps_the_best_tenth() -> None:
    """21 games of returns -20 to 0, two turns each: the quantile .9 is -2, reached by three of them."""
    replay = _Replay(2, 100, frozenset({"buffer"}), filtered=True)

    def game(total: int) -> list[dict[str, Any]]:
        turn = {"action": "a", "next_observation": "n", "done": False, "mc_return": np.float64(0)}
        rewards = (np.float64(0.5), total - 0.5)
        return [
            turn | {"observation": f"{total}", "reward": r, "trajectory_reward": np.float64(total)} for r in rewards
        ]

    replay.insert([game(total) for total in (-20, -1, *range(-19, -1), 0)])
    best = replay.data()
    assert best.observations[: len(best)].tolist() == ["-1", "-1", "-2", "-2", "0", "0"]
    assert best.rewards[: len(best)].tolist() == [0.5, -1.5, 0.5, -2.5, 0.5, -0.5]
    assert len(replay.buffer) == 42
    replay.insert([game(0)] * 9)  # older games are measured by the newer ones: only zeros are left
    assert {*replay.data().observations[:20]} == {"0"} and len(replay.data()) == 20


def test_metrics_go_to_wandb(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(log=logged.append))
    metrics = run(make_agent(folder), iterations=2, use_wandb=True)
    assert logged == metrics and len(logged) == 2
    run(make_agent(folder), iterations=1)
    assert len(logged) == 2
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="use_wandb: wandb is not installed"):
        run(make_agent(folder), iterations=1, use_wandb=True)


def test_faults_are_those_of_the_agent_or_as_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[frozenset[str], frozenset[str]]] = []
    monkeypatch.setattr(
        ArcherTrainer, "update", lambda self, replay, **_: seen.append((self.fixes, replay.fixes)) or {}
    )
    run(make_agent(folder), iterations=1)
    run(make_agent(folder, compat="bug-for-bug"), iterations=1)
    run(make_agent(folder), iterations=1, fix=["sum"])
    assert [buffer for _, buffer in seen] == [trainer for trainer, _ in seen]
    assert [sorted(buffer) for _, buffer in seen] == [["buffer", "dropout", "padding"], [], ["sum"]]


def test_the_script_s_config_is_taken_and_unknown_keywords_are_named(folder: Path) -> None:
    """`**config` of the original's run.py; anything else is said, not dropped."""
    config = {"policy_lm": "gpt2", "checkpoint_path": "bc.pt", "run_name": "a", "cache_dir": "~", "max_new_tokens": 8}
    run(make_agent(folder), iterations=0, **config)
    with pytest.warns(UserWarning, match="offpolicy_train_loop: .* not used: eval_frequency$"):
        run(make_agent(folder), iterations=0, eval_frequency=1, **config)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"agent_type": "dqn"}, ValueError, "agent_type: wanted one of archer, .*, got 'dqn'"),
        ({"eval_env": object()}, ValueError, r"eval_env: wanted an environment with \.bsize"),
        ({"save_freq": 0}, ValueError, "save_freq: wanted an integer from 1"),
        ({"eval_freq": 1.5}, TypeError, "eval_freq: wanted an integer from 1"),
        ({"rollout_size": 1}, ValueError, r"num_trajectories: wanted at least env\.bsize = 2, got 1"),
        ({"capacity": 0}, ValueError, "capacity: wanted an integer from 1"),
        ({"fix": ["buffers"]}, ValueError, "did you mean 'buffer'"),
        ({"mode": "quick"}, ValueError, "mode: wanted 'exact' or 'shared', got 'quick'"),
    ],
)
@pytest.mark.parametrize("agent_type", ["archer", "online_filteredbc"])
def test_bad_arguments(
    folder: Path, options: dict[str, Any], error: type[Exception], message: str, agent_type: str
) -> None:
    with pytest.raises(error, match=message):
        run(make_agent(folder), iterations=1, **{"agent_type": agent_type} | options)


def test_several_processes_are_refused(folder: Path) -> None:
    agent = make_agent(folder)
    agent.accelerator = Accelerator()
    agent.accelerator.num_processes = 2
    for agent_type in ("archer", "online_filteredbc"):
        with pytest.raises(ValueError, match="accelerator: wanted one process, got 2"):
            run(agent, iterations=1, agent_type=agent_type)


def test_with_hugging_face_s_accelerator(folder: Path) -> None:
    for agent_type in ("archer", "online_filteredbc"):
        agent = make_agent(folder)
        agent.accelerator = accelerate.Accelerator(cpu=True)
        metrics = run(agent, iterations=2, agent_type=agent_type)
        assert np.isfinite(metrics[1]["pg.loss" if agent_type == "archer" else "bc.loss"])


def test_filtered_cloning_has_no_critic_to_share(folder: Path) -> None:
    with pytest.raises(ValueError, match="mode: wanted 'exact' for online_filteredbc"):
        run(make_agent(folder), iterations=1, agent_type="online_filteredbc", mode="shared")
