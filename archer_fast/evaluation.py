"""Playing games to measure a policy: sampled or greedy, always with the standard error."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from archer_fast.backbone import Backbone
from archer_fast.config import RolloutConfig, TaskConfig
from archer_fast.envs import registry
from archer_fast.ranks import ALONE, Ranks
from archer_fast.rollout.embedded import EmbeddedEngine
from archer_fast.rollout.interact import Engine
from archer_fast.rollout.policy_engine import PolicyEngine
from archer_fast.rollout.shared import play_shared
from archer_fast.trajectory import Trajectory

ALWAYS = ("guess", "invalid", "repeat")  # shares that stand in every log, be they 0
EVALUATION_SEED = 1 << 40  # games of training count up from 0: evaluation never shares one with them


@dataclass(slots=True)
class Evaluation:
    """Figures of `num_games` games; `shares` are per turn: guess, question, repeat, invalid where the task tells.

    entropy: nats a token of the policy that sampled; action_length: tokens; kl: of that policy to the start's, nats an
    action, None where nobody asked. A scripted player has none of them.
    """

    num_games: int
    mean_return: float
    standard_error: float
    win_rate: float
    mean_turns: float
    shares: dict[str, float]
    trajectories: list[Trajectory] = field(repr=False)
    entropy: float = math.nan
    action_length: float = math.nan
    kl: float | None = None

    def as_metrics(self, prefix: str) -> dict[str, float]:
        return {
            f"{prefix}return": self.mean_return,
            f"{prefix}return_se": self.standard_error,
            f"{prefix}win_rate": self.win_rate,
            **{f"{prefix}{name}": value for name, value in self.behaviour.items()},
        }

    @property
    def behaviour(self) -> dict[str, float]:
        """What the policy does, whatever it earns."""
        behaviour = self.shares | {"turns": self.mean_turns, "entropy": self.entropy}
        behaviour["action_length"] = self.action_length
        return behaviour if self.kl is None else behaviour | {"kl": self.kl}


def summarise(trajectories: Sequence[Trajectory]) -> Evaluation:
    """Mean return with its standard error, win rate and behaviour of some games."""
    returns = np.array([t.episode_return for t in trajectories])
    n = max(1, returns.size)
    kinds: Counter[str] = Counter()
    for t in trajectories:
        kinds.update(t.info.get("kinds", {}))
    turns = kinds.pop("turns", 0)
    logprobs = [turn.rollout_logprobs for t in trajectories for turn in t.turns]
    num_tokens = sum(one.size for one in logprobs)
    return Evaluation(
        num_games=returns.size,
        mean_return=float(returns.mean()) if returns.size else float("nan"),
        standard_error=float(returns.std(ddof=1) / n**0.5) if returns.size > 1 else 0.0,
        win_rate=sum(bool(t.info.get("won")) for t in trajectories) / n,
        mean_turns=sum(t.num_turns for t in trajectories) / n,
        shares={kind: kinds[kind] / max(1, turns) for kind in sorted({*kinds, *ALWAYS})},
        trajectories=list(trajectories),
        # Minus the mean log-prob of what was sampled estimates the entropy without a pass of its own.
        entropy=0.0 - float(np.concatenate(logprobs).mean(dtype=np.float64)) if logprobs else math.nan,
        action_length=num_tokens / len(logprobs) if logprobs else math.nan,
    )


def as_greedy(evaluation: Evaluation) -> dict[str, float]:
    """What a greedy policy earned."""
    return {
        "greedy_return": evaluation.mean_return,
        "greedy_return_se": evaluation.standard_error,
        "greedy_win_rate": evaluation.win_rate,
    }


def evaluation_seeds(seed: int, games: int) -> range:
    """The seeds of games that no training sees; no two of `seed` share any."""
    first = EVALUATION_SEED + seed * 1_000_000
    return range(first, first + games)


def evaluate_policy(
    backbone: Backbone,
    stop_token_id: int,
    task: TaskConfig,
    rollout: RolloutConfig,
    *,
    games: int,
    seed: int,
    greedy: bool = False,
    player: Callable[[PolicyEngine], Engine] = lambda engine: engine,
    make_engine: Callable[..., PolicyEngine] = EmbeddedEngine,
    on_game: Callable[[Trajectory], None] | None = None,
    on_call: Callable[[str], None] | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Play `games` games that depend on `seed` and the number of ranks alone; the run's own random numbers are not
    touched.

    player: what plays, made of the policy's engine (CHAI's choice by a critic); make_engine: makes that, with the
    arguments of `EmbeddedEngine`; on_game, on_call: as of `play_games`.
    """
    engine = make_engine(
        backbone,
        stop_token_id,
        num_slots=rollout.num_slots,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        greedy=greedy,
        generator=torch.Generator(backbone.device).manual_seed(ranks.seed(seed)),
    )
    spec = registry.get(task.name)
    played = play_shared(
        ranks,
        player(engine),
        lambda: spec.make_env(**task.options),
        encoder(backbone.tokenizer),
        backbone.tokenizer.decode,
        evaluation_seeds(seed, games),
        max_dropped_share=rollout.max_dropped_share,
        on_game=on_game,
        on_call=on_call or _nobody,
    )
    return summarise(played.trajectories)


def _nobody(what: str) -> None:
    """Who hears of calls where nobody asked."""


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text to ids without special tokens."""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    return encode


def render_game(trajectory: Trajectory, tokenizer: Any) -> str:
    """A game as a person reads it: observations and answers in order, then its return."""
    parts = [
        tokenizer.decode(ids, skip_special_tokens=True)
        for turn in trajectory.turns
        for ids in (turn.observation_ids, turn.action_ids)
    ]
    text = "".join(parts) + tokenizer.decode(trajectory.final_observation_ids, skip_special_tokens=True)
    return f"{text.rstrip()}\n[return {trajectory.episode_return:g}]"
