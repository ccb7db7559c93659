"""The segmented scan against a float64 loop, in chunks so short that a segment crosses many."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

CHUNK, TILE = 16, 4  # tokens a chunk, chunks a tile of the scan over chunks

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def turns(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    from archer_fast.ops import triton_turns

    for name, block in (("SCAN_BLOCK", CHUNK), ("CARRY_BLOCK", TILE), ("MARK_BLOCK", 8)):
        monkeypatch.setattr(triton_turns, name, block)
    return triton_turns


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def scan(turns: ModuleType, a: Tensor, b: Tensor, cu: Tensor) -> Tensor:
    out = torch.full_like(b, NAN)
    turns.segment_scan(a, b, cu, out)
    return out


def truth(a: Tensor, b: Tensor, cu: Tensor) -> Tensor:
    """The definition in float64; nothing is multiplied at a segment's last token."""
    y = torch.zeros(len(b), dtype=torch.float64)
    for first, end in itertools.pairwise(cu.tolist()):
        for t in reversed(range(first, end)):
            y[t] = b[t].double() + (a[t].double() * y[t + 1] if t + 1 < end else 0)
    return y


def assert_close(found: Tensor, a: Tensor, b: Tensor, cu: Tensor) -> None:
    """Every token within a few roundings of the sum of what entered it."""
    wanted, size = truth(a, b, cu), truth(a.abs(), b.abs(), cu)
    assert ((found.double() - wanted).abs() <= 8 * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize(
    "lengths",
    [
        [],
        [0, 0],
        [1],
        [CHUNK],
        [CHUNK + 1],
        [0, 1, 0, 0, 2, 1, 0],
        [1] * 40,
        [CHUNK] * 5,  # every segment ends where a chunk does
        [2 * CHUNK, CHUNK, CHUNK - 1, 1, 3 * CHUNK],
        [5, 9 * CHUNK + 3, 7],  # one segment over more chunks than the carry's tile holds
        [CHUNK - 3, 4 * CHUNK, 0, 2 * CHUNK, 3],
    ],
    ids=str,
)
def test_equals_the_loop(turns: ModuleType, lengths: list[int]) -> None:
    cu = offsets(lengths)
    a, b = torch.rand(int(cu[-1])) * 1.1, torch.randn(int(cu[-1]))
    found = scan(turns, a, b, cu)
    assert found.shape == b.shape
    assert_close(found, a, b, cu)


def test_literal_values(turns: ModuleType) -> None:
    half, b = torch.full((4,), 0.5), torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert scan(turns, half, b, offsets([3, 1])).tolist() == [3.0, 4.0, 4.0, 8.0]


def test_counts_to_the_end_over_many_chunks(turns: ModuleType) -> None:
    """a = b = 1: tokens left in the segment, exactly."""
    lengths = [3, 11 * CHUNK + 5, 1, 0, CHUNK]
    ones = torch.ones(sum(lengths))
    wanted = [left for length in lengths for left in range(length, 0, -1)]
    assert scan(turns, ones, ones, offsets(lengths)).tolist() == wanted


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_what_stands_in_a_at_a_last_token_counts_for_nothing(turns: ModuleType, garbage: float) -> None:
    cu = offsets([3, 1, 2 * CHUNK, 4 * CHUNK + 5, CHUNK - 9, 8])
    a, b = torch.rand(int(cu[-1])), torch.randn(int(cu[-1]))
    clean = scan(turns, a, b, cu)
    a[cu[1:].long() - 1] = garbage
    found = scan(turns, a, b, cu)
    assert torch.equal(found, clean)
    assert_close(found, a, b, cu)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("lengths", [[3 * CHUNK, 3 * CHUNK], [CHUNK + 5, 6 * CHUNK], [4, 5, 6], [5 * CHUNK + 3, 1, 4]])
def test_no_value_crosses_a_segments_border(turns: ModuleType, lengths: list[int], value: float) -> None:
    """A segment whose every y is not finite lies right of one that is, and 0 times it would be NaN."""
    cu = offsets(lengths)
    a, b = torch.rand(int(cu[-1])) + 0.5, torch.rand(int(cu[-1]))
    a[cu[1:].long() - 1] = 0.0
    clean = scan(turns, a, b, cu)
    b[-1] = value
    border = int(cu[-2])
    found = scan(turns, a, b, cu)
    assert torch.equal(found[:border], clean[:border])
    assert torch.equal(found[border:].nan_to_num(7.0), torch.full_like(b[border:], value).nan_to_num(7.0))


def test_a_loop_that_is_cut_by_zeros_inside_a_segment(turns: ModuleType) -> None:
    """a = 0 in the middle (a terminal state) is a number like another."""
    cu = offsets([7 * CHUNK + 3])
    a, b = torch.rand(int(cu[-1])), torch.randn(int(cu[-1]))
    a[::5] = 0.0
    assert_close(scan(turns, a, b, cu), a, b, cu)


def test_may_write_over_b(turns: ModuleType) -> None:
    cu = offsets([5, 3 * CHUNK + 2, 9])
    a, b = torch.rand(int(cu[-1])), torch.randn(int(cu[-1]))
    wanted = scan(turns, a, b, cu)
    turns.segment_scan(a, b, cu, b)
    assert torch.equal(b, wanted)
