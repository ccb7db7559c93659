"""The command `archer-fast`: its commands, and how a fault of the user's is told in one line."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.metadata
import json
import logging
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from archer_fast.config import Config
    from archer_fast.ranks import Ranks
    from archer_fast.run_folder import RunFolder

# Heavy modules are imported by the command that needs them: `--help` and `envs` should not wait for torch.

logger = logging.getLogger(__name__)

PROG = "archer-fast"


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; SystemExit 1: the run failed, 2: wrong input, 130: interrupted."""
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
            sys.stdout.flush()  # a reader that has gone is noticed here, not at the interpreter's end
        else:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown command {args[0]!r}{hint} (commands: {', '.join(COMMANDS)})")


# -- train -------------------------------------------------------------------------------------------


def train(argv: Sequence[str]) -> None:
    """Train an agent, from the clone of a scripted player to the report."""
    from archer_fast.cli_args import check_task, parse_train
    from archer_fast.loggers import check_installed
    from archer_fast.run_folder import RunFolder

    config = parse_train(argv, prog=f"{PROG} train")
    check_task(config.task, config.warm_start.player)
    check_installed(config.log)
    if config.resume:
        RunFolder.existing(config.out)

    from archer_fast import backbone
    from archer_fast.ranks import joined_ranks
    from archer_fast.report import build_report
    from archer_fast.train import Interrupted, claim

    backbone.quiet()
    backbone.choose_device(config.model.device)
    backbone.limit_threads(config.model.num_threads)
    folder = RunFolder(config.out)
    with joined_ranks(config.stall.rank_seconds) as ranks, contextlib.ExitStack() as stack:
        console = Console(quiet=not ranks.leads)
        try:
            ranks.led(lambda: claim(folder, stack, resume=config.resume))
            summary = ranks.led(lambda: _ended(config, folder, console))
            if summary is None:
                summary = _run(config, folder, console, ranks)
        except KeyboardInterrupt as stop:
            saved = f"saved {stop.path}; " if isinstance(stop, Interrupted) else ""
            if ranks.leads:
                _say_on_stderr(f"{saved}go on with: {PROG} train --resume --out {shlex.quote(config.out)}")
            raise SystemExit(130) from None
        if ranks.leads:
            _print_summary(console, summary)
            for line in build_report(folder):
                console.print(escape(line), soft_wrap=True, highlight=False)


def _ended(config: Config, folder: RunFolder, console: Console) -> Mapping[str, Any] | None:
    """The summary of a run that has nothing left to do; it says why."""
    from archer_fast.run_folder import read_json

    if not config.resume or not folder.num_saved or not folder.summary.exists():
        return None
    summary: Mapping[str, Any] = read_json(folder.summary)
    if config.iterations <= folder.num_saved:
        console.print(f"all {folder.num_saved} iterations are done; --iterations N goes on to the Nth")
        return summary
    if "stopped_by" in summary and config.collapse.action != "warn":
        console.print("a collapse has ended this run; --collapse.action warn goes on")
        return summary
    return None


def _run(config: Config, folder: RunFolder, console: Console, ranks: Ranks) -> Mapping[str, Any]:
    """Start the run in its locked folder, or go on with it; returns its summary."""
    from archer_fast.display import make_display
    from archer_fast.resume import changed_settings
    from archer_fast.train import train as run_training
    from archer_fast.watcher import SilentWatcher

    said = []
    if config.resume and not folder.num_saved:
        said.append("no checkpoint yet: the run begins anew")
    elif config.resume:
        said += [f"changed: {line}" for line in changed_settings(folder.load_config(), config)]
        ranks.led(lambda: folder.summary.unlink(missing_ok=True))  # what it says is over
    with make_display(console) if ranks.leads else contextlib.nullcontext(SilentWatcher()) as display:
        for line in said:
            display.message(line)
        return run_training(config, folder, display, ranks)


def _print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    table = Table("", "return", "± se", "win rate")
    for label, name in (("before", "before"), ("last", "last"), ("last, greedy", "last_greedy"), ("best", "best")):
        values = [summary.get(f"{name}_{key}") for key in ("return", "return_se", "win_rate")]
        if values[0] is not None:
            forms = ("{:.2f}", "{:.2f}", "{:.0%}")
            table.add_row(label, *("" if v is None else form.format(v) for form, v in zip(forms, values, strict=True)))
    console.print(table)
    if "stopped_by" in summary:
        console.print(f"stopped early by the {summary['stopped_by']}", markup=False, highlight=False, soft_wrap=True)


# -- eval, play, report, envs, bench -----------------------------------------------------------------


def evaluate(argv: Sequence[str]) -> None:
    """Play games with a policy: mean return, standard error, win rate, sampled games."""
    from archer_fast.cli_args import EvalArgs, parse

    args = parse(EvalArgs, argv, prog=f"{PROG} eval")
    from archer_fast.cli_eval import evaluate

    evaluate(args)


def play(argv: Sequence[str]) -> None:
    """Watch the agent, be the environment that it asks, or play yourself."""
    from archer_fast.cli_args import PlayArgs, check_task, choose_task, parse

    args = parse(PlayArgs, argv, prog=f"{PROG} play")
    from archer_fast import play as games
    from archer_fast.cli_policy import Policy, load_policy
    from archer_fast.envs import registry
    from archer_fast.run_folder import RunFolder

    policy: Policy | None = None
    if args.role == "agent":
        base = None if args.source is None else RunFolder.existing(args.source).load_config().task
        if base is None and args.task.name is None:
            raise ValueError("task.name: wanted a task (see `archer-fast envs`) or the folder of a run, got neither")
        task = choose_task(base, args.task.name, args.task.options)
        check_task(task)
    else:
        if args.source is None:
            raise ValueError(f"wanted the folder of a run or a model for --role {args.role}, got none")
        policy = load_policy(args.source, args.which, args.task, args.load)
        task = policy.task
    console = Console()
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    seed = secrets.randbelow(1 << 31) if args.seed is None else args.seed
    player: games.Player = games.Person(input, "     your move: ")
    if policy is not None:
        player = games.PolicyPlayer(
            policy.backbone, policy.stop_token_id, policy.rollout, seed=seed, greedy=args.greedy
        )
    with contextlib.suppress(games.Quit, KeyboardInterrupt):
        for game in range(seed, seed + args.games):
            env = games.make_env(task)
            if args.role == "environment":
                answers = games.learn_answers(registry.get(task.name), task.options)
                games.answer_game(env, answers, player, game, say, input)
            else:
                games.play_game(env, player, game, say, echo=args.role == "watch")
            say("")
        return
    say("\n[stopped]")


def compare(argv: Sequence[str]) -> None:
    """Train several algorithms with several seeds, and report which learns faster."""
    from archer_fast import presets
    from archer_fast.cli_compare import compare

    compare(argv, f"{PROG} compare", presets.PRESETS, getattr(presets, "TUNING", {}))


def plan(argv: Sequence[str]) -> None:
    """Say what a run will need of a GPU, before anything is loaded."""
    from archer_fast.cli_args import parse_plan

    args, config = parse_plan(argv, prog=f"{PROG} plan")
    from archer_fast import backbone, cli_plan

    backbone.quiet()
    cli_plan.plan(args, config)


def doctor(argv: Sequence[str]) -> None:
    """Check a model on this machine: versions, kernels, tokenizer, log-probs, memory."""
    from archer_fast.cli_args import DoctorArgs, parse

    args = parse(DoctorArgs, argv, prog=f"{PROG} doctor")
    from archer_fast.cli_doctor import doctor

    doctor(args)


def diagnose(argv: Sequence[str]) -> None:
    """Measure how well the critic ranks the actions within a state."""
    from archer_fast.cli_args import DiagnoseArgs, parse

    args = parse(DiagnoseArgs, argv, prog=f"{PROG} diagnose")
    from archer_fast.cli_diagnose import diagnose

    diagnose(args)


def report(argv: Sequence[str]) -> None:
    """Build report.html and curves.png of a run, also while it runs."""
    from archer_fast.cli_args import ReportArgs, parse

    args = parse(ReportArgs, argv, prog=f"{PROG} report")
    from archer_fast.report import build_report
    from archer_fast.run_folder import RunFolder

    for line in build_report(RunFolder.existing(args.source)):
        print(line)


def envs(argv: Sequence[str]) -> None:
    """List the tasks with their usual options and scripted players."""
    from archer_fast.cli_args import EnvsArgs, parse

    parse(EnvsArgs, argv, prog=f"{PROG} envs")
    from archer_fast.config import TaskConfig
    from archer_fast.envs import registry

    for name in registry.names():
        spec = registry.get(name)
        options = {**spec.options, **TaskConfig(name).options}
        notes = {spec.default_player: " (cloned)", spec.reference_player: " (yardstick)"}
        print(f"{name}: {spec.summary}")
        print("  options ", *(f"{key}={json.dumps(value, default=repr)}" for key, value in options.items()))
        print("  players ", ", ".join(player + notes.get(player, "") for player in spec.players))
    print("\nNames and options are given as in: --task.name guess-number --task.options high=100 max_turns=12")


def convert_config(argv: Sequence[str]) -> None:
    """Make a config of ours from a Hydra yaml of the original ArCHer."""
    from archer_fast.cli_convert import convert

    convert(argv, PROG, "convert-config")


def bench(argv: Sequence[str]) -> None:
    """Measure the operations; compile the Triton kernels for GPUs that are not here."""
    from archer_fast.cli_args import BenchArgs, parse

    args = parse(BenchArgs, argv, prog=f"{PROG} bench")
    from archer_fast.cli_bench import bench

    bench(args)


# -- what main needs ---------------------------------------------------------------------------------


def _overview() -> str:
    lines = [f"usage: {PROG} COMMAND ...", ""]
    lines += [f"  {name:<16}{(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()]
    lines += ["", f"{PROG} COMMAND --help tells the options of a command; {PROG} --version the version."]
    return "\n".join(lines)


def _set_up_logging() -> None:
    """Warnings on stderr; ARCHER_FAST_LOG=DEBUG shows more, tracebacks of faults too."""
    level = os.environ.get("ARCHER_FAST_LOG", "WARNING").upper()
    root = logging.getLogger("archer_fast")
    for handler in root.handlers[:]:
        if isinstance(handler, RichHandler):
            root.removeHandler(handler)  # main() may run again in one process
    root.addHandler(RichHandler(console=Console(stderr=True), show_path=False))
    try:
        root.setLevel(level)
    except ValueError:
        root.setLevel(logging.WARNING)
        root.warning("ARCHER_FAST_LOG: wanted DEBUG, INFO, WARNING or ERROR, got %r", level)


@contextlib.contextmanager
def _faults_in_one_line() -> Iterator[None]:
    """What a person can mend is told in one line, without a traceback."""
    try:
        yield
    except BrokenPipeError:  # `archer-fast eval ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        _say_on_stderr("interrupted")
        raise SystemExit(130) from None
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, *_run_faults())):
            raise
        logger.debug("traceback of the fault below", exc_info=True)
        _say_on_stderr(f"error: {' '.join(str(error).split())}")
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None


def _run_faults() -> tuple[type[Exception], ...]:
    """The errors by which a run stops itself; none of them can have been raised if its module is not loaded."""
    names = {
        "archer_fast.checkpoint": "CheckpointError",
        "archer_fast.optim": "NonFiniteLoss",
        "archer_fast.ranks": "RankFailed",
        "archer_fast.rollout.interact": "TooManyDroppedGames",
        "archer_fast.rollout.token_sampler": "SamplerError",
    }
    return tuple(getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules)


def _say_on_stderr(text: str) -> None:
    print(f"{PROG}: {text}", file=sys.stderr)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "eval": evaluate,
    "play": play,
    "compare": compare,
    "diagnose": diagnose,
    "report": report,
    "envs": envs,
    "plan": plan,
    "doctor": doctor,
    "convert-config": convert_config,
    "bench": bench,
}
