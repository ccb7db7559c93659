"""The original's training loop: play, insert, update, save."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from archer_fast.arguments import as_integer
from archer_fast.compat.algorithms.archer import ArcherTrainer
from archer_fast.compat.algorithms.online_filteredbc import BCTrainer
from archer_fast.compat.arguments import ignored
from archer_fast.compat.data import ReplayBuffer
from archer_fast.compat.environment.env_utils import BatchedEnv, Trajectory, batch_interact_environment, batch_size_of
from archer_fast.compat.faults import Compat
from archer_fast.compat.generation import fixes_of
from archer_fast.compat.models.shared_critic import Mode, check_mode
from archer_fast.compat.trainer_file import read_replay_buffer, write_replay_buffer

BEST_SHARE = 0.1  # of all games, which filtered behaviour cloning learns from
_AGENT_TYPES = ("archer", "archer_llm", "chai", "online_filteredbc")
# What the original's script hands over in **config though it means others than this loop.
_OF_THE_SCRIPT = {
    *("cache_dir", "checkpoint_path", "critic_lm", "env_name", "eos_str", "huggingface_token", "max_new_tokens"),
    *("policy_lm", "project_name", "run_name", "use_baseline", "use_bfloat16", "use_lora", "wandb_key"),
    *("webshop_lower", "webshop_upper"),
}


def offpolicy_train_loop(
    env: BatchedEnv,
    eval_env: BatchedEnv,
    agent: Any,
    tokenizer: Any,
    accelerator: Any,
    warmup_iter: int = 20,
    rollout_size: int = 50,
    eval_size: int = 1,
    batch_size: int = 2,
    capacity: int = 500000,
    iterations: int = 10,
    epochs: int = 3,
    grad_accum_steps: int = 1,
    env_idx: Any = None,
    do_sample: bool = False,
    temperature: float = 2.0,
    critic_lr: float = 1e-3,
    lm_lr: float = 1e-5,
    gamma: float = 0.9,
    tau: float = 0.1,
    use_wandb: bool = False,
    env_load_path: str = "",
    actor_epochs: int = 3,
    max_grad_norm: float = 0.01,
    save_path: str | Path | None = None,
    save_freq: int = 25,
    eval_freq: int = 25,
    agent_type: str = "archer",
    decode_f: Callable[[list[str]], Sequence[str]] = lambda x: x,
    *,
    mode: Mode | None = None,
    fix: Iterable[str] | None = None,
    compat: Compat | None = None,
    trust_pickle: bool = False,
    **kwargs: Any,
) -> list[dict[str, float]]:
    """`iterations` times: play `rollout_size` games, insert them, update the trainer. Returns the metrics of each.

    do_sample, temperature and env_load_path are read by nobody here, as in the original: the agent's own count.
    agent_type: "archer", "archer_llm", "chai" (ArcherTrainer), or "online_filteredbc" (BCTrainer on the best tenth of
    all games so far, `actor_epochs` steps). Every `eval_freq` iterations `eval_env` is played without sampling.

    save_path: a folder for trainer.pt and replay_buffer.pt (trajectories.pt too where games are filtered), written
    every `save_freq` iterations and after the last; None: nothing is saved, nothing resumed. Where a trainer.pt is
    found there, the run goes on from it for `iterations` more; those already made count for `warmup_iter`, `save_freq`
    and `eval_freq`, and its learning rates are kept, as in the original.
    trust_pickle: read the original's own replay_buffer.pt (`trainer_file.read_replay_buffer`).
    use_wandb: log to the run that `wandb.init` has begun.
    mode: of ArcherTrainer: "exact", or "shared", whose critic is another than the original's; None: as the agent is.
    fix, compat: which faults of the original are mended (`archer_fast.compat.faults`); None: as the agent has them.

    Errors: ValueError or TypeError naming the argument, before anything is played.
    """
    ignored("offpolicy_train_loop", {key: value for key, value in kwargs.items() if key not in _OF_THE_SCRIPT})
    for name, games in (("env", env), ("eval_env", eval_env)):
        batch_size_of(name, games)
    for name, every in (("save_freq", save_freq), ("eval_freq", eval_freq)):
        as_integer(name, every, 1, 2**31)
    log = _wandb_log() if use_wandb else lambda info: None
    common: dict[str, Any] = {
        "agent": agent, "tokenizer": tokenizer, "accelerator": accelerator, "lm_lr": lm_lr,
        "grad_accum_steps": grad_accum_steps, "max_grad_norm": max_grad_norm, "fix": fix, "compat": compat,
    }  # fmt: skip
    trainer: Any
    if agent_type.lower() == "online_filteredbc":
        if mode is not None:
            check_mode(mode)
        if mode == "shared":
            raise ValueError("mode: wanted 'exact' for online_filteredbc, which has no critic, got 'shared'")
        trainer = BCTrainer(**common, epochs=actor_epochs)
    elif agent_type.lower() in _AGENT_TYPES:
        trainer = ArcherTrainer(
            **common, mode=mode, critic_lr=critic_lr, gamma=gamma, tau=tau, epochs=epochs, actor_epochs=actor_epochs
        )
    else:
        raise ValueError(f"agent_type: wanted one of {', '.join(_AGENT_TYPES)}, got {agent_type!r}")
    replay = _Replay(batch_size, capacity, fixes_of(trainer), filtered=isinstance(trainer, BCTrainer))

    folder = None if save_path is None else Path(save_path)
    made = 0  # iterations, by the runs before this one
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "trainer.pt").exists():
            made = replay.load(folder, trust_pickle)
            trainer.load(folder / "trainer.pt")
    agent.prepare()

    def play(games: BatchedEnv, num: int) -> list[Trajectory]:
        return batch_interact_environment(
            agent, tokenizer, games, num, use_tqdm=False, decode_f=decode_f, env_idx=env_idx
        )

    metrics = []
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("iterations", total=iterations)
        for i in range(made, made + iterations):
            new = play(env, rollout_size)
            info = _summary("rollout", _returns(new))
            if (i + 1) % eval_freq == 0:
                info |= _evaluate(agent, lambda: play(eval_env, max(eval_size, eval_env.bsize)))
            info |= _summary("rollout.reward", [turn["reward"] for game in new for turn in game])
            replay.insert(new)
            update = trainer.update(replay.data(), no_update_actor=i < warmup_iter)
            info |= {key: float(value) for key, value in update.items()}
            log(info)
            metrics.append(info)
            if folder is not None and ((i + 1) % save_freq == 0 or i + 1 == made + iterations):
                replay.save(folder, i + 1)
                trainer.save(folder / "trainer.pt")  # last: where it is, the others are
            progress.update(bar, advance=1, description=f"return {info['rollout.mean']:.2f}")
    return metrics


class _Replay:
    """What the trainer learns from: all turns that the buffer holds, or, filtered, those of the best games ever."""

    def __init__(self, batch_size: int, capacity: int, fixes: frozenset[str], *, filtered: bool) -> None:
        self.buffer = ReplayBuffer(batch_size, capacity, fix=fixes)
        self.filtered = filtered
        self.games: list[Trajectory] = []  # where they are filtered

    def insert(self, games: list[Trajectory]) -> None:
        for turn in (turn for game in games for turn in game):
            self.buffer.insert(**turn)
        if self.filtered:
            self.games += [_plain(game) for game in games]

    def data(self) -> ReplayBuffer:
        if not self.filtered:
            return self.buffer
        returns = _returns(self.games)
        least = np.quantile(returns, 1 - BEST_SHARE)
        best = ReplayBuffer(self.buffer.batch_size, self.buffer.max_size, fix=self.buffer.fixes)
        for turn in (turn for game, own in zip(self.games, returns, strict=True) if own >= least for turn in game):
            best.insert(**turn)
        return best

    def save(self, folder: Path, iteration: int) -> None:
        write_replay_buffer(folder / "replay_buffer.pt", self.buffer.state_dict())
        if self.filtered:
            torch.save(self.games, folder / ".trajectories.pt.tmp")
            os.replace(folder / ".trajectories.pt.tmp", folder / "trajectories.pt")
        (folder / ".progress.json.tmp").write_text(json.dumps({"iteration": iteration}))
        os.replace(folder / ".progress.json.tmp", folder / "progress.json")

    def load(self, folder: Path, trust_pickle: bool) -> int:
        """The iterations made; 0 for the original's files, which do not tell. A missing file is warned of."""
        for name in ["replay_buffer.pt"] + ["trajectories.pt"] * self.filtered:
            if not (folder / name).exists():
                warnings.warn(
                    f"save_path: {folder / name} is missing beside trainer.pt, and the run goes on without",
                    stacklevel=3,
                )
            elif name == "replay_buffer.pt":
                self.buffer.load_state_dict(read_replay_buffer(folder / name, trust_pickle))
            else:
                self.games = _read_games(folder / name)
        progress = folder / "progress.json"
        return int(json.loads(progress.read_text())["iteration"]) if progress.exists() else 0


def _wandb_log() -> Callable[[dict[str, float]], object]:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "use_wandb: wandb is not installed; pip install 'archer-fast[wandb]', or leave it out"
        ) from error
    return lambda info: wandb.log(info)


def _returns(games: Sequence[Trajectory]) -> list[float]:
    return [float(game[0]["trajectory_reward"]) for game in games]


def _summary(name: str, values: Sequence[Any]) -> dict[str, float]:
    found = {"mean": np.mean(values), "max": np.max(values), "min": np.min(values)}
    return {f"{name}.{key}": float(value) for key, value in found.items()}


def _evaluate(agent: Any, play: Callable[[], list[Trajectory]]) -> dict[str, float]:
    """The returns of games that are played without sampling."""
    before, agent.do_sample = agent.do_sample, False
    try:
        return _summary("eval_rollout", _returns(play()))
    finally:
        agent.do_sample = before


def _plain(game: Trajectory) -> Trajectory:
    """Without NumPy's scalars and others' tensors, which no checkpoint gives back unpickled."""
    return [
        {key: value.item() if getattr(value, "ndim", None) == 0 else value for key, value in turn.items()}
        for turn in game
    ]


def _read_games(path: Path) -> list[Trajectory]:
    try:
        games: list[Trajectory] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path}: wanted games as this loop writes them; without the file, the run goes on with none. Got: {error}"
        ) from error
    return games
