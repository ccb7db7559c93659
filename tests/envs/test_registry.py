"""The registry: names, typos, options, and tasks of other packages."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from archer_fast.envs import TaskSpec, get, make_env, names, register
from archer_fast.envs import registry as registry_module
from archer_fast.envs.guess_number import TASK, GuessNumber
from archer_fast.envs.twenty_questions import TwentyQuestions

PLUGIN = """
import dataclasses
from archer_fast.envs.guess_number import TASK as base
TASK = dataclasses.replace(base, name="far-away-number", summary="from another package")
NO_TASK = 3
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package as pip leaves it: a module and a dist-info folder on sys.path."""
    (tmp_path / "far_away.py").write_text(PLUGIN)
    info = tmp_path / "far_away-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: far-away\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield info / "entry_points.txt"
    sys.modules.pop("far_away", None)
    importlib.invalidate_caches()


def declare(entry_points: Path, *lines: str) -> None:
    entry_points.write_text("\n".join(["[archer_fast.envs]", *lines]) + "\n")
    importlib.invalidate_caches()


def test_our_own_tasks() -> None:
    assert {"guess-number", "twenty-questions"} <= set(names())
    env = make_env("twenty-questions", objects=10, max_turns=5)
    assert isinstance(env, TwentyQuestions) and (len(env.objects), env.max_turns) == (10, 5)
    assert isinstance(make_env("guess-number", high=7), GuessNumber)
    assert get("guess-number").options == {"high": 32, "max_turns": 20}
    questions = {"objects": None, "original_quirks": False, "max_turns": 20, "reveal": True}
    assert get("twenty-questions").options == questions
    assert [get(n).default_player for n in ("guess-number", "twenty-questions")] == ["random", "mediocre"]
    assert [get(n).reference_player for n in ("guess-number", "twenty-questions")] == ["bisection", "expert"]


def test_a_mistyped_task() -> None:
    with pytest.raises(
        ValueError, match=r"unknown task 'twenty-question'; did you mean 'twenty-questions'\?"
    ) as caught:
        get("twenty-question")
    assert "guess-number, textworld-express, twenty-questions" in str(caught.value)
    with pytest.raises(ValueError, match=r"unknown task 'zzz' \(accepted: "):
        make_env("zzz")


def test_a_mistyped_option_or_player() -> None:
    wanted = r"unknown option of task 'twenty-questions' 'object'; did you mean 'objects'\? "
    accepted = r"\(accepted: objects, original_quirks, max_turns, reveal\)"
    with pytest.raises(ValueError, match=wanted + accepted):
        make_env("twenty-questions", object=10)
    with pytest.raises(ValueError, match="did you mean 'high'"):
        get("guess-number").vocabulary_text(hihg=3)
    with pytest.raises(ValueError, match="unknown player of task 'guess-number' 'bisect'; did you mean 'bisection'"):
        get("guess-number").make_player("bisect")


def test_a_spec_must_name_its_own_players() -> None:
    with pytest.raises(ValueError, match="did you mean 'random'"):
        dataclasses.replace(TASK, default_player="randm")


def test_vocabulary_text_follows_the_options() -> None:
    assert get("guess-number").vocabulary_text(high=2)[:3] == ["Guess 1 to 2.\n", "1", "2"]
    assert "Is it a dog?" in get("twenty-questions").vocabulary_text(objects=10)
    assert "Is it a cat?" not in get("twenty-questions").vocabulary_text(objects=10)


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_registered", {})
    mine = register(dataclasses.replace(TASK, name="my-number"))
    assert get("my-number") is mine and "my-number" in names()
    for taken in ("my-number", "guess-number"):
        with pytest.raises(ValueError, match=f"task '{taken}' exists already"):
            register(dataclasses.replace(TASK, name=taken))
    with pytest.raises(TypeError, match="spec: wanted a TaskSpec, got str"):
        register("my-number")  # type: ignore[arg-type]


def test_a_task_of_another_package_is_found_and_loaded_when_asked_for(plugin: Path) -> None:
    declare(plugin, "far-away-number = far_away:TASK")
    assert "far-away-number" in names()
    assert "far_away" not in sys.modules
    spec = get("far-away-number")
    assert isinstance(spec, TaskSpec) and spec.summary == "from another package"
    assert make_env("far-away-number", high=4).reset(0) == "Guess 1 to 4.\n"
    with pytest.raises(ValueError, match="did you mean 'far-away-number'"):
        get("far-away-numbr")


@pytest.mark.parametrize(
    ("line", "name", "error", "message"),
    [
        ("other = far_away:TASK", "other", ValueError, "wanted the task 'other', got 'far-away-number'"),
        ("other = far_away:NO_TASK", "other", TypeError, "'far_away:NO_TASK': wanted a TaskSpec, got int"),
        ("other = not_there:TASK", "other", ModuleNotFoundError, "not_there"),
        ("guess-number = far_away:TASK", "guess-number", ValueError, "'guess-number' is claimed more than once"),
    ],
)
def test_a_broken_package_fails_for_its_own_name_only(
    plugin: Path, line: str, name: str, error: type[Exception], message: str
) -> None:
    declare(plugin, line)
    with pytest.raises(error, match=message):
        get(name)
    assert get("twenty-questions").name == "twenty-questions"
