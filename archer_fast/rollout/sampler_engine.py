"""An engine whose tokens come from a `TokenSampler`: each action is a request with the whole game as its prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from archer_fast.backbone import Backbone
from archer_fast.batch import Alternatives, PackedBatch
from archer_fast.rollout.interact import FinishedAction
from archer_fast.rollout.token_sampler import Sample, SamplingRequest, TokenSampler


class SamplerEngine:
    """Up to `num_slots` games at once. A game's beginning is sent again with every action; that it is computed once is
    the sampler's business (its prefix cache).

    A request's seed is drawn from `generator` as it is made: games depend on its state and on the weights alone, not
    on what the sampler did before. `greedy` takes the most likely token instead (evaluation only).
    """

    def __init__(
        self,
        sampler: TokenSampler,
        backbone: Backbone,
        stop_token_id: int,
        *,
        num_slots: int = 128,
        max_new_tokens: int = 16,
        temperature: float = 1.0,
        greedy: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.sampler = sampler
        self.backbone = backbone
        self.stop_token_id = stop_token_id
        self.num_slots = num_slots
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.greedy = greedy
        self.generator = generator
        self.max_tokens = min(sampler.max_tokens, backbone.max_positions)
        self.reset()

    @property
    def num_forward_tokens(self) -> int:
        """Tokens that went through the sampler's model, whoever asked."""
        return self.sampler.num_forward_tokens

    def reset(self) -> None:
        """Forget every running game, whichever engine of this sampler began it, and take over the weights."""
        self._ids: list[list[int]] = [[] for _ in range(self.num_slots)]  # the game so far
        self._slots: dict[int, int] = {}  # request that is being answered: its slot
        self.sampler.forget()
        self.sampler.load(self.backbone)

    def begin(self, slot: int) -> None:
        """Start a new game in `slot`, over whatever was there."""
        for request_id in [request for request, its in self._slots.items() if its == slot]:
            self.sampler.cancel(request_id)
            del self._slots[request_id]
        self._ids[slot] = []

    def observe(self, slot: int, observation_ids: Sequence[int]) -> None:
        """Append what the environment said; the next `step` starts answering it."""
        self._ids[slot].extend(observation_ids)
        self._slots[self._submit(self._ids[slot], 1)] = slot

    def room(self, slot: int) -> int:
        """Tokens that still fit into the game's window."""
        return self.max_tokens - len(self._ids[slot])

    def release(self, slot: int) -> None:
        """The game in `slot` is over."""
        self.begin(slot)

    def step(self) -> list[FinishedAction]:
        """Let the sampler work for a while; return the actions that ended."""
        finished = []
        for request_id, (sample,) in self.sampler.poll():
            slot = self._slots.pop(request_id)
            self._ids[slot].extend(sample.ids)
            ids, logprobs = np.array(sample.ids, np.int32), np.array(sample.logprobs, np.float32)
            finished.append(FinishedAction(slot, ids, logprobs))
        return finished

    def sample_alternatives(self, batch: PackedBatch, turn_ids: Tensor) -> Alternatives:
        """Fresh actions at given turns, by the weights as they are now: one request a turn, however many branches it
        has.

        turn_ids: [B, R] int64, the turn of `batch` that branch r of game b answers, -1 for none.
        """
        assert not self._slots, "games are running"
        self.sampler.load(self.backbone)
        games, rows = turn_ids.shape
        input_ids, first = batch.input_ids.tolist(), batch.cu_seqlens.tolist()
        state = batch.state_positions.tolist()
        branches: dict[int, list[tuple[int, int]]] = {}  # of a turn
        for game, turns in enumerate(turn_ids.tolist()):
            for row, turn in enumerate(turns):
                if turn >= 0:
                    branches.setdefault(turn, []).append((game, row))
        places: dict[int, list[tuple[int, int]]] = {}  # of a request
        for turn, wanted in branches.items():
            prompt_ids = input_ids[first[wanted[0][0]] : state[turn] + 1]
            places[self._submit(prompt_ids, 1 if self.greedy else len(wanted))] = wanted
        found: dict[tuple[int, int], Sample] = {}
        while places:
            for request_id, samples in self.sampler.poll():
                wanted = places.pop(request_id)
                found.update(zip(wanted, samples * len(wanted) if self.greedy else samples, strict=True))
        width = max([1, *(len(sample.ids) for sample in found.values())])
        ids = np.full((games, rows, width), self.stop_token_id, np.int32)
        logprobs, lengths = np.zeros((games, rows, width), np.float32), np.zeros((games, rows), np.int64)
        for at, sample in found.items():
            n = lengths[at] = len(sample.ids)
            ids[at][:n], logprobs[at][:n] = sample.ids, sample.logprobs
        made = [torch.from_numpy(x).to(turn_ids.device) for x in (ids, logprobs, lengths)]
        return Alternatives(action_ids=made[0], logprobs=made[1], lengths=made[2], turn_ids=turn_ids)

    def _submit(self, prompt_ids: list[int], num_samples: int) -> int:
        seed = torch.randint(2**62, (), generator=self.generator, device=self._seed_device).item()
        temperature = 0.0 if self.greedy else self.temperature
        return self.sampler.submit(
            SamplingRequest(
                list(prompt_ids), num_samples, self.max_new_tokens, self.stop_token_id, temperature, int(seed)
            )
        )

    @property
    def _seed_device(self) -> torch.device:
        return torch.device("cpu") if self.generator is None else self.generator.device
