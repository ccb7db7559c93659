"""The benchmarks of the ops: all of a page on tiny shapes, what is refused, how memory is seen, what is counted."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A rival that holds 100 MB while it works, one that is wrong, one that breaks and one that is not installed.
FAKES = """
import torch
import lm_head_rivals as real
from lm_head_rivals import Rival, per_token

def right(hidden, weight, target_ids):
    return (hidden @ weight.T).log_softmax(1).gather(1, target_ids[:, None]).squeeze(1)

def fat(hidden, weight, target_ids):
    held = torch.ones(100 << 18)
    return right(hidden, weight, target_ids) + 0 * held[0]

def without_gradient(hidden, weight, target_ids):
    return right(hidden, weight.detach(), target_ids)

def broken(hidden, weight, target_ids):
    raise RuntimeError("no such | device")

RIVALS = (
    real.RIVALS[0],
    Rival("fat", lambda: {"": per_token(fat)}),
    Rival("lean", lambda: {"": per_token(right)}),
    Rival("off", lambda: {"": per_token(lambda h, w, t: right(h, w, t) * 1.001)}),
    Rival("forgetful", lambda: {"": per_token(without_gradient)}, works=("train",)),
    Rival("broken", lambda: {"": per_token(broken)}),
    Rival("absent", lambda: {}, "no_such_module", "no-such-package"),
)
"""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> object:
    """module("roofline") imports benchmarks/roofline.py."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def start_benchmarks(
    *args: str | Path, device: str = "cpu", python_path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """On one thread: tiny matrices on two wait for one another on a busy machine."""
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-only", "--ops-sizes", "tiny", "--ops-seconds", "0"]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", "--ops-device", device, *map(str, args)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(python_path)} if python_path else {}),
        capture_output=True,
        text=True,
        check=False,
    )


def run_benchmarks(*args: str | Path, device: str = "cpu", python_path: Path | None = None) -> str:
    """What the command prints."""
    done = start_benchmarks(*args, device=device, python_path=python_path)
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


def test_one_command_prints_and_writes_the_page(tmp_path: Path) -> None:
    page_file = tmp_path / "docs" / "page.md"
    benches = ("benchmarks/bench_ops.py", "benchmarks/bench_scans.py")
    printed = run_benchmarks(*benches, "--ops-no-memory", "--ops-table", page_file)
    page = page_file.read_text()
    assert page in printed
    assert "Name (time in" not in printed  # pytest-benchmark's own table of the same
    for fact in ("machine", "commit", "command", "date", "torch", "peers"):
        assert re.search(rf"^- {fact}: \S", page, re.MULTILINE), fact
    assert "benchmarks/bench_ops.py" in page.split("\n## ")[0]

    measured, counted, scans = tables(page).values()
    who = [row["who"].split(" [")[0] for row in measured]
    for name in ("floor: bare products", "ops.linear_logprobs", "ops.linear_policy_loss", "torch linear_cross_entropy"):
        assert who.count(name) == (4 if name == "ops.linear_policy_loss" else 6), name
    peers = ("liger_kernel", "cut_cross_entropy", "trl")
    for row in measured:
        if row["remarks"]:
            assert "not installed (pip install archer-fast[bench])" in row["remarks"], row
            continue
        assert float(row["ms"]) >= 0 and float(row["x floor"]) > 0, row
        if not row["who"].startswith("floor"):
            assert 0 < float(row["error log-probs"]) < 1e-5, row
            assert (row["error gradients"] == "") == row["work"].startswith("log-probs"), row
            assert (row["of all rows"] == "") == (row["rows"] == "100%"), row
    missing = sum(importlib.util.find_spec(peer) is None for peer in peers)
    assert sum(row["remarks"] != "" for row in measured) == 6 * missing

    assert len(counted) == 18 and all(float(row["H100 SXM ms at least"]) > 0 for row in counted)
    timed = {(row["tokens"], row["who"]): row for row in scans if row["ms"]}
    assert float(timed["32 x 128", "ops.segment_scan"]["of memory"].rstrip("%")) > 0
    assert float(timed["1 x 4,096", "ops.segment_scan"]["error"]) < 1e-5
    assert "timed on 1/100, scaled" in timed["32 x 128", "Python loop over tokens"]["remarks"]
    # Powers beyond float32: refused, and said.
    (powers,) = (r for r in scans if r["tokens"] == "1 x 4,096" and r["who"] == "torch.cumsum of powers")
    assert powers["ms"] == "" and powers["remarks"].startswith("WRONG"), powers


@pytest.mark.gpu
def test_the_same_page_of_a_gpu(tmp_path: Path) -> None:
    import torch

    page_file = tmp_path / "page.md"
    run_benchmarks("benchmarks/bench_ops.py", "benchmarks/bench_scans.py", "--ops-table", page_file, device="cuda")
    page = page_file.read_text()
    assert f"- GPU: {torch.cuda.get_device_name()}" in page
    measured, _, scans = tables(page).values()
    for row in [*measured, *scans]:
        if row.get("who", "").startswith(("ops.", "advantages.")):
            assert float(row["ms"]) > 0 and not row["remarks"].startswith("WRONG"), row


def test_a_gpu_that_is_not_there_is_refused() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU; runs where there is none, as in `make test` on most machines")
    done = start_benchmarks("benchmarks/bench_ops.py", device="cuda")
    assert done.returncode != 0 and "--ops-device cuda: wanted a GPU that torch can use, got none" in done.stderr


def test_wrong_broken_and_missing_rivals_are_reported_and_memory_is_seen(tmp_path: Path) -> None:
    (tmp_path / "fake_rivals.py").write_text(FAKES)
    page_file = tmp_path / "page.md"
    run_benchmarks(
        *("benchmarks/bench_ops.py", "--ops-rivals", "fake_rivals", "--ops-table", page_file, "-k", "1.0-train"),
        python_path=tmp_path,
    )
    rows = {row["who"]: row for row in tables(page_file.read_text())["Vocabulary ops, measured"]}
    assert float(rows["ops.linear_policy_loss"]["ms"]) > 0
    assert 100 <= int(rows["fat"]["extra MB"]) <= 104, rows["fat"]
    assert int(rows["lean"]["extra MB"]) <= 4, rows["lean"]
    for name, remark in (
        ("off", "WRONG: off by 1.0e-03, not timed"),
        ("forgetful", "WRONG: off by inf, not timed"),
        ("broken", "cannot run here: RuntimeError: no such / device"),
        ("absent", "not installed (pip install archer-fast[bench])"),
    ):
        assert rows[name]["remarks"] == remark
        assert rows[name]["ms"] == rows[name]["x floor"] == rows[name]["extra MB"] == ""


def test_counted_steps_against_numbers_by_hand(module: object) -> None:
    """N, H, V = 2, 3, 5 in one chunk: a product is 60 operations; bf16 hidden 12 bytes, weight 30, fp32 logits 40."""
    roofline = module("roofline")  # type: ignore[operator]
    shape = roofline.Shape(2, 3, 5)
    policy = {s.name: (s.flops, s.bytes) for s in roofline.policy_loss(shape, chunks=1)}
    assert policy == {
        "logits": (60, 12 + 30 + 40),
        "scores": (0, 40),
        "dlogits": (0, 40 + 20),
        "dHidden": (60, 20 + 30 + 12),
        "dWeight": (60, 20 + 12 + 60),
        "dWeight to bf16": (0, 60 + 30),
        "gradients scaled": (0, 2 * 12 + 2 * 30),
    }
    assert roofline.totals(roofline.policy_loss(shape, 1))[:2] == (180, 82 + 40 + 60 + 62 + 92 + 90 + 84)
    # The logits are made twice, and nothing is kept to be scaled.
    assert roofline.totals(roofline.per_token(shape, 1))[:2] == (240, 2 * 82 + 40 + 60 + 62 + 92 + 90)
    # bf16 logits 20; float32 copies of 40: to float32, log_softmax, zeros, backward, back to bf16.
    assert roofline.totals(roofline.eager(shape))[:2] == (180, 62 + 60 + 80 + 40 + 120 + 60 + 62 + 62)
    # Each further chunk reads the weight twice more, and the float32 sum of dWeight once and writes it.
    one, three = (roofline.totals(roofline.policy_loss(shape, chunks)).bytes for chunks in (1, 3))
    assert three - one == 2 * (2 * 30 + 2 * 60)


def test_roofline_time_is_the_slower_of_arithmetic_and_traffic(module: object) -> None:
    roofline = module("roofline")  # type: ignore[operator]
    a100, h100 = roofline.CHIPS
    assert (a100.flops, a100.bandwidth, h100.flops, h100.bandwidth) == (312e12, 2.0e12, 989e12, 3.35e12)
    assert roofline.Step("product", 312 * 10**9, 10**9).seconds(a100) == pytest.approx(1e-3)
    assert roofline.Step("copy", 0, 4 * 10**9).seconds(a100) == pytest.approx(2e-3)
    steps = (roofline.Step("product", 312 * 10**9, 10**9), roofline.Step("copy", 0, 4 * 10**9))
    assert roofline.totals(steps).seconds[0] == pytest.approx(3e-3)
    # 3 products of 2 * 8192 * 4096 * 152064 operations: 98.1 ms of arithmetic on an A100.
    total = roofline.totals(roofline.policy_loss(roofline.Shape(8192, 4096, 152_064), chunks=5))
    assert total.flops == 3 * 2 * 8192 * 4096 * 152_064
    assert 98.1e-3 < total.seconds[0] < 110e-3


def test_errors_of_a_solution(module: object) -> None:
    """2-norms, relative; a missing gradient is infinitely wrong and NaN does not pass for right."""
    import torch

    case = module("lm_head_case")  # type: ignore[operator]
    truth = case.Solution(*(torch.tensor(x, dtype=torch.float64) for x in (2.0, [3.0, 4.0], [[1.0]], [[2.0]])))
    near = case.Solution(*(torch.tensor(x) for x in (2.5, [3.0, 4.5], [[1.25]], [[2.0]])))
    found = case.errors(near, truth, "train")
    assert (found.logprobs, found.gradients, found.loss) == pytest.approx((0.1, 0.25, 0.25))
    assert found.worst == 0.25
    assert case.errors(near._replace(d_weight=None), truth, "train").worst == float("inf")
    assert case.errors(near._replace(d_weight=None), truth, "frozen").worst == 0.25
    nan = torch.tensor([[float("nan")]])
    for wrong in (near._replace(d_hidden=nan), near._replace(d_weight=nan)):
        assert not case.errors(wrong, truth, "train").worst < 1


def test_truth_of_the_case_is_autograd_s(module: object) -> None:
    """In pieces or whole, and dHidden is 0 where nobody scores."""
    import torch

    cases = module("lm_head_case")  # type: ignore[operator]
    case = cases.make_case(cases.Shape(40, 6, 23), 0.37)
    assert case.num_rows == 15
    truth = cases.float64_truth(case)
    case.clear_gradients()
    logprobs = torch.nn.functional.cross_entropy(
        case.hidden[case.rows] @ case.weight.T, case.target_ids, reduction="none"
    ).neg()
    loss = -(case.advantages * logprobs).sum() / 15
    loss.backward()
    found = cases.errors(cases.Solution(loss, logprobs, case.hidden.grad, case.weight.grad), truth, "train")
    assert found.worst < 1e-5
    unscored = torch.ones(40, dtype=torch.bool).index_fill(0, case.rows, False)
    assert truth.d_hidden[unscored].abs().sum() == 0
