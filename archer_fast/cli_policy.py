"""The policy that a command plays with, and the task it plays."""

from __future__ import annotations

from typing import NamedTuple

import torch

from archer_fast import backbone
from archer_fast.backbone import Backbone
from archer_fast.cli_args import LoadArgs, TaskChoice, Which, check_task, choose_task
from archer_fast.config import RolloutConfig, TaskConfig
from archer_fast.run_folder import RunFolder, is_run, no_run


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
        if rollout.best_of > 1:
            name += f" (alone; in the run its critic chose the best of {rollout.best_of} actions)"
        stop_token, dtype = load.stop_token or config.model.stop_token, load.dtype or config.model.dtype
        threads = load.threads or config.model.num_threads
    else:
        path = name = source
        if task.name is None:
            raise ValueError(f"{no_run(source)} (a model that is no run of ours needs --task.name)")
        chosen = choose_task(None, task.name, task.options)
        rollout, stop_token, dtype = RolloutConfig(), load.stop_token, load.dtype or "float32"
        threads = load.threads
    check_task(chosen)
    backbone.quiet()
    backbone.limit_threads(threads)
    model, stop_token_id = backbone.load_backbone(
        path,
        device=backbone.choose_device(load.device),
        dtype=getattr(torch, dtype),
        attention=load.attention,
        stop_token=stop_token,
    )
    return Policy(name, model, stop_token_id, chosen, rollout)
