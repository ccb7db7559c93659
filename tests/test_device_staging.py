"""Batches on their way to a device: the same numbers there, however soon the memory is asked for again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from archer_fast.device_staging import DeviceStaging


def send_many(device: torch.device) -> None:
    staging = DeviceStaging(device)
    sent = []
    for i in range(50):
        array = staging.memory(1 << 20)
        array[:] = i
        tensor = torch.from_numpy(array).to(device, non_blocking=True)
        staging.keep_until_copied(array)
        sent.append(tensor * 1)
        del array, tensor
    assert [int(tensor.min()) for tensor in sent] == [int(tensor.max()) for tensor in sent] == list(range(50))


def test_on_a_cpu_tensors_are_the_memory() -> None:
    send_many(torch.device("cpu"))
    staging = DeviceStaging(torch.device("cpu"))
    array = staging.memory(64)
    tensor = torch.from_numpy(array).to("cpu", non_blocking=True)
    staging.keep_until_copied(array)
    assert np.shares_memory(tensor.numpy(), array)
    assert not staging._in_flight


@pytest.mark.gpu
def test_on_a_gpu_memory_waits_for_its_copies() -> None:
    send_many(torch.device("cuda"))
    staging = DeviceStaging(torch.device("cuda"))
    assert torch.from_numpy(staging.memory(64)).is_pinned()
