"""Twenty updates of an algorithm on games that every rank is given; as a program, of each case, on torchrun's ranks.

torchrun --standalone --nproc-per-node 2 tests/ranked_updates.py FOLDER [sharded]
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_learners import STOP, VOCAB, MakeLM, make_learner, random_games
from tiny_lm import tiny_lm
from torch import Tensor

from archer_fast.batch import Alternatives, PackedBatch
from archer_fast.config import (
    ActorConfig,
    BufferConfig,
    Config,
    CriticConfig,
    FilteredBCConfig,
    LoRAConfig,
    ModelConfig,
    PPOConfig,
    ReinforceConfig,
    RolloutConfig,
)
from archer_fast.meters import Meters
from archer_fast.ranks import ALONE, Ranks, joined_ranks
from archer_fast.sharding import is_sharded

ITERATIONS, STEPS = 5, 4


def config_of(**changes: Any) -> Config:
    settings: dict[str, Any] = {
        "rollout": RolloutConfig(games=9, max_new_tokens=4),
        "buffer": BufferConfig(max_trajectories=20),
        "critic": CriticConfig(hidden_size=16, batch_turns=12, epochs=4),
        "actor": ActorConfig(epochs=STEPS, batch_games=6, max_kl_step=1e9),
        "model": ModelConfig(max_pass_tokens=60),
    }
    return Config(**(settings | changes))


CASES = {
    "default": config_of(),
    "one pass": config_of(model=ModelConfig()),
    "separate trunk": config_of(critic=CriticConfig("separate", hidden_size=16, batch_turns=12, epochs=4)),
    "published": config_of(
        critic=CriticConfig("separate", value_target="resample", hidden_size=16, batch_turns=12, epochs=4),
        actor=ActorConfig(
            epochs=STEPS,
            batch_games=6,
            data="replay",
            actions="fresh",
            advantage="q_minus_v",
            loss="reinforce",
            alternatives=1,
            max_kl_step=1e9,
        ),
    ),
    "shared trunk": config_of(critic=CriticConfig("shared", hidden_size=16, batch_turns=12, epochs=4)),
    "stops early": config_of(actor=ActorConfig(epochs=STEPS, batch_games=6, max_kl_step=1e-4)),
    "adapters": config_of(
        critic=CriticConfig("lora", hidden_size=16, batch_turns=12, epochs=4),
        model=ModelConfig(lora=LoRAConfig(rank=2), max_pass_tokens=60),
    ),
    "taken actions": config_of(
        actor=ActorConfig(
            epochs=STEPS,
            batch_games=6,
            actions="logged",
            advantage="residual",
            token_baseline=True,
            max_kl_step=1e9,
        )
    ),
    "ppo": config_of(algorithm="ppo", ppo=PPOConfig(epochs=STEPS, batch_games=6, max_kl_step=1e9)),
    "reinforce": config_of(
        algorithm="reinforce", reinforce=ReinforceConfig(epochs=STEPS, batch_games=6, max_kl_step=1e9)
    ),
    "filtered BC": config_of(
        algorithm="filtered-bc", filtered_bc=FilteredBCConfig(share=0.1, epochs=STEPS, batch_games=6, kl_coef=0.1)
    ),
}


SEPARATE = CriticConfig("separate", hidden_size=16, batch_turns=12, epochs=4)
SHARED = CriticConfig("shared", hidden_size=16, batch_turns=12, epochs=4)
PASSES = {"max_pass_tokens": 60}
# With weights in parts; passes of so few tokens that one rank has fewer of them than the other, which must wait for it.
SHARDED = {
    "frozen trunk": config_of(model=ModelConfig(shard="full", **PASSES)),
    "shared trunk": config_of(critic=SHARED, model=ModelConfig(shard="full", **PASSES)),
    "separate trunk": config_of(critic=SEPARATE, model=ModelConfig(shard="full", **PASSES)),
    "what trains": config_of(critic=SEPARATE, model=ModelConfig(shard="trained", **PASSES)),
    "base of adapters": config_of(
        critic=CriticConfig("lora", hidden_size=16, batch_turns=12, epochs=4),
        model=ModelConfig(lora=LoRAConfig(rank=2), shard="full", **PASSES),
    ),
    "base of adapters, blocks computed again": config_of(
        model=ModelConfig(lora=LoRAConfig(rank=2), shard="full", activation_checkpointing=True, **PASSES)
    ),
    "tied, blocks computed again": config_of(
        critic=SHARED, model=ModelConfig(shard="full", activation_checkpointing=True, **PASSES)
    ),
    "published, token baseline": config_of(
        actor=replace(CASES["published"].actor, token_baseline=True),
        critic=CASES["published"].critic,
        model=ModelConfig(shard="full", **PASSES),
    ),
    "ppo": replace(CASES["ppo"], model=ModelConfig(shard="full", **PASSES)),
}


def model_of(case: str) -> MakeLM:
    return functools.partial(tiny_lm, tie_word_embeddings=True) if case.startswith("tied") else tiny_lm


def updates(
    config: Config, ranks: Ranks = ALONE, make_lm: MakeLM = tiny_lm
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The rows of `ITERATIONS` iterations of `STEPS` actor steps each, and the weights they end with, whole."""
    learner = make_learner(make_lm, config, ranks=ranks)
    learner.engine.sample_alternatives = some_actions
    rows = []
    for iteration in range(ITERATIONS):
        meters = Meters(ranks)
        learner.insert(random_games(9, seed=iteration), meters)
        learner.update_critic(meters)
        learner.update_actor(meters)
        rows.append(meters.read() | {"eval_kl": learner.kl_to_start(random_games(5, seed=99))})
    weights = {f"actor.{name}": p for name, p in learner.actor.named_parameters()} | learner.state_tensors()
    return rows, {name: whole(value).detach().clone() for name, value in weights.items()}


def whole(tensor: Any) -> Tensor:
    """Of a tensor in parts all of them; every rank calls."""
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return found


def some_actions(batch: PackedBatch, turn_ids: Tensor) -> Alternatives:
    """Instead of sampling: actions that the tokens of the game, the turn and the column tell, on whatever rank."""
    made = []
    for row, tokens in enumerate(batch.input_ids.split(list(batch.lengths))):
        told = hashlib.sha256(tokens.numpy().tobytes()).digest()
        for column, turn_id in enumerate(turn_ids[row].tolist()):
            turn = int(batch.turn[turn_id]) if turn_id >= 0 else 0
            rng = np.random.default_rng([*told, turn, column])
            action = [*rng.integers(1, VOCAB, rng.integers(0, 4)), STOP] if turn_id >= 0 else []
            made.append(torch.tensor(action, dtype=torch.int32))
    lengths = torch.tensor([action.numel() for action in made]).view(turn_ids.shape)
    ids = torch.nn.utils.rnn.pad_sequence(made, batch_first=True).view(*turn_ids.shape, -1)
    used = torch.arange(ids.shape[-1]) < lengths[..., None]
    return Alternatives(ids, torch.where(used, -2.0, 0.0), lengths, turn_ids)


def main(folder: Path, cases: dict[str, Config]) -> None:
    torch.set_num_threads(1)
    with joined_ranks(seconds=60) as ranks:
        for name, config in cases.items():
            rows, tensors = updates(replace(config), ranks, model_of(name))
            save_file(tensors, folder / f"{name}-{ranks.rank}.safetensors")
            (folder / f"{name}-{ranks.rank}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), SHARDED if "sharded" in sys.argv[2:] else CASES)
