"""Games in batches: what is recorded of them, who is asked, and Twenty Questions by the original's rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_gpt2
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from archer_fast.compat.environment import (
    BatchedAdventureEnv,
    BatchedGuessMyCityEnv,
    BatchedTwentyQuestionsEnv,
    BatchedWebShopEnv,
    TwentyQuestionsEnv,
    batch_interact_environment,
)
from archer_fast.compat.environment.env_utils import add_mc_return, add_trajectory_reward
from archer_fast.compat.environment.twenty_questions import answers_of_table
from archer_fast.compat.overrides import ours
from archer_fast.envs.twenty_questions_table import fact_table


class CountingEnv:
    """Game i ends after lengths[i] turns; its observation is its turn, its reward the length of what it heard."""

    def __init__(self, *lengths: int) -> None:
        self.bsize, self.lengths = len(lengths), lengths
        self.heard: list[list[str]] = []
        self.resets: list[Any] = []

    def reset(self, idx: Any = None) -> list[str]:
        self.resets.append(idx)
        self.turns = [0] * self.bsize
        return [f"game {i}" for i in range(self.bsize)]

    def step(self, actions: list[str]) -> list[Any]:
        self.heard.append(actions)
        results: list[Any] = []
        for i, action in enumerate(actions):
            if self.turns[i] == self.lengths[i]:
                results.append(None)
                continue
            self.turns[i] += 1
            results.append((f"game {i}, turn {self.turns[i]}", len(action), self.turns[i] == self.lengths[i]))
        return results


class Agent:
    """Says what it was asked, in capitals: a fork's own get_action."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def get_action(self, observation: list[str]) -> list[str]:
        self.asked.append(list(observation))
        return [text.upper() for text in observation]


class OurAgent(Agent):
    @ours
    def get_action(self, observation: list[str]) -> list[str]:
        return super().get_action(observation)


def plainly_played(env: Any, agent: Any, decode_f: Callable[[list[str]], list[str]]) -> list[Any]:
    """One round as the original plays it: every game is asked until the last one has ended."""
    observations, games, ended = env.reset(idx=None), [[] for _ in range(env.bsize)], [False] * env.bsize
    while not all(ended):
        actions = agent.get_action(observations)
        for i, result in enumerate(env.step(decode_f(actions))):
            if result is not None:
                after, reward, ended[i] = result
                games[i].append((observations[i], actions[i], reward, after, ended[i]))
                observations[i] = after
    return games


def told(game: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(t[name] for name in ("observation", "action", "reward", "next_observation", "done")) for t in game]


def halved(actions: list[str]) -> list[str]:
    return [action[: len(action) // 2] for action in actions]


@pytest.mark.parametrize("kind", [Agent, OurAgent])
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_games_are_those_of_the_original(kind: type[Agent], lengths: list[int]) -> None:
    """Raw actions are kept, the environment hears decoded ones; games end apart."""
    games = batch_interact_environment(
        kind(), None, CountingEnv(*lengths), len(lengths), use_tqdm=False, decode_f=halved
    )
    assert [told(game) for game in games] == plainly_played(CountingEnv(*lengths), Agent(), halved)
    assert [len(game) for game in games] == lengths


def test_only_our_agent_is_spared_the_games_that_are_over() -> None:
    """One answer of None tells that a game is over; a foreign agent may mix its rows, and sees what it always saw."""
    env, agent = CountingEnv(1, 4, 2), OurAgent()
    batch_interact_environment(agent, None, env, 3, use_tqdm=False)
    assert [len(asked) for asked in agent.asked] == [3, 3, 2, 1]
    assert agent.asked[2] == ["game 1, turn 2", "game 2, turn 2"]
    assert [actions[0] for actions in env.heard] == ["GAME 0", *["GAME 0, TURN 1"] * 3]  # repeated, never empty

    replaced, padded = OurAgent(), OurAgent()
    replaced.get_action = Agent.get_action.__get__(replaced)  # type: ignore[method-assign]
    padded.fixes = frozenset()  # type: ignore[attr-defined]  # behind the original's padding the batch matters
    for foreign in (Agent(), replaced, padded):
        batch_interact_environment(foreign, None, CountingEnv(1, 4, 2), 3, use_tqdm=False)
        assert [len(asked) for asked in foreign.asked] == [3, 3, 3, 3]


def test_an_environment_that_answers_past_the_end_is_recorded_as_the_original_does() -> None:
    class Restless(CountingEnv):
        def step(self, actions: list[str]) -> list[Any]:
            return [("late", 0.5, True) if r is None else r for r in super().step(actions)]

    for agent in (Agent(), OurAgent()):
        games = batch_interact_environment(agent, None, Restless(1, 3), 2, use_tqdm=False)
        assert [told(game) for game in games] == plainly_played(Restless(1, 3), Agent(), lambda x: x)
        assert len(games[0]) == 3


def test_a_game_that_pauses_is_not_over() -> None:
    """None before the end, as of a server that did not answer: the game is asked again."""

    class Pausing(CountingEnv):
        def step(self, actions: list[str]) -> list[Any]:
            if len(self.heard) == 1:
                self.heard.append(actions)
                self.turns[1] += 1
                return [None, ("game 1, turn 2", 0.0, True)]
            return super().step(actions)

    for agent in (Agent(), OurAgent()):
        games = batch_interact_environment(agent, None, Pausing(3, 2), 2, use_tqdm=False)
        assert [t["action"] for t in games[0]] == ["GAME 0", "GAME 0, TURN 1", "GAME 0, TURN 2"]
        assert [len(asked) for asked in agent.asked[:4]] == [2, 2, 2, 2 if type(agent) is Agent else 1]


def test_rounds_returns_and_post_f(capfd: pytest.CaptureFixture[str]) -> None:
    """7 games asked of batches of 2 are 6."""
    env, seen = CountingEnv(2, 1), []

    def post(game: list[dict[str, Any]]) -> list[dict[str, Any]]:
        seen.append([(t["trajectory_reward"], t["mc_return"]) for t in game])
        return game[:1]

    games = batch_interact_environment(Agent(), "tokenizer", env, 7, post, True, env_idx=5)
    assert env.resets == [5, 5, 5]
    assert [len(game) for game in games] == [1] * 6
    assert seen[0] == [(6 + 14, 6 + 0.95 * 14), (20, 14)]  # "GAME 0", "GAME 0, TURN 1"
    assert seen[1] == [(6, 6)]
    assert capfd.readouterr().out == ""


def in_a_matrix(rewards: list[float], gamma: float) -> Any:
    """The original's formula, for games that it does not overflow on."""
    t = np.arange(len(rewards))
    return (np.triu(gamma ** (t[None] - t[:, None]).astype(float)) * np.array(rewards)).sum(1)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=60), st.floats(0.05, 1.0))
def test_returns_are_the_original_s(rewards: list[float], gamma: float) -> None:
    game = add_mc_return([{"reward": reward} for reward in rewards], gamma)
    found = np.array([t["mc_return"] for t in game])
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(found, in_a_matrix(rewards, gamma), rtol=1e-12, atol=1e-12)
    total = add_trajectory_reward(game)[0]["trajectory_reward"]
    assert total == pytest.approx(sum(rewards), abs=1e-9) and game[-1]["trajectory_reward"] == total


def test_limits_of_returns() -> None:
    rewards = [-1, 0.5, 2]
    assert [t["mc_return"] for t in add_mc_return([{"reward": r} for r in rewards], 0.0)] == rewards
    assert [t["mc_return"] for t in add_mc_return([{"reward": r} for r in rewards], 1.0)] == [1.5, 2.5, 2]
    assert [t["mc_return"] for t in add_mc_return([{"reward": r} for r in rewards])] == pytest.approx(
        [-1 + 0.95 * 0.5 + 0.95**2 * 2, 0.5 + 0.95 * 2, 2]
    )
    long = add_mc_return([{"reward": -1.0} for _ in range(30_000)])  # powers of gamma underflow
    assert long[0]["mc_return"] == pytest.approx(-20.0) and long[-1]["mc_return"] == -1.0
    assert add_mc_return([]) == [] == add_trajectory_reward([])


class Broken(CountingEnv):
    def __init__(self, how: str) -> None:
        super().__init__(2, 3)
        self.how = how

    def reset(self, idx: Any = None) -> list[str]:
        observations = super().reset(idx)
        return observations[:1] if self.how == "short reset" else observations

    def step(self, actions: list[str]) -> Any:
        results = super().step(actions)
        match self.how:
            case "none":
                return [None, None]
            case "one stuck":
                return [None, results[1]]
            case "short step":
                return results[:1]
            case "no list":
                return None
            case "gymnasium":
                return [("text", 0.0, True, False, {})] * 2
            case "text":
                return ["abc", "def"]
        return results


@pytest.mark.parametrize(
    "how, message",
    [
        ("none", r"env.step: .* got None for all of them, while 2 of 2 have not ended"),
        ("one stuck", r"env.step: .* got None for all of them, while 1 of 2 have not ended"),
        ("short step", "env.step: wanted a list of 2, one a game, got list of 1"),
        ("no list", "env.step: wanted a list of 2, one a game, got NoneType"),
        ("short reset", "env.reset: wanted a list of 2, one a game, got list of 1"),
        ("gymnasium", r"env.step: wanted \(next_observation, reward, done\) or None for a game, got \('text', 0.0"),
        ("text", r"env.step: wanted \(next_observation, reward, done\) or None for a game, got 'abc'"),
    ],
)
@pytest.mark.parametrize("kind", [Agent, OurAgent])
def test_broken_environments(how: str, message: str, kind: type[Agent]) -> None:
    with pytest.raises(ValueError, match=message):
        batch_interact_environment(kind(), None, Broken(how), 2, use_tqdm=False)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"num_trajectories: wanted at least env.bsize = 3, got 2"):
        batch_interact_environment(Agent(), None, CountingEnv(1, 1, 1), 2)
    with pytest.raises(ValueError, match=r"env: wanted an environment with .bsize, .reset\(idx\) and .step"):
        batch_interact_environment(Agent(), None, object(), 2)  # type: ignore[arg-type]
    env = CountingEnv(1)
    env.bsize = 0
    with pytest.raises(ValueError, match=r"env.bsize: wanted an integer from 1"):
        batch_interact_environment(Agent(), None, env, 2)
    with pytest.raises(ValueError, match="decode_f: wanted a list of 2, one a game, got list of 1"):
        batch_interact_environment(Agent(), None, CountingEnv(1, 1), 2, use_tqdm=False, decode_f=lambda x: x[:1])
    with pytest.raises(ValueError, match="decode_f: wanted a list of 2, one a game, got str of 2"):
        batch_interact_environment(Agent(), None, CountingEnv(1, 1), 2, use_tqdm=False, decode_f=lambda x: "ab")
    silent = Agent()
    silent.get_action = lambda observation: []  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"agent\.get_action: wanted a list of 2, one a game, got list of 0"):
        batch_interact_environment(silent, None, CountingEnv(1, 1), 2, use_tqdm=False)


# -- Twenty Questions ------------------------------------------------------------------------------------

WORDS = [list(thing.names) for thing in fact_table().objects]
DOG, SOCCER_BALL, SCISSORS = (
    next(i for i, w in enumerate(WORDS) if name in w) for name in ("dog", "soccer ball", "scissors")
)


def test_a_game_is_told_as_the_original_tells_it() -> None:
    env = BatchedTwentyQuestionsEnv("", "~/.cache", "cpu", bsize=2)
    assert env.reset(DOG) == ["Questions:\n"] * 2
    assert env.step(["Is it an animal?", "Is it a dog?"]) == [
        ("Questions:\nIs it an animal? Yes.\n", -1, False),
        ("Questions:\nIs it a dog? Yes.\n", 0, True),
    ]
    assert env.step(["Is it a cat", "Is it a dog?"]) == [
        ("Questions:\nIs it an animal? Yes.\nIs it a cat No.\n", -1, False),
        None,
    ]
    assert env.step(["Why?", ""])[0] == (
        "Questions:\nIs it an animal? Yes.\nIs it a cat No.\nWhy? Invalid Question.\n",
        -1,
        False,
    )
    assert env.reset(DOG)[0] == "Questions:\n"


def test_the_last_turn_ends_a_lost_game() -> None:
    env = BatchedTwentyQuestionsEnv(max_conversation_length=3, bsize=1)
    env.reset(DOG)
    results = [env.step(["Is it a cat?"])[0] for _ in range(4)]
    assert [(r[1], r[2]) if r else None for r in results] == [(-1, False), (-1, False), (-1, True), None]
    assert results[2] is not None and results[2][0] == "Questions:\n" + 3 * "Is it a cat? No.\n"  # nothing is revealed


def game(hidden: int, **options: Any) -> TwentyQuestionsEnv:
    env = TwentyQuestionsEnv(**options)
    env.reset(hidden)
    return env


@pytest.mark.parametrize(
    "hidden, question, mended, original",
    [
        (DOG, "Is it a dog?", True, True),
        (DOG, "Is it a small DOG?! ...", True, True),  # what is before the name does not count
        (DOG, "dog", True, True),
        (DOG, "Is it a dog or a cat?", False, False),
        (DOG, "Is it a hotdog?", False, False),
        (DOG, "Is it a-dog?", False, False),
        (DOG, "Is it dogs?", False, False),
        (DOG, "?", False, False),
        (DOG, "", False, False),
        (SOCCER_BALL, "Is it a soccer ball?", True, False),  # by the original's rule nobody wins it
        (SOCCER_BALL, "Is it a ball?", False, False),
        (SCISSORS, "Is it a pair of scissors?", True, True),
    ],
)
def test_what_wins(hidden: int, question: str, mended: bool, original: bool) -> None:
    assert game(hidden).is_correct(question) is mended
    assert game(hidden, original_quirks=True).is_correct(question) is original
    for answer, counts in (("Yes.", True), ("No.", False)):
        result = game(hidden)._step(question, answer)
        won = mended and counts
        assert result == (f"Questions:\n{question} {answer}\n", 0 if won else -1, won)


def test_every_object_can_be_won_and_seven_cannot_by_the_original_s_rule() -> None:
    guesses = [thing.guess for thing in fact_table().objects]
    mended, quirky = BatchedTwentyQuestionsEnv(bsize=1), BatchedTwentyQuestionsEnv(bsize=1, original_quirks=True)
    won: dict[bool, list[str]] = {True: [], False: []}
    for env in (mended, quirky):
        for i, names in enumerate(WORDS):
            env.reset(i)
            result = env.step([guesses[i]])[0]
            assert result is not None and result[0].endswith(" Yes.\n")
            won[env is mended] += [names[0]] if result[2] else []
    assert len(won[True]) == 157
    unwinnable = {names[0] for names in WORDS} - set(won[False])
    only_last_word = {n[0] for n in WORDS if not {guesses[WORDS.index(n)].rstrip("?").split()[-1]} & set(n)}
    assert unwinnable == only_last_word >= {
        "soccer ball", "golf ball", "tennis ball", "tennis racket", "baseball bat", "watering can", "lawn mower",
    }  # fmt: skip


def test_the_table_answers_facts_and_guesses() -> None:
    table = fact_table()
    for attribute in table.attributes[:40]:
        for i in (DOG, SOCCER_BALL, SCISSORS):
            expected = "Yes." if attribute.mask >> i & 1 else "No."
            assert (
                answers_of_table([WORDS[i][0]] * 2, [attribute.phrasings[0], attribute.phrasings[-1]]) == [expected] * 2
            )
    asked = ["Is it a computer keyboard?", "Is it a computer?", "Could it be my old computer", "Is it a thing?", ""]
    assert answers_of_table(["computer"] * 5, asked) == [
        "No.",
        "Yes.",
        "Yes.",
        "Invalid Question.",
        "Invalid Question.",
    ]
    assert answers_of_table(["computer keyboard"] * 2, asked[:2]) == ["Yes.", "No."]


def test_an_oracle_of_the_user_s_is_asked_and_read_as_the_original_reads_it() -> None:
    heard: list[Any] = []

    def oracle(words: list[str], questions: list[str]) -> list[str]:
        heard.append((words, questions))
        return ["well, YES", "no way", "I know yes and no", "perhaps"]

    env = BatchedTwentyQuestionsEnv(bsize=4, oracle=oracle)
    env.reset(DOG)
    results = env.step(["dog", "dog", "a", "b"])
    assert heard == [(["dog"] * 4, ["dog", "dog", "a", "b"])]
    assert results == [
        ("Questions:\ndog Yes.\n", 0, True),
        ("Questions:\ndog No.\n", -1, False),
        ("Questions:\na Yes.\n", -1, False),
        ("Questions:\nb Invalid Question.\n", -1, False),
    ]


def test_hidden_objects_are_drawn_evenly_and_by_the_seed() -> None:
    one, other = (BatchedTwentyQuestionsEnv(bsize=200, seed=7) for _ in range(2))

    def hidden(env: BatchedTwentyQuestionsEnv) -> list[str]:
        env.reset()
        return [game.curr_word[0] for game in env.env_list if game.curr_word]

    drawn = [hidden(one) for _ in range(20)]
    assert drawn == [hidden(other) for _ in range(20)]
    assert drawn[0] != drawn[1] != hidden(BatchedTwentyQuestionsEnv(bsize=200, seed=8))
    counts = np.unique(np.concatenate(drawn), return_counts=True)[1]
    expected = 4000 / 157
    assert counts.size == 157 and ((counts - expected) ** 2 / expected).sum() < 230  # 156 deviations: 1 in 10,000


def test_played_through_the_batch() -> None:
    class Guesser:
        def get_action(self, observation: list[str]) -> list[str]:
            return ["Is it a cat?" if text.count("\n") < 3 else "Is it a dog?" for text in observation]

    env = BatchedTwentyQuestionsEnv(bsize=3)
    games = batch_interact_environment(Guesser(), None, env, 6, use_tqdm=False, env_idx=DOG)
    assert [[t["reward"] for t in game] for game in games] == [[-1, -1, 0]] * 6
    assert games[0][0]["trajectory_reward"] == -2 and games[5][2]["done"] is True
    assert games[0][2]["observation"] == "Questions:\nIs it a cat? No.\nIs it a cat? No.\n"


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder-decoder with a tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = AutoTokenizer.from_pretrained(make_gpt2(folder / "gpt2"))
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=tokenizer.pad_token_id, pad_token_id=tokenizer.pad_token_id, initializer_factor=8.0,
        eos_token_id=len(tokenizer) - 1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder / "oracle")
    tokenizer.save_pretrained(folder / "oracle")
    return folder / "oracle"


@pytest.mark.usefixtures("one_thread")
def test_a_language_model_answers_from_a_folder_or_the_original_s_checkpoint(t5: Path, tmp_path: Path) -> None:
    """Its prompt is the original's, and no answer depends on what else is in the batch."""
    torch.manual_seed(1)
    model = T5ForConditionalGeneration(T5Config.from_pretrained(t5)).eval()  # other weights than the folder's
    tokenizer = AutoTokenizer.from_pretrained(t5)
    torch.save({"model_state_dict": model.state_dict()}, tmp_path / "20q_t5_oracle.pt")
    questions = ["Is it alive?", "Is it something that you can hold in one hand?", "?"]

    def alone(question: str) -> str:
        ids = tokenizer(f"The object is dog.{question}", return_tensors="pt")["input_ids"]
        return tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=16)[0], skip_special_tokens=True)

    env = BatchedTwentyQuestionsEnv(str(tmp_path / "20q_t5_oracle.pt"), None, "cpu", 20, 3, oracle_lm=str(t5))
    env.reset(DOG)
    from_checkpoint = env.generate_answers(questions)
    assert from_checkpoint == [alone(question) for question in questions]
    assert len(set(from_checkpoint)) > 1

    env = BatchedTwentyQuestionsEnv(str(t5), bsize=3)
    env.reset(DOG)
    model.load_state_dict(T5ForConditionalGeneration.from_pretrained(t5).state_dict())
    assert env.generate_answers(questions) == [alone(question) for question in questions] != from_checkpoint


class Malicious:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_a_checkpoint_with_code_in_it_is_refused(t5: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"model_state_dict": Malicious()}, tmp_path / "oracle.pt")
    with pytest.raises(ValueError, match=r"env_load_path: .*oracle\.pt' is no oracle"):
        BatchedTwentyQuestionsEnv(str(tmp_path / "oracle.pt"), oracle_lm=str(t5))
    assert "code ran" not in capfd.readouterr().out


def test_bad_arguments_of_twenty_questions(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="env_load_path: nothing is at '/nowhere/20q.pt', a table of facts answers"):
        env = BatchedTwentyQuestionsEnv("/nowhere/20q.pt", bsize=1)
    assert env.oracle is answers_of_table
    with pytest.raises(ValueError, match=r"oracle: wanted either an oracle or an env_load_path"):
        BatchedTwentyQuestionsEnv(str(tmp_path), oracle=answers_of_table)
    with pytest.raises(RuntimeError, match="no game is on"):
        env.step(["Is it a dog?"])
    env.reset()
    with pytest.raises(ValueError, match="questions: wanted 1, one a game, got 2"):
        env.step(["a", "b"])
    with pytest.raises(ValueError, match="idx: wanted an integer from 0 to 156, got 157"):
        env.reset(157)
    with pytest.raises(ValueError, match="bsize: wanted an integer from 1"):
        BatchedTwentyQuestionsEnv(bsize=0)
    with pytest.warns(UserWarning, match="BatchedTwentyQuestionsEnv: .* not used: word_list"):
        BatchedTwentyQuestionsEnv(word_list=["a"])
    short = BatchedTwentyQuestionsEnv(bsize=2, oracle=lambda words, questions: ["Yes."])
    short.reset()
    with pytest.raises(ValueError, match="oracle: wanted 2 answers, got 1"):
        short.step(["a", "b"])


@pytest.mark.parametrize(
    "kind, arguments",
    [
        (BatchedGuessMyCityEnv, {"env_load_path": "city.pt", "device": "cpu", "cache_dir": "~"}),
        (BatchedAdventureEnv, {"env_load_path": "detective.z5", "bsize": 4, "max_steps": 50}),
        (BatchedWebShopEnv, {"env_load_path": "http://127.0.0.1:3001", "lower": 0, "upper": 100}),
    ],
)
def test_tasks_that_are_not_here_say_what_to_bring(kind: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=rf"{kind.__name__}: .*archer.environment.{kind.__name__}.*\.bsize"):
        kind(**arguments)
