"""Who keeps transitions and gives them back as batches: the original's design, torchrl, cpprb, NumPy, ours.

Nobody is handicapped: each store is used as its own documentation says to use it well, what insertion takes is made
before the clock starts, and where there are several ways to do something, each is a row or the fastest runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from buffer_batches import Packed
from buffer_work import Transition, Work
from lm_head_rivals import Unavailable, brief
from store_arena import ArenaStore
from store_cpprb import CpprbStore
from store_list import ListStore
from store_original import OriginalStore
from store_ours import OurStore
from store_torchrl import TorchrlStore


class Store(Protocol):
    """Holds the last transitions, as many as a work has. `insert` is timed, and the two samplings; nothing else."""

    def prepare(self, part: Work) -> Any: ...  # what insert takes
    def insert(self, prepared: Any) -> None: ...
    def sample_collate_packed(self, n: int) -> Packed: ...
    def sample_collate_padded(self, n: int) -> Any: ...
    def padded_transitions(self, batch: Any) -> list[Transition]: ...
    def num_bytes(self) -> int: ...  # held, of a full store


@dataclass(frozen=True)
class Rival:
    name: str
    make: Callable[[Work], Store]
    family: str  # whose targets it counts for
    module: str | None = None  # of a package that may not be installed
    has_threads: bool = False  # the store has `set_threads`
    has_padded: bool = True
    remark: str = ""

    @property
    def is_ours(self) -> bool:
        return self.family == "ours"

    def store(self, work: Work) -> Store:
        """Empty. Errors: Unavailable."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            raise Unavailable("not installed (pip install archer-fast[bench])")
        try:
            return self.make(work)
        except Exception as error:
            if self.is_ours:
                raise
            raise Unavailable(f"cannot run here: {brief(error)}") from error


ALONE = "the next state alone is stored as tokens, of which state and action are parts"
RIVALS = (
    Rival(
        "original: strings, tokenised at read", OriginalStore, "original", has_threads=True, remark="keeps no log-probs"
    ),
    Rival("torchrl, tensors", TorchrlStore, "torchrl", "torchrl", has_threads=True),
    Rival("torchrl, memmap", partial(TorchrlStore, is_mapped=True), "torchrl", "torchrl", has_threads=True),
    Rival(
        "torchrl, tensors, one row",
        partial(TorchrlStore, has_parts=False),
        "torchrl",
        "torchrl",
        has_threads=True,
        has_padded=False,
        remark=ALONE,
    ),
    Rival("torchrl, list", ListStore, "torchrl", "torchrl", remark="ragged items, collated by NumPy"),
    Rival("cpprb", CpprbStore, "cpprb", "cpprb"),
    Rival("cpprb, one row", partial(CpprbStore, has_parts=False), "cpprb", "cpprb", has_padded=False, remark=ALONE),
    Rival("NumPy arena, gather", ArenaStore, "arena"),
    Rival("NumPy arena, gather, memory kept", partial(ArenaStore, way="kept"), "arena", has_padded=False),
    Rival("NumPy arena, slices", partial(ArenaStore, way="slices"), "arena", has_padded=False),
    Rival("ours, new memory", partial(OurStore, keeps_memory=False), "ours", has_threads=True),
    Rival("ours, memory kept", OurStore, "ours", has_threads=True),
    Rival("ours, memory kept, 2-byte tokens", partial(OurStore, is_narrow=True), "ours", has_threads=True),
)
