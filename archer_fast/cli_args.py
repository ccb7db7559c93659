"""The arguments of each command, as dataclasses, and how a command line becomes one of them."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from archer_fast.config import AttentionImpl, Config, TaskConfig
from archer_fast.envs import registry
from archer_fast.presets import with_preset
from archer_fast.run_folder import is_run, read_config
from archer_fast.workload import Workload

Args = TypeVar("Args")
Which = Literal["best", "final", "last", "start"]
_Source = tyro.conf.arg(metavar="RUN|MODEL")


@dataclass(slots=True)
class TrainArgs:
    """Train an agent with ArCHer, from the first clone of a player to the report.

    Without any option: Twenty Questions with 10 objects, by a tiny model built on the spot, into runs/default.
    """

    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    config: Path | None = None
    """A saved config.json, or the folder of a run, to start from; every other option given overrides it."""
    preset: str | None = None
    """Settings to start from instead of the defaults (over those of --config): archer, archer-exact, paper,
    archer-fresh, archer-resample, archer-residual, archer-token-baseline, offline-iql, offline-sarsa, chai, ppo,
    turn-ppo, reinforce, rloo, filtered-bc, bc."""


@dataclass(slots=True)
class PlanArgs(TrainArgs):
    """Say what a run will need before anything is loaded: memory by role and phase, FLOPs, bytes, time at the roofline.

    Takes the options of `train`. The model is a folder with a config.json, or a name: qwen2.5-7b, llama-3.1-8b,
    mistral-7b, gpt2. Counted in passes without data over the model's own code, and by formula where data would decide;
    exit status 1 where the run does not fit into the GPU's memory.

    archer-fast plan --model.path qwen2.5-7b --model.dtype bfloat16 --model.lora.rank 16 --gpu h100
    """

    gpu: Literal["a100", "h100", "h200"] = "h100"
    """Which one: data-sheet peaks of an A100 80 GB, H100 80 GB, H200 141 GB, all SXM."""
    gpus: int = 1
    """How many; a run uses one of them so far."""
    memory_share: float = 0.9
    """Of the GPU's memory that the run may fill; the rest is for the library's workspaces and fragmentation."""
    workload: Workload = field(default_factory=Workload)
    json: Path | None = None
    """Write every figure to this file."""

    def check(self) -> None:
        w = self.workload
        _at_least(**{f"workload.{name.replace('_', '-')}": (getattr(w, name), 1) for name in w.__slots__})
        if self.gpus != 1:
            raise ValueError(f"gpus: wanted 1, a run does not use several yet, got {self.gpus}")
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"memory-share: wanted above 0 and at most 1, got {self.memory_share:g}")
        if self.json is not None and (self.json.is_dir() or not self.json.absolute().parent.is_dir()):
            raise ValueError(f"json: wanted a file in a folder that is there, got {str(self.json)!r}")


@dataclass(slots=True)
class TaskChoice:
    """What is played; without options the run's own task."""

    name: str | None = None
    """A registered task (see `archer-fast envs`); a model that is no run of ours needs one."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the task that differ from the run's."""


@dataclass(slots=True)
class LoadArgs:
    """How the policy is loaded."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; auto takes a GPU where there is one."""
    threads: int | None = None
    """CPU threads of torch; None: the run's choice, or torch's own."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Weights and activations; None: the run's choice, or float32."""
    attention: AttentionImpl = "auto"
    """Packed attention kernel."""
    stop_token: str | None = None
    """Text of the one token that ends an action; None: the run's choice, or the tokenizer's end-of-sequence token."""

    def check(self) -> None:
        if self.threads is not None:
            _at_least(**{"load.threads": (self.threads, 1)})


@dataclass(slots=True)
class EvalArgs:
    """Play games with a policy and print its mean return, beside the task's scripted players."""

    source: Annotated[tyro.conf.Positional[str], _Source]
    """The folder of a run, or a folder or hub name of any causal LM (then with --task.name)."""
    which: Which = "best"
    """Which policy of a run: the best by evaluation, the one at the end, of the last checkpoint, of the start."""
    games: int = 512
    """Games to play."""
    greedy: bool = False
    """Take the most likely token instead of sampling."""
    seed: int = 0
    """Of games and sampling; the games are never those of training."""
    show: int = 2
    """Games to print."""
    max_new_tokens: int | None = None
    """Longest action; None: the run's setting."""
    temperature: float | None = None
    """Of sampling; None: the run's setting."""
    task: TaskChoice = field(default_factory=TaskChoice)
    load: LoadArgs = field(default_factory=LoadArgs)

    def check(self) -> None:
        _at_least(games=(self.games, 1), show=(self.show, 0), seed=(self.seed, 0))
        self.load.check()


@dataclass(slots=True)
class PlayArgs:
    """Watch a policy play turn by turn, be the environment that it asks, or play yourself."""

    source: Annotated[tyro.conf.Positional[str | None], _Source] = None
    """The folder of a run, or a folder or hub name of any causal LM; `--role agent` needs none."""
    role: Literal["watch", "environment", "agent"] = "watch"
    """`watch`: the policy plays the task; `environment`: it asks, you answer; `agent`: you play, the task answers."""
    which: Which = "best"
    """Which policy of a run: the best by evaluation, the one at the end, of the last checkpoint, of the start."""
    games: int = 1
    """Games to play."""
    greedy: bool = False
    """Take the most likely token instead of sampling."""
    seed: int | None = None
    """Of game and sampling; None: another game each time."""
    task: TaskChoice = field(default_factory=TaskChoice)
    load: LoadArgs = field(default_factory=LoadArgs)

    def check(self) -> None:
        _at_least(games=(self.games, 1), seed=(self.seed or 0, 0))
        self.load.check()


@dataclass(slots=True)
class DiagnoseArgs:
    """Measure how well a checkpoint's critic ranks the actions within a state, by playing them.

    At states of held-out games fresh actions are sampled, and each is played on to the end of the game several times by
    the same policy, what is hidden drawn anew each time from what the dialogue leaves possible. Costs about
    states x actions x continuations rests of games. The task must be able to do that (clone() and resample_hidden()).
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN|CHECKPOINT")]
    """The folder of a run, whose last checkpoint is taken, or a checkpoint in it."""
    states: int = 256
    """States, one of each held-out game, early and late."""
    actions: int = 8
    """Actions sampled at each; one that is drawn twice counts once."""
    continuations: int = 8
    """Games played on from each action."""
    seed: int = 0
    """Of games and sampling; the games are never those of training."""
    json: Path | None = None
    """Write every figure, action, value and return to this file."""
    load: LoadArgs = field(default_factory=LoadArgs)

    def check(self) -> None:
        _at_least(states=(self.states, 2), actions=(self.actions, 2), continuations=(self.continuations, 2))
        _at_least(seed=(self.seed, 0))
        if self.json is not None and (self.json.is_dir() or not self.json.absolute().parent.is_dir()):
            raise ValueError(f"json: wanted a file in a folder that is there, got {str(self.json)!r}")
        self.load.check()


@dataclass(slots=True)
class DoctorArgs:
    """Check a model on this machine, one line a check: what training takes for granted.

    Versions, attention and operations that are chosen and why, tokenizer and stop token; some games are played, and
    then scored packed and one by one, by plain attention, and against what the sampler recorded; an adapter must
    really act in rollouts; and the memory that an iteration will need must be free. Exit status 1 where one fails.
    """

    source: Annotated[tyro.conf.Positional[str], _Source]
    """The folder of a run, or a folder or hub name of any causal LM (then with --task.name)."""
    which: Which = "best"
    """Which policy of a run: the best by evaluation, the one at the end, of the last checkpoint, of the start."""
    games: int = 8
    """Games to play."""
    task: TaskChoice = field(default_factory=TaskChoice)
    load: LoadArgs = field(default_factory=LoadArgs)

    def check(self) -> None:
        _at_least(games=(self.games, 1))
        self.load.check()


@dataclass(slots=True)
class ReportArgs:
    """Build report.html and curves.png of a run, at any time, also while it runs."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The folder of the run."""


@dataclass(slots=True)
class EnvsArgs:
    """List the tasks with their usual options and scripted players."""


BENCHMARKS = ("kernels", "buffer")


@dataclass(slots=True)
class BenchArgs:
    """Measure the operations or the replay buffer beside their peers, or compile the Triton kernels for GPUs that need
    not be here.

    `archer-fast bench buffer` runs bench_replay.py, bench_bandwidth.py and bench_targets.py: insertion, draw and
    collation and bytes a token beside the original's design, torchrl, cpprb and NumPy, and what share of a memcpy's
    bandwidth our collation has.
    `archer-fast bench kernels` runs bench_ops.py and bench_scans.py of the repository's benchmarks/: times, memory and
    errors of every operation on this machine's GPU (7B shapes, bfloat16), or on its CPU where it has none.
    `archer-fast bench kernels --compile-report` needs no GPU: every configuration that a launch can choose is compiled
    for sm_80 (A100), sm_90 (H100) and sm_100 (B200); the exit status is 1 where registers spill, shared memory is
    short, or tensor cores stay idle.
    """

    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="|".join(BENCHMARKS))]
    """What is measured."""
    compile_report: bool = False
    """Print registers, spills, shared memory, tensor-core instruction and occupancy of each Triton kernel."""
    markdown: bool = False
    """Print the compile report as Markdown, as in docs/compile_report.md."""

    def check(self) -> None:
        if self.what not in BENCHMARKS:
            near = difflib.get_close_matches(self.what, BENCHMARKS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown benchmark {self.what!r}{hint} (benchmarks: {', '.join(BENCHMARKS)})")
        if self.compile_report and self.what != "kernels":
            raise ValueError(f"compile-report: wanted with kernels, got with {self.what}")
        if self.markdown and not self.compile_report:
            raise ValueError("markdown: wanted with --compile-report, got without")


def parse(kind: type[Args], argv: Sequence[str], *, prog: str, default: Args | None = None) -> Args:
    """The arguments as a `kind`; SystemExit with help, or with what is wrong and the nearest match."""
    more: dict[str, Any] = {} if default is None else {"default": default}
    parsed: Args = tyro.cli(kind, prog=prog, args=list(argv), registry=_registry(), **more)
    if isinstance(parsed, EvalArgs | PlayArgs | PlanArgs | DiagnoseArgs | DoctorArgs | BenchArgs):
        parsed.check()  # by us, not as __post_init__ by tyro, which would name the class and not the option
    return parsed


def parse_train(argv: Sequence[str], *, prog: str) -> Config:
    """The config of a run: defaults, under `--config` or what is resumed, under the options given."""
    return _parse_settings(TrainArgs, argv, prog)[1]


def parse_plan(argv: Sequence[str], *, prog: str) -> tuple[PlanArgs, Config]:
    """What is to be planned, and the config of the run."""
    return _parse_settings(PlanArgs, argv, prog)


Settings = TypeVar("Settings", bound=TrainArgs)


def _parse_settings(kind: type[Settings], argv: Sequence[str], prog: str) -> tuple[Settings, Config]:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--config")
    early.add_argument("--preset")
    early.add_argument("--out", default=Config().out)
    early.add_argument("--resume", action="store_true")
    try:
        known, _ = early.parse_known_args(list(argv))
    except argparse.ArgumentError:
        known = early.parse_args([])  # tyro says it better
    base = Config()
    if not {"-h", "--help"} & set(argv):
        if known.config is not None:
            base = read_config(known.config)
        elif known.resume and is_run(known.out):
            base = read_config(known.out)  # to resume is to go on with the same settings
        if known.preset is not None:
            chosen = with_preset(base, known.preset)
            if not (known.resume and is_run(known.out)):
                base = chosen
            elif chosen.algorithm != base.algorithm:
                raise ValueError(f"preset: {known.out!r} goes on as it is, by {base.algorithm}, got {known.preset!r}")
    base.resume = False
    args = parse(kind, argv, prog=prog, default=kind(base))
    given = args.settings
    if given.task.options is base.task.options:  # tyro's own object: no option was given
        options: dict[str, Any] = {}
    else:
        options = given.task.options
    return args, replace(given, task=choose_task(base.task, given.task.name, options))


def choose_task(base: TaskConfig | None, name: str | None, options: dict[str, Any]) -> TaskConfig:
    """`base`, or the task called `name` with what is usual for it, with some options changed."""
    if base is None or name not in (None, base.name):
        assert name is not None
        base = TaskConfig(name)
    return TaskConfig(base.name, {**base.options, **options})


def check_task(task: TaskConfig, player: str | None = None) -> None:
    """ValueError for a task, option or player that does not exist, before anything is made."""
    try:
        spec = registry.get(task.name)
    except ValueError as error:
        raise ValueError(f"task.name: {error}") from None
    try:
        spec.make_env(**task.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"task.options: {error}") from None
    try:
        spec.make_player(player)
    except ValueError as error:
        raise ValueError(f"warm_start.player: {error}") from None


def _registry() -> tyro.constructors.ConstructorRegistry:
    """Dictionaries are given as KEY=VALUE pairs."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def key_values(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[dict[str, Any]] | None:
        if info.type_origin is not dict:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="KEY=VALUE [KEY=VALUE ...]",
            instance_from_str=_parse_pairs,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda pairs: [f"{key}={json.dumps(value)}" for key, value in pairs.items()],
        )

    return registry


def _parse_pairs(texts: list[str]) -> dict[str, Any]:
    """["objects=10", 'names=["dog"]', "mode=hard"] -> {"objects": 10, "names": ["dog"], "mode": "hard"}."""
    pairs: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ValueError(f"wanted KEY=VALUE, got {text!r}")
        if key in pairs:
            raise ValueError(f"{key!r} is given twice")
        try:
            pairs[key] = json.loads(value)
        except ValueError:
            pairs[key] = {"True": True, "False": False, "None": None}.get(value, value)
    return pairs


def _at_least(**bounds: tuple[int, int]) -> None:
    for name, (value, low) in bounds.items():
        if value < low:
            raise ValueError(f"{name}: wanted at least {low}, got {value}")
