"""What happened in one game: turns of sampled tokens and the reward each earned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from archer_fast.arguments import MAX_INT64, MIN_INT64, as_flag, as_int32, as_integer, as_numbers, as_real

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(slots=True, frozen=True, eq=False)
class Turn:
    """One exchange: the text tokens that arrived since the last turn, then the agent's answer.

    A first turn of Twenty Questions, with the stop token (here 2) as part of the action:

        Turn(
            observation_ids=[17, 9],          # "Questions:" "\\n"
            action_ids=[41, 8, 77, 5, 2],     # "Is" " it" " alive" "?" <stop>
            rollout_logprobs=[-.1, -.2, -3.1, -.0, -.0],
            reward=-1.0,
            policy_version=0,
        )
    """

    observation_ids: Int32  # [n >= 1], tokens added since the previous action
    action_ids: Int32  # [m >= 1], sampled tokens, the stop token included
    rollout_logprobs: Float32  # [m], log p(action token) under the sampler
    reward: float  # earned by this action
    policy_version: int  # optimizer steps the sampling policy had seen

    def __post_init__(self) -> None:
        keep = object.__setattr__  # frozen for everybody else
        for name in ("observation_ids", "action_ids"):
            ids = as_int32(name, getattr(self, name))
            if ids.size == 0:
                raise ValueError(f"{name}: wanted at least 1 token, got none")
            keep(self, name, ids)
        keep(self, "rollout_logprobs", as_numbers("rollout_logprobs", self.rollout_logprobs, np.float32))
        if self.rollout_logprobs.size != self.action_ids.size:
            raise ValueError(
                f"rollout_logprobs: wanted one per action token ({self.action_ids.size}), "
                f"got {self.rollout_logprobs.size}"
            )
        keep(self, "reward", as_real("reward", self.reward))
        keep(self, "policy_version", as_integer("policy_version", self.policy_version, MIN_INT64, MAX_INT64))


@dataclass(slots=True, frozen=True, eq=False)
class Trajectory:
    """One game from reset to its end, stored as one token stream.

    `terminated` (the task ended: nothing follows) and `truncated` (a time or length limit cut it:
    the value of `final_observation_ids` stands for the rest) exclude each other.
    """

    turns: tuple[Turn, ...]
    final_observation_ids: Int32  # [f >= 0], what the last action was answered with
    terminated: bool
    truncated: bool
    info: Mapping[str, Any] = field(default_factory=dict)  # task, seed, won, ...: for people; RLOO groups by seed

    def __post_init__(self) -> None:
        if not self.turns:
            raise ValueError("turns: wanted at least one turn, got none")
        keep = object.__setattr__  # frozen for everybody else
        keep(self, "terminated", as_flag("terminated", self.terminated))
        keep(self, "truncated", as_flag("truncated", self.truncated))
        if self.terminated == self.truncated:
            raise ValueError(
                "terminated, truncated: wanted exactly one True, got "
                f"terminated={self.terminated}, truncated={self.truncated}"
            )
        keep(self, "final_observation_ids", as_int32("final_observation_ids", self.final_observation_ids))

    @property
    def num_turns(self) -> int:
        return len(self.turns)

    @property
    def num_tokens(self) -> int:
        """Length of `input_ids`: every observation and action token, the final observation too."""
        return int(
            sum(t.observation_ids.size + t.action_ids.size for t in self.turns) + self.final_observation_ids.size
        )

    @property
    def input_ids(self) -> Int32:
        """The whole stream [num_tokens]: o_0 a_0 o_1 a_1 ... o_final."""
        parts = [ids for t in self.turns for ids in (t.observation_ids, t.action_ids)]
        return np.concatenate([*parts, self.final_observation_ids])

    @property
    def episode_return(self) -> float:
        """Undiscounted sum of rewards."""
        return float(sum(t.reward for t in self.turns))
