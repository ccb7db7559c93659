"""A checkpoint's turn critic, with the policy that it credited."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from archer_fast.backbone import Backbone, load_backbone
from archer_fast.checkpoint import MANIFEST, CheckpointError, list_checkpoints, load_checkpoint
from archer_fast.config import AttentionImpl, Config
from archer_fast.critic import TurnCritic
from archer_fast.run_folder import RunFolder, is_run, no_run
from archer_fast.sharded_checkpoint import load_shards

_PREFIX = "critic."


class SavedCritic(NamedTuple):
    """What a checkpoint holds, on one device and ready to be asked."""

    critic: TurnCritic
    policy: Backbone
    stop_token_id: int


def find_checkpoint(source: Path | str) -> Path:
    """A run's last checkpoint, or the checkpoint whose folder `source` is; ValueError where there is none."""
    path = Path(source)
    if (path / MANIFEST).is_file() and is_run(path.absolute().parents[1]):
        return path
    if not is_run(path):
        raise ValueError(no_run(path))
    found = list_checkpoints(RunFolder(path).checkpoints)
    if not found:
        raise ValueError(f"wanted the folder of a run with a checkpoint, but {str(path)!r} has none yet")
    return found[-1]


def config_of(checkpoint: Path) -> Config:
    """The settings of the run that a checkpoint belongs to."""
    return RunFolder.existing(checkpoint.absolute().parents[1]).load_config()


def load_saved_critic(
    checkpoint: Path,
    config: Config,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: AttentionImpl = "auto",
    stop_token: str | None = None,
) -> SavedCritic:
    """The critic with the checkpoint's weights, its trunk as the run had it.

    Errors: ValueError where the run's algorithm has no turn critic; CheckpointError where the folder is damaged.
    """
    saved = load_checkpoint(checkpoint)
    weights = {k.removeprefix(_PREFIX): v for k, v in saved.tensors.items() if k.startswith(_PREFIX)}
    if not any(name.startswith("heads.q.") for name in weights):  # they are whole on every rank
        raise ValueError(
            f"wanted a run with a turn critic, got {str(checkpoint)!r}, whose algorithm ({config.algorithm}) keeps none"
        )
    start = RunFolder(checkpoint.absolute().parents[1]).start
    policy, stop_token_id = load_backbone(
        str(saved.policy), device=device, dtype=dtype, attention=attention, stop_token=stop_token
    )
    reference, _ = load_backbone(str(start), device=device, dtype=dtype, attention=attention, stop_token=stop_token)
    critic = TurnCritic(config.critic, policy, reference.requires_grad_(False), seed=0, lora=config.model.lora)
    if saved.shards.is_dir():
        own = critic.state_dict()
        try:
            parts = load_shards(saved.shards, lambda name: own[name.removeprefix(_PREFIX)], prefix=_PREFIX)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{saved.shards}: {error} (written by another archer_fast?)") from error
        weights |= {name.removeprefix(_PREFIX): value for name, value in parts.items()}
    _load_weights(critic, weights, checkpoint)
    return SavedCritic(critic.requires_grad_(False), policy.requires_grad_(False), stop_token_id)


def _load_weights(critic: TurnCritic, weights: dict[str, Tensor], checkpoint: Path) -> None:
    wanted = critic.state_dict()
    for name in sorted(wanted.keys() | weights.keys()):
        theirs = weights.get(name)
        if name not in wanted or theirs is None or theirs.shape != wanted[name].shape:
            ours, got = (None if x is None else list(x.shape) for x in (wanted.get(name), theirs))
            field = f"field {_PREFIX + name!r}: wanted shape {ours}, got {got}"
            raise CheckpointError(f"{checkpoint / 'state.safetensors'}: {field} (written by another archer_fast?)")
    critic.load_state_dict(weights)
