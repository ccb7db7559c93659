"""What a run does about a collapse: it says so, ends, or gives the actor its best policy back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from archer_fast.collapse import CollapseDetector, Row
from archer_fast.config import CollapseConfig


class CollapseResponse:
    """`restore` is called to give the actor its best policy back, and returns words that say which.

    After `check`, `stopped_by` is what ended the run, None while it goes on.
    """

    def __init__(self, config: CollapseConfig, restore: Callable[[], str], say: Callable[[str], None]) -> None:
        self.config, self.restore, self.say = config, restore, say
        self.detector = CollapseDetector(config)
        self.said: list[str] = []
        self.num_restores = 0
        self.stopped_by: str | None = None

    def check(self, row: Row) -> bool:
        """Whether the policy of this row has collapsed; what follows from it is done."""
        news = self.detector.see(row)
        collapsed = self.detector.collapsed
        if collapsed and self.config.action != "warn":
            if self.config.action == "restore" and self.num_restores < self.config.max_restores:
                self.num_restores += 1
                news.append(f"restore {self.num_restores} of {self.config.max_restores}: {self.restore()}")
                self.detector.forget()
            else:
                after = f", after {self.num_restores} restores" if self.num_restores else ""
                words = "; ".join(collapsed.values())
                self.stopped_by = f"collapse in iteration {int(row['iteration'])}{after}: {words}"
                news.append(f"stopped by the {self.stopped_by}")
        for text in news:
            self.say(text)
        self.said += news
        return bool(collapsed)

    def summary(self) -> dict[str, Any]:
        """What summary.json says of it: nothing where nothing was."""
        summary: dict[str, Any] = {"collapses": self.said, "restores": self.num_restores} if self.said else {}
        return summary if self.stopped_by is None else {**summary, "stopped_by": self.stopped_by}

    def state(self) -> dict[str, Any]:
        """As JSON has it, for a checkpoint."""
        return {
            "detector": self.detector.state(),
            "said": self.said,
            "num_restores": self.num_restores,
            "stopped_by": self.stopped_by,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`; KeyError names what is missing. What was stopped goes on if it is now to warn."""
        self.detector.load_state(state["detector"])
        self.said, self.num_restores = list(state["said"]), state["num_restores"]
        self.stopped_by = None if self.config.action == "warn" else state["stopped_by"]
