"""The next items of an iterator, made in the background while the present one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
_END = object()


class Prefetcher(Generic[Item]):
    """Iterates over `items` in one thread of its own, `ahead` items further than whoever reads.

    With ahead=1 one item is used while one is made: double buffering. Items come in their order; what the iterator
    raises is raised in the place of the item that it could not make, and ends the iteration.

        with Prefetcher(buffer.collate(ids) for ids in draws) as batches:
            for batch in batches:
                ...                     # a `break` here cancels what was not begun and waits for what was
    """

    def __init__(self, items: Iterator[Item], ahead: int = 1) -> None:
        if ahead < 1:
            raise ValueError(f"ahead: wanted 1 or more, got {ahead}")
        self._items = items
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._pending: deque[Future[Item]] = deque()
        for _ in range(ahead):
            self._submit()

    def _submit(self) -> None:
        self._pending.append(self._pool.submit(next, self._items, _END))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if not self._pending:
            raise StopIteration
        try:
            item = self._pending.popleft().result()
        except BaseException:
            self.close()
            raise
        if item is _END:
            self.close()
            raise StopIteration
        self._submit()
        return item

    def close(self) -> None:
        """Ends the iteration: nothing is made any more when this returns. A second call does nothing."""
        self._pending.clear()
        self._pool.shutdown(cancel_futures=True)
        if hasattr(self._items, "close"):
            self._items.close()

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
