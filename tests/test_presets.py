"""Named settings: each makes a valid run of the algorithm that it names."""

from __future__ import annotations

from typing import Any

import pytest

from archer_fast.config import Config, TaskConfig, from_dict, to_dict
from archer_fast.presets import PRESETS, with_preset
from archer_fast.resume import leaves

ALGORITHMS = {
    "ppo": "ppo",
    "turn-ppo": "ppo",
    "reinforce": "reinforce",
    "rloo": "reinforce",
    "filtered-bc": "filtered-bc",
    "bc": "filtered-bc",
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_changes_what_it_names_and_nothing_else(name: str) -> None:
    config = with_preset(Config(), name)
    assert from_dict(Config, to_dict(config)) == config
    assert config.algorithm == ALGORITHMS.get(name, "archer")
    before, after = (dict(leaves(to_dict(c))) for c in (Config(), config))
    assert {key: after[key] for key in PRESETS[name]} == PRESETS[name]
    assert {key for key in after if after[key] != before[key]} <= PRESETS[name].keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_over_another_runs_settings_names_its_algorithm(name: str) -> None:
    base = with_preset(Config(seed=5, task=TaskConfig("guess-number", {"high": 8})), "ppo")
    config = with_preset(base, name)
    assert config.algorithm == ALGORITHMS.get(name, "archer")
    assert config.seed == 5 and config.task == base.task and base.algorithm == "ppo"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_leaves_nothing_of_the_algorithm_that_was(name: str) -> None:
    """Also not of its own; what is the run's stays."""
    of_run: dict[str, Any] = {
        "seed": 5, "iterations": 30, "out": "runs/b", "task": {"name": "guess-number", "options": {"high": 8}},
        "model": {"max_pass_tokens": 999}, "warm_start": {"steps": 7}, "eval": {"every": 3}, "collapse": {"window": 2},
    }  # fmt: skip
    kept = {"num_slots": 3, "temperature": 0.5, "max_new_tokens": 9, "max_dropped_share": 0.2}
    of_algorithm: dict[str, Any] = {
        "algorithm": "filtered-bc", "buffer": {"max_trajectories": 7, "max_tokens": 99},
        "critic": {"lr": 1.0, "trunk": "shared"}, "actor": {"lr": 1.0, "data": "replay", "clip": 0.7},
        "ppo": {"lr": 1.0}, "reinforce": {"lr": 1.0, "group_size": 3}, "filtered_bc": {"lr": 1.0, "share": 0.7},
    }  # fmt: skip
    other = {"games": 100, "iterations": 4}
    before = from_dict(Config, of_run | of_algorithm | {"rollout": kept | other})
    chai = from_dict(Config, of_run | {"rollout": kept | {"games": 100, "best_of": 3}})
    wanted = with_preset(from_dict(Config, of_run | {"rollout": kept}), name)
    assert with_preset(before, name) == with_preset(chai, name) == wanted
    assert wanted.rollout.temperature == 0.5 and wanted.model.max_pass_tokens == 999 and wanted.seed == 5
    assert before.critic.lr == 1.0 and before.rollout.games == 100, "that which was given is left alone"


def test_the_first_preset_is_what_is_shipped() -> None:
    assert next(iter(PRESETS)) == "archer" and with_preset(Config(), "archer") == Config()


@pytest.mark.parametrize(
    ("name", "hint"),
    [("archr", "; did you mean 'archer'?"), ("turn_ppo", "; did you mean 'turn-ppo'?"), ("xyz", "")],
)
def test_an_unknown_name_is_told_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError) as caught:
        with_preset(Config(), name)
    assert str(caught.value) == f"preset: wanted one of {', '.join(PRESETS)}, got {name!r}{hint}"


def test_an_offline_preset_has_iterations_to_learn_in() -> None:
    assert with_preset(Config(iterations=20), "offline-iql").iterations == Config().iterations
    assert with_preset(Config(iterations=200), "offline-iql").iterations == 200
    assert with_preset(Config(iterations=20), "archer").iterations == 20


def test_the_paper_is_exact() -> None:
    """arXiv 2402.19446: A = min Q - min V of one fresh action, fresh a' in V's target, an encoder of its own."""
    for name in ("archer-exact", "paper"):
        c = with_preset(Config(), name)
        assert (c.critic.trunk, c.critic.value_target, c.critic.td_lambda) == ("separate", "resample", 0)
        assert (c.actor.data, c.actor.actions, c.actor.advantage, c.actor.alternatives) == (
            "replay", "fresh", "q_minus_v", 1,
        )  # fmt: skip
        assert c.actor.loss == "reinforce" and c.actor.pessimistic and c.actor.kl_coef == 0
        assert not (c.critic.reads_logprob or c.critic.reads_turn or c.critic.reads_repeated)
