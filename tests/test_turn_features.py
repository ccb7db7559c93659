"""The critic's features as rows of bytes: what was written is read back to the bit, without a copy on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from saved_buffers import game
from torch import Tensor

from archer_fast.buffer import FeatureRows, TrajectoryBuffer
from archer_fast.critic import ActionFeatures, GameFeatures, StateFeatures
from archer_fast.turn_features import FeatureLayout

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def made_features(num_turns: list[int], hidden_size: int, dtype: torch.dtype, device: str = "cpu") -> GameFeatures:
    """Random bits of every kind that a trunk may compute: infinities and NaN too."""
    generator = torch.Generator().manual_seed(hidden_size)
    total = sum(num_turns)

    def hidden(n: int) -> Tensor:
        values = torch.randn(n, hidden_size, generator=generator, dtype=torch.float64).to(dtype)
        values[::3, 0], values[::4, -1] = torch.nan, torch.inf
        return values.to(device)

    turn = torch.cat([torch.arange(n) for n in num_turns]).to(device)
    logprob = torch.randn(total, generator=generator).to(device)
    return GameFeatures(
        StateFeatures(hidden(total), turn),
        ActionFeatures(hidden(total), logprob, (torch.arange(total, device=device) % 3 == 1).float()),
        StateFeatures(hidden(len(num_turns)), torch.tensor(num_turns, device=device)),
        logprob.new_empty(0),  # of single tokens nothing is kept
    )


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    return got.dtype == wanted.dtype and torch.equal(
        got.contiguous().view(torch.uint8).cpu(), wanted.contiguous().view(torch.uint8).cpu()
    )


def round_trip(hidden_size: int, dtype: torch.dtype, device: str) -> None:
    """Through the buffer, in an order of its own, in which the last turn of a game is followed by its final state."""
    layout, games = FeatureLayout(hidden_size, dtype), [game(i) for i in range(6)]
    num_turns = [g.num_turns for g in games]
    assert len(set(num_turns)) >= 3
    features = made_features(num_turns, hidden_size, dtype, device)
    buffer = TrajectoryBuffer(1000, 10, feature_bytes=layout.row_bytes)
    buffer.extend(games)
    buffer.set_features(range(6), 5, layout.write(features, num_turns))

    order = np.random.default_rng(0).integers(0, sum(num_turns), 50)
    records = buffer.turn_records(order)
    owner = torch.from_numpy(buffer.trajectory_of(order))
    turn = torch.from_numpy(records.turn).long().to(device)
    state, action, behind = layout.read(buffer.read_features(order, 5, layout.state_bytes), turn)

    at = torch.from_numpy(order)
    assert same_bits(state.hidden, features.state.hidden[at]) and torch.equal(state.turn, turn)
    for got, written in zip(action, features.action, strict=True):
        assert same_bits(got, written[at])
    is_last = torch.from_numpy(records.is_last)
    following = features.state.hidden.roll(-1, 0)[at]
    wanted = torch.where(is_last.to(device)[:, None], features.final.hidden[owner], following)
    assert 5 < is_last.sum() < 45
    assert same_bits(behind.hidden, wanted) and torch.equal(behind.turn, turn + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [1, 3, 8, 129])
def test_what_is_written_is_read(hidden_size: int, dtype: torch.dtype) -> None:
    round_trip(hidden_size, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read_on_a_gpu(dtype: torch.dtype) -> None:
    round_trip(129, dtype, "cuda")


@pytest.mark.parametrize(
    ("hidden_size", "dtype", "row_bytes"),
    [
        (3584, torch.bfloat16, 2 * 3584 * 2 + 8),
        (128, torch.float32, 2 * 128 * 4 + 8),
        (1, torch.bfloat16, 12),
        (3, torch.float64, 2 * 3 * 8 + 8),
    ],
)
def test_a_row_is_two_hidden_states_and_two_numbers(hidden_size: int, dtype: torch.dtype, row_bytes: int) -> None:
    assert FeatureLayout(hidden_size, dtype).row_bytes == row_bytes


def test_the_example_of_the_docstring() -> None:
    layout = FeatureLayout(2, torch.bfloat16)
    state, action, final = (torch.tensor([pair], dtype=torch.bfloat16) for pair in ((1, 2), (3, 4), (5, 6)))
    turn = torch.tensor([0])
    rows = layout.write(
        GameFeatures(
            StateFeatures(state, turn),
            ActionFeatures(action, torch.tensor([-0.5]), torch.tensor([1.0])),
            StateFeatures(final, turn + 1),
            torch.empty(0),
        ),
        [1],
    )
    as_tensor = torch.from_numpy(rows)
    assert as_tensor.shape == (2, 16)
    assert as_tensor[:, :8].view(torch.bfloat16).tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert as_tensor[:, 8:].view(torch.float32).tolist() == [[-0.5, 1], [0, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_host_all_parts_are_views(dtype: torch.dtype) -> None:
    layout = FeatureLayout(5, dtype)
    rows = np.zeros((7, layout.row_bytes), np.uint8)
    next_rows = np.zeros((7, layout.state_bytes), np.uint8)
    state, action, behind = layout.read(FeatureRows(rows, next_rows), torch.zeros(7, dtype=torch.int64))
    for tensor, array in (
        (state.hidden, rows),
        (action.hidden, rows),
        (action.logprob, rows),
        (action.repeated, rows),
        (behind.hidden, next_rows),
    ):
        begin = array.ctypes.data
        assert begin <= tensor.data_ptr() < begin + array.nbytes


def test_hidden_states_of_another_dtype_are_never_rounded() -> None:
    features = made_features([2], 4, torch.float32)
    with pytest.raises(AssertionError):
        FeatureLayout(4, torch.bfloat16).write(features, [2])
