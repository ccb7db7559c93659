"""Extra memory of one rival: what a fresh process's resident set grows by at its peak, less the gradients.

The process makes the inputs, solves the case once (imports, compilation, thread pools and the buffers that a maths
library keeps are there from then on), drops the gradients, hands freed memory back to the kernel, sets the peak counter
(VmHWM of /proc/self/status) back to now by writing 5 to /proc/self/clear_refs, and solves the case again.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from lm_head_case import Case, Shape, Work, make_case
from lm_head_rivals import Solver, solve

# From 64 KB on every allocation is mapped and unmapped, so that no freed memory hides what the second call takes.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": "0"}


def status_bytes(key: str) -> int:
    """A size out of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def peak_growth(function: Callable[[], object]) -> int:
    """Bytes by which the resident set of this process exceeds what it is now, at its peak while `function` runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    function()
    return status_bytes("VmHWM") - before


def extra_bytes(rivals: str, name: str, setting: str, work: Work, shape: Shape, fraction: float) -> int:
    """Of the rival `name` of the module `rivals`, in this process."""
    rival = next(r for r in importlib.import_module(rivals).RIVALS if r.name == name)
    solver, case = rival.solvers()[setting], make_case(shape, fraction)
    solve(solver, case, work)
    case.clear_gradients()
    growth = peak_growth(lambda: solve(solver, case, work))
    return growth - (case.gradient_bytes if work == "train" else 0)


def extra_device_bytes(solver: Solver, case: Case, work: Work) -> int:
    """On a GPU, in this process: what torch's allocator hands out at its peak beyond inputs and gradients."""
    case.clear_gradients()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    solve(solver, case, work)
    growth = torch.cuda.max_memory_allocated() - before
    case.clear_gradients()
    return growth - (case.gradient_bytes if work == "train" else 0)


def extra_bytes_in_fresh_process(
    rivals: str, name: str, setting: str, work: Work, shape: Shape, fraction: float
) -> int:
    """Errors: RuntimeError with the child's last words."""
    question = json.dumps([rivals, name, setting, work, shape, fraction])
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, __file__, question],
        env=os.environ | _MALLOC | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["died without a word"])[-1])
    return int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    *which, shape, fraction = json.loads(sys.argv[1])
    print(extra_bytes(*which, Shape(*shape), fraction))
