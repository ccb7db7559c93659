"""The memory of a large trajectory buffer while it fills, and while as much again goes through it.

Games of 20 turns with about 12 action and 8 observation tokens a turn (lognormal) are pushed in bulk until the buffer
is full, then as many again, each of which evicts an old one. Printed: what the buffer says it holds and what the
process has grown by, in bytes a stored token. The command fails where a growth exceeds 8 bytes a token.

    python benchmarks/buffer_memory.py                    10 M turns, some 2 GB, 20 s
    python benchmarks/buffer_memory.py --turns 2_000_000
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from archer_fast.buffer import TrajectoryBuffer
from archer_fast.trajectory_arrays import TrajectoryArrays

TURNS_A_GAME, GAMES_A_BATCH = 20, 2_500
NUM_BATCHES = 8  # different ones, pushed by turns
LIMIT = 8.0  # bytes a token
# What the buffer knows of its vocabulary, and whether it is drawn from by priority.
CASES = {
    "int32": (None, False),
    "uint16 (vocab_size=50257)": (50257, False),
    "int32, priorities": (None, True),
    "uint16, priorities": (50257, True),
}


def lognormal_lengths(rng: np.random.Generator, mean: float, count: int) -> np.ndarray:
    """Lengths of 1 and more, [count] int32, with about this mean; every tenth is twice as long as the median."""
    sigma = 0.5
    drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.maximum(1, np.rint(drawn)).astype(np.int32)


def make_batch(seed: int) -> TrajectoryArrays:
    rng = np.random.default_rng(seed)
    num_turns = GAMES_A_BATCH * TURNS_A_GAME
    observations, actions = lognormal_lengths(rng, 8, num_turns), lognormal_lengths(rng, 12, num_turns)
    num_tokens = (observations + actions).reshape(GAMES_A_BATCH, TURNS_A_GAME).sum(axis=1, dtype=np.int32)
    terminated = rng.random(GAMES_A_BATCH) < 0.5
    return TrajectoryArrays(
        tokens=rng.integers(0, 50257, num_tokens.sum(), np.int32),
        num_tokens=num_tokens,
        num_turns=np.full(GAMES_A_BATCH, TURNS_A_GAME, np.int32),
        observation_lengths=observations,
        action_lengths=actions,
        rollout_logprobs=-rng.random(actions.sum(), np.float32),
        rewards=rng.normal(size=num_turns).astype(np.float32),
        policy_versions=np.full(num_turns, seed, np.int64),
        terminated=terminated,
        truncated=~terminated,
        task_ids=np.zeros(GAMES_A_BATCH, np.int32),
    )


def status_bytes(key: str) -> int:
    """A size out of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def measure(case: str, num_turns: int) -> bool:
    """Run a case in this process and print its two rows; whether all is within the limit."""
    vocab_size, has_priorities = CASES[case]
    batches = [make_batch(seed) for seed in range(NUM_BATCHES)]
    count = -(-num_turns // (GAMES_A_BATCH * TURNS_A_GAME))
    order = [i % NUM_BATCHES for i in range(count)]
    max_tokens = sum(batches[i].tokens.size for i in order)

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM is now what VmRSS is
    before = status_bytes("VmRSS")
    buffer = TrajectoryBuffer(max_tokens, count * GAMES_A_BATCH, vocab_size=vocab_size)
    is_within = True
    for name in ("filled", "as many again"):
        begin = time.perf_counter()
        for i in order:
            buffer.extend_arrays(batches[i])
            if has_priorities:
                turn_ids, weights = buffer.sample_prioritised(256)
                buffer.update_priorities(turn_ids, 0.5 + weights)
        seconds = time.perf_counter() - begin
        stats = buffer.stats()
        held = stats.num_bytes / stats.num_tokens
        grown, peak = ((status_bytes(key) - before) / stats.num_tokens for key in ("VmRSS", "VmHWM"))
        assert stats.num_tokens > 0.99 * max_tokens
        print(
            f"| {case} | {name} | {stats.num_turns / 1e6:.1f} M | {stats.num_tokens / 1e6:.1f} M | "
            f"{stats.num_evicted:,} | {held:.2f} | {grown:.2f} | {peak:.2f} | {max_tokens / seconds / 1e6:.0f} |",
            flush=True,
        )
        is_within &= max(held, grown, peak) <= LIMIT
    return is_within


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10_000_000, help="how many the buffer holds (default 10,000,000)")
    parser.add_argument("--case", choices=CASES, help="this one alone, in this process")
    args = parser.parse_args()
    if args.case:
        return 0 if measure(args.case, args.turns) else 1
    print("| tokens | | turns | tokens | evicted | num_bytes a token | RSS | peak RSS | M tokens/s |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    command = [sys.executable, __file__, "--turns", str(args.turns), "--case"]
    codes = [subprocess.run([*command, case], check=False).returncode for case in CASES]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
