"""The compile report: its formulas on literal numbers, and Triton's compiler without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="compiles Triton kernels; `make test` installs Triton")

from archer_fast import compile_report
from archer_fast.cli_bench import _cells
from archer_fast.compile_report import (
    CHIPS,
    Row,
    all_variants,
    build_report,
    failures,
    occupancy,
    parse_ptx,
    parse_resources,
    specialisations,
    tool_versions,
)
from archer_fast.ops.triton_variant import Variant

ROW = Row(
    name="scan",
    capability=80,
    num_warps=4,
    registers=40,
    spilled=0,
    shared=4096,
    tensor_memory=0,
    tensor_core="",
    needs_tensor_core=False,
)

# -- formulas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "capability", "expected"),
    [
        (32, 0, 4, 80, 1.0),
        (33, 0, 4, 80, 48 / 64),  # 40 a thread: 12 warps in each of four register files
        (78, 0, 4, 90, 24 / 64),  # 80 a thread: 6 warps in each
        (128, 0, 8, 90, 16 / 64),
        (132, 0, 4, 90, 12 / 64),  # 136 a thread: 3 warps in each
        (168, 0, 8, 90, 8 / 64),  # 12 warps would fit, which is one block of 8
        (255, 0, 8, 90, 8 / 64),
        (255, 0, 16, 90, 0.0),  # 8 warps fit, the block has 16
        (8, 0, 1, 80, 32 / 64),  # 32 blocks at most
        (32, 100 << 10, 4, 80, 4 / 64),  # 101 KB a block of 164
        (32, 81 << 10, 4, 80, 8 / 64),  # 82 KB twice is 164 exactly
        (32, (81 << 10) + 1, 4, 80, 4 / 64),
        (32, 227 << 10, 4, 100, 4 / 64),
        (32, 228 << 10, 4, 100, 0.0),
    ],
)
def test_occupancy(registers: int, shared: int, num_warps: int, capability: int, expected: float) -> None:
    assert occupancy(registers, shared, num_warps, CHIPS[capability]) == expected
    assert replace(
        ROW, registers=registers, shared=shared, num_warps=num_warps, capability=capability
    ).occupancy == expected  # fmt: skip


def test_resources_are_the_largest_functions() -> None:
    said = (
        "Resource usage:\n Common:\n  GLOBAL:0\n"
        " Function a:\n  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:392 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
        " Function b:\n  REG:24 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:392 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    )
    assert parse_resources(said) == (40, 16)
    with pytest.raises(ValueError, match="wanted REG and STACK of a kernel, got 'nothing'"):
        parse_resources("nothing\n")


@pytest.mark.parametrize(
    ("line", "core"),
    [
        ("add.f32 %f1, %f2, %f3;", ""),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {...};", "mma.sync"),
        ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {...};", "wgmma"),
        ("@%p1 tcgen05.mma.cta_group::1.kind::f16 [%r1], ...;", "tcgen05"),
        ("tcgen05.alloc.cta_group::1.sync [%r1], 128;", ""),  # memory, no product
        ("wgmma.fence.sync.aligned;", ""),
    ],
)
def test_ptx(line: str, core: str) -> None:
    assert parse_ptx(f".visible .entry f()\n.reqntid 256\n{{\n\t{line}\n}}") == (8, core)


def test_ptx_without_a_block_size() -> None:
    with pytest.raises(ValueError, match=r"wanted \.reqntid"):
        parse_ptx(".visible .entry f()")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, None),
        ({"shared": 163 << 10}, None),
        ({"spilled": 8}, "sm_80 scan: registers spill, 8 bytes a thread"),
        ({"shared": (163 << 10) + 1}, "sm_80 scan: 166913 bytes of shared memory, the chip has 166912"),
        ({"capability": 90, "shared": 232448}, None),
        (
            {"capability": 90, "shared": 232449},
            "sm_90 scan: 232449 bytes of shared memory, the chip has 232448",
        ),
        ({"registers": 255, "num_warps": 16}, "sm_80 scan: not one block of 16 warps with 255 registers fits"),
        (
            {"capability": 100, "tensor_memory": 1024},
            "sm_100 scan: 1024 columns of tensor memory, the chip has 512",
        ),
        ({"needs_tensor_core": True}, "sm_80 scan: wanted a tensor-core instruction, found none"),
        ({"needs_tensor_core": True, "tensor_core": "mma.sync"}, None),
    ],
)
def test_failures(change: dict[str, Any], line: str | None) -> None:
    assert failures([ROW, replace(ROW, **change)]) == ([] if line is None else [line])


# -- the compiler --------------------------------------------------------------------------------------


def named(*starts: str) -> list[Variant]:
    found = [variant for variant in all_variants() if variant.name.startswith(starts)]
    assert all(any(variant.name.startswith(start) for variant in found) for start in starts)
    return found


def test_every_kernel_is_listed_once_under_its_own_name() -> None:
    variants = all_variants()
    assert max(Counter(variant.name for variant in variants).values()) == 1
    kernels = {variant.kernel.__name__ for variant in variants}
    folder = Path(compile_report.__file__).parent / "kernels"
    written = {
        line.removeprefix("def ").split("(")[0]
        for file in folder.glob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert kernels == written


def test_what_triton_may_know_of_the_arguments() -> None:
    (scan,) = named("segment_scan_fwd")
    multiple = [["tt.divisibility", 16]]
    tensors = {(i,): multiple for i in range(7)}  # a, b, ends, out and three numbers a chunk
    assert specialisations(scan) == [{}, tensors, tensors | {(7,): multiple}]
    (update, *_) = named("softmax_update[bf16")  # its integers are not specialised
    assert len(specialisations(update)) == 2


def assert_as_it_should_be(variants: Sequence[Variant], rows: Sequence[Row]) -> None:
    """One row for each variant and chip, every figure plausible, no limit broken."""
    assert [(row.name, row.capability) for row in rows] == [(v.name, c) for v in variants for c in v.capabilities]
    assert failures(rows) == []
    assert all(8 <= row.registers <= 255 and 0 < row.occupancy <= 1 for row in rows)
    warps = {variant.name: variant.num_warps for variant in variants}
    assert all(row.num_warps == warps[row.name] for row in rows)
    for row in rows:
        if row.needs_tensor_core:
            assert row.tensor_core == {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}[row.capability] or (
                row.tensor_core == "mma.sync"  # small tiles
            )


def test_the_turn_level_kernels_compile_for_every_chip() -> None:
    variants = named("segment_", "critic_loss[huber, 2048")
    rows = list(build_report(variants))
    assert len(rows) == 15 and {row.capability for row in rows} == {80, 90, 100}
    assert_as_it_should_be(variants, rows)


PAGE = Path(__file__).resolve().parents[1] / "docs" / "compile_report.md"
ANEW = "write it anew: archer-fast bench kernels --compile-report --markdown > docs/compile_report.md"


def page_rows() -> list[list[str]]:
    """The table of docs/compile_report.md, without its head."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_lists_every_configuration() -> None:
    listed = [(cells[0], cells[1]) for cells in page_rows()]
    assert listed == [(v.name, f"sm_{chip}") for v in all_variants() for chip in v.capabilities], ANEW


@pytest.mark.slow
def test_the_whole_report_by_two_processes() -> None:
    variants = all_variants()
    rows = list(build_report(variants, processes=2))
    versions = ", ".join(f"{tool} {version}" for tool, version in tool_versions().items())
    if f"- versions: {versions}\n" in PAGE.read_text():
        assert page_rows() == [list(_cells(row)) for row in rows], ANEW
    assert_as_it_should_be(variants, rows)
    large = [row for row in rows if row.name.startswith("linear_logprobs[bf16, 128x128")]
    assert {(row.capability, row.tensor_core) for row in large} == {(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")}


def test_a_kernel_that_spills_is_caught() -> None:
    (scan,) = named("segment_scan_fwd")
    (row,) = build_report([replace(scan, constexprs={"BLOCK": 2048}, num_warps=1, capabilities=(80,))])
    assert row.registers == 255 and row.spilled > 0
    assert failures([row]) == [f"sm_80 segment_scan_fwd: registers spill, {row.spilled} bytes a thread"]


def test_tools_tell_their_versions() -> None:
    versions = tool_versions()
    assert list(versions) == ["triton", "ptxas", "ptxas-blackwell"]
    assert all(version[0].isdigit() for version in versions.values())


# -- where it cannot run -------------------------------------------------------------------------------


def test_under_the_interpreter_it_says_what_to_do() -> None:
    code = "from archer_fast.compile_report import all_variants; all_variants()"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith(
        "ValueError: compile report: kernels are interpreted under TRITON_INTERPRET='1'; unset it"
    )


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"triton is not installed; pip install 'archer-fast\[test\]'"):
        all_variants()


def test_without_a_tool() -> None:
    with pytest.raises(ValueError, match=r"wanted cuobjdumb at .*/nvidia/bin/cuobjdumb, where Triton's wheel has it"):
        compile_report._tool("cuobjdumb")


def test_a_cubin_that_is_none() -> None:
    with pytest.raises(OSError, match="cuobjdump: exit status"):
        compile_report._resources(b"no cubin")
