"""What the buffer's benchmarks measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Form = Literal["packed", "padded"]
OURS = "ours, memory kept"  # whom the targets are about


class Condition(NamedTuple):
    """How 256 transitions are drawn and collated."""

    form: Form = "packed"
    threads: int = 1
    is_cold: bool = False  # other memory was read through the cache since the last call
    is_disturbed: bool = False  # by a Python thread that computes without end

    def __str__(self) -> str:
        return f"{self.form}-{self.threads}-{'cold' if self.is_cold else 'busy' if self.is_disturbed else 'hot'}"


HOT, COLD, DISTURBED = Condition(), Condition(is_cold=True), Condition(is_disturbed=True)
CONDITIONS = (
    HOT,
    Condition("padded"),
    Condition(threads=2),
    Condition("padded", threads=2),
    COLD,
    Condition(threads=2, is_cold=True),
    DISTURBED,
    Condition("padded", is_disturbed=True),
)


class Copied(NamedTuple):
    """By the fastest memcpy there is."""

    num_bytes: int
    seconds: float


@dataclass
class ReplayRow:
    """One store. None, or not there: not measured, and `remark` says why."""

    name: str
    family: str
    remark: str = ""
    insert_seconds: float | None = None  # of the whole work
    num_bytes: int | None = None  # held
    batch_bytes: int | None = None  # of 256 transitions, packed
    seconds: dict[Condition, float] = field(default_factory=dict)  # of 256 transitions


class BandwidthRow(NamedTuple):
    """Our collation into memory that is there already, beside a memcpy of as many bytes."""

    source: str
    batch: str
    threads: int
    is_cold: bool
    num_bytes: int  # written
    seconds: float
    copied: Copied
    wanted: float  # share

    @property
    def share(self) -> float:
        return share(self.num_bytes, self.seconds, self.copied)


class Target(NamedTuple):
    """One promise and what became of it: Target("insert, tokens/s", "at least 50 M", "71 M", True)."""

    what: str
    wanted: str
    got: str
    is_met: bool


@dataclass
class ReplayReport:
    num_transitions: int = 0
    num_tokens: int = 0
    logprob_bytes: int = 0  # what the work's log-probs take, 4 bytes an action token
    num_drawn: int = 0
    cold_bytes: int = 0  # read between cold calls
    rows: list[ReplayRow] = field(default_factory=list)
    copied: dict[Condition, Copied] = field(default_factory=dict)
    large_copies: dict[int, Copied] = field(default_factory=dict)  # by threads: of more than the caches hold
    bandwidth: list[BandwidthRow] = field(default_factory=list)
    other_targets: list[Target] = field(default_factory=list)


def share(num_bytes: int, seconds: float, copied: Copied) -> float:
    return (num_bytes / seconds) / (copied.num_bytes / copied.seconds)
