"""The embedded engine: continuous batching of many games on the policy's own backbone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from archer_fast.backbone import Backbone
from archer_fast.batch import Alternatives, PackedBatch, prefix_of
from archer_fast.rollout.cuda_graphs import GraphedPasses
from archer_fast.rollout.interact import FinishedAction
from archer_fast.rollout.kv_cache import BranchCache, RecordingLayout, SlotCache


class EmbeddedEngine:
    """Samples actions for up to `num_slots` games at once, each game's keys and values kept over turns.

    One `step` is one packed forward pass over whatever tokens are new in any game (a fresh
    observation, or the token sampled last) and one sampled token a game. Observation tokens are
    computed once in a game's life; the vocabulary is met once a sampled token.
    Sampling is from the full softmax at `temperature` (no top-k), so the recorded log-probs are
    the ones the actor will score. `greedy` takes the most likely token instead (evaluation only).
    """

    def __init__(
        self,
        backbone: Backbone,
        stop_token_id: int,
        *,
        num_slots: int = 128,
        max_new_tokens: int = 16,
        temperature: float = 1.0,
        greedy: bool = False,
        generator: torch.Generator | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        self.backbone = backbone
        self.stop_token_id = stop_token_id
        self.num_slots = num_slots
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.greedy = greedy
        self.generator = generator
        self.max_tokens = backbone.max_positions
        self.num_forward_tokens = 0
        self._graphs: GraphedPasses | None = None
        if cuda_graphs and backbone.device.type == "cuda":
            self._graphs = GraphedPasses(backbone, num_slots, self.max_tokens)
        self.reset()

    def reset(self) -> None:
        """Forget every running game (also needed after the weights changed)."""
        if self._graphs is not None:
            self._graphs.reset()
            self._cache = self._graphs.cache
        else:
            self._cache = SlotCache(self.backbone.num_layers, self.num_slots, self.max_tokens)
        self._length = np.zeros(self.num_slots, dtype=np.int64)  # tokens in the cache
        self._new: list[list[int]] = [[] for _ in range(self.num_slots)]  # tokens not yet in the cache
        self._answering = [False] * self.num_slots  # has an observation and owes an action
        self._action: list[list[int]] = [[] for _ in range(self.num_slots)]
        self._logprobs: list[list[float]] = [[] for _ in range(self.num_slots)]

    def begin(self, slot: int) -> None:
        """Start a new game in `slot`, over whatever was there."""
        self._length[slot] = 0
        self._new[slot], self._action[slot], self._logprobs[slot] = [], [], []
        self._answering[slot] = False

    def observe(self, slot: int, observation_ids: Sequence[int]) -> None:
        """Append what the environment said; the next `step` starts answering it."""
        self._new[slot].extend(observation_ids)
        self._answering[slot] = True

    def room(self, slot: int) -> int:
        """Tokens that still fit into the game's window."""
        return self.max_tokens - int(self._length[slot]) - len(self._new[slot])

    def release(self, slot: int) -> None:
        """The game in `slot` is over."""
        self.begin(slot)

    @torch.no_grad()
    def step(self) -> list[FinishedAction]:
        """Advance every game that has something new by one token; return the actions that ended."""
        slots = [s for s in range(self.num_slots) if self._answering[s]]
        if not slots:
            return []
        counts = np.array([len(self._new[s]) for s in slots])
        last = np.cumsum(counts) - 1
        slot_ids = np.repeat(slots, counts)
        rank = np.arange(slot_ids.size) - np.repeat(last + 1 - counts, counts)
        positions = self._length[slot_ids] + rank
        ids = np.concatenate([self._new[s] for s in slots])
        device, end = self.backbone.device, int(positions.max()) + 1
        num_pairs = int(positions.sum()) + positions.size
        if self._graphs is not None and self._graphs.takes(ids.size, end):
            hidden = self._graphs(ids, positions, slot_ids, num_pairs)
        else:
            moved = (torch.from_numpy(x).to(device) for x in (slot_ids, rank, positions, ids))
            slot_t, rank_t, position_t, ids_t = moved
            layout = self._cache.pass_over(slot_t, position_t, rank_t, int(counts.max()), end, num_pairs)
            hidden = self.backbone(ids_t, position_t, layout)
        tokens, logprobs = self._sample(hidden[torch.from_numpy(last).to(device)])
        self.num_forward_tokens += ids.size
        self._length[slots] += counts

        finished = []
        for slot, token, logprob in zip(slots, tokens.tolist(), logprobs.tolist(), strict=True):
            action = self._action[slot]
            action.append(token)
            self._logprobs[slot].append(logprob)
            self._new[slot] = [token]
            if token == self.stop_token_id or len(action) >= self.max_new_tokens:
                finished.append(
                    FinishedAction(slot, np.array(action, np.int32), np.array(self._logprobs[slot], np.float32))
                )
                self._action[slot], self._logprobs[slot] = [], []
                self._answering[slot] = False
        return finished

    def _sample(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [n, H] -> token ids [n] and their log-probs [n] under the sampler, float32."""
        self.backbone.counts.read.rows += hidden.shape[0]
        logits = (hidden @ self.backbone.lm_head_weight.T).float() / self.temperature
        logprobs = logits.log_softmax(-1)
        if self.greedy:
            tokens = logprobs.argmax(-1)
        else:
            # Inverse CDF in float64: one random number a row, a token of probability 0 is never drawn.
            cdf = logprobs.double().exp().cumsum(-1)
            point = torch.rand(cdf.shape[0], 1, dtype=cdf.dtype, device=cdf.device, generator=self.generator)
            tokens = torch.searchsorted(cdf, point * cdf[:, -1:], right=True).squeeze(1)
            tokens = tokens.clamp(max=cdf.shape[1] - 1)
        return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)

    def _ends(self, tokens: Tensor, action_ids: Tensor) -> Tensor:
        """[n] bool: whether an action ends with its newest token [n]; action_ids [n, m]: all of its tokens so far."""
        del action_ids
        return tokens == self.stop_token_id

    @torch.no_grad()
    def sample_alternatives(self, batch: PackedBatch, turn_ids: Tensor) -> Alternatives:
        """Fresh actions at given turns; each game is prefilled once and its branches share that prefix.

        turn_ids: [B, R] int64, the turn of `batch` that branch r of game b answers, -1 for none.
        The policy is whatever the backbone's weights are now; the distribution is that of `step`.
        """
        games, rows = turn_ids.shape
        recorded = RecordingLayout(self.backbone.layout(batch.cu_seqlens, batch.lengths))
        hidden = self.backbone(batch.input_ids, batch.position_ids, recorded)
        self.num_forward_tokens += batch.num_tokens
        used = turn_ids >= 0
        state = batch.state_positions[turn_ids.clamp(min=0)]  # [B, R], positions in T
        position = batch.position_ids[state].long()  # [B, R], positions in the game
        prefix_index, prefix_mask = prefix_of(batch, position, used)
        alive = used.flatten().nonzero().squeeze(1)  # branches still being sampled
        cache = BranchCache(recorded, prefix_index, prefix_mask, alive)

        ids = torch.full((games * rows, self.max_new_tokens), self.stop_token_id, device=state.device)
        recorded_logprobs = torch.zeros(games * rows, self.max_new_tokens, device=state.device)
        lengths = torch.zeros(games * rows, dtype=torch.int64, device=state.device)
        predicting = hidden[state.flatten()[alive]]
        position = position.flatten()
        for step in range(self.max_new_tokens):
            tokens, logprobs = self._sample(predicting)
            ids[alive, step], recorded_logprobs[alive, step] = tokens, logprobs
            lengths[alive] += 1
            going_on = (~self._ends(tokens, ids[alive, : step + 1])).nonzero().squeeze(1)
            if going_on.numel() == 0 or step + 1 == self.max_new_tokens:
                break
            cache.keep(going_on)
            alive = alive[going_on]
            predicting = self.backbone(ids[alive, step], position[alive] + 1 + step, cache)
            cache.step += 1
            self.num_forward_tokens += alive.numel()
        passed = (lengths - 1).clamp(min=0)  # of each branch's tokens: its last one is sampled alone
        pairs = (passed * (position + 1) + passed * (passed + 1) // 2).sum()
        *sizes, num_pairs = torch.cat([lengths, pairs[None]]).tolist()
        self.backbone.counts.read.pairs += num_pairs
        width = max([1, *sizes])
        return Alternatives(
            action_ids=ids[:, :width].int().view(games, rows, width),
            logprobs=recorded_logprobs[:, :width].view(games, rows, width),
            lengths=lengths.view(games, rows),
            turn_ids=turn_ids,
        )
