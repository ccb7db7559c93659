"""What may change when a run goes on, and what its checkpoint settles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archer_fast.config import Config, to_dict

# The weights, the stored games and their features are made of these; another value would be ignored or fit nothing.
FIXED = (
    "seed",
    "algorithm",
    "task",
    "model.path",
    "model.tiny",
    "model.stop_token",
    "model.dtype",
    "warm_start",
    "rollout.temperature",
    "buffer.max_trajectories",
    "buffer.max_tokens",
    "critic.trunk",
    "critic.hidden_size",
    "critic.gamma",
    "ppo.gamma",
    "reinforce.gamma",
)
_OF_ONE_CALL = ("out", "resume")


def changed_settings(saved: Config, wanted: Config) -> list[str]:
    """`["actor.lr: 0.0003 -> 0.0001"]`: how `wanted` differs; ValueError where a checkpoint settles it."""
    old, new = dict(leaves(to_dict(saved))), dict(leaves(to_dict(wanted)))
    changes = []
    for name, value in new.items():
        if name in _OF_ONE_CALL or old[name] == value:
            continue
        if any(name == fixed or name.startswith(f"{fixed}.") for fixed in FIXED):
            raise ValueError(
                f"{name}: a run that is resumed keeps {old[name]!r}, got {value!r}; start a new one with another --out"
            )
        changes.append(f"{name}: {old[name]} -> {value}")
    return changes


def leaves(values: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted name; the options of a task are one setting."""
    for key, value in values.items():
        if isinstance(value, dict) and where + key != "task.options":
            yield from leaves(value, f"{where}{key}.")
        else:
            yield where + key, value
