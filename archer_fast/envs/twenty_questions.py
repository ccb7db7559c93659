"""Twenty Questions: the env that hides an object and answers yes/no questions from a table."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from archer_fast.envs.base import StepResult
from archer_fast.envs.checks import check_count, check_seed, unknown
from archer_fast.envs.task_spec import TaskSpec
from archer_fast.envs.twenty_questions_objects import resolve_objects
from archer_fast.envs.twenty_questions_players import ExpertPlayer, MediocrePlayer, RandomQuestionPlayer
from archer_fast.envs.twenty_questions_table import fact_table, normalise

OPENING = "Questions:\n"
YES, NO, INVALID = " Yes.\n", " No.\n", " Invalid Question.\n"


class TwentyQuestions:
    """Find the hidden object; -1 a turn, 0 for the winning turn, `max_turns` at most.

    The limit is a rule of the game (twenty questions, not more), and the return is meant to lie in
    [-max_turns, 0]: the last turn therefore terminates and does not truncate. Nothing follows a lost
    game, so nothing may be bootstrapped from its final state.

    `objects`: None for all, an int for an evenly spread subset (10 is the paper's), or a list of names.
    `original_quirks`: the game is won by a yes whose question's LAST WORD is an accepted name, so
    "Does it eat a dog?" wins the dog, and an object that has only names of several words is never won.
    Mended, a question wins if it is a guess and nothing else (`FactTable.guessed`).
    `reveal`: a lost game's last text names the object, as people do ("No.\\nIt was a dog.\\n"); nobody can act on
    it, but a model that learns to predict the texts learns what answers mean. Never with `original_quirks`.

    >>> env = TwentyQuestions(objects=10)
    >>> env.reset(seed=0, options={"object": "dog"})
    'Questions:\\n'
    >>> env.step("Is it an animal?").text, env.step("Is it a dog?").text
    (' Yes.\\n', ' Yes.\\n')
    """

    name: ClassVar[str] = "twenty-questions"
    step_time_limit: float | None = None

    def __init__(
        self,
        objects: int | Sequence[str] | None = None,
        original_quirks: bool = False,
        max_turns: int = 20,
        reveal: bool = True,
    ) -> None:
        for option, value in (("original_quirks", original_quirks), ("reveal", reveal)):
            if not isinstance(value, bool):
                raise TypeError(f"{option}: wanted a bool, got {value!r}")
        self.reveal = reveal and not original_quirks
        self.max_turns = check_count("max_turns", max_turns)
        self.original_quirks = original_quirks
        self._table = fact_table()
        self._indices = resolve_objects(objects)
        self._objects_option = objects if isinstance(objects, int | None) else list(objects)
        self._turn = -1  # turns played; -1 = no game
        self._actions: list[str] = []
        self._asked: set[str] = set()

    @property
    def objects(self) -> list[str]:
        """Canonical names of the objects that may be hidden."""
        return [self._table.objects[i].name for i in self._indices]

    @property
    def options(self) -> dict[str, Any]:
        """The keywords that make this env again."""
        return {
            "objects": self._objects_option,
            "original_quirks": self.original_quirks,
            "max_turns": self.max_turns,
            "reveal": self.reveal,
        }

    def reset(self, seed: int, options: Mapping[str, Any] | None = None) -> str:
        """Hide an object drawn by `seed`, or `options["object"]`."""
        hidden = random.Random(check_seed(seed)).choice(self._indices)
        for key, value in (options or {}).items():
            if key != "object":
                raise unknown("reset option of twenty-questions", key, ["object"])
            hidden = self._table.names.get(normalise(str(value)), -1)
            if hidden not in self._indices:
                raise unknown("object", value, self.objects)
        self._hidden = hidden
        self._turn = 0
        self._actions, self._asked = [], set()
        return OPENING

    def step(self, action: str) -> StepResult:
        """Answer a question. info: kind ("guess", "question", "invalid"), repeat, won; object once it is over."""
        if self._turn < 0:
            raise RuntimeError("step: no game is on; call reset first")
        self._turn += 1
        kind, yes, won = self._judge(action, self._hidden)
        question = normalise(action)
        info: dict[str, Any] = {"won": won, "kind": kind, "repeat": question in self._asked}
        self._asked.add(question)
        self._actions.append(action)
        over = won or self._turn == self.max_turns
        if over:
            info["object"] = self._table.objects[self._hidden].name
            self._turn = -1
        answer = INVALID if kind == "invalid" else YES if yes else NO
        if over and not won and self.reveal:
            answer += revealed(self._table.objects[self._hidden].guess)
        return StepResult(answer, 0.0 if won else -1.0, over, False, info)

    def clone(self) -> TwentyQuestions:
        """See `ResamplableEnv`."""
        twin = copy.copy(self)
        twin._actions, twin._asked = list(self._actions), set(self._asked)
        return twin

    def resample_hidden(self, seed: int) -> None:
        """Uniform over the objects for which every action so far would have been answered and ended alike."""
        if self._turn < 0:
            raise RuntimeError("resample_hidden: no game is on; call reset first")
        possible = list(self._indices)
        for action in self._actions:
            judged = self._judge(action, self._hidden)
            possible = [i for i in possible if self._judge(action, i) == judged]
        self._hidden = random.Random(check_seed(seed)).choice(possible)

    def _judge(self, action: str, hidden: int) -> tuple[str, bool, bool]:
        """The kind of an action; whether its answer is yes, and whether it wins, where object `hidden` is hidden."""
        question = normalise(action)
        attribute = self._table.questions.get(question)
        if attribute is not None:
            kind, yes = "question", bool(self._table.attributes[attribute].mask >> hidden & 1)
        else:
            guess = self._table.guessed(question)
            if guess is None and self.original_quirks:
                guess = self._table.names.get(question.rpartition(" ")[2])
            kind, yes = ("invalid", False) if guess is None else ("guess", guess == hidden)
        return kind, yes, yes and (self._ends_with_name(action, hidden) if self.original_quirks else kind == "guess")

    def _ends_with_name(self, action: str, hidden: int) -> bool:
        """The original's test, as it stands there."""
        end = len(action)
        while end and not action[end - 1].isalpha():
            end -= 1
        return action[:end].split(" ")[-1].lower() in self._table.objects[hidden].names


def revealed(guess: str) -> str:
    """The line that ends a lost game: revealed("Is it a dog?") == "It was a dog.\\n"."""
    return guess.replace("Is it", "It was", 1).rstrip("?") + ".\n"


def vocabulary(
    objects: int | Sequence[str] | None = None,
    original_quirks: bool = False,
    max_turns: int = 20,
    reveal: bool = True,
) -> list[str]:
    """Every text an env or an agent needs: opening, phrasings, guesses, answers."""
    table = fact_table()
    phrasings = [phrasing for attribute in table.attributes for phrasing in attribute.phrasings]
    guesses = [table.objects[i].guess for i in resolve_objects(objects)]
    return [OPENING, *phrasings, *guesses, *map(revealed, guesses), YES, NO, INVALID]


TASK = TaskSpec(
    name=TwentyQuestions.name,
    summary="find a hidden object in twenty yes/no questions",
    env_factory=TwentyQuestions,
    players={"random": RandomQuestionPlayer, "mediocre": MediocrePlayer, "expert": ExpertPlayer},
    default_player="mediocre",
    reference_player="expert",
    vocabulary=vocabulary,
)
