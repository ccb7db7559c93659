"""The policy a run begins with: a model by name, or the tiny one cloned from a scripted player and cached."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import filelock
import torch

from archer_fast.backbone import Backbone, load_backbone
from archer_fast.checkpoint import replace_folder
from archer_fast.config import Config
from archer_fast.envs import registry
from archer_fast.envs.players import ScriptedGame, play_scripted
from archer_fast.evaluation import encoder
from archer_fast.tiny_model import build_tiny_model
from archer_fast.warm_start import clone, to_trajectory
from archer_fast.watcher import Watcher

WARM_START_SEED = 1 << 41  # of the player's games: training and evaluation never see them


def start_policy(config: Config, device: torch.device, watcher: Watcher) -> tuple[Backbone, int]:
    """The start policy and its stop token's id; a warm start is done once for equal settings and games."""
    model = config.model
    wants_clone = config.warm_start.enabled if config.warm_start.enabled is not None else model.path is None
    if not wants_clone:
        return _load(config, _require_path(model.path), device)
    games = _scripted_games(config, watcher)
    vocabulary = registry.get(config.task.name).vocabulary_text(**config.task.options)
    student, stop_token_id = (
        build_tiny_model(vocabulary, model.tiny, seed=config.seed, attention=model.attention)
        if model.path is None
        else _load(config, model.path, device)
    )
    folder = cache_folder() / _key(config, games, vocabulary, student)
    locks = cache_folder().with_name("warm_start_locks")
    locks.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(locks / folder.name):  # of two runs the second reads what the first made
        if (folder / "config.json").is_file():
            watcher.message(f"warm start: read from {folder}")
        else:
            _clone(config, student.to(device), stop_token_id, games, folder, watcher)
    return _load(config, str(folder), device)


def _clone(
    config: Config, student: Backbone, stop_token_id: int, games: list[ScriptedGame], folder: Path, watcher: Watcher
) -> None:
    watcher.phase("warm start", config.warm_start.steps)
    encode = encoder(student.tokenizer)
    dialogues = [to_trajectory(game, encode, stop_token_id) for game in games]
    metrics = clone(student, dialogues, config.warm_start, config.seed, lambda step: watcher.advance())
    replace_folder(folder, student.save)
    losses = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    watcher.message(f"warm start: cloned {len(games)} scripted games ({losses}), kept in {folder}")


def cache_folder() -> Path:
    """$ARCHER_FAST_CACHE, or the user's cache folder."""
    base = os.environ.get("ARCHER_FAST_CACHE")
    if base:
        return Path(base) / "warm_start"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "archer_fast" / "warm_start"


def _load(config: Config, path: str, device: torch.device) -> tuple[Backbone, int]:
    return load_backbone(
        path,
        device=device,
        dtype=getattr(torch, config.model.dtype),
        attention=config.model.attention,
        stop_token=config.model.stop_token,
    )


def _require_path(path: str | None) -> str:
    if path is None:
        raise ValueError("warm_start.enabled: wanted true for the embedded model (it knows nothing), got false")
    return path


def _scripted_games(config: Config, watcher: Watcher) -> list[ScriptedGame]:
    spec, warm = registry.get(config.task.name), config.warm_start
    first = WARM_START_SEED + config.seed * 10_000_000
    games = []
    watcher.phase("scripted games", warm.games)
    for i in range(warm.games):
        env, player = spec.make_env(**config.task.options), spec.make_player(warm.player)
        watcher.calling(f"{type(env).__name__} with {type(player).__name__} (seed {first + i})")
        games.append(play_scripted(env, player, first + i))
        watcher.advance()
    return games


def _key(config: Config, games: list[ScriptedGame], vocabulary: list[str], student: Backbone) -> str:
    """A digest of everything the cloned weights depend on: texts, settings, the student's weights, the version."""
    model = dataclasses.asdict(config.model)
    del model["lora"], model["shard"]  # they come after the clone
    settings = {
        "warm_start": dataclasses.asdict(config.warm_start),
        "model": model,
        "seed": config.seed,
        "torch": torch.__version__,
        "vocabulary": vocabulary,
        "student": student.fingerprint(),
        "format": 1,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for game in games:
        digest.update(game.text.encode())
    return f"{config.task.name}-{digest.hexdigest()[:16]}"
