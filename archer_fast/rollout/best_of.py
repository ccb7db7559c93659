"""The engine of CHAI: sample some actions a state, play the one that a critic prefers (arXiv 2204.08426)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from archer_fast.batch import Alternatives, PackedBatch
from archer_fast.packing import pack_trajectories
from archer_fast.rollout.interact import FinishedAction
from archer_fast.rollout.policy_engine import PolicyEngine
from archer_fast.trajectory import Trajectory, Turn

Score = Callable[[PackedBatch, Alternatives], Tensor]  # -> [B, R] float32, one a candidate


class BestOfEngine:
    """Every `step` answers all waiting games at once, from their whole histories: the critic reads whole actions, so
    nothing is gained by advancing token by token. The log-probs it returns are those of the sampler, not of the choice.
    """

    def __init__(self, engine: PolicyEngine, num_candidates: int, score: Score) -> None:
        self.engine, self.num_candidates, self.score = engine, num_candidates, score
        self.num_slots = engine.num_slots
        self.max_new_tokens, self.stop_token_id = engine.max_new_tokens, engine.stop_token_id
        self.reset()

    def reset(self) -> None:
        """Forget every running game."""
        self._turns: list[list[Turn]] = [[] for _ in range(self.num_slots)]
        self._pending: list[list[int]] = [[] for _ in range(self.num_slots)]  # observed, not yet answered
        self._waiting = [False] * self.num_slots
        self._length = [0] * self.num_slots  # tokens of the turns

    def begin(self, slot: int) -> None:
        """Start a new game in `slot`, over whatever was there."""
        self._turns[slot], self._pending[slot], self._waiting[slot], self._length[slot] = [], [], False, 0

    def observe(self, slot: int, observation_ids: Sequence[int]) -> None:
        """Append what the environment said; the next `step` answers it."""
        self._pending[slot].extend(observation_ids)
        self._waiting[slot] = True

    def room(self, slot: int) -> int:
        """Tokens that still fit into the game's window."""
        return self.engine.max_tokens - self._length[slot] - len(self._pending[slot])

    def release(self, slot: int) -> None:
        """The game in `slot` is over."""
        self.begin(slot)

    @torch.no_grad()
    def step(self) -> list[FinishedAction]:
        """One action for every game that waits."""
        slots = [s for s in range(self.num_slots) if self._waiting[s]]
        if not slots:
            return []
        device = self.engine.backbone.device
        batch = PackedBatch.from_arrays(pack_trajectories([self._due(s) for s in slots]), device)
        game = torch.arange(len(slots), device=device)
        due = batch.cu_turns[1:].long() - 1
        candidates = self.engine.sample_alternatives(batch, due[:, None].repeat(1, self.num_candidates))
        best = self.score(batch, candidates).argmax(1)
        chosen = [x[game, best].cpu().numpy() for x in (candidates.action_ids, candidates.logprobs, candidates.lengths)]
        finished = []
        for slot, ids, logprobs, length in zip(slots, *chosen, strict=True):
            action = FinishedAction(slot, ids[:length].astype(np.int32), logprobs[:length])
            observation = np.array(self._pending[slot], np.int32)
            self._turns[slot].append(Turn(observation, action.action_ids, action.logprobs, 0.0, 0))
            self._length[slot] += observation.size + int(length)
            self._pending[slot], self._waiting[slot] = [], False
            finished.append(action)
        return finished

    def _due(self, slot: int) -> Trajectory:
        """The game so far; the turn that is due has a stop token for its action, which no candidate sees."""
        stop = np.array([self.stop_token_id], np.int32)
        due = Turn(np.array(self._pending[slot], np.int32), stop, np.zeros(1, np.float32), 0.0, 0)
        return Trajectory((*self._turns[slot], due), np.empty(0, np.int32), False, True)
