"""Who looks on while a run works: the terminal, a test, nobody."""

from __future__ import annotations

from typing import Protocol


class Watcher(Protocol):
    """Told what happens; never asked anything."""

    def message(self, text: str) -> None:
        """One line to keep on the screen."""

    def phase(self, name: str, total: int | None) -> None:
        """The work of `total` steps (None: nobody knows) that now begins."""

    def advance(self, steps: int = 1) -> None:
        """Steps of the present phase that are done."""

    def calling(self, what: str) -> None:
        """What now begins and may take long, or never return: a call into an environment or engine, a large pass."""

    def iteration(self, number: int, total: int, metrics: dict[str, float]) -> None:
        """The metrics of an iteration that has ended."""


class SilentWatcher:
    """A watcher that says nothing."""

    def message(self, text: str) -> None: ...
    def phase(self, name: str, total: int | None) -> None: ...
    def advance(self, steps: int = 1) -> None: ...
    def calling(self, what: str) -> None: ...
    def iteration(self, number: int, total: int, metrics: dict[str, float]) -> None: ...
