"""The registry: a task's name to its TaskSpec, for our tasks and for those of installed packages.

A package adds a task without importing us by an entry point whose name is the task's:

    [project.entry-points."archer_fast.envs"]
    my-task = "my_package.my_task:TASK"        # TASK is a TaskSpec with name="my-task"

It is imported when the task is asked for, not before.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from archer_fast.envs.base import TextEnv
from archer_fast.envs.checks import unknown
from archer_fast.envs.task_spec import TaskSpec

__all__ = ["GROUP", "TaskSpec", "get", "make_env", "names", "register"]

GROUP = "archer_fast.envs"

_BUILTIN = {
    "guess-number": "archer_fast.envs.guess_number",
    "textworld-express": "archer_fast.envs.textworld_express",
    "twenty-questions": "archer_fast.envs.twenty_questions",
}  # name -> module that holds TASK
_registered: dict[str, TaskSpec] = {}


def register(spec: TaskSpec) -> TaskSpec:
    """Add a task to this process; ValueError if the name is taken."""
    if not isinstance(spec, TaskSpec):
        raise TypeError(f"spec: wanted a TaskSpec, got {type(spec).__name__}")
    if spec.name in names():
        raise ValueError(f"name: task {spec.name!r} exists already")
    _registered[spec.name] = spec
    return spec


def names() -> list[str]:
    """All task names, sorted; loads none of them."""
    return sorted({*_BUILTIN, *_registered, *(point.name for point in entry_points(group=GROUP))})


def get(name: str) -> TaskSpec:
    """The task of that name; ValueError with the nearest match and the list if there is none."""
    points = list(entry_points(group=GROUP, name=name))
    claims = [point.value for point in points]
    claims += [_BUILTIN[name]] if name in _BUILTIN else []
    claims += [f"register({name!r})"] if name in _registered else []
    if not claims:
        raise unknown("task", name, names())
    if len(claims) > 1:
        raise ValueError(f"task {name!r} is claimed more than once: {', '.join(claims)}")
    if name in _registered:
        return _registered[name]
    if name in _BUILTIN:
        spec = import_module(_BUILTIN[name]).TASK
        assert isinstance(spec, TaskSpec)
        return spec
    return _load(points[0])


def make_env(name: str, /, **options: Any) -> TextEnv:
    """`make_env("twenty-questions", objects=10)`: a fresh env of a registered task."""
    return get(name).make_env(**options)


def _load(point: EntryPoint) -> TaskSpec:
    spec = point.load()
    if not isinstance(spec, TaskSpec):
        raise TypeError(f"entry point {point.value!r}: wanted a TaskSpec, got {type(spec).__name__}")
    if spec.name != point.name:
        raise ValueError(f"entry point {point.value!r}: wanted the task {point.name!r}, got {spec.name!r}")
    return spec
