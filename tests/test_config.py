"""Every setting of a run: it checks itself, goes to JSON and comes back, and knows a typo when it sees one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from archer_fast.config import (
    ActorConfig,
    BufferConfig,
    CollapseConfig,
    Config,
    CriticConfig,
    EvalConfig,
    FilteredBCConfig,
    ModelConfig,
    PPOConfig,
    ReinforceConfig,
    RolloutConfig,
    TaskConfig,
    TinyModel,
    WarmStartConfig,
    from_dict,
    to_dict,
)


def test_a_config_survives_json() -> None:
    changed = Config(
        out="runs/b",
        seed=7,
        log=("wandb", "tensorboard"),
        task=TaskConfig("guess-number", {"high": 8, "names": ["a"]}),
        model=ModelConfig(path="gpt2", stop_token="\n", tiny=TinyModel(num_layers=3)),
        warm_start=WarmStartConfig(enabled=False, player="random"),
        critic=CriticConfig(trunk="shared", gamma=1.0),
        actor=ActorConfig(lr=3e-5, normalise_advantages=False),
    )
    for config in (Config(), changed):
        assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config
    assert to_dict(changed)["model"]["tiny"]["num_layers"] == 3


def test_what_is_not_given_keeps_its_default() -> None:
    assert from_dict(Config, {}) == Config()
    wanted = Config()
    wanted.actor.lr = 1.0
    assert from_dict(Config, {"actor": {"lr": 1}}) == wanted
    assert isinstance(from_dict(Config, {"actor": {"lr": 1}}).actor.lr, float)


def test_what_a_task_is_usually_played_with() -> None:
    assert TaskConfig() == TaskConfig("twenty-questions", {"objects": 10})
    assert TaskConfig("twenty-questions", {}).options == {}
    assert TaskConfig("guess-number").options == {}
    first, second = TaskConfig(), TaskConfig()
    first.options["objects"] = 157
    assert second.options == {"objects": 10}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"iteratons": 3}, "config: unknown key 'iteratons'; did you mean 'iterations'?"),
        ({"critic": {"gama": 1}}, "config.critic: unknown key 'gama'; did you mean 'gamma'?"),
        ({"model": {"tiny": {"zzzz": 1}}}, "config.model.tiny: unknown key 'zzzz'"),
        ([], "config: wanted an object of settings, got list"),
        ({"actor": 3}, "config.actor: wanted an object of settings, got int"),
        ({"iterations": "3"}, "config.iterations: wanted int, got '3'"),
        ({"iterations": 3.5}, "config.iterations: wanted int, got 3.5"),
        ({"iterations": True}, "config.iterations: wanted int, got True"),
        ({"actor": {"lr": "fast"}}, "config.actor.lr: wanted float, got 'fast'"),
        ({"actor": {"lr": True}}, "config.actor.lr: wanted float, got True"),
        ({"actor": {"normalise_advantages": 1}}, "config.actor.normalise_advantages: wanted bool, got 1"),
        ({"out": None}, "config.out: wanted str, got None"),
        ({"task": {"options": [1]}}, "config.task.options: wanted an object, got [1]"),
        ({"warm_start": {"enabled": "no"}}, "config.warm_start.enabled: wanted bool, got 'no'"),
        (
            {"critic": {"trunk": "frozn"}},
            "config.critic.trunk: wanted one of 'frozen', 'shared', 'lora', 'separate', "
            "got 'frozn'; did you mean 'frozen'?",
        ),
        ({"log": "wandb"}, "config.log: wanted a list, got 'wandb'"),
        ({"log": ["wandb", "csv"]}, "config.log[1]: wanted one of 'tensorboard', 'wandb', got 'csv'"),
        ({"critic": {"tau": 2.0}}, "config.critic.tau: wanted a number from 0 to 1, got 2.0"),
        ({"iterations": -3}, "config.iterations: wanted at least 0, got -3"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(values: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        from_dict(Config, values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Config(seed=-1), "seed: wanted at least 0, got -1"),
        (lambda: Config(checkpoint_every=0), "checkpoint_every: wanted at least 1, got 0"),
        (lambda: WarmStartConfig(steps=-1), "steps: wanted at least 0, got -1"),
        (lambda: RolloutConfig(games=0), "games: wanted at least 1, got 0"),
        (lambda: RolloutConfig(temperature=0.0), "temperature: wanted a number from 0.001 to 100, got 0.0"),
        (lambda: RolloutConfig(temperature=float("nan")), "temperature: wanted a number from 0.001 to 100, got nan"),
        (lambda: BufferConfig(max_tokens=1), "max_tokens: wanted at least 2, got 1"),
        (lambda: CriticConfig(gamma=1.01), "gamma: wanted a number from 0 to 1, got 1.01"),
        (lambda: CriticConfig(lr=float("inf")), "lr: wanted at least 0, got inf"),
        (lambda: CriticConfig(lr=float("nan")), "lr: wanted at least 0, got nan"),
        (
            lambda: ActorConfig(alternatives=0, actions="fresh", advantage="q_minus_v"),
            "alternatives: wanted at least 1, got 0",
        ),
        (lambda: ActorConfig(gae_lambda=1.5), "gae_lambda: wanted a number from 0 to 1, got 1.5"),
        (lambda: ActorConfig(clip=1.5), "clip: wanted a number from 0 to 1, got 1.5"),
        (lambda: ActorConfig(batch_games=0), "batch_games: wanted at least 1, got 0"),
        (lambda: RolloutConfig(best_of=0), "best_of: wanted at least 1, got 0"),
        (lambda: RolloutConfig(iterations=0), "iterations: wanted at least 1, got 0"),
        (lambda: CriticConfig(expectile=1.0), "expectile: wanted a number from 0.01 to 0.99, got 1.0"),
        (lambda: CriticConfig(td_lambda=1.1), "td_lambda: wanted a number from 0 to 1, got 1.1"),
        (lambda: PPOConfig(lr=-1.0), "lr: wanted at least 0, got -1.0"),
        (lambda: PPOConfig(value_batch=0), "value_batch: wanted at least 1, got 0"),
        (lambda: PPOConfig(gae_lambda=-0.1), "gae_lambda: wanted a number from 0 to 1, got -0.1"),
        (lambda: ReinforceConfig(group_size=1), "group_size: wanted at least 2, got 1"),
        (lambda: ReinforceConfig(gamma=2.0), "gamma: wanted a number from 0 to 1, got 2.0"),
        (lambda: FilteredBCConfig(share=1.1), "share: wanted a number from 0 to 1, got 1.1"),
        (lambda: EvalConfig(final_games=0), "final_games: wanted at least 1, got 0"),
        (lambda: EvalConfig(probe_games=0), "probe_games: wanted at least 1, got 0"),
        (lambda: CollapseConfig(window=0), "window: wanted at least 1, got 0"),
        (lambda: CollapseConfig(max_restores=-1), "max_restores: wanted at least 0, got -1"),
        (lambda: CollapseConfig(max_kl=float("inf")), "max_kl: wanted at least 0, got inf"),
        (lambda: CollapseConfig(max_repeat=1.1), "max_repeat: wanted a number from 0 to 1, got 1.1"),
        (lambda: TinyModel(num_layers=0), "num_layers: wanted at least 1, got 0"),
        (lambda: TinyModel(vocab_size=256), "vocab_size: wanted at least 257, got 256"),
        (lambda: TinyModel(num_kv_heads=3), "num_heads: wanted a multiple of num_kv_heads 3, got 4"),
        (lambda: TinyModel(hidden_size=100), "hidden_size: wanted a multiple of 2 x 4 heads, got 100"),
    ],
)
def test_bounds(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message


GROUPS = ReinforceConfig(baseline="group", group_size=3)
REPLAY = ActorConfig(data="replay")
BEGINS = "after which the learning from the replay begins"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: CriticConfig(td_lambda=0.5, trunk="shared"),
            "td_lambda: wanted 0 for a trunk that trains (shared), got 0.5",
        ),
        (
            lambda: ActorConfig(advantage="residual", actions="fresh"),
            "advantage: 'residual' is of logged actions; wanted actions = logged, got fresh",
        ),
        (
            lambda: ActorConfig(alternatives=1),
            "alternatives: wanted at least 2 to compare, got 1",
        ),
        (
            lambda: ActorConfig(actions="fresh", alternatives=1),
            "alternatives: wanted at least 2 to compare, got 1",
        ),
        (
            lambda: ActorConfig(actions="logged"),
            "advantage: 'centred' compares fresh actions; wanted actions = fresh or both, got logged",
        ),
        (
            lambda: ActorConfig(advantage="residual"),
            "advantage: wanted centred where actions = both (logged ones get their residual), got residual",
        ),
        (
            lambda: ActorConfig(actions="both", advantage="q_minus_v"),
            "advantage: wanted centred where actions = both (logged ones get their residual), got q_minus_v",
        ),
        (
            lambda: Config(algorithm="ppo", rollout=RolloutConfig(best_of=2)),
            "rollout.best_of: wanted 1 without a turn critic (ppo)",
        ),
        (
            lambda: Config(actor=ActorConfig(data="on_policy"), rollout=RolloutConfig(iterations=3)),
            "rollout.iterations: wanted None where actor.data is 'on_policy'",
        ),
        (
            lambda: Config(
                algorithm="filtered-bc",
                filtered_bc=FilteredBCConfig(newest=True),
                rollout=RolloutConfig(iterations=3),
            ),
            "rollout.iterations: wanted None where filtered_bc.newest is on",
        ),
        (
            lambda: Config(algorithm="ppo", rollout=RolloutConfig(iterations=3)),
            "rollout.iterations: wanted None, ppo learns from new games alone",
        ),
        (
            lambda: Config(algorithm="reinforce", rollout=RolloutConfig(iterations=3)),
            "rollout.iterations: wanted None, reinforce learns from new games alone",
        ),
        (
            lambda: Config(iterations=3, actor=REPLAY, rollout=RolloutConfig(iterations=3)),
            f"iterations: wanted more than rollout.iterations = 3, {BEGINS}, got 3",
        ),
        (
            lambda: Config(iterations=1, algorithm="filtered-bc", rollout=RolloutConfig(iterations=2)),
            f"iterations: wanted more than rollout.iterations = 2, {BEGINS}, got 1",
        ),
        (
            lambda: Config(buffer=BufferConfig(max_trajectories=31)),
            "buffer.max_trajectories: wanted at least rollout.games = 32, got 31",
        ),
        (
            lambda: Config(algorithm="ppo", buffer=BufferConfig(max_trajectories=31)),
            "buffer.max_trajectories: wanted at least rollout.games = 32, got 31",
        ),
        (
            lambda: Config(algorithm="reinforce", rollout=RolloutConfig(games=257)),
            "buffer.max_trajectories: wanted at least rollout.games = 257, got 256",
        ),
        (
            lambda: Config(
                algorithm="filtered-bc",
                filtered_bc=FilteredBCConfig(newest=True),
                buffer=BufferConfig(max_trajectories=31),
            ),
            "buffer.max_trajectories: wanted at least rollout.games = 32, got 31",
        ),
        (
            lambda: Config(algorithm="reinforce", reinforce=GROUPS),
            "rollout.games: wanted a multiple of reinforce.group_size 3, got 32",
        ),
    ],
)
def test_settings_that_do_not_go_together(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message


def test_what_another_algorithm_would_mind_is_allowed() -> None:
    Config(
        actor=REPLAY,
        reinforce=GROUPS,
        filtered_bc=FilteredBCConfig(newest=True),
        buffer=BufferConfig(max_trajectories=1),
        rollout=RolloutConfig(best_of=2, iterations=3),
    )
    Config(buffer=BufferConfig(max_trajectories=32))
    Config(algorithm="ppo", actor=ActorConfig(data="on_policy"), reinforce=GROUPS)
    Config(algorithm="filtered-bc", rollout=RolloutConfig(iterations=3), buffer=BufferConfig(max_trajectories=1))
    for iterations in (0, 4):  # 0: the start alone is evaluated
        Config(iterations=iterations, actor=REPLAY, rollout=RolloutConfig(iterations=3))
    Config(algorithm="reinforce", reinforce=GROUPS, rollout=RolloutConfig(games=33))
    ActorConfig(advantage="q_minus_v", actions="fresh", alternatives=1)
    ActorConfig(advantage="q_minus_v", actions="logged")
    ActorConfig(advantage="residual", actions="logged", alternatives=1)
    ActorConfig(advantage="centred", actions="both", data="replay")
    ActorConfig(advantage="centred", actions="fresh")


def test_the_chosen_algorithm_decides_what_counts() -> None:
    config = Config(ppo=PPOConfig(gamma=0.5, lr=1.0), reinforce=ReinforceConfig(gamma=0.25, lr=2.0, group_size=4))
    config.critic.gamma, config.reinforce.baseline = 0.75, "group"
    seen = {}
    for config.algorithm in ("archer", "ppo", "reinforce", "filtered-bc"):
        of_run = (config.group_size, config.keeps_features, config.learns_from_newest)
        seen[config.algorithm] = (config.update, config.gamma, *of_run)
    assert seen == {
        "archer": (config.actor, 0.75, 1, True, True),
        "ppo": (config.ppo, 0.5, 1, False, True),
        "reinforce": (config.reinforce, 0.25, 4, False, True),
        "filtered-bc": (config.filtered_bc, 0.75, 1, False, False),
    }
    config.filtered_bc.newest = True
    assert config.learns_from_newest
    config.algorithm, config.critic.trunk, config.actor.data = "archer", "separate", "replay"
    assert not config.keeps_features and not config.learns_from_newest


def test_the_bounds_themselves_are_allowed() -> None:
    Config(iterations=0, checkpoint_every=1)
    CriticConfig(gamma=0.0, tau=1.0, lr=0.0, epochs=0, warmup_iterations=0)
    RolloutConfig(temperature=1e-3, max_dropped_share=1.0)
    TinyModel(vocab_size=257, hidden_size=8, num_heads=4, num_kv_heads=4)


def test_asking_for_settings_does_not_load_torch() -> None:
    code = "import sys, archer_fast.cli_args; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
