"""play_games with scripted engines and misbehaving environments: order, truncation, faults, time limits."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from archer_fast.envs.base import StepResult, TextEnv
from archer_fast.rollout.interact import (
    FinishedAction,
    Opening,
    Rollout,
    TooManyDroppedGames,
    continue_games,
    play_games,
)
from archer_fast.trajectory import Trajectory

STOP = 0


def encode(text: str) -> list[int]:
    """One token a letter; a space has none, so that a text may encode to nothing."""
    return [ord(c) for c in text if c != " "]


def decode(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


class Parrot:
    """An engine without a model: each action is `say` and the stop token, two steps after the observation."""

    stop_token_id = STOP

    def __init__(self, num_slots: int = 3, say: str = "x?", max_new_tokens: int = 5, window: int = 1000) -> None:
        self.num_slots, self.max_new_tokens, self.window = num_slots, max_new_tokens, window
        self.action = np.array([*map(ord, say), STOP][:max_new_tokens], np.int32)
        self.streams: list[list[int]] = [[] for _ in range(num_slots)]
        self.waits = [0] * num_slots  # steps until the action is finished; 0: nothing to answer
        self.calls: list[tuple[str, int]] = []

    def begin(self, slot: int) -> None:
        self.calls.append(("begin", slot))
        self.streams[slot], self.waits[slot] = [], 0

    def release(self, slot: int) -> None:
        self.calls.append(("release", slot))
        self.streams[slot], self.waits[slot] = [], 0

    def observe(self, slot: int, observation_ids: Sequence[int]) -> None:
        self.calls.append(("observe", slot))
        self.streams[slot] += observation_ids
        self.waits[slot] = 2

    def room(self, slot: int) -> int:
        return self.window - len(self.streams[slot])

    def step(self) -> list[FinishedAction]:
        finished = []
        for slot, wait in enumerate(self.waits):
            if wait:
                self.waits[slot] -= 1
            if wait == 1:
                self.streams[slot] += self.action.tolist()
                finished.append(FinishedAction(slot, self.action, -np.arange(self.action.size, dtype=np.float32)))
        return finished


class Game:
    """Lasts `seed % 4 + 1` turns and says its seed and turn: "<3.0" first, then "<3.1", ..., "over"."""

    name: ClassVar[str] = "game"
    max_turns = 4
    step_time_limit: float | None = None

    def reset(self, seed: int, options: Mapping[str, Any] | None = None) -> str:
        self.seed, self.options, self.turn = seed, options, 0
        self.actions: list[str] = []
        return f"<{seed}.0"

    def step(self, action: str) -> Any:
        self.actions.append(action)
        self.turn += 1
        over = self.turn > self.seed % 4
        text = "over" if over else f"<{self.seed}.{self.turn}"
        return StepResult(text, 0.5 * self.turn, over, False, {"said": list(self.actions)})


def play(
    env: Callable[[], TextEnv] = Game, seeds: Sequence[int] = range(10), engine: Parrot | None = None, **options: Any
) -> Rollout:
    return play_games(engine or Parrot(), env, encode, decode, seeds, **options)


def text_of(game: Trajectory) -> str:
    return decode(game.input_ids).replace(chr(STOP), ";")


def test_games_come_in_the_order_of_their_seeds() -> None:
    finished: list[int] = []
    rollout = play(seeds=[7, 3, 0, 4, 1, 5], on_game=lambda game: finished.append(game.info["seed"]))
    assert [g.info["seed"] for g in rollout.trajectories] == [7, 3, 0, 4, 1, 5]
    assert finished == [0, 4, 7, 3, 1, 5]  # short games first, the waiting seeds in the freed slots
    assert (rollout.num_dropped, rollout.num_truncated_by_window) == (0, 0)


def test_a_game_is_recorded_whole() -> None:
    (game,) = play(seeds=[2], policy_version=11).trajectories
    assert text_of(game) == "<2.0x?;<2.1x?;<2.2x?;over"
    assert [decode(t.observation_ids) for t in game.turns] == ["<2.0", "<2.1", "<2.2"]
    assert [t.reward for t in game.turns] == [0.5, 1.0, 1.5]
    assert {t.policy_version for t in game.turns} == {11}
    for turn in game.turns:
        assert turn.action_ids.tolist() == [ord("x"), ord("?"), STOP]
        assert turn.rollout_logprobs.tolist() == [0, -1, -2]
    assert decode(game.final_observation_ids) == "over"
    assert game.terminated and not game.truncated
    assert game.info == {"said": ["x?"] * 3, "seed": 2, "kinds": {"turns": 3}}  # the stop token is not text


def test_an_action_cut_at_its_length_has_no_stop_token() -> None:
    (game,) = play(seeds=[0], engine=Parrot(say="abcdefg", max_new_tokens=4)).trajectories
    assert text_of(game) == "<0.0abcdover"
    assert game.info["said"] == ["abcd"]


def test_an_empty_action_is_the_empty_text() -> None:
    (game,) = play(seeds=[1], engine=Parrot(say="")).trajectories
    assert text_of(game) == "<1.0;<1.1;over"
    assert game.info["said"] == ["", ""]


def test_options_reach_the_env() -> None:
    made: list[Game] = []

    def make() -> Game:
        made.append(Game())
        return made[-1]

    play(make, [0, 1], env_options={"objects": 10})
    assert [env.options for env in made] == [{"objects": 10}] * 2


def test_more_slots_than_games_and_no_games() -> None:
    engine = Parrot(num_slots=8)
    assert len(play(seeds=[0, 1], engine=engine).trajectories) == 2
    assert {slot for call, slot in engine.calls if call == "begin"} == {0, 1}
    assert play(seeds=[]).trajectories == []


def test_slots_are_released() -> None:
    engine = Parrot()
    play(engine=engine)
    assert engine.streams == [[], [], []] and engine.waits == [0, 0, 0]


class Timed(Game):
    """Ends by its own time limit, or by both at once."""

    both = False

    def step(self, action: str) -> Any:
        text, reward, over, _, info = super().step(action)
        return StepResult(text, reward, over and self.both, over, info)


@pytest.mark.parametrize("both", [False, True])
def test_terminated_is_not_truncated(both: bool) -> None:
    env = type("Timed", (Timed,), {"both": both})
    (game,) = play(env, [1]).trajectories
    assert (game.terminated, game.truncated) == (both, not both)
    assert decode(game.final_observation_ids) == "over"


@pytest.mark.parametrize(
    ("window", "text", "counted"),
    [
        (30, "<3.0x?;<3.1x?;<3.2x?;<3.3x?;ov", 0),  # the task ended: what fits of its last words is kept
        (22, "<3.0x?;<3.1x?;<3.2", 1),  # another observation would fit, but not an action after it
        (11, "<3.0x?;<3.1", 1),
        (9, "<3.0x?;<3", 1),
    ],
)
def test_a_full_window_truncates(window: int, text: str, counted: int) -> None:
    # 4 + 3 tokens a turn; an action may take 5.
    rollout = play(seeds=[3], engine=Parrot(window=window))
    (game,) = rollout.trajectories
    assert text_of(game) == text
    assert rollout.num_truncated_by_window == counted
    assert game.truncated == bool(counted)


def test_behaviour_is_counted_by_kind() -> None:
    class Kinds(Game):
        def step(self, action: str) -> Any:
            result = super().step(action)
            return result._replace(info={"kind": "guess" if self.turn > 1 else "question", "repeat": self.turn > 2})

    (game,) = play(Kinds, [3]).trajectories
    assert game.info["kinds"] == {"turns": 4, "question": 1, "guess": 3, "repeat": 2}


def faulty(method: str, fault: Callable[[], Any]) -> type[Game]:
    """Seed 5 misbehaves: at reset, or at its second step."""

    def reset(self: Game, seed: int, options: Mapping[str, Any] | None = None) -> Any:
        text = Game.reset(self, seed, options)
        return fault() if method == "reset" and seed == 5 else text

    def step(self: Game, action: str) -> Any:
        result = Game.step(self, action)
        return fault() if method == "step" and self.seed == 5 and self.turn == 2 else result

    return type("Faulty", (Game,), {"reset": reset, "step": step})


def fail() -> Any:
    raise KeyError("no such object")


FAULTS: list[tuple[str, Callable[[], Any], str]] = [
    ("step", fail, "Faulty.step raised KeyError: 'no such object'"),
    ("step", lambda: None, "step: wanted (text, reward, terminated, truncated, info), got None"),
    ("step", lambda: ("a", 0.0, False), "step: wanted (text, reward, terminated, truncated, info), got ('a', 0.0, F"),
    ("step", lambda: (b"a", 0.0, False, False, {}), "step: wanted text of type str, got bytes"),
    ("step", lambda: (None, 0.0, True, False, {}), "step: wanted text of type str, got NoneType"),
    ("step", lambda: ("", 0.0, False, False, {}), "step: wanted an observation of at least one token, got ''"),
    ("step", lambda: ("  ", 0.0, False, False, {}), "step: wanted an observation of at least one token, got '  '"),
    ("step", lambda: ("a", math.nan, False, False, {}), "step: wanted a finite float32 reward, got nan"),
    ("step", lambda: ("a", -math.inf, True, False, {}), "step: wanted a finite float32 reward, got -inf"),
    ("step", lambda: ("a", 1e39, False, False, {}), "step: wanted a finite float32 reward, got 1e+39"),
    ("step", lambda: ("a", "lots", False, False, {}), "step: wanted a number for reward, got 'lots'"),
    ("step", lambda: ("a", None, False, False, {}), "step: wanted a number for reward, got None"),
    ("step", lambda: ("a", 0.0, False, False, "won"), "step: wanted a mapping for info, got str"),
    ("reset", fail, "Faulty.reset raised KeyError: 'no such object'"),
    ("reset", lambda: None, "reset: wanted text of type str, got NoneType"),
    ("reset", lambda: ("a", {}), "reset: wanted text of type str, got tuple"),
    ("reset", lambda: "", "reset: wanted an observation of at least one token, got ''"),
]


@pytest.mark.parametrize(("method", "fault", "cause"), FAULTS, ids=[cause[:40] for *_, cause in FAULTS])
def test_a_faulty_game_is_dropped_counted_and_named(
    caplog: pytest.LogCaptureFixture, method: str, fault: Callable[[], Any], cause: str
) -> None:
    with caplog.at_level(logging.WARNING, "archer_fast"):
        rollout = play(faulty(method, fault))
    assert [g.info["seed"] for g in rollout.trajectories] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert rollout.num_dropped == 1
    (found,) = rollout.drop_causes
    assert found.startswith(cause)
    assert [record.getMessage() for record in caplog.records] == [f"game with seed 5 dropped: {found}"]
    wanted = play(seeds=[0, 1, 2, 3, 4, 6, 7, 8, 9]).trajectories  # the others are none the worse
    assert [text_of(g) for g in rollout.trajectories] == [text_of(g) for g in wanted]


def test_info_may_be_none() -> None:
    (game,) = play(faulty("step", lambda: ("end", 0.0, True, False, None)), [5]).trajectories
    assert game.info == {"seed": 5, "kinds": {"turns": 2}}


def test_an_empty_last_observation_is_fine() -> None:
    (game,) = play(faulty("step", lambda: ("", 0.0, True, False, {})), [5]).trajectories
    assert game.final_observation_ids.size == 0


def test_too_many_faults_stop_the_rollout_with_the_cause() -> None:
    def broken(seed: int) -> bool:
        return seed >= 4

    class Broken(Game):
        def step(self, action: str) -> Any:
            return fail() if broken(self.seed) else super().step(action)

    assert play(Broken, max_dropped_share=0.6).num_dropped == 6  # at the share, not above it
    with pytest.raises(
        TooManyDroppedGames,
        match=r"6 of 10 games dropped, more than the allowed share of 0\.5; the last cause: Broken\.step raised Key",
    ):
        play(Broken, max_dropped_share=0.5)
    with pytest.raises(TooManyDroppedGames, match="1 of 10 games"):
        play(Broken, max_dropped_share=0.0)


def test_an_engine_can_play_on_after_a_stopped_rollout() -> None:
    engine = Parrot(num_slots=4)
    with pytest.raises(TooManyDroppedGames):
        play(faulty("reset", fail), [7, 3, 5, 3], engine, max_dropped_share=0.0)
    assert engine.waits == [2, 2, 0, 0]  # games were left behind
    (game,) = play(seeds=[1], engine=engine).trajectories
    assert text_of(game) == "<1.0x?;<1.1x?;over"


class Limited(Game):
    """May block, so it is called in a worker thread."""

    step_time_limit = 0.2
    threads: ClassVar[set[int]] = set()
    release = threading.Event()
    slow_seed = 5

    def step(self, action: str) -> Any:
        self.threads.add(threading.get_ident())
        if self.seed == self.slow_seed:
            self.release.wait(30)
        return super().step(action)


@pytest.fixture
def limited() -> Any:
    """A fresh Limited; whatever still hangs is let go at the end."""
    env = type("Limited", (Limited,), {"threads": set(), "release": threading.Event()})
    yield env
    env.release.set()


def test_a_hanging_game_is_dropped_after_its_time_limit(limited: type[Limited]) -> None:
    begin = time.monotonic()
    rollout = play(limited)
    assert 0.2 <= time.monotonic() - begin < 5
    assert [g.info["seed"] for g in rollout.trajectories] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert dict(rollout.drop_causes) == {"Limited.step exceeded its time limit of 0.2 s": 1}
    assert len(limited.threads) == 2  # one that hangs still, and its successor
    assert threading.get_ident() not in limited.threads


def test_a_late_answer_reaches_nobody(limited: type[Limited]) -> None:
    """The stuck call returns while other games go on: its result must not be taken for theirs."""

    class Later(limited):  # type: ignore[misc, valid-type]
        def step(self, action: str) -> Any:
            if self.seed != self.slow_seed:
                self.release.set()
                time.sleep(0.01)
            return super().step(action)

    rollout = play(Later, [5, 7, 6, 3], max_dropped_share=0.5)
    assert dict(rollout.drop_causes) == {"Later.step exceeded its time limit of 0.2 s": 1}
    texts = [text_of(g) for g in rollout.trajectories]
    assert texts == [text_of(g) for g in play(seeds=[7, 6, 3]).trajectories]


def test_one_worker_serves_all_games_and_passes_faults_on(limited: type[Limited]) -> None:
    limited.slow_seed = -1
    assert len(play(limited).trajectories) == 10
    assert len(limited.threads) == 1
    assert threading.get_ident() not in limited.threads

    class Raising(limited):  # type: ignore[misc, valid-type]
        def step(self, action: str) -> Any:
            return fail() if self.seed == 5 else super().step(action)

    assert dict(play(Raising).drop_causes) == {"Raising.step raised KeyError: 'no such object'": 1}


def test_an_env_without_a_limit_is_called_inline() -> None:
    threads = set()

    class Inline(Game):
        def step(self, action: str) -> Any:
            threads.add(threading.get_ident())
            return super().step(action)

    play(Inline)
    assert threads == {threading.get_ident()}


def test_ctrl_c_is_no_fault_of_the_env() -> None:
    def interrupt() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(faulty("step", interrupt))


# -- games in mid-air ----------------------------------------------------------------------------------


def opened(seed: int, turn: int) -> Opening:
    """`Game` as it is when turn `turn` is to be answered."""
    env = Game()
    said = env.reset(seed)
    for _ in range(turn):
        said += f"x?{chr(STOP)}" + env.step("x?").text
    return Opening(env, encode(said), 100 * seed + turn)


def test_a_continuation_is_the_rest_of_the_game() -> None:
    whole = {g.info["seed"]: g for g in play(seeds=range(8)).trajectories}
    openings = [opened(seed, turn) for seed, game in whole.items() for turn in range(game.num_turns)]
    finished: list[int] = []
    rollout = continue_games(
        Parrot(), openings, encode, decode, policy_version=3, on_game=lambda game: finished.append(game.info["seed"])
    )
    assert [g.info["seed"] for g in rollout.trajectories] == [opening.seed for opening in openings]
    assert sorted(finished) == sorted(opening.seed for opening in openings)
    for rest in rollout.trajectories:
        seed, turn = divmod(rest.info["seed"], 100)
        game = whole[seed]
        assert text_of(rest) == text_of(game)
        assert decode(rest.turns[0].observation_ids) == "".join(
            decode([*t.observation_ids, *t.action_ids]) for t in game.turns[:turn]
        ) + decode(game.turns[turn].observation_ids)
        assert [t.reward for t in rest.turns] == [t.reward for t in game.turns[turn:]]
        assert {t.policy_version for t in rest.turns} == {3}
        assert rest.info["kinds"] == {"turns": game.num_turns - turn}
        assert (rest.terminated, rest.info["said"]) == (True, game.info["said"])


def test_a_continuation_that_fails_or_does_not_fit_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    openings = [opened(3, 0), opened(3, 3), opened(2, 0)]
    openings[2].env.step = fail  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, "archer_fast"):
        rollout = continue_games(Parrot(window=24), openings, encode, decode, max_dropped_share=0.7)
    assert [text_of(game) for game in rollout.trajectories] == ["<3.0x?;<3.1x?;<3.2x?;<3."]
    assert rollout.num_dropped == 2 and rollout.num_truncated_by_window == 1
    assert {record.getMessage().partition(" dropped: ")[0] for record in caplog.records} == {
        "game with seed 303",
        "game with seed 200",
    }
    with pytest.raises(TooManyDroppedGames, match="1 of 1 games"):
        continue_games(Parrot(window=24), openings[1:2], encode, decode)
    assert continue_games(Parrot(), [], encode, decode).trajectories == []


def test_every_call_into_engine_and_env_is_told_before_it_begins() -> None:
    told: list[str] = []
    play_games(Parrot(num_slots=1), Game, encode, decode, [0, 1], on_call=told.append)
    step, reset = "Parrot.step", "Game.reset (seed {})".format
    game = "Game.step (seed {})".format
    first = [reset(0), step, step, game(0)]
    assert told == [*first, reset(1), step, step, game(1), step, step, game(1)]
