"""`archer-fast diagnose`: how well a checkpoint's critic ranks the actions within a state."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from archer_fast import backbone
from archer_fast.cli_args import DiagnoseArgs
from archer_fast.cli_eval import progress_bar
from archer_fast.config import Config
from archer_fast.diagnosis import Diagnosis, Interval
from archer_fast.diagnosis_play import MeasuredStates, check_resamplable, measure_states
from archer_fast.diagnosis_score import Scores, critic_score, diagnose_critic
from archer_fast.run_folder import write_json
from archer_fast.saved_critic import config_of, find_checkpoint, load_saved_critic


def diagnose(args: DiagnoseArgs) -> None:
    """Measure the states, print the figures, write the JSON."""
    begin = time.monotonic()
    checkpoint = find_checkpoint(args.source)
    config = config_of(checkpoint)
    check_resamplable(config.task)
    backbone.quiet()
    backbone.limit_threads(args.load.threads or config.model.num_threads)
    saved = load_saved_critic(
        checkpoint,
        config,
        device=backbone.choose_device(args.load.device),
        dtype=getattr(torch, args.load.dtype or config.model.dtype),
        attention=args.load.attention,
        stop_token=args.load.stop_token or config.model.stop_token,
    )
    with progress_bar("continuations", args.states * args.actions * args.continuations) as advance:
        states = measure_states(
            saved.policy,
            saved.stop_token_id,
            config.task,
            config.rollout,
            gamma=config.critic.gamma,
            num_states=args.states,
            num_actions=args.actions,
            num_continuations=args.continuations,
            seed=args.seed,
            max_pass_tokens=config.model.max_pass_tokens,
            on_continuation=advance,
        )
    score = critic_score(saved.critic, config.rollout.temperature, pessimistic=config.actor.pessimistic)
    found, scores = diagnose_critic(states, score, saved.policy, config.model.max_pass_tokens)
    seconds = time.monotonic() - begin
    console = Console()
    console.print(f"{checkpoint}, critic trunk {config.critic.trunk}", highlight=False, markup=False, soft_wrap=True)
    console.print(_figures(found, states, seconds))
    console.print(_turns(found))
    if args.json is not None:
        told = _everything(args, checkpoint, config, found, states, scores, saved.policy.tokenizer)
        write_json(args.json, _without_nan(told | {"seconds": seconds}))


def _figures(found: Diagnosis, states: MeasuredStates, seconds: float) -> Table:
    within = found.within
    table = Table("", "", show_header=False)
    rows = {
        "states, of one game each": f"{len(states.games)}",
        "with two or more distinct actions": f"{within.num_states}, {within.num_actions} actions",
        "correlation with returns within states": _with_interval(within.correlation, within.correlation_interval),
        "its ceiling by the noise of the returns": _number(within.ceiling),
        "correlation / ceiling": _with_interval(within.corrected, within.corrected_interval),
        "spread of true advantages; of the critic's": f"{_number(within.true_spread)}; {_number(within.critic_spread)}",
        "explained variance of Q, actions taken": _number(found.explained_variance),
        "variance of returns that the turn explains": _number(found.turn_share),
        "continuations that a limit cut": f"{states.num_truncated}",
        "time": f"{seconds:.0f} s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _turns(found: Diagnosis) -> Table:
    table = Table("turn", "actions taken", "mean Q", "mean return")
    for row in found.calibration:
        table.add_row(str(row.turn), str(row.num_turns), f"{row.mean_predicted:.2f}", f"{row.mean_return:.2f}")
    return table


def _everything(
    args: DiagnoseArgs,
    checkpoint: Path,
    config: Config,
    found: Diagnosis,
    states: MeasuredStates,
    scores: Scores,
    tokenizer: Any,
) -> dict[str, Any]:
    """Settings, figures, and every state with its actions, their values and their returns."""
    return {
        "checkpoint": str(checkpoint),
        "task": dataclasses.asdict(config.task),
        "rollout": dataclasses.asdict(config.rollout),
        "critic": dataclasses.asdict(config.critic),
        "states": args.states,
        "actions": args.actions,
        "continuations": args.continuations,
        "seed": args.seed,
        **found.within._asdict(),
        "explained_variance": found.explained_variance,
        "turn_share": found.turn_share,
        "calibration": [row._asdict() for row in found.calibration],
        "num_truncated": states.num_truncated,
        "measured": [
            {
                "game_seed": game.info["seed"],
                "turn": int(states.turn[s]),
                "said": tokenizer.decode(states.said(s)),
                "actions": [
                    {
                        "text": tokenizer.decode(states.action(s, k)),
                        "valid": bool(states.valid[s, k]),
                        "q": float(scores.fresh[s, k]),
                        "returns": states.returns[s, k].tolist(),
                    }
                    for k in range(args.actions)
                ],
            }
            for s, game in enumerate(states.games)
        ],
    }


def _without_nan(value: Any) -> Any:
    """JSON has no nan: null says it."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float) -> str:
    return "not known" if math.isnan(value) else f"{value:.3f}"


def _with_interval(value: float, interval: Interval) -> str:
    bounds = "" if math.isnan(interval[0]) else f", {interval[0]:.3f} to {interval[1]:.3f} in 95 %"
    return _number(value) + bounds
