"""Options of the benchmarks that make a page, and these pages: printed at the end, and written where one says."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from page_sections import BUFFER_SECTIONS, DEVICE, SECTIONS, SHOWN_HERE


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of the ops")
    group.addoption("--ops-table", type=Path, metavar="FILE", help="write the page of the ops' benchmarks, as markdown")
    group.addoption("--ops-sizes", choices=("full", "tiny"), default="full", help="tiny: to check that all of it runs")
    group.addoption(
        "--ops-device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="cuda: bfloat16 at the shapes of 7B models; auto (default): where there is a GPU",
    )
    group.addoption("--ops-seconds", type=float, default=5.0, help="how long to time one row (default 5)")
    group.addoption("--ops-no-memory", action="store_true", help="do not start a process a row to see its memory")
    group.addoption(
        "--ops-rivals",
        default="lm_head_rivals",
        metavar="MODULE",
        help="module whose RIVALS are compared on the lm_head; it must be importable",
    )
    group = parser.getgroup("benchmarks of the buffer")
    group.addoption("--buffer-table", type=Path, metavar="FILE", help="write the page of the buffer, as markdown")
    group.addoption(
        "--buffer-sizes", choices=("full", "tiny"), default="full", help="tiny: to check that all of it runs"
    )
    group.addoption(
        "--buffer-rivals",
        default="buffer_rivals",
        metavar="MODULE",
        help="module whose RIVALS are compared; it must be importable",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SECTIONS], config.stash[BUFFER_SECTIONS] = {}, {}
    device = config.getoption("--ops-device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--ops-device cuda: wanted a GPU that torch can use, got none")
    config.stash[DEVICE] = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    keep_freed_memory()


@pytest.fixture
def ops_device(pytestconfig: pytest.Config) -> Iterator[str]:
    """Where the ops' benchmarks make their tensors."""
    device = pytestconfig.stash[DEVICE]
    torch.set_default_device(device)
    yield device
    torch.set_default_device(None)


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """At the beginning; a test may change it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def replay_sizes(pytestconfig: pytest.Config) -> Any:
    from replay_sizes import SIZES

    keep_freed_batches()
    return SIZES[pytestconfig.getoption("--buffer-sizes")]


@pytest.fixture(scope="session")
def replay_work(replay_sizes: Any) -> Any:
    """The games that the benchmarks of the buffer's page store."""
    from buffer_work import make_work

    return make_work(replay_sizes.num_games)


@pytest.fixture(scope="session")
def replay_report(pytestconfig: pytest.Config, replay_work: Any, replay_sizes: Any) -> Any:
    """What the buffer's page will show."""
    from replay_report import ReplayReport
    from replay_sections import buffer_sections

    made = ReplayReport(
        num_transitions=replay_work.num_transitions,
        num_tokens=replay_work.num_tokens,
        logprob_bytes=replay_work.arrays.rollout_logprobs.nbytes,
        num_drawn=replay_sizes.drawn,
        cold_bytes=replay_sizes.cold_bytes,
    )
    pytestconfig.stash[BUFFER_SECTIONS]["replay"] = lambda: buffer_sections(made)
    return made


def keep_freed_memory() -> None:
    """What anybody frees stays with this process, and comes back without a page fault.

    Virtual machines hand memory that lay free for two seconds back to their host, and take .5 ms a MB to get it again:
    every other round of whoever allocates most would be a tenth longer (NOTES.md, 2026-11-24). Not for glibc alone: a
    training job keeps its memory, by an allocator of its own or by these settings.
    """
    set_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})


def keep_freed_batches() -> None:
    """The same for what is as small as a batch; a store has memory that nobody had before, as in a job that makes one
    at its beginning: the kernel gives huge pages to those who ask for them, but not in place of small ones."""
    set_malloc({M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 2 << 20, M_TRIM_THRESHOLD: 2**31 - 1})


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


def set_malloc(options: Mapping[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        for option, value in options.items():
            mallopt(option, value)


@pytest.hookimpl(wrapper=True)
def pytest_benchmark_group_stats() -> Iterator[None]:
    groups = yield
    kept = ((name, [b for b in marks if SHOWN_HERE not in b["extra_info"]]) for name, marks in groups)
    return [(name, marks) for name, marks in kept if marks]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for key, name in ((SECTIONS, "ops"), (BUFFER_SECTIONS, "buffer")):
        makers = config.stash[key]
        if not makers:
            continue
        from report_page import buffer_facts, ops_facts, page

        facts = ops_facts(config.stash[DEVICE]) if name == "ops" else buffer_facts()
        text = page(name, facts, [section for make in makers.values() for section in make()])
        terminalreporter.write_sep("=", name)
        terminalreporter.write_line(text)
        path = config.getoption(f"--{name}-table")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            terminalreporter.write_line(f"written to {path}")
