"""Fixtures of the ops on the vocabulary: which implementation runs, and in how small pieces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from archer_fast.ops import lm_head


@pytest.fixture(params=["reference", "cpu", pytest.param("triton", marks=pytest.mark.gpu)])
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each on its device. Without a GPU Triton's kernels run in the interpreter: tests/interpreter."""
    if request.param == "triton":
        torch.set_default_device("cuda")
    yield request.param
    torch.set_default_device(None)


@pytest.fixture(params=["reference", "cpu"])
def cpu_impl(request: pytest.FixtureRequest) -> str:
    """For what only the CPU's tiles show."""
    name: str = request.param
    return name


@pytest.fixture(params=["whole", "tiles"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Chunks of at most 8 rows, on a CPU in tiles of 100 columns; or everything in one piece."""
    if request.param == "tiles":
        monkeypatch.setattr(lm_head, "MAX_CHUNK_ROWS", {"cpu": 8, "cuda": 8})
        monkeypatch.setattr(lm_head, "COLUMN_BLOCK", 100)
    name: str = request.param
    return name
