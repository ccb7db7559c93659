"""Memory for batches that go to a device: page-locked where that is a GPU, and kept until the copy is through."""

from __future__ import annotations

from collections import deque

import torch

from archer_fast.staging import StagingSlots, UInt8, fresh


class DeviceStaging:
    """`memory` is for whoever collates; whoever copies to the device says so with `keep_until_copied`.

        arrays = buffer.collate(ids, memory=staging.memory)
        batch = PackedBatch.from_arrays(arrays, device)         # does not wait for the copies
        staging.keep_until_copied(arrays)

    On a CPU nothing is copied: the tensors are the memory, which comes back when they die.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda, self._device = device.type == "cuda", device
        self.memory = StagingSlots(_page_locked if self._is_cuda else fresh)
        self._in_flight: deque[tuple[torch.cuda.Event, object]] = deque()

    def keep_until_copied(self, arrays: object) -> None:
        """`arrays`: what copies on the current stream read, all of which were asked for before this call."""
        if not self._is_cuda:
            return
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))
        self._in_flight.append((copied, arrays))
        while self._in_flight and self._in_flight[0][0].query():
            self._in_flight.popleft()


def _page_locked(num_bytes: int) -> UInt8:
    memory: UInt8 = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
    return memory
