"""What samples tokens by weights of its own, a copy of the policy's, request by request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from archer_fast.backbone import Backbone


class SamplerError(RuntimeError):
    """The sampler is gone, or does not sample what the trainer trains; the message says which and what to do."""


@dataclass(slots=True, frozen=True)
class SamplingRequest:
    """`SamplingRequest([17, 9, 41], num_samples=4, max_new_tokens=12, stop_token_id=2, temperature=1.0, seed=5)`: four
    continuations of three tokens, each until token 2 or twelve tokens."""

    prompt_ids: list[int]
    num_samples: int
    max_new_tokens: int
    stop_token_id: int
    temperature: float  # 0: the most likely token
    seed: int


class Sample(NamedTuple):
    """One continuation, the stop token included where it was reached."""

    ids: list[int]
    logprobs: list[float]  # log-softmax of logits / temperature; of temperature 1 where the most likely was taken


class Answer(NamedTuple):
    """All continuations that a request asked for."""

    request_id: int
    samples: list[Sample]


class TokenSampler(Protocol):
    """Requests go in, answers come out in any order; between them the weights may be exchanged."""

    max_tokens: int  # of a prompt with its continuation
    num_forward_tokens: int  # that went through the model so far

    def load(self, backbone: Backbone) -> None:
        """Take over the weights of `backbone` where they are not those that are held. SamplerError where what is then
        held does not score tokens as `backbone` does."""

    def forget(self) -> None:
        """Cancel every request and drop the keys and values that were kept."""

    def submit(self, request: SamplingRequest) -> int:
        """Begin; the id that its answer will have."""
        ...

    def cancel(self, request_id: int) -> None:
        """Nobody wants the answer."""

    def poll(self) -> list[Answer]:
        """Work for a while; what has been finished. Nothing where nothing was asked."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
