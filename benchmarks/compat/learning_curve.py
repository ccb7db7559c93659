"""What is learned by the drop-in's two modes: the original's loop on Twenty Questions with 10 objects, answered by the
table of facts. The start policy is the embedded model, which clones the mediocre player in the original's telling of
a game. A line of JSON an iteration.

.venv/bin/archer-fast train --iterations 1 --out runs/start    # makes runs/start/start
.venv/bin/python benchmarks/compat/learning_curve.py --policy runs/start/start --clone runs/clone
.venv/bin/python benchmarks/compat/learning_curve.py --policy runs/clone --mode shared --out shared.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2] / "tests/compat")]

from original import PlainAccelerator  # noqa: E402
from tiny_models import make_roberta  # noqa: E402
from update_case import transitions  # noqa: E402

from archer_fast.compat.algorithms.archer import ArcherTrainer  # noqa: E402
from archer_fast.compat.data import ReplayBuffer  # noqa: E402
from archer_fast.compat.environment import BatchedTwentyQuestionsEnv, batch_interact_environment  # noqa: E402
from archer_fast.compat.generation import scored_actions  # noqa: E402
from archer_fast.compat.models import ArcherAgent  # noqa: E402
from archer_fast.compat.policy import policy_of  # noqa: E402
from archer_fast.envs.twenty_questions_objects import resolve_objects  # noqa: E402

CRITIC_LR = {"exact": 3e-4, "shared": 1e-3}  # of an encoder and its heads; of heads alone


class FewObjects(BatchedTwentyQuestionsEnv):
    """Games about the objects of our own task with that many."""

    def __init__(self, num_objects: int, seed: int) -> None:
        super().__init__(bsize=32, seed=seed)
        self._places = resolve_objects(num_objects)  # the table's order is that of word_list
        self._random = random.Random(seed)

    def reset(self, idx: int | None = None) -> list[str]:
        return [env.reset(self._random.choice(self._places)) for env in self.env_list]


def make_agent(policy: str) -> ArcherAgent:
    with tempfile.TemporaryDirectory() as folder:
        make_roberta(Path(folder) / "critic", width=128, layers=2, heads=4)
        return ArcherAgent(
            "cpu", PlainAccelerator(), policy, str(Path(folder) / "critic"), None, max_new_tokens=12,
            fix={"padding", "buffer", "dropout", "stop_token", "top_k"},
        )  # fmt: skip


def clone(agent: ArcherAgent, folder: Path, num_objects: int, num_games: int = 512, epochs: int = 6) -> None:
    """Maximise log pi(a | s) of the mediocre player's games, and write the policy to `folder`."""
    told = transitions(num_games, num_objects)
    observations, actions = [t["observation"] for t in told], [t["action"] for t in told]
    optimizer, policy = torch.optim.Adam(agent.model.parameters(), lr=1e-3), policy_of(agent)
    for epoch in range(epochs):
        total = 0.0
        for part in np.array_split(np.random.permutation(len(told)), len(told) // 512):  # noqa: NPY002
            optimizer.zero_grad()
            said = scored_actions(agent, [actions[i] for i in part])
            weights = torch.full((part.size,), 1 / part.size)
            logprobs = policy.policy_gradient(
                agent, [observations[i] for i in part], said, weights, torch.Tensor.backward
            )
            optimizer.step()
            total += float(logprobs.sum())
        print(f"clone, epoch {epoch}: {total / len(told):.3f} nats an action", flush=True)
    agent.model.save_pretrained(folder)
    agent.tokenizer.save_pretrained(folder)


def mean_return(games: Sequence[Sequence[dict[str, Any]]]) -> tuple[float, float]:
    """And its standard error."""
    returns = [sum(turn["reward"] for turn in game) for game in games]
    return float(np.mean(returns)), float(np.std(returns) / len(returns) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", required=True, help="folder of the start policy")
    parser.add_argument("--mode", choices=("exact", "shared"), default="shared")
    parser.add_argument("--out", type=Path, default=Path("curve.jsonl"))
    parser.add_argument("--clone", type=Path, help="make the start policy of this folder instead, from --policy")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2, help="iterations before the actor first moves")
    parser.add_argument("--games", type=int, default=128, help="an iteration")
    parser.add_argument("--objects", type=int, default=10)
    parser.add_argument("--lm-lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(asked.seed)
    np.random.seed(asked.seed)  # noqa: NPY002, the original's source of draws
    env, replay = FewObjects(asked.objects, asked.seed), ReplayBuffer(8, 100_000)
    agent = make_agent(asked.policy)
    if asked.clone:
        clone(agent, asked.clone, asked.objects)
        return
    trainer = ArcherTrainer(
        agent, agent.accelerator, agent.tokenizer, CRITIC_LR[asked.mode], asked.lm_lr,
        grad_accum_steps=32, gamma=0.95, tau=0.1, epochs=50, max_grad_norm=1.0, actor_epochs=3, mode=asked.mode,
    )  # fmt: skip
    begun, updating = time.process_time(), 0.0
    with asked.out.open("w") as file:
        for iteration in range(asked.iterations + 1):
            games = batch_interact_environment(agent, agent.tokenizer, env, asked.games)
            mean, error = mean_return(games)
            seconds = time.process_time() - begun
            row = {"iteration": iteration, "games": iteration * asked.games, "return": mean, "return_se": error,
                   "seconds": seconds, "seconds_updating": updating}  # fmt: skip
            print(json.dumps(row), file=file, flush=True)
            print(f"{asked.mode} {iteration}: {mean:.2f} +- {error:.2f}, {seconds:.0f} s", flush=True)
            for turn in (turn for game in games for turn in game):
                replay.insert(**turn)
            update_begun = time.process_time()
            trainer.update(replay, no_update_actor=iteration < asked.warmup)
            updating += time.process_time() - update_begun


if __name__ == "__main__":
    main()
