"""Passes of the embedded engine as CUDA graphs: a decode step of a large model is launched at once."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from archer_fast.backbone import Backbone
from archer_fast.rollout.kv_cache import SlotCache, TokenPass

logger = logging.getLogger(__name__)

# Numbers of tokens that have a graph; a pass takes the next larger one. Up to some 128 tokens the weights' bytes
# decide a pass's time, not the tokens, so that the rest costs nothing; prompts go kernel by kernel.
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

Replay = Callable[[], None]


class GraphedPasses:
    """One graph for each of SIZES that is met, captured at its first use, over one cache of keys and values.

    A graph knows its tensors by address: the weights must be updated in place (they are looked at in `reset`), and a
    cache that has grown gets new graphs. Tokens that fill a pass write to a slot of their own, which nobody reads.
    """

    def __init__(self, backbone: Backbone, num_slots: int, max_tokens: int) -> None:
        self._backbone = backbone
        self._spare = num_slots
        self.cache = SlotCache(backbone.num_layers, num_slots + 1, max_tokens)
        device = backbone.device
        # Of a pass: token ids, positions, slots.
        self._inputs = torch.zeros(3, SIZES[-1], dtype=torch.int64, device=device)
        self._hidden: dict[int, Tensor] = {}
        self._graphs: dict[int, Replay] = {}
        self._capacity = 0
        self._addresses: list[int] = []
        self._pool: Any = None  # torch's handle of the memory that all graphs share
        self._is_impossible = False  # something in this model's pass cannot be captured

    def reset(self) -> None:
        """Before a rollout: forget graphs of weights that are not where they were."""
        if self._backbone.sharding is not None:  # gathered anew each time: `takes` nothing
            return
        addresses = [parameter.data_ptr() for parameter in self._backbone.model.parameters()]
        if addresses != self._addresses:
            self._forget()
            self._addresses = addresses

    def takes(self, num_tokens: int, end: int) -> bool:
        """Whether such a pass has a graph; `end`: 1 + its largest position, for which there must be room."""
        if self._is_impossible or self._backbone.sharding is not None:
            return False
        return num_tokens <= SIZES[-1] and end <= self.cache.capacity

    def __call__(
        self,
        ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        slot_ids: npt.NDArray[np.int64],
        num_pairs: int,
    ) -> Tensor:
        """Token ids, positions and slots [T] -> hidden states [T, H], which the next call writes over.

        num_pairs: of a token and a key that it sees, what the pass is counted by.
        """
        if self.cache.capacity != self._capacity:
            self._forget()
            self._capacity = self.cache.capacity
        num_tokens = len(ids)
        size = SIZES[bisect.bisect_left(SIZES, num_tokens)]
        inputs = np.zeros((3, size), dtype=np.int64)
        inputs[2] = self._spare
        inputs[:, :num_tokens] = ids, positions, slot_ids
        self._inputs[:, :size].copy_(torch.from_numpy(inputs))
        if size not in self._graphs:
            try:
                self._graphs[size] = self._capture(size)
            except RuntimeError as error:
                self._is_impossible = True
                logger.warning("CUDA graphs: this model's pass cannot be captured, it goes kernel by kernel: %s", error)
                self._graphs[size] = lambda: self._run(size)
        self._graphs[size]()
        counts = self._backbone.counts.read
        counts.tokens += num_tokens
        counts.pairs += num_pairs
        return self._hidden[size][:num_tokens]

    def _run(self, size: int) -> None:
        ids, positions, slot_ids = self._inputs[:, :size]
        before = replace(self._backbone.counts.read)
        self._hidden[size] = self._backbone(
            ids, positions, TokenPass(self.cache, slot_ids, positions, self._capacity, 0)
        )
        self._backbone.counts.read = before  # whoever calls counts what is nobody's filling

    def _capture(self, size: int) -> Replay:
        """A first run outside compiles kernels and lets libraries allocate what they keep."""
        stream = torch.cuda.Stream(self._inputs.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run(size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._run(size)
        self._pool = graph.pool()  # one for all: a pass's hidden states are read before the next one runs
        return graph.replay

    def _forget(self) -> None:
        self._graphs.clear()
        self._hidden.clear()
        self._pool = None
