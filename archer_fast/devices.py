"""GPUs by their makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(slots=True, frozen=True)
class Device:
    """Dense rates: Device("H100", 80e9, 3.35e12, 989e12, 67e12)."""

    name: str
    memory: float  # bytes
    bandwidth: float  # bytes/s
    half_flops: float  # FLOP/s in bfloat16 on tensor cores
    single_flops: float  # FLOP/s in float32

    def peak(self, itemsize: int) -> float:
        """FLOP/s with weights of so many bytes."""
        return self.half_flops if itemsize == 2 else self.single_flops

    def seconds(self, flops: float, num_bytes: float, itemsize: int) -> float:
        """At the roofline (Williams et al. 2009): whatever of the two takes longer, nothing lost."""
        return max(flops / self.peak(itemsize), num_bytes / self.bandwidth)


DEVICES = {
    "a100": Device("A100 80GB SXM", 80e9, 2.039e12, 312e12, 19.5e12),
    "h100": Device("H100 80GB SXM", 80e9, 3.35e12, 989e12, 67e12),
    "h200": Device("H200 141GB SXM", 141e9, 4.8e12, 989e12, 67e12),
}


def device_called(cuda_name: str) -> Device | None:
    """The one whose rates hold for what CUDA calls so ("NVIDIA H100 80GB HBM3"); None for any other.

    Every A100 has the same rates; an H100 PCIe ("NVIDIA H100 PCIe") or NVL has not those of an H100 SXM.
    """
    name = cuda_name.lower()
    found = re.search(r"\b(a100|h100|h200)\b", name)
    if found is None or "mig" in name or (found[1] != "a100" and re.search("pcie|nvl", name)):
        return None
    return DEVICES[found[1]]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of this device with weights of this dtype, by its data sheet; None where we have none."""
    if device.type != "cuda":
        return None
    known = device_called(torch.cuda.get_device_name(device))
    return None if known is None else known.peak(dtype.itemsize)
