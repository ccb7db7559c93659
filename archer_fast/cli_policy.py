"""The policy that a command plays with, and the task it plays."""

from __future__ import annotations

from typing import NamedTuple

import torch

from archer_fast import backbone
from archer_fast.backbone import Backbone
from archer_fast.cli_args import LoadArgs, TaskChoice, Which, choose_task
from archer_fast.config import RolloutConfig, TaskConfig
from archer_fast.envs import registry
from archer_fast.run_folder import RunFolder, is_run


class Policy(NamedTuple):
    """A policy that is ready to play, with the settings of the run that it comes from."""

    name: str
    backbone: Backbone
    stop_token_id: int
    task: TaskConfig
    rollout: RolloutConfig


def load_policy(source: str, which: Which, task: TaskChoice, load: LoadArgs) -> Policy:
    """The policy of a run's folder, of a Hugging Face folder, or of a hub name."""
    if is_run(source):
        folder = RunFolder(source)
        config = folder.load_config()
        path, name = str(folder.policy(which)), f"{source}: {which}"
        chosen = choose_task(config.task, task.name, task.options)
        rollout = config.rollout
        stop_token, dtype = load.stop_token or config.model.stop_token, load.dtype or config.model.dtype
    else:
        path = name = source
        if task.name is None:
            RunFolder.existing(source)  # raises, and names the nearest folder
        chosen = choose_task(None, task.name, task.options)
        rollout, stop_token, dtype = RolloutConfig(), load.stop_token, load.dtype or "float32"
    check_task(chosen)
    backbone.quiet()
    model, stop_token_id = backbone.load_backbone(
        path,
        device=backbone.choose_device(load.device),
        dtype=getattr(torch, dtype),
        attention=load.attention,
        stop_token=stop_token,
    )
    return Policy(name, model, stop_token_id, chosen, rollout)


def check_task(task: TaskConfig) -> None:
    """ValueError for a task or option that does not exist, before anything is made."""
    try:
        registry.make_env(task.name, **task.options)
    except TypeError as error:
        raise ValueError(f"task.options: {error}") from error
