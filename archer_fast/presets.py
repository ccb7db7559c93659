"""Named settings: each algorithm as it is compared, and the paper's own numbers."""

from __future__ import annotations

import difflib
from typing import Any

from archer_fast.config import Config, from_dict, to_dict

# An actor on fresh actions at replayed states, credited by Q alone.
_FRESH: dict[str, Any] = {
    "rollout.games": 128,
    "buffer.max_trajectories": 1024,
    "critic.warmup_iterations": 5,
    "actor.data": "replay",
    "actor.actions": "fresh",
    "actor.loss": "reinforce",
    "actor.normalise_advantages": False,
    "actor.epochs": 6,
}

# ArCHer as published (arXiv 2402.19446): a critic with an encoder of its own, fresh a' in V's target, one fresh action
# a replayed state, A = min Q - min V, no trust region. Only the step sizes are a model's own business.
_EXACT: dict[str, Any] = {
    **_FRESH,
    "critic.trunk": "separate",
    "critic.value_target": "resample",
    "critic.reads_logprob": False,
    "critic.reads_turn": False,
    "critic.reads_repeated": False,
    "actor.advantage": "q_minus_v",
    "actor.alternatives": 1,
    "actor.epochs": 3,
    "actor.kl_coef": 0.0,
    "actor.max_kl_step": 1e9,
}

# Offline: 20 iterations of games by the start policy, which has not moved, then learning from them alone.
_OFFLINE: dict[str, Any] = {
    "rollout.games": 128,
    "rollout.iterations": 20,
    "buffer.max_trajectories": 4096,
    "critic.warmup_iterations": 20,
    "actor.data": "replay",
    "actor.actions": "logged",
    "actor.advantage": "q_minus_v",
    "actor.loss": "awr",
    "actor.kl_coef": 0.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "archer": {},
    "archer-exact": {
        **_EXACT,
        "rollout.games": 32,
        "buffer.max_trajectories": 256,
        "critic.trunk_lr": 3e-4,
        "critic.warmup_iterations": 8,
        "actor.lr": 1e-4,
    },
    # The paper's numbers for Twenty Questions with gpt2 and roberta-base; at them a model of another size hardly moves.
    "paper": {
        **_EXACT,
        "critic.lr": 2e-5,
        "critic.trunk_lr": 2e-5,
        "critic.warmup_iterations": 20,
        "actor.lr": 1e-6,
        "buffer.max_trajectories": 8192,
        "buffer.max_tokens": 1 << 23,
    },
    "archer-fresh": _FRESH,
    "archer-resample": {"critic.value_target": "resample"},
    "archer-residual": {"actor.actions": "logged", "actor.advantage": "residual"},
    "archer-token-baseline": {**_FRESH, "actor.token_baseline": True},
    "offline-iql": {**_OFFLINE, "critic.value_target": "expectile"},
    "offline-sarsa": _OFFLINE,
    "chai": {**_FRESH, "rollout.best_of": 5, "actor.epochs": 0},
    "ppo": {"algorithm": "ppo", "rollout.games": 64, "ppo.epochs": 8},
    "turn-ppo": {"algorithm": "ppo", "rollout.games": 64, "ppo.epochs": 8, "ppo.level": "turn"},
    "reinforce": {"algorithm": "reinforce", "rollout.games": 64},
    "rloo": {"algorithm": "reinforce", "rollout.games": 64, "reinforce.baseline": "group"},
    "filtered-bc": {
        "algorithm": "filtered-bc",
        "rollout.games": 128,
        "buffer.max_trajectories": 1024,
        "filtered_bc.kl_coef": 0.0,
        "filtered_bc.share": 0.3,
    },
    "bc": {
        "algorithm": "filtered-bc",
        "rollout.games": 128,
        "buffer.max_trajectories": 1024,
        "filtered_bc.kl_coef": 0.0,
        "filtered_bc.share": 1.0,
    },
}


# What was tried before the settings above were chosen, all on Twenty Questions with 10 objects (NOTES.md, 2026-11-26
# and 27).
TUNING: dict[str, str] = {
    "archer": "18 settings of 1,152 games, 2 seeds; 3 of other credit; the best again with 2,560; 5 more beside it, "
    "2 seeds, none better by more than noise",
    "archer-exact": "18 settings of 1,152 games, the best 4 and the one before with 2 seeds: games an iteration, actor "
    "lr, actor epochs, states a game, critic and trunk lr, critic epochs, tau, warm-up, replay",
    "ppo": "18 settings, 14 of them with 2 seeds: games an iteration, epochs, lr, lambda, KL, clip, entropy, value lr",
    "filtered-bc": "20 settings, 16 of them with 2 seeds: share, games, epochs, lr, KL, replay, newest games, batch; "
    "the best of them, a replay of 256 games, is worse at 3,840 games (-11.4 on seeds 3 to 5)",
}


_OF_AN_ALGORITHM = ("algorithm", "buffer", "critic", "actor", "ppo", "reinforce", "filtered_bc")


def with_preset(config: Config, name: str) -> Config:
    """`config` with another algorithm: everything that is an algorithm's is the default's or the preset's, and task,
    model, seed, folder, evaluation stay. ValueError with the nearest match for an unknown preset."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"preset: wanted one of {', '.join(PRESETS)}, got {name!r}{hint}")
    values, defaults = to_dict(config), to_dict(Config())
    for section in _OF_AN_ALGORITHM:
        values[section] = defaults[section]
    for key in ("games", "iterations", "best_of"):
        values["rollout"][key] = defaults["rollout"][key]
    if "rollout.iterations" in PRESETS[name]:  # a short run's number would leave nothing to learn in
        values["iterations"] = max(values["iterations"], defaults["iterations"])
    for dotted, value in PRESETS[name].items():
        *path, last = dotted.split(".")
        inner = values
        for key in path:
            inner = inner[key]
        assert last in inner, dotted
        inner[last] = value
    made: Config = from_dict(Config, values)
    return made
