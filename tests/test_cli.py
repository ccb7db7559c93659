"""The command line as a user meets it: one tiny run that every command looks at, nonsense, and signals."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from archer_fast import cli
from archer_fast.config import Config
from archer_fast.loggers import read_rows
from archer_fast.run_folder import RunFolder, read_json, write_json

TASK = ["--task.name", "guess-number", "--task.options", "high=8", "max_turns=6"]
TINY = [
    *("--warm-start.games", "40", "--warm-start.steps", "8", "--model.tiny.hidden-size", "16"),
    *("--model.tiny.num-heads", "2", "--model.tiny.intermediate-size", "16", "--model.tiny.num-layers", "1"),
    *("--rollout.games", "4", "--rollout.max-new-tokens", "4", "--eval.games", "4", "--eval.final-games", "8"),
    *("--critic.epochs", "2", "--critic.hidden-size", "8", "--critic.warmup-iterations", "1", "--actor.epochs", "1"),
]
NOWHERE = "/no/such/folder"


class Said(NamedTuple):
    code: int
    out: str
    err: str


def run_cli(*argv: str) -> Said:
    """main([...]) in this process, as the shell sees it."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(a) for a in argv])
        except SystemExit as stop:
            code = 0 if stop.code is None else int(stop.code)
    return Said(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A warm-start cache of our own, one thread, a terminal of fixed width; logging as it was."""
    logger = logging.getLogger("archer_fast")
    before = (torch.get_num_threads(), logger.level)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("ARCHER_FAST_CACHE", str(cache))
        patch.setenv("COLUMNS", "120")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("ARCHER_FAST_LOG", raising=False)
        yield cache
    torch.set_num_threads(before[0])
    logger.setLevel(before[1])
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)


class Run(NamedTuple):
    path: Path
    said: Said


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of two iterations. Nobody writes into it."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    said = run_cli("train", *TASK, *TINY, "--iterations", "2", "--log", "tensorboard", "--out", str(path))
    return Run(path, said)


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Path:
    """The run, to write into."""
    shutil.copytree(run.path, tmp_path / "copy")
    return tmp_path / "copy"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- train -------------------------------------------------------------------------------------------


def test_train_goes_from_nothing_to_the_report(run: Run) -> None:
    code, out, err = run.said
    assert (code, err) == (0, ""), err
    lines = out.splitlines()
    assert "warm start ..." in lines and "evaluate ..." in lines
    assert any(re.fullmatch(r"task guess-number .*, [\d,]+ parameters", line) for line in lines)
    assert any(re.match(r"device cpu, 1 threads, attention \w+", line) for line in lines)
    last = next(line for line in lines if "greedy return" in line)
    pattern = (
        r"iteration 2/2  return -[\d.]+ ± [\d.]+  [\d,]+ tokens/s  .* left  "
        r"eval return -[\d.]+ ± [\d.]+, win rate \d+%, greedy return -[\d.]+ ± [\d.]+"
    )
    assert re.fullmatch(pattern, last)
    summary = read_json(run.path / "summary.json")
    for name in ("before", "last", "last_greedy", "best"):
        label = {"last_greedy": "last, greedy"}.get(name, name)
        row = next(line for line in lines if re.match(rf"│ {label} +│", line))
        shown = [cell.strip() for cell in row.strip("│").split("│")][1:]
        figures = [summary[f"{name}_{key}"] for key in ("return", "return_se", "win_rate")]
        assert shown == [f"{figures[0]:.2f}", f"{figures[1]:.2f}", f"{figures[2]:.0%}"]
    assert lines[-2:] == [f"curves: {run.path / 'curves.png'}", f"report: {run.path / 'report.html'}"]


def test_the_folder_of_a_finished_run(run: Run) -> None:
    rows = read_rows(run.path / "metrics.jsonl")
    assert [(row["iteration"], row["games"]) for row in rows] == [(0, 0), (1, 4), (2, 8), (2, 8)]
    assert "actor_loss" not in rows[1] and "actor_loss" in rows[2], "the actor waits for the critic"
    phases = {f"seconds_{phase}" for phase in ("rollout", "critic", "actor", "other")}
    assert phases <= rows[2].keys() and rows[2]["processed_tokens"] > rows[2]["useful_tokens"] > 0
    config = RunFolder(run.path).load_config()
    assert config.task.options == {"high": 8, "max_turns": 6} and config.rollout.games == 4
    page = (run.path / "report.html").read_text()
    for name in ("games_before.txt", "games_after.txt"):
        assert (run.path / name).read_text().count("Guess 1 to 8.") == 5
    assert "Guess 1 to 8." in page and "data:image/png;base64," in page and "finished" in page
    assert not (run.path / ".holder.json").exists()


def test_tensorboard_has_the_curves(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    rows = read_rows(run.path / "metrics.jsonl")
    told = [(event.step, event.value) for event in events.Scalars("return")]
    assert told == [(row["iteration"], pytest.approx(row["return"])) for row in rows if "return" in row]


def test_a_second_run_in_the_same_folder_is_refused(run: Run) -> None:
    before = contents(run.path)
    code, out, err = run_cli("train", "--out", str(run.path))
    assert (code, out) == (2, "")
    assert re.search(r"holds a finished run .*; pass --resume to go on with it, or another --out\n$", err)
    assert contents(run.path) == before


def test_resuming_a_finished_run_says_so_and_plays_nothing(copy: Path) -> None:
    rows, summary = (copy / "metrics.jsonl").read_text(), (copy / "summary.json").read_text()
    code, out, _ = run_cli("train", "--resume", "--out", str(copy))
    assert code == 0 and "all 2 iterations are done; --iterations N goes on to the Nth" in out
    assert "│ best" in out
    assert ((copy / "metrics.jsonl").read_text(), (copy / "summary.json").read_text()) == (rows, summary)


def test_resume_goes_on_and_says_what_changed(copy: Path) -> None:
    code, out, err = run_cli("train", "--resume", "--out", str(copy), "--iterations", "3", "--actor.lr", "1e-5")
    assert (code, err) == (0, "")
    assert "changed: iterations: 2 -> 3\n" in out and f"changed: actor.lr: {Config().actor.lr} -> 1e-05\n" in out
    assert re.search(r"resumed from .*iteration-000002 after iteration 2, 8 games\n", out)
    assert "warm start" not in out
    assert [row["iteration"] for row in read_rows(copy / "metrics.jsonl")] == [0, 1, 2, 2, 3, 3]
    config = RunFolder(copy).load_config()
    assert (config.iterations, config.actor.lr, config.task.options["high"]) == (3, 1e-5, 8)
    assert read_json(copy / "summary.json")["games"] == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--critic.hidden-size", "4"], "critic.hidden_size: a run that is resumed keeps 8, got 4"),
        (["--critic.gamma", "0.5"], "critic.gamma: a run that is resumed keeps 0.95, got 0.5"),
        (["--task.options", "high=9"], "task.options: a run that is resumed keeps {'high': 8, 'max_turns': 6}, got"),
        (["--task.name", "twenty-questions"], "task.name: a run that is resumed keeps 'guess-number'"),
        (["--seed", "1"], "seed: a run that is resumed keeps 0, got 1"),
        (["--model.tiny.num-layers", "2"], "model.tiny.num_layers: a run that is resumed keeps 1, got 2"),
    ],
)
def test_what_a_checkpoint_settles_cannot_change(run: Run, changes: list[str], message: str) -> None:
    before = contents(run.path)
    code, _, err = run_cli("train", "--resume", "--out", str(run.path), "--iterations", "9", *changes)
    assert code == 2 and message in err
    assert contents(run.path) == before


def test_a_whole_config_can_be_given_back(run: Run, tmp_path: Path) -> None:
    code, _, err = run_cli("train", "--config", str(run.path), "--out", str(tmp_path / "b"), "--iterations", "0")
    assert (code, err) == (0, "")
    again, first = RunFolder(tmp_path / "b").load_config(), RunFolder(run.path).load_config()
    again.out, again.iterations = first.out, first.iterations
    assert again == first
    summaries = [read_json(path / "summary.json") for path in (tmp_path / "b", run.path)]
    assert summaries[0]["before_return"] == summaries[1]["before_return"], "the same run, as far as it goes"


def test_a_run_that_a_collapse_ended(copy: Path) -> None:
    """It is told at its end; going on wants another action."""
    summary = read_json(copy / "summary.json")
    write_json(copy / "summary.json", summary | {"stopped_by": "collapse in iteration 2: [repeat] 86%"})
    argv = ["train", "--resume", "--out", str(copy), "--iterations", "3"]
    code, out, err = run_cli(*argv, "--collapse.action", "stop")
    assert (code, err) == (0, ""), err
    assert "a collapse has ended this run; --collapse.action warn goes on" in out
    assert "stopped early by the collapse in iteration 2: [repeat] 86%" in out
    assert read_json(copy / "summary.json")["games"] == 8
    code, out, err = run_cli(*argv)
    assert (code, err) == (0, "") and "stopped early" not in out
    assert read_json(copy / "summary.json")["games"] == 12


def test_a_broken_checkpoint_is_named(copy: Path) -> None:
    file = next(copy.glob("checkpoints/*/state.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    code, _, err = run_cli("train", "--resume", "--out", str(copy), "--iterations", "3")
    assert code == 1 and err.startswith(f"archer-fast: error: {file}: its content is not what was written")


# -- nonsense: one line, exit status 2, nothing made -------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["trian"],
            "unknown command 'trian'; did you mean 'train'? "
            "(commands: train, eval, play, compare, diagnose, report, envs, plan, doctor, convert-config, bench)",
        ),
        (
            ["train", "--task.name", "twenty-question"],
            "task.name: unknown task 'twenty-question'; did you mean 'twenty-",
        ),
        (["train", "--task.options", "object=10"], "task.options: unknown option .*; did you mean 'objects'"),
        (["train", "--task.options", "objects=-1"], "task.options: objects: wanted at least 1, got -1"),
        (["train", "--warm-start.player", "exprt"], "warm_start.player: unknown player .*; did you mean 'expert'"),
        (["train", "--iterations", "-3"], "iterations: wanted at least 0, got -3"),
        (["train", "--model.device", "gpu"], "device: wanted auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["train", "--resume"], "wanted the folder of a run, but '.*out' does not exist"),
        (["train", "--config", NOWHERE], "config: no file '/no/such/folder'"),
        (["eval", NOWHERE], "wanted the folder of a run, but .* does not exist .*needs --task.name"),
        (["eval", NOWHERE, "--games", "0"], "games: wanted at least 1, got 0"),
        (["eval", NOWHERE, "--task.name", "guess-number"], "model: nothing loads from '/no/such/folder'"),
        (["play"], "wanted the folder of a run or a model for --role watch, got none"),
        (["play", "--role", "agent"], "task.name: wanted a task .* or the folder of a run, got neither"),
        (["play", "--role", "agent", "--task.name", "guess-numbr"], "did you mean 'guess-number'"),
        (["report", NOWHERE], "wanted the folder of a run, but '/no/such/folder' does not exist"),
    ],
)
def test_nonsense_gets_one_line(tmp_path: Path, argv: list[str], message: str) -> None:
    argv = [*argv, "--out", str(tmp_path / "out")] if argv[0] == "train" else argv
    code, out, err = run_cli(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("archer-fast: error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert message in err or re.search(message, err), err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_logger_is_told_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as Python itself marks what cannot be imported
    code, out, err = run_cli("train", "--log", "wandb", "--out", str(tmp_path / "a"))
    assert (code, out) == (2, "") and "pip install 'archer-fast[wandb]'" in err
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_there_is_a_report_without_curves(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, _ = run_cli("report", str(copy))
    said = "no curves: matplotlib is not installed (pip install 'archer-fast[report]')"
    assert code == 0 and out.splitlines() == [said, f"report: {copy / 'report.html'}"]
    assert "data:image/png" not in (copy / "report.html").read_text()


def test_a_model_without_a_stop_token(run: Run, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(run.path / "best", model)
    file = model / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("eos_token", "pad_token")}
    file.write_text(json.dumps(settings))
    evaluate = ["eval", str(model), *TASK, "--games", "4", "--show", "0"]
    assert (
        "stop_token: this tokenizer has no eos_token; name a token that ends an action"
        in run_cli("train", *TASK, "--model.path", str(model), "--out", str(tmp_path / "a")).err
    )
    code, _, err = run_cli(*evaluate)
    assert code == 2 and "stop_token: this tokenizer has no eos_token" in err
    code, _, err = run_cli(*evaluate, "--load.stop-token", "two of them")
    assert code == 2 and re.search(r"stop_token: wanted text of exactly one token, got 'two of them' = \d+ tokens", err)
    code, out, err = run_cli(*evaluate, "--load.stop-token", "<|stop|>")
    assert (code, err) == (0, "") and "mean return" in out


def test_broken_weights_are_no_traceback(run: Run, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(run.path / "best", model)
    (model / "model.safetensors").write_bytes(b"short")
    code, _, err = run_cli("eval", str(model), *TASK)
    assert code == 2 and f"model: nothing loads from '{model}': " in err and err.count("\n") == 1
    assert "did you mean" not in err
    assert "did you mean" in run_cli("eval", f"{model}s", *TASK).err


# -- eval --------------------------------------------------------------------------------------------


def cells(table: str, name: str) -> list[str]:
    row = next(line for line in table.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in row.strip("│").split("│")][1:]


def test_eval_prints_games_and_figures_beside_the_scripted_players(run: Run) -> None:
    code, out, err = run_cli("eval", str(run.path), "--which", "start", "--games", "8", "--show", "3")
    assert (code, err) == (0, "")
    assert out.count("Guess 1 to 8.") == out.count("[return -") == 3
    summary = read_json(run.path / "summary.json")
    assert cells(out, "games") == ["8", "500", "500"]
    assert cells(out, "mean return")[0] == f"{summary['before_return']:.2f}", "the games of the run's own evaluation"
    assert cells(out, "standard error")[0] == f"{summary['before_return_se']:.2f}"
    assert cells(out, "win rate")[0] == f"{summary['before_win_rate']:.1%}"
    assert cells(out, "win rate")[2] == "100.0%", "bisection finds 1..8 within six turns"
    assert float(cells(out, "mean return")[2]) == pytest.approx(-13 / 8, abs=0.15)


def test_eval_of_one_game_knows_no_standard_error(run: Run) -> None:
    model = ["eval", str(run.path / "final"), *TASK, "--games", "1", "--show", "0", "--greedy"]
    code, out, _ = run_cli(*model)
    assert code == 0 and cells(out, "standard error")[0] == "?"
    assert "[return" not in out and "(greedy)" in out


def test_eval_takes_other_options_of_the_task_and_of_sampling(run: Run) -> None:
    argv = ["eval", str(run.path), "--games", "2", "--show", "0"]
    code, out, _ = run_cli(*argv, "--task.options", "max_turns=1")
    assert code == 0 and 'guess-number {"high": 8, "max_turns": 1}' in out
    assert cells(out, "turns a game")[0] == "1.0"
    code, _, err = run_cli(*argv, "--max-new-tokens", "0")
    assert code == 2 and "max_new_tokens: wanted at least 1, got 0" in err
    code, _, err = run_cli(*argv, "--temperature", "0")
    assert code == 2 and "temperature: wanted a number from 0.001 to 100, got 0.0" in err


def test_eval_of_a_policy_that_is_not_there_yet(copy: Path) -> None:
    shutil.rmtree(copy / "final")
    shutil.rmtree(copy / "checkpoints")
    code, _, err = run_cli("eval", str(copy), "--which", "last")
    assert code == 2 and f"which: '{copy}' has no policy 'last' yet (there: best, start)" in err


# -- play --------------------------------------------------------------------------------------------


def typing(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_watch(run: Run) -> None:
    code, out, err = run_cli("play", str(run.path), "--seed", "3", "--games", "2")
    assert (code, err) == (0, "")
    assert out.count("Guess 1 to 8.") == 2 and out.count("; return -") == 2
    assert out == run_cli("play", str(run.path), "--seed", "3", "--games", "2").out


def test_play_as_the_agent_needs_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    typing(monkeypatch, "".join(f"{n}\n" for n in range(1, 9)))
    code, out, err = run_cli("play", "--role", "agent", *TASK[:3], "high=8", "--seed", "1")
    assert (code, err) == (0, "") and re.search(r"\[won \(\d\) after \d turns?; return -?\d\]", out)


@pytest.mark.parametrize("typed", ["", "\n", "9\n", "q\n"])
def test_play_stops_where_the_input_ends(monkeypatch: pytest.MonkeyPatch, run: Run, typed: str) -> None:
    typing(monkeypatch, typed)
    code, out, err = run_cli("play", str(run.path), "--role", "agent", "--seed", "3")
    assert (code, err) == (0, "") and out.endswith("\n[stopped]\n")


def test_be_the_environment(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    typing(monkeypatch, "lower\nwhat\nhi\n")
    code, out, err = run_cli("play", str(run.path), "--role", "environment", "--seed", "3")
    assert (code, err) == (0, "")
    answers = re.search(r"Answers: (.*) \(their first letters do\)", out)
    assert answers and set(answers[1].split(", ")) == {"Higher.", "Lower.", "Correct.", "Invalid."}
    assert out.count("please one of: ") == 1 and out.endswith("[stopped]\n")
    assert re.findall(r"^ +(?:your answer: +)*(\d)  ", out, re.MULTILINE) == ["1", "2", "3"]


# -- report, envs, main ------------------------------------------------------------------------------


def test_report_is_made_anew(copy: Path) -> None:
    (copy / "report.html").unlink()
    code, out, _ = run_cli("report", str(copy))
    assert code == 0 and out.splitlines() == [f"curves: {copy / 'curves.png'}", f"report: {copy / 'report.html'}"]
    assert (copy / "report.html").stat().st_size > 50_000
    code, _, err = run_cli("report", str(copy.with_name("copi")))
    assert code == 2 and f"did you mean '{copy}'?" in err


def test_envs_lists_tasks_with_what_they_are_usually_played_with() -> None:
    code, out, _ = run_cli("envs")
    assert code == 0
    assert "twenty-questions: find a hidden object in twenty yes/no questions\n" in out
    assert "  options  objects=10 original_quirks=false max_turns=20 reveal=true\n" in out
    assert "  players  random (cloned), bisection (yardstick)\n" in out


def test_the_overview_and_the_version() -> None:
    asked, bare = run_cli("--help"), run_cli()
    assert (asked.code, bare.code) == (0, 2)
    assert asked.out == bare.out
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} +[A-Z].{{20,}}\.$", asked.out, re.MULTILINE)
    assert re.fullmatch(r"archer-fast \d+\.\d+\.\d+\n", run_cli("--version").out)


def test_the_log_level_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHER_FAST_LOG", "debug")
    code, _, err = run_cli("report", NOWHERE)
    assert code == 2 and "Traceback" in err and "archer-fast: error: wanted the folder" in err
    monkeypatch.setenv("ARCHER_FAST_LOG", "loud")
    assert "ARCHER_FAST_LOG: wanted DEBUG, INFO, WARNING or ERROR, got 'LOUD'" in run_cli("envs").err


def test_an_error_of_ours_is_a_traceback_and_ctrl_c_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(error: BaseException) -> Callable[[Any], None]:
        def fail(argv: Any) -> None:
            raise error

        return fail

    monkeypatch.setitem(cli.COMMANDS, "envs", command(AssertionError("ours")))
    with pytest.raises(AssertionError, match="ours"):
        run_cli("envs")
    monkeypatch.setitem(cli.COMMANDS, "envs", command(KeyboardInterrupt()))
    assert run_cli("envs") == (130, "", "archer-fast: interrupted\n")
    monkeypatch.setitem(cli.COMMANDS, "envs", command(OSError(28, "No space\nleft")))
    assert run_cli("envs") == (1, "", "archer-fast: error: [Errno 28] No space left\n")


def test_a_reader_that_is_gone_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", MAIN, "envs"], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


# -- signals, and a run that is on -------------------------------------------------------------------

# A shell starts what it puts into the background deaf to Ctrl-C, and so are the children of that.
HEAR = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
MAIN = HEAR + "from archer_fast.cli import main; main()"


@contextlib.contextmanager
def training(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """`archer-fast train` as a process of its own, gone at the end."""
    command = [sys.executable, "-c", MAIN, "train", *TASK, *TINY, *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Read its output until a line has `text`."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} never came: {process.stderr and process.stderr.read()}")


@pytest.mark.parametrize(
    ("until", "argv"),
    [("warm start ...", ["--warm-start.steps", "100000"]), ("evaluate ...", ["--eval.final-games", "100000"])],
)
def test_ctrl_c_before_the_first_iteration(run: Run, tmp_path: Path, until: str, argv: list[str]) -> None:
    folder = tmp_path / "it's a run"
    with training("--out", str(folder), *argv) as process:
        wait_for(process, until)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == f"archer-fast: go on with: archer-fast train --resume --out '{tmp_path}/it'\"'\"'s a run'\n"
    there = "start" if until == "evaluate ..." else "none"
    code, _, err = run_cli("eval", str(folder))
    assert code == 2 and f"has no policy 'best' yet (there: {there})" in err
    code, out, _ = run_cli("report", str(folder))
    assert code == 0 and "no iteration yet" in (folder / "report.html").read_text()
    again = ["--warm-start.steps", "8", "--eval.final-games", "8", "--iterations", "1"]
    code, out, err = run_cli("train", "--resume", "--out", str(folder), *again)
    assert (code, err) == (0, "") and "no checkpoint yet: the run begins anew" in out
    assert [row["iteration"] for row in read_rows(folder / "metrics.jsonl")] == [0, 1, 1]


def test_a_run_that_is_on_and_ctrl_c_within_it(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with training("--out", str(folder), "--iterations", "1000000") as process:
        while not [row for row in read_rows(folder / "metrics.jsonl") if row["iteration"] == 1]:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        for argv in (["--resume"], []):
            code, _, err = run_cli("train", *argv, "--out", str(folder))
            assert code == 2 and f"another run is writing into '{folder}' (pid {process.pid} on " in err
        assert run_cli("eval", str(folder), "--games", "2", "--show", "0").code == 0
        assert run_cli("play", str(folder)).code == 0
        assert run_cli("report", str(folder)).code == 0
        assert "not finished yet" in (folder / "report.html").read_text()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping after this iteration, then saving; once more stops at once\n" in out
    found = re.fullmatch(r"archer-fast: saved (\S+); go on with: archer-fast train --resume --out \S+\n", err)
    assert found
    done = int(found[1].rpartition("-")[2])
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(done + 1)), "what was run is saved, whole"
    code, _, err = run_cli("train", "--out", str(folder))
    assert code == 2 and "holds a started run" in err
    assert run_cli("eval", str(folder), "--which", "last", "--games", "2", "--show", "0").code == 0
    code, out, err = run_cli("train", "--resume", "--out", str(folder), "--iterations", str(done + 1))
    assert (code, err) == (0, "") and f"after iteration {done}, {4 * done} games\n" in out
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [*range(done + 2), done + 1]
    assert rows[-2]["games"] == 4 * (done + 1)
