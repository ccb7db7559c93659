"""Text tasks: the protocol they keep, the registry that finds them, the players that know them."""

from archer_fast.envs.base import ResamplableEnv, StepResult, TextEnv
from archer_fast.envs.players import ScriptedGame, ScriptedPlayer, play_scripted
from archer_fast.envs.registry import get, make_env, names, register
from archer_fast.envs.task_spec import TaskSpec

__all__ = [
    "ResamplableEnv",
    "ScriptedGame",
    "ScriptedPlayer",
    "StepResult",
    "TaskSpec",
    "TextEnv",
    "get",
    "make_env",
    "names",
    "play_scripted",
    "register",
]
