"""The start policy: cloned once for equal settings, read from the cache after, loaded where a path is given."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from archer_fast import start_policy as module
from archer_fast.backbone import Backbone
from archer_fast.config import Config, ModelConfig, TaskConfig, WarmStartConfig
from archer_fast.start_policy import cache_folder, start_policy
from archer_fast.tiny_model import TinyModel
from archer_fast.watcher import SilentWatcher

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


class Listener(SilentWatcher):
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.phases: dict[str, tuple[int | None, int]] = {}  # name -> steps announced, steps done

    def message(self, text: str) -> None:
        self.messages.append(text)

    def phase(self, name: str, total: int | None) -> None:
        self.current = name
        self.phases[name] = (total, 0)

    def advance(self, steps: int = 1) -> None:
        total, done = self.phases[self.current]
        self.phases[self.current] = (total, done + steps)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARCHER_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "warm_start"


def make_config(**changes: Any) -> Config:
    tiny = TinyModel(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, max_positions=64)
    config = Config(
        task=TaskConfig("guess-number", {"high": 4}),
        model=ModelConfig(tiny=tiny, device="cpu"),
        warm_start=WarmStartConfig(games=10, steps=3, batch_games=4),
    )
    return dataclasses.replace(config, **changes)


def weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in backbone.named_parameters()}


def same(left: Backbone, right: Backbone) -> bool:
    mine, theirs = weights(left), weights(right)
    return mine.keys() == theirs.keys() and all(torch.equal(p, theirs[name]) for name, p in mine.items())


def test_the_first_call_clones_and_the_second_reads_the_same_weights(cache: Path) -> None:
    first, second = Listener(), Listener()
    cloned, stop = start_policy(make_config(), CPU, first)
    (folder,) = cache.iterdir()
    assert folder.name.startswith("guess-number-")
    assert first.phases["warm start"] == (3, 3)
    (said,) = first.messages
    assert "cloned 10 scripted games" in said and "action_loss" in said and str(folder) in said

    read, again = start_policy(make_config(), CPU, second)
    assert second.messages == [f"warm start: read from {folder}"]
    assert "warm start" not in second.phases
    assert same(cloned, read) and cloned.fingerprint() == read.fingerprint()
    assert stop == again == cloned.tokenizer.eos_token_id


def test_cloning_again_makes_the_same_weights(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, _ = start_policy(make_config(), CPU, SilentWatcher())
    monkeypatch.setenv("ARCHER_FAST_CACHE", str(tmp_path / "elsewhere"))
    listener = Listener()
    second, _ = start_policy(make_config(), CPU, listener)
    assert "cloned" in listener.messages[0]
    assert same(first, second)


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "steps": {"warm_start": WarmStartConfig(games=10, steps=4, batch_games=4)},
    "games": {"warm_start": WarmStartConfig(games=11, steps=3, batch_games=4)},
    "player": {"warm_start": WarmStartConfig(games=10, steps=3, batch_games=4, player="bisection")},
    "task": {"task": TaskConfig("guess-number", {"high": 5})},
    "model": {"model": ModelConfig(tiny=TinyModel(hidden_size=8, num_layers=1, num_heads=2), device="cpu")},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_another_policy(cache: Path, name: str) -> None:
    plain, _ = start_policy(make_config(), CPU, SilentWatcher())
    listener = Listener()
    changed, _ = start_policy(make_config(**CHANGES[name]), CPU, listener)
    assert "cloned" in listener.messages[0]
    assert len(list(cache.iterdir())) == 2
    assert not same(plain, changed)


def test_what_does_not_bear_on_the_clone_does_not_clone_again(cache: Path) -> None:
    start_policy(make_config(), CPU, SilentWatcher())
    listener = Listener()
    start_policy(make_config(iterations=7, out="elsewhere"), CPU, listener)
    config = make_config()
    config.model.lora.rank = 4
    start_policy(config, CPU, listener)
    assert len(listener.messages) == 2 and all("read from" in said for said in listener.messages)


def test_changed_games_are_cloned_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is of the games' content: a task or player that was mended makes another policy."""
    start_policy(make_config(), CPU, SilentWatcher())
    play = module.play_scripted
    monkeypatch.setattr(module, "play_scripted", lambda env, player, seed: play(env, player, seed + 1))
    listener = Listener()
    start_policy(make_config(), CPU, listener)
    assert "cloned" in listener.messages[0] and len(list(cache.iterdir())) == 2


def test_an_interrupted_clone_leaves_no_policy_to_be_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start_policy(make_config(), CPU, SilentWatcher())
    assert list(cache.iterdir()) == []
    listener = Listener()
    start_policy(make_config(), CPU, listener)
    assert "cloned" in listener.messages[0]


def test_the_embedded_model_without_a_warm_start_is_refused(cache: Path) -> None:
    config = make_config(warm_start=WarmStartConfig(enabled=False))
    with pytest.raises(ValueError, match=r"warm_start\.enabled: wanted true for the embedded model .*, got false"):
        start_policy(config, CPU, SilentWatcher())
    assert not cache.exists()


def test_a_model_by_path_is_taken_as_it_is_unless_a_warm_start_is_asked_for(cache: Path, tmp_path: Path) -> None:
    given, stop = start_policy(make_config(), CPU, SilentWatcher())
    given.save(tmp_path / "model")
    model = ModelConfig(path=str(tmp_path / "model"), device="cpu")
    listener = Listener()
    loaded, its_stop = start_policy(make_config(model=model), CPU, listener)
    assert same(given, loaded) and its_stop == stop
    assert listener.messages == [] and len(list(cache.iterdir())) == 1

    warm = WarmStartConfig(enabled=True, games=10, steps=3, batch_games=4)
    cloned, _ = start_policy(make_config(model=model, warm_start=warm), CPU, listener)
    assert "cloned 10" in listener.messages[0] and len(list(cache.iterdir())) == 2
    assert not same(given, cloned)
    assert cloned.tokenizer.get_vocab() == given.tokenizer.get_vocab()


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = make_config(model=ModelConfig(path=str(tmp_path / "nothing"), device="cpu"))
    with pytest.raises(ValueError, match=r"model: nothing loads from '.*nothing'"):
        start_policy(config, CPU, SilentWatcher())


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache" / "warm_start"
    monkeypatch.delenv("ARCHER_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "archer_fast" / "warm_start"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "archer_fast" / "warm_start"


def test_of_two_runs_that_begin_together_one_clones_and_the_other_reads(cache: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_start_policy import CPU, Listener, make_config, start_policy\n"
        "listener = Listener()\nprint('ready', flush=True)\nsys.stdin.readline()\n"
        "start_policy(make_config(), CPU, listener)\nprint(listener.messages[0][:18])"
    )
    listener = Listener()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdin is not None and other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        start_policy(make_config(), CPU, listener)
        said = sorted([listener.messages[0][:18], other.communicate(timeout=120)[0].strip()])
    assert said == ["warm start: cloned", "warm start: read f"], said
    assert len(list(cache.iterdir())) == 1
