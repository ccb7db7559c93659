"""`linear_logprobs` and `linear_policy_loss` beside bare matrix products and everybody else who does the same.

.venv/bin/pytest benchmarks/bench_ops.py benchmarks/bench_scans.py --benchmark-only --ops-table docs/ops_benchmarks.md
"""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from dataclasses import asdict
from typing import Any, NamedTuple

import pytest
import torch
from interleaved import seconds_in_turn, synchronize, time_against
from lm_head_case import (
    FRACTIONS,
    SHAPES,
    WORKS,
    Case,
    Errors,
    Floor,
    Shape,
    Solution,
    Work,
    errors,
    float64_truth,
    make_case,
)
from lm_head_rivals import Rival, Solver, Unavailable, brief, solve
from ops_rows import OpsRow, counted_section, ops_section
from page_sections import DEVICE, SECTIONS, SHOWN_HERE
from peak_memory import extra_bytes_in_fresh_process, extra_device_bytes

# Other people's packages may warn.
pytestmark = pytest.mark.filterwarnings("default")

# float32 on these shapes is right to some 1e-6, bfloat16 to some 1e-2.
WRONG_FROM = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
SHARE_ROUNDS = 5
SAME_SPEED = 1.2  # a setting this much slower than the fastest in one call is not tried again


class Wrong(Exception):
    """The answer is not float64's."""


class Chosen(NamedTuple):
    setting: str
    solver: Solver
    seconds: float  # of one call


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = metafunc.config.getoption("--ops-sizes")
    shapes = SHAPES["cuda" if sizes == "full" and metafunc.config.stash[DEVICE] == "cuda" else sizes]
    rivals = importlib.import_module(metafunc.config.getoption("--ops-rivals")).RIVALS
    jobs = [(s, f, w, r) for s in shapes for f in FRACTIONS for w in WORKS for r in rivals if w in r.works]
    ids = [f"{'x'.join(map(str, s))}-{f}-{w}-{r.name.split(':')[0]}" for s, f, w, r in jobs]
    metafunc.parametrize(("shape", "fraction", "work", "rival"), jobs, ids=ids)


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> list[OpsRow]:
    """What the page will show."""
    made: list[OpsRow] = []
    request.config.stash[SECTIONS]["ops"] = lambda: (ops_section(made), counted_section())
    return made


@functools.lru_cache(maxsize=1)
def case_and_truth(shape: Shape, fraction: float) -> tuple[Case, Solution]:
    case = make_case(shape, fraction)
    return case, float64_truth(case)


@functools.lru_cache(maxsize=1)
def floor_of(shape: Shape, fraction: float, work: Work) -> Floor:
    return Floor(case_and_truth(shape, fraction)[0], work)


def fastest_right(row: OpsRow, rival: Rival) -> Chosen:
    """The setting to time; writes the errors of its answer into `row`. Errors: Unavailable, Wrong."""
    case, truth = case_and_truth(row.shape, row.fraction)
    solvers, faults = rival.solvers(), {}
    seconds: dict[str, float] = {}
    found: dict[str, Errors] = {}
    for setting, solver in solvers.items():
        try:
            answer, seconds[setting] = timed_answer(solver, case, row.work)
        except Exception as error:
            faults[setting] = f"cannot run here: {brief(error)}"
            continue
        found[setting] = errors(answer, truth, row.work)
        if not found[setting].worst < WRONG_FROM[case.hidden.dtype]:
            row.logprob_error, row.gradient_error = found[setting].logprobs, found[setting].gradients
            name = f" ({setting})" if setting else ""
            raise Wrong(f"WRONG{name}: off by {found[setting].worst:.1e}, not timed")
    if not found:
        raise Unavailable("; ".join(dict.fromkeys(faults.values())))
    # The first call may hold a compilation, so that what survives is called again.
    best = min(seconds.values())
    again = [setting for setting in seconds if seconds[setting] < SAME_SPEED * best]
    seconds = {setting: timed_answer(solvers[setting], case, row.work)[1] for setting in again}
    setting = min(again, key=lambda s: seconds[s])
    row.logprob_error, row.gradient_error = found[setting].logprobs, found[setting].gradients
    row.remark = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
    return Chosen(setting, solvers[setting], seconds[setting])


def timed_answer(solver: Solver, case: Case, work: Work) -> tuple[Solution, float]:
    case.clear_gradients()
    synchronize()
    begin = time.perf_counter()
    answer = solve(solver, case, work)
    synchronize()
    return answer, time.perf_counter() - begin


def share_of_all_rows(solver: Solver, case: Case, work: Work) -> float:
    """Time for the case's rows over that for every row, in rounds that alternate."""
    every = every_row(case.shape)

    def clear() -> None:
        case.clear_gradients()
        every.clear_gradients()

    some, all_ = seconds_in_turn(
        lambda: solve(solver, case, work), lambda: solve(solver, every, work), rounds=SHARE_ROUNDS, prepare=clear
    )
    clear()
    return statistics.median(s / a for s, a in zip(some, all_, strict=True))


@functools.lru_cache(maxsize=1)
def every_row(shape: Shape) -> Case:
    return make_case(shape, 1.0)


def test_lm_head(
    benchmark: Any,
    rows: list[OpsRow],
    pytestconfig: pytest.Config,
    ops_device: str,
    shape: Shape,
    fraction: float,
    work: Work,
    rival: Rival,
) -> None:
    row = OpsRow(work, shape, fraction, rival.name)
    rows.append(row)
    try:
        chosen = fastest_right(row, rival)
    except (Unavailable, Wrong) as error:
        row.remark = str(error)
        if rival.is_ours:
            raise
        pytest.skip(f"{rival.name}: {error}")
    case, _ = case_and_truth(shape, fraction)
    timing = time_against(
        benchmark,
        lambda: solve(chosen.solver, case, work),
        floor_of(shape, fraction, work),
        budget=pytestconfig.getoption("--ops-seconds"),
        prepare=case.clear_gradients,
        one_round=2 * chosen.seconds,  # the floor is not slower
    )
    if timing is not None and rival.is_ours and fraction != 1.0:
        row.of_all_rows = share_of_all_rows(chosen.solver, case, work)
    case.clear_gradients()
    row.setting = chosen.setting
    if timing is not None:
        row.seconds, row.floor_seconds, row.ratio, row.rounds = (
            timing.seconds,
            timing.floor_seconds,
            timing.ratio,
            timing.rounds,
        )
    module = pytestconfig.getoption("--ops-rivals")
    if ops_device == "cuda":
        row.extra_bytes = extra_device_bytes(chosen.solver, case, work)
    elif not pytestconfig.getoption("--ops-no-memory"):
        row.extra_bytes = extra_bytes_in_fresh_process(module, rival.name, chosen.setting, work, shape, fraction)
    benchmark.extra_info |= {SHOWN_HERE: True, **asdict(row)}
