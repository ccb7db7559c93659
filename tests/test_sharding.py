"""Weights in parts over the ranks are those of one process: in its updates, in a run, in what a run goes on from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranked_updates import ITERATIONS, SHARDED, STEPS, model_of, updates
from test_ranks import assert_same_updates, ended, saved, start_ranks, train, wait_for
from test_train import rows_of, tiny_config

from archer_fast.backbone import load_backbone
from archer_fast.checkpoint import list_checkpoints, load_checkpoint
from archer_fast.config import CollapseConfig, Config, CriticConfig, LoRAConfig, ModelConfig, from_dict, to_dict
from archer_fast.ranks import ALONE
from archer_fast.run_folder import RunFolder
from archer_fast.saved_critic import load_saved_critic
from archer_fast.sharded_checkpoint import load_shards, save_shards
from archer_fast.sharding import is_sharded, local, sharded_like

pytestmark = pytest.mark.usefixtures("one_thread_and_one_cache")

HERE = Path(__file__).parent
SEPARATE = CriticConfig("separate", hidden_size=16, epochs=4, batch_turns=32, warmup_iterations=1)


# -- updates ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, made whole, and rows of every case, by rank."""
    folder = tmp_path_factory.mktemp("updates")
    ranks = start_ranks([str(HERE / "ranked_updates.py"), str(folder), "sharded"])
    for status, _, said in ended(ranks, 300):
        assert status == 0, said
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARDED)
def test_twenty_updates_are_those_of_one_process(in_parts: Path, case: str) -> None:
    config = SHARDED[case]
    rows, alone = updates(replace(config, model=replace(config.model, shard="none")), make_lm=model_of(case))
    assert sum(row["actor_steps"] for row in rows) == ITERATIONS * STEPS == 20
    assert_same_updates(in_parts, case, rows, alone)


def test_gradients_memory_and_skipped_steps() -> None:
    """What is asserted stands in the program."""
    for status, _, said in ended(start_ranks([str(HERE / "ranked_shards.py")])):
        assert status == 0, said


# -- whole runs ------------------------------------------------------------------------------------


def sharded(config: Config, shard: str = "full") -> Config:
    return replace(config, model=replace(config.model, shard=shard))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of two ranks each: one with weights in parts, and its twin with whole ones."""
    folder = tmp_path_factory.mktemp("sharded")
    config = tiny_config("x", critic=SEPARATE)
    for name, settings in (("parts", sharded(config)), ("whole", config)):
        found = train(folder / name, 2, *saved(settings, folder))
        assert [status for status, *_ in found] == [0, 0], found
        assert ("all weights are sharded over the ranks" in found[0][1]) == (name == "parts")
    return folder / "parts", folder / "whole"


def assert_near(found: Path, wanted: Path) -> None:
    """Rows of two runs: the same games, and what was learned from them within rounding."""
    pairs = list(zip(rows_of(found), rows_of(wanted), strict=True))
    assert len(pairs) > 4
    for row, other in pairs:
        assert row.keys() == other.keys()
        for name in row:
            if "seconds" not in name and not name.startswith("tokens_per_second"):
                assert row[name] == pytest.approx(other[name], rel=2e-3, abs=1e-4), name


def test_a_run_with_weights_in_parts_is_that_with_whole_ones(runs: tuple[Path, Path]) -> None:
    parts, whole = runs
    assert_near(parts, whole)
    for folder in ("final", "best"):
        ours, _ = load_backbone(str(parts / folder))
        theirs, _ = load_backbone(str(whole / folder))
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)


def test_what_is_in_parts_stands_in_no_other_file(runs: tuple[Path, Path]) -> None:
    parts, whole = (load_checkpoint(list_checkpoints(run / "checkpoints")[-1]) for run in runs)
    assert {file.name for file in parts.shards.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    assert not whole.shards.exists()
    found = load_shards(parts.shards, lambda name: whole.tensors[name])
    assert found.keys() | parts.tensors.keys() == whole.tensors.keys() and not found.keys() & parts.tensors.keys()
    assert {name.split(".")[1] for name in found} == {"own_trunk", "target_trunk", "actor", "critic"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, whole.tensors[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_two_ranks_one_process_two_ranks(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Whole weights or parts of them go on from either, as the run goes on that was never in parts."""
    for name, run in zip(("parts", "whole"), runs, strict=True):
        shutil.copytree(run, tmp_path / name)
    for iterations, size, shard in ((5, 1, "none"), (6, 2, "full"), (7, 2, "none"), (8, 2, "trained")):
        for name, kind in (("parts", shard), ("whole", "none")):
            options = ["--resume", "--iterations", str(iterations), "--model.shard", kind]
            found = train(tmp_path / name, size, *options)
            assert [status for status, *_ in found] == [0] * size, found
        assert_near(tmp_path / "parts", tmp_path / "whole")
    assert [row["games"] for row in rows_of(tmp_path / "parts") if "return" in row] == [8 * i for i in range(1, 9)]


def test_one_process_reads_the_critic(runs: tuple[Path, Path]) -> None:
    found = []
    for run in runs:
        checkpoint = list_checkpoints(run / "checkpoints")[-1]
        found.append(load_saved_critic(checkpoint, RunFolder(run).load_config()).critic.state_dict())
    assert found[0].keys() == found[1].keys() and any(name.startswith("own_trunk.") for name in found[0])
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        # A base in parts under the adapters of actor and critic; with a critic that chooses what is played.
        {"model": {"lora": LoRAConfig(rank=2)}, "critic": replace(SEPARATE, trunk="lora"), "best_of": 2},
        {"model": {"activation_checkpointing": True}, "critic": replace(SEPARATE, trunk="shared")},
        {"critic": replace(SEPARATE, trunk="frozen")},
    ],
    ids=["adapters", "shared trunk", "frozen trunk"],
)
def test_other_runs(settings: dict[str, Any], tmp_path: Path) -> None:
    model = replace(tiny_config("x").model, **settings.get("model", {}))
    config = tiny_config("x", critic=settings["critic"], model=model)
    config.rollout.best_of = settings.get("best_of", 1)
    for name, shard in (("parts", "full"), ("whole", "none")):
        config = sharded(config, shard)
        found = train(tmp_path / name, 2, *saved(config, tmp_path))
        assert [status for status, *_ in found] == [0, 0], found
    assert_near(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_torchrun(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """As a user starts it, and what trains alone in parts: the same run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = saved(sharded(tiny_config("x", critic=SEPARATE), "trained"), tmp_path)
    found = subprocess.run(
        [*command, "-m", "archer_fast", "train", "--out", str(tmp_path / "run"), *options],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    assert "weights that train are sharded over the ranks" in found.stdout
    assert_near(tmp_path / "run", runs[1])


@pytest.mark.slow
def test_a_policy_that_collapsed_is_given_back_in_parts(tmp_path: Path) -> None:
    """Every row counts as a collapse; weights and moments of best/ are whole, and divided again."""
    collapse = CollapseConfig(action="restore", window=1, max_kl=0.0)
    for name, shard in (("parts", "full"), ("whole", "none")):
        config = sharded(tiny_config("x", iterations=6, collapse=collapse), shard)
        first, second = train(tmp_path / name, 2, *saved(config, tmp_path))
        assert (first[0], second[0]) == (0, 0), first[2] + second[2]
        assert "the actor is again that of iteration" in first[1]
    assert_near(tmp_path / "parts", tmp_path / "whole")


def start(tmp_path: Path, out: Path) -> list[Any]:
    config = sharded(tiny_config("x", critic=SEPARATE, iterations=1000, checkpoint_every=1))
    return start_ranks(["-m", "archer_fast", "train", "--out", str(out), *saved(config, tmp_path)])


def resumes(out: Path) -> None:
    iterations = load_checkpoint(list_checkpoints(out / "checkpoints")[-1]).number("iteration")
    found = train(out, 2, "--resume", "--iterations", str(iterations + 1))
    assert [status for status, *_ in found] == [0, 0], found


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first, second = start(tmp_path, out)
    wait_for(lambda: list_checkpoints(out / "checkpoints"), first)
    second.kill()
    (status, _, said), _ = ended([first, second], 60)
    assert status == 1
    assert "archer-fast: error: rank 0 of 2 has lost another one: " in said and "Traceback" not in said
    resumes(out)


@pytest.mark.slow
@pytest.mark.parametrize("seen", [".shards.writing/*.distcp", ".iteration-*/shards", ".iteration-*/state.safetensors"])
def test_killed_while_a_checkpoint_is_written(tmp_path: Path, seen: str) -> None:
    out = tmp_path / "run"
    ranks = start(tmp_path, out)
    wait_for(lambda: len(list_checkpoints(out / "checkpoints")) == 2, ranks[0])
    wait_for(lambda: list((out / "checkpoints").glob(seen)), ranks[0])
    for rank in ranks:
        rank.kill()
    ended(ranks)
    for checkpoint in list_checkpoints(out / "checkpoints"):
        assert load_checkpoint(checkpoint).shards.is_dir(), "every checkpoint that has a name is whole"
    resumes(out)


# -- what cannot be --------------------------------------------------------------------------------


def test_one_process_shares_with_nobody(tmp_path: Path) -> None:
    ((status, _, said),) = train(tmp_path / "run", 1, *saved(sharded(tiny_config("x")), tmp_path))
    assert status == 2
    wanted = "model.shard: wanted none with one process, got full; start several with torchrun"
    assert wanted in said and "Traceback" not in said


def test_what_trains_are_adapters() -> None:
    with pytest.raises(ValueError, match=r"shard: wanted none or full with adapters, .* got trained"):
        ModelConfig(lora=LoRAConfig(rank=2), shard="trained")
    values = to_dict(Config()) | {"model": to_dict(ModelConfig()) | {"shard": "half"}}
    with pytest.raises(ValueError, match="shard: wanted one of 'none', 'trained', 'full', got 'half'"):
        from_dict(Config, values)


# -- shards in files, alone ------------------------------------------------------------------------


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {"a.x": torch.arange(6.0).view(3, 2), "b.y": torch.tensor([1.5])}


def refuse(name: str) -> torch.Tensor:
    raise KeyError(name)


def test_what_was_saved_is_loaded(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "of_a_killed_run").touch()
    save_shards(tmp_path / "shards", tensors, ALONE)
    assert not (tmp_path / "shards" / "of_a_killed_run").exists()
    found = load_shards(tmp_path / "shards", lambda name: torch.empty_like(tensors[name]))
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], x) for name, x in tensors.items())
    found = load_shards(tmp_path / "shards", lambda name: torch.empty_like(tensors[name]), prefix="b.")
    assert found.keys() == {"b.y"}


@pytest.mark.parametrize(
    ("like", "error", "message"),
    [(lambda name: torch.empty(7), ValueError, "shards: .*"), (refuse, KeyError, "a.x")],
    ids=["another shape", "another name"],
)
def test_what_was_saved_is_something_else(
    tensors: dict[str, torch.Tensor],
    like: Callable[[str], torch.Tensor],
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    save_shards(tmp_path / "shards", tensors, ALONE)
    with pytest.raises(error, match=message):
        load_shards(tmp_path / "shards", like)


def test_a_damaged_shard(runs: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    shard = list_checkpoints(tmp_path / "run" / "checkpoints")[-1] / "shards" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    found = train(tmp_path / "run", 2, "--resume", "--iterations", "5")
    assert all(status != 0 for status, *_ in found)
    assert "__1_0.distcp: its content is not what was written" in found[0][2] and "Traceback" not in found[0][2]


def test_what_is_whole_stays_what_it_is() -> None:
    x = torch.ones(3)
    assert not is_sharded(x) and local(x) is x and sharded_like(x, torch.zeros(3)) is x
    assert json.loads(json.dumps(to_dict(ModelConfig())))["shard"] == "none"
