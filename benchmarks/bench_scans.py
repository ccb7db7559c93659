"""`segment_scan` and GAE on it beside Python loops, a cumsum trick, torchrl, and the memory's bandwidth."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from interleaved import seconds_in_turn, time_against
from lm_head_rivals import Unavailable, brief
from page_sections import SECTIONS, SHOWN_HERE
from scan_rivals import RIVALS, Problem, ScanCase, ScanRival, make_cases, truth
from scan_rows import ScanRow, scans_section

# Other people's packages may warn.
pytestmark = pytest.mark.filterwarnings("default")

SAMPLE = 100
WRONG_FROM = 1e-4
CACHE_BYTES = {"full": 512 << 20, "tiny": 1 << 20}
COLD_ROUNDS = 7


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    jobs = [(index, rival) for index in range(3) for rival in RIVALS]
    ids = [f"{('ragged', 'rectangle', 'one')[index]}-{rival.name.replace(' ', '-')}" for index, rival in jobs]
    metafunc.parametrize(("index", "rival"), jobs, ids=ids)


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> list[ScanRow]:
    """What the page will show."""
    made: list[ScanRow] = []
    request.config.stash[SECTIONS]["scans"] = lambda: (scans_section(made),)
    return made


cases = functools.cache(make_cases)


@functools.lru_cache(maxsize=2)
def truth_of(sizes: str, index: int, problem: Problem) -> torch.Tensor:
    return truth(cases(sizes)[index], problem)


@functools.cache
def cold_cache(sizes: str) -> Callable[[], object]:
    """Call it, and what was in the cache is there no longer."""
    other = torch.zeros(CACHE_BYTES[sizes] // 4)
    return lambda: other.add_(1)


class Adding:
    """As many bytes as a scan of the case has to move."""

    def __init__(self, case: ScanCase) -> None:
        self.x, self.y, self.z = case.a, case.b, torch.empty_like(case.b)

    def __call__(self) -> None:
        torch.add(self.x, self.y, out=self.z)


def test_scan(
    benchmark: Any,
    rows: list[ScanRow],
    pytestconfig: pytest.Config,
    ops_device: str,
    index: int,
    rival: ScanRival,
) -> None:
    sizes = pytestconfig.getoption("--ops-sizes")
    case = cases(sizes)[index]
    row = ScanRow(case.name, case.total, rival.name)
    rows.append(row)
    scale = SAMPLE if rival.sampled(case) else 1
    # The truth of a part is not a part of the truth: its last segment is cut.
    asked = case if scale == 1 else case.part(SAMPLE)
    expected = truth_of(sizes, index, rival.problem) if scale == 1 else truth(asked, rival.problem)
    try:
        rival.ready()
        y = rival.solve(asked)
    except Exception as error:
        row.remark = str(error) if isinstance(error, Unavailable) else f"cannot run here: {brief(error)}"
        if rival.is_ours:
            raise
        pytest.skip(row.remark)
    row.error = float((y.double() - expected).norm() / expected.norm())
    if not row.error < WRONG_FROM:
        row.remark = f"WRONG: off by {row.error:.1e}, not timed; {rival.remark}".removesuffix("; ")
        assert not rival.is_ours, row.remark
        pytest.skip(f"{rival.name}: {row.remark}")
    budget = pytestconfig.getoption("--ops-seconds")
    adding = Adding(case)
    timing = time_against(benchmark, lambda: rival.solve(asked), adding, budget=budget)
    row.remark = "; ".join(x for x in (rival.remark, f"timed on 1/{SAMPLE}, scaled" if scale > 1 else "") if x)
    if timing is not None:
        row.seconds, row.best_seconds = timing.seconds * scale, timing.best_seconds * scale
        row.floor_seconds = timing.best_floor_seconds
        if scale == 1:
            solve = functools.partial(rival.solve, case)
            cold = seconds_in_turn(adding, solve, rounds=COLD_ROUNDS, prepare=cold_cache(sizes))
            row.cold_floor_seconds, row.cold_seconds = map(min, cold)
    benchmark.extra_info |= {SHOWN_HERE: True, **asdict(row)}
