"""Several processes are one run: the updates of one process, alike on every rank, resumable by any number of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranked_updates import CASES, ITERATIONS, STEPS, updates
from safetensors.torch import load_file
from test_train import assert_same_run, rows_of, tiny_config

from archer_fast.buffer import TrajectoryBuffer
from archer_fast.checkpoint import list_checkpoints, load_checkpoint
from archer_fast.config import CollapseConfig, StallConfig, to_dict
from archer_fast.ranks import Ranks, joined_ranks, local_device

pytestmark = pytest.mark.usefixtures("one_thread_and_one_cache")


def start_ranks(arguments: list[str], size: int = 2, others: list[str] | None = None) -> list[subprocess.Popen[str]]:
    """As torchrun starts them, without its agent, which would end the others where one has failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *(others if others and rank else arguments)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ended(ranks: list[subprocess.Popen[str]], seconds: float = 120) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each."""
    said = [rank.communicate(timeout=seconds) for rank in ranks]
    return [(rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)]


# -- updates ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and rows of every case, by rank."""
    folder = tmp_path_factory.mktemp("updates")
    for status, _, said in ended(start_ranks([str(Path(__file__).parent / "ranked_updates.py"), str(folder)])):
        assert status == 0, said
    return folder


# Of a share's games alone are standard deviations, extrema and what is not linear: their means are told.
EXACT = ("actor_loss", "actor_entropy", "actor_grad_norm", "kl", "clip_fraction", "mismatch_kl", "advantage_trust")
EXACT += ("critic_loss", "q_loss", "v_loss", "q_mean", "v_mean", "critic_grad_norm", "value_grad_norm", "eval_kl")


@pytest.mark.parametrize("case", CASES)
def test_twenty_updates_are_those_of_one_process(on_two_ranks: Path, case: str) -> None:
    rows, alone = updates(CASES[case])
    assert_same_updates(on_two_ranks, case, rows, alone)
    assert (sum(row["actor_steps"] for row in rows) < ITERATIONS * STEPS == 20) == (case == "stops early")


def assert_same_updates(
    on_two_ranks: Path, case: str, rows: list[dict[str, float]], alone: dict[str, torch.Tensor]
) -> None:
    """Both ranks have told the same, and that what one process has."""
    first, second = (load_file(on_two_ranks / f"{case}-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() == alone.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name}: the ranks have parted"
        torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

    told, also = (json.loads((on_two_ranks / f"{case}-{rank}.json").read_text()) for rank in (0, 1))
    assert told == also and len(rows) == ITERATIONS
    for row, wanted in zip(told, rows, strict=True):
        assert row.keys() == wanted.keys()
        for name in EXACT:
            if name in wanted:
                assert row[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-5), name
        for name in ("actor_steps", "skipped_steps", "useful_tokens"):
            assert row[name] == wanted[name], name


# -- whole runs ------------------------------------------------------------------------------------


def train(out: Path, size: int, *options: str) -> list[tuple[int, str, str]]:
    return ended(start_ranks(["-m", "archer_fast", "train", "--out", str(out), *options], size))


def saved(config: Any, folder: Path) -> list[str]:
    file = folder / "settings.json"
    file.write_text(json.dumps(to_dict(config)))
    return ["--config", str(file)]


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    first, second = train(folder / "whole", 2, *saved(tiny_config("x"), folder))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "2 ranks: games, passes and sampling are shared" in first[1] and second[1] == ""
    return folder / "whole"


def test_a_run_of_two_ranks_is_one_run(run_of_two: Path) -> None:
    rows = [row for row in rows_of(run_of_two) if "return" in row]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert [row["games"] for row in rows] == [8, 16, 24, 32]
    buffer = TrajectoryBuffer.load(load_checkpoint(list_checkpoints(run_of_two / "checkpoints")[-1]).buffer)
    assert len(buffer) == 32, "each rank has played its share and no more"
    assert (run_of_two / "games_before.txt").read_text().count("[return") == 5
    summary = json.loads((run_of_two / "summary.json").read_text())
    assert summary["games"] == 32
    assert (run_of_two / "report.html").exists() and not list(run_of_two.glob("stalls*"))


def wait_for(found: Callable[[], object], rank: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline and rank.poll() is None, rank.communicate()
        time.sleep(0.02)


@pytest.mark.slow
def test_it_goes_on_bit_by_bit(run_of_two: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ranks = start_ranks(["-m", "archer_fast", "train", "--out", str(out), *saved(tiny_config("x"), tmp_path)])
    wait_for(lambda: list_checkpoints(out / "checkpoints"), ranks[0])
    for rank in ranks:
        rank.kill()
    ended(ranks)
    assert not (out / "summary.json").exists(), "killed too late to tell anything"
    assert [status for status, *_ in train(out, 2, "--resume")] == [0, 0]
    assert_same_run(run_of_two, out)


@pytest.mark.slow
def test_any_number_of_ranks_goes_on(run_of_two: Path, tmp_path: Path) -> None:
    shutil.copytree(run_of_two, tmp_path / "run")
    for size, iterations in ((1, 5), (2, 6)):
        found = train(tmp_path / "run", size, "--resume", "--iterations", str(iterations))
        assert [status for status, *_ in found] == [0] * size, found
    rows = [row for row in rows_of(tmp_path / "run") if "return" in row]
    assert [row["games"] for row in rows] == [8, 16, 24, 32, 40, 48]


def test_a_killed_rank_ends_the_others_and_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tiny_config("x", iterations=1000, checkpoint_every=1)
    first, second = start_ranks(["-m", "archer_fast", "train", "--out", str(out), *saved(config, tmp_path)])
    wait_for(lambda: list_checkpoints(out / "checkpoints"), first)
    second.kill()
    (status, _, said), _ = ended([first, second], 30)
    assert status == 1
    assert "archer-fast: error: rank 0 of 2 has lost another one: " in said and "Traceback" not in said
    iterations = load_checkpoint(list_checkpoints(out / "checkpoints")[-1]).number("iteration")
    found = train(out, 2, "--resume", "--iterations", str(iterations + 1))
    assert [status for status, *_ in found] == [0, 0], found


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others_in_the_time_that_is_set(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tiny_config("x", iterations=1000, checkpoint_every=1, stall=StallConfig(seconds=1, rank_seconds=4))
    first, second = start_ranks(["-m", "archer_fast", "train", "--out", str(out), *saved(config, tmp_path)])
    wait_for(lambda: list_checkpoints(out / "checkpoints"), first)
    second.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    said = first.communicate(timeout=60)
    waited = time.monotonic() - begin
    second.kill()
    second.communicate()
    assert first.returncode == 1 and "rank 0 of 2 has lost another one" in said[1]
    assert waited > 3
    assert "no movement" not in said[0], "who waits for another rank does not stall"


@pytest.mark.slow
def test_the_others_are_told_why_a_rank_has_failed(tmp_path: Path) -> None:
    config = tiny_config("x")
    failing = """
import os, sys
import archer_fast.algorithms.archer as archer
from archer_fast.cli import main
if os.environ["RANK"] == "1":
    def fail(*_): raise ZeroDivisionError("of rank 1")
    archer.Archer.update_actor = fail
main(["train", *sys.argv[1:]])
"""
    options = ["--out", str(tmp_path / "run"), *saved(config, tmp_path)]
    first, second = ended(start_ranks(["-c", failing, *options]))
    assert (first[0], second[0]) == (1, 1)
    assert "ZeroDivisionError: of rank 1" in second[2]
    assert "rank 0 of 2 has lost another one: rank 1: ZeroDivisionError: of rank 1" in first[2]


@pytest.mark.slow
def test_a_policy_that_collapsed_is_given_back_on_all(tmp_path: Path) -> None:
    """Every row counts as a collapse: what the actors are after it is compared in every step, bit by bit."""
    collapse = CollapseConfig(action="restore", window=1, max_kl=0.0)
    config = tiny_config("x", iterations=6, collapse=collapse)
    first, second = train(tmp_path / "run", 2, *saved(config, tmp_path))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "the actor is again that of iteration" in first[1]


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_and_ends_all(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tiny_config("x", iterations=1000, checkpoint_every=1000)
    ranks = start_ranks(["-m", "archer_fast", "train", "--out", str(out), *saved(config, tmp_path)])
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(rows_of(out)) > 2, ranks[0])
    ranks[1].send_signal(signal.SIGINT)
    ranks[1].send_signal(signal.SIGINT)  # as torchrun hands on what the terminal has sent already
    first, second = ended(ranks, 60)
    assert (first[0], second[0]) == (130, 130), first[2] + second[2]
    assert "go on with: archer-fast train --resume" in first[2]
    assert list_checkpoints(out / "checkpoints")


# -- what cannot be --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fault_of_the_first_rank_ends_all(run_of_two: Path) -> None:
    first, second = train(run_of_two, 2)
    assert (first[0], second[0]) == (2, 1)
    assert "holds a finished run" in first[2] and "holds a finished run" in second[2]
    assert "Traceback" not in first[2] + second[2]


def test_more_ranks_than_games(tmp_path: Path) -> None:
    config = tiny_config("x")
    config.actor.batch_games = 1
    first, second = train(tmp_path / "run", 2, *saved(config, tmp_path))
    assert (first[0], second[0]) == (2, 2)
    assert "batch_games: wanted a game a rank at least, 2, got 1" in first[2]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: wanted a number in the environment, got 'two'; start with torchrun"),
        ({"WORLD_SIZE": "2"}, "RANK: wanted a number in the environment, got None"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, r"RANK: wanted 0 to 1 \(WORLD_SIZE is 2\), got 2"),
    ],
)
def test_an_environment_that_makes_no_sense(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), joined_ranks():
        pass


def test_games_are_dropped_by_the_share_of_all(tmp_path: Path) -> None:
    """Two of 20: a tenth of all, but a fifth of one rank's."""
    found = ended(start_ranks([str(Path(__file__).parent / "ranked_games.py"), "0.1"]))
    assert [status for status, *_ in found] == [0, 0], found
    assert {said.strip() for _, said, _ in found} == {"18 games, 2 dropped"}
    found = ended(start_ranks([str(Path(__file__).parent / "ranked_games.py"), "0.05"]))
    assert [status for status, *_ in found] == [1, 1]
    assert all("2 of 20 games dropped" in said for *_, said in found)


@pytest.mark.slow
def test_settings_that_differ(tmp_path: Path) -> None:
    ranks = []
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        options = saved(tiny_config("x", iterations=4 + rank), tmp_path / str(rank))
        ranks.append(["-m", "archer_fast", "train", "--out", str(tmp_path / "run"), *options])
    found = ended(start_ranks(ranks[0], others=ranks[1]))
    assert [status for status, *_ in found] == [2, 2]
    assert all("settings: wanted the same on all ranks, got" in said for *_, said in found)


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        found = subprocess.run(
            [sys.executable, "-m", "archer_fast", "train", "--out", str(tmp_path / "run")],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert f"archer-fast: error: rank 0 of 2 cannot join the others at 127.0.0.1:{port}: " in found.stderr


# -- alone, and by hand ----------------------------------------------------------------------------


@pytest.fixture
def three() -> Iterator[list[Ranks]]:
    yield [Ranks(rank, 3) for rank in range(3)]


def test_shares_are_all_and_none_twice(three: list[Ranks]) -> None:
    shares = [list(rank.share(range(8))) for rank in three]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_random_numbers_of_ranks_are_their_own(three: list[Ranks]) -> None:
    assert three[0].seed(7, 1) == 7, "as alone"
    others = [rank.seed(seed, *more) for rank in three[1:] for seed in (0, 7) for more in ((), (0,), (1,))]
    assert len({*others, 0, 7}) == 14
    assert others == [rank.seed(seed, *more) for rank in three[1:] for seed in (0, 7) for more in ((), (0,), (1,))]
    torch.Generator().manual_seed(max(others))


def test_alone_nothing_is_sent() -> None:
    alone, x = Ranks(), torch.tensor([1.0, 2.0])
    assert alone.sum(x) is x and alone.gather("a") == ["a"]
    assert alone.led(lambda: 5) == 5 and not alone.any(False)


def test_a_rank_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device(torch.device("cuda")) == torch.device("cuda:1")
    assert (
        local_device(torch.device("cuda:0")) == torch.device("cuda:0")
        and local_device(torch.device("cpu")).type == "cpu"
    )
    assert chosen == [1], "and every allocation that names no device goes there"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="LOCAL_RANK: wanted at most 1, as there are GPUs, got 2"):
        local_device(torch.device("cuda"))
