"""Transitions drawn from a replay of the original's kind."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from archer_fast.compat.overrides import is_ours


class Transitions(NamedTuple):
    """n transitions, field by field."""

    observation: list[str]
    action: list[str]
    reward: npt.NDArray[Any]  # [n]
    next_observation: list[str]
    done: npt.NDArray[Any]  # [n]
    mc_return: npt.NDArray[Any]  # [n]

    @property
    def num(self) -> int:
        return len(self.observation)

    def part(self, rows: slice) -> dict[str, Any]:
        """Some of them as keyword arguments of `critic_loss` and `actor_loss`."""
        return {name: values[rows] for name, values in self._asdict().items()}

    def micro_batches(self, size: int) -> list[slice]:
        """The rows of each micro-batch: `size` of them, in the order in which they were drawn."""
        return [slice(begin, min(begin + size, self.num)) for begin in range(0, self.num, size)]


def draw(replay_buffer: Any, num: int) -> Transitions:
    """`num` single draws, with replacement, by the replay's own `sample`."""
    if is_ours(replay_buffer, "sample"):
        drawn = replay_buffer.sample(num)
    else:
        singles = [replay_buffer.sample(1) for _ in range(num)]
        drawn = {name: np.array([one[name][0] for one in singles], object) for name in Transitions._fields}
    texts = ([str(text) for text in drawn[name]] for name in ("observation", "action", "next_observation"))
    numbers = (np.asarray(drawn[name].tolist()) for name in ("reward", "done", "mc_return"))
    (observation, action, following), (reward, done, mc_return) = texts, numbers
    return Transitions(observation, action, reward, following, done, mc_return)


def check_size(replay_buffer: Any) -> None:
    """ValueError for a replay that holds less than one batch."""
    if len(replay_buffer) < replay_buffer.batch_size:
        raise ValueError(
            f"replay_buffer: wanted at least batch_size = {replay_buffer.batch_size} transitions, "
            f"got {len(replay_buffer)}"
        )
