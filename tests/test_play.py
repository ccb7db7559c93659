"""Games with a person: watched, answered, played; and how a person says that it is enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import pytest

from archer_fast.config import RolloutConfig, TaskConfig, TinyModel
from archer_fast.envs import get
from archer_fast.envs.base import StepResult
from archer_fast.envs.guess_number import GuessNumber
from archer_fast.envs.twenty_questions import TwentyQuestions
from archer_fast.play import (
    Answers,
    Person,
    PolicyPlayer,
    Quit,
    answer_game,
    ask_person,
    ending,
    kind_of,
    learn_answers,
    make_env,
    one_line,
    play_game,
)
from archer_fast.tiny_model import build_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Says:
    """A player with a fixed list of actions; None is a full window."""

    def __init__(self, *actions: str | None) -> None:
        self.actions = iter(actions)
        self.heard: list[str] = []

    def begin(self) -> None:
        self.heard = []

    def act(self, observation: str) -> str | None:
        self.heard.append(observation)
        return next(self.actions)


def typed(*lines: str) -> Callable[[str], str]:
    """A keyboard; after the last line its end of file."""
    left: Iterator[str] = iter(lines)

    def ask(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return ask


def test_a_game_is_told_turn_by_turn() -> None:
    said: list[str] = []
    env = GuessNumber(high=8)
    env.reset(3)
    number = env._number
    player = Says("9", " \n ", str(number))
    assert play_game(env, player, 3, said.append) == -2.0
    assert said == [
        "Guess 1 to 8.",
        "  1  9  ->  Invalid.",
        "  2  (nothing)  ->  Invalid.",
        f"  3  {number}  ->  Correct.",
        f"[won ({number}) after 3 turns; return -2]",
    ]
    assert player.heard == ["Guess 1 to 8.\n", " Invalid.\n", " Invalid.\n"]
    said.clear()
    play_game(env, Says(str(number)), 3, said.append, echo=False)
    assert said[1:] == ["      ->  Correct.", f"[won ({number}) after 1 turn; return 0]"]


def test_a_lost_game_and_a_full_window() -> None:
    said: list[str] = []
    assert play_game(TwentyQuestions(objects=["dog"], max_turns=2), Says("", "?"), 0, said.append) == -2.0
    assert said[-2:] == ["  2  ?  ->  Invalid Question.\nIt was a dog.", "[lost (dog) after 2 turns; return -2]"]
    assert play_game(TwentyQuestions(), Says("Is it alive?", None), 0, said.append) == -1.0
    assert said[-1] == "[the model's window is full after 1 turn; return -1]"


def test_endings() -> None:
    assert ending({}, truncated=False) == "over"
    assert ending({}, truncated=True) == "cut"
    assert ending({"won": True}, truncated=False) == "won"
    assert ending({"won": False, "word": "crane"}, truncated=False) == "lost (crane)"


@pytest.mark.parametrize("line", ["", "  ", "q", "Quit", " EXIT "])
def test_ways_to_stop(line: str) -> None:
    with pytest.raises(Quit):
        ask_person(typed(line), "")


@pytest.mark.parametrize("error", [EOFError, KeyboardInterrupt])
def test_the_end_of_the_input_and_ctrl_c_stop(error: type[BaseException]) -> None:
    def ask(prompt: str) -> str:
        raise error

    with pytest.raises(Quit):
        Person(ask, "> ").act("what was printed")


def test_what_a_person_types_is_text() -> None:
    assert Person(typed("  is it a dog?  "), "> ").act("") == "is it a dog?"
    assert ask_person(typed("caf\udce9"), "") == "caf?", "no tokenizer takes a lone surrogate"

    def undecodable(prompt: str) -> str:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")

    assert ask_person(undecodable, "") == "?"


def test_answers_are_learned_from_scripted_games() -> None:
    questions = learn_answers(get("twenty-questions"), {"objects": 10})
    assert set(questions.texts) == {" Yes.\n", " No.\n", " Invalid Question.\n"}, "no revealed object among them"
    assert questions.winning == (" Yes.\n",)
    numbers = learn_answers(get("guess-number"), {"high": 8})
    assert set(numbers.texts) == {" Higher.\n", " Lower.\n", " Correct.\n", " Invalid.\n"}
    assert numbers.winning == (" Correct.\n",)


def test_a_task_with_free_text_takes_what_is_typed() -> None:
    class Echo:
        """Answers with what was said, so that no two answers are alike."""

        name: ClassVar[str] = "echo"
        max_turns = 20
        step_time_limit: float | None = None
        options: ClassVar[dict[str, Any]] = {}

        def reset(self, seed: int, options: Mapping[str, Any] | None = None) -> str:
            self.turn = 0
            return "Talk.\n"

        def step(self, action: str) -> StepResult:
            self.turn += 1
            return StepResult(f"> {action}{self.turn}\n\n", 0.0, self.turn == 20, False, {})

    class Talker:
        def reset(self, seed: int, env_options: Mapping[str, Any]) -> None: ...
        def act(self, observation: str) -> str:
            return "hello"

    base = get("guess-number")
    spec = type(base)("echo", "", Echo, {"talker": Talker}, "talker", "talker", list)
    answers = learn_answers(spec, {})
    assert (answers.texts, answers.winning, answers.prefix, answers.suffix) == ((), (), "", "\n\n")
    assert answers.match("anything") == "anything\n\n"


@pytest.mark.parametrize(
    ("typed_text", "answer"),
    [
        ("y", " Yes.\n"),
        ("YES", " Yes.\n"),
        (" yes. ", " Yes.\n"),
        ("n", " No.\n"),
        ("inv", " Invalid Question.\n"),
        ("invalid question", " Invalid Question.\n"),
        ("maybe", None),
        ("", None),
        (".", None),
        ("no idea", None),
    ],
)
def test_what_an_answer_means(typed_text: str, answer: str | None) -> None:
    assert Answers((" Yes.\n", " No.\n", " Invalid Question.\n"), ()).match(typed_text) == answer


def test_letters_that_fit_two_answers_mean_neither() -> None:
    answers = Answers((" No.\n", " Not now.\n"), ())
    assert answers.match("not") == " Not now.\n"
    assert answers.match("no") == " No.\n", "an exact answer counts before the beginning of another"
    assert answers.match("n") is None


def answered(player: Says, *lines: str) -> tuple[int, list[str]]:
    said: list[str] = []
    answers = learn_answers(get("twenty-questions"), {"objects": 10})
    turns = answer_game(TwentyQuestions(objects=10, max_turns=4), answers, player, 0, said.append, typed(*lines))
    return turns, said


def test_a_person_is_the_environment() -> None:
    player = Says("Is it alive?", "What?", "Is it a dog?")
    turns, said = answered(player, "yes", "dunno", "i", "y")
    assert turns == 3
    assert player.heard == ["Questions:\n", " Yes.\n", " Invalid Question.\n"], "the policy hears the task's own words"
    assert said[2:] == [
        "Questions:",
        "  1  Is it alive?",
        "  2  What?",
        said[5],
        "  3  Is it a dog?",
        "[the agent found it in 3 turns]",
    ]
    assert said[5].startswith("     please one of: ") and "Yes." in said[5]


def test_a_yes_to_a_question_is_not_the_end() -> None:
    turns, said = answered(Says("Is it alive?", "Is it alive?", "", "Is it a cat?"), "y", "y", "y", "n")
    assert (turns, said[-1]) == (4, "[4 turns are over: the agent did not find it]")
    turns, said = answered(Says("Is it alive?", None), "y")
    assert (turns, said[-1]) == (1, "[the model's window is full]")
    with pytest.raises(Quit):
        answered(Says("Is it alive?"), "")


def test_the_kind_of_an_action() -> None:
    env = TwentyQuestions(objects=10)
    assert [kind_of(env, a, 0) for a in ("Is it a dog?", "Is it alive?", "")] == ["guess", "question", "invalid"]


def test_one_line() -> None:
    assert [one_line(a) for a in ("", " \n", "a\n b ")] == ["(nothing)", "(nothing)", "a b"]


def test_a_policy_plays_token_by_token_and_repeats_with_its_seed() -> None:
    task = TaskConfig("guess-number", {"high": 8})
    texts = get(task.name).vocabulary_text(**task.options)
    sizes = TinyModel(hidden_size=16, num_layers=1, num_heads=2, max_positions=96, intermediate_size=16)
    backbone, stop = build_tiny_model(texts, sizes, seed=0)

    def game(seed: int, greedy: bool = False) -> list[str]:
        said: list[str] = []
        player = PolicyPlayer(backbone, stop, RolloutConfig(max_new_tokens=6), seed=seed, greedy=greedy)
        play_game(make_env(task), player, 5, said.append)
        return said

    assert game(1) == game(1) != game(2)
    assert game(1, greedy=True) == game(2, greedy=True)
    assert game(1)[-1].startswith("[the model's window is full after "), "96 tokens do not hold twenty turns"
    assert backbone.tokenizer.decode([stop]) not in "".join(game(1))
