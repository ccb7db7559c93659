"""The coin collector: texts, rewards, ends, players, and a Java process that dies, hangs or is not there.

Tests of the real package take about 20 s together and run where it and Java are: `make test` installs the package.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from archer_fast.envs import get, play_scripted
from archer_fast.envs import textworld_express_java as java
from archer_fast.envs.base import TextEnv
from archer_fast.envs.textworld_express import TextWorldExpress, vocabulary
from archer_fast.envs.textworld_express_players import ExpertPlayer
from archer_fast.envs.textworld_express_texts import DIRECTIONS, ROOMS, Room, brief, brief_texts, kind_of, read_room
from archer_fast.rollout.interact import FinishedAction, play_games

try:
    java.java_path()
    _MISSING = ""
except FileNotFoundError as error:
    _MISSING = f"{error}; `make test` installs the package, and runs this where Java is"
real = pytest.mark.skipif(bool(_MISSING), reason=_MISSING)

# As textworld-express 1.1.0 said it.
PANTRY = (
    "You are in the pantry. In one part of the room you see a folding chair, that has nothing on it. There is also "
    "a shelf that has a white onion on it. \nThrough an open frosted-glass door, to the East you see the kitchen. "
)
LAUNDRY_ROOM = (
    "You are in the laundry room. In one part of the room you see a bench, that has nothing on it. There is also a "
    "work table, that has nothing on it. You also see a clothes drier that is closed. There is also a coin. \n"
    "To the North you see a closed wood door. To the South you see the driveway. Through an open screen door, to the "
    "West you see the living room. "
)
EMPTY = "Inventory: \n  Your inventory is currently empty.\n"
UNKNOWN = "Unknown action: I'm not sure what you mean."
NO_EXIT = "You are in the kitchen. In one part of the room you see a stove. There is also a coin. "


def test_rooms_are_read_from_what_the_package_says() -> None:
    assert read_room(PANTRY) == Room("pantry", ("east",), (), False)
    assert read_room(LAUNDRY_ROOM) == Room("laundry room", ("south", "west"), ("north",), True)
    assert read_room(NO_EXIT) == Room("kitchen", (), (), True)
    for text in ("", "You take the coin.", EMPTY, UNKNOWN, "You open the screen door, revealing the corridor. "):
        assert read_room(text) is None


@pytest.mark.parametrize(
    ("action", "observation", "look", "line", "kind"),
    [
        ("move south", LAUNDRY_ROOM, LAUNDRY_ROOM, " Laundry room: south west. Shut north. Coin!\n", "move"),
        ("look around", PANTRY, PANTRY, " Pantry: east.\n", "look"),
        ("look around", NO_EXIT, NO_EXIT, " Kitchen: Coin!\n", "look"),
        ("open door to east", "You open the frosted-glass door, revealing the kitchen. ", PANTRY, " Pantry: east.\n",
         "open"),
        ("close door to east", "You close the plain door. ", NO_EXIT, " Kitchen: Coin!\n", "close"),
        ("take coin", "You take the coin.", PANTRY, " Taken.\n", "take"),
        ("dance", UNKNOWN, PANTRY, " Invalid.\n", "invalid"),
        ("", UNKNOWN, PANTRY, " Invalid.\n", "invalid"),
        ("move east", "You can't move there, the door is closed. ", PANTRY, " Closed.\n", "blocked"),
        ("open door to east", "That is already open. ", PANTRY, " Already open.\n", "blocked"),
        ("close door to east", "That is already closed. ", PANTRY, " Already closed.\n", "blocked"),
        ("inventory", EMPTY, PANTRY, " Carrying nothing.\n", "inventory"),
        ("move east", "The floor\n gives way. ", PANTRY, " The floor gives way.\n", "move"),
    ],
)  # fmt: skip
def test_brief_lines_and_kinds(action: str, observation: str, look: str, line: str, kind: str) -> None:
    assert brief(observation, look, EMPTY) == line
    assert kind_of(action, observation) == kind


def test_a_full_inventory_in_brief() -> None:
    carried = "Inventory: \n  a white onion\n  a coin\n"
    assert brief(carried, PANTRY, carried) == " Carrying a white onion, a coin.\n"


def test_every_brief_room_reads_back() -> None:
    lines = set(brief_texts())
    for name, exits, coin in product(ROOMS, product(("", "open", "shut"), repeat=4), (False, True)):
        ways = {how: tuple(d for d, is_ in zip(DIRECTIONS, exits, strict=True) if is_ == how) for how in exits}
        room = Room(name, ways.get("open", ()), ways.get("shut", ()), coin)
        assert read_room(room.brief) == read_room("Find the coin.\n" + room.brief) == room
        assert room.brief in lines


def test_the_expert_by_hand() -> None:
    """Three rooms in a row, all of them seen from the texts: down, back over the start, up."""
    player = ExpertPlayer()
    player.reset(0, {})
    script = [
        ("Find the coin.\n Kitchen: north. Shut south.\n", "move north"),
        (" Pantry: south.\n", "move south"),
        (" Kitchen: north. Shut south.\n", "open door to south"),
        (" Kitchen: north south.\n", "move south"),
        (" Backyard: north. Coin!\n", "take coin"),
    ]
    assert [player.act(text) for text, _ in script] == [action for _, action in script]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java.java_path.cache_clear()
    monkeypatch.setattr(java, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"^task textworld-express: .*; pip install 'archer-fast\[envs\]'$"):
        get("textworld-express").make_env()
    monkeypatch.setattr(java, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"^task textworld-express: no `java` in .*; install Java 8 or newer .*"
    ):
        TextWorldExpress()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "java").touch(mode=0o755)
    assert java.java_path() == str(tmp_path / "bin" / "java")
    java.java_path.cache_clear()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_locations": 12}, ValueError, "num_locations: wanted 1 to 11, got 12"),
        ({"num_locations": True}, TypeError, "num_locations: wanted an int, got True"),
        ({"num_distractors": 11}, ValueError, "num_distractors: wanted 0 to 10, got 11"),
        ({"doors": 1}, TypeError, "doors: wanted a bool, got 1"),
        ({"split": "tran"}, ValueError, "unknown split 'tran'; did you mean 'train'"),
        ({"max_turns": 0}, ValueError, "max_turns: wanted at least 1, got 0"),
        ({"observation": "short"}, ValueError, r"unknown observation 'short' \(accepted: brief, full\)"),
        ({"reward_scale": "2"}, TypeError, "reward_scale: wanted a number, got '2'"),
        ({"turn_penalty": float("nan")}, ValueError, "turn_penalty: wanted a finite number, got nan"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TextWorldExpress(**options)


# -- the real package ---------------------------------------------------------------------------------


@real
def test_a_game_by_hand() -> None:
    env = TextWorldExpress(num_locations=5)
    assert isinstance(env, TextEnv)
    assert env.reset(0, {"variation": 3}) == "Find the coin.\n Kitchen: Shut south west.\n"
    steps = [
        ("move south", " Closed.\n", "blocked", False),
        (" open door to south\n", " Kitchen: south. Shut west.\n", "open", False),
        ("open door to south", " Already open.\n", "blocked", False),
        ("open door to south", " Already open.\n", "blocked", True),
        ("look around", " Kitchen: south. Shut west.\n", "look", False),
        ("move south", " Backyard: north. Shut east.\n", "move", False),
        ("take coin", " Invalid.\n", "invalid", False),
        ("take coin", " Invalid.\n", "invalid", True),
        ("open door to east", " Backyard: north east.\n", "open", False),
        ("inventory", " Carrying nothing.\n", "inventory", False),
        ("\x00move east\x1f", " Corridor: west. Shut north. Coin!\n", "move", False),
    ]
    for action, text, kind, repeat in steps:
        assert env.step(action) == (text, 0.0, False, False, {"won": False, "kind": kind, "repeat": repeat})
    info = {"won": True, "kind": "take", "repeat": False, "variation": 3}
    assert env.step("take coin") == (" Taken.\n", 1.0, True, False, info)
    with pytest.raises(RuntimeError, match="call reset first"):
        env.step("look around")


@real
def test_the_limit_truncates_and_the_coin_beats_it() -> None:
    env = TextWorldExpress(num_locations=5, max_turns=5, reward_scale=10, turn_penalty=0.25)
    env.reset(0, {"variation": 3})
    way = ["open door to south", "move south", "open door to east", "move east"]
    results = [env.step(action) for action in [*way, "look around"]]
    assert [tuple(r[1:4]) for r in results] == [(-0.25, False, False)] * 4 + [(-0.25, False, True)]
    assert results[-1].info == {"won": False, "kind": "look", "repeat": False, "variation": 3}
    env.reset(0, {"variation": 3})
    results = [env.step(action) for action in [*way, "take coin"]]
    assert tuple(results[-1][1:4]) == (9.75, True, False)


@real
def test_full_texts_and_listed_actions() -> None:
    env = TextWorldExpress(num_locations=5, observation="full", list_actions=True, num_distractors=2)
    first = env.reset(0, {"variation": 3})
    assert first.startswith("Your task is to search the environment and find the coin.")
    assert "\nYou are in the kitchen. " in first
    assert first.endswith(
        "To the West you see a closed frosted-glass door.\nActions: close door to south, close door to west, "
        "inventory, look around, move south, move west, open door to south, open door to west.\n> "
    )
    text = env.step("open door to south").text
    assert text.startswith("\nYou open the sliding patio door, revealing the backyard.\nActions: ")
    listing = TextWorldExpress(num_locations=1, list_actions=True)
    assert listing.reset(0) == "Find the coin.\n Kitchen: Coin!\nActions: inventory, look around, take coin.\n"


@real
@pytest.mark.parametrize("options", [{}, {"num_distractors": 10, "doors": False}, {"num_locations": 3}])
def test_brief_says_what_full_says(options: dict[str, Any]) -> None:
    """The same actions in both: each room line is the room of the package's own text."""
    spec = get("textworld-express")
    for seed in range(20):
        env = spec.make_env(observation="full", **options)
        game = play_scripted(spec.make_env(**options), spec.make_player("random"), seed)
        texts = [env.reset(seed), *(env.step(action).text for action in game.actions)]
        for said, line in zip(texts, [*game.observations, game.final_observation], strict=True):
            assert read_room(said) in (None, read_room(line))
            assert (read_room(line) is None) == (("Carrying" in line) or ("Taken" in line))


@real
def test_the_seed_settles_the_game_whatever_else_is_played() -> None:
    spec = get("textworld-express")
    alone = [play_scripted(spec.make_env(), spec.make_player("random"), seed) for seed in range(40)]
    envs = [spec.make_env() for _ in alone]
    texts = [[env.reset(seed)] for seed, env in enumerate(envs)]
    for turn in range(50):
        for env, game, said in zip(envs, alone, texts, strict=True):
            if turn < len(game.actions):
                said.append(env.step(game.actions[turn]).text)
    assert texts == [[*game.observations, game.final_observation] for game in alone]
    assert len({game.observations[0] for game in alone}) > 10


@real
def test_splits_are_variations_of_their_own() -> None:
    def variations(split: str, seeds: range) -> set[int]:
        env = TextWorldExpress(num_locations=1, split=split, max_turns=1)
        played = []
        for seed in seeds:
            env.reset(seed)
            played.append(int(env.step("").info["variation"]))
        return set(played)

    assert variations("train", range(5000)) >= set(range(0, 1000, 50))
    for split, first in (("train", 0), ("dev", 10_000), ("test", 20_000)):
        drawn = variations(split, range(500))
        assert first <= min(drawn) and max(drawn) < first + 1000 and len(drawn) > 350


@real
@given(st.lists(st.one_of(st.text(), st.sampled_from(["\ud800", "take coin\r", "!p\n", "x" * 9999])), max_size=5))
def test_any_text_is_answered(actions: list[str]) -> None:
    env = TextWorldExpress(num_locations=5)
    env.reset(0, {"variation": 3})  # the coin is three rooms away
    for action in actions:
        result = env.step(action)
        assert result.text and not result.terminated
        assert (result.text == " Invalid.\n") is (result.info["kind"] == "invalid")


@real
def test_a_clone_goes_its_own_way() -> None:
    env = TextWorldExpress(num_locations=5, max_turns=8)
    env.reset(0, {"variation": 3})
    for action in ("open door to south", "move south", "look around"):
        env.step(action)
    twin = env.clone()
    assert twin.options == env.options
    assert twin.step("look around") == env.step("look around")
    assert twin.step("look around").info["repeat"]
    assert twin.step("move north").text == " Kitchen: south. Shut west.\n"
    assert env.step("open door to east").text == " Backyard: north east.\n"
    assert env.step("move east").text == " Corridor: west. Shut north. Coin!\n"
    assert twin.step("look around").text == " Kitchen: south. Shut west.\n"
    assert twin.step("look around").truncated
    assert env.step("take coin").terminated
    with pytest.raises(RuntimeError, match="call reset first"):
        TextWorldExpress().clone().step("look around")


@real
@pytest.mark.parametrize("options", [{}, {"num_locations": 5, "doors": False}, {"num_locations": 8, "split": "test"}])
def test_players_speak_only_the_vocabulary(options: dict[str, Any]) -> None:
    words = vocabulary(**options)
    spec = get("textworld-express")
    heard = set()
    for player in spec.players:
        for seed in range(100):
            game = play_scripted(spec.make_env(**options), spec.make_player(player), seed)
            assert set(game.actions) <= set(words)
            assert not any(info["kind"] == "invalid" for info in game.infos)
            heard.update(game.observations[1:], [game.final_observation, game.observations[0].partition("\n")[2]])
    assert heard <= set(words)
    if not options:
        assert {read_room(text).name for text in heard if read_room(text)} == set(ROOMS)  # type: ignore[union-attr]


@real
def test_the_vocabulary_of_full_texts_is_the_games_own() -> None:
    words = vocabulary(observation="full", num_locations=3)
    assert words == vocabulary(observation="full", num_locations=3)
    assert any("\nYou open the plain door, revealing the pantry.\n> " in text for text in words)


@real
@pytest.mark.parametrize(
    ("player", "num_locations", "low", "high"),
    [
        ("random", 3, 0.90, 1.00),
        ("random", 11, 0.29, 0.50),
        ("mediocre", 5, 0.70, 0.88),
        ("mediocre", 11, 0.35, 0.57),
        ("expert", 3, 1.0, 1.0),
        ("expert", 11, 1.0, 1.0),
    ],
)
def test_strength(player: str, num_locations: int, low: float, high: float) -> None:
    """200 games, returns are 0 or 1; the bands are three standard errors around 2,000-game means."""
    spec = get("textworld-express")
    env = spec.make_env(num_locations=num_locations)
    played = [play_scripted(env, spec.make_player(player), seed) for seed in range(200)]
    assert all(game.rewards[:-1] == [0.0] * (len(game.rewards) - 1) for game in played)
    assert all(game.terminated == (game.episode_return == 1.0) == (not game.truncated) for game in played)
    assert low <= np.mean([game.episode_return for game in played]) <= high


@real
def test_the_expert_reads_full_texts_as_well() -> None:
    spec = get("textworld-express")
    for seed in range(20):
        both = [
            play_scripted(spec.make_env(observation=form), spec.make_player("expert"), seed).actions
            for form in ("brief", "full")
        ]
        assert both[0] == both[1]


# -- the Java process ---------------------------------------------------------------------------------


@pytest.fixture
def own_java(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Java process of the test's own: it is going to be hurt."""
    monkeypatch.setattr(java, "_server", None)
    yield
    if java._server is not None:
        java._server.close()


def java_process() -> int:
    assert java._server is not None
    return int(java._server._process.pid)


@real
def test_one_java_process_for_all_games_and_its_objects_are_used_again(own_java: None) -> None:
    envs = [TextWorldExpress(num_locations=3) for _ in range(12)]
    for seed, env in enumerate(envs):
        env.reset(seed)
    process = java_process()
    assert len({env._game._interface._target_id for env in envs if env._game is not None}) == 12
    envs[0].close()
    del envs[1]  # dropped in the middle of a game
    assert java._server is not None
    (free,) = java._server._free.values()
    assert len(free) == 2
    envs[0].reset(3)
    envs[1].reset(4)  # its own object is given back once the new game has another
    assert len(free) == 1 and java_process() == process


@real
def test_games_go_on_where_the_idle_java_process_died(own_java: None) -> None:
    spec = get("textworld-express")
    wanted = [play_scripted(spec.make_env(), spec.make_player("random"), seed) for seed in range(6)]
    envs = [spec.make_env() for _ in wanted]
    for seed, env in enumerate(envs):
        env.reset(seed)
    for turn in range(max(len(game.actions) for game in wanted)):
        if turn in (1, 4):
            os.kill(java_process(), signal.SIGKILL)
            while java._server is not None and java._server.alive():
                time.sleep(0.01)
        for env, game in zip(envs, wanted, strict=True):
            if turn < len(game.actions):
                following = [*game.observations[1:], game.final_observation][turn]
                assert env.step(game.actions[turn]).text == following


def stop(process: int) -> None:
    """SIGSTOP, and wait until it has stopped: on a busy machine that takes a while."""
    os.kill(process, signal.SIGSTOP)
    while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)


@real
def test_a_java_process_that_dies_in_a_call(own_java: None) -> None:
    env, other = TextWorldExpress(num_locations=3), TextWorldExpress(num_locations=3)
    env.reset(0), other.reset(1)
    process = java_process()
    stop(process)
    threading.Timer(0.3, os.kill, (process, signal.SIGKILL)).start()
    with pytest.raises(RuntimeError, match=r"^textworld-express: the Java process died \(exit status -9\)"):
        env.step("look around")
    assert "\n" not in other.step("look around").text.strip()  # played again in a new process
    assert java_process() != process
    assert env.reset(0).startswith("Find the coin.\n Kitchen:")


@real
def test_a_java_process_that_hangs_is_ended(own_java: None, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = java.ANSWER_TIME_LIMIT
    env = TextWorldExpress(num_locations=3)
    env.reset(0)
    process = java_process()
    stop(process)
    monkeypatch.setattr(java, "ANSWER_TIME_LIMIT", 0.5)
    with pytest.raises(RuntimeError, match=r"^textworld-express: the Java process gave no answer .*during this game$"):
        env.step("look around")
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    monkeypatch.setattr(java, "ANSWER_TIME_LIMIT", usual)  # half a second is little for a new one on a busy machine
    assert env.reset(0).startswith("Find the coin.\n")


class _Looker:
    """An engine that says one token, "look around", in every game; `harm` runs before its fifth step."""

    num_slots, max_new_tokens, stop_token_id = 4, 2, 0

    def __init__(self, harm: Any) -> None:
        self._playing: dict[int, int] = {}
        self._steps = 0
        self._harm = harm

    def begin(self, slot: int) -> None:
        self._playing[slot] = 0

    def observe(self, slot: int, observation_ids: Any) -> None:
        pass

    def room(self, slot: int) -> int:
        return 100

    def release(self, slot: int) -> None:
        self._playing.pop(slot, None)

    def step(self) -> list[FinishedAction]:
        self._steps += 1
        if self._steps == 5:
            self._harm()
        slot = min(self._playing, key=lambda slot: self._playing[slot])
        self._playing[slot] += 1
        return [FinishedAction(slot, np.array([7, 0], np.int32), np.zeros(2, np.float32))]


@real
def test_a_rollout_loses_the_game_in_whose_call_java_died_and_no_other(own_java: None) -> None:
    def harm() -> None:
        stop(java_process())
        threading.Timer(0.3, os.kill, (java_process(), signal.SIGKILL)).start()

    rollout = play_games(
        _Looker(harm),
        lambda: TextWorldExpress(num_locations=3, max_turns=4),
        lambda text: [1] * bool(text),
        lambda ids: "look around",
        range(10),
        max_dropped_share=0.2,
    )
    assert rollout.num_dropped == 1 and len(rollout.trajectories) == 9
    (cause,) = rollout.drop_causes
    assert "TextWorldExpress.step raised RuntimeError: textworld-express: the Java process died" in cause
    assert all(game.num_turns == 4 and game.truncated for game in rollout.trajectories)


_PROGRAM = """
import os, signal, sys
from archer_fast.envs import make_env, textworld_express_java as java
env = make_env("textworld-express", num_locations=3)
env.reset(0)
print(java._server._process.pid, flush=True)
if sys.argv[1] == "fork":
    child = os.fork()
    if child == 0:
        env.step("look around")
        print(java._server._process.pid, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    env.step("look around")
    print(java._server._process.pid, flush=True)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def _run(how: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, how], capture_output=True, text=True, timeout=60)
    assert done.returncode == (-9 if how == "kill" else 0) and "Error" not in done.stderr, done.stderr
    return [int(line) for line in done.stdout.split()]


@real
@pytest.mark.parametrize("how", ["return", "kill"])
def test_java_ends_with_python(how: str) -> None:
    (process,) = _run(how)
    deadline = time.monotonic() + 20
    while _running(process):
        assert time.monotonic() < deadline, f"{process} still runs"
        time.sleep(0.05)


@real
def test_a_forked_process_has_a_java_process_of_its_own() -> None:
    mine, childs, mine_after = _run("fork")
    assert mine == mine_after != childs


def _running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@real
@pytest.mark.slow
def test_a_run_end_to_end(tmp_path: Path) -> None:
    """The command itself, its Java process, and its end."""
    command = [sys.executable, "-c", "from archer_fast.cli import main; main()", "train"]
    command += ["--task.name", "textworld-express", "--task.options", "num_locations=5"]
    command += ["--iterations", "2", "--out", str(tmp_path / "run"), "--rollout.games", "16"]
    command += [
        "--warm-start.games",
        "200",
        "--warm-start.steps",
        "40",
        "--eval.games",
        "8",
        "--eval.final-games",
        "16",
    ]
    environment = {**os.environ, "ARCHER_FAST_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "return" in row]
    assert [row["games"] for row in rows] == [16, 32]
    assert all(0.0 <= row["return"] <= 1.0 and row["dropped_games"] == 0 for row in rows)
