"""What torch.compile sees of the turn-level ops on a GPU: their kernels. In a process of its own, on fake tensors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="registers triton_ops; `make test` installs Triton")

PROGRAM = """
import sys

import torch
from archer_fast.ops import critic_loss, segment_scan

print("triton" in sys.modules)

import triton
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._library.triton import get_triton_kernels_for_op
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


triton.runtime.driver.set_active(Driver())
with FakeTensorMode():
    a, b, *heads = (torch.empty(5000, device="cuda") for _ in range(10))
    cu = torch.empty(7, dtype=torch.int32, device="cuda")
    scan = lambda a, b, cu: (segment_scan(a, b, cu),)
    loss = lambda *heads: (critic_loss(*heads).loss,)
    for f, inputs in ((scan, [a, b, cu]), (loss, heads)):
        graph = aot_export_joint_simple(f, inputs, trace_joint=False).graph
        print(sum("triton_kernel_wrapper" in str(node.target) for node in graph.nodes))
        torch._dynamo.reset()
        seen = []
        torch.compile(f, fullgraph=True, backend=lambda gm, _: seen.append(gm) or gm.forward)(*inputs)
        print(len(seen), [str(n.target) for n in seen[0].graph.nodes if str(n.target).endswith("_triton.default")])
for op in ("segment_scan", "critic_loss"):
    print(sorted(kernel.__name__ for kernel in get_triton_kernels_for_op(f"archer_fast::{op}_triton")))
"""


def test_the_compiler_sees_the_kernels() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | {"TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "False",  # importing the ops does not import Triton
        "4",
        "1 ['archer_fast.segment_scan_triton.default']",
        "1",
        "1 ['archer_fast.critic_loss_triton.default']",
        # Their source is part of a compiled graph's key: a changed kernel is not taken from the cache.
        "['segment_carry_kernel', 'segment_ends_kernel', 'segment_fixup_kernel', 'segment_scan_fwd_kernel']",
        "['critic_loss_kernel']",
    ]
