"""A yaml of the original as our config: every key answered for, values compared, bad files refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from archer_fast.cli_args import parse_train
from archer_fast.config import Config, LoRAConfig, from_dict, to_dict
from archer_fast.hydra_config import DEFAULTS, LEFT_OUT, convert_config
from archer_fast.presets import with_preset

SECRET = "hf_do-not-tell"
# Keys and values as the original's scripts/config has them; secrets are ours.
DEFAULT = f"""
cache_dir: '/home/me/.cache'  # of transformers
huggingface_token: '{SECRET}1'
wandb_key: "{SECRET}2"
policy_lm: "gpt2"
critic_lm: "roberta-base"
agent_type: "archer"
use_baseline: False
use_lora: False
max_new_tokens: 32
save_freq: 25
eval_freq: 25
capacity: 100000
rollout_size: 128
eval_size: 32
batch_size: 8
iterations: 2000
epochs: 50
actor_epochs: 3
warmup_iter: 20
grad_accum_steps: 32
do_sample: True
temperature: 1.0
critic_lr: 1e-5
lm_lr: 1e-5
env_idx: null
gamma: 0.95
tau: 0.1
max_grad_norm: 1.0
use_wandb: False
"""
ARCHER_20Q = """
defaults:
  - default
  - _self_

checkpoint_path: '/models/twenty_questions.pt'
save_path: '/runs/archer_20q'
env_name: twenty_questions
env_load_path: '/models/oracle.pt'
critic_lr: 2e-5
lm_lr: 1e-6
use_wandb: True
project_name: 'llm_rl_20qsubset'
run_name: 'archer-acc'
"""
ARCHER_LLM = """
defaults:
  - default
  - _self_
checkpoint_path: null
save_path: '/runs/llm'
env_name: twenty_questions
env_load_path: '/models/oracle.pt'
agent_type: 'archer_llm'
policy_lm : 'mistralai/Mistral-7B-Instruct-v0.2'
max_new_tokens: 64
use_lora: True
eos_str: null
rollout_size: 32
batch_size: 4
epochs: 20
actor_epochs: 1
grad_accum_steps: 64
critic_lr: 1e-5
lm_lr: 2e-6
"""
MINIMAL = "env_name: twenty_questions\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """write(text, default=...) -> path of a yaml beside a default.yaml."""

    def write(text: str | bytes, *, default: str | None = DEFAULT, name: str = "run.yaml") -> Path:
        if default is not None:
            (tmp_path / "default.yaml").write_text(default)
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def settings(config: Config, preset: str) -> dict[str, Any]:
    """What differs from a preset, by dotted name."""

    def walk(ours: dict[str, Any], theirs: dict[str, Any], before: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in ours.items():
            if isinstance(value, dict) and key != "options":
                found |= walk(value, theirs[key], f"{before}{key}.")
            elif value != theirs[key]:
                found[before + key] = value
        return found

    return walk(to_dict(config), to_dict(with_preset(Config(), preset)))


# -- values ------------------------------------------------------------------------------------------


def test_twenty_questions(write: Any) -> None:
    converted = convert_config(write(ARCHER_20Q))
    assert settings(converted.config, "paper") == {
        "out": "/runs/archer_20q",
        "iterations": 2000,
        "checkpoint_every": 25,
        "task.options": {"objects": None, "max_turns": 20, "original_quirks": False},
        "model.path": "gpt2",
        "model.stop_token": "\n",
        "rollout.max_new_tokens": 32,
        "buffer.max_trajectories": 5000,
        "buffer.max_tokens": 5000 * 20 * (32 + 32),
        "critic.max_grad_norm": 1 / 32,
        "actor.max_grad_norm": 1 / 32,
        "eval.every": 25,
        "eval.games": 32,
        "log": ("wandb",),
    }
    config = converted.config
    assert (config.critic.lr, config.critic.trunk_lr, config.actor.lr) == (2e-5, 2e-5, 1e-6)  # texts to PyYAML
    assert (config.critic.batch_turns, config.actor.batch_games * config.actor.states_per_game) == (256, 256)
    assert (config.critic.epochs, config.actor.epochs, config.critic.warmup_iterations) == (50, 3, 20)
    assert (config.critic.gamma, config.critic.tau, config.rollout.games) == (0.95, 0.1, 128)
    assert [file.name for file in converted.files] == ["run.yaml", "default.yaml"]


def test_every_key_is_answered_for_and_no_secret_is_told(write: Any) -> None:
    converted = convert_config(write(ARCHER_20Q + "critc_lm: x\napi_secret: x\n"))
    assert {key: reason for key, reason in converted.left_out.items() if LEFT_OUT.get(key) != reason} == {
        "env_idx": "nothing was asked for",
        "critc_lm": "no key of the original; did you mean 'critic_lm'?",
        "api_secret": "no key of the original",
    }
    taken = {name for source, _, _ in converted.taken for name in source.replace(" = ", ", ").split(", ")}
    keys = {line.partition(":")[0].strip() for line in (DEFAULT + ARCHER_20Q).splitlines() if ":" in line}
    assert keys - {"defaults"} - taken == set(converted.left_out) - {"critc_lm", "api_secret"}
    assert {"huggingface_token", "wandb_key", "checkpoint_path", "critic_lm"} < set(converted.left_out)
    assert SECRET not in repr(converted)


def test_a_large_policy(write: Any) -> None:
    converted = convert_config(write(ARCHER_LLM))
    config = converted.config
    assert config.model.path == "mistralai/Mistral-7B-Instruct-v0.2" and config.model.stop_token is None
    assert (config.critic.batch_turns, config.critic.max_grad_norm) == (256, 1 / 64)
    assert config.actor.max_grad_norm == 1 / 128  # its actor's micro-batches are of 2
    assert (config.critic.epochs, config.actor.epochs, config.rollout.games) == (20, 1, 32)
    assert (config.rollout.max_new_tokens, config.buffer.max_tokens) == (64, 5000 * 20 * 96)
    assert converted.left_out["checkpoint_path"] == "nothing was asked for"
    assert config.model.lora == LoRAConfig(rank=16, alpha=32, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    assert "prompt for Mistral is not added" in converted.taken[0].note


def test_chai_chooses_and_its_actor_rests(write: Any) -> None:
    converted = convert_config(write(ARCHER_20Q + "agent_type: CHAI\n"))
    config = converted.config
    assert (config.algorithm, config.rollout.best_of, config.actor.epochs) == ("archer", 5, 0)
    assert (config.critic.trunk, config.critic.value_target, config.critic.lr) == ("separate", "resample", 2e-5)
    for key in ("warmup_iter", "actor_epochs", "lm_lr"):
        assert converted.left_out[key] == "CHAI's actor never moves"


def test_filtered_bc(write: Any) -> None:
    converted = convert_config(write(ARCHER_20Q + "agent_type: online_filteredbc\npolicy_lm: me/tiny-llama\n"))
    config = converted.config
    assert (config.algorithm, config.filtered_bc.share, config.filtered_bc.newest) == ("filtered-bc", 0.1, False)
    assert (config.filtered_bc.epochs, config.filtered_bc.lr, config.filtered_bc.kl_coef) == (3, 1e-6, 0.0)
    assert config.filtered_bc.batch_games == 13  # 256 turns / 20
    assert config.filtered_bc.max_grad_norm == 1 / 256  # a llama's micro-batches are of 1
    assert config.buffer.max_trajectories == 50_000
    for key in ("critic_lr", "epochs", "gamma", "tau", "critic_lm"):
        assert converted.left_out[key] == "filtered BC has no critic"
    assert "warmup_iter" in converted.left_out


def test_what_no_file_sets_is_the_originals_default(write: Any) -> None:
    converted = convert_config(write(MINIMAL, default=None))
    config = converted.config
    assert (config.critic.gamma, config.critic.lr, config.critic.epochs) == (0.9, 1e-3, 3)
    assert (config.critic.batch_turns, config.critic.max_grad_norm) == (2, 0.01)
    assert (config.actor.batch_games, config.actor.states_per_game) == (1, 2)
    assert (config.rollout.games, config.iterations, config.eval.games) == (50, 10, 1)
    assert (config.out, config.log, converted.left_out) == ("runs/default", (), {})
    unset = {source.partition(" = ")[0] for source, _, _ in converted.taken if "(not set: the original's" in source}
    assert unset == set(DEFAULTS) - {"grad_accum_steps"}  # which is told behind batch_size
    assert "grad_accum_steps = 1 (not set: the original's default)" in str(converted.taken)


@pytest.mark.parametrize(
    ("text", "dotted", "value"),
    [
        ("batch_size: 3\ngrad_accum_steps: 4", "actor.states_per_game", 4),
        ("batch_size: 7\ngrad_accum_steps: 1", "actor.batch_games", 7),
        ("lm_lr: '3e-4'", "actor.lr", 3e-4),
        ("iterations: 1e3", "iterations", 1000),
        ("capacity: 7", "buffer.max_trajectories", 1),
        ("capacity: 7", "buffer.max_tokens", 1 << 20),
        ("capacity: 100\nmax_conversation_length: 5", "buffer.max_trajectories", 20),
        ("max_conversation_length: 5", "task.options", {"objects": None, "max_turns": 5, "original_quirks": False}),
        ("use_bfloat16: true", "model.dtype", "bfloat16"),
        ("use_bfloat16: false", "model.dtype", "float32"),
        ("temperature: 2", "rollout.temperature", 2.0),
        ("eos_str: '###'", "model.stop_token", "###"),
        ("agent_type: dqn", "algorithm", "archer"),
        ("save_path: ''", "out", "runs/default"),
        ("save_path: null", "out", "runs/default"),
    ],
)
def test_single_keys(text: str, dotted: str, value: Any, write: Any) -> None:
    inner: Any = convert_config(write(f"{MINIMAL}{text}\n")).config
    for name in dotted.split("."):
        inner = getattr(inner, name)
    assert inner == value and type(inner) is type(value)


@pytest.mark.parametrize(
    ("name", "task", "longest"),
    [("guess_my_city", "guess-my-city", 20), ("adventure", "adventure", 50), ("webshop", "webshop", 10)],
)
def test_other_environments_keep_their_name_and_their_longest_game(
    name: str, task: str, longest: int, write: Any
) -> None:
    converted = convert_config(write(f"defaults: [default]\nenv_name: {name}\nwebshop_lower: 1\nwebshop_upper: 2\n"))
    assert (converted.config.task.name, converted.config.task.options) == (task, {})
    assert converted.config.buffer.max_trajectories == 100_000 // longest
    assert {"webshop_lower", "webshop_upper"} < set(converted.left_out)


def test_an_environment_of_a_fork(write: Any) -> None:
    converted = convert_config(write("env_name: twenty_question\n"))
    assert converted.config.task.name == "twenty-question" and converted.config.task.options == {}
    assert "no environment of the original; did you mean 'twenty_questions'?" in [t.note for t in converted.taken]


def test_train_reads_it(write: Any, tmp_path: Path) -> None:
    config = convert_config(write(ARCHER_20Q)).config
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(to_dict(config)))
    assert from_dict(Config, json.loads(saved.read_text())) == config
    assert parse_train(["--config", str(saved)], prog="train") == config


def test_clipping_a_mean_by_less_steps_as_clipping_the_sum() -> None:
    """20 steps of Adam, gradients from far below the bound to far above it: what `max_grad_norm` is converted for."""
    bound, micro_batches, generator = 1.0, 32, torch.Generator().manual_seed(0)
    theirs, ours = (torch.nn.Parameter(torch.ones(7, dtype=torch.float64)) for _ in range(2))
    steps = [torch.optim.Adam([p], lr=0.1, eps=0) for p in (theirs, ours)]
    for number in range(20):
        gradients = torch.randn(micro_batches, 7, generator=generator, dtype=torch.float64) * 10 ** (number / 5 - 2.5)
        theirs.grad, ours.grad = gradients.sum(0), gradients.mean(0)
        torch.nn.utils.clip_grad_norm_([theirs], bound)
        torch.nn.utils.clip_grad_norm_([ours], bound / micro_batches)
        for step in steps:
            step.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - 1).abs().max() > 0.1


# -- defaults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("defaults", "gamma"),
    [
        ("[default, _self_]", 0.5),
        ("[_self_, default]", 0.95),
        ("[default]", 0.5),  # its own last, as Hydra does
        ("[default.yaml, more, _self_]", 0.5),
        ("[default, _self_, more]", 0.25),
        ("[default, more, override hydra/job_logging: none]", 0.5),
        ("null", 0.5),
        ("[]", 0.5),
    ],
)
def test_later_defaults_override_earlier_ones(defaults: str, gamma: float, write: Any) -> None:
    write("defaults: [inner]\ngamma: .25\n", name="more.yaml")
    write("eval_freq: 7\nwhatever: 1", name="inner.yaml")
    converted = convert_config(write(f"defaults: {defaults}\n{MINIMAL}gamma: .5\n"))
    assert converted.config.critic.gamma == gamma
    assert converted.config.eval.every == (7 if "more" in defaults else 25)
    assert ("whatever" in converted.left_out) == ("more" in defaults)
    assert ("hydra" in converted.left_out) == ("hydra" in defaults)


# -- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "env_name: wanted the name of an environment (twenty_questions, guess_my_city, adventure, webshop), got"),
        ("env_name: null", "env_name: wanted the name of an environment (twenty_questions"),
        ("- a\n- b", "wanted keys with values at top level, got a list"),
        ("just words", "wanted keys with values at top level, got a str"),
        ("env_name: 20", "env_name: wanted a text, got 20"),
        (f"{MINIMAL}agent_type: archr", "dqn, chai, online_filteredbc, got 'archr'; did you mean 'archer'?"),
        (f"{MINIMAL}agent_type: null", "agent_type: wanted a text, got null"),
        (f"{MINIMAL}policy_lm: ''", "policy_lm: wanted a text, got ''"),
        (f"{MINIMAL}gamma: null", "gamma: wanted a number, got null"),
        (f"{MINIMAL}gamma: high", "gamma: wanted a number, got 'high'"),
        (f"{MINIMAL}gamma: true", "gamma: wanted a number, got true"),
        (f"{MINIMAL}gamma: [1]", "gamma: wanted a number, got [1]"),
        (f"{MINIMAL}gamma: 2", "gamma = 2: critic.gamma: wanted a number from 0 to 1, got 2.0"),
        (f"{MINIMAL}tau: .nan", "tau = nan: critic.tau: wanted a number from 0 to 1, got nan"),
        (f"{MINIMAL}epochs: 2.5", "epochs: wanted a whole number of at least 0, got 2.5"),
        (f"{MINIMAL}epochs: .inf", "epochs: wanted a whole number of at least 0, got inf"),
        (f"{MINIMAL}epochs: -1", "epochs: wanted a whole number of at least 0, got -1"),
        (f"{MINIMAL}rollout_size: 0", "rollout_size = 0: rollout.games: wanted at least 1, got 0"),
        (f"{MINIMAL}batch_size: 0", "batch_size: wanted a whole number of at least 1, got 0"),
        (f"{MINIMAL}capacity: 0", "capacity: wanted a whole number of at least 1, got 0"),
        (f"{MINIMAL}lm_lr: -1", "lm_lr = -1: actor.lr: wanted at least 0, got -1.0"),
        (f"{MINIMAL}max_grad_norm: -1", "max_grad_norm = -1: critic.max_grad_norm: wanted at least 0, got -1.0"),
        (f"{MINIMAL}use_wandb: 1", "use_wandb: wanted true or false, got 1"),
        (f"{MINIMAL}save_path: ${{run_name}}/a", "save_path: wanted a text as it stands, got '${run_name}/a': only"),
        (f"{MINIMAL}save_path: '???'", "save_path: wanted a text as it stands, got '???': only Hydra fills it in"),
        (f"{MINIMAL}gamma: .9\ngamma: .8", ":3:1: broken yaml: 'gamma' is given twice"),
        (f"{MINIMAL}gamma: [1", ":2:10: broken yaml: expected ',' or ']', but got '<stream end>'"),
        (f"wandb_key: '{SECRET}\n", ":2:1: broken yaml: found unexpected end of stream"),
        (f"huggingface_token: {{{SECRET}: [\n", "broken yaml: "),
        (f"{SECRET} : : x", "broken yaml: mapping values are not allowed here"),
        (f"{MINIMAL}---\n{MINIMAL}", ":2:1: broken yaml: but found another document"),
        (f"{MINIMAL}wandb_key: !!python/object/apply:os.system [false]", "broken yaml: could not determine a"),
        ("? [a, b]\n: 1", "broken yaml: found unhashable key"),
        (f"{MINIMAL}when: 2024-99-99", "broken yaml (ValueError)"),
        ("a: " + "[" * 3000, "broken yaml (RecursionError)"),
        ("a: \x01", "broken yaml (ReaderError)"),
        (b"a: \xff", "wanted yaml in UTF-8, got byte 3 that is none"),
        ("defaults: default", "defaults: wanted a list, got str"),
        ("defaults: [1]", "defaults: wanted _self_ or the name of a file beside it, got 1"),
        ("defaults: [{env: city}]", 'defaults: wanted _self_ or the name of a file beside it, got {"env": "city"}'),
        ("defaults: [env/city]", "defaults: wanted _self_ or the name of a file beside it, got 'env/city'"),
        ("defaults: [run]", "defaults: 'run' leads back to itself"),
    ],
)  # fmt: skip
def test_bad_files(text: str | bytes, message: str, write: Any) -> None:
    path = write(text)
    with pytest.raises(ValueError) as said:
        convert_config(path)
    assert str(said.value).startswith(str(path)) and message in str(said.value)
    assert SECRET not in str(said.value) and "\n" not in str(said.value)


def test_files_that_are_not_there(write: Any, tmp_path: Path) -> None:
    path = write("defaults: [defualt, _self_]\n" + MINIMAL)
    with pytest.raises(ValueError) as said:
        convert_config(path)
    beside = tmp_path / "defualt.yaml"
    assert str(said.value) == f"{path}: defaults: 'defualt': no file {str(beside)!r}; did you mean 'default.yaml'?"
    with pytest.raises(ValueError, match=r"ran.yaml: wanted a yaml file, there is none; did you mean 'run.yaml'\?$"):
        convert_config(tmp_path / "ran.yaml")
    with pytest.raises(ValueError, match=r"wanted a yaml file, there is none$"):
        convert_config(tmp_path / "no" / "folder.yaml")
    with pytest.raises(ValueError, match=r"wanted a yaml file, got a folder$"):
        convert_config(tmp_path)


def test_a_default_that_is_broken_is_named_itself(write: Any, tmp_path: Path) -> None:
    path = write("defaults: [default]\n" + MINIMAL, default="a: [")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/default.yaml:1:5: broken yaml"):
        convert_config(path)
    write("defaults: [run]\n", default=None, name="default.yaml")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/default.yaml: defaults: 'run' leads back to itself"):
        convert_config(path)
