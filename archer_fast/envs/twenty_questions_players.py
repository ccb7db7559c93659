"""Players of Twenty Questions: one that asks at random, one that half listens, one that wastes nothing."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from archer_fast.envs.twenty_questions_objects import resolve_objects
from archer_fast.envs.twenty_questions_table import FactTable, fact_table


class _Reasoner(ABC):
    """What the players share: which objects still fit the answers, kept as a bit mask."""

    def reset(self, seed: int, env_options: Mapping[str, Any]) -> None:
        """Begin a game."""
        self._table: FactTable = fact_table()
        self._objects = resolve_objects(env_options.get("objects"))
        self._possible = sum(1 << i for i in self._objects)
        self._asked_mask = 0  # objects that a yes to the last question leaves
        self._rng = random.Random(f"{type(self).__name__} {seed}")  # text: its stream is not the env's

    def act(self, observation: str) -> str:
        """Hear the answer to the last question, then ask the next."""
        if observation == " Yes.\n":
            self._possible &= self._asked_mask
        elif observation == " No.\n":
            self._possible &= ~self._asked_mask
        question, self._asked_mask = self._choose()
        return question

    @abstractmethod
    def _choose(self) -> tuple[str, int]:
        """The next question, and the objects (a bit mask) that a yes to it leaves."""

    def _guess(self, index: int) -> tuple[str, int]:
        return self._table.objects[index].guess, 1 << index

    def _consistent(self) -> list[int]:
        return [i for i in self._objects if self._possible >> i & 1]

    def _imbalance(self, mask: int) -> int:
        """0 for a question that halves what is possible; the greedy information gain falls with it."""
        return abs(2 * (mask & self._possible).bit_count() - self._possible.bit_count())


class RandomQuestionPlayer(_Reasoner):
    """Any attribute or any object, without regard to answers."""

    guess_share = 0.15

    def _choose(self) -> tuple[str, int]:
        if self._rng.random() < self.guess_share:
            return self._guess(self._rng.choice(self._objects))
        attribute = self._rng.choice(self._table.attributes)
        return self._rng.choice(attribute.phrasings), attribute.mask


class MediocrePlayer(_Reasoner):
    """The teacher of behaviour cloning: asks much, listens seldom, but never guesses the same object twice."""

    guess_share = 0.2  # turns spent on a guess
    listening_share = 0.25  # guesses that fit the answers so far

    def reset(self, seed: int, env_options: Mapping[str, Any]) -> None:
        """Begin a game; questions are drawn by how evenly they part the task's objects, whatever was answered."""
        super().reset(seed, env_options)
        self._guessed = 0  # a bit mask of objects
        shares = [(a.mask & self._possible).bit_count() / len(self._objects) for a in self._table.attributes]
        self._weights = [(p * (1 - p)) ** 2 for p in shares]

    def _choose(self) -> tuple[str, int]:
        rng = self._rng
        if rng.random() < self.guess_share:
            fitting = self._consistent() if rng.random() < self.listening_share else []
            index = rng.choice(fitting or [i for i in self._objects if not self._guessed >> i & 1] or self._objects)
            self._guessed |= 1 << index
            return self._guess(index)
        attribute = rng.choices(self._table.attributes, self._weights)[0]
        return attribute.phrasings[0], attribute.mask


class ExpertPlayer(_Reasoner):
    """Greedy information gain over what fits; the guess once one object is left or no question parts the rest."""

    def _choose(self) -> tuple[str, int]:
        fitting = self._consistent()
        best = min(self._table.attributes, key=lambda attribute: self._imbalance(attribute.mask))
        if len(fitting) <= 2 or self._imbalance(best.mask) == len(fitting):
            return self._guess((fitting or self._objects)[0])
        return best.phrasings[0], best.mask
