"""cpprb: a field a column, preallocated by its constructor; batches are added whole."""

from __future__ import annotations

import numpy as np
from buffer_batches import Packed
from buffer_rectangles import Rectangles, pack_rectangles, transitions_of
from buffer_work import Transition, Work


class CpprbStore:
    def __init__(self, work: Work, *, has_parts: bool = True) -> None:
        from cpprb import ReplayBuffer

        self.rectangles = Rectangles.of(work, has_parts=has_parts)
        columns = self.prepare(next(work.parts()))
        fields = {name: {"shape": column.shape[1:] or 1, "dtype": column.dtype} for name, column in columns.items()}
        self.buffer = ReplayBuffer(work.num_transitions, fields)
        self.bytes_a_row = sum(column[:1].nbytes for column in columns.values())

    def prepare(self, part: Work) -> dict[str, np.ndarray]:
        return self.rectangles.columns(part)

    def insert(self, prepared: dict[str, np.ndarray]) -> None:
        self.buffer.add(**prepared)

    def sample_collate_padded(self, n: int) -> dict[str, np.ndarray]:
        return self.buffer.sample(n)

    def sample_collate_packed(self, n: int) -> Packed:
        return pack_rectangles(self.buffer.sample(n))

    def padded_transitions(self, batch: dict[str, np.ndarray]) -> list[Transition]:
        return transitions_of(batch)

    def num_bytes(self) -> int:
        return self.bytes_a_row * self.buffer.get_buffer_size()
