"""The case of the benchmark: games told as the original tells them, tiny models on disk, and who trains on them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests/compat"), str(ROOT / "benchmarks")]

from original import PlainAccelerator, PlainAgent, PlainBuffer, PlainTrainer, Work  # noqa: E402
from tiny_models import make_gpt2, make_roberta  # noqa: E402

from archer_fast.compat.algorithms.archer import ArcherTrainer  # noqa: E402
from archer_fast.compat.data import ReplayBuffer  # noqa: E402
from archer_fast.compat.models import ArcherAgent  # noqa: E402
from archer_fast.envs import play_scripted  # noqa: E402
from archer_fast.envs.twenty_questions import TASK  # noqa: E402

BATCH, ACCUMULATE, GAMES = 8, 32, 128  # rows of a micro-batch, micro-batches of a step, games in the replay
CRITIC_STEPS, ACTOR_STEPS = 50, 3  # of one update
CRITIC_LR, HEADS_LR, LM_LR = 2e-5, 1e-3, 1e-6
RIVAL, LEAN = "the original, in plain words", "the same, lean"
EXACT, SHARED = '`compat`, mode="exact"', '`compat`, mode="shared"'
NAMES = (RIVAL, LEAN, EXACT, SHARED)


class Contestant(NamedTuple):
    agent: Any
    trainer: Any
    replay: Any
    work: Work


def make_models(folder: Path, width: int, layers: int, newline_boost: float) -> None:
    """A GPT-2 and a RoBERTa of this size; the boost decides how soon an action ends."""
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        make_gpt2(folder / "policy", width=width, layers=layers, heads=4, initializer_range=0.3 * (32 / width) ** 0.5,
                  newline_boost=newline_boost, fragment_boost=-3)  # fmt: skip
        make_roberta(folder / "critic", width=width, layers=layers, heads=4)


def make(name: str, folder: Path) -> Contestant:
    """The contestant of this name with the models of `folder`, its replay filled, its work counted."""
    torch.manual_seed(0)
    policy, critic = folder / "policy", folder / "critic"
    rates = (HEADS_LR if name == SHARED else CRITIC_LR, LM_LR, ACCUMULATE, 0.95, 0.1, CRITIC_STEPS, 1.0, ACTOR_STEPS)
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        if name in (RIVAL, LEAN):
            accelerator = PlainAccelerator()
            width = json.loads((critic / "config.json").read_text())["hidden_size"]
            agent: Any = PlainAgent("cpu", accelerator, policy, critic, in_dim=width)
            trainer: Any = (PlainTrainer if name == RIVAL else LeanTrainer)(agent, accelerator, agent.tokenizer, *rates)
            replay: Any = PlainBuffer(BATCH, 10_000)
        else:
            mode = "shared" if name == SHARED else "exact"
            agent = ArcherAgent("cpu", PlainAccelerator(), str(policy), str(critic), None)
            trainer = ArcherTrainer(agent, agent.accelerator, agent.tokenizer, *rates, mode=mode)
            replay = ReplayBuffer(BATCH, 10_000)
    for transition in transitions(GAMES):
        replay.insert(**transition)
    work = Work()
    work.watch_policy(getattr(agent.model, "base_model", agent.model))
    if name == SHARED:
        work.watch_encoder(agent.critic.features.trunk._copy.model.base_model)
    else:
        for one in (agent.critic, agent.target_critic):
            work.watch_encoder(one.base_lm)
    if name in (RIVAL, LEAN):
        agent.work = work
    return Contestant(agent, trainer, replay, work)


class LeanTrainer(PlainTrainer):
    """The rival without what a user can switch off in a minute: anomaly detection, and the DataLoader of drawn rows."""

    def update(self, replay_buffer: Any, no_update_actor: bool = False) -> dict[str, Any]:
        before = torch.autograd.set_detect_anomaly
        torch.autograd.set_detect_anomaly = lambda mode: contextlib.nullcontext()  # type: ignore[assignment, misc]
        try:
            return super().update(replay_buffer, no_update_actor)
        finally:
            torch.autograd.set_detect_anomaly = before

    def _draw(self, replay_buffer: PlainBuffer, rows: int) -> Any:
        drawn = replay_buffer.sample(self.grad_accum_steps * replay_buffer.batch_size)
        return [
            {name: column[i : i + rows].tolist() if column.dtype == object else torch.from_numpy(column[i : i + rows])
             for name, column in drawn.items()}
            for i in range(0, len(drawn["reward"]), rows)
        ]  # fmt: skip


def transitions(num_games: int, num_objects: int | None = None) -> list[dict[str, Any]]:
    """Twenty Questions as the original tells it, with so many of the 157 objects, by the mediocre scripted player."""
    found = []
    for seed in range(num_games):
        game = play_scripted(TASK.make_env(objects=num_objects), TASK.make_player(), seed)
        text = "Questions:\n"
        for i, (action, reward) in enumerate(zip(game.actions, game.rewards, strict=True)):
            last = i + 1 == len(game.actions)
            answer = ("Yes." if game.terminated else "No.") if last else game.observations[i + 1].strip()
            after = f"{text}{action} {answer}\n"
            found.append(
                {"observation": text, "action": action, "reward": float(reward), "next_observation": after,
                 "done": last, "mc_return": 0.0}
            )  # fmt: skip
            text = after
    return found
