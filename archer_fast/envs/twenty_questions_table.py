"""The public table of Twenty Questions: objects, yes/no attributes, and how each is asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

_SEPARATORS = re.compile(r"[\W_]+")
_GUESS = re.compile(
    r"(?:(?:is|was|could|would) (?:it|this|that|the (?:object|thing|answer|item|word))(?: be)? "
    r"|are (?:they|these|those) |are you |it is |its |i guess )?"
    r"(?:(?:a|an|the|some) )?(.+)"
)
_IRREGULAR_PLURALS = {"knife": "knives", "scarf": "scarves"}
_SAME_PLURAL = frozenset({"sheep", "broccoli", "spinach", "corn", "celery", "toothpaste", "lego"})


@dataclass(slots=True, frozen=True)
class HiddenObject:
    """One object: `HiddenObject(names=("airplane", "plane"), category="Vehicles", guess="Is it an airplane?")`."""

    names: tuple[str, ...]  # accepted names, canonical first
    category: str
    guess: str  # how a player asks for it

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.names[0]


@dataclass(slots=True, frozen=True)
class Attribute:
    """One yes/no fact: `Attribute("fruit", ("Is it a fruit?", "Is it a kind of fruit?"), mask)`."""

    name: str
    phrasings: tuple[str, ...]  # canonical first
    mask: int  # bit i is set where the answer for objects[i] is yes


@dataclass(slots=True, frozen=True)
class FactTable:
    """Who has what: `table.attributes[a].mask >> i & 1` says whether object i has attribute a."""

    objects: tuple[HiddenObject, ...]
    attributes: tuple[Attribute, ...]
    questions: dict[str, int]  # normalised phrasing -> index in attributes
    names: dict[str, int]  # normalised accepted name or its plural -> index in objects

    def guessed(self, normalised: str) -> int | None:
        """The object that a question names as its guess, or None.

        A guess is a lead-in ("is it", "are they", "could it be", ... or nothing), an article or
        nothing, and then an accepted name and nothing else. So "Is it a dog?" and "a dog" are guesses,
        while "Is it bigger than a dog?" and "Does it eat a dog?" only end with a name.
        """
        match = _GUESS.fullmatch(normalised)
        return self.names.get(match[1]) if match else None


def normalise(question: str) -> str:
    """Lower case, words parted by one space, no punctuation: " Is it  a DOG?!" -> "is it a dog"."""
    return _SEPARATORS.sub(" ", question.replace("'", "").lower()).strip()


@cache
def fact_table() -> FactTable:
    """The table of the two data files, read once; nothing in it is ever changed."""
    folder = files("archer_fast.envs") / "data"
    listing = json.loads((folder / "twenty_questions_objects.json").read_text(encoding="utf-8"))
    facts = json.loads((folder / "twenty_questions_attributes.json").read_text(encoding="utf-8"))
    return build_table(listing["objects"], facts)


def build_table(categories: dict[str, list[list[str]]], facts: dict[str, Any]) -> FactTable:
    """Resolve the files' shorthand into a table; ValueError where they contradict themselves."""
    bare = frozenset(facts["without_article"])
    objects = tuple(
        HiddenObject(tuple(names), category, _guess_question(names[0], bare))
        for category, members in categories.items()
        for names in members
    )
    attributes = tuple(
        Attribute(entry["name"], tuple(entry["phrasings"]), _resolve(entry["name"], entry["true"], objects))
        for entry in facts["attributes"]
    )
    names = _index([(form, i) for i, thing in enumerate(objects) for form in _forms(thing.names)])
    questions = _index([(normalise(p), a) for a, attribute in enumerate(attributes) for p in attribute.phrasings])
    table = FactTable(objects, attributes, questions, names)
    for question in questions:
        if table.guessed(question) is not None:
            raise ValueError(f"phrasing {question!r} of {attributes[questions[question]].name!r} is a guess")
    return table


def _guess_question(name: str, bare: frozenset[str]) -> str:
    if name in bare:
        return f"Is it {name}?"
    return f"Is it {'an' if name[0] in 'aeiou' else 'a'} {name}?"


def _resolve(attribute: str, entries: Sequence[str], objects: Sequence[HiddenObject]) -> int:
    mask = 0
    for entry in entries:
        wanted = entry.removeprefix("-")
        bits = sum(
            1 << i for i, thing in enumerate(objects) if wanted in ("*", thing.name) or wanted == f"@{thing.category}"
        )
        if not bits:
            raise ValueError(f"attribute {attribute!r}: {entry!r} names no object and no category")
        mask = mask & ~bits if entry.startswith("-") else mask | bits
    return mask


def _forms(names: Iterable[str]) -> set[str]:
    return {form for name in names for form in (name, _plural(name))}


def _plural(name: str) -> str:
    if name in _SAME_PLURAL or " of " in name or (name.endswith("s") and not name.endswith(("ss", "us", "vas"))):
        return name
    if name in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "x", "ch", "sh", "tomato", "potato", "mango")) else "s")


def _index(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    index: dict[str, int] = {}
    for key, value in pairs:
        if index.setdefault(key, value) != value:
            raise ValueError(f"{key!r} stands for two entries: {index[key]} and {value}")
    return index
