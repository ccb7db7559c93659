"""Transitions as columns of one length, padded: what a store of rectangles takes, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from buffer_batches import Packed, pack
from buffer_work import Transition, Work

PARTS = ("state", "action")  # of which the next state holds the tokens already


class Rectangles(NamedTuple):
    """How wide the columns are: the longest state, action and next state of a work.

    has_parts: state and action have columns of tokens too; else their lengths say where they lie in the next state.
    """

    state: int
    action: int
    next_state: int
    has_parts: bool

    @staticmethod
    def of(work: Work, *, has_parts: bool) -> Rectangles:
        lengths = work.state_ends, work.arrays.action_lengths, work.next_state_ends
        return Rectangles(*(int(column.max()) for column in lengths), has_parts)

    def columns(self, work: Work) -> dict[str, np.ndarray]:
        """[N] or [N, width]: tokens and lengths int32, the rest float32 and bool."""
        arrays, starts = work.arrays, work.starts
        columns = {
            "next_state": rectangle(arrays.tokens, starts, work.next_state_ends, self.next_state),
            "state_length": work.state_ends,
            "action_length": arrays.action_lengths,
            "next_state_length": work.next_state_ends,
            "reward": arrays.rewards,
            "terminated": work.terminated,
            "rollout_logprobs": rectangle(
                arrays.rollout_logprobs, work.logprob_starts, arrays.action_lengths, self.action
            ),
        }
        if self.has_parts:
            columns["state"] = rectangle(arrays.tokens, starts, work.state_ends, self.state)
            columns["action"] = rectangle(arrays.tokens, starts + work.state_ends, arrays.action_lengths, self.action)
        return columns


def rectangle(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """[n, width], zeros behind each row's length."""
    steps = np.arange(width)
    rows = flat.take(starts[:, None] + steps, mode="clip")
    rows[steps >= lengths[:, None]] = 0
    return rows


def pack_rectangles(batch: Mapping[str, np.ndarray]) -> Packed:
    """Of sampled columns: a next state's row is the whole sequence."""
    return pack(
        batch["next_state"],
        batch["state_length"].reshape(-1),
        batch["action_length"].reshape(-1),
        batch["next_state_length"].reshape(-1),
        batch["reward"].reshape(-1),
        batch["terminated"].reshape(-1),
        batch["rollout_logprobs"],
    )


def transitions_of(batch: Mapping[str, np.ndarray]) -> list[Transition]:
    """Of sampled columns that have parts."""

    def rows(name: str, length: str) -> list[np.ndarray]:
        return [row[:n] for row, n in zip(batch[name], batch[length].reshape(-1).tolist(), strict=True)]

    return [
        Transition(*row)
        for row in zip(
            rows("state", "state_length"),
            rows("action", "action_length"),
            rows("next_state", "next_state_length"),
            batch["reward"].reshape(-1).tolist(),
            batch["terminated"].reshape(-1).tolist(),
            rows("rollout_logprobs", "action_length"),
            strict=True,
        )
    ]
