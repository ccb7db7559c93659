"""Who runs y_t = b_t + a y_{t+1} over segments, or generalised advantage estimation, which is that scan."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from lm_head_rivals import Unavailable
from torch import Tensor

GAMMA, LAMBDA = 0.99, 0.95
A = GAMMA * LAMBDA
Problem = Literal["scan", "gae"]


@dataclass(frozen=True)
class ScanCase:
    """T tokens in B segments. GAE reads b as rewards; every segment ends terminated."""

    name: str
    b: Tensor  # [T] float32
    values: Tensor  # [T] float32
    cu: Tensor  # [B+1] int64

    @property
    def total(self) -> int:
        return self.b.shape[0]

    @cached_property
    def a(self) -> Tensor:
        return torch.full_like(self.b, A)

    @cached_property
    def cu32(self) -> Tensor:
        return self.cu.int()

    @cached_property
    def lengths(self) -> Tensor:
        return self.cu.diff()

    @cached_property
    def is_end(self) -> Tensor:
        """[T] bool, the last token of each segment."""
        return torch.zeros(self.total, dtype=torch.bool).index_fill_(0, self.cu[1:][self.lengths > 0] - 1, True)

    @cached_property
    def next_values(self) -> Tensor:
        """[T] V_{t+1}, 0 beyond a segment's end."""
        return self.values.roll(-1).masked_fill(self.is_end, 0)

    @cached_property
    def columns(self) -> int | None:
        """The length of every segment where they all have one."""
        return int(self.lengths[0]) if bool((self.lengths == self.lengths[0]).all()) else None

    def part(self, share: int) -> ScanCase:
        """The first 1/share of the tokens; the last segment is cut."""
        total = self.total // share
        cu = torch.cat([self.cu[self.cu < total], torch.tensor([total])])
        return ScanCase(self.name, self.b[:total].clone(), self.values[:total].clone(), cu)


def make_cases(sizes: str) -> list[ScanCase]:
    total, ragged, rectangle = {"full": (1 << 20, 50_000, 8192), "tiny": (1 << 12, 200, 32)}[sizes]
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)

    def case(name: str, cu: Tensor) -> ScanCase:
        b, values = (torch.randn(total, generator=generator) for _ in range(2))
        return ScanCase(name, b, values, cu)

    cuts = torch.randint(total + 1, (ragged - 1,), generator=generator).sort().values
    return [
        case(f"{total:,} in {ragged:,} segments", torch.cat([torch.tensor([0]), cuts, torch.tensor([total])])),
        case(f"{rectangle:,} x {total // rectangle:,}", torch.arange(0, total + 1, total // rectangle)),
        case(f"1 x {total:,}", torch.tensor([0, total])),
    ]


def truth(case: ScanCase, problem: Problem) -> Tensor:
    """[T] float64, one Python float after the other."""
    b = case.b.double()
    if problem == "gae":
        b = b + GAMMA * case.next_values.double() - case.values.double()
    return torch.tensor(_loop(b.tolist(), case.is_end.tolist()), dtype=torch.float64)


def _loop(b: list[float], is_end: list[bool]) -> list[float]:
    out, y = [0.0] * len(b), 0.0
    for t in range(len(b) - 1, -1, -1):
        y = b[t] if is_end[t] else b[t] + A * y
        out[t] = y
    return out


@dataclass(frozen=True)
class ScanRival:
    name: str
    solve: Callable[[ScanCase], Tensor]  # -> [T]
    problem: Problem = "scan"
    module: str | None = None  # of a package that may not be installed
    sampled: Callable[[ScanCase], bool] = lambda case: False  # so slow there that 1/100 is timed, and scaled
    is_ours: bool = False
    remark: str = ""

    def ready(self) -> None:
        """Errors: Unavailable."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            raise Unavailable("not installed (pip install archer-fast[bench])")


def segment_scan(case: ScanCase) -> Tensor:
    from archer_fast.ops.choice import last_impl
    from archer_fast.ops.segment_scan import segment_scan

    y = segment_scan(case.a, case.b, case.cu32)
    assert last_impl("segment_scan") == ("triton" if y.is_cuda else "cpu"), last_impl("segment_scan")
    return y


def turn_gae(case: ScanCase) -> Tensor:
    from archer_fast.advantages import turn_gae

    num_segments = case.cu.shape[0] - 1
    ends = torch.zeros(num_segments), torch.ones(num_segments, dtype=torch.bool)
    return turn_gae(case.b, case.values, *ends, case.cu, GAMMA, LAMBDA)


def loop_over_tokens(case: ScanCase) -> Tensor:
    """On Python floats: indexing tensors would take 50 times as long."""
    return torch.tensor(_loop(case.b.tolist(), case.is_end.tolist()))


def loop_over_steps(case: ScanCase) -> Tensor:
    """As training code has it: padded, all segments a step together."""
    padded, where = _padded(case)
    out, y = torch.empty_like(padded), torch.zeros(padded.shape[0])
    for t in range(padded.shape[1] - 1, -1, -1):
        y = padded[:, t] + A * y
        out[:, t] = y
    return out.flatten() if where is None else out[where]


def cumsum_of_powers(case: ScanCase) -> Tensor:
    """y_t = (sum over k >= t of a^k b_k) / a^t: for constant a, and only while a^t is a normal number."""
    padded, where = _padded(case)
    powers = torch.pow(A, torch.arange(padded.shape[1]))
    y = (padded * powers).flip(1).cumsum(1).flip(1) / powers
    return y.flatten() if where is None else y[where]


def _padded(case: ScanCase) -> tuple[Tensor, Tensor | None]:
    """b as [B, longest] and where its tokens lie there; None where there is nothing to pad."""
    if case.columns is not None:
        return case.b.view(-1, case.columns), None
    longest = int(case.lengths.max())
    where = torch.arange(longest) < case.lengths[:, None]
    padded = torch.zeros(where.shape)
    padded[where] = case.b
    return padded, where


def torchrl_gae(case: ScanCase) -> Tensor:
    """Rectangles as [B, T, 1]; others as one row, in which it splits and pads at `done` itself."""
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    shape = (1, case.total, 1) if case.columns is None else (-1, case.columns, 1)
    values, next_values, rewards, done = (x.view(shape) for x in (case.values, case.next_values, case.b, case.is_end))
    advantages, _ = vec_generalized_advantage_estimate(GAMMA, LAMBDA, values, next_values, rewards, done)
    return advantages.flatten()


RIVALS = (
    ScanRival("ops.segment_scan", segment_scan, is_ours=True),
    ScanRival("Python loop over tokens", loop_over_tokens, sampled=lambda case: True),
    ScanRival("Python loop over padded steps", loop_over_steps, sampled=lambda case: case.cu.shape[0] == 2),
    ScanRival("torch.cumsum of powers", cumsum_of_powers, remark="constant a alone; float32 a^t ends at t = 1,400"),
    ScanRival("advantages.turn_gae", turn_gae, "gae", is_ours=True, remark="the whole of GAE"),
    ScanRival("torchrl vec_generalized_advantage_estimate", torchrl_gae, "gae", "torchrl", remark="the whole of GAE"),
)
