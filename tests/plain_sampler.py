"""A sampler with weights of its own that computes every token from the whole prefix."""

from __future__ import annotations

from collections import Counter

import torch

from archer_fast.backbone import Backbone
from archer_fast.rollout.token_sampler import Answer, Sample, SamplingRequest


class PlainSampler:
    """Answers one request a poll, the youngest first; counts what it was asked."""

    def __init__(self, max_tokens: int = 200) -> None:
        self.max_tokens = max_tokens
        self.num_forward_tokens = 0
        self.calls: Counter[str] = Counter()
        self.requests: dict[int, SamplingRequest] = {}  # that wait
        self.asked: list[SamplingRequest] = []
        self.held: Backbone | None = None
        self._fingerprint: int | None = None

    def load(self, backbone: Backbone) -> None:
        if backbone.fingerprint() != self._fingerprint:
            self.calls["load"] += 1
            self.held, self._fingerprint = backbone.frozen_copy(), backbone.fingerprint()

    def forget(self) -> None:
        self.calls["forget"] += 1
        self.requests.clear()

    def submit(self, request: SamplingRequest) -> int:
        self.asked.append(request)
        self.requests[len(self.asked)] = request
        return len(self.asked)

    def cancel(self, request_id: int) -> None:
        self.calls["cancel"] += 1
        del self.requests[request_id]

    def poll(self) -> list[Answer]:
        if not self.requests:
            return []
        request_id, request = self.requests.popitem()
        return [Answer(request_id, [self._sample(request, i) for i in range(request.num_samples)])]

    def close(self) -> None: ...

    @torch.no_grad()
    def _sample(self, request: SamplingRequest, index: int) -> Sample:
        assert self.held is not None
        generator = torch.Generator().manual_seed(request.seed + index)
        ids, logprobs = list(request.prompt_ids), []
        while True:
            n = len(ids)
            hidden = self.held(
                torch.tensor(ids), torch.arange(n), self.held.layout(torch.tensor([0, n], dtype=torch.int32), (n,))
            )
            row = (hidden[-1] @ self.held.lm_head_weight.T / (request.temperature or 1.0)).log_softmax(-1)
            token = int(row.argmax() if request.temperature == 0 else row.exp().multinomial(1, generator=generator))
            self.num_forward_tokens += n
            ids.append(token)
            logprobs.append(row[token].item())
            if token == request.stop_token_id or len(logprobs) == request.max_new_tokens:
                return Sample(ids[len(request.prompt_ids) :], logprobs)
