"""Players of the coin collector that see its texts alone: one says anything, one wanders, one explores."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from typing import Any

from archer_fast.envs.textworld_express_texts import Room, read_room

_BACK = {"north": "south", "south": "north", "east": "west", "west": "east"}


class _Walker(ABC):
    """What the players share: the room they are in, with the doors they opened, and random numbers of their own."""

    def reset(self, seed: int, env_options: Mapping[str, Any]) -> None:
        """Begin a game."""
        self._rng = random.Random(f"{type(self).__name__} {seed}")  # text: its stream is not the env's
        self._room = Room("", (), (), False)
        self._said = ""

    def act(self, observation: str) -> str:
        """Look where we are, then say what to do."""
        room = read_room(observation)
        if room is not None:
            self._entered(room)
            self._room = room
        elif self._said.startswith("open door to") and observation.strip().startswith("You open"):
            way = self._said.rpartition(" ")[2]
            self._room = self._room._replace(
                open=(*self._room.open, way), shut=tuple(d for d in self._room.shut if d != way)
            )
        self._said = self._choose()
        return self._said

    def _entered(self, room: Room) -> None:  # noqa: B027  # most players remember nothing
        """A text showed `room` (maybe the one we were in)."""

    @abstractmethod
    def _choose(self) -> str:
        """The next action."""

    def _towards(self, direction: str) -> str:
        return f"open door to {direction}" if direction in self._room.shut else f"move {direction}"


class RandomPlayer(_Walker):
    """Anything the game accepts here, each thing as likely."""

    def _choose(self) -> str:
        room = self._room
        choices = ["look around", "inventory", *(["take coin"] if room.coin else [])]
        choices += [self._towards(d) for d in (*room.open, *room.shut)]
        return self._rng.choice(choices)


class MediocrePlayer(_Walker):
    """The teacher of behaviour cloning: wanders without memory, dawdles, mostly overlooks the coin."""

    idle_share = 0.4  # turns spent on looking around and on the inventory
    taking_share = 0.3  # turns beside the coin on which it is taken

    def _choose(self) -> str:
        rng, room = self._rng, self._room
        if room.coin and rng.random() < self.taking_share:
            return "take coin"
        exits = (*room.open, *room.shut)
        if not exits or rng.random() < self.idle_share:
            return rng.choice(["look around", "inventory"])
        return self._towards(rng.choice(exits))


class ExpertPlayer(_Walker):
    """Explores: the coin where it is seen, else an exit never taken, open ones first, else back to the nearest such."""

    def reset(self, seed: int, env_options: Mapping[str, Any]) -> None:
        """Begin a game; nothing is random."""
        super().reset(seed, env_options)
        self._map: dict[str, dict[str, str | None]] = {}  # room -> exit -> room behind it, None: never taken

    def _entered(self, room: Room) -> None:
        exits = self._map.setdefault(room.name, {})
        for direction in (*room.open, *room.shut):
            exits.setdefault(direction, None)
        verb, _, way = self._said.partition(" ")
        if verb == "move":
            self._map[self._room.name][way] = room.name
            exits[_BACK[way]] = self._room.name

    def _choose(self) -> str:
        room = self._room
        if room.coin:
            return "take coin"
        exits = self._map[room.name]
        for direction in (*room.open, *room.shut):
            if exits[direction] is None:
                return self._towards(direction)
        step = self._step_to_nearest_unknown()
        return "look around" if step is None else self._towards(step)

    def _step_to_nearest_unknown(self) -> str | None:
        """The first step of a shortest way, through exits once taken, to a room with one that was not."""
        start = self._room.name
        queue: deque[tuple[str, str | None]] = deque([(start, None)])
        seen = {start}
        while queue:
            name, first = queue.popleft()
            for direction, behind in self._map[name].items():
                if behind is None:
                    return first
                if behind not in seen:
                    seen.add(behind)
                    queue.append((behind, first or direction))
        return None
