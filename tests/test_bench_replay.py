"""The benchmarks of the buffer: all of a page on tiny sizes, who is refused, and what a batch is compared with."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHES = tuple(f"benchmarks/bench_{name}.py" for name in ("replay", "bandwidth", "targets"))

# Ours, one that lacks its package, one whose batches are of other transitions than they say, one that breaks.
FAKES = """
from functools import partial
from buffer_rivals import RIVALS as REAL, Rival
from store_arena import ArenaStore

class Wrong(ArenaStore):
    def sample_collate_packed(self, n):
        batch = super().sample_collate_packed(n)
        batch.input_ids[-1] += 1
        return batch

class Broken(ArenaStore):
    def sample_collate_packed(self, n):
        raise RuntimeError("no such | transition")

RIVALS = (
    *(rival for rival in REAL if rival.is_ours),
    Rival("absent", ArenaStore, "absent", "no_such_module"),
    Rival("wrong", Wrong, "wrong"),
    Rival("broken", Broken, "broken"),
)
"""


def run_benchmarks(page_file: Path, *args: str, python_path: Path | None = None) -> str:
    """What the command prints; one thread, as other tests of benchmarks."""
    command = [sys.executable, "-m", "pytest", "-q", *BENCHES, "--benchmark-only"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--buffer-sizes", "tiny", "--buffer-table", str(page_file), *args],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(python_path)} if python_path else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def tables(page: str) -> dict[str, list[dict[str, str]]]:
    """Section title -> its rows by column."""
    found = {}
    for section in page.split("\n## ")[1:]:
        title, *lines = section.splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        header, _, *body = rows
        found[title] = [dict(zip(header, row, strict=True)) for row in body]
    return found


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """module("buffer_work") imports benchmarks/buffer_work.py."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_one_command_prints_and_writes_the_page(tmp_path: Path) -> None:
    page_file = tmp_path / "docs" / "page.md"
    printed = run_benchmarks(page_file)
    page = page_file.read_text()
    assert page in printed
    assert "Name (time in" not in printed  # pytest-benchmark's own table of the same
    for fact in ("machine", "commit", "command", "date", "caches", "versions", "peers"):
        assert re.search(rf"^- {fact}: \S", page, re.MULTILINE), fact
    assert "benchmarks/bench_replay.py" in page.split("\n## ")[0]

    stores, conditions, bandwidth, targets = tables(page).values()
    missing = [peer for peer in ("torchrl", "cpprb") if importlib.util.find_spec(peer) is None]
    who = [row["who"] for row in stores]
    assert len(who) == 13 and len({row["who"] for row in conditions}) == 14
    for row, measured in zip(stores, conditions, strict=False):
        if row["remarks"].startswith("not installed"):
            assert row["who"].split(",")[0] in missing and row["packed ms"] == measured["cold ms"] == "", row
            continue
        assert float(row["packed ms"]) > 0 and float(row["M tokens/s"].replace(",", "")) > 0, row
        assert float(row["bytes a token"]) >= float(row["without log-probs"]) > 4, row
        assert float(measured["cold ms"]) > 0 and float(measured["busy, packed ms"]) > 0, measured
        has_threads = row["who"].startswith(("ours", "original", "torchrl, tensors", "torchrl, memmap"))
        assert (measured["hot, 2 threads ms"] != "") == has_threads, measured
    assert sum(row["remarks"].startswith("not installed") for row in stores) == 4 * ("torchrl" in missing) + 2 * (
        "cpprb" in missing
    )
    assert next(row["x ours"] for row in stores if row["who"] == "ours, memory kept") == "1.0"
    assert conditions[-1]["who"] == "memcpy" and conditions[-1]["cold share"].endswith(" GB/s")

    assert [row["buffer"] for row in bandwidth[24:]] == ["memcpy", "memcpy"]
    for row in bandwidth[:24]:
        share = float(row["share"].rstrip("%")) / 100
        assert share == pytest.approx(float(row["GB/s"]) / float(row["memcpy GB/s"]), abs=0.05, rel=0.2), row
    assert len(targets) == 15 + 5 - 2 * ("cpprb" in missing)
    assert all(row[""] in ("met", "**missed**") for row in targets)


def test_wrong_broken_and_missing_rivals_are_reported_and_not_timed(tmp_path: Path) -> None:
    (tmp_path / "fake_rivals.py").write_text(FAKES)
    page_file = tmp_path / "page.md"
    run_benchmarks(page_file, "--buffer-rivals", "fake_rivals", "-k", "insert or packed-1-hot", python_path=tmp_path)
    rows = {row["who"]: row for row in tables(page_file.read_text())["Stores"]}
    assert float(rows["ours, memory kept"]["packed ms"]) > 0
    for name, remark in (
        ("absent", "not installed (pip install archer-fast[bench])"),
        ("wrong", "WRONG: its batch is not the work's, not timed"),
        ("broken", "cannot run here: RuntimeError: no such / transition"),
    ):
        assert rows[name]["remarks"] == remark
        assert rows[name]["packed ms"] == rows[name]["M tokens/s"] == rows[name]["bytes a token"] == ""


def test_the_work_and_its_parts(module: Any) -> None:
    """What stands for a transition is what the trajectory buffer makes of the games."""
    work = module("buffer_work").make_work(130)
    assert 18 < work.num_tokens / work.num_transitions < 23
    from archer_fast.buffer import TrajectoryBuffer

    buffer = TrajectoryBuffer(1 << 20, 1000)
    parts = list(work.parts())
    assert [part.num_games for part in parts] == [128, 2]
    for part in parts:
        buffer.extend_arrays(part.arrays)
    numbers = [0, 1, 19, 20, 2559, 2560, 2599]
    batch = buffer.collate_transitions(numbers)
    for i, number in enumerate(numbers):
        transition = work.transition(number)
        np.testing.assert_array_equal(transition.next_state, batch.input_ids[slice(*batch.cu_seqlens[i : i + 2])])
        state_end, action_end = batch.state_positions[i] + 1, batch.action_positions[i] + 1
        np.testing.assert_array_equal(transition.action, batch.input_ids[state_end:action_end])
        assert transition.state.size == state_end - batch.cu_seqlens[i]
        assert (transition.reward, transition.terminated) == (number, batch.terminated[i])
        part = parts[number // 2560]
        assert part.transition(number).next_state.tolist() == transition.next_state.tolist()
    assert {bool(end) for end in work.terminated[19::20]} == {True, False}


def test_a_batch_of_other_tokens_is_refused(module: Any) -> None:
    batches, work = module("buffer_batches"), module("buffer_work").make_work(3)
    right = [work.transition(7), work.transition(59)]
    batches.check_transitions(right, work, 2)
    for wrong in (
        right[:1],
        [right[0], right[1]._replace(state=right[0].state)],
        [right[0], right[1]._replace(rollout_logprobs=right[1].rollout_logprobs + 1)],
        [right[0], right[1]._replace(terminated=not right[1].terminated)],
    ):
        with pytest.raises(AssertionError):
            batches.check_transitions(wrong, work, 2)


def test_texts_are_the_work_s_tokens(module: Any) -> None:
    work = module("buffer_work").make_work(3)
    texts = module("store_original").experiences(work)
    assert len(texts) == 60
    for number in (0, 19, 41):
        transition, text = work.transition(number), texts[number]
        for tokens, words in zip(transition[:3], (text.observation, text.action, text.next_observation), strict=True):
            assert work.words.tokenizer.encode(words).ids == tokens.tolist()
    assert texts[0].next_observation is texts[1].observation


def test_share_of_a_copy(module: Any) -> None:
    """Half the bytes in half the time is the memcpy's speed; the same time for half the bytes is half of it."""
    rows = module("replay_report")
    copied = rows.Copied(1000, 1e-6)
    assert rows.share(500, 0.5e-6, copied) == pytest.approx(1.0)
    assert rows.share(500, 1e-6, copied) == pytest.approx(0.5)
