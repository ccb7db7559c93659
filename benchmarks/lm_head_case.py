"""One problem that every rival of the lm_head ops solves, with its solution in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Log-probs without gradient; REINFORCE loss with the gradient of hidden (adapters); with that of the weight too.
Work = Literal["score", "frozen", "train"]
WORKS: tuple[Work, ...] = ("score", "frozen", "train")
TRUTH_ROWS = 256  # rows at a time in float64: the whole logits would be gigabytes


class Shape(NamedTuple):
    tokens: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.tokens} x {self.hidden} x {self.vocab}"


# A tiny model with a small vocabulary, SmolLM2-135M, GPT-2, Qwen2.5-0.5B; a prime vocabulary for the quick check.
SHAPES = {
    "full": (Shape(2048, 256, 8192), Shape(1024, 576, 49152), Shape(1024, 768, 50257), Shape(512, 896, 151936)),
    "tiny": (Shape(96, 32, 503),),
    "cuda": (Shape(8192, 4096, 32000), Shape(8192, 4096, 128256), Shape(8192, 3584, 152064)),  # Mistral, Llama 3, Qwen
}
FRACTIONS = (1.0, 0.37)  # of the tokens that are actions and so scored


@dataclass(frozen=True)
class Case:
    shape: Shape
    hidden: Tensor  # [T, H] float32, on a GPU bfloat16; a leaf
    weight: Tensor  # [V, H], a leaf
    rows: Tensor | None  # [n] int64, rising: the positions scored; None: all
    target_ids: Tensor  # [n]
    advantages: Tensor  # [n]

    @property
    def num_rows(self) -> int:
        return self.target_ids.shape[0]

    @property
    def gradient_bytes(self) -> int:
        return self.hidden.nbytes + self.weight.nbytes

    def scored_hidden(self) -> Tensor:
        """[n, H], gathered the way whose backward is the cheapest."""
        return self.hidden if self.rows is None else self.hidden.index_select(0, self.rows)

    def clear_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


class Solution(NamedTuple):
    loss: Tensor | None  # []
    logprobs: Tensor  # [n]
    d_hidden: Tensor | None  # [T, H]
    d_weight: Tensor | None  # [V, H]


class Errors(NamedTuple):
    """|x - truth| / |truth|, 2-norms."""

    logprobs: float
    gradients: float | None  # the larger of hidden's and, where it is trained, weight's
    loss: float | None

    @property
    def worst(self) -> float:
        # NaN is worse than any number, which max() does not know.
        seen = [x for x in self if x is not None]
        return max(seen) if all(x == x for x in seen) else float("nan")


def make_case(shape: Shape, fraction: float) -> Case:
    """The same numbers in every process, on torch's default device.

    Logits have a standard deviation of 2: neither flat nor of one token.
    """
    device = torch.get_default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    num_rows = round(fraction * shape.tokens)
    rows = None
    if num_rows < shape.tokens:
        rows = torch.randperm(shape.tokens, generator=generator)[:num_rows].sort().values
    return Case(
        shape,
        torch.randn(shape.tokens, shape.hidden, generator=generator).to(dtype).requires_grad_(),
        torch.randn(shape.vocab, shape.hidden, generator=generator)
        .mul_(2 * shape.hidden**-0.5)
        .to(dtype)
        .requires_grad_(),
        rows,
        torch.randint(shape.vocab, (num_rows,), generator=generator),
        torch.randn(num_rows, generator=generator),
    )


def reinforce(logprobs: Tensor, advantages: Tensor) -> Tensor:
    return -(advantages * logprobs).sum() / logprobs.shape[0]


def float64_truth(case: Case) -> Solution:
    """By autograd through log_softmax, some rows at a time."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (case.hidden, case.weight))
    rows = torch.arange(case.num_rows) if case.rows is None else case.rows
    loss, logprobs = torch.zeros((), dtype=torch.float64), []
    for part in torch.arange(case.num_rows).split(TRUTH_ROWS):
        logits = hidden.index_select(0, rows[part]) @ weight.T
        of_targets = logits.log_softmax(1).gather(1, case.target_ids[part, None]).squeeze(1)
        share = -(case.advantages[part].double() * of_targets).sum() / case.num_rows
        share.backward()
        loss += share.detach()
        logprobs.append(of_targets.detach())
    return Solution(loss, torch.cat(logprobs), hidden.grad, weight.grad)


def errors(solution: Solution, truth: Solution, work: Work) -> Errors:
    """inf where the shape is not the truth's or a gradient is missing."""

    def error(x: Tensor | None, true: Tensor | None) -> float:
        assert true is not None
        if x is None or x.shape != true.shape:
            return float("inf")
        return float((x.detach().double() - true).norm() / true.norm())

    logprobs = error(solution.logprobs, truth.logprobs)
    if work == "score":
        return Errors(logprobs, None, None)
    gradients = error(solution.d_hidden, truth.d_hidden)
    if work == "train" and gradients == gradients:
        of_weight = error(solution.d_weight, truth.d_weight)
        gradients = max(of_weight, gradients)  # NaN where the weight's is
    return Errors(logprobs, gradients, error(solution.loss, truth.loss))


class Floor:
    """The matrix products nobody can do without, into memory that is there already: 1 to score, 2 or 3 to train."""

    def __init__(self, case: Case, work: Work) -> None:
        with torch.no_grad():
            self.hidden, self.weight = case.scored_hidden().clone(), case.weight.detach()
        self.logits = torch.empty(case.num_rows, case.shape.vocab, dtype=self.hidden.dtype)
        self.d_hidden = torch.empty_like(self.hidden) if work != "score" else None
        self.d_weight = torch.empty_like(self.weight) if work == "train" else None

    def __call__(self) -> None:
        torch.mm(self.hidden, self.weight.T, out=self.logits)
        if self.d_hidden is not None:
            torch.mm(self.logits, self.weight, out=self.d_hidden)
        if self.d_weight is not None:
            torch.mm(self.logits.T, self.hidden, out=self.d_weight)
