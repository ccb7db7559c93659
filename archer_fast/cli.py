"""The command `archer-fast`: train, eval, play, report, envs."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.metadata
import json
import logging
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

if TYPE_CHECKING:
    from archer_fast.backbone import Backbone
    from archer_fast.cli_args import EvalArgs, LoadArgs, PlayArgs, Which
    from archer_fast.config import Config, RolloutConfig, TaskConfig
    from archer_fast.envs.task_spec import TaskSpec
    from archer_fast.evaluation import Evaluation

# Heavy modules are imported by the command that needs them: `--help` and `envs` should not wait for torch.

logger = logging.getLogger(__name__)

PROG = "archer-fast"
YARDSTICK_GAMES = 500


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Raises SystemExit: 0 done, 1 the run failed, 2 wrong input, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    _set_up_logging()
    with _faults_in_one_line():
        if args and args[0] == "--version":
            print(f"{PROG} {importlib.metadata.version(PROG)}")
        elif not args or args[0] in ("-h", "--help"):
            print(_overview())
            raise SystemExit(0 if args else 2)
        elif args[0] in COMMANDS:
            COMMANDS[args[0]](args[1:])
        else:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown command {args[0]!r}{hint} (commands: {', '.join(COMMANDS)})")


# -- train -------------------------------------------------------------------------------------------


def train(argv: Sequence[str]) -> None:
    """Train an agent, from the clone of a scripted player to the report."""
    from archer_fast.cli_args import parse_train

    config = parse_train(argv, prog=f"{PROG} train")

    from archer_fast import backbone
    from archer_fast.display import make_display
    from archer_fast.loggers import check_installed
    from archer_fast.report import build_report
    from archer_fast.run_folder import RunFolder
    from archer_fast.train import Interrupted
    from archer_fast.train import train as run_training

    backbone.quiet()
    _check_task(config.task)
    check_installed(config.log)
    folder = RunFolder(config.out)
    console = Console()
    try:
        with folder.lock():
            folder.check_free(resume=config.resume)
            folder.save_config(config)
            with make_display(console) as display:
                summary = run_training(config, folder, display)
    except KeyboardInterrupt as stop:
        saved = f"saved {stop.path}; " if isinstance(stop, Interrupted) else ""
        _say_on_stderr(f"{saved}go on with: {PROG} train --resume --out {shlex.quote(config.out)}")
        raise SystemExit(130) from None
    _print_summary(console, summary)
    for line in build_report(folder):
        console.print(escape(line), soft_wrap=True, highlight=False)


def _print_summary(console: Console, summary: dict[str, float]) -> None:
    table = Table("", "games", "return", "± se", "win rate", title="before and after", title_justify="left")
    for name, prefix in (("before", "before_"), ("last", "last_"), ("best", "best_")):
        if f"{prefix}return" in summary:
            values = (summary.get(f"{prefix}{key}") for key in ("return", "return_se", "win_rate"))
            table.add_row(name, "", *("" if v is None else f"{v:.2f}" for v in values))
    table.columns[1].footer = ""
    console.print(table)


# -- eval --------------------------------------------------------------------------------------------


def evaluate(argv: Sequence[str]) -> None:
    """Play games with a policy: mean return, standard error, win rate; sampled games printed."""
    from archer_fast.cli_args import EvalArgs, parse

    args = parse(EvalArgs, argv, prog=f"{PROG} eval")
    from archer_fast.envs import registry
    from archer_fast.evaluation import evaluate_policy, render_game

    policy = load_policy(args.source, args.which, args.task, args.load)
    rollout = _changed(policy.rollout, args)
    console = Console()
    with _bar("games", args.games) as advance:
        result = evaluate_policy(
            policy.backbone,
            policy.stop_token_id,
            policy.task,
            rollout,
            games=args.games,
            seed=args.seed,
            greedy=args.greedy,
            on_game=lambda game: advance(),
        )
    for trajectory in result.trajectories[: args.show]:
        console.print(escape(render_game(trajectory, policy.backbone.tokenizer)), highlight=False)
        console.print()
    rows = [(f"{policy.name} ({'greedy' if args.greedy else 'sampled'})", result)]
    spec = registry.get(policy.task.name)
    for player in dict.fromkeys((spec.default_player, spec.reference_player)):
        rows.append((f"player {player}", scripted_evaluation(spec, policy.task, player)))
    console.print(_evaluation_table(policy.task, rows))


def scripted_evaluation(spec: TaskSpec, task: TaskConfig, player: str, games: int = YARDSTICK_GAMES) -> Evaluation:
    """What a scripted player gets: the yardstick beside a policy's return."""
    from archer_fast.evaluation import EVALUATION_SEED, summarise_games

    return summarise_games(spec, task.options, player, range(EVALUATION_SEED, EVALUATION_SEED + games))
