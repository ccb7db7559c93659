"""The replay against its contract: the newest transitions, drawn evenly; and the original's faults where kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from archer_fast.compat.data import DummyDataset, ReplayBuffer
from archer_fast.compat.trainer_file import read_replay_buffer, write_replay_buffer

FIELDS = ("observation", "action", "reward", "next_observation", "done", "mc_return")
# Exceeded by chance once in 10,000 by 39 independent deviations: chi-square's quantile.
CHI_SQUARE_39 = 80.8


def transition(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "observation": f"o{number}",
        "action": f"a{number}",
        "reward": number - 0.3,
        "next_observation": f"n{number}",
        "done": number % 3 == 0,
        "mc_return": -number / 7,
    } | changes


def filled(num: int, **keywords: Any) -> ReplayBuffer:
    replay = ReplayBuffer(**keywords)
    for number in range(num):
        replay.insert(**transition(number))
    return replay


def seed(number: int) -> None:
    np.random.seed(number)  # noqa: NPY002, the source that the original draws from


def assert_same_draws(one: ReplayBuffer, other: ReplayBuffer, num: int = 64) -> None:
    seed(5)
    expected = one.sample(num)
    seed(5)
    for name, column in other.sample(num).items():
        np.testing.assert_array_equal(column, expected[name], err_msg=name)


class PlainOriginal:
    """Slots and draws as the original has them, faults included."""

    def __init__(self, capacity: int) -> None:
        self.max_size, self.size = capacity, 0
        self.columns: dict[str, Any] = {}

    def insert(self, **fields: Any) -> None:
        for name in FIELDS:
            value = np.array(fields[name], dtype=object if isinstance(fields[name], str) else None)
            column = self.columns.setdefault(name, np.empty(self.max_size, value.dtype))
            column[self.size % self.max_size] = value
        self.size += 1

    def sample(self, num: int) -> dict[str, Any]:
        rows = np.random.randint(0, self.size, size=(num,)) % self.max_size  # noqa: NPY002
        return {name: column[rows] for name, column in self.columns.items()}


@given(st.integers(1, 12), st.integers(0, 40), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_holds_the_newest_and_draws_them_as_the_original_does(capacity: int, num: int, draws: int, state: int) -> None:
    """Up to the capacity the original has no fault, and draws the very same."""
    replay, original = ReplayBuffer(capacity=capacity), PlainOriginal(capacity)
    slots: dict[int, dict[str, Any]] = {}
    for number in range(num + 1):
        replay.insert(**transition(number))
        original.insert(**transition(number))
        slots[number % capacity] = transition(number)
        assert replay.size == len(replay) == len(slots) <= capacity
    seed(state)
    drawn = replay.sample(draws)
    seed(state)
    rows = np.random.randint(0, len(slots), size=draws)  # noqa: NPY002
    for name in FIELDS:
        assert drawn[name].tolist() == [slots[row][name] for row in rows.tolist()], name
    if num < capacity:
        seed(state)
        theirs = original.sample(draws)
        assert all(drawn[name].tolist() == theirs[name].tolist() for name in FIELDS)


@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_with_the_fault_kept_it_is_the_original(capacity: int, num: int, draws: int, state: int) -> None:
    replay, original = ReplayBuffer(capacity=capacity, compat="bug-for-bug"), PlainOriginal(capacity)
    for number in range(num):
        fields = transition(number, reward=-1 if number == 0 else number - 0.3)
        replay.insert(**fields)
        original.insert(**fields)
    assert replay.size == len(replay) == num
    seed(state)
    drawn = replay.sample(draws)
    seed(state)
    for name, column in original.sample(draws).items():
        assert drawn[name].dtype == column.dtype
        assert drawn[name].tolist() == column.tolist(), name


@given(st.integers(1, 3000), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_one_sample_of_n_is_n_samples_of_one(held: int, num: int, state: int) -> None:
    """The update draws transitions one at a time; drawn together they must be the same, and leave the same state."""
    replay = ReplayBuffer(capacity=held)
    column = np.array([str(i) for i in range(held)], object)
    numbers = np.arange(held, dtype=float)
    replay.load_state_dict(
        {"observation": column, "action": column, "next_observation": column, "reward": numbers, "mc_return": numbers}
        | {"done": np.zeros(held, bool), "size": held, "max_size": held}
    )
    seed(state)
    together = replay.sample(num)["observation"].tolist()
    after = np.random.randint(0, 2**31)  # noqa: NPY002
    seed(state)
    assert [replay.sample(1)["observation"][0] for _ in range(num)] == together
    assert np.random.randint(0, 2**31) == after  # noqa: NPY002


def chi_square(replay: ReplayBuffer, num: int) -> float:
    seed(3)
    counts = np.unique(replay.sample(num)["observation"], return_counts=True)[1]
    expected = num / replay.max_size
    return float(((counts - expected) ** 2 / expected).sum() + (replay.max_size - counts.size) * expected)


def test_draws_are_uniform_over_what_is_held() -> None:
    """The original's, once it is full by half again, are not: the same statistic sees it."""
    assert chi_square(filled(60, capacity=40), 20_000) < CHI_SQUARE_39
    assert chi_square(filled(60, capacity=40, compat="bug-for-bug"), 20_000) > 10 * CHI_SQUARE_39


@pytest.mark.parametrize(
    "first", [-1, True, np.int64(-1), np.array(-1), np.float16(-1), torch.tensor(-1)], ids=lambda value: repr(value)
)
def test_no_first_insert_truncates_what_follows(first: Any) -> None:
    replay = ReplayBuffer(batch_size=1)
    replay.insert(**transition(0, reward=first, mc_return=first))
    for reward in (0.7, -0.123456789):
        replay.insert(**transition(1, reward=reward, mc_return=reward))
    assert replay.rewards[:3].tolist() == replay.mc_returns[:3].tolist() == [float(first), 0.7, -0.123456789]


def test_the_kept_fault_truncates() -> None:
    replay = ReplayBuffer(compat="bug-for-bug")
    replay.insert(**transition(0, reward=-1))
    replay.insert(**transition(1, reward=0.7))
    assert replay.rewards[:2].tolist() == [-1, 0]
    assert ReplayBuffer(compat="bug-for-bug", fix=["buffer"]).fixes == {"buffer"}


@pytest.mark.parametrize("done, kept", [(1, True), (0.0, False), (np.array(True), True), (torch.tensor(False), False)])
def test_done_is_a_bool(done: Any, kept: bool) -> None:
    replay = ReplayBuffer()
    replay.insert(**transition(0, done=done))
    assert replay.sample(1)["done"].tolist() == [kept]
    assert replay.dones.dtype == bool


def test_sample_without_a_number_is_a_batch_and_a_copy() -> None:
    replay = filled(5, batch_size=3)
    drawn = replay.sample()
    assert [column.shape for column in drawn.values()] == [(3,)] * 6
    assert list(drawn) == list(FIELDS)
    before = replay.rewards.copy()
    drawn["reward"][:] = 99
    np.testing.assert_array_equal(replay.rewards, before)
    assert all(column.shape == (0,) for column in replay.sample(0).values())


def test_positions_and_further_keywords() -> None:
    replay = ReplayBuffer(4, 7)
    replay.insert("o", "a", -1, "n", True, -2.5, trajectory_reward=-3, anything=object())
    drawn = replay.sample(1)
    assert {name: column[0] for name, column in drawn.items()} == {
        "observation": "o", "action": "a", "reward": -1.0, "next_observation": "n", "done": True, "mc_return": -2.5,
    }  # fmt: skip
    assert (replay.batch_size, replay.max_size) == (4, 7)
    with pytest.warns(UserWarning, match="ReplayBuffer: .* not used: seed"):
        ReplayBuffer(seed=3)


@pytest.mark.parametrize(
    "field, value, error, message",
    [
        ("reward", float("nan"), ValueError, "reward: wanted a finite number, got nan"),
        ("reward", np.array([0.5]), TypeError, "reward: wanted a real number"),
        ("reward", "0.5", TypeError, "reward: wanted a real number, got '0.5'"),
        ("reward", None, TypeError, "reward: wanted a real number, got None"),
        ("mc_return", float("inf"), ValueError, "mc_return: wanted a finite number, got inf"),
        ("done", 0.5, ValueError, "done: wanted true or false, got 0.5"),
        ("done", "no", TypeError, "done: wanted a real number, got 'no'"),
        ("observation", ["o"], TypeError, r"observation: wanted a str, got \['o'\]"),
        ("next_observation", None, TypeError, "next_observation: wanted a str, got None"),
        ("action", b"a", TypeError, "action: wanted a str, got b'a'"),
    ],
)
@pytest.mark.parametrize("kept", [{}, {"compat": "bug-for-bug"}])
@pytest.mark.parametrize("num", [0, 3])
def test_a_bad_transition_changes_nothing(
    field: str, value: Any, error: type[Exception], message: str, kept: dict[str, Any], num: int
) -> None:
    replay = filled(num, capacity=2, **kept)
    before = replay.state_dict()
    with pytest.raises(error, match=message):
        replay.insert(**transition(9, **{field: value}))
    for name, column in replay.state_dict().items():
        np.testing.assert_array_equal(column, before[name])
    replay.insert(**transition(4))
    assert replay.sample(50)["observation"].tolist().count("o4") > 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="sample: wanted a buffer with at least one transition, got an empty one"):
        ReplayBuffer().sample()
    with pytest.raises(ValueError, match="batch_size: wanted an integer from 0"):
        filled(1).sample(-1)
    with pytest.raises(ValueError, match="capacity: wanted an integer from 1"):
        ReplayBuffer(capacity=0)
    with pytest.raises(ValueError, match="'buffer'"):
        ReplayBuffer(fix=["bufer"])


def test_memory_grows_with_what_is_held() -> None:
    """The original allocates its capacity at the first insert."""
    replay = filled(3, capacity=1_000_000)
    assert len(replay.rewards) < 2000
    for number in range(5000):
        replay.insert(**transition(number))
    assert 5003 <= len(replay.observations) < 2 * 5003 + 1024
    small = filled(40, capacity=7)
    assert len(small.observations) == len(small.rewards) == 7


@pytest.mark.parametrize("num", [0, 3, 7, 18])
@pytest.mark.parametrize("kept", [{}, {"compat": "bug-for-bug"}])
def test_state_goes_through_a_file_of_plain_data(num: int, kept: dict[str, Any], tmp_path: Path) -> None:
    replay, twin = filled(num, capacity=7, **kept), ReplayBuffer(capacity=7, **kept)
    write_replay_buffer(tmp_path / "replay_buffer.pt", replay.state_dict())
    torch.load(tmp_path / "replay_buffer.pt", weights_only=True)
    twin.load_state_dict(read_replay_buffer(tmp_path / "replay_buffer.pt"))
    assert (len(twin), twin.size) == (len(replay), replay.size)
    for number in range(num, num + 3):  # they go on alike: the next slot is the same one
        replay.insert(**transition(number))
        twin.insert(**transition(number))
        assert_same_draws(replay, twin)


@pytest.mark.parametrize("num", [4, 7, 18, 21])
@pytest.mark.parametrize("capacity", [3, 5, 12])
def test_another_capacity_keeps_the_newest_in_order(num: int, capacity: int) -> None:
    twin = ReplayBuffer(capacity=capacity)
    twin.load_state_dict(filled(num, capacity=7).state_dict())
    newest = [f"o{i}" for i in range(max(0, num - min(7, capacity)), num)]
    assert twin.observations[: len(twin)].tolist() == newest
    for number in range(num, num + 2 * capacity):
        twin.insert(**transition(number))
        newest = [*newest, f"o{number}"][-capacity:]
        assert sorted(twin.observations[: len(twin)]) == sorted(newest)


def test_faults_do_not_come_with_the_state() -> None:
    faulty = ReplayBuffer(capacity=4, compat="bug-for-bug")
    for number in range(6):
        faulty.insert(**transition(number, reward=-1))
    mended = ReplayBuffer(capacity=4)
    mended.load_state_dict(faulty.state_dict())
    assert mended.size == 4
    mended.insert(**transition(6, reward=0.7))
    assert sorted(mended.rewards.tolist()) == [-1, -1, -1, 0.7]


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"reward": [0.0, 1.0]}, ValueError, "reward: wanted 3 of them, got 2"),
        ({"reward": [0.0, 1.0, float("nan")]}, ValueError, "reward: wanted finite numbers, got nan"),
        ({"reward": ["a", "b", "c"]}, TypeError, "reward: wanted numbers"),
        ({"done": [0, 1, 2]}, ValueError, "done: wanted true or false, got 2"),
        ({"action": ["a", "b", 3]}, TypeError, "action: wanted str alone, got 3"),
        ({"max_size": 0}, ValueError, "max_size: wanted an integer from 1"),
        ({"size": 2}, ValueError, "observation: wanted 2 of them, got 3"),
    ],
)
def test_a_bad_state_changes_nothing(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    replay, twin = filled(2), filled(2)
    with pytest.raises(error, match=message):
        replay.load_state_dict(filled(3).state_dict() | changes)
    assert_same_draws(replay, twin)
    with pytest.raises(ValueError, match="got none of reward"):
        replay.load_state_dict({name: value for name, value in filled(3).state_dict().items() if name != "reward"})


def test_numpy_texts_are_kept_as_str() -> None:
    """np.str_ is a str to Python, and code to a checkpoint."""
    replay = ReplayBuffer()
    replay.insert(**transition(0, observation=np.str_("o")))
    assert type(replay.sample(1)["observation"][0]) is str


def test_dummy_dataset_feeds_a_data_loader() -> None:
    batches = list(DataLoader(DummyDataset([transition(i) for i in range(5)]), batch_size=2))
    assert [batch["observation"] for batch in batches] == [["o0", "o1"], ["o2", "o3"], ["o4"]]
    assert batches[1]["done"].tolist() == [False, True]
    assert len(DummyDataset([1, 2, 3])) == 3
