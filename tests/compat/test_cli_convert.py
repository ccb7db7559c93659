"""`archer-fast convert-config` as a user meets it: a config that trains, what is said, nonsense."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_models import make_gpt2

from archer_fast import cli
from archer_fast.hydra_config import convert_config
from archer_fast.run_folder import read_config

YAML = """
huggingface_token: hf_do-not-tell
wandb_key: hf_do-not-tell
env_name: twenty_questions
max_conversation_length: 3
rollout_size: 4
eval_size: 2
batch_size: 2
grad_accum_steps: 4
epochs: 2
actor_epochs: 1
warmup_iter: 0
max_new_tokens: 5
max_grad_norm: 1.0
capacity: 60
eposh: 3
"""


class Said(NamedTuple):
    code: int
    out: str
    err: str


def run_cli(*argv: str | Path) -> Said:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(a) for a in argv])
        except SystemExit as stop:
            code = 0 if stop.code is None else int(stop.code)
    return Said(code, out.getvalue(), err.getvalue())


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("ARCHER_FAST_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "run.yaml"
    path.write_text(f"defaults: [default, _self_]\nsave_path: {tmp_path}/a run\n")
    (tmp_path / "default.yaml").write_text(YAML)
    return path


def test_it_says_what_became_of_every_key(source: Path, tmp_path: Path) -> None:
    code, out, err = run_cli("convert-config", source, "--out", tmp_path / "my config.json")
    assert (code, err) == (0, "")
    assert read_config(tmp_path / "my config.json") == convert_config(source).config
    lines = out.splitlines()
    assert lines[0] == f"{source} (over default.yaml)"
    assert f"  save_path = '{tmp_path}/a run'  ->  out = \"{tmp_path}/a run\"" in lines
    assert lines[lines.index("left out:") :] == [
        "left out:",
        "  huggingface_token: a secret, which no config should hold; `hf auth login` once, or HF_TOKEN in the "
        "environment",
        "  wandb_key: a secret, which no config should hold; `wandb login` once, or WANDB_API_KEY in the environment",
        "  eposh: no key of the original; did you mean 'epochs'?",
        "",
        f"written: {tmp_path}/my config.json",
        f"next:    archer-fast train --config '{tmp_path}/my config.json'",
    ]
    at = lines.index("  max_grad_norm = 1.0  ->  critic.max_grad_norm = 0.25, actor.max_grad_norm = 0.25")
    assert lines[at + 1].startswith("      the original clips the sum of its micro-batches' gradients")
    assert "do-not-tell" not in out + (tmp_path / "my config.json").read_text()


@pytest.mark.parametrize(
    ("agent", "counted"),
    [("archer", "actor_steps"), ("chai", "critic_loss"), ("online_filteredbc", "actor_steps")],
)
@pytest.mark.timeout(300)
def test_train_starts_from_it(agent: str, counted: str, source: Path, tmp_path: Path) -> None:
    folder, config = make_gpt2(tmp_path / "gpt2", initializer_range=0.3, newline_boost=4.0), tmp_path / "c.json"
    source.write_text(f"{source.read_text()}agent_type: {agent}\npolicy_lm: {folder}\n")
    assert run_cli("convert-config", source, "--out", config).code == 0
    code, _, err = run_cli("train", "--config", config, "--iterations", "1", "--eval.final-games", "2")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "a run" / "metrics.jsonl").read_text().splitlines()]
    (learned,) = [row for row in rows if counted in row]
    assert (learned["iteration"], learned["games"]) == (1, 4)
    saved = read_config(tmp_path / "a run")
    converted = convert_config(source).config
    assert (saved.critic, saved.actor, saved.filtered_bc) == (converted.critic, converted.actor, converted.filtered_bc)
    assert saved.task.options == {"objects": None, "max_turns": 3, "original_quirks": False}


def test_options_of_train_that_are_recommended_exist(source: Path, tmp_path: Path) -> None:
    from archer_fast.cli_args import parse_train

    assert run_cli("convert-config", source, "--out", tmp_path / "c.json").code == 0
    given = [
        "--warm-start.enabled",
        "True",
        "--actor.token-baseline",
        "--model.path",
        "m",
        "--task.name",
        "guess-number",
    ]
    config = parse_train(["--config", str(tmp_path / "c.json"), *given], prog="train")
    assert config.warm_start.enabled and config.actor.token_baseline and config.model.path == "m"
    assert config.task.name == "guess-number"


def test_a_task_that_is_not_here_is_told_by_both(source: Path, tmp_path: Path) -> None:
    (tmp_path / "default.yaml").write_text(YAML.replace("twenty_questions", "guess_my_city"))
    code, out, _ = run_cli("convert-config", source, "--out", tmp_path / "c.json")
    assert code == 0 and re.search(
        r"\nno training yet: task.name: unknown task 'guess-my-city'.*; a package of yours", out
    )
    code, _, err = run_cli("train", "--config", tmp_path / "c.json")
    assert code == 2 and "task.name: unknown task 'guess-my-city'" in err and not (tmp_path / "a run").exists()


def test_a_file_that_is_there_is_kept(source: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.json"
    config.write_text("mine")
    code, _, err = run_cli("convert-config", source, "--out", config)
    assert code == 2 and f"out: {str(config)!r} is there already; pass --overwrite to replace it" in err
    assert config.read_text() == "mine"
    assert run_cli("convert-config", source, "--out", config, "--overwrite").code == 0
    assert read_config(config).rollout.games == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "FILE.yaml"),
        (["nowhere.yaml"], "nowhere.yaml: wanted a yaml file, there is none"),
        (["{}/rum.yaml"], "rum.yaml: wanted a yaml file, there is none; did you mean 'run.yaml'?"),
        (["{}/default.yaml", "--out", "{}"], "out: wanted a file in a folder that is there, got '{}'"),
        (["{}/run.yaml", "--out", "{}/no/c.json"], "out: wanted a file in a folder that is there, got '{}/no/c.json'"),
        (["{}/broken.yaml", "--out", "{}/c.json"], "broken.yaml:1:5: broken yaml: "),
        (["{}/run.yaml", "--uot", "x"], "--uot"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    argv: list[str], message: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("a: [")
    before = sorted(p.name for p in tmp_path.iterdir())
    code, _, err = run_cli("convert-config", *(a.format(tmp_path) for a in argv))
    said = " ".join(err.replace("│", " ").split())
    assert code == 2 and message.format(tmp_path) in said, err
    assert err.count("\n") == 1 or "options" in err  # tyro's own
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_help_teaches() -> None:
    code, out, _ = run_cli("convert-config", "--help")
    assert code == 0
    for words in ("archer-fast convert-config archer_20q.yaml --out 20q.json", "--overwrite", "(default: config.json)"):
        assert words in " ".join(out.replace("│", " ").split())
    assert re.search(r"^  convert-config  Make a config of ours from a Hydra yaml", run_cli("--help").out, re.MULTILINE)
