"""Games turn by turn between a person, a policy and a task: watch, answer, or play."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from archer_fast.backbone import Backbone
from archer_fast.config import RolloutConfig, TaskConfig
from archer_fast.envs import registry
from archer_fast.envs.base import TextEnv
from archer_fast.envs.players import play_scripted
from archer_fast.envs.task_spec import TaskSpec
from archer_fast.evaluation import encoder
from archer_fast.rollout.embedded import EmbeddedEngine

Say = Callable[[str], None]
Ask = Callable[[str], str]  # a prompt to what the person typed; EOFError or KeyboardInterrupt end the game

MAX_ANSWERS = 12  # a task with more different answers than this has free text


class Quit(Exception):
    """The person wants to stop."""


class Player(Protocol):
    """Whoever acts in a game."""

    def begin(self) -> None: ...
    def act(self, observation: str) -> str | None:
        """The answer to the newest text; None where no more text fits the player's window."""
        ...


class PolicyPlayer:
    """A policy that plays one game at a time, token by token as in training."""

    def __init__(
        self, backbone: Backbone, stop_token_id: int, rollout: RolloutConfig, *, seed: int, greedy: bool = False
    ) -> None:
        self._engine = EmbeddedEngine(
            backbone,
            stop_token_id,
            num_slots=1,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            greedy=greedy,
            generator=torch.Generator(backbone.device).manual_seed(seed),
        )
        self._encode = encoder(backbone.tokenizer)
        self._decode: Callable[[Sequence[int]], str] = backbone.tokenizer.decode

    def begin(self) -> None:
        self._engine.begin(0)

    def act(self, observation: str) -> str | None:
        ids = self._encode(observation)
        if not ids or self._engine.room(0) < len(ids) + self._engine.max_new_tokens:
            return None
        self._engine.observe(0, ids)
        while not (finished := self._engine.step()):
            pass
        action: list[int] = finished[0].action_ids.tolist()
        return self._decode(action[:-1] if action[-1] == self._engine.stop_token_id else action)


class Person:
    """Somebody at the keyboard; an empty line, q, Ctrl-D and Ctrl-C say that it is enough."""

    def __init__(self, ask: Ask, prompt: str) -> None:
        self._ask, self._prompt = ask, prompt

    def begin(self) -> None:
        pass

    def act(self, observation: str) -> str:
        del observation  # it was printed
        return ask_person(self._ask, self._prompt)


def ask_person(ask: Ask, prompt: str) -> str:
    """What the person typed, stripped; Quit where that is the wish to stop."""
    try:
        text = ask(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        raise Quit from None
    except UnicodeDecodeError:
        return "?"
    if text.lower() in ("", "q", "quit", "exit"):
        raise Quit
    # A terminal hands undecodable bytes on as lone surrogates, which no tokenizer takes.
    return text.encode("utf-8", "replace").decode("utf-8")


def play_game(env: TextEnv, player: Player, seed: int, say: Say, *, echo: bool = True) -> float:
    """One game of `player` in `env`, told turn by turn; returns its return. `echo`: tell the actions too."""
    player.begin()
    observation = env.reset(seed)
    say(observation.strip())
    total, turn = 0.0, 0
    while True:
        action = player.act(observation)
        if action is None:
            say(f"[the model's window is full after {turn} turn{'s' * (turn != 1)}; return {total:g}]")
            return total
        turn += 1
        result = env.step(action)
        total += result.reward
        shown = f"{turn:>3}  {one_line(action)}" if echo else "    "
        say(f"{shown}  ->  {result.text.strip()}")
        observation = result.text
        if result.terminated or result.truncated:
            say(f"[{ending(result.info, result.truncated)} after {turn} turn{'s' * (turn != 1)}; return {total:g}]")
            return total


def ending(info: dict[str, Any], truncated: bool) -> str:
    """`won (dog)`, `lost (dog)`, `over`, `cut`: as far as the task tells."""
    if "won" not in info:
        return "cut" if truncated else "over"
    secret = next((str(info[k]) for k in ("object", "number", "answer", "word") if k in info), None)
    return ("won" if info["won"] else "lost") + (f" ({secret})" if secret else "")


@dataclass(slots=True, frozen=True)
class Answers:
    """How a task's environment answers, learned from scripted games.

    Answers(texts=(" Yes.\\n", " No.\\n", " Invalid Question.\\n"), winning=(" Yes.\\n",))
    """

    texts: tuple[str, ...]  # every answer met, the most frequent first; empty where the task has free text
    winning: tuple[str, ...]  # those that ended a won game
    prefix: str = " "  # the white space around the most frequent answer, put around free text
    suffix: str = "\n"

    def match(self, typed: str) -> str | None:
        """The answer that the person means ("y", "YES", "yes." are " Yes.\\n"), or None; free text is wrapped."""
        if not self.texts:
            return self.prefix + typed + self.suffix
        wanted = _letters(typed)
        for fits in (str.__eq__, str.startswith):
            found = [text for text in self.texts if fits(_letters(text), wanted)]
            if wanted and len(found) == 1:
                return found[0]
        return None


def learn_answers(spec: TaskSpec, options: dict[str, Any], games: int = 20) -> Answers:
    """Meet a task's answers by letting its scripted players play, and by saying nonsense to it."""
    counts: dict[str, int] = {}
    winning: dict[str, None] = {}
    for name in (spec.default_player, spec.reference_player):
        for seed in range(games):
            env = spec.make_env(**options)
            game = play_scripted(env, spec.make_player(name), seed, options)
            heard = game.observations[1:]
            if game.infos[-1].get("won"):  # the last words of a lost game may tell the secret
                heard.append(game.final_observation)
                winning[game.final_observation] = None
            for text in heard:
                counts[text] = counts.get(text, 0) + 1
    env = spec.make_env(**options)
    env.reset(0)
    nonsense = env.step("?!")
    if not (nonsense.terminated or nonsense.truncated):
        counts.setdefault(nonsense.text, 0)
    if not counts:
        return Answers((), ())
    texts = sorted(counts, key=lambda text: -counts[text])
    usual = texts[0]
    body = usual.strip()
    prefix, _, suffix = usual.partition(body) if body else ("", "", usual)
    return Answers(tuple(texts) if len(texts) <= MAX_ANSWERS else (), tuple(winning), prefix, suffix)


def answer_game(env: TextEnv, answers: Answers, player: Player, seed: int, say: Say, ask: Ask) -> int:
    """One game in which the person is the environment: the player asks, the person answers; returns the turns.

    Nothing is scored, as the secret is in the person's head: an answer that wins the task's own games ends
    this one if the action was a guess as far as the task tells (info["kind"] of `env`, asked for that alone).
    """
    choices = [text.strip() for text in answers.texts]
    say("You are the environment. Think of something, then answer the agent; an empty line ends the game.")
    if choices:
        say(f"Answers: {', '.join(choices)} (their first letters do)")
    player.begin()
    observation = env.reset(seed)
    say(observation.strip())
    for turn in range(env.max_turns):
        action = player.act(observation)
        if action is None:
            say("[the model's window is full]")
            return turn
        say(f"{turn + 1:>3}  {one_line(action)}")
        while (reply := answers.match(ask_person(ask, "     your answer: "))) is None:
            say(f"     please one of: {', '.join(choices)}; an empty line ends the game")
        observation = reply
        if reply in answers.winning and kind_of(env, action, seed) in ("guess", None):
            say(f"[the agent found it in {turn + 1} turn{'s' * (turn > 0)}]")
            return turn + 1
    say(f"[{env.max_turns} turns are over: the agent did not find it]")
    return env.max_turns


def kind_of(env: TextEnv, action: str, seed: int) -> str | None:
    """What the task calls this action ("guess", "question", ...); None where it does not say."""
    env.reset(seed)
    kind = env.step(action).info.get("kind")
    return None if kind is None else str(kind)


def one_line(action: str) -> str:
    """An action as it is shown; an untrained policy may say nothing, or line breaks."""
    return " ".join(action.split()) or "(nothing)"


def make_env(task: TaskConfig) -> TextEnv:
    return registry.make_env(task.name, **task.options)


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).lower()
