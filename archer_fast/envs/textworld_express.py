"""textworld-express's coin collector: the env of searching a house for a coin, rewarded when it is taken.

The game is the package's (Jansen and Côté, 2022, arXiv 2208.01174): `pip install 'archer-fast[envs]'`, and Java 8 or
newer. Nothing of it is imported or started before the first game.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from archer_fast.envs.base import StepResult
from archer_fast.envs.checks import check_count, check_seed, unknown
from archer_fast.envs.players import play_scripted
from archer_fast.envs.task_spec import TaskSpec
from archer_fast.envs.textworld_express_java import JavaGame, java_path
from archer_fast.envs.textworld_express_players import ExpertPlayer, MediocrePlayer, RandomPlayer
from archer_fast.envs.textworld_express_texts import COMMANDS, OPENING, brief, brief_texts, commands, kind_of

Observation = Literal["brief", "full"]
_FIRST_VARIATION = {"train": 0, "dev": 10_000, "test": 20_000}  # the package's folds, 1,000 variations each
_VARIATIONS = 1000
_MAX_LOCATIONS, _MAX_DISTRACTORS = 11, 10
_TRIMMED = "".join(map(chr, range(33)))  # what Java's trim takes off an action's ends


class TextWorldExpress:
    """Find the coin in a house of `num_locations` rooms: the change of the package's score, so 1 for taking it, else 0.

    The seed draws one of the split's 1,000 variations. A small house has few maps (3 rooms: 36), which splits share.

    `doors`: some exits are closed doors. `num_distractors`: other things that can be taken, to no effect.
    `observation`: "brief" is one line, the room, its exits and the coin (`texts.brief` says what it leaves out), so
    that 50 turns fit the tiny model's window of 512 tokens; "full" is the package's text, about 90 tokens a room.
    `list_actions`: a line with what the game accepts follows each text.
    Reward: `reward_scale` x change of score - `turn_penalty`, every turn.

    Turn `max_turns` truncates. The package's own limit is a setting of its Python class: neither the task's text nor
    any answer tells of time, and the game would go on. Only the coin terminates.

    >>> env = TextWorldExpress(num_locations=5)
    >>> env.reset(seed=0, options={"variation": 3})
    'Find the coin.\\n Kitchen: Shut south west.\\n'
    >>> env.step("open door to south").text, env.step("move south").text, env.step("dance").text
    (' Kitchen: south. Shut west.\\n', ' Backyard: north. Shut east.\\n', ' Invalid.\\n')
    """

    name: ClassVar[str] = "textworld-express"
    step_time_limit: float | None = 60.0  # seconds; the first call starts Java, a usual one takes 50 microseconds

    def __init__(
        self,
        num_locations: int = _MAX_LOCATIONS,
        num_distractors: int = 0,
        doors: bool = True,
        split: str = "train",
        max_turns: int = 50,
        observation: Observation = "brief",
        list_actions: bool = False,
        reward_scale: float = 1.0,
        turn_penalty: float = 0.0,
    ) -> None:
        self._options = {
            "num_locations": _check_range("num_locations", num_locations, 1, _MAX_LOCATIONS),
            "num_distractors": _check_range("num_distractors", num_distractors, 0, _MAX_DISTRACTORS),
            "doors": _check_bool("doors", doors),
            "split": _check_choice("split", split, list(_FIRST_VARIATION)),
            "max_turns": check_count("max_turns", max_turns),
            "observation": _check_choice("observation", observation, get_args(Observation)),
            "list_actions": _check_bool("list_actions", list_actions),
            "reward_scale": _check_number("reward_scale", reward_scale),
            "turn_penalty": _check_number("turn_penalty", turn_penalty),
        }
        self.max_turns = max_turns
        self._params = (
            f"numLocations={num_locations},numDistractorItems={num_distractors},"
            f"includeDoors={int(doors)},limitInventorySize=0"
        )
        self._brief = observation == "brief"
        self._game: JavaGame | None = None
        java_path()  # what is missing is said here, before anything is made

    @property
    def options(self) -> dict[str, Any]:
        """The keywords that make this env again."""
        return dict(self._options)

    def reset(self, seed: int, options: Mapping[str, Any] | None = None) -> str:
        """Begin a variation of the split drawn by `seed`, or `options["variation"]`, any of the package's."""
        split = self._options["split"]
        variation = _FIRST_VARIATION[split] + random.Random(check_seed(seed)).randrange(_VARIATIONS)
        for key, value in (options or {}).items():
            if key != "variation":
                raise unknown("reset option of textworld-express", key, ["variation"])
            variation = _check_range("variation", value, 0, 2**31 - 1)
        self.close()
        self._game = JavaGame("coin", self._params, variation, split)
        self._variation = variation
        self._turn = 0
        self._done: set[tuple[str, str, str]] = set()
        if self._brief:
            return OPENING + self._text()
        return f"{self._game.task()} {COMMANDS}\n{self._text()}"

    def step(self, action: str) -> StepResult:
        """Do it. info: kind (`texts.kind_of`), repeat (the same action in the same state), won; variation at the end.

        Errors: RuntimeError in one line if the Java process dies or hangs during the call; later games start another.
        """
        if self._game is None:
            raise RuntimeError("step: no game is on; call reset first")
        before = self._game.state
        state = self._game.step(action)
        self._turn += 1
        action = action.strip(_TRIMMED)
        done = (before.look, before.inventory, action)
        kind = kind_of(action, state.observation)
        info: dict[str, Any] = {"won": state.won, "kind": kind, "repeat": done in self._done}
        self._done.add(done)
        reward = self._options["reward_scale"] * (state.score - before.score) - self._options["turn_penalty"]
        text = self._text()
        terminated = state.won or state.lost
        truncated = not terminated and self._turn == self.max_turns
        if terminated or truncated:
            info["variation"] = self._variation
            self.close()
        return StepResult(text, reward, terminated, truncated, info)

    def clone(self) -> TextWorldExpress:
        """A second env in the same state: its actions are played again, 50 microseconds each.

        There is no `resample_hidden`: what is hidden is the map beyond the rooms seen, and the package has no way to
        draw another map that agrees with them.
        """
        twin = TextWorldExpress(**self._options)
        if self._game is not None:
            twin._game = self._game.copy()
            twin._variation, twin._turn, twin._done = self._variation, self._turn, set(self._done)
        return twin

    def close(self) -> None:
        """End the game that is on, if any; the Java process stays for others, and ends with this process."""
        if self._game is not None:
            self._game.close()
            self._game = None

    def _text(self) -> str:
        assert self._game is not None
        state = self._game.state
        listed = f"Actions: {', '.join(state.actions)}.\n" if self._options["list_actions"] else ""
        if self._brief:
            return brief(state.observation, state.look, state.inventory) + listed
        return f"\n{state.observation.strip()}\n{listed}> "


def _check_range(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: wanted an int, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: wanted {low} to {high}, got {value}")
    return value


def _check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: wanted a bool, got {value!r}")
    return value


def _check_choice(name: str, value: object, accepted: Any) -> Any:
    if value not in accepted:
        raise unknown(name, value, accepted)
    return value


def _check_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: wanted a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: wanted a finite number, got {value}")
    return float(value)


def vocabulary(**options: Any) -> list[str]:
    """Every text the env or an agent needs: all brief lines; for other texts those of 40 games of the random player."""
    texts = [OPENING, *commands(), *brief_texts()]
    env = TextWorldExpress(**options)
    if env.options["observation"] == "full" or env.options["list_actions"]:
        for seed in range(40):
            game = play_scripted(env, RandomPlayer(), seed)
            texts += [*game.observations, game.final_observation]
    return texts


TASK = TaskSpec(
    name=TextWorldExpress.name,
    summary="find the coin in a house of up to 11 rooms (textworld-express, extra `envs`, Java)",
    env_factory=TextWorldExpress,
    players={"random": RandomPlayer, "mediocre": MediocrePlayer, "expert": ExpertPlayer},
    default_player="mediocre",
    reference_player="expert",
    vocabulary=vocabulary,
)
