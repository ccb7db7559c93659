"""The trajectory buffer against its plain twin, a plain model of a ring, and every bad input."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import saved_buffers
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from random_games import assert_same, random_trajectories, random_trajectory

from archer_fast.buffer import TrajectoryBuffer
from archer_fast.packing import assert_invariants, pack_trajectories
from archer_fast.trajectory import Trajectory, Turn
from archer_fast.trajectory_arrays import TrajectoryArrays


def filled(num: int = 20, max_trajectories: int = 100, seed: int = 0) -> tuple[TrajectoryBuffer, list[Trajectory]]:
    buffer, games = TrajectoryBuffer(10_000, max_trajectories, seed), random_trajectories(num)
    buffer.extend(games)
    return buffer, games


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_collate_equals_pack_trajectories(data: st.DataObject) -> None:
    games = random_trajectories(data.draw(st.integers(1, 8)), data.draw(st.integers(0, 2**32)))
    buffer = TrajectoryBuffer(sum(game.num_tokens for game in games), len(games))
    assert buffer.extend(games) == list(range(len(games)))
    ids = data.draw(st.lists(st.integers(0, len(games) - 1), max_size=12))
    packed = buffer.collate(ids)
    assert_same(packed, pack_trajectories([games[i] for i in ids]))
    assert_invariants(packed)


def test_collate_writes_every_element_of_poisoned_memory() -> None:
    buffer, games = filled()
    for poison in (0xA5, 0x00, 0xFF):
        packed = buffer.collate(np.arange(20), memory=lambda n, poison=poison: np.full(n, poison, np.uint8))
        assert_same(packed, pack_trajectories(games))


def test_what_is_handed_out_survives_eviction() -> None:
    buffer, games = filled(3, max_trajectories=3)
    packed = buffer.collate([0, 1, 2])
    buffer.extend(random_trajectories(50, seed=1))
    assert_same(packed, pack_trajectories(games))


class RingMachine(RuleBasedStateMachine):
    """Every id, size and record after any order of pushes, saves and loads, against Python lists."""

    MAX_TOKENS, MAX_TRAJECTORIES = 60, 4

    def __init__(self) -> None:
        super().__init__()
        self.buffer = TrajectoryBuffer(self.MAX_TOKENS, self.MAX_TRAJECTORIES)
        self.pushed: list[Trajectory] = []
        self.first = 0

    @rule(seed=st.integers(0, 2**32))
    def push(self, seed: int) -> None:
        trajectory = random_trajectory(np.random.default_rng(seed))
        if trajectory.num_tokens > self.MAX_TOKENS:
            with pytest.raises(ValueError, match="tokens: wanted at most max_tokens = 60, got"):
                self.buffer.push(trajectory)
            return
        assert self.buffer.push(trajectory) == len(self.pushed)
        self.pushed.append(trajectory)
        while (
            len(self.pushed) - self.first > self.MAX_TRAJECTORIES
            or sum(t.num_tokens for t in self.pushed[self.first :]) > self.MAX_TOKENS
        ):
            self.first += 1

    @rule()
    def restore(self) -> None:
        restored = TrajectoryBuffer.__new__(TrajectoryBuffer)
        restored._core = saved_buffers.restored(self.buffer._core.state())
        self.buffer = restored

    @precondition(lambda self: self.pushed)
    @rule(n=st.integers(0, 20))
    def sample(self, n: int) -> None:
        first, end = self.buffer.turn_range
        turn_ids = self.buffer.sample_turns(n)
        assert ((first <= turn_ids) & (turn_ids < end)).all()
        n = min(n, len(self.buffer))
        ids = self.buffer.sample_trajectories(n)
        assert len(set(ids.tolist())) == n
        assert_same(self.buffer.collate(ids), pack_trajectories([self.pushed[i] for i in ids]))

    @invariant()
    def agrees(self) -> None:
        live = self.pushed[self.first :]
        buffer = self.buffer
        first_turn = sum(t.num_turns for t in self.pushed[: self.first])
        num_turns = sum(t.num_turns for t in live)
        assert len(buffer) == buffer.num_trajectories == len(live)
        assert buffer.num_turns == num_turns
        assert buffer.num_tokens == sum(t.num_tokens for t in live)
        assert buffer.num_evicted == self.first
        assert buffer.trajectory_range == (self.first, len(self.pushed))
        assert buffer.turn_range == (first_turn, first_turn + num_turns)

        owners = [self.first + b for b, t in enumerate(live) for _ in t.turns]
        turn_ids = np.arange(first_turn, first_turn + num_turns)
        assert buffer.trajectory_of(turn_ids).tolist() == owners
        first_turn_ids, counts = buffer.turn_span(np.arange(self.first, len(self.pushed)))
        assert counts.tolist() == [t.num_turns for t in live]
        assert first_turn_ids.tolist() == [first_turn + owners.index(self.first + b) for b in range(len(live))]

        records = buffer.turn_records(turn_ids)
        last = [i + 1 == t.num_turns for t in live for i in range(t.num_turns)]
        assert records.rewards.tolist() == [np.float32(turn.reward) for t in live for turn in t.turns]
        assert records.turn.tolist() == [i for t in live for i in range(t.num_turns)]
        assert records.is_last.tolist() == last
        assert records.terminated.tolist() == [
            is_last and self.pushed[b].terminated for b, is_last in zip(owners, last, strict=True)
        ]
        assert records.truncated.tolist() == [
            is_last and self.pushed[b].truncated for b, is_last in zip(owners, last, strict=True)
        ]


TestRing = RingMachine.TestCase
TestRing.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def chi_square(counts: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2).sum() / expected)


# Upper 0.1 % points of chi-square with 49 degrees of freedom (tables). The seeds are fixed: no flakes.
CRITICAL_49 = 85.35


def one_turn_games(num: int) -> list[Trajectory]:
    turn = Turn(np.array([1]), np.array([2]), np.array([-1.0]), 0.0, 0)
    return [Trajectory((turn,), np.array([]), True, False) for _ in range(num)]


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_sample_turns_is_uniform_over_live_turns(seed: int) -> None:
    buffer = TrajectoryBuffer(10_000, 50, seed)
    buffer.extend(one_turn_games(80))
    assert buffer.turn_range == (30, 80)
    counts = np.bincount(buffer.sample_turns(50_000) - 30, minlength=50)
    assert counts.size == 50
    assert 20 < chi_square(counts) < CRITICAL_49  # too even is not random either


def test_turns_of_long_games_are_not_drawn_less() -> None:
    buffer = TrajectoryBuffer(10_000, 100, 3)
    rng = np.random.default_rng(0)
    while buffer.num_turns < 50:
        game = random_trajectory(rng)
        buffer.push(Trajectory(game.turns[: 50 - buffer.num_turns], game.final_observation_ids, True, False))
    counts = np.bincount(buffer.sample_turns(50_000), minlength=50)
    assert chi_square(counts) < CRITICAL_49


def test_sample_trajectories_is_uniform_in_every_place_and_distinct() -> None:
    buffer = TrajectoryBuffer(10_000, 50, 5)
    buffer.extend(one_turn_games(60))
    draws = np.stack([buffer.sample_trajectories(3) for _ in range(10_000)]) - 10
    assert all(len(set(row)) == 3 for row in draws.tolist())
    for place in range(3):
        counts = np.bincount(draws[:, place], minlength=50)
        assert counts.size == 50
        assert chi_square(counts) < CRITICAL_49


def test_the_same_seed_draws_the_same_on_every_machine() -> None:
    buffer = TrajectoryBuffer(10_000, 50, seed=7)
    buffer.extend(one_turn_games(50))
    assert buffer.sample_turns(8).tolist() == [21, 24, 27, 45, 40, 24, 6, 42]
    assert buffer.sample_trajectories(5).tolist() == [14, 35, 34, 21, 48]


def test_a_state_that_contradicts_itself_names_the_field() -> None:
    buffer, _ = filled(3)
    state = buffer._core.state()
    for name in ("tokens", "rewards", "policy_versions", "rollout_logprobs", "terminated", "priorities", "task_ids"):
        with pytest.raises(ValueError, match=f"{name}: wanted"):
            saved_buffers.restored(state | {name: state[name][:-1]})  # type: ignore[typeddict-item]
    with pytest.raises(ValueError, match="first_turn_id: wanted 0 to"):
        saved_buffers.restored(state | {"first_turn_id": -1})
    with pytest.raises(ValueError, match="num_turns: wanted at most max_trajectories = 2 items, got 3"):
        saved_buffers.restored(state | {"max_trajectories": 2})


def test_bad_sizes_and_seeds() -> None:
    for bad, error, name, bounds in (
        ((1, 1), ValueError, "max_tokens", "an integer from 2 to 2**63 - 1"),
        ((2**63, 1), ValueError, "max_tokens", "an integer from 2 to 2**63 - 1"),
        ((1.5, 1), TypeError, "max_tokens", "an integer from 2 to 2**63 - 1"),
        ((np.float32(1000.7), 10), TypeError, "max_tokens", "an integer from 2 to 2**63 - 1"),
        ((10, 0), ValueError, "max_trajectories", "an integer from 1 to 2**63 - 1"),
        ((10, "3"), TypeError, "max_trajectories", "an integer from 1 to 2**63 - 1"),
        ((10, 1, -1), ValueError, "seed", "an integer from 0 to 2**64 - 1"),
        ((10, 1, 2**64), ValueError, "seed", "an integer from 0 to 2**64 - 1"),
        ((10, 1, "x"), TypeError, "seed", "an integer from 0 to 2**64 - 1"),
    ):
        with pytest.raises(error, match=re.escape(f"{name}: wanted {bounds}, got ")):
            TrajectoryBuffer(*bad)  # type: ignore[arg-type]
    for vocab_size, error in ((0, ValueError), (-1, ValueError), (2**31 + 1, ValueError), ("x", TypeError)):
        with pytest.raises(error, match=r"vocab_size: wanted an integer from 1 to 2\*\*31, got"):
            TrajectoryBuffer(10, 1, vocab_size=vocab_size)  # type: ignore[arg-type]
    for gamma in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="gamma: wanted a number from 0 to 1, got"):
            TrajectoryBuffer(10, 1, gamma=gamma)
    with pytest.raises(TypeError, match="gamma: wanted a real number, got '1'"):
        TrajectoryBuffer(10, 1, gamma="1")  # type: ignore[arg-type]
    buffer = TrajectoryBuffer(np.int32(10), np.int64(1), np.uint64(2**64 - 1), gamma=np.float32(0.5))  # type: ignore[arg-type]
    assert (buffer.max_tokens, buffer.max_trajectories, buffer.gamma) == (10, 1, 0.5)


def bulk(**changes: Any) -> TrajectoryArrays:
    """Two games: one of two turns and five tokens, one of one turn and three."""
    return TrajectoryArrays(
        tokens=np.array([1, 2, 3, 4, 5, 6, 7, 8], np.int32),
        num_tokens=np.array([5, 3], np.int32),
        num_turns=np.array([2, 1], np.int32),
        observation_lengths=np.array([1, 1, 2], np.int32),
        action_lengths=np.array([1, 1, 1], np.int32),
        rollout_logprobs=np.array([-1, -2, -3], np.float32),
        rewards=np.array([0, 1, 2], np.float32),
        policy_versions=np.array([0, 0, 1], np.int64),
        terminated=np.array([True, False]),
        truncated=np.array([False, True]),
        task_ids=np.array([0, 5], np.int32),
    )._replace(**changes)


def test_games_in_bulk_are_the_games_one_by_one() -> None:
    turns = tuple(
        Turn(np.array(o), np.array(a), np.array(p), r, v)
        for o, a, p, r, v in (([1], [2], [-1.0], 0.0, 0), ([3], [4], [-2.0], 1.0, 0), ([6, 7], [8], [-3.0], 2.0, 1))
    )
    games = [Trajectory(turns[:2], np.array([5]), True, False), Trajectory(turns[2:], np.array([]), False, True)]
    one, other = TrajectoryBuffer(100, 9), TrajectoryBuffer(100, 9)
    assert one.extend_arrays(bulk()) == (0, 2)
    assert one.extend_arrays(bulk()) == (2, 4)
    assert other.extend(games * 2, [0, 5] * 2) == [0, 1, 2, 3]
    for name, array in one._core.state().items():
        np.testing.assert_array_equal(array, other._core.state()[name])  # type: ignore[literal-required]
    assert one.extend_arrays(TrajectoryArrays(*(array[:0] for array in bulk()))) == (4, 4)
    assert other.extend([]) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokens", np.arange(7, dtype=np.int32), "tokens: wanted 8 items, got 7"),
        ("num_tokens", np.array([3, 5], np.int32), "trajectory 0 of 2: tokens: wanted at least observation_lengths"),
        ("num_tokens", np.array([8, 0], np.int32), r"num_tokens\[1\]: wanted at least 1, got 0"),
        ("num_turns", np.array([3, 0], np.int32), r"num_turns\[1\]: wanted at least 1, got 0"),
        ("num_turns", np.array([2, 2], np.int32), "observation_lengths: wanted 4 items, got 3"),
        (
            "tokens",
            np.array([1, 2, 3, 4, 5, 6, -7, 8], np.int32),
            r"trajectory 1 of 2: tokens\[1\]: .* 0 or more, got -7",
        ),
        ("tokens", np.array([1, 2, 9, 4, 5, 6, 7, 8], np.int32), r"tokens\[2\]: .* below vocab_size = 9, got 9"),
        ("tokens", np.ones((8, 1), np.int32), "tokens: wanted 1 dimension, got 2"),
        (
            "observation_lengths",
            np.array([1, 0, 2], np.int32),
            r"observation_lengths\[1\]: wanted at least 1 token, got 0",
        ),
        ("action_lengths", np.array([1, 1, 0], np.int32), r"action_lengths\[2\]: wanted at least 1, got 0"),
        ("action_lengths", np.array([1, 1], np.int32), "action_lengths: wanted 3 items, got 2"),
        ("action_lengths", np.array([2**31 - 1] * 3, np.int32), "rollout_logprobs: wanted 6442450941 items, got 3"),
        ("rollout_logprobs", np.zeros(4, np.float32), "rollout_logprobs: wanted 3 items, got 4"),
        ("rollout_logprobs", np.array([0, np.nan, 0], np.float32), r"rollout_logprobs\[1\]: wanted a finite number"),
        (
            "rewards",
            np.array([0, 0, np.inf], np.float32),
            r"trajectory 1 of 2: rewards\[0\]: wanted a finite .*, got inf",
        ),
        ("rewards", np.zeros(1, np.float32), "rewards: wanted 3 items, got 1"),
        ("policy_versions", np.zeros(2, np.int64), "policy_versions: wanted 3 items, got 2"),
        ("terminated", np.array([False, False]), "wanted exactly one true, got terminated=0, truncated=0"),
        ("truncated", np.array([False, False]), "wanted exactly one true, got terminated=0, truncated=0"),
        ("truncated", np.array([2, 1], np.uint8).view(np.bool_), r"truncated\[0\]: wanted 0 or 1, got 2"),
        ("task_ids", np.zeros(3, np.int32), "task_ids: wanted 2 items, got 3"),
    ],
)
def test_a_bad_field_is_refused_by_name_and_nothing_comes_in(name: str, value: Any, message: str) -> None:
    buffer = TrajectoryBuffer(10, 3, vocab_size=9)
    buffer.extend_arrays(bulk())
    before = {key: np.asarray(item).tolist() for key, item in buffer._core.state().items()}
    with pytest.raises(ValueError, match=message):
        buffer.extend_arrays(bulk(**{name: value}))
    assert {key: np.asarray(item).tolist() for key, item in buffer._core.state().items()} == before


def test_a_game_longer_than_the_buffer_is_refused_with_all_others() -> None:
    buffer = TrajectoryBuffer(4, 3)
    with pytest.raises(ValueError, match="trajectory 0 of 2: tokens: wanted at most max_tokens = 4, got 5"):
        buffer.extend_arrays(bulk())
    assert len(buffer) == 0


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokens", lambda a: a.astype(np.int64), "tokens: wanted a C-contiguous array of int32, got one of int64"),
        ("tokens", lambda a: a.astype(np.uint32), "tokens: wanted a C-contiguous array of int32, got one of uint32"),
        ("tokens", lambda a: a.astype(">i4"), "tokens: wanted a C-contiguous array of int32, got one of >i4"),
        ("tokens", lambda a: a.tolist(), "tokens: wanted a NumPy array, got list"),
        (
            "tokens",
            lambda a: np.repeat(a, 2)[::2],
            "tokens: wanted .* of int32, got one of int32 that is not contiguous",
        ),
        ("rollout_logprobs", lambda a: a.astype(np.float64), "rollout_logprobs: wanted .* float32, got one of float64"),
        ("rewards", lambda a: a.astype(np.float16), "rewards: wanted .* float32, got one of float16"),
        ("policy_versions", lambda a: a.astype(np.int32), "policy_versions: wanted .* int64, got one of int32"),
        ("terminated", lambda a: a.astype(np.uint8), "terminated: wanted .* bool, got one of uint8"),
        ("task_ids", lambda a: None, "task_ids: wanted a NumPy array, got NoneType"),
    ],
)
def test_bulk_converts_nothing(name: str, change: Callable[[Any], Any], message: str) -> None:
    buffer = TrajectoryBuffer(10, 3)
    with pytest.raises(TypeError, match=message):
        buffer.extend_arrays(bulk(**{name: change(getattr(bulk(), name))}))
    assert buffer.num_trajectories == 0


def test_the_core_wants_every_field_and_no_other() -> None:
    core, fields = TrajectoryBuffer(10, 3)._core, bulk()._asdict()
    with pytest.raises(TypeError, match="length: wanted none of this name"):
        core.extend(**fields, length=1)  # type: ignore[call-arg]
    del fields["rewards"]
    with pytest.raises(TypeError, match="rewards: wanted as a keyword, got nothing"):
        core.extend(**fields)


def test_a_game_turn_by_turn_is_the_game_at_once() -> None:
    buffer, other = TrajectoryBuffer(100, 9), TrajectoryBuffer(100, 9)
    game = buffer.begin(task_id=5)
    game.add_turn([6, 7], [8], [-3.0], 2.0, 1)
    unfinished = buffer.begin()
    unfinished.add_turn([1], [2], [-1.0], 0.0, 0)
    assert (len(buffer), game.num_turns) == (0, 1)  # nobody sees a game before its end
    with pytest.raises(ValueError, match="wanted exactly one true"):
        game.end([30])
    assert game.end(truncated=True) == 0  # a refused end loses nothing
    del unfinished
    other.extend_arrays(bulk())
    np.testing.assert_array_equal(buffer._core.state()["tokens"], [6, 7, 8])
    for name, array in buffer._core.snapshot(0)[0].items():
        if name in ("tokens", "rollout_logprobs", "rewards", "policy_versions", "task_ids", "truncated"):
            np.testing.assert_array_equal(array, other._core.snapshot(1)[0][name])  # type: ignore[literal-required]
    for use in (
        lambda: game.end(terminated=True),
        lambda: game.add_turn([1], [2], [-1.0], 0.0, 0),
        lambda: game.num_turns,
    ):
        with pytest.raises(ValueError, match="this game has ended"):
            use()


def test_a_bad_turn_is_refused_by_name_and_the_game_goes_on() -> None:
    buffer = TrajectoryBuffer(5, 9, vocab_size=50)
    game = buffer.begin()
    game.add_turn([1], [2], [-1.0], 0.0, 0)
    good: dict[str, Any] = {
        "observation_ids": [1], "action_ids": [2], "rollout_logprobs": [-1.0], "reward": 0.0, "policy_version": 0,
    }  # fmt: skip
    for name, value, error, message in (
        ("observation_ids", [], ValueError, "observation_ids: wanted at least 1 token, got none"),
        ("observation_ids", [50], ValueError, r"observation_ids\[0\]: wanted a token id below vocab_size = 50, got 50"),
        ("observation_ids", [2**31], ValueError, "observation_ids: wanted integers that fit into int32"),
        ("observation_ids", [1.0], TypeError, "observation_ids: wanted integers"),
        ("observation_ids", [[1]], ValueError, "observation_ids: wanted 1 dimension"),
        ("action_ids", [-1], ValueError, r"action_ids\[0\]: wanted a token id of 0 or more, got -1"),
        ("rollout_logprobs", [], ValueError, r"rollout_logprobs: wanted one per action token \(1\), got 0"),
        ("rollout_logprobs", [float("nan")], ValueError, r"rollout_logprobs\[0\]: wanted a finite number"),
        ("rollout_logprobs", [1e300], ValueError, r"rollout_logprobs\[0\]: wanted a finite number, got inf"),
        ("rollout_logprobs", ["a"], TypeError, "rollout_logprobs: wanted real numbers"),
        ("reward", float("inf"), ValueError, "reward: wanted a finite number, got inf"),
        ("reward", "x", TypeError, "reward: wanted a real number, got 'x'"),
        ("reward", None, TypeError, "reward: wanted a real number, got None"),
        ("policy_version", 1.5, TypeError, r"policy_version: wanted an integer .*, got 1\.5"),
        ("policy_version", 2**63, ValueError, r"policy_version: wanted .* to 2\*\*63 - 1, got 9223372036854775808"),
    ):
        with pytest.raises(error, match=message):
            game.add_turn(**(good | {name: value}))
    game.add_turn(**good)
    with pytest.raises(ValueError, match="tokens: wanted at most max_tokens = 5, got 6"):
        game.end([3, 4], terminated=True)
    for flag in ("terminated", "truncated"):
        with pytest.raises(TypeError, match=f"{flag}: wanted True or False, got 'False'"):
            game.end([3], **{flag: "False"})
    with pytest.raises(TypeError, match="final_observation_ids: wanted integers that fit into int32, got float64"):
        game.end([3.0], terminated=True)
    assert game.end([3], terminated=True) == 0
    assert buffer.num_tokens == 5
    with pytest.raises(ValueError, match=r"task_id: wanted an integer from -2\*\*31 to 2\*\*31 - 1, got 2147483648"):
        buffer.begin(2**31)


@pytest.mark.parametrize("vocab_size", [None, 600, 65_536, 65_537])
@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_every_vocabulary_and_discount_agrees_with_the_plain_twin(vocab_size: int | None, gamma: float) -> None:
    games = random_trajectories(40, vocab_size=vocab_size or 2**31)
    buffer = TrajectoryBuffer(10**6, 100, vocab_size=vocab_size, gamma=gamma)
    buffer.extend(games)
    assert (buffer.vocab_size, buffer.gamma) == (vocab_size, gamma)
    ids = np.random.default_rng(0).permutation(40)
    assert_same(buffer.collate(ids), pack_trajectories([games[i] for i in ids], gamma))


def test_a_small_vocabulary_halves_the_tokens() -> None:
    num_tokens = 4_000_000
    turn = Turn(np.ones(num_tokens - 1, np.int32), np.array([2]), np.array([-1.0]), 0.0, 0)
    bytes_of = {}
    for vocab_size in (65_536, 65_537):
        buffer = TrajectoryBuffer(10**8, 10, vocab_size=vocab_size)
        buffer.push(Trajectory((turn,), np.array([]), True, False))
        bytes_of[vocab_size] = buffer.stats().num_bytes
    assert bytes_of[65_537] - bytes_of[65_536] == 2 * num_tokens


def test_collate_refuses_memory_that_it_could_not_write_to() -> None:
    buffer, _ = filled(2)

    def read_only(num_bytes: int) -> np.ndarray:
        memory = np.zeros(num_bytes, np.uint8)
        memory.flags.writeable = False
        return memory

    for memory, error, message in (
        (lambda n: np.zeros(n, np.int32), TypeError, "memory: wanted a C-contiguous array of uint8, got one of int32"),
        (lambda n: np.zeros(2 * n, np.uint8)[::2], TypeError, "memory: wanted .* of uint8 that is not contiguous"),
        (lambda n: bytearray(n), TypeError, "memory: wanted a NumPy array, got bytearray"),
        (lambda n: np.zeros((1, n), np.uint8), ValueError, "memory: wanted 1 dimension, got 2"),
        (lambda n: np.zeros(n - 1, np.uint8), ValueError, r"memory: wanted (\d+) bytes, got \d+"),
        (lambda n: np.zeros(n + 1, np.uint8)[1:], ValueError, "memory: wanted memory aligned to 16 bytes"),
        (read_only, ValueError, "memory: wanted a writeable array, got a read-only one"),
    ):
        with pytest.raises(error, match=message):
            buffer.collate([0, 1], memory=memory)
    with pytest.raises(TypeError):
        buffer.collate([0, 1], memory=None)  # type: ignore[arg-type]


def test_memory_that_evicts_what_was_planned() -> None:
    buffer, _ = filled(3, max_trajectories=3)
    before = buffer.turn_range

    def push_and_allocate(num_bytes: int) -> np.ndarray:
        buffer.extend(one_turn_games(1))
        return np.zeros(num_bytes, np.uint8)

    with pytest.raises(IndexError, match="trajectory_ids: wanted live trajectories, got one of 0, which a push has"):
        buffer.collate([1, 0], memory=push_and_allocate)
    assert buffer.turn_range[0] > before[0]
    first = buffer.turn_range[0]
    with pytest.raises(IndexError, match="turn_ids: wanted live trajectories, got one of 1, which a push has evicted"):
        buffer.collate_transitions([first], memory=push_and_allocate)


def test_an_error_of_memory_comes_through() -> None:
    def no_memory(num_bytes: int) -> np.ndarray:
        raise MemoryError(num_bytes)

    buffer, _ = filled(2)
    with pytest.raises(MemoryError):
        buffer.collate([0], memory=no_memory)
    assert buffer.collate([0]).terminated.size == 1


def test_an_evicted_or_future_id_is_an_index_error_that_names_the_live_range() -> None:
    buffer, _ = filled(5, max_trajectories=2)
    first, end = buffer.turn_range
    for bad in (2, 5, -1):
        message = rf"trajectory_ids\[1\]: wanted a live id in \[3, 5\), got {bad}"
        with pytest.raises(IndexError, match=message):
            buffer.collate([3, bad])
        with pytest.raises(IndexError, match=message):
            buffer.turn_span([3, bad])
    for bad in (first - 1, end):
        message = rf"turn_ids\[0\]: wanted a live id in \[{first}, {end}\), got {bad}"
        with pytest.raises(IndexError, match=message):
            buffer.trajectory_of([bad])
        with pytest.raises(IndexError, match=message):
            buffer.turn_records([bad])


def test_ids_must_be_whole_numbers_in_one_dimension() -> None:
    buffer, _ = filled(2)
    with pytest.raises(TypeError, match="trajectory_ids: wanted integers that fit into int64, got float64"):
        buffer.collate([0.0, 1.0])
    with pytest.raises(TypeError, match="turn_ids: wanted integers that fit into int64, got uint64"):
        buffer.turn_records(np.array([0], np.uint64))
    with pytest.raises(ValueError, match=r"turn_ids: wanted 1 dimension, got shape \(1, 1\)"):
        buffer.trajectory_of([[0]])
    assert buffer.trajectory_of(np.array([0], np.int16)).tolist() == [0]
    assert buffer.trajectory_of([]).tolist() == []


def test_bad_sample_sizes() -> None:
    buffer = TrajectoryBuffer(100, 10)
    assert buffer.sample_turns(0).tolist() == []
    with pytest.raises(ValueError, match="n: wanted 0 draws from an empty buffer, got 1"):
        buffer.sample_turns(1)
    buffer.extend(one_turn_games(3))
    with pytest.raises(ValueError, match="n: wanted at most 3 distinct ids, as many as are live, got 4"):
        buffer.sample_trajectories(4)
    for sample in (buffer.sample_turns, buffer.sample_trajectories):
        with pytest.raises(ValueError, match=r"n: wanted an integer from 0 to 2\*\*60 - 1, got -1"):
            sample(-1)
        with pytest.raises(TypeError, match=r"n: wanted an integer from 0 to 2\*\*60 - 1, got 1\.5"):
            sample(1.5)  # type: ignore[arg-type]


def test_the_face_refuses_what_float32_cannot_hold() -> None:
    turn = Turn(np.array([1]), np.array([2]), np.array([-1.0]), 1e300, 0)
    buffer = TrajectoryBuffer(100, 10)
    with pytest.raises(ValueError, match=r"rewards\[0\]: wanted a finite number, got inf"):
        buffer.push(Trajectory((turn,), np.array([]), True, False))
    assert len(buffer) == 0


def test_what_is_no_trajectory_is_refused_by_name() -> None:
    buffer, games = TrajectoryBuffer(100, 10), one_turn_games(1)
    with pytest.raises(TypeError, match="trajectory: wanted a Trajectory, got int"):
        buffer.push(1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"trajectories\[1\]: wanted a Trajectory, got int"):
        buffer.extend([games[0], 1])  # type: ignore[list-item]
    assert len(buffer) == 0


def test_a_bad_number_of_threads_is_refused_by_name() -> None:
    buffer, _ = filled(2)
    for collate in (buffer.collate, buffer.collate_transitions):
        for threads, error in ((0, ValueError), (-1, ValueError), (2**31, ValueError), (np.float32(2.5), TypeError)):
            with pytest.raises(error, match=r"threads: wanted an integer from 1 to 2\*\*31 - 1, got "):
                collate([0], threads=threads)  # type: ignore[arg-type]


def test_pushing_and_sampling_together() -> None:
    games = random_trajectories(64)
    buffer = TrajectoryBuffer(2_000, 40)
    buffer.push(games[0])
    expected = [pack_trajectories([game]) for game in games]
    owner_of_reward = {float(packed.rewards[0]): packed for packed in expected}
    done = threading.Event()
    faults: list[BaseException] = []
    checked = [0, 0]

    def produce() -> None:
        for i in range(1500):
            buffer.push(games[i % len(games)])

    def consume(index: int) -> None:
        try:
            while not done.is_set() or checked[index] == 0:
                try:
                    packed = buffer.collate(buffer.trajectory_of(buffer.sample_turns(1)))
                except IndexError:
                    continue  # evicted between the two calls
                assert_same(packed, owner_of_reward[float(packed.rewards[0])])
                checked[index] += 1
        except BaseException as error:
            faults.append(error)

    producers = [threading.Thread(target=produce) for _ in range(2)]
    consumers = [threading.Thread(target=consume, args=(i,)) for i in range(2)]
    for thread in (*consumers, *producers):
        thread.start()
    for thread in producers:
        thread.join()
    done.set()
    for thread in consumers:
        thread.join()
    assert not faults
    assert min(checked) > 0
    assert buffer.trajectory_range[1] == 3001
