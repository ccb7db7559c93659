"""The original's replay: strings in arrays of objects, tokenised whenever they are read."""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

import numpy as np
from buffer_batches import Packed, pack
from buffer_work import Transition, Work
from transformers import PreTrainedTokenizerFast

MAX_TOKENS = 1024  # longer than anything here: `truncation` cuts nothing


class Experience(NamedTuple):
    """One transition as the original's environments give it."""

    observation: str
    action: str
    reward: float
    next_observation: str
    done: bool
    mc_return: float


class StringBuffer:
    """`archer.data.ReplayBuffer`: same fields, same types, same way to draw; our own code."""

    def __init__(self, capacity: int) -> None:
        self.max_size = capacity
        self.size = 0
        self.observations, self.actions, self.next_observations = (
            np.full(capacity, "", dtype=object) for _ in range(3)
        )
        self.rewards, self.mc_returns = (np.empty(capacity, np.float64) for _ in range(2))
        self.dones = np.empty(capacity, np.bool_)

    def insert(
        self, observation: str, action: str, reward: float, next_observation: str, done: bool, mc_return: float
    ) -> None:
        place = self.size % self.max_size
        self.observations[place] = observation
        self.actions[place] = action
        self.rewards[place] = reward
        self.next_observations[place] = next_observation
        self.dones[place] = done
        self.mc_returns[place] = mc_return
        self.size += 1

    def sample(self, batch_size: int) -> dict[str, np.ndarray]:
        places = np.random.randint(0, self.size, size=(batch_size,)) % self.max_size  # noqa: NPY002, as it does
        return {
            "observation": self.observations[places],
            "action": self.actions[places],
            "reward": self.rewards[places],
            "next_observation": self.next_observations[places],
            "done": self.dones[places],
            "mc_return": self.mc_returns[places],
        }


class OriginalStore:
    def __init__(self, work: Work) -> None:
        self.buffer = StringBuffer(work.num_transitions)
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=work.words.tokenizer, pad_token="<pad>")

    def set_threads(self, threads: int) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"

    def prepare(self, part: Work) -> list[Experience]:
        return experiences(part)

    def insert(self, prepared: list[Experience]) -> None:
        for experience in prepared:
            self.buffer.insert(*experience)

    def sample_collate_padded(self, n: int) -> dict[str, Any]:
        batch = self.buffer.sample(n)
        tokens = {
            name: self.tokenizer(
                batch[name].tolist(), return_tensors="pt", padding=True, truncation=True, max_length=MAX_TOKENS
            )
            for name in ("observation", "action", "next_observation")
        }
        return {**batch, **tokens}

    def sample_collate_packed(self, n: int) -> Packed:
        batch = self.buffer.sample(n)
        states, actions, next_states = (
            [
                np.array(ids, np.int32)
                for ids in self.tokenizer(
                    batch[name].tolist(), return_attention_mask=False, truncation=True, max_length=MAX_TOKENS
                )["input_ids"]
            ]
            for name in ("observation", "action", "next_observation")
        )
        lengths = (np.array([ids.size for ids in rows], np.int32) for rows in (states, actions, next_states))
        return pack(next_states, *lengths, batch["reward"], batch["done"], None)

    def padded_transitions(self, batch: dict[str, Any]) -> list[Transition]:
        columns = [
            [ids[mask.bool()].numpy() for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True)]
            for found in (batch[name] for name in ("observation", "action", "next_observation"))
        ]
        rest = zip(batch["reward"].tolist(), batch["done"].tolist(), strict=True)
        return [Transition(*texts, *more, None) for *texts, more in zip(*columns, rest, strict=True)]

    def num_bytes(self) -> int:
        """Strings that are held twice, as a next observation and the next one's observation, are counted once."""
        buffer = self.buffer
        arrays = (
            *(buffer.observations, buffer.actions, buffer.next_observations),
            *(buffer.rewards, buffer.mc_returns, buffer.dones),
        )
        strings = {id(text): sys.getsizeof(text) for column in arrays[:3] for text in column}
        return sum(array.nbytes for array in arrays) + sum(strings.values())


def experiences(part: Work) -> list[Experience]:
    """The games as text. A next observation is the same object as the next turn's observation, as in the original."""
    texts = dict(zip(part.words.ids.tolist(), part.words.words, strict=True))
    made = []
    turns = len(part.state_ends) // part.num_games
    for game, start in enumerate(part.game_starts):
        words = [texts[token] for token in part.arrays.tokens[start : start + part.arrays.num_tokens[game]].tolist()]
        text = "".join(words)
        ends = np.cumsum([0, *map(len, words)])
        rows = range(game * turns, (game + 1) * turns)
        states = [text[: ends[part.state_ends[row]]] for row in rows] + [text]
        for turn, row in enumerate(rows):
            action = text[ends[part.state_ends[row]] : ends[part.action_ends[row]]]
            reward = float(part.arrays.rewards[row])
            done = bool(part.terminated[row])
            made.append(Experience(states[turn], action, reward, states[turn + 1], done, reward))
    return made
