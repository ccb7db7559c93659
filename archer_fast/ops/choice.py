"""Which implementation of an op runs: chosen by device and dtype, overridden by name, recorded for who asks."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["reference", "cpu", "triton"]
IMPLS: tuple[Impl, ...] = ("reference", "cpu", "triton")

_last: dict[str, Impl] = {}


def choose_impl(impl: str | None, tensor: Tensor) -> Impl:
    """The implementation for operands like `tensor`: `impl` where it can run, by device where it is None.

    None: "triton" on a GPU, "cpu" on a CPU, "reference" elsewhere and in float64, which the kernels do not speak.
    Errors: ValueError for an unknown name or one that cannot run on this device and dtype.
    """
    device, is_double = tensor.device.type, tensor.dtype == torch.float64
    if impl is None:
        if is_double:
            return "reference"
        return {"cuda": "triton", "cpu": "cpu"}.get(device, "reference")  # type: ignore[return-value]
    if impl not in IMPLS:
        raise ValueError(f"impl: wanted one of {', '.join(IMPLS)} or None, got {impl!r}")
    if impl != "reference" and is_double:
        raise ValueError(f"impl: {impl!r} computes in float32; float64 operands need 'reference'")
    if impl == "cpu" and device != "cpu":
        raise ValueError(f"impl: 'cpu' wants CPU tensors, got {tensor.device}")
    if impl == "triton" and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"impl: 'triton' wants CUDA tensors (or TRITON_INTERPRET=1), got {tensor.device}")
    return impl


def load_kernels(impl: str, triton_module: str) -> ModuleType:
    """The module of `impl`, whose functions write into the caller's memory; imported by the first call that runs there.

    `triton_module` names the one with the launches: the other two have a module each, called as they are.
    """
    return importlib.import_module(f"archer_fast.ops.{triton_module if impl == 'triton' else impl}")


def record(op: str, impl: str) -> None:
    """Called by an op's body as it runs: what `last_impl` will say."""
    _last[op] = impl  # type: ignore[assignment]


def last_impl(op: str) -> Impl | None:
    """The implementation that ran last under that op's name in this process; None before the first call."""
    return _last.get(op)
