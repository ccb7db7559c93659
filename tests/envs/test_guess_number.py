"""Guess the number: answers, rewards, ends, and the optimum."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archer_fast.envs.base import ResamplableEnv, TextEnv
from archer_fast.envs.guess_number import GuessNumber, bisection_return, vocabulary


def started(number: int, **options: int) -> GuessNumber:
    env = GuessNumber(**options)
    env.reset(0, {"number": number})
    return env


def test_a_game_by_hand() -> None:
    env = GuessNumber(high=32)
    assert env.reset(0, {"number": 20}) == "Guess 1 to 32.\n"
    assert env.step("16") == (" Higher.\n", -1.0, False, False, {"won": False, "kind": "guess", "repeat": False})
    assert env.step(" 24\n") == (" Lower.\n", -1.0, False, False, {"won": False, "kind": "guess", "repeat": False})
    assert env.step("016") == (" Higher.\n", -1.0, False, False, {"won": False, "kind": "guess", "repeat": True})
    assert env.step("33") == (" Invalid.\n", -1.0, False, False, {"won": False, "kind": "invalid", "repeat": False})
    assert env.step("20") == (
        " Correct.\n",
        0.0,
        True,
        False,
        {"won": True, "kind": "guess", "repeat": False, "number": 20},
    )
    with pytest.raises(RuntimeError, match="call reset first"):
        env.step("20")


def test_the_last_turn_ends_a_lost_game() -> None:
    env = started(5, max_turns=3)
    results = [env.step("4") for _ in range(3)]
    assert [r.terminated for r in results] == [False, False, True]
    assert [r.reward for r in results] == [-1.0, -1.0, -1.0]
    assert not any(r.truncated for r in results)
    assert results[-1].info == {"won": False, "kind": "guess", "repeat": True, "number": 5}


@pytest.mark.parametrize(
    "action", ["", "0", "-5", "+5", "33", "5.0", "1_0", "five", "5 5", "٥", "²", "9" * 10_000, "\x00", "\ud800"]
)
def test_what_is_no_number_in_range_is_invalid(action: str) -> None:
    assert started(5).step(action).text == " Invalid.\n"


def test_invalid_actions_repeat_by_their_text() -> None:
    env = started(5)
    assert [env.step(a).info["repeat"] for a in ("x", "y", "x", " x ", "0")] == [False, False, True, True, False]


def test_the_seed_settles_the_number() -> None:
    def hidden(seed: int) -> int:
        env = GuessNumber(high=32, max_turns=1)
        env.reset(seed)
        return int(env.step("").info["number"])

    assert [hidden(s) for s in range(40)] == [hidden(s) for s in range(40)]
    assert {hidden(s) for s in range(600)} == set(range(1, 33))


@pytest.mark.parametrize(
    ("high", "wanted"), [(1, 0.0), (2, -0.5), (3, -2 / 3), (7, -10 / 7), (8, -13 / 8), (15, -34 / 15), (32, -103 / 32)]
)
def test_bisection_return(high: int, wanted: float) -> None:
    """By hand: 3 numbers take 1, 2, 2 guesses, so 2 misses in 3 games; 32 take depths 1,2x2,4x3,8x4,16x5,1x6."""
    assert bisection_return(high) == pytest.approx(wanted, abs=1e-12)


def test_bisection_return_under_a_short_limit() -> None:
    """7 numbers, 2 turns: the middle costs 0, two cost 1, four are not found and cost 2."""
    assert bisection_return(7, max_turns=2) == pytest.approx(-10 / 7)
    assert bisection_return(15, max_turns=2) == pytest.approx(-(0 + 2 * 1 + 12 * 2) / 15)


@given(st.integers(1, 300), st.integers(1, 12))
def test_bisection_return_is_what_a_search_tree_gives(high: int, max_turns: int) -> None:
    def misses(low: int, top: int, depth: int) -> int:
        if low > top:
            return 0
        middle = (low + top) // 2
        return min(depth, max_turns) + misses(low, middle - 1, depth + 1) + misses(middle + 1, top, depth + 1)

    assert bisection_return(high, max_turns) == pytest.approx(-misses(1, high, 0) / high)


@given(st.lists(st.one_of(st.text(), st.integers(-2, 40).map(str)), min_size=20, max_size=20))
def test_any_text_is_answered(actions: list[str]) -> None:
    env = GuessNumber()
    env.reset(11)
    total = 0.0
    turns = 0
    for action in actions:
        result = env.step(action)
        turns += 1
        total += result.reward
        assert (result.text == " Invalid.\n") is (result.info["kind"] == "invalid")
        if result.terminated:
            break
    assert total == -(turns - 1 if result.info["won"] else 20)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"high": 0}, ValueError, "high: wanted at least 1, got 0"),
        ({"high": 3.0}, TypeError, "high: wanted an int, got 3.0"),
        ({"max_turns": True}, TypeError, "max_turns: wanted an int, got True"),
    ],
)
def test_bad_options(options: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GuessNumber(**options)


def test_bad_resets() -> None:
    env = GuessNumber()
    with pytest.raises(ValueError, match="number: wanted 1 to 32, got 33"):
        env.reset(0, {"number": 33})
    with pytest.raises(ValueError, match="did you mean 'number'"):
        env.reset(0, {"numbr": 3})
    with pytest.raises(TypeError, match="seed: wanted an int, got 'a'"):
        env.reset("a")  # type: ignore[arg-type]


def test_vocabulary_and_protocol() -> None:
    answers = [" Higher.\n", " Lower.\n", " Correct.\n", " Invalid.\n"]
    assert vocabulary(high=3) == ["Guess 1 to 3.\n", "1", "2", "3", *answers]
    env = GuessNumber(high=8, max_turns=4)
    assert isinstance(env, TextEnv)
    assert env.options == {"high": 8, "max_turns": 4}


# -- clone and resample_hidden -----------------------------------------------------------------------


def texts(env: GuessNumber, actions: list[str]) -> list[tuple[str, float, bool]]:
    """Up to the game's end."""
    said: list[tuple[str, float, bool]] = []
    for action in actions:
        if not (said and said[-1][2]):
            text, reward, over, _, _ = env.step(action)
            said.append((text, reward, over))
    return said


@given(
    number=st.integers(1, 9),
    actions=st.lists(st.sampled_from([*map(str, range(11)), "no", " 3\n"]), max_size=7),
    seed=st.integers(0, 1 << 40),
)
def test_a_resampled_number_would_have_given_the_same_answers(number: int, actions: list[str], seed: int) -> None:
    env = started(number, high=9, max_turns=8)
    actions = [action for action in actions if action.strip() != str(number)]
    said = texts(env, actions)
    consistent = {n for n in range(1, 10) if texts(started(n, high=9, max_turns=8), actions) == said}
    twin = env.clone()
    assert isinstance(twin, ResamplableEnv)
    found = set()
    for s in range(seed, seed + 60):
        twin.resample_hidden(s)
        found.add(twin._number)
    assert number in consistent and found <= consistent
    assert len(consistent) > 4 or found == consistent
    assert env._number == number, "the env that was cloned keeps its number"


def test_resampling_is_uniform_over_what_is_left() -> None:
    env = started(20)
    texts(env, ["10", "16", "24", "30", "x"])
    counts = dict.fromkeys(range(17, 24), 0)
    for seed in range(7000):
        env.resample_hidden(seed)
        counts[env._number] += 1
    assert all(abs(count - 1000) < 4 * (1000 * 6 / 7) ** 0.5 for count in counts.values()), counts


def test_a_clone_is_another_game_in_the_same_state() -> None:
    env = started(20)
    env.step("16")
    twin = env.clone()
    assert twin.step("16").info["repeat"] and twin.step("20").text == " Correct.\n"
    assert env.step("24") == (" Lower.\n", -1.0, False, False, {"won": False, "kind": "guess", "repeat": False})
    with pytest.raises(RuntimeError, match="resample_hidden: no game is on; call reset first"):
        twin.resample_hidden(0)
    fresh = GuessNumber().clone()
    with pytest.raises(RuntimeError, match="call reset first"):
        fresh.step("1")
    with pytest.raises(TypeError, match="seed: wanted an int"):
        env.resample_hidden("x")  # type: ignore[arg-type]
