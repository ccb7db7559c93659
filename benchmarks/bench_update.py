"""Updates and rollouts against the number of turns, and an iteration by phase: the page docs/update_benchmarks.md.

.venv/bin/python benchmarks/bench_update.py --page docs/update_benchmarks.md

Every cell is a process of its own, on one thread; nothing else should run. About 15 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peak_memory import peak_growth
from report_page import Section, page, provenance
from row_a_turn import RowATurn

from archer_fast.algorithms import make_learner
from archer_fast.backbone import Backbone, build_causal_lm
from archer_fast.buffer import TrajectoryBuffer
from archer_fast.config import ActorConfig, BufferConfig, Config, CriticConfig, ModelConfig, RolloutConfig
from archer_fast.meters import Meters
from archer_fast.rollout.embedded import EmbeddedEngine
from archer_fast.trajectory import Trajectory, Turn
from archer_fast.turn_features import FeatureLayout

OBSERVATION, ACTION, GAMES, ROUNDS = 16, 8, 4, 3  # tokens a turn, games an update
TURNS = (5, 10, 20, 40, 80)
PLAIN_UP_TO = 20  # turns of the baseline, whose time grows with their square
VOCAB = 8192
MODEL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}
ROLLOUT_GAMES = 32

# Options of `archer-fast train` beside the default's, 10 objects.
MODES = {
    "the default": [],
    "critic.trunk shared": ["--critic.trunk", "shared"],
    "critic.trunk separate": ["--critic.trunk", "separate"],
    "critic.value_target resample": ["--critic.value-target", "resample"],
    "adapters of rank 8": ["--model.lora.rank", "8"],
    "activation checkpointing": ["--model.activation-checkpointing"],
    "the published algorithm": ["--preset", "archer-exact"],
    "PPO": ["--preset", "ppo"],
}
PHASES = ("rollout", "critic", "actor")

NOTE = f"""\
One update of {GAMES} games: reading them, one critic step over all turns, one actor step with KL to the start. A turn
has {OBSERVATION} + {ACTION} tokens; a random Qwen2-like model of 4 layers of {MODEL["hidden_size"]}, {VOCAB} tokens,
float32; median of {ROUNDS} rounds after one. *A row a turn*: `benchmarks/row_a_turn.py`, batches of 16 rows. Memory is
what the process grows by from before the first weight to its peak: weights, optimizers, activations. Ours computes no
logits but at actions and reads each game once; *frozen* trains the critic's heads alone on the start policy's features,
*shared* the actor's trunk too, *separate* an encoder of its own as the baseline does."""
ROLLOUT_NOTE = f"""\
{ROLLOUT_GAMES} games in step by the same model, {OBSERVATION} + {ACTION} tokens a turn, nothing stops early. The
embedded engine keeps keys and values over turns and records log-probs; `generate` of transformers reads the whole
history each turn (and records none)."""
PHASE_NOTE = """\
Seconds an iteration of `archer-fast train` on Twenty Questions with 10 objects, 32 games, the embedded model on one
thread, median of the iterations after a warm-up of one."""


def games(turns: int, seed: int = 0) -> list[Trajectory]:
    rng = np.random.default_rng(seed)

    def ids(n: int) -> Any:
        return rng.integers(1, VOCAB, n).astype(np.int32)

    def turn() -> Turn:
        return Turn(ids(OBSERVATION), ids(ACTION), -rng.random(ACTION).astype(np.float32) - 9.0, float(rng.normal()), 0)

    return [
        Trajectory(tuple(turn() for _ in range(turns)), ids(OBSERVATION), True, False, {"seed": seed + game})
        for game in range(GAMES)
    ]


def ours(trunk: Any, turns: int) -> Any:
    """An update by the real learner."""
    config = Config(
        model=ModelConfig(path="x"),
        rollout=RolloutConfig(games=GAMES, num_slots=GAMES, max_new_tokens=ACTION),
        buffer=BufferConfig(max_trajectories=GAMES),
        critic=CriticConfig(trunk=trunk, epochs=1, batch_turns=GAMES * turns, warmup_iterations=0),
        actor=ActorConfig(epochs=1, batch_games=GAMES, actions="logged", advantage="residual", max_kl_step=1e9),
    )
    start = Backbone(build_causal_lm("qwen2", **MODEL), None).requires_grad_(False)
    actor = start.frozen_copy().requires_grad_(True)
    engine = EmbeddedEngine(actor, 0, num_slots=GAMES, max_new_tokens=ACTION)
    row_bytes = FeatureLayout.of(start).row_bytes if config.keeps_features else 0
    buffer = TrajectoryBuffer(1 << 16, GAMES, 0, vocab_size=VOCAB, feature_bytes=row_bytes, max_feature_memory=1 << 30)
    learner = make_learner(config, actor, start, engine, buffer)

    def update(played: list[Trajectory]) -> None:
        learner.insert(played, Meters())
        learner.update_critic(Meters())
        learner.update_actor(Meters())

    return update


def update_cell(who: str, turns: int) -> dict[str, float]:
    seconds: list[float] = []

    def run() -> None:
        torch.manual_seed(0)
        update = RowATurn(build_causal_lm("qwen2", **MODEL)).update if who == "plain" else ours(who, turns)
        for i in range(1 + ROUNDS):
            played = games(turns, seed=100 * i)
            begin = time.perf_counter()
            update(played)
            seconds.append(time.perf_counter() - begin)

    memory = peak_growth(run)
    return {"seconds": statistics.median(seconds[1:]), "memory": memory}


def rollout_cell(who: str, turns: int) -> dict[str, float]:
    from bench_rollout import FullPrefixEngine

    torch.manual_seed(0)
    backbone = Backbone(build_causal_lm("qwen2", **MODEL), None)
    assert ACTION == 8, "bench_rollout.MAX_NEW_TOKENS"
    engine: Any = (
        EmbeddedEngine(backbone, -1, num_slots=ROLLOUT_GAMES, max_new_tokens=ACTION)
        if who == "embedded"
        else FullPrefixEngine(backbone, VOCAB - 1, ROLLOUT_GAMES)
    )
    if who != "embedded":
        engine.model.generation_config.eos_token_id = None
    seconds = []
    for seed in range(1 + ROUNDS):
        rng = np.random.default_rng(seed)
        begin = time.perf_counter()
        for slot in range(ROLLOUT_GAMES):
            engine.begin(slot)
        for _ in range(turns):
            for slot in range(ROLLOUT_GAMES):
                engine.observe(slot, rng.integers(1, VOCAB - 1, OBSERVATION).tolist())
            waiting = ROLLOUT_GAMES
            while waiting:
                waiting -= len(engine.step())
        seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds[1:])}


def phase_cell(mode: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        common = ["--iterations", "6", "--eval.every", "0", "--eval.final-games", "8", "--out", str(out)]
        more = ["--critic.warmup-iterations", "1"] if mode != "PPO" else []
        command = [sys.executable, "-m", "archer_fast", "train", *MODES[mode], *more, *common, "--rollout.games", "32"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = [row for row in rows if row.get("seconds_actor", 0) > 0]
    return {phase: statistics.median(row[f"seconds_{phase}"] for row in timed) for phase in PHASES}


CELLS = {"update": update_cell, "rollout": rollout_cell, "phase": phase_cell}


def measured(cell: str, *args: Any) -> dict[str, float]:
    """In a process of its own, on one thread."""
    command = [sys.executable, __file__, "--cell", json.dumps([cell, *args])]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    print(cell, *args, done.stdout.strip(), file=sys.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def update_section() -> Section:
    rows = []
    for turns in TURNS:
        plain = measured("update", "plain", turns) if turns <= PLAIN_UP_TO else None
        for trunk in ("frozen", "shared", "separate"):
            found = measured("update", trunk, turns)
            ratio = f"{plain['seconds'] / found['seconds']:.1f}" if plain else ""
            share = f"{found['memory'] / plain['memory']:.2f}" if plain else ""
            rows.append(
                (
                    str(turns),
                    f"ours, {trunk}",
                    f"{found['seconds']:.3f}",
                    f"{1e3 * found['seconds'] / (GAMES * turns):.2f}",
                    f"{found['memory'] / 1e6:.0f}",
                    ratio,
                    share,
                )
            )
        if plain:
            rows.append(
                (
                    str(turns),
                    "a row a turn",
                    f"{plain['seconds']:.3f}",
                    f"{1e3 * plain['seconds'] / (GAMES * turns):.2f}",
                    f"{plain['memory'] / 1e6:.0f}",
                    "1.0",
                    "1.00",
                )
            )
    header = ("turns", "who", "s", "ms a turn", "MB", "times as fast", "of its memory")
    return Section("Updates against turns", NOTE, header, rows, 2)


def rollout_section() -> Section:
    rows = []
    for turns in (5, 20):
        embedded, plain = measured("rollout", "embedded", turns), measured("rollout", "generate", turns)
        ratio = plain["seconds"] / embedded["seconds"]
        rows.append((str(turns), f"{embedded['seconds']:.2f}", f"{plain['seconds']:.2f}", f"{ratio:.1f}"))
    header = ("turns", "embedded, s", "generate, s", "times as fast")
    return Section("Rollouts against turns", ROLLOUT_NOTE, header, rows, 1)


def phase_section() -> Section:
    rows = []
    for mode in MODES:
        found = measured("phase", mode)
        rows.append((mode, *(f"{found[phase]:.2f}" for phase in PHASES), f"{sum(found.values()):.2f}"))
    return Section("An iteration by phase", PHASE_NOTE, ("settings", *PHASES, "together"), rows, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="write the page here")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        name, *rest = json.loads(args.cell)
        torch.set_num_threads(1)
        print(json.dumps(CELLS[name](*rest)))
        return
    facts = provenance() | {"torch": f"{torch.__version__}, 1 thread", "GPU": "not measured: this page is of the CPU"}
    text = page("updates, rollouts and iterations", facts, [update_section(), rollout_section(), phase_section()])
    print(text)
    if args.page:
        args.page.write_text(text)


if __name__ == "__main__":
    main()
