"""The background iteration: in order, to its end, to an error, and cancelled in the middle."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from archer_fast.buffer import TrajectoryBuffer
from archer_fast.prefetch import Prefetcher
from archer_fast.staging import StagingSlots
from archer_fast.trajectory import Trajectory, Turn


def prefetch_threads() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


@pytest.mark.parametrize("ahead", [1, 2, 10])
def test_to_exhaustion(ahead: int) -> None:
    items = Prefetcher(iter(range(7)), ahead)
    assert list(items) == list(range(7))
    assert list(items) == []
    assert prefetch_threads() == 0
    assert list(Prefetcher(iter([]), ahead)) == []


def test_one_item_is_made_while_another_is_used() -> None:
    begun, go_on = [threading.Event() for _ in range(3)], threading.Event()

    def make() -> Iterator[str]:
        for i in range(3):
            begun[i].set()
            if i == 1:
                assert go_on.wait(10)
            yield threading.current_thread().name

    with Prefetcher(make()) as items:
        first = next(items)
        assert begun[1].wait(10), "the second is begun before anybody asks for it"
        assert not begun[2].is_set(), "and no third: one is used, one is made"
        go_on.set()
        assert first.startswith("prefetch")
        assert len(list(items)) == 2


def test_an_error_comes_in_the_place_of_its_item_and_ends_it() -> None:
    def make() -> Iterator[int]:
        yield from (0, 1)
        raise RuntimeError("disk gone")

    items = Prefetcher(make(), ahead=3)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(RuntimeError, match="disk gone"):
        next(items)
    assert list(items) == []
    assert prefetch_threads() == 0


def test_cancelled_in_the_middle() -> None:
    made, closed = [], []

    def make() -> Iterator[int]:
        try:
            for i in range(1000):
                made.append(i)
                yield i
        finally:
            closed.append(True)

    with Prefetcher(make(), ahead=2) as items:
        for item in items:
            if item == 3:
                break
    assert len(made) <= 4 + 2 + 1
    assert closed == [True]
    assert prefetch_threads() == 0
    items.close()


def test_an_error_of_the_reader_cancels_too() -> None:
    with pytest.raises(KeyboardInterrupt), Prefetcher(iter(range(1000))) as items:
        next(items)
        raise KeyboardInterrupt
    assert prefetch_threads() == 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="ahead: wanted 1 or more, got 0"):
        Prefetcher(iter([]), 0)


def test_batches_of_a_buffer_in_reused_memory() -> None:
    turn = [Turn(np.array([i, i]), np.array([i]), np.array([-1.0]), float(i), 0) for i in range(50)]
    buffer = TrajectoryBuffer(1000, 50)
    buffer.extend(Trajectory((t,), np.array([]), True, False) for t in turn)
    slots = StagingSlots()
    draws = [buffer.sample_turns(20) for _ in range(200)]
    with Prefetcher(buffer.collate_transitions(ids, memory=slots) for ids in draws) as batches:
        for ids, batch in zip(draws, batches, strict=True):
            assert batch.rewards.tolist() == ids.tolist()
            assert batch.input_ids.tolist() == np.repeat(ids, 3).tolist()
