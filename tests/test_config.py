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
    Config,
    CriticConfig,
    EvalConfig,
    ModelConfig,
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
        actor=ActorConfig(lr=3e-5, normalise_advantages=True),
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
            "config.critic.trunk: wanted one of 'frozen', 'shared', 'separate', got 'frozn'; did you mean 'frozen'?",
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
        (lambda: ActorConfig(alternatives=1), "alternatives: wanted at least 2, got 1"),
        (lambda: EvalConfig(final_games=0), "final_games: wanted at least 1, got 0"),
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


def test_the_bounds_themselves_are_allowed() -> None:
    Config(iterations=0, checkpoint_every=1)
    CriticConfig(gamma=0.0, tau=1.0, lr=0.0, epochs=0, warmup_iterations=0)
    RolloutConfig(temperature=1e-3, max_dropped_share=1.0)
    TinyModel(vocab_size=257, hidden_size=8, num_heads=4, num_kv_heads=4)


def test_asking_for_settings_does_not_load_torch() -> None:
    code = "import sys, archer_fast.cli_args; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
