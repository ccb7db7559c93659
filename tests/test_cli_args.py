"""How a command line becomes arguments: what it says, what it keeps, what it refuses."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from archer_fast.cli_args import (
    EnvsArgs,
    EvalArgs,
    PlayArgs,
    ReportArgs,
    TrainArgs,
    _parse_pairs,
    check_task,
    choose_task,
    parse,
    parse_train,
)
from archer_fast.config import ActorConfig, Config, TaskConfig
from archer_fast.presets import PRESETS, with_preset
from archer_fast.resume import changed_settings
from archer_fast.run_folder import RunFolder


def train(*argv: str) -> Config:
    return parse_train(argv, prog="archer-fast train")


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str) -> str:
    """What tyro says about a line that it refuses, in one line."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        train(*argv)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return " ".join(re.sub(r"[─│╭╮╰╯]", " ", captured.err).split())


def test_nothing_given_is_the_default() -> None:
    assert train() == Config()


def test_options_reach_their_setting() -> None:
    argv = "--iterations 3 --actor.lr 1e-5 --critic.trunk shared --resume --out b --log wandb tensorboard"
    config = train(*argv.split(), "--model.tiny.num-layers", "1", "--actor.no-normalise-advantages")
    wanted = Config(iterations=3, out="b", log=("wandb", "tensorboard"), resume=True)
    wanted.actor = ActorConfig(lr=1e-5, normalise_advantages=False)
    wanted.critic.trunk = "shared"
    wanted.model.tiny = dataclasses.replace(wanted.model.tiny, num_layers=1)
    assert config == wanted


@pytest.mark.parametrize(
    ("texts", "pairs"),
    [
        ([], {}),
        (["objects=10", "reveal=false"], {"objects": 10, "reveal": False}),
        (['objects=["dog", "cat"]'], {"objects": ["dog", "cat"]}),
        (["a=True", "b=None", "c=hard", "d=", "e=x=y"], {"a": True, "b": None, "c": "hard", "d": "", "e": "x=y"}),
    ],
)
def test_pairs(texts: list[str], pairs: dict[str, Any]) -> None:
    assert _parse_pairs(texts) == pairs


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["objects"], "wanted KEY=VALUE, got 'objects'"),
        (["=3"], "wanted KEY=VALUE, got '=3'"),
        (["a=1", "a=2"], "'a' is given twice"),
    ],
)
def test_bad_pairs(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _parse_pairs(texts)


def test_task_options_change_what_they_name_and_another_task_has_its_own() -> None:
    assert train("--task.options", "max_turns=5").task.options == {"objects": 10, "max_turns": 5}
    assert train("--task.options", "objects=null").task.options == {"objects": None}
    assert train("--task.name", "guess-number").task == TaskConfig("guess-number", {})
    assert train("--task.name", "guess-number", "--task.options", "high=8").task.options == {"high": 8}
    run = TaskConfig("guess-number", {"high": 8})
    assert choose_task(run, None, {}) == choose_task(run, "guess-number", {}) == run
    assert choose_task(run, None, {"max_turns": 3}).options == {"high": 8, "max_turns": 3}
    assert choose_task(run, "twenty-questions", {}).options == {"objects": 10}
    assert run.options == {"high": 8}


def test_a_saved_config_is_given_back_under_the_options(tmp_path: Path) -> None:
    saved = Config(seed=3, iterations=5, out=str(tmp_path), task=TaskConfig("guess-number", {"high": 8}))
    RunFolder(tmp_path).save_config(saved)
    for source in (tmp_path, tmp_path / "config.json"):
        assert train("--config", str(source)) == train(f"--config={source}") == saved
    other = train("--iterations", "9", "--config", str(tmp_path), "--task.options", "max_turns=3", "--out", "elsewhere")
    wanted = dataclasses.replace(saved, iterations=9, out="elsewhere")
    wanted.task = TaskConfig("guess-number", {"high": 8, "max_turns": 3})
    assert other == wanted


def test_resume_goes_on_with_the_settings_of_the_folder(tmp_path: Path) -> None:
    saved = Config(seed=3, iterations=5, out=str(tmp_path))
    RunFolder(tmp_path).save_config(saved)
    resumed = train("--resume", "--out", str(tmp_path), "--iterations", "9")
    assert resumed == dataclasses.replace(saved, resume=True, iterations=9)
    assert train("--out", str(tmp_path)).seed == 0, "a run that is not resumed starts from the defaults"


def test_a_preset_lies_under_the_options_and_over_the_config(tmp_path: Path) -> None:
    assert train("--preset", "turn-ppo") == train("--preset=turn-ppo") == with_preset(Config(), "turn-ppo")
    changed = train("--ppo.epochs", "3", "--preset", "turn-ppo", "--iterations", "7", "--task.options", "max_turns=5")
    assert (changed.algorithm, changed.ppo.level, changed.ppo.epochs, changed.iterations) == ("ppo", "turn", 3, 7)
    assert changed.task.options == {"objects": 10, "max_turns": 5}
    saved = Config(seed=3, out=str(tmp_path), task=TaskConfig("guess-number", {"high": 8}))
    saved.ppo.epochs, saved.ppo.lr, saved.rollout.temperature, saved.rollout.games = 5, 1.0, 0.5, 48
    RunFolder(tmp_path).save_config(saved)
    over = train("--config", str(tmp_path), "--preset", "ppo")
    assert over == with_preset(saved, "ppo")
    assert over.ppo == with_preset(Config(), "ppo").ppo and over.rollout.games == 64, "nothing of the saved algorithm"
    assert (over.rollout.temperature, over.seed, over.task.options) == (0.5, 3, {"high": 8})


def test_a_run_that_is_resumed_keeps_its_preset(tmp_path: Path) -> None:
    saved = train("--preset", "rloo", "--out", str(tmp_path), "--seed", "3")
    RunFolder(tmp_path).save_config(saved)
    wanted = dataclasses.replace(saved, resume=True)
    assert train("--resume", "--out", str(tmp_path)) == wanted
    assert train("--resume", "--out", str(tmp_path), "--preset", "rloo") == wanted
    changed = dataclasses.replace(saved, reinforce=dataclasses.replace(saved.reinforce, epochs=7))
    RunFolder(tmp_path).save_config(changed)
    assert train("--resume", "--out", str(tmp_path), "--preset", "rloo").reinforce.epochs == 7, "nothing is reset"
    with pytest.raises(ValueError, match=r"preset: '.*' goes on as it is, by reinforce, got 'ppo'"):
        train("--resume", "--out", str(tmp_path), "--preset", "ppo")
    with pytest.raises(ValueError, match="algorithm: a run that is resumed keeps 'reinforce', got 'ppo'"):
        changed_settings(saved, dataclasses.replace(saved, algorithm="ppo"))


def test_an_unknown_preset_and_one_that_an_option_contradicts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"preset: wanted one of archer, .* got 'turn-pp0'; did you mean 'turn-ppo'\?"):
        train("--preset", "turn-pp0")
    with pytest.raises(SystemExit):
        train("--preset", "archer-residual", "--actor.actions", "fresh")
    assert "'residual' is of logged actions" in " ".join(re.sub(r"[─│╭╮╰╯]", " ", capsys.readouterr().err).split())


def test_the_help_names_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train("--help")
    said = re.sub(r"[─│╭╮╰╯\s]", "", capsys.readouterr().out)
    listed = re.search(r"overthoseof--config\):([\w,-]+)\.", said)
    assert listed is not None and sorted(listed[1].split(",")) == sorted(PRESETS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sed": 3}', r"c\.json: config: unknown key 'sed'; did you mean 'seed'\?"),
        ('{"seed": 3,}', r"c\.json:1:12: broken JSON"),
        ("[]", r"c\.json: config: wanted an object of settings, got list"),
        ('{"actor": {"lr": -1}}', r"c\.json: config\.actor\.lr: wanted at least 0, got -1"),
    ],
)
def test_a_broken_config_names_file_and_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        train("--config", str(tmp_path / "c.json"))
    with pytest.raises(ValueError, match=r"no file '.*/d\.json'; did you mean '.*/c\.json'\?"):
        train("--config", str(tmp_path / "d.json"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--iteration 3", ["Unrecognized options: --iteration", "--iterations INT"]),
        ("--actor.learning-rate 3", ["Unrecognized options: --actor.learning-rate"]),
        ("extra", ["Unrecognized options: extra"]),
        ("--critic.trunk frozn", ["'frozn'", "--critic.trunk", "'frozen', 'shared', 'lora', 'separate'"]),
        ("--log csv", ["'csv'", "--log", "'tensorboard', 'wandb'"]),
        ("--iterations three", ["--iterations INT", "'three'"]),
        ("--actor.lr fast", ["--actor.lr FLOAT", "'fast'"]),
        ("--iterations", ["--iterations"]),
        ("--task.options objects", ["--task.options", "wanted KEY=VALUE, got 'objects'"]),
        ("--critic.lr -1", ["critic: lr: wanted at least 0, got -1"]),
        ("--model.tiny.hidden-size 30", ["model.tiny: hidden_size: wanted a multiple of 2 x 4 heads, got 30"]),
    ],
)
def test_nonsense_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, said: list[str]
) -> None:
    text = refused(capsys, monkeypatch, *line.split())
    assert all(part in text for part in said), text


def test_bounds_of_the_first_level() -> None:
    with pytest.raises(ValueError, match="iterations: wanted at least 0, got -3"):
        train("--iterations", "-3")
    with pytest.raises(ValueError, match="games: wanted at least 1, got 0"):
        parse(EvalArgs, ["runs/a", "--games", "0"], prog="eval")
    with pytest.raises(ValueError, match="show: wanted at least 0, got -1"):
        parse(EvalArgs, ["runs/a", "--show", "-1"], prog="eval")
    with pytest.raises(ValueError, match="seed: wanted at least 0, got -1"):
        parse(PlayArgs, ["--seed", "-1"], prog="play")
    for kind in (EvalArgs, PlayArgs):
        with pytest.raises(ValueError, match=r"load\.threads: wanted at least 1, got 0"):
            parse(kind, ["runs/a", "--load.threads", "0"], prog="x")
    assert parse(PlayArgs, [], prog="play") == PlayArgs()


@pytest.mark.parametrize(
    ("task", "player", "message"),
    [
        (TaskConfig("guess-numbr"), None, r"task\.name: unknown task 'guess-numbr'; did you mean 'guess-number'\?"),
        (TaskConfig(options={"object": 1}), None, r"task\.options: unknown option .* did you mean 'objects'\?"),
        (TaskConfig(options={"objects": -1}), None, r"task\.options: objects: wanted at least 1, got -1"),
        (TaskConfig(options={"objects": "abc"}), None, r"task\.options: objects: wanted an int, a list .* got 'abc'"),
        (
            TaskConfig(options={"objects": ["dog", "elefant"]}),
            None,
            r"task\.options: unknown object 'elefant'; did you mean 'elephant'\? \(accepted: .* and 145 more\)",
        ),
        (TaskConfig(), "mediocr", r"warm_start\.player: unknown player .* did you mean 'mediocre'\?"),
    ],
)
def test_a_task_that_does_not_exist(task: TaskConfig, player: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_task(task, player)
    check_task(TaskConfig(), "expert")


@pytest.mark.parametrize("kind", [TrainArgs, EvalArgs, PlayArgs, ReportArgs, EnvsArgs])
def test_help_tells_every_option_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        parse_train(["--help"], prog="x") if kind is TrainArgs else parse(kind, ["--help"], prog="x")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    told: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        line = line.strip(" │")  # boxes where the output's encoding has them
        if match := re.match(r"(--[a-z][\w.-]*)(,| [A-Z{\[])", line):
            name = match[1]
        told[name] = f"{told.get(name, '')} {line}"
    for name in _options(kind):
        body = re.sub(r"^ --\S+(, --\S+| \[?[A-Z{]\S*( \[.*\]| \[KEY=.*?\])?)", "", told[name])
        assert re.search(r"\w+ .*\(default: .*\)", body), told[name]
    if kind is not EnvsArgs:
        assert len([line for line in text.splitlines() if line.strip(" ╭─╮-").endswith(("options", "arguments"))]) >= 2


def _options(kind: type, where: str = "--") -> list[str]:
    options = []
    for field in dataclasses.fields(kind):
        nested = field.default_factory if dataclasses.is_dataclass(field.default_factory) else None
        if nested is not None:
            options += _options(
                nested, where if field.name == "settings" else f"{where}{field.name}.".replace("_", "-")
            )
        elif field.name != "source":
            options.append(f"{where}{field.name}".replace("_", "-"))
    return options
