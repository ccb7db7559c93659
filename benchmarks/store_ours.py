"""Ours: archer_fast's trajectory buffer."""

from __future__ import annotations

from buffer_batches import transitions_of_lines
from buffer_work import Transition, Work

from archer_fast.buffer import TrajectoryBuffer
from archer_fast.padding import PaddedTransitions
from archer_fast.staging import StagingSlots, fresh
from archer_fast.trajectory_arrays import TrajectoryArrays
from archer_fast.transitions import TransitionArrays


class OurStore:
    def __init__(self, work: Work, *, keeps_memory: bool = True, is_narrow: bool = False) -> None:
        vocab_size = work.words.vocab_size if is_narrow else None
        self.buffer = TrajectoryBuffer(work.num_tokens, work.num_games, vocab_size=vocab_size)
        self.memory = StagingSlots() if keeps_memory else fresh
        self.threads = 1

    def set_threads(self, threads: int) -> None:
        self.threads = threads

    def prepare(self, part: Work) -> TrajectoryArrays:
        return part.arrays

    def insert(self, prepared: TrajectoryArrays) -> None:
        self.buffer.extend_arrays(prepared)

    def sample_collate_packed(self, n: int) -> TransitionArrays:
        turn_ids = self.buffer.sample_turns(n)
        return self.buffer.collate_transitions(turn_ids, memory=self.memory, threads=self.threads)

    def sample_collate_padded(self, n: int) -> PaddedTransitions:
        turn_ids = self.buffer.sample_turns(n)
        return self.buffer.collate_padded_transitions(turn_ids, 0, memory=self.memory, threads=self.threads)

    def padded_transitions(self, batch: PaddedTransitions) -> list[Transition]:
        return transitions_of_lines(batch)

    def num_bytes(self) -> int:
        return self.buffer.stats().num_bytes
