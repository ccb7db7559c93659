"""Scripted play: the record is the game, the seed settles it, and the players are as strong as said."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from archer_fast.envs import ScriptedGame, get, play_scripted
from archer_fast.envs.base import StepResult
from archer_fast.envs.guess_number import GuessNumber, bisection_return
from archer_fast.envs.twenty_questions_players import ExpertPlayer, MediocrePlayer
from archer_fast.envs.twenty_questions_table import fact_table

TASKS_AND_PLAYERS = [(task, player) for task in ("guess-number", "twenty-questions") for player in get(task).players]


def games(task: str, player: str, count: int, **options: object) -> list[ScriptedGame]:
    spec = get(task)
    env, strategy = spec.make_env(**options), spec.make_player(player)
    return [play_scripted(env, strategy, seed) for seed in range(count)]


def mean_return(played: list[ScriptedGame]) -> float:
    return statistics.mean(game.episode_return for game in played)


@pytest.mark.parametrize(("task", "player"), TASKS_AND_PLAYERS)
def test_the_same_seed_gives_the_same_game_and_the_record_replays(task: str, player: str) -> None:
    played = games(task, player, 20)
    assert played == games(task, player, 20)
    spec = get(task)
    assert (
        play_scripted(spec.make_env(), spec.make_player(player), 13) == played[13]
    )  # not a matter of what came before
    env = spec.make_env()
    for seed, game in enumerate(played):
        texts = [env.reset(seed)]
        results = [env.step(action) for action in game.actions]
        texts += [result.text for result in results]
        assert [*game.observations, game.final_observation] == texts
        assert game.rewards == [result.reward for result in results]
        assert game.infos == [result.info for result in results]
        assert (game.terminated, game.truncated) == (True, False)
        assert game.text == "".join(a + b for a, b in zip(texts, [*game.actions, ""], strict=True))


@pytest.mark.parametrize(("task", "player"), TASKS_AND_PLAYERS)
def test_players_speak_only_the_vocabulary_and_are_understood(task: str, player: str) -> None:
    words = set(get(task).vocabulary_text())
    played = games(task, player, 50)
    assert {action for game in played for action in game.actions} <= words
    assert all(info["kind"] != "invalid" for game in played for info in game.infos)


def test_guesses_stay_in_the_object_set() -> None:
    names = {"Is it a dog?", "Is it a banana?", "Is it toothpaste?"}
    played = games("twenty-questions", "mediocre", 200, objects=["dog", "banana", "toothpaste"])
    guesses = {a for g in played for a, info in zip(g.actions, g.infos, strict=True) if info["kind"] == "guess"}
    assert guesses == names


@pytest.mark.parametrize(
    ("player", "objects", "low", "high"),
    [
        ("random", 10, -17.8, -16.2),
        ("mediocre", 10, -13.5, -11.9),
        ("mediocre", 32, -17.2, -15.7),
        ("mediocre", None, -19.4, -18.5),
        ("expert", 10, -3.2, -2.8),
        ("expert", 32, -4.9, -4.5),
        ("expert", None, -7.3, -6.8),
    ],
)
def test_strength_at_twenty_questions(player: str, objects: int | None, low: float, high: float) -> None:
    """400 games; the bands are 2,000-game means with about two standard errors and room for table edits."""
    assert low <= mean_return(games("twenty-questions", player, 400, objects=objects)) <= high


def test_the_expert_always_wins() -> None:
    """Every object, not a sample: no two are alike to the table, and twenty turns suffice."""
    env = get("twenty-questions").make_env()
    player = ExpertPlayer()
    for name in env.objects:  # type: ignore[attr-defined]
        player.reset(0, {})
        observation, turns = env.reset(0, {"object": name}), 0
        while True:
            result = env.step(player.act(observation))
            observation, turns = result.text, turns + 1
            if result.terminated:
                break
        assert result.info["won"] and turns <= 12, name


def test_the_mediocre_player_guesses_now_and_then_and_repeats_questions_alone() -> None:
    played = games("twenty-questions", "mediocre", 500)
    infos = [info for game in played for info in game.infos]
    guess_share = statistics.mean(info["kind"] == "guess" for info in infos)
    assert abs(guess_share - MediocrePlayer.guess_share) < 0.02
    assert 0.1 < statistics.mean(info["repeat"] for info in infos) < 0.2  # 0.15 in 2,000 games
    assert not any(info["repeat"] for info in infos if info["kind"] == "guess")
    first = {attribute.phrasings[0] for attribute in fact_table().attributes}
    assert {a for g in played for a, i in zip(g.actions, g.infos, strict=True) if i["kind"] == "question"} <= first


def test_the_mediocre_player_goes_on_when_every_object_was_guessed() -> None:
    """Two objects, and an env that says no to both: what is left is to guess again."""
    player = MediocrePlayer()
    player.reset(0, {"objects": ["dog", "cat"]})
    said = [player.act(" No.\n") for _ in range(60)]
    guesses = [action for action in said if action in ("Is it a dog?", "Is it a cat?")]
    assert len(guesses) > 2 and set(guesses[:2]) == {"Is it a dog?", "Is it a cat?"}


def test_bisection_reaches_the_exact_optimum() -> None:
    """Every number once: the mean is the formula's, to the last digit."""
    spec = get("guess-number")
    for high in (1, 2, 7, 32, 100):
        env = GuessNumber(high=high)
        total = 0.0
        for number in range(1, high + 1):
            player = spec.make_player("bisection")
            player.reset(0, env.options)
            observation = env.reset(0, {"number": number})
            while True:
                result = env.step(player.act(observation))
                observation = result.text
                total += result.reward
                if result.terminated:
                    break
        assert total / high == pytest.approx(bisection_return(high))


def test_the_random_number_player() -> None:
    """E[return] = -sum_{t=1}^{20} (31/32)^t = -14.57 for 1..32."""
    expected = -sum((31 / 32) ** t for t in range(1, 21))
    assert mean_return(games("guess-number", "random", 2000)) == pytest.approx(expected, abs=0.5)


class Silent:
    """An env of someone else: no `options`."""

    name: ClassVar[str] = "silent"
    max_turns = 1
    step_time_limit: float | None = None

    def reset(self, seed: int, options: Mapping[str, Any] | None = None) -> str:
        return "?"

    def step(self, action: str) -> StepResult:
        return StepResult(".", 1.0, False, True, {})


class Sayer:
    def reset(self, seed: int, env_options: Mapping[str, Any]) -> None:
        self.options = env_options

    def act(self, observation: str) -> str:
        return f"{observation}{self.options['word']}"


def test_an_env_without_options_needs_them_given() -> None:
    with pytest.raises(ValueError, match="env_options: wanted a mapping, as Silent has no `options`, got None"):
        play_scripted(Silent(), Sayer(), 0)
    assert play_scripted(Silent(), Sayer(), 0, {"word": "yes"}) == ScriptedGame(
        observations=["?"],
        actions=["?yes"],
        rewards=[1.0],
        infos=[{}],
        final_observation=".",
        terminated=False,
        truncated=True,
    )
