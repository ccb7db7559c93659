"""What several test modules share. Imported where torch is missing too (`make test-pythons`), so nothing heavy here."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The same examples in every run: what fails here fails everywhere. HYPOTHESIS_PROFILE=default looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_finish() -> None:
    """A pytest that a test starts is nobody's worker: pytest-benchmark measures nothing in one of pytest-xdist's."""
    os.environ.pop("PYTEST_XDIST_WORKER", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gpu` tests are skipped, and say so, where no GPU is; `vllm` tests where no vLLM is."""
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="needs vLLM: `make test-vllm` installs it and runs this"))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: `make test-all` runs it where one is"))


@pytest.fixture
def make_lm() -> Callable[..., PreTrainedModel]:
    from tiny_lm import tiny_lm

    return tiny_lm


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty is full of NaN, so that whatever an operation forgets to write is seen."""
    import torch

    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices on one thread: on a busy machine two threads wait for one another, at 10 ms a product."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread_and_one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For a module of whole runs: the clone is made once, and sums are in one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARCHER_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(before)
