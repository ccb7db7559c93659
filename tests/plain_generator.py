"""The buffer's generator and uniform draws (csrc/counter_rng.h, uniform_sampler.h, task_strata.h), in plain Python."""

from __future__ import annotations

import itertools


class PlainGenerator:
    MASK, GOLDEN = 2**64 - 1, 0x9E3779B97F4A7C15

    def __init__(self, seed: int, counter: int = 0) -> None:
        self.key, self.counter = self.mix(seed + self.GOLDEN), counter

    def mix(self, word: int) -> int:
        word &= self.MASK
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & self.MASK
        word = (word ^ word >> 27) * 0x94D049BB133111EB & self.MASK
        return word ^ word >> 31

    def next(self) -> int:
        self.counter += 1
        return self.mix(self.key + self.GOLDEN * self.counter)

    def below(self, bound: int) -> int:
        word = self.next()
        while word < 2**64 % bound:
            word = self.next()
        return word % bound

    def draw(self, ids: list[int], n: int, replacement: bool) -> list[int]:
        if replacement:
            return [ids[self.below(len(ids))] for _ in range(n)]
        ids = list(ids)
        for i in range(n):
            j = i + self.below(len(ids) - i)
            ids[i], ids[j] = ids[j], ids[i]
        return ids[:n]

    def draw_by_task(self, ids: dict[int, list[int]], n: int, replacement: bool) -> list[int]:
        share, rest = divmod(n, len(ids))
        tasks = sorted(ids)
        more = self.draw([t for t in tasks if replacement or len(ids[t]) > share], rest, replacement=False)
        return list(itertools.chain(*(self.draw(ids[t], share + (t in more), replacement) for t in tasks)))

    def slices(self, total: float, n: int) -> list[float]:
        return [(i + (self.next() >> 11) * 2.0**-53) / n * total for i in range(n)]
