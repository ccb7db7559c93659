"""Every kind of draw from the buffer: exactly a plain model's, as often as it should be, and refused where it must."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
import saved_buffers
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from plain_generator import PlainGenerator

from archer_fast.buffer import BufferStats, PrioritisedSample, TrajectoryBuffer
from archer_fast.trajectory import Trajectory, Turn

NEAR_FOUR = re.escape(repr(np.float32(3.9)))


def game(versions: Sequence[int]) -> Trajectory:
    """One turn for each version, of two tokens."""
    turns = (Turn(np.array([1]), np.array([2]), np.array([-1.0]), 0.0, version) for version in versions)
    return Trajectory(tuple(turns), np.array([]), True, False)


def filled(*games: Sequence[int], task_ids: Sequence[int] | None = None, seed: int = 0) -> TrajectoryBuffer:
    buffer = TrajectoryBuffer(1 << 20, 1 << 20, seed)
    buffer.extend(map(game, games), task_ids)
    return buffer


def restored(buffer: TrajectoryBuffer) -> TrajectoryBuffer:
    other = TrajectoryBuffer.__new__(TrajectoryBuffer)
    other._core = saved_buffers.restored(buffer._core.state())
    return other


class SamplingMachine(RuleBasedStateMachine):
    """Whatever is pushed, evicted, updated, saved and loaded, every draw is the plain model's, id for id.

    Priorities are multiples of 1/4: their sums are exact, so that any order of adding finds the same turn.
    """

    MAX_TRAJECTORIES = 9

    def __init__(self) -> None:
        super().__init__()
        self.buffer = TrajectoryBuffer(10_000, self.MAX_TRAJECTORIES, seed=5)
        self.generator = PlainGenerator(5)
        self.games: list[tuple[int, list[int]]] = []  # task, turn ids
        self.versions: list[int] = []
        self.priorities: list[float] = []
        self.max_priority = 1.0

    def live_games(self) -> list[tuple[int, tuple[int, list[int]]]]:
        return list(enumerate(self.games))[-self.MAX_TRAJECTORIES :]

    def live(self) -> list[int]:
        return [turn for _, (_, turns) in self.live_games() for turn in turns]

    @rule(versions=st.lists(st.integers(-3, 3), min_size=1, max_size=12), task=st.integers(-2, 1))
    def push(self, versions: list[int], task: int) -> None:
        self.buffer.push(game(versions), task_id=task)
        self.games.append((task, list(range(len(self.versions), len(self.versions) + len(versions)))))
        self.versions += versions
        self.priorities += [self.max_priority] * len(versions)

    @precondition(lambda self: self.games)
    @rule(data=st.data())
    def update(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.integers(0, len(self.versions) - 1), max_size=8))
        values = [data.draw(st.integers(0, 12)) / 4 for _ in ids]
        first = self.live()[0]
        assert self.buffer.update_priorities(ids, values) == sum(i < first for i in ids)
        for i, value in zip(ids, values, strict=True):
            if i >= first:
                self.priorities[i] = value
                self.max_priority = max(self.max_priority, value)

    @rule()
    def restore(self) -> None:
        self.buffer = restored(self.buffer)

    @precondition(lambda self: self.games)
    @rule(
        n=st.integers(0, 12),
        replacement=st.booleans(),
        version=st.none() | st.integers(-4, 4),
        by_task=st.booleans(),
        turns=st.booleans(),
    )
    def sample(self, n: int, replacement: bool, version: int | None, by_task: bool, turns: bool) -> None:
        ids: dict[int, list[int]] = {}
        for trajectory, (task, turn_ids) in self.live_games():
            allowed = [t for t in turn_ids if version is None or self.versions[t] >= version] if turns else [trajectory]
            if allowed:
                ids.setdefault(task if by_task else 0, []).extend(allowed)
        replacement = replacement and turns
        sample: Callable[[], Any] = lambda: (  # noqa: E731
            self.buffer.sample_turns(n, replacement=replacement, min_policy_version=version, by_task=by_task)
            if turns
            else self.buffer.sample_trajectories(n, by_task=by_task)
        )
        share, rest = divmod(n, max(len(ids), 1))
        enough = (
            bool(ids)
            and all(replacement or len(of_task) >= share for of_task in ids.values())
            and sum(replacement or len(of_task) > share for of_task in ids.values()) >= rest
        )
        if n > 0 and not enough:
            with pytest.raises(ValueError, match="wanted"):
                sample()
            return
        wanted = self.generator.draw_by_task(ids, n, replacement) if n else []
        assert sample().tolist() == wanted

    @precondition(lambda self: self.games)
    @rule(n=st.integers(0, 12), beta=st.sampled_from([0.0, 0.4, 1.0]))
    def sample_prioritised(self, n: int, beta: float) -> None:
        live = self.live()
        priorities = np.array([self.priorities[i] for i in live])
        if n > 0 and not priorities.any():
            with pytest.raises(ValueError, match=f"n: wanted 0 draws where every priority is 0, got {n}"):
                self.buffer.sample_prioritised(n, beta)
            return
        masses = self.generator.slices(priorities.sum(), n)
        places = np.searchsorted(priorities.cumsum(), masses, side="right")
        got = self.buffer.sample_prioritised(n, beta)
        assert got.turn_ids.tolist() == [live[place] for place in places]
        weights = (priorities[priorities > 0].min() / priorities[places]) ** beta if n else []
        np.testing.assert_allclose(got.weights, weights, rtol=1e-6)

    @invariant()
    def agrees(self) -> None:
        live = self.live()
        assert self.buffer.priorities().tolist() == [self.priorities[i] for i in live]
        state = self.buffer._core.state()
        assert state["counter"] == self.generator.counter
        assert state["max_priority"] == self.max_priority
        assert state["task_ids"].tolist() == [task for _, (task, _) in self.live_games()]
        stats = self.buffer.stats()
        assert stats.turns_by_version == Counter(self.versions[i] for i in live)
        ages = Counter[int]()
        for age, (_, (_, turns)) in enumerate(reversed(self.live_games())):
            ages[1 << age.bit_length() - 1 if age else 0] += len(turns)
        assert stats.turns_by_age == ages


TestSampling = SamplingMachine.TestCase
TestSampling.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def chi_square(counts: npt.NDArray[Any], probabilities: npt.NDArray[Any] | None = None) -> float:
    expected = counts.sum() * (np.full(counts.size, 1 / counts.size) if probabilities is None else probabilities)
    return float(((counts - expected) ** 2 / expected).sum())


# Upper 0.1 % points of chi-square with 49 and 119 degrees of freedom (tables). The seeds are fixed: no flakes.
CRITICAL_49, CRITICAL_119 = 85.35, 171.6


@pytest.mark.parametrize("query", [{"min_policy_version": 3}, {"by_task": True}])
def test_with_replacement_every_turn_that_is_allowed_is_drawn_as_often(query: dict[str, Any]) -> None:
    versions = [4, 1, 3, 2] * 25
    buffer = filled([0] * 10, *([v, v] for v in versions), task_ids=[1] + [0] * 100)
    counts = np.bincount(buffer.sample_turns(50_000, **query), minlength=210)
    if "by_task" in query:
        assert counts[:10].sum() == counts[10:].sum() == 25_000
        assert chi_square(counts[10:].reshape(50, 4).sum(1)) < CRITICAL_49
        return
    allowed = [10 + 2 * i + k for i, v in enumerate(versions) for k in (0, 1) if v >= 3]
    assert counts.sum() == counts[allowed].sum()
    assert counts[allowed].min() > 0
    assert chi_square(counts[allowed].reshape(50, 2).sum(1)) < CRITICAL_49


def test_without_replacement_every_ordered_choice_is_as_likely() -> None:
    buffer = filled([1, 1], [1, 1, 1], seed=3)
    draws = Counter(tuple(buffer.sample_turns(4, replacement=False).tolist()) for _ in range(30_000))
    assert set(draws) == set(itertools.permutations(range(5), 4))
    assert 60 < chi_square(np.array(list(draws.values()))) < CRITICAL_119  # too even is not random either


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_turns_are_drawn_in_proportion_to_their_priorities(seed: int) -> None:
    buffer = filled(*[[0] * 5] * 10, seed=seed)
    priorities = np.random.default_rng(0).gamma(1.0, size=50)
    buffer.update_priorities(np.arange(50), priorities)
    # One draw a call: several of one call share out the whole between them, and come out too even.
    drawn = np.concatenate([buffer.sample_prioritised(1).turn_ids for _ in range(20_000)])
    counts = np.bincount(drawn, minlength=50)
    assert 20 < chi_square(counts, priorities / priorities.sum()) < CRITICAL_49


def test_stratified_draws_give_each_turn_its_share_to_within_two() -> None:
    buffer = filled(*[[0] * 5] * 40)
    priorities = np.random.default_rng(1).gamma(0.5, size=200)
    priorities[::7] = 0.0
    buffer.update_priorities(np.arange(200), priorities)
    for n in (1, 7, 256, 5000):
        counts = np.bincount(buffer.sample_prioritised(n).turn_ids, minlength=200)
        assert (np.abs(counts - n * priorities / priorities.sum()) < 2).all()
        assert not counts[::7].any()


def test_importance_weights_by_hand() -> None:
    buffer = filled([0, 0], [0, 0, 0])
    buffer.update_priorities([0, 1, 2, 3, 4], [2, 0, 1, 1, 4])
    for beta, wanted in ((1.0, {0: 0.5, 2: 1, 3: 1, 4: 0.25}), (0.5, {0: 0.5**0.5, 2: 1, 3: 1, 4: 0.5})):
        # (N P)^-beta over the largest there is: N = 5, P = 2/8, 0, 1/8, 1/8, 4/8
        largest = (5 * 1 / 8) ** -beta
        assert wanted[4] == pytest.approx((5 * 4 / 8) ** -beta / largest)
        sample = buffer.sample_prioritised(8, beta)
        assert isinstance(sample, PrioritisedSample)
        assert sample.turn_ids.tolist() == [0, 0, 2, 3, 4, 4, 4, 4]
        assert sample.turn_ids.dtype == np.int64 and sample.weights.dtype == np.float32
        np.testing.assert_allclose(sample.weights, [wanted[i] for i in sample.turn_ids.tolist()], rtol=1e-7)
    assert buffer.sample_prioritised(3, 0.0).weights.tolist() == [1, 1, 1]
    # The mean over draws, so weighted with beta=1, is the plain mean of what can be drawn, up to a factor.
    sample = buffer.sample_prioritised(8000, 1.0)
    values = np.array([3.0, 0.0, 5.0, 7.0, 11.0])[sample.turn_ids]
    assert (values * sample.weights).sum() / sample.weights.sum() == pytest.approx((3 + 5 + 7 + 11) / 4)


def test_new_turns_have_the_largest_priority_ever_seen() -> None:
    buffer = TrajectoryBuffer(1000, 2)
    buffer.push(game([0, 0]))
    assert buffer.priorities().tolist() == [1, 1]
    assert buffer.update_priorities([0, 1], np.array([7, 0.5], np.float32)) == 0
    buffer.push(game([0]))
    assert buffer.priorities().tolist() == [7, 0.5, 7]
    buffer.push(game([0]))
    assert buffer.update_priorities(np.array([0, 1, 2, 3]), [9, 9, 2, 3]) == 2  # two are gone: counted, not kept
    buffer.push(game([0]))
    assert buffer.priorities().tolist() == [3, 7]
    assert buffer.update_priorities([], []) == 0


@pytest.mark.parametrize(
    ("ids", "priorities", "error", "message"),
    [
        ([2, 5], [1, 1], IndexError, r"turn_ids\[1\]: wanted an id in \[0, 5\), which a turn has or has had, got 5"),
        ([-1], [1], IndexError, r"turn_ids\[0\]: wanted an id in \[0, 5\)"),
        ([2, 3], [9, np.nan], ValueError, r"priorities\[1\]: wanted 0 to 1e\+200, got nan"),
        ([2, 3], [9, -1], ValueError, r"priorities\[1\]: wanted 0 to 1e\+200, got -1"),
        ([2, 3], [9, np.inf], ValueError, r"priorities\[1\]: wanted 0 to 1e\+200, got inf"),
        ([0], [np.nan], ValueError, r"priorities\[0\]: wanted 0 to 1e\+200, got nan"),  # evicted, and still wrong
        ([2, 3], [9], ValueError, r"priorities: wanted one per turn id \(2\), got 1"),
        ([2], [[9]], ValueError, r"priorities: wanted 1 dimension, got shape \(1, 1\)"),
        ([2], [9j], TypeError, "priorities: wanted real numbers, got complex128"),
        ([2], ["9"], TypeError, "priorities: wanted real numbers, got <U1"),
        ([2.0], [9], TypeError, "turn_ids: wanted integers that fit into int64, got float64"),
    ],
)
def test_a_bad_update_is_refused_and_changes_nothing(
    ids: Any, priorities: Any, error: type[Exception], message: str
) -> None:
    buffer = TrajectoryBuffer(1000, 2)
    buffer.extend([game([0]), game([0, 0]), game([0, 0])])
    buffer.update_priorities([1], [3])
    with pytest.raises(error, match=message):
        buffer.update_priorities(ids, priorities)
    assert buffer.priorities().tolist() == [3, 1, 1, 1]
    buffer.push(game([0]))
    assert buffer.priorities().tolist() == [1, 1, 3]


def test_draws_that_cannot_be_are_refused_and_draw_nothing() -> None:
    buffer = TrajectoryBuffer(1000, 10)
    for draw in (
        lambda: buffer.sample_turns(1),
        lambda: buffer.sample_turns(1, by_task=True),
        lambda: buffer.sample_turns(1, min_policy_version=0),
        lambda: buffer.sample_prioritised(1),
    ):
        with pytest.raises(ValueError, match="n: wanted 0 draws from an empty buffer, got 1"):
            draw()
    with pytest.raises(ValueError, match="n: wanted 0 draws from an empty buffer, got 1"):
        buffer.sample_trajectories(1, by_task=True)
    with pytest.raises(ValueError, match="n: wanted at most 0 distinct ids, as many as are live, got 1"):
        buffer.sample_turns(1, replacement=False)
    buffer.extend([game([4, 4]), game([6, 5]), game([5])], task_ids=[1, 1, 2])
    with pytest.raises(ValueError, match="n: wanted at most 5 distinct ids, as many as are live, got 6"):
        buffer.sample_turns(6, replacement=False)
    with pytest.raises(
        ValueError, match="n: wanted at most 3 distinct ids, as many as there are to choose from, got 4"
    ):
        buffer.sample_turns(4, replacement=False, min_policy_version=5)
    with pytest.raises(ValueError, match="n: wanted at most 1 distinct ids of task 2, got 2 as its share of 5"):
        buffer.sample_turns(5, replacement=False, by_task=True)
    with pytest.raises(ValueError, match="min_policy_version: wanted at most 6, the newest of a live turn, got 7"):
        buffer.sample_turns(1, min_policy_version=7)
    for beta in (-0.01, 1.01, np.nan):
        with pytest.raises(ValueError, match=f"beta: wanted a number from 0 to 1, got {beta}"):
            buffer.sample_prioritised(1, beta)
    for n in (-1, -(2**40)):
        for refused in (buffer.sample_turns, buffer.sample_trajectories, buffer.sample_prioritised):
            with pytest.raises(ValueError, match=rf"n: wanted an integer from 0 to 2\*\*60 - 1, got {n}"):
                refused(n)
    assert buffer._core.state()["counter"] == 0
    assert buffer.sample_turns(0, min_policy_version=7).tolist() == []


@pytest.mark.parametrize(
    ("draw", "arguments", "error", "message"),
    [
        ("sample_turns", {"n": np.float32(3.9)}, TypeError, f"n: wanted an integer .*, got {NEAR_FOUR}"),
        ("sample_turns", {"n": Decimal("3.9")}, TypeError, r"n: wanted an integer .*, got Decimal\('3\.9'\)"),
        ("sample_turns", {"n": "3"}, TypeError, "n: wanted an integer .*, got '3'"),
        ("sample_turns", {"n": 2**60}, ValueError, "n: wanted an integer .*, got 1152921504606846976"),
        ("sample_turns", {"n": 1, "replacement": 0}, TypeError, "replacement: wanted True or False, got 0"),
        ("sample_turns", {"n": 1, "by_task": "no"}, TypeError, "by_task: wanted True or False, got 'no'"),
        (
            "sample_turns",
            {"n": 1, "min_policy_version": 5.5},
            TypeError,
            r"min_policy_version: wanted an integer from -2\*\*63 to 2\*\*63 - 1, got 5\.5",
        ),
        (
            "sample_turns",
            {"n": 1, "min_policy_version": 2**63},
            ValueError,
            "min_policy_version: wanted an integer .*, got 9223372036854775808",
        ),
        ("sample_trajectories", {"n": np.float32(3.9)}, TypeError, f"n: wanted an integer .*, got {NEAR_FOUR}"),
        ("sample_trajectories", {"n": 1, "by_task": 1}, TypeError, "by_task: wanted True or False, got 1"),
        ("sample_prioritised", {"n": 3.0}, TypeError, r"n: wanted an integer .*, got 3\.0"),
        ("sample_prioritised", {"n": 1, "beta": "1"}, TypeError, "beta: wanted a real number, got '1'"),
    ],
)
def test_a_bad_scalar_of_a_draw_is_refused_by_name(
    draw: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    buffer = filled([0, 1, 2], [3, 4])
    with pytest.raises(error, match=message):
        getattr(buffer, draw)(**arguments)
    assert buffer._core.state()["counter"] == 0


def test_numpys_scalars_are_numbers_and_flags() -> None:
    buffer, other = filled([0, 1, 2], [3, 4]), filled([0, 1, 2], [3, 4])
    ids = buffer.sample_turns(
        np.int32(2), replacement=np.bool_(False), min_policy_version=np.int64(1), by_task=np.bool_(True)
    )
    assert ids.tolist() == other.sample_turns(2, replacement=False, min_policy_version=1, by_task=True).tolist()
    weights = buffer.sample_prioritised(np.int64(2), np.float32(0.5)).weights
    assert weights.tolist() == other.sample_prioritised(2, 0.5).weights.tolist()


def test_bad_task_ids() -> None:
    buffer = filled([0])
    for bad in (2**31, -(2**31) - 1):
        with pytest.raises(ValueError, match=rf"task_id: wanted an integer from -2\*\*31 to 2\*\*31 - 1, got {bad}"):
            buffer.push(game([0]), task_id=bad)
        with pytest.raises(ValueError, match=rf"task_ids\[1\]: wanted an integer .*, got {bad}"):
            buffer.extend([game([0])] * 2, task_ids=[0, bad])
    with pytest.raises(TypeError, match=r"task_id: wanted an integer .*, got 1\.0"):
        buffer.push(game([0]), task_id=1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"task_id: wanted an integer .*, got 'a'"):
        buffer.begin(task_id="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"task_ids: wanted one per trajectory \(2\), got 1"):
        buffer.extend([game([0]), game([0])], task_ids=[1])
    assert len(buffer) == 1
    buffer.extend([game([0])] * 2, task_ids=(2**31 - 1, -(2**31)))
    assert buffer._core.state()["task_ids"].tolist() == [0, 2**31 - 1, -(2**31)]


def test_the_same_seed_draws_the_same_on_every_machine() -> None:
    buffer = filled(*([i % 4, i % 3] for i in range(25)), task_ids=[i % 3 for i in range(25)], seed=7)
    assert buffer.sample_turns(6, replacement=False).tolist() == [21, 30, 45, 3, 32, 24]
    assert buffer.sample_turns(5, min_policy_version=2).tolist() == [17, 30, 36, 14, 4]
    assert buffer.sample_turns(5, by_task=True).tolist() == [42, 38, 26, 23, 47]
    assert buffer.sample_trajectories(5, by_task=True).tolist() == [24, 3, 16, 10, 2]
    buffer.update_priorities(np.arange(50), 0.1 * np.arange(50))
    assert buffer.sample_prioritised(8).turn_ids.tolist() == [14, 25, 30, 33, 39, 42, 46, 47]


def test_a_long_life_and_a_restore_draw_the_same() -> None:
    """Priorities of every size, so that sums are rounded: only equal trees round alike."""
    rng = np.random.default_rng(0)
    buffer = TrajectoryBuffer(10**6, 400, seed=2)
    for _ in range(60):
        buffer.extend([game(rng.integers(0, 9, size=rng.integers(1, 20)).tolist()) for _ in range(40)])
        sample = buffer.sample_prioritised(64)
        buffer.update_priorities(sample.turn_ids, 10 ** rng.uniform(-6, 6, size=64))
    for _ in range(3):
        buffer.extend([game([0])] * 100)  # most of what grew is gone
    other = restored(buffer)
    for _ in range(50):
        one, two = buffer.sample_prioritised(64, 0.6), other.sample_prioritised(64, 0.6)
        assert one.turn_ids.tolist() == two.turn_ids.tolist()
        assert one.weights.tolist() == two.weights.tolist()
        priorities = 10 ** rng.uniform(-6, 6, size=64)
        for each in (buffer, other):
            each.update_priorities(one.turn_ids, priorities)
            each.push(game([1] * 7))


def test_stats() -> None:
    buffer = TrajectoryBuffer(1000, 3)
    assert buffer.stats() == BufferStats(0, 0, 0, 0, buffer.stats().num_bytes, {}, {})
    buffer.extend([game([5, 6]), game([6, 6]), game([7, 7]), game([7, 7])])
    stats = buffer.stats()
    assert stats == BufferStats(3, 6, 12, 1, stats.num_bytes, {0: 2, 1: 2, 2: 2}, {6: 2, 7: 4})
    before = filled().stats().num_bytes
    many = filled(*[[0] * 100] * 500)
    needed = 50_000 * (2 * 4 + 4 + 24)  # tokens, log-probabilities, turn records
    assert needed < many.stats().num_bytes - before < 1.15 * needed
    held = many.stats().num_bytes
    many.sample_prioritised(1)
    assert 8 * 50_000 < many.stats().num_bytes - held < 26 * 50_000  # 12.6 bytes a turn there is room for
