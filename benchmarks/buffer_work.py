"""The work of the buffer's benchmarks: games of 20 turns, and what every transition of them holds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
from buffer_memory import lognormal_lengths
from word_tokenizer import WordTokenizer, train_word_tokenizer

from archer_fast.trajectory_arrays import TrajectoryArrays

TURNS_A_GAME, GAMES_A_PART = 20, 128
ACTION_TOKENS, OBSERVATION_TOKENS = 12, 8  # a turn, on average


class Transition(NamedTuple):
    """What a batch must hold of a transition: the state is the whole history, the next state goes on from there.

    The second turn of [17 9] -> [41 2], [12] -> [5 2], [30]:

        Transition(state=[17 9 41 2 12], action=[5 2], next_state=[17 9 41 2 12 5 2 30], reward=1.,
                   terminated=True, rollout_logprobs=[-3., -4.])
    """

    state: np.ndarray
    action: np.ndarray
    next_state: np.ndarray
    reward: float
    terminated: bool
    rollout_logprobs: np.ndarray | None  # None: the store has none


class Work:
    """Games end to end. A transition's reward is its number, so a batch says itself what it must hold."""

    def __init__(self, arrays: TrajectoryArrays, words: WordTokenizer, first_transition: int = 0) -> None:
        self.arrays = arrays
        self.words = words
        self.first_transition = first_transition
        self.num_games = arrays.num_tokens.size
        self.num_transitions = arrays.rewards.size
        self.num_tokens = arrays.tokens.size

    @cached_property
    def game_starts(self) -> np.ndarray:
        """[B] int64, where each game's tokens begin."""
        return self.arrays.num_tokens.cumsum(dtype=np.int64) - self.arrays.num_tokens

    @cached_property
    def starts(self) -> np.ndarray:
        """[N] int64, where each transition's history begins: with its game."""
        return self.game_starts.repeat(TURNS_A_GAME)

    @cached_property
    def action_ends(self) -> np.ndarray:
        """[N] int32, in the game, as all lengths of a history."""
        lengths = self.arrays.observation_lengths + self.arrays.action_lengths
        return lengths.reshape(-1, TURNS_A_GAME).cumsum(1, dtype=np.int32).reshape(-1)

    @cached_property
    def state_ends(self) -> np.ndarray:
        return self.action_ends - self.arrays.action_lengths

    @cached_property
    def next_state_ends(self) -> np.ndarray:
        """The next turn's state, or the whole game."""
        states = self.state_ends.reshape(-1, TURNS_A_GAME)
        return np.concatenate([states[:, 1:], self.arrays.num_tokens[:, None]], axis=1).reshape(-1)

    @cached_property
    def logprob_starts(self) -> np.ndarray:
        """[N] int64, where each action's log-probs begin."""
        return self.arrays.action_lengths.cumsum(dtype=np.int64) - self.arrays.action_lengths

    @cached_property
    def terminated(self) -> np.ndarray:
        """[N] bool, of the last turn of a game that its task ended."""
        ends = np.zeros((self.num_games, TURNS_A_GAME), np.bool_)
        ends[:, -1] = self.arrays.terminated
        return ends.reshape(-1)

    def transition(self, number: int) -> Transition:
        row, start = number - self.first_transition, self.starts[number - self.first_transition]
        action = slice(start + self.state_ends[row], start + self.action_ends[row])
        logprobs = slice(self.logprob_starts[row], self.logprob_starts[row] + self.arrays.action_lengths[row])
        return Transition(
            self.arrays.tokens[start : action.start],
            self.arrays.tokens[action],
            self.arrays.tokens[start : start + self.next_state_ends[row]],
            float(number),
            bool(self.terminated[row]),
            self.arrays.rollout_logprobs[logprobs],
        )

    def parts(self) -> Iterator[Work]:
        """The games as an iteration of training brings them, so many at once."""
        actions = np.append(self.logprob_starts, self.arrays.rollout_logprobs.size)
        tokens = np.append(self.game_starts, self.num_tokens)
        for first in range(0, self.num_games, GAMES_A_PART):
            games = slice(first, min(first + GAMES_A_PART, self.num_games))
            turns = slice(games.start * TURNS_A_GAME, games.stop * TURNS_A_GAME)
            slices = {
                "tokens": slice(*tokens[[games.start, games.stop]]),
                "rollout_logprobs": slice(*actions[[turns.start, turns.stop]]),
            }
            slices |= dict.fromkeys(("num_tokens", "num_turns", "terminated", "truncated", "task_ids"), games)
            arrays = {name: array[slices.get(name, turns)] for name, array in self.arrays._asdict().items()}
            yield Work(TrajectoryArrays(**arrays), self.words, self.first_transition + turns.start)


def make_work(num_games: int, seed: int = 0) -> Work:
    """Words by Zipf's law, lengths lognormal, half of the games terminated."""
    rng = np.random.default_rng(seed)
    words = train_word_tokenizer()
    num_turns = num_games * TURNS_A_GAME
    observations = lognormal_lengths(rng, OBSERVATION_TOKENS, num_turns)
    actions = lognormal_lengths(rng, ACTION_TOKENS, num_turns)
    num_tokens = (observations + actions).reshape(-1, TURNS_A_GAME).sum(axis=1, dtype=np.int32)
    num_tokens += lognormal_lengths(rng, OBSERVATION_TOKENS, num_games)  # the final observation
    frequencies = 1 / np.arange(1, words.ids.size + 1)
    terminated = rng.random(num_games) < 0.5
    arrays = TrajectoryArrays(
        tokens=rng.choice(words.ids, num_tokens.sum(), p=frequencies / frequencies.sum()),
        num_tokens=num_tokens,
        num_turns=np.full(num_games, TURNS_A_GAME, np.int32),
        observation_lengths=observations,
        action_lengths=actions,
        rollout_logprobs=-rng.random(actions.sum(), np.float32),
        rewards=np.arange(num_turns, dtype=np.float32),
        policy_versions=np.zeros(num_turns, np.int64),
        terminated=terminated,
        truncated=~terminated,
        task_ids=np.zeros(num_games, np.int32),
    )
    return Work(arrays, words)
