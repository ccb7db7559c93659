"""Twenty Questions as the original plays it: many games at once, answered by a table of facts or a language model."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from archer_fast.arguments import as_flag, as_integer
from archer_fast.compat.arguments import ignored
from archer_fast.envs.twenty_questions import OPENING
from archer_fast.envs.twenty_questions_table import fact_table, normalise

# (hidden words, questions), both [n] -> answers [n]: "Yes." where an answer has a yes in it, else "No." where it has a
# no, else "Invalid Question.".
Oracle = Callable[[list[str], list[str]], Sequence[str]]


class TwentyQuestionsEnv:
    """One game: -1 a turn, 0 for the winning one, `max_conversation_length` turns at most.

    It is won where the answer is yes and the question ends with an accepted name of the hidden object, whatever stands
    before it. original_quirks: the LAST WORD must be the name, so that seven objects cannot be won whose names are all
    of several words ("soccer ball").
    """

    def __init__(
        self,
        max_conversation_length: int = 20,
        *,
        original_quirks: bool = False,
        rng: random.Random | None = None,
    ) -> None:
        self.word_list = [list(thing.names) for thing in fact_table().objects]
        self.max_conversation_length = as_integer("max_conversation_length", max_conversation_length, 1, 2**31)
        self.original_quirks = as_flag("original_quirks", original_quirks)
        self.random = random.Random() if rng is None else rng
        self.count = 0
        self.curr_word: list[str] | None = None  # accepted names, canonical first
        self.history = ""
        self.done = True

    def reset(self, idx: int | None = None) -> str:
        """Hide the object `idx` of word_list, or one drawn evenly; the first observation."""
        if idx is None:
            self.curr_word = self.random.choice(self.word_list)
        else:
            self.curr_word = self.word_list[as_integer("idx", idx, 0, len(self.word_list) - 1)]
        self.count, self.history, self.done = 0, OPENING, False
        return self.history

    def is_correct(self, question: str) -> bool:
        """Whether the question ends with an accepted name; what is behind its last letter does not count."""
        while question and not question[-1].isalpha():
            question = question[:-1]
        said = " " + question.lower()
        names = self.curr_word or []
        if self.original_quirks:
            names = [name for name in names if " " not in name]
        return any(said.endswith(" " + name) for name in names)

    def _step(self, question: str, answer: str) -> tuple[str, int, bool] | None:
        """(whole history, reward, done) behind a question and the oracle's answer; None once the game is over."""
        if self.done:
            return None
        spoken = answer.lower()
        answer = "Yes." if "yes" in spoken else "No." if "no" in spoken else "Invalid Question."
        self.count += 1
        self.history += f"{question} {answer}\n"
        won = answer == "Yes." and self.is_correct(question)
        self.done = won or self.count == self.max_conversation_length
        return self.history, 0 if won else -1, self.done


class BatchedTwentyQuestionsEnv:
    """`bsize` games of Twenty Questions at once.

    env_load_path: a fine-tuned sequence-to-sequence oracle, as a folder that `from_pretrained` reads, or as the
    original has it: a checkpoint whose model_state_dict fits `oracle_lm`. None, "" or a path where nothing is (which
    warns): the table of facts of archer_fast.envs answers, without any model or download.
    oracle: a function to ask instead. seed: settles which objects are hidden; None: another game every time.
    """

    def __init__(
        self,
        env_load_path: str | None = None,
        cache_dir: str | None = None,
        device: torch.device | str | None = None,
        max_conversation_length: int = 20,
        bsize: int = 32,
        *,
        original_quirks: bool = False,
        oracle: Oracle | None = None,
        oracle_lm: str = "google/flan-t5-small",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Errors: ValueError for both an oracle and a path, or a checkpoint that does not fit or has code in it."""
        ignored(type(self).__name__, kwargs)
        self.bsize = as_integer("bsize", bsize, 1, 2**31)
        self.env_list = [
            TwentyQuestionsEnv(
                max_conversation_length,
                original_quirks=original_quirks,
                rng=None if seed is None else random.Random(f"{seed}/{i}"),
            )
            for i in range(self.bsize)
        ]
        if oracle is not None and env_load_path:
            raise ValueError(f"oracle: wanted either an oracle or an env_load_path, got both (path {env_load_path!r})")
        if oracle is None and env_load_path and not Path(env_load_path).exists():
            warnings.warn(f"env_load_path: nothing is at {env_load_path!r}, a table of facts answers", stacklevel=2)
        elif oracle is None and env_load_path:
            oracle = LanguageModelOracle(env_load_path, cache_dir, device, oracle_lm)
        self.oracle: Oracle = answers_of_table if oracle is None else oracle

    def generate_answers(self, questions: Sequence[str]) -> list[str]:
        """The oracle's answer to each game's question."""
        if any(env.curr_word is None for env in self.env_list):
            raise RuntimeError("step: no game is on; call reset first")
        words = [env.curr_word[0] for env in self.env_list if env.curr_word is not None]
        answers = list(self.oracle(words, list(questions)))
        if len(answers) != self.bsize:
            raise ValueError(f"oracle: wanted {self.bsize} answers, got {len(answers)}")
        return answers

    def reset(self, idx: int | None = None) -> list[str]:
        """Begin new games, all with object `idx` where it is given; their observations."""
        return [env.reset(idx) for env in self.env_list]

    def step(self, questions: Sequence[str]) -> list[tuple[str, int, bool] | None]:
        """(next_observation, reward, done) of each game; None for one that is already over."""
        if len(questions) != self.bsize:
            raise ValueError(f"questions: wanted {self.bsize}, one a game, got {len(questions)}")
        answers = self.generate_answers(questions)
        return [env._step(*spoken) for env, *spoken in zip(self.env_list, questions, answers, strict=True)]


def answers_of_table(words: Sequence[str], questions: Sequence[str]) -> list[str]:
    """Answers out of the table of facts; a question that it does not know is a guess if it ends with any object's name.

    >>> answers_of_table(["dog", "dog", "dog"], ["Is it an animal?", "Could it be a small cat?", "Why?"])
    ['Yes.', 'No.', 'Invalid Question.']
    """
    return [_answer(word, question) for word, question in zip(words, questions, strict=True)]


def _answer(word: str, question: str) -> str:
    table = fact_table()
    hidden, said = table.names[normalise(word)], normalise(question)
    attribute = table.questions.get(said)
    if attribute is not None:
        yes = bool(table.attributes[attribute].mask >> hidden & 1)
    else:
        spoken = said.split()
        guesses = (table.names.get(" ".join(spoken[i:])) for i in range(len(spoken)))  # the longest name first
        guess = next((found for found in guesses if found is not None), None)
        if guess is None:
            return "Invalid Question."
        yes = guess == hidden
    return "Yes." if yes else "No."


class LanguageModelOracle:
    """A fine-tuned sequence-to-sequence model, asked as the original asks it: "The object is dog.Is it alive?"."""

    def __init__(self, path: str, cache_dir: str | None, device: torch.device | str | None, base: str) -> None:
        """path: a folder with model and tokenizer, or a checkpoint with the model_state_dict of `base`, which comes
        from cache_dir or, as `from_pretrained` has it, from the hub."""
        is_folder = Path(path).is_dir()
        source = path if is_folder else base
        self.tokenizer: Any = AutoTokenizer.from_pretrained(source, cache_dir=cache_dir)
        self.model: Any = AutoModelForSeq2SeqLM.from_pretrained(source, cache_dir=cache_dir)
        if not is_folder:
            self._load(path)
        self.model.to(device or "cpu").eval()

    def __call__(self, words: Sequence[str], questions: Sequence[str]) -> list[str]:
        asked = [f"The object is {word}.{question}" for word, question in zip(words, questions, strict=True)]
        ids = self.tokenizer(asked, padding=True, return_tensors="pt").to(self.model.device)
        out = self.model.generate(
            input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=16, do_sample=False
        )
        answers: list[str] = self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return answers

    def _load(self, path: str) -> None:
        try:
            self.model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"])
        except Exception as error:  # whatever torch.load meets in a file that is no checkpoint
            raise ValueError(f"env_load_path: {path!r} is no oracle: {error}") from error
