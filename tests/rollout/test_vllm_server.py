"""vLLM as a server (CPU): what it samples is the trainer's policy, and what is said when it is gone or another one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import assert_scored_right
from test_sampler_engine import assert_alternatives, some_turns
from test_train import Listener, tiny_config
from test_vllm_sampler import BOUND, PROBE, change, make_engine, play, policy
from vllm_server_process import ServerProcess

from archer_fast.adapted_backbone import AdaptedBackbone
from archer_fast.backbone import Backbone
from archer_fast.config import EvalConfig, LoRAConfig, ModelConfig, RolloutConfig, TinyModel, VllmConfig
from archer_fast.loggers import read_rows
from archer_fast.rollout.probe import trainer_logprobs
from archer_fast.rollout.token_sampler import SamplerError
from archer_fast.rollout.vllm_server import VllmServer
from archer_fast.run_folder import RunFolder
from archer_fast.train import train

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    base().save(folder)
    with ServerProcess(folder, folder / "log", "--enable-lora", "--max-lora-rank", "8") as server:
        yield server


def base() -> Backbone:
    return policy(tie_word_embeddings=False)


def sampler_of(server: ServerProcess, backbone: Backbone, exchange: Path) -> VllmServer:
    return VllmServer(VllmConfig(url=server.url), backbone, exchange)


def test_it_samples_the_trainers_policy_before_and_after_updates(running: ServerProcess, tmp_path: Path) -> None:
    backbone = base()
    sampler = sampler_of(running, backbone, tmp_path)
    assert sampler.max_tokens == 200
    engine: Any = make_engine(sampler, backbone, temperature=0.6)  # type: ignore[arg-type]
    before = torch.tensor(sampler._score(PROBE))
    assert (before - trainer_logprobs(backbone, PROBE)).abs().max() < BOUND
    games = play(engine, 23).trajectories
    assert len(games) == 23
    assert_scored_right(backbone, games, 0.6, atol=BOUND)
    change(backbone, 1)
    batch, turn_ids = some_turns(backbone)
    got = engine.sample_alternatives(batch, turn_ids.repeat(1, 4))  # takes over the change
    assert_alternatives(backbone, batch, turn_ids.repeat(1, 4), got, 0.6, atol=BOUND)
    after = torch.tensor(sampler._score(PROBE))
    assert (after - before).abs().mean() > 0.1
    assert (after - trainer_logprobs(backbone, PROBE)).abs().max() < BOUND
    assert engine.num_forward_tokens > 0
    sampler.close()


def test_adapters_are_exchanged_on_its_base(running: ServerProcess, tmp_path: Path) -> None:
    policy_of_base = base()
    sampler_of(running, policy_of_base, tmp_path / "base").load(policy_of_base)  # whatever was served before
    adapted = AdaptedBackbone(policy_of_base, "actor", LoRAConfig(rank=3))
    sampler = sampler_of(running, adapted, tmp_path)
    for seed in range(2):
        change(adapted, seed)
        sampler.load(adapted)
        theirs, ours = torch.tensor(sampler._score(PROBE)), trainer_logprobs(adapted, PROBE)
        assert (theirs - ours).abs().max() < BOUND
        assert (ours - trainer_logprobs(policy_of_base, PROBE)).abs().mean() > 0.5, "the adapter acts"
    games = play(make_engine(sampler, adapted), 9).trajectories  # type: ignore[arg-type]
    assert_scored_right(adapted, games, 1.0, atol=BOUND)
    sampler.close()


def test_two_trainers_on_one_server_are_told(running: ServerProcess, tmp_path: Path) -> None:
    ours, theirs = base(), base()
    change(theirs, 7)
    sampler = sampler_of(running, ours, tmp_path / "ours")
    engine: Any = make_engine(sampler, ours)  # type: ignore[arg-type]
    sampler_of(running, theirs, tmp_path / "theirs").load(theirs)
    version = f"{theirs.fingerprint():08x}"
    with pytest.raises(SamplerError, match=rf"got tokens of \['{version}'\]: somebody else has changed the weights"):
        play(engine, 3)
    sampler.close()


def test_an_interrupted_call_leaves_nothing_behind(running: ServerProcess, tmp_path: Path) -> None:
    backbone = base()
    sampler = sampler_of(running, backbone, tmp_path)
    engine: Any = make_engine(sampler, backbone)  # type: ignore[arg-type]
    for slot in range(5):
        engine.observe(slot, [3, 7])
    engine.reset()
    assert engine.step() == []
    assert len(play(engine, 9).trajectories) == 9
    sampler.close()


def test_a_dead_server_is_a_clear_error_and_a_resumable_run(tmp_path: Path, one_thread_and_one_cache: None) -> None:
    sizes = TinyModel(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=48, max_positions=128)
    few: dict[str, Any] = {"checkpoint_every": 1, "eval": EvalConfig(every=0, games=4, final_games=4)}
    made = tiny_config(tmp_path / "made", iterations=0, model=ModelConfig(tiny=sizes, device="cpu"), **few)
    train(made, RunFolder(made.out), Listener())
    start = RunFolder(made.out).start

    server = ServerProcess(start, tmp_path / "log")

    class Killing(Listener):
        """At the third rollout the server goes down."""

        num_rollouts = 0

        def phase(self, name: str, total: int | None) -> None:
            self.num_rollouts += name == "rollout"
            if name == "rollout" and self.num_rollouts == 3:
                server.kill()

    rollout = RolloutConfig(games=8, num_slots=8, max_new_tokens=4, engine="vllm", vllm=VllmConfig(url=server.url))
    more = {"model": ModelConfig(path=str(start), device="cpu"), "rollout": rollout, **few}
    out = tmp_path / "run"
    with server:
        with pytest.raises(SamplerError, match=rf"vLLM server at {server.url} does not answer .*--resume goes on"):
            train(tiny_config(out, **more), RunFolder(out), Killing())
        with pytest.raises(ValueError, match="does not answer"):  # nothing is begun without it
            train(tiny_config(out, resume=True, **more), RunFolder(out), Listener())
        server.start()
        listener = Listener()
        summary = train(tiny_config(out, resume=True, **more), RunFolder(out), listener)
    assert any("after iteration 2, 16 games" in text for text in listener.messages), listener.messages
    assert summary["games"] == 32
    rows = read_rows(RunFolder(out).metrics)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4, 4]
    assert all(abs(row["mismatch_kl"]) < 1e-5 for row in rows if "mismatch_kl" in row)
    assert (out / "engine" / "model.safetensors").is_file()
