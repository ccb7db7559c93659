"""`archer-fast eval`: a policy's games and figures, beside those of scripted players."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Column, Table

from archer_fast.cli_args import EvalArgs
from archer_fast.cli_policy import load_policy
from archer_fast.config import TaskConfig
from archer_fast.envs import registry
from archer_fast.envs.players import play_scripted
from archer_fast.envs.task_spec import TaskSpec
from archer_fast.evaluation import EVALUATION_SEED, Evaluation, evaluate_policy, render_game

YARDSTICK_GAMES = 500


def evaluate(args: EvalArgs) -> None:
    """Play the games and print them beside the scripted players' figures."""
    policy = load_policy(args.source, args.which, args.task, args.load)
    rollout = dataclasses.replace(
        policy.rollout,
        num_slots=min(policy.rollout.num_slots, args.games),
        temperature=policy.rollout.temperature if args.temperature is None else args.temperature,
        max_new_tokens=policy.rollout.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens,
    )
    console = Console()
    with progress_bar("games", args.games) as advance:
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
        console.print(escape(render_game(trajectory, policy.backbone.tokenizer)) + "\n", highlight=False)
    spec = registry.get(policy.task.name)
    columns = {f"{policy.name}\n({'greedy' if args.greedy else 'sampled'})": result}
    for player in (spec.default_player, spec.reference_player):
        columns[f"{player}\n(scripted)"] = evaluate_scripted(spec, policy.task, player, seed=args.seed)
    console.print(f"{policy.task.name} {json.dumps(policy.task.options)}", highlight=False, markup=False)
    console.print(_evaluation_table(columns))


def evaluate_scripted(
    spec: TaskSpec, task: TaskConfig, player: str, *, games: int = YARDSTICK_GAMES, seed: int = 0
) -> Evaluation:
    """What a scripted player gets at the games a policy is evaluated on: the yardstick of its return."""
    env, scripted = spec.make_env(**task.options), spec.make_player(player)
    played = [play_scripted(env, scripted, EVALUATION_SEED + seed + i, task.options) for i in range(games)]
    infos = [info for game in played for info in game.infos]
    kinds = Counter(str(info["kind"]) for info in infos if "kind" in info)
    kinds["repeat"] = sum(bool(info.get("repeat")) for info in infos)
    returns = [game.episode_return for game in played]
    return Evaluation(
        num_games=games,
        mean_return=statistics.fmean(returns),
        standard_error=statistics.stdev(returns) / games**0.5 if games > 1 else 0.0,
        win_rate=sum(bool(game.infos[-1].get("won")) for game in played) / games,
        mean_turns=len(infos) / games,
        shares={kind: kinds[kind] / len(infos) for kind in sorted(kinds)},
        trajectories=[],
    )


def _evaluation_table(columns: Mapping[str, Evaluation]) -> Table:
    """One column a player: names are long, and there are more figures than a terminal is wide."""
    shares = sorted({name for one in columns.values() for name in one.shares})
    table = Table("", *(Column(escape(name), justify="right") for name in columns))
    some = list(columns.values())
    table.add_row("games", *(str(one.num_games) for one in some))
    table.add_row("mean return", *(f"{one.mean_return:.2f}" for one in some))
    table.add_row("standard error", *(f"{one.standard_error:.2f}" if one.num_games > 1 else "?" for one in some))
    table.add_row("win rate", *(f"{one.win_rate:.1%}" for one in some))
    table.add_row("turns a game", *(f"{one.mean_turns:.1f}" for one in some))
    for name in shares:
        table.add_row(f"{name}, of all turns", *(f"{one.shares.get(name, 0.0):.1%}" for one in some))
    return table


@contextlib.contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr that leaves nothing behind; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
