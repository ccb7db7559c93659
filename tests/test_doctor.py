"""A sound model passes every check; each planted fault fails the check that is there for it, and no other."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from archer_fast import doctor
from archer_fast.adapted_backbone import AdaptedBackbone
from archer_fast.adapter_folder import lora_of
from archer_fast.attention import PackedLayout
from archer_fast.backbone import Backbone, load_backbone
from archer_fast.cli import main
from archer_fast.config import (
    ActorConfig,
    Config,
    CriticConfig,
    EvalConfig,
    LoRAConfig,
    ModelConfig,
    RolloutConfig,
    TaskConfig,
    TinyModel,
    WarmStartConfig,
)
from archer_fast.evaluation import evaluate_policy
from archer_fast.rollout.embedded import EmbeddedEngine
from archer_fast.run_folder import RunFolder
from archer_fast.train import train
from archer_fast.watcher import SilentWatcher

pytestmark = pytest.mark.usefixtures("one_thread_and_one_cache")

CHECKS = [
    "versions",
    "attention",
    "operations",
    "tokenizer",
    "stop token",
    "actions",
    "packed passes",
    "attention's numbers",
    "sampler and trainer",
]


def make_run(folder: Path, **lora: Any) -> Path:
    tiny = TinyModel(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, max_positions=128)
    config = Config(
        out=str(folder),
        iterations=2,
        task=TaskConfig("guess-number", {"high": 8}),
        model=ModelConfig(tiny=tiny, device="cpu", lora=LoRAConfig(**lora)),
        warm_start=WarmStartConfig(games=200, steps=60, batch_games=8, lr=1e-2),
        rollout=RolloutConfig(games=8, num_slots=8, max_new_tokens=4),
        critic=CriticConfig(hidden_size=16, epochs=4, batch_turns=32, warmup_iterations=0),
        actor=ActorConfig(batch_games=4, epochs=2, states_per_game=2, alternatives=3),
        eval=EvalConfig(every=0, games=8, final_games=8),
    )
    train(config, RunFolder(folder), SilentWatcher())
    return folder


@pytest.fixture(scope="module")
def run(one_thread_and_one_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def adapted(one_thread_and_one_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "adapted", rank=2)


def findings(capsys: pytest.CaptureFixture[str], *argv: str, fails: bool = False) -> dict[str, tuple[str, str]]:
    """By check: its state and text."""
    capsys.readouterr()
    if fails:
        with pytest.raises(SystemExit) as stop:
            main(["doctor", *argv])
        assert stop.value.code == 1
    else:
        main(["doctor", *argv])
    lines = capsys.readouterr().out.splitlines()
    return {line[5:].split(": ")[0]: (line[:5].strip(), line[5:].split(": ", 1)[1]) for line in lines}


def test_a_sound_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys, str(run), "--games", "6")
    assert list(found) == [*CHECKS, "memory"]
    assert {state for state, _ in found.values()} == {"ok"}, found
    assert f"torch {torch.__version__}" in found["versions"][1]
    assert found["attention"][1].startswith("sdpa (a variable-length kernel needs CUDA and half precision")
    assert found["operations"][1] == "cpu (C++, as on any CPU)"
    assert found["packed passes"][1].startswith("6 games at once and one by one: ")


def test_a_model_that_is_no_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(run / "start"), "--task.name", "guess-number", "--task.options", "high=8", "--load.attention", "sdpa"]
    found = findings(capsys, *argv, "--games", "3")
    assert list(found) == [*CHECKS, "memory"]
    assert found["attention"] == ("ok", "sdpa (asked for by name)")


def test_an_adapter_acts(adapted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys, str(adapted), "--which", "final", "--games", "4")
    assert list(found) == [*CHECKS, "adapter", "memory"]
    assert found["adapter"][0] == "ok" and "sampler and base" in found["adapter"][1]


def test_an_adapter_that_changes_nothing(
    adapted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archer_fast.adapters.Adapters.activate", lambda self, name: None)
    monkeypatch.setattr("archer_fast.adapted_backbone.AdaptedBackbone.restore", lambda self, folder: None)
    found = findings(capsys, str(adapted), "--which", "final", "--games", "2", fails=True)
    assert failed(found) == ["adapter"] and found["adapter"][1].endswith("it changes nothing")


def test_a_rollout_in_which_the_adapter_did_not_act(adapted: Path) -> None:
    folder = adapted / "final"
    base, stop = load_backbone(str(adapted / "start"))
    acting = AdaptedBackbone(base, "actor", lora_of(folder))
    acting.restore(folder)
    config = RunFolder(adapted).load_config()

    def check(player: Backbone) -> doctor.Finding:
        games = evaluate_policy(player, stop, config.task, config.rollout, games=4, seed=0).trajectories
        return doctor.check_adapter(acting, base, games, config.rollout.temperature)

    assert check(acting).state == "ok"
    assert check(base).state == "fail"


def failed(found: dict[str, tuple[str, str]]) -> list[str]:
    return [name for name, (state, _) in found.items() if state == "fail"]


def test_attention_that_leaks_between_games(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = PackedLayout.attend

    def leaky(self: PackedLayout, *args: Any) -> torch.Tensor:
        out = sound(self, *args)
        return out + 0.1 * args[3].mean(0).repeat_interleave(out.shape[1] // args[3].shape[1], 0)

    monkeypatch.setattr(PackedLayout, "attend", leaky)
    found = findings(capsys, str(run), "--games", "3", fails=True)
    assert "packed passes" in failed(found) and "attention's numbers" not in failed(found)


def test_an_attention_kernel_with_wrong_numbers(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import archer_fast.attention as attention

    sound = attention._ATTEND["sdpa"]
    monkeypatch.setitem(attention._ATTEND, "sdpa", lambda *args: 1.1 * sound(*args))
    found = findings(capsys, str(run), "--games", "3", fails=True)
    assert "attention's numbers" in failed(found) and "packed passes" not in failed(found)


def test_a_sampler_that_records_other_log_probs(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = EmbeddedEngine._sample

    def wrong(self: EmbeddedEngine, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logprobs = sound(self, hidden)
        return tokens, 1.01 * logprobs

    monkeypatch.setattr(EmbeddedEngine, "_sample", wrong)
    found = findings(capsys, str(run), "--games", "3", fails=True)
    assert failed(found) == ["sampler and trainer"]


def test_actions_that_never_end(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys, str(run), "--games", "2", "--load.stop-token", "A")
    assert found["actions"][0] == "note" and "cut off at rollout.max_new_tokens" in found["actions"][1]
    assert found["stop token"][1].startswith("'A' = ")


def test_a_machine_with_too_little_memory(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archer_fast.cli_doctor._available_memory", lambda: 1000)
    found = findings(capsys, str(run), "--games", "2", fails=True)
    assert failed(found) == ["memory"] and "GB at the peak of an iteration, 0.00 GB free" in found["memory"][1]


def test_versions_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy<1", "rich>=13", "no-such-package>=4; extra == 'cuda'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda package: wanted)
    (finding, *_) = doctor.check_versions()
    assert finding == ("versions", "fail", f"wanted numpy <1, got {importlib.metadata.version('numpy')}")


def test_more_tokens_than_rows() -> None:
    class Tokenizer:
        def __len__(self) -> int:
            return 12

        def decode(self, ids: list[int]) -> str:
            return "x"

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [3, 4]

    class Model:
        tokenizer, vocab_size = Tokenizer(), 11

    (tokenizer, stop) = doctor.check_tokenizer(Model(), 7)  # type: ignore[arg-type]
    assert tokenizer.state == "fail" and tokenizer.text == "12 tokens, but the model has only 11 rows for them"
    assert stop.state == "ok" and "its text is read as [3, 4]" in stop.text
    (_, beyond) = doctor.check_tokenizer(Model(), 11)  # type: ignore[arg-type]
    assert beyond.state == "fail" and beyond.text == "wanted an id below 11, got 11"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "RUN|MODEL"),
        (["/nowhere/run"], "'/nowhere/run' does not exist"),
        (["/nowhere/run", "--games", "0"], "games: wanted at least 1, got 0"),
        (["/nowhere/model", "--task.name", "guess-numbr"], "did you mean 'guess-number'"),
    ],
)
def test_bad_input(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *argv])
    said = capsys.readouterr()
    assert stop.value.code == 2 and message in " ".join((said.err + said.out).split()), said
