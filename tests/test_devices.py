"""Which data sheet holds for which name of CUDA's."""

from __future__ import annotations

import pytest
import torch

from archer_fast.devices import DEVICES, device_called, peak_flops


@pytest.mark.parametrize(
    ("cuda_name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA H100 PCIe", None),  # 756 TFLOP/s
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA B200", None),
    ],
)
def test_only_what_has_these_rates_is_known(cuda_name: str, known: str | None) -> None:
    assert device_called(cuda_name) == (None if known is None else DEVICES[known])


def test_the_peak_is_that_of_the_weights_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    gpu = torch.device("cuda", 0)
    assert (peak_flops(gpu, torch.bfloat16), peak_flops(gpu, torch.float32)) == (989e12, 67e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA B200")
    assert peak_flops(gpu, torch.bfloat16) is None
