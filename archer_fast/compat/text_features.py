"""What the shared critic reads of texts: hidden states of a frozen trunk at their ends, remembered by text."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archer_fast.backbone import Backbone, borrowed, fingerprint
from archer_fast.compat.generation import prompts_of
from archer_fast.compat.packed_texts import PackedTexts
from archer_fast.compat.policy import base_model
from archer_fast.critic import ActionFeatures, StateFeatures
from archer_fast.ops import linear_logprobs

MAX_BYTES = 1 << 31  # of the hidden states of actions, and as much of observations, that are remembered in host memory

Pair = tuple[str, str]  # observation, action


class FrozenTrunk:
    """The policy as it is now, for good. Of a LoRA policy: its base weights, without a copy; nobody may move them."""

    def __init__(self, agent: Any) -> None:
        model = agent.accelerator.unwrap_model(agent.model)
        self._adapted = model if hasattr(model, "disable_adapter") else None
        self._copy: Backbone | None = None
        if self._adapted is None:
            self._copy = Backbone(copy.deepcopy(model), agent.tokenizer).requires_grad_(False)
        self._tokenizer = agent.tokenizer
        self.device = next(model.parameters()).device

    @contextmanager
    def open(self) -> Iterator[Backbone]:
        """The trunk inside the block, without gradients."""
        # Whatever autocast the caller is in: what is remembered is one number.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self._copy is not None:
                yield self._copy
                return
            assert self._adapted is not None
            trained = [(p, p.requires_grad) for p in self._adapted.parameters()]  # peft sets those of adapters
            try:
                with self._adapted.disable_adapter(), borrowed(base_model(self._adapted), self._tokenizer) as backbone:
                    yield backbone
            finally:
                for p, requires_grad in trained:
                    p.requires_grad_(requires_grad)

    def fingerprint(self) -> int:
        """A checksum of the weights that are read."""
        model = base_model(self._adapted) if self._copy is None else self._copy.model
        return fingerprint((name, p) for name, p in model.named_parameters() if "lora_" not in name)


class TextFeatures:
    """Features of observations, and of actions behind them, by one `FrozenTrunk`.

    A turn's index, which texts do not tell, is the number of newlines in the observation: the original's games have a
    line a turn. An action counts as repeated where a line of the observation begins with it.
    """

    def __init__(self, agent: Any) -> None:
        self.trunk = FrozenTrunk(agent)
        self.template = getattr(agent, "template", None)  # of `prompts_of`
        self._texts = PackedTexts(agent.tokenizer)
        with self.trunk.open() as backbone:
            self.hidden_size, self.device = backbone.hidden_size, backbone.device
            self._dtype = backbone.lm_head_weight.dtype
        self._states, self._actions = _Rows(MAX_BYTES), _Rows(MAX_BYTES)

    @property
    def num_tokens(self) -> int:
        """Tokens that the trunk has read so far."""
        return self._texts.num_tokens

    def states(self, observations: Sequence[str]) -> StateFeatures:
        """Of the ends of n observations; those not seen before are read."""
        new = self._states.missing(observations)
        if new:
            hidden = torch.empty(len(new), self.hidden_size, dtype=self._dtype, device=self.device)
            with self.trunk.open() as backbone:
                once = np.ones(len(new), np.int64)
                for batch, rows, asked in self._texts.states(prompts_of(self, new), once, 0, self.device):
                    layout = backbone.layout(batch.cu_seqlens, batch.lengths)
                    read = backbone(batch.input_ids, batch.position_ids, layout)
                    hidden[torch.from_numpy(asked)] = read[batch.state_positions[rows[rows >= 0]]]
                    self._texts.num_tokens += batch.num_tokens
            self._states.add(new, hidden)
        turn = torch.tensor([text.count("\n") for text in observations], device=self.device)
        return StateFeatures(self._states(observations)[0].to(self.device), turn)

    def pairs(
        self, observations: Sequence[str], actions: Sequence[str], *, keep: bool = False
    ) -> tuple[StateFeatures, ActionFeatures]:
        """Of n observations and the actions behind them. keep: remember these actions, as they will be asked again."""
        pairs = list(zip(observations, actions, strict=True))
        store = self._actions if keep else _Rows(None)
        new = store.missing(pairs)
        if new:
            store.add(new, *self._read(new))
        hidden, logprob = (column.to(self.device) for column in store(pairs))
        repeated = torch.tensor([float(_said_before(*pair)) for pair in pairs], device=self.device)
        return self.states(observations), ActionFeatures(hidden, logprob, repeated)

    def _read(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Hidden states [n, H] at the actions' ends, and the actions' log-probs [n]; an empty action ends where its
        observation does."""
        observations, actions = map(list, zip(*pairs, strict=True))
        hidden = torch.empty(len(pairs), self.hidden_size, dtype=self._dtype, device=self.device)
        logprob = torch.zeros(len(pairs), device=self.device)
        with self.trunk.open() as backbone:
            for score in self._texts.scores(backbone, prompts_of(self, observations), actions):
                tree, rows = score.tree, torch.from_numpy(score.pairs).to(self.device)
                hidden[rows] = score.hidden[tree.action_positions]
                each = linear_logprobs(score.hidden, backbone.lm_head_weight, tree.target_ids, rows=tree.rows).logprobs
                logprob.index_add_(0, rows[tree.branch_ids], each.float())
        empty = [i for i, ids in enumerate(self._texts.tokens(actions)) if not ids]
        if empty:
            hidden[empty] = self.states([observations[i] for i in empty]).hidden
        return hidden, logprob


def _said_before(observation: str, action: str) -> bool:
    said = action.strip()
    return said != "" and any(f"\n{said}{end}" in f"\n{observation}" for end in " \n")


class _Rows:
    """Columns of numbers in host memory, a row for each key. All rows are forgotten where more than about `max_bytes`
    would come together."""

    def __init__(self, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        self._place: dict[Hashable, int] = {}
        self._columns: list[Tensor] = []

    def missing(self, keys: Sequence[Hashable]) -> list[Any]:
        """The keys that have no row, once each."""
        asked = dict.fromkeys(keys)
        new = [key for key in asked if key not in self._place]
        row_bytes = sum(column[0].nbytes for column in self._columns if len(column))
        if self.max_bytes is not None and new and (len(self._place) + len(new)) * row_bytes > self.max_bytes:
            self._place, self._columns = {}, []
            new = list(asked)
        return new

    def add(self, keys: Sequence[Hashable], *columns: Tensor) -> None:
        """columns: [len(keys), ...] each."""
        with torch.inference_mode(False):  # a caller's would make tensors that nobody may write to later
            self._add(keys, columns)

    def _add(self, keys: Sequence[Hashable], columns: Sequence[Tensor]) -> None:
        begin, end = len(self._place), len(self._place) + len(keys)
        self._columns = self._columns or [column.new_empty(0, *column.shape[1:], device="cpu") for column in columns]
        if end > len(self._columns[0]):  # twice the room
            larger = [own.new_empty(max(end, 2 * begin), *own.shape[1:]) for own in self._columns]
            for new, own in zip(larger, self._columns, strict=True):
                new[:begin] = own[:begin]
            self._columns = larger
        for own, column in zip(self._columns, columns, strict=True):
            own[begin:end] = column
        self._place |= {key: begin + i for i, key in enumerate(keys)}

    def __call__(self, keys: Sequence[Hashable]) -> list[Tensor]:
        """The rows of `keys` [n, ...], column by column."""
        rows = torch.tensor([self._place[key] for key in keys])
        return [column[rows] for column in self._columns]
