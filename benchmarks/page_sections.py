"""What benchmarks leave behind for the pages at the end of the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

# By name of a module: makes its sections of the rows it collected. Not in conftest.py: tests/ has one of that name too.
Makers = dict[str, Callable[[], tuple[Any, ...]]]
SECTIONS = pytest.StashKey[Makers]()  # of the page of the ops
BUFFER_SECTIONS = pytest.StashKey[Makers]()
DEVICE = pytest.StashKey[str]()  # "cpu" or "cuda"
SHOWN_HERE = "in_a_page"  # key of extra_info: pytest-benchmark need not print a table of it as well
