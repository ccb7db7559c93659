"""Triton's interpreter has a process of its own: `make test-interpreter` runs this folder with TRITON_INTERPRET=1.

The variable counts when the kernels are imported, so tests of this folder import them inside fixtures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from archer_fast.ops.triton_variant import Variant

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if HERE not in item.path.parents:
            continue
        if interpreted:
            # NaN and infinities are what many of these tests are about; the interpreter computes with numpy.
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"))
        else:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1: run `make test-interpreter`"))


@pytest.fixture(autouse=True)
def quick_and_repeatable(one_thread: None, poisoned_memory: None) -> Iterator[None]:
    """Tiny tensors, the same ones each time; whatever a launch allocates is full of NaN."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def launch() -> ModuleType:
    from archer_fast.ops import triton_launch

    return triton_launch


@pytest.fixture
def launched(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Variant, tuple[Any, ...]]]:
    """(what the launch chose, the kernel's arguments) of every launch in the test."""
    seen: list[tuple[Variant, tuple[Any, ...]]] = []
    original = launch._launch

    def record(variant: Variant, grid: tuple[int, ...], *args: Any) -> None:
        seen.append((variant, args))
        original(variant, grid, *args)

    monkeypatch.setattr(launch, "_launch", record)
    return seen


@pytest.fixture
def assert_listed(launch: ModuleType) -> Callable[[tuple[Variant, tuple[Any, ...]]], None]:
    """The choice is one of `variants()`, and the arguments have the types that it was compiled for."""
    from triton.runtime.jit import mangle_type

    def check(one: tuple[Variant, tuple[Any, ...]]) -> None:
        variant, args = one
        assert variant in launch.variants()
        names = variant.kernel.arg_names
        assert list(variant.signature) == names
        assert names[len(args) :] == list(variant.constexprs)
        wanted = [variant.signature[name].replace(" ", "") for name in names[: len(args)]]
        assert [mangle_type(arg).replace(" ", "") for arg in args] == wanted

    return check


@pytest.fixture
def assert_no_worse() -> Callable[..., None]:
    """assert_no_worse(actual, plain, exact): twice the error of plain float32 torch at most, against float64 truth.

    `given`: the largest number that the kernel was handed rounded to float32 and plain torch was not.
    """
    import torch

    def check(actual: Tensor, plain: Tensor, exact: Tensor, given: float = 0.0) -> None:
        assert actual.shape == exact.shape and not actual.isnan().any()
        if actual.numel() == 0:
            return
        finite = exact.isfinite()
        assert torch.equal(actual[~finite].double(), exact[~finite])
        actual, plain, exact = actual[finite].double(), plain[finite].double(), exact[finite]
        if exact.numel() == 0:
            return
        allowed = (plain - exact).abs().max()
        floor = (4 + given) * torch.finfo(torch.float32).eps * exact.abs().max().clamp(min=1)
        error = (actual - exact).abs().max()
        assert error <= 2 * allowed + floor, f"error {error:.2e}, plain torch has {allowed:.2e}, floor {floor:.2e}"

    return check
