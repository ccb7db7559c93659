"""One update of the original's kind (50 critic steps, 3 actor steps of 32 x 8 draws), by the plain rival and by the
drop-in, on the same replay and the same weights. Each measurement is a process of its own, one after the other.

.venv/bin/python benchmarks/compat/bench_update.py --out docs/compat_benchmarks.md
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from update_case import (
    ACTOR_STEPS,
    BATCH,
    CRITIC_STEPS,
    EXACT,
    GAMES,
    LEAN,
    NAMES,
    RIVAL,
    SHARED,
    Contestant,
    make,
    make_models,
    transitions,
)

from peak_memory import peak_growth  # isort: skip
from report_page import Section, page, provenance  # isort: skip

RIVAL_CRITIC_STEPS = (
    4  # measured, of a rival, and 1 of the actor: its steps share nothing, so 50 cost 12.5 times as much
)
COUNTED = {
    "generate_calls": "`generate` calls",
    "policy_passes": "policy passes",
    "policy_tokens": "policy tokens",
    "encoder_passes": "critic passes",
    "encoder_sequences": "their rows",
    "encoder_tokens": "critic tokens",
}
TARGETS = {EXACT: 20, SHARED: 100}


def timed(one: Contestant, critic_steps: int, actor_steps: int) -> dict[str, float]:
    """Seconds and work of an update of so many steps, and how far above its start memory rose."""
    one.trainer.epochs, one.trainer.actor_epochs = critic_steps, actor_steps
    one.work.clear()
    begun = time.perf_counter()
    peak = peak_growth(lambda: one.trainer.update(one.replay))
    return {"seconds": time.perf_counter() - begun, "peak": peak, **dataclasses.asdict(one.work)}


def measure(name: str, folder: Path, threads: int, seed: int) -> dict[str, float]:
    """One whole update, in this process. A rival's is put together of its measured steps."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    one = make(name, folder)
    np.random.seed(seed)  # noqa: NPY002, the original's source of draws
    torch.manual_seed(seed)
    if name in (EXACT, SHARED):
        return timed(one, CRITIC_STEPS, ACTOR_STEPS)
    critic, actor = timed(one, RIVAL_CRITIC_STEPS, 0), timed(one, 0, 1)
    whole = {
        key: critic[key] * CRITIC_STEPS / RIVAL_CRITIC_STEPS + actor[key] * ACTOR_STEPS
        for key in critic.keys() - {"peak"}
    }
    return whole | {"peak": max(critic["peak"], actor["peak"])}


def in_a_process(name: str, folder: Path, threads: int, seed: int) -> dict[str, float]:
    """Errors: RuntimeError with the child's last words."""
    command = [sys.executable, __file__, "--child", json.dumps([name, str(folder), threads, seed])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["died without a word"])[-1])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def section(size: str, boost: float, threads: int, rounds: int) -> Section:
    """The table of one size of the models."""
    width, layers = map(int, size.split("x"))
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        make_models(folder, width, layers, boost)
        for seed in range(rounds):
            for name in NAMES:
                rows[name].append(in_a_process(name, folder, threads, seed))
                print(f"round {seed}: {name}: {rows[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
        tokens = action_tokens(folder)
    seconds = {name: [row["seconds"] for row in some] for name, some in rows.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[RIVAL], seconds[name], strict=True)) for name in NAMES
    }

    def cells(name: str) -> tuple[str, ...]:
        middle = {key: statistics.median(row[key] for row in rows[name]) for key in rows[name][0]}
        spread = f"{min(seconds[name]):.0f} to {max(seconds[name]):.0f}"
        peak = f"{middle['peak'] / 2**20:.0f}"
        counts = [f"{middle[key]:,.0f}" for key in COUNTED]
        return name, f"{middle['seconds']:.0f}", spread, f"{ratios[name]:.1f}", peak, *counts

    header = ("", "s", "of rounds", "times as fast", "peak MiB", *COUNTED.values())
    note = (
        f"GPT-2 and RoBERTa, random weights, such that an action has {tokens:.1f} tokens on average; "
        f"median of {rounds} rounds in turn, ratios within a round. {verdict(ratios)}"
    )
    title = f"{width} wide, {layers} layers, torch threads: {threads}"
    return Section(title, note, header, [cells(name) for name in NAMES], 1)


def action_tokens(folder: Path) -> float:
    """Mean length of an action that the policy samples."""
    agent, _, replay, _ = make(EXACT, folder)
    texts = agent.get_action(list(replay.sample(256)["observation"]))
    return float(np.mean([len(ids) for ids in agent.tokenizer(texts)["input_ids"]]))


def verdict(ratios: dict[str, float]) -> str:
    """Of each target, whether it is met."""
    said = [
        f"Target {target} for {name}: {'met' if ratios[name] >= target else '**missed**'} ({ratios[name]:.1f})."
        for name, target in TARGETS.items()
    ]
    return " ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of torch, a table for each")
    parser.add_argument("--newline-boost", type=float, default=6.0, help="the more, the shorter an action")
    parser.add_argument("--sizes", nargs="+", default=["128x4"], help="WIDTHxLAYERS of policy and encoder")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        name, folder, threads, seed = json.loads(asked.child)
        print(json.dumps(measure(name, Path(folder), threads, seed)))
        return
    sections = [
        section(size, asked.newline_boost, threads, asked.rounds) for size in asked.sizes for threads in asked.threads
    ]
    facts: dict[str, Any] = provenance() | {
        "what": f"one update: {CRITIC_STEPS} critic steps and {ACTOR_STEPS} actor steps of 32 x {BATCH} draws, 32 new "
        f"tokens an action at most, on {len(transitions(GAMES)):,} transitions of {GAMES} scripted games of Twenty "
        "Questions (157 objects), the same for all",
        "rival": "`benchmarks/compat/original.py`, the original rewritten in our words, without its sleeps and copies "
        f"of strings. {RIVAL_CRITIC_STEPS} of its critic steps and 1 of its actor's are measured and multiplied: they "
        f"share nothing. `{LEAN}`: without anomaly detection and DataLoaders",
        "drop-in": "the whole update is measured, of a trainer that has read nothing before",
        "GPU": "not measured",
    }  # fmt: skip
    text = page("drop-in: an update of the original's kind", facts, sections)
    if asked.out:
        asked.out.write_text(text)
    print(text)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main()
