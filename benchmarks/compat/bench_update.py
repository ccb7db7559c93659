"""One update of the original's kind, by the plain rival and by the drop-in, on the same replay and the same weights.

.venv/bin/python benchmarks/compat/bench_update.py --out docs/compat_benchmarks.md
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests/compat")]

from original import PlainAccelerator, PlainAgent, PlainBuffer, PlainTrainer, Work  # noqa: E402
from tiny_models import make_gpt2, make_roberta  # noqa: E402

from archer_fast.compat import update as update_module  # noqa: E402
from archer_fast.compat.algorithms.archer import ArcherTrainer  # noqa: E402
from archer_fast.compat.data import ReplayBuffer  # noqa: E402
from archer_fast.compat.models import ArcherAgent  # noqa: E402
from archer_fast.compat.policy import policy_of  # noqa: E402
from archer_fast.envs import play_scripted  # noqa: E402
from archer_fast.envs.twenty_questions import TASK  # noqa: E402

BATCH, ACCUMULATE, GAMES = 8, 32, 128
RIVAL, OURS = "the original, in plain words", "`archer_fast.compat`, exact"
PARTS = {  # of archer_fast.compat.update
    "sample_texts": "sampling a'",
    "critic_epoch": "critic epochs",
    "advantages_of": "advantages",
    "actor_epoch": "policy gradient",
}


def transitions(num_games: int) -> list[dict[str, Any]]:
    """Twenty Questions as the original tells it, 157 objects, by the mediocre scripted player."""
    found = []
    for seed in range(num_games):
        game = play_scripted(TASK.make_env(objects=None), TASK.make_player(), seed)
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


class Timers(dict[str, float]):
    @contextlib.contextmanager
    def on(self, owner: Any, name: str, label: str) -> Iterator[None]:
        """Add up the time in `owner.name` while the block runs."""
        before = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return before(*args, **kwargs)
            finally:
                self[label] = self.get(label, 0.0) + time.perf_counter() - begun

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, before)


def rival(policy: Path, critic: Path, width: int, epochs: int, anomaly: bool) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    accelerator = PlainAccelerator()
    agent = PlainAgent("cpu", accelerator, policy, critic, in_dim=width)
    trainer = PlainTrainer(agent, accelerator, agent.tokenizer, 2e-5, 1e-6, ACCUMULATE, 0.95, 0.1, epochs, 1.0, 1)
    if not anomaly:
        trainer.update = lambda *a: _without_anomaly(PlainTrainer.update, trainer, *a)
    return agent, trainer, PlainBuffer(BATCH, 10_000)


def _without_anomaly(update: Any, *args: Any) -> Any:
    before = torch.autograd.set_detect_anomaly
    torch.autograd.set_detect_anomaly = lambda mode: contextlib.nullcontext()  # type: ignore[assignment]
    try:
        return update(*args)
    finally:
        torch.autograd.set_detect_anomaly = before


def ours(policy: Path, critic: Path, epochs: int) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    agent = ArcherAgent("cpu", PlainAccelerator(), str(policy), str(critic), None)
    trainer = ArcherTrainer(
        agent, agent.accelerator, agent.tokenizer, 2e-5, 1e-6, ACCUMULATE, 0.95, 0.1, epochs, 1.0, 1
    )
    return agent, trainer, ReplayBuffer(BATCH, 10_000)


def measure(size: tuple[int, int], epochs: int, rounds: int, told: list[dict[str, Any]], folder: Path) -> list[str]:
    """The rows of one model size."""
    width, layers = size
    policy, critic = folder / f"gpt2-{width}", folder / f"roberta-{width}"
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        make_gpt2(policy, width=width, layers=layers, heads=4, initializer_range=0.3 * (32 / width) ** 0.5,
                  newline_boost=4, fragment_boost=-3)  # fmt: skip
        make_roberta(critic, width=width, layers=layers, heads=4)
        made = {
            RIVAL: rival(policy, critic, width, epochs, True),
            "the same without anomaly detection": rival(policy, critic, width, epochs, False),
            OURS: ours(policy, critic, epochs),
        }
    work = {name: Work() for name in made}
    for name, (agent, _, replay) in made.items():
        for t in told:
            replay.insert(**t)
        work[name].watch_policy(getattr(agent.model, "base_model", agent.model))
        for c in (agent.critic, agent.target_critic):
            work[name].watch_encoder(c.base_lm)
    times: dict[str, list[float]] = {name: [] for name in made}
    timers = Timers()
    for _ in range(rounds):
        for name, (_, trainer, replay) in made.items():
            work[name].clear()
            np.random.seed(0)  # noqa: NPY002, the original's source of draws
            torch.manual_seed(1)
            begun = time.perf_counter()
            with contextlib.ExitStack() as timed:
                for function, label in PARTS.items():
                    timed.enter_context(timers.on(update_module, function, label))
                trainer.update(replay)
            times[name].append(time.perf_counter() - begun)
    agent = made[OURS][0]
    first = statistics.median(times[RIVAL])
    rows = []
    for name in made:
        median, w = statistics.median(times[name]), work[name]
        calls = 0 if name == OURS else made[name][0].work.generate_calls // rounds
        rows.append(
            f"| {width} x {layers} | {name} | {median:.1f} | {first / median:.1f} | {calls or 'none'} | "
            f"{w.policy_tokens:,} | {w.encoder_sequences:,} | {w.encoder_tokens:,} |"
        )
    total = sum(times[OURS])
    shares = ", ".join(f"{label} {100 * seconds / total:.0f} %" for label, seconds in timers.items())
    actions = policy_of(agent)
    rows.append(f"\nWhere exact mode's time goes at {width} x {layers}: {shares}. Sampled actions so far: "
                f"{actions.num_sampled_actions:,} in {actions.num_passes} passes.\n")  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--epochs", type=int, default=2, help="critic steps (the original: 50); one actor step (3)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=["128x4"], help="WIDTHxLAYERS of policy and encoder")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    told = transitions(GAMES)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    lines = [
        "# One update of the original's kind, three ways\n",
        f"`{command}`, commit {commit.strip()}, {os.cpu_count()} cores ({platform.machine()}), no GPU, torch "
        f"{torch.__version__}, one thread; median of {asked.rounds} rounds in turn.\n",
        f"The same {len(told):,} transitions of {GAMES} scripted games of Twenty Questions (157 objects), the same "
        f"weights. {asked.epochs} critic steps instead of 50, 1 actor step instead of 3; {ACCUMULATE} x {BATCH} draws "
        "a step and 32 new tokens at most, as in the original. GPT-2 and RoBERTa of these sizes, made on the spot, "
        "random weights such that actions end after some 7 tokens. The rival, `benchmarks/compat/original.py`, is "
        "our own rewriting of the original, without its sleeps and copies.\n",
        "| size | | seconds | times as fast | `generate` calls | policy tokens | texts encoded | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        notes = []
        for size in asked.sizes:
            width, layers = map(int, size.split("x"))
            *rows, note = measure((width, layers), asked.epochs, asked.rounds, told, Path(folder))
            lines += rows
            notes.append(note)
            print("\n".join([*rows, note]), flush=True)
    text = "\n".join([*lines, *notes])
    if asked.out:
        asked.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
