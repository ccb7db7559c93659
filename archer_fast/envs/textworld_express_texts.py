"""The texts of textworld-express's coin collector: rooms read from them, and said again in one short line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

DIRECTIONS = ("north", "south", "east", "west")
ROOMS = (  # every room of the package
    "backyard",
    "bathroom",
    "bedroom",
    "corridor",
    "driveway",
    "kitchen",
    "laundry room",
    "living room",
    "pantry",
    "street",
    "supermarket",
)
OPENING = "Find the coin.\n"
INVALID = " Invalid.\n"
COMMANDS = (
    "Commands: move DIRECTION, open door to DIRECTION, close door to DIRECTION, take THING, look around, inventory."
)

# First words of the package's answer: (in brief, kind of the action if its own first word does not tell).
_ANSWERS = {
    "Unknown action": (INVALID, "invalid"),
    "You can't": (" Closed.\n", "blocked"),
    "That is already open": (" Already open.\n", "blocked"),
    "That is already closed": (" Already closed.\n", "blocked"),
    "You take the": (" Taken.\n", None),
}
_NAME = re.compile(r"You are in the ([a-z ]+)\.")
_EXIT = re.compile(r"(?:To|, to) the (North|South|East|West) you see (a closed|the) ")
_COIN = re.compile(r"\ba coin\b")
_DIRECTIONS = "((?: (?:north|south|east|west))+)"
_BRIEF = re.compile(rf"(?:^|\n) ([A-Z][a-z ]+):(?:{_DIRECTIONS}\.)?(?: Shut{_DIRECTIONS}\.)?( Coin!)?\n")


class Room(NamedTuple):
    """A room as the agent sees it: `Room("kitchen", ("north", "west"), ("east",), True)`."""

    name: str
    open: tuple[str, ...]  # exits one can walk through, in the order of DIRECTIONS
    shut: tuple[str, ...]  # exits behind a closed door
    coin: bool

    @property
    def brief(self) -> str:
        """`" Kitchen: north west. Shut east. Coin!\\n"`: 1 to 6 tokens of the tiny model."""
        parts = [f" {self.name.capitalize()}:"]
        parts += [f"{''.join(f' {d}' for d in self.open)}."] if self.open else []
        parts += [f" Shut{''.join(f' {d}' for d in self.shut)}."] if self.shut else []
        parts += [" Coin!"] if self.coin else []
        return "".join(parts) + "\n"


def read_room(text: str) -> Room | None:
    """The room that a full or a brief text shows; None where it shows none.

    >>> read_room("You are in the pantry. There is also a coin. \\nTo the East you see a closed wood door. ")
    Room(name='pantry', open=(), shut=('east',), coin=True)
    >>> read_room("Find the coin.\\n Living room: north west.\\n")
    Room(name='living room', open=('north', 'west'), shut=(), coin=False)
    """
    found = _NAME.search(text)
    if found:
        exits = {m[1].lower(): m[2] for m in _EXIT.finditer(text)}
        passable, shut = (tuple(d for d in DIRECTIONS if exits.get(d) == words) for words in ("the", "a closed"))
        return Room(found[1], passable, shut, bool(_COIN.search(text)))
    found = _BRIEF.search(text)
    if found:
        return Room(found[1].lower(), _words(found[2]), _words(found[3]), bool(found[4]))
    return None


def _words(text: str | None) -> tuple[str, ...]:
    return tuple((text or "").split())


def brief(observation: str, look: str, inventory: str) -> str:
    """The package's answer in one line: the room as it is after a move or a door, else what happened.

    Nothing is added that the package does not say in the same turn. Left out are furniture, things, and the names of
    the rooms next door.
    """
    for beginning, (text, _) in _ANSWERS.items():
        if observation.startswith(beginning):
            return text
    if observation == inventory:
        things = [line.strip() for line in inventory.splitlines()[1:]]
        return f" Carrying {'nothing' if 'empty' in inventory else ', '.join(things)}.\n"
    room = read_room(look)
    if room is not None and observation.startswith(("You are in", "You open", "You close")):
        return room.brief
    return f" {' '.join(observation.split())}\n"


def kind_of(action: str, observation: str) -> str:
    """move, open, close, take, look, inventory; blocked: understood and without effect; invalid: not understood."""
    for beginning, (_, kind) in _ANSWERS.items():
        if kind is not None and observation.startswith(beginning):
            return kind
    return action.split()[0]


def commands() -> list[str]:
    """What an agent may say, but for taking other things than the coin."""
    verbs = ("move", "open door to", "close door to")
    return [*(f"{verb} {d}" for verb in verbs for d in DIRECTIONS), "take coin", "look around", "inventory"]


def brief_texts() -> Iterator[str]:
    """Every brief answer: each room with every set of exits, each open or shut, with the coin or without."""
    for name, exits, coin in product(ROOMS, product(("", "open", "shut"), repeat=4), (False, True)):
        passable, shut = (
            tuple(d for d, is_ in zip(DIRECTIONS, exits, strict=True) if is_ == how) for how in ("open", "shut")
        )
        yield Room(name, passable, shut, coin).brief
    yield from (text for text, _ in _ANSWERS.values())
    yield " Carrying nothing.\n"
