"""Staging slots: whose memory comes back, when, and to whom."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from random_games import random_trajectories

from archer_fast.buffer import TrajectoryBuffer
from archer_fast.staging import StagingSlots, fresh


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_a_slot_comes_back_when_the_last_array_over_it_dies() -> None:
    slots = StagingSlots()
    first = slots(800)
    place = address(first)
    part = first.view(np.int32)[10:20].reshape(2, 5)
    del first
    second = slots(500)
    assert address(second) != place, "a view of a view still reads the slot"
    del part
    assert address(slots(500)) == place


def test_a_batch_keeps_its_slot_while_one_of_its_arrays_lives() -> None:
    buffer = TrajectoryBuffer(10_000, 100)
    buffer.extend(random_trajectories(8))
    slots = StagingSlots()
    batch = buffer.collate(np.arange(8), memory=slots)
    places = sorted(address(array) for array in batch)
    assert places == [address(array) for array in batch] and all(place % 16 == 0 for place in places)
    last, wanted = batch.rollout_logprobs, batch.rollout_logprobs.tolist()
    del batch
    other = buffer.collate(np.arange(8)[::-1], memory=slots)
    assert address(other.input_ids) not in places
    assert last.tolist() == wanted
    del last
    assert address(buffer.collate(np.arange(8), memory=slots).input_ids) == places[0]


def test_a_tensor_keeps_its_slot() -> None:
    torch = pytest.importorskip("torch", reason="the Python without torch; runs in .venv")
    slots = StagingSlots()
    array = slots(64).view(np.float32)
    array[:] = 2.0
    place, tensor = address(array), torch.from_numpy(array)
    weight = torch.ones(16, requires_grad=True)
    loss = (weight * tensor).sum()  # autograd keeps it, though no name does
    del array, tensor
    other = slots(64)
    assert address(other) != place
    other[:] = 0
    loss.backward()
    assert weight.grad is not None and weight.grad.tolist() == [2.0] * 16
    del loss
    gc.collect()
    assert address(slots(64)) == place


def test_a_slot_that_is_too_small_gives_way_to_a_larger_one() -> None:
    asked: list[int] = []

    def allocate(num_bytes: int) -> np.ndarray:
        asked.append(num_bytes)
        return fresh(num_bytes)

    slots = StagingSlots(allocate)
    slots(100)
    slots(120)  # within the quarter that is taken as a reserve
    assert asked == [125]
    slots(126)
    slots(100)
    assert asked == [125, 157]


def test_no_more_than_max_free_are_kept() -> None:
    slots = StagingSlots(max_free=2)
    arrays = [slots(10) for _ in range(5)]
    places = [address(array) for array in arrays]
    assert len(set(places)) == 5
    del arrays
    gc.collect()
    assert len(slots._free) == 2
    with pytest.raises(ValueError, match="max_free: wanted 1 or more, got 0"):
        StagingSlots(max_free=0)


def test_threads_never_share_a_slot() -> None:
    slots, faults = StagingSlots(), []

    def use(number: int) -> None:
        for _ in range(2000):
            array = slots(256)
            array[:] = number
            if (array != number).any():
                faults.append(number)

    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
