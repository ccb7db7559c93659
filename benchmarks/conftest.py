"""Options of the ops' benchmarks, and the one page that they print at the end and write where they are told."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from page_sections import DEVICE, SECTIONS, SHOWN_HERE


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


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SECTIONS] = {}
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


def keep_freed_memory() -> None:
    """What anybody frees stays with this process, and comes back without a page fault.

    Virtual machines hand memory that lay free for two seconds back to their host, and take .5 ms a MB to get it again:
    every other round of whoever allocates most would be a tenth longer (NOTES.md, 2026-11-24). Not for glibc alone: a
    training job keeps its memory, by an allocator of its own or by these settings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


@pytest.hookimpl(wrapper=True)
def pytest_benchmark_group_stats() -> Iterator[None]:
    groups = yield
    kept = ((name, [b for b in marks if SHOWN_HERE not in b["extra_info"]]) for name, marks in groups)
    return [(name, marks) for name, marks in kept if marks]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    makers = config.stash[SECTIONS]
    if not makers:
        return
    from report_page import page

    text = page(config.stash[DEVICE], [section for make in makers.values() for section in make()])
    terminalreporter.write_sep("=", "ops")
    terminalreporter.write_line(text)
    path = config.getoption("--ops-table")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        terminalreporter.write_line(f"written to {path}")
