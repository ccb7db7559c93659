"""What several test modules share. Imported where torch is missing too (`make test-pythons`), so nothing heavy here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The same examples in every run: what fails here fails everywhere. HYPOTHESIS_PROFILE=default looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Sizes that share no factor by accident: heads 4 over 2 key-value heads, an odd vocabulary, a head of 6.
_SMALL: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 96,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def pytest_collection_finish() -> None:
    """A pytest that a test starts is nobody's worker: pytest-benchmark measures nothing in one of pytest-xdist's."""
    os.environ.pop("PYTEST_XDIST_WORKER", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gpu` tests are skipped, and say so, where no GPU is."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: `make test-all` runs it where one is"))


@pytest.fixture
def make_lm() -> Callable[..., PreTrainedModel]:
    """make_lm("llama", seed=1, max_position_embeddings=64): a tiny random decoder whose distributions are not flat."""
    import torch

    from archer_fast.backbone import build_causal_lm

    def make(architecture: str = "llama", *, seed: int = 0, **sizes: Any) -> PreTrainedModel:
        wanted = _SMALL | sizes
        if architecture == "gpt2":
            del wanted["num_key_value_heads"], wanted["intermediate_size"]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build_causal_lm(architecture, **wanted)
            for parameter in model.parameters():
                # transformers starts at a standard deviation of .02 and biases of 0: nearly uniform logits, and
                # attention that a wrong mask would hardly change.
                torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
                if parameter.dim() == 1:
                    parameter.data.add_(1.0)
        return model.eval()

    return make


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
