"""A ragged arena in NumPy: every token once, in one flat array, and for each turn where its parts begin and end."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from buffer_batches import Packed, offsets, transitions_of_lines
from buffer_work import Transition, Work

from archer_fast.trajectory_arrays import TrajectoryArrays

# How ragged slices become one array; all three are measured.
#   gather  their elements' places, by repeat and arange, and one `take`
#   kept    the same into memory that is there already
#   slices  views of the slices, and one `concatenate`
Way = Literal["gather", "kept", "slices"]
START, STATE_END, ACTION_END, END, LOGPROB_START, LOGPROB_END = range(6)  # columns; the first four in tokens


class Padded(NamedTuple):
    """n transitions, a row each: state, action and what answered it, then zeros."""

    input_ids: np.ndarray  # [n, longest] int32
    attention_mask: np.ndarray  # [n, longest] bool
    action_mask: np.ndarray  # [n, longest] bool
    state_positions: np.ndarray  # [n], in the row
    rewards: np.ndarray  # [n]
    terminated: np.ndarray  # [n]
    rollout_logprobs: np.ndarray  # [A]
    cu_actions: np.ndarray  # [n + 1]


class ArenaStore:
    """Whatever it holds is overwritten from the beginning on once it is full: less work than to evict the oldest."""

    def __init__(self, work: Work, way: Way = "gather") -> None:
        self.way = way
        self.longest = int(work.arrays.num_tokens.max())
        self.tokens = np.zeros(work.num_tokens + self.longest, np.int32)
        # Row i is what begins at token i: padded rows are rows of this view.
        self.windows = np.lib.stride_tricks.sliding_window_view(self.tokens, self.longest)
        self.logprobs = np.empty(work.arrays.rollout_logprobs.size, np.float32)
        self.places = np.empty((work.num_transitions, 6), np.int64)
        self.rewards = np.empty(work.num_transitions, np.float32)
        self.terminated = np.empty(work.num_transitions, np.bool_)
        self.num_tokens = self.num_logprobs = self.num_turns = 0
        self.num_live = 0
        self.rng = np.random.default_rng(0)
        self.steps = np.arange(1 << 12)
        self.memory: dict[Any, np.ndarray] = {}

    def prepare(self, part: Work) -> TrajectoryArrays:
        return part.arrays

    def insert(self, prepared: TrajectoryArrays) -> None:
        if self.num_turns + prepared.rewards.size > self.rewards.size:
            self.num_tokens = self.num_logprobs = self.num_turns = 0
        tokens = slice(self.num_tokens, self.num_tokens + prepared.tokens.size)
        logprobs = slice(self.num_logprobs, self.num_logprobs + prepared.rollout_logprobs.size)
        turns = slice(self.num_turns, self.num_turns + prepared.rewards.size)
        self.tokens[tokens] = prepared.tokens
        self.logprobs[logprobs] = prepared.rollout_logprobs
        self.rewards[turns] = prepared.rewards

        last = prepared.num_turns.cumsum() - 1  # of each game
        game_ends = tokens.start + prepared.num_tokens.cumsum()
        turn_ends = (prepared.observation_lengths + prepared.action_lengths).cumsum()
        final_observations = prepared.num_tokens.cumsum() - turn_ends[last]  # of this game and those before
        skipped = np.append(0, final_observations[:-1]).repeat(prepared.num_turns)
        places = self.places[turns]
        places[:, START] = (game_ends - prepared.num_tokens).repeat(prepared.num_turns)
        places[:, ACTION_END] = tokens.start + turn_ends + skipped
        places[:, STATE_END] = places[:, ACTION_END] - prepared.action_lengths
        places[:-1, END] = places[1:, STATE_END]
        places[last, END] = game_ends
        places[:, LOGPROB_END] = logprobs.start + prepared.action_lengths.cumsum()
        places[:, LOGPROB_START] = places[:, LOGPROB_END] - prepared.action_lengths
        self.terminated[turns] = False
        self.terminated[turns][last] = prepared.terminated
        self.num_tokens, self.num_logprobs, self.num_turns = tokens.stop, logprobs.stop, turns.stop
        self.num_live = max(self.num_live, self.num_turns)

    def sample_collate_packed(self, n: int) -> Packed:
        ids = self.rng.integers(0, self.num_live, n)
        places = self.places.take(ids, 0)
        start, state_end, action_end, end, logprob_start, logprob_end = places.T
        cu_seqlens, cu_actions = offsets(end - start), offsets(logprob_end - logprob_start)
        moved = cu_seqlens[:-1] - start
        moved -= 1
        return Packed(
            self.ragged(self.tokens, start, end, cu_seqlens),
            cu_seqlens,
            state_end + moved,
            action_end + moved,
            self.rewards.take(ids),
            self.terminated.take(ids),
            self.ragged(self.logprobs, logprob_start, logprob_end, cu_actions),
            cu_actions,
        )

    def ragged(self, flat: np.ndarray, starts: np.ndarray, ends: np.ndarray, cu: np.ndarray) -> np.ndarray:
        if self.way == "slices":
            return np.concatenate([flat[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])
        where = np.repeat(starts - cu[:-1], ends - starts)
        if self.steps.size < where.size:
            self.steps = np.arange(2 * where.size)
        where += self.steps[: where.size]
        if self.way == "gather":
            return flat.take(where)
        # "clip": any other mode buffers what goes to `out`.
        return flat.take(where, out=self.kept(flat.dtype, where.size), mode="clip")

    def kept(self, dtype: np.dtype, size: int) -> np.ndarray:
        memory = self.memory.get(dtype)
        if memory is None or memory.size < size:
            memory = self.memory[dtype] = np.empty(2 * size, dtype)
        return memory[:size]

    def sample_collate_padded(self, n: int) -> Padded:
        ids = self.rng.integers(0, self.num_live, n)
        start, state_end, action_end, end, logprob_start, logprob_end = self.places.take(ids, 0).T
        cu_actions = offsets(logprob_end - logprob_start)
        lengths = (end - start).astype(np.int32)
        longest = int(lengths.max())
        steps = np.arange(longest, dtype=np.int32)
        attention_mask = steps < lengths[:, None]
        action_mask = steps < (action_end - start).astype(np.int32)[:, None]
        action_mask &= steps >= (state_end - start).astype(np.int32)[:, None]
        input_ids = self.windows[start, :longest]
        input_ids *= attention_mask
        return Padded(
            input_ids,
            attention_mask,
            action_mask,
            state_end - start - 1,
            self.rewards.take(ids),
            self.terminated.take(ids),
            self.ragged(self.logprobs, logprob_start, logprob_end, cu_actions),
            cu_actions,
        )

    def padded_transitions(self, batch: Padded) -> list[Transition]:
        return transitions_of_lines(batch)

    def num_bytes(self) -> int:
        arrays = self.tokens, self.logprobs, self.places, self.rewards, self.terminated
        return sum(array.nbytes for array in arrays)
