"""Twenty games over the ranks of torchrun, two of which fail; SHARE of them may.

torchrun --standalone --nproc-per-node 2 tests/ranked_games.py SHARE
"""

from __future__ import annotations

import logging
import sys
import threading

import numpy as np

from archer_fast.envs.base import StepResult
from archer_fast.ranks import joined_ranks
from archer_fast.rollout.interact import FinishedAction, TooManyDroppedGames
from archer_fast.rollout.shared import play_shared


class Engine:
    """Answers at once."""

    num_slots, max_new_tokens, stop_token_id = 4, 1, 0

    def __init__(self) -> None:
        self.waiting: list[int] = []

    def begin(self, slot: int) -> None: ...
    def observe(self, slot: int, observation_ids: object) -> None:
        self.waiting.append(slot)

    def room(self, slot: int) -> int:
        return 100

    def release(self, slot: int) -> None: ...
    def step(self) -> list[FinishedAction]:
        slots, self.waiting = self.waiting, []
        return [FinishedAction(slot, np.array([5, 0], np.int32), np.zeros(2, np.float32)) for slot in slots]


class Env:
    """Games 4 and 8 fail; what the others tell cannot be sent to another process."""

    name, step_time_limit, options = "faulty", None, {}  # type: ignore[var-annotated]

    def reset(self, seed: int, options: object = None) -> str:
        if seed in (4, 8):
            raise RuntimeError("broken")
        return "begin"

    def step(self, action: str) -> StepResult:
        return StepResult("end", 1.0, True, False, {"lock": threading.Lock(), "won": True})


def main(share: float) -> None:
    logging.disable()
    with joined_ranks(seconds=30) as ranks:
        played = play_shared(
            ranks,
            Engine(),
            Env,  # type: ignore[arg-type]
            lambda text: [1, 2],
            lambda ids: "x",
            range(20),
            max_dropped_share=share,
            on_call=lambda what: None,
        )
        seeds = [game.info["seed"] for game in played.trajectories]
        assert seeds == [seed for seed in range(20) if seed not in (4, 8)] and all(
            g.info["won"] for g in played.trajectories
        )
        print(f"{len(seeds)} games, {played.num_dropped} dropped")


if __name__ == "__main__":
    try:
        main(float(sys.argv[1]))
    except TooManyDroppedGames as error:
        raise SystemExit(str(error)) from None
