"""What the Triton kernels cost on chips that nobody here has: each configuration compiled, its cubin read."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from archer_fast.ops.triton_variant import Variant

TENSOR_MEMORY = 512  # columns of a block's tensor memory on sm_100
# Most telling first: what a chip of that generation multiplies matrices with. The names of PTX.
_TENSOR_CORE = {"tcgen05": r"\btcgen05\.mma", "wgmma": r"\bwgmma\.mma_async", "mma.sync": r"\bmma\.sync"}


class Chip(NamedTuple):
    """What bounds the blocks of one multiprocessor (CUDA C++ Programming Guide, technical specifications)."""

    shared_per_block: int  # bytes, the most that a block may ask for
    shared_per_sm: int  # bytes; every block takes 1 KB of it more than it asks for
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


CHIPS = {
    80: Chip(163 << 10, 164 << 10),  # A100
    90: Chip(227 << 10, 228 << 10),  # H100, H200
    100: Chip(227 << 10, 228 << 10),  # B200
}


@dataclass(frozen=True, slots=True)
class Row:
    """One configuration on one chip.

    Row("softmax_update[fp32, 4096]", capability=90, num_warps=8, registers=40, spilled=0, shared=64,
        tensor_memory=0, tensor_core="", needs_tensor_core=False)
    """

    name: str
    capability: int
    num_warps: int
    registers: int  # a thread
    spilled: int  # bytes of stack a thread
    shared: int  # bytes a block
    tensor_memory: int  # columns a block
    tensor_core: str  # "tcgen05" | "wgmma" | "mma.sync" | ""
    needs_tensor_core: bool

    @property
    def occupancy(self) -> float:
        return occupancy(self.registers, self.shared, self.num_warps, CHIPS[self.capability])


# -- pure functions of numbers and texts ---------------------------------------------------------------


def occupancy(registers: int, shared: int, num_warps: int, chip: Chip) -> float:
    """Share of a multiprocessor's warps that can live at once; 0 where not one block fits.

    blocks = min(32, 64 // num_warps, 4 floor(16384 / (32 r)) // num_warps, shared_per_sm // s)
    with r the registers a thread rounded up to 8 (a warp gets them by 256, from one of four files of 16384) and
    s the shared memory a block, with 1 KB of the system's, rounded up to 128. It is what NVIDIA's calculator does.
    """
    registers_of_a_warp = 32 * _round_up(max(registers, 1), 8)
    by_registers = 4 * (chip.registers // 4 // registers_of_a_warp) // num_warps
    by_shared = chip.shared_per_sm // _round_up(shared + 1024, 128)
    blocks = min(chip.blocks, chip.warps // num_warps, by_registers, by_shared)
    return blocks * num_warps / chip.warps


def parse_resources(text: str) -> tuple[int, int]:
    """(registers, bytes of stack) a thread of the largest function that `cuobjdump -res-usage` tells of.

    >>> parse_resources("Function f:\\n  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:400")
    (40, 0)
    """
    found = [(int(registers), int(stack)) for registers, stack in re.findall(r"REG:(\d+)\s+STACK:(\d+)", text)]
    if not found:
        raise ValueError(f"cuobjdump: wanted REG and STACK of a kernel, got {text.strip()!r}")
    return max(registers for registers, _ in found), max(stack for _, stack in found)


def parse_ptx(ptx: str) -> tuple[int, str]:
    """(warps a block, the tensor core's instruction or "") of a kernel's PTX."""
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)
    if threads is None:
        raise ValueError("ptx: wanted .reqntid or .maxntid, got neither")
    core = next((name for name, pattern in _TENSOR_CORE.items() if re.search(pattern, ptx)), "")
    return int(threads[1]) // 32, core


def failures(rows: Sequence[Row]) -> list[str]:
    """A line for every limit that a row breaks."""
    lines = []
    for row in rows:
        chip, where = CHIPS[row.capability], f"sm_{row.capability} {row.name}"
        if row.spilled:
            lines.append(f"{where}: registers spill, {row.spilled} bytes a thread")
        if row.shared > chip.shared_per_block:
            lines.append(f"{where}: {row.shared} bytes of shared memory, the chip has {chip.shared_per_block}")
        elif row.occupancy == 0:
            lines.append(f"{where}: not one block of {row.num_warps} warps with {row.registers} registers fits")
        if row.tensor_memory > TENSOR_MEMORY:
            lines.append(f"{where}: {row.tensor_memory} columns of tensor memory, the chip has {TENSOR_MEMORY}")
        if row.needs_tensor_core and not row.tensor_core:
            lines.append(f"{where}: wanted a tensor-core instruction, found none")
    return lines


def _round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


# -- compiling -----------------------------------------------------------------------------------------


def all_variants() -> list[Variant]:
    """Every compilation that a launch function can choose.

    Errors: ValueError where Triton or its tools are missing, or where it interprets instead of compiling.
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError("compile report: triton is not installed; pip install 'archer-fast[test]' or triton")
    from triton.runtime.jit import JITFunction

    from archer_fast.ops import triton_launch, triton_slots, triton_turns

    variants = [*triton_launch.variants(), *triton_turns.variants(), *triton_slots.variants()]
    if not all(isinstance(variant.kernel, JITFunction) for variant in variants):
        setting = os.environ.get("TRITON_INTERPRET", "")
        raise ValueError(f"compile report: kernels are interpreted under TRITON_INTERPRET={setting!r}; unset it")
    _tool("cuobjdump")
    return variants


def build_report(variants: Sequence[Variant], processes: int = 1) -> Iterator[Row]:
    """A row for every variant on every chip where it can be chosen, as they are done, in their order.

    `processes` above 1 share the work (Triton's passes hold the interpreter lock): of variants in `all_variants`.
    """
    jobs = [(variant, capability) for variant in variants for capability in variant.capabilities]
    if processes == 1:
        yield from (compile_variant(variant, capability) for variant, capability in jobs)
        return
    named = [(variant.name, capability) for variant, capability in jobs]  # a kernel cannot be pickled
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile_named, named, chunksize=2)


def _compile_named(job: tuple[str, int]) -> Row:
    return compile_variant(_variants_by_name()[job[0]], job[1])


@functools.cache
def _variants_by_name() -> dict[str, Variant]:
    return {variant.name: variant for variant in all_variants()}


def compile_variant(variant: Variant, capability: int) -> Row:
    """The worst that Triton makes of `variant` for one chip, over what it may know of the arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    row = None
    for attributes in specialisations(variant):
        source = ASTSource(variant.kernel, dict(variant.signature), dict(variant.constexprs), attributes)
        made = triton_compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options)
        registers, spilled = parse_resources(_resources(made.asm["cubin"]))
        num_warps, core = parse_ptx(made.asm["ptx"])
        if row is not None:
            registers, spilled = max(registers, row.registers), max(spilled, row.spilled)
            core = core and row.tensor_core
        row = Row(
            name=variant.name,
            capability=capability,
            num_warps=num_warps,
            registers=registers,
            spilled=spilled,
            shared=max(made.metadata.shared, row.shared if row else 0),
            tensor_memory=max(getattr(made.metadata, "tmem_size", None) or 0, row.tensor_memory if row else 0),
            tensor_core=core,
            needs_tensor_core=variant.needs_tensor_core,
        )
    assert row is not None
    return row


def specialisations(variant: Variant) -> list[dict[tuple[int], list[list[Any]]]]:
    """What Triton finds out at a launch and compiles for: nothing; tensors on 16 bytes; integers multiples of 16 too.

    An integer that is 1 becomes a constant as well: less code than any of these.
    """
    multiple = [["tt.divisibility", 16]]
    names = [parameter.name for parameter in variant.kernel.params if not parameter.do_not_specialize]
    kinds = {i: kind for i, (name, kind) in enumerate(variant.signature.items()) if name in names}
    tensors = {(i,): multiple for i, kind in kinds.items() if kind.startswith("*")}
    integers = {(i,): multiple for i, kind in kinds.items() if re.fullmatch(r"[iu](32|64)", kind)}
    return [{}, tensors, *([tensors | integers] if integers else [])]


def tool_versions() -> dict[str, str]:
    """{"triton": "3.9.0", "ptxas": "12.9.86", "ptxas-blackwell": "13.1.80"}: the one for sm_100 is another program."""
    import triton

    found = {"triton": triton.__version__}
    for tool in ("ptxas", "ptxas-blackwell"):
        said = subprocess.run([_tool(tool), "--version"], capture_output=True, text=True, check=True).stdout
        version = re.search(r"V(\d[\d.]*)", said)
        found[tool] = version[1] if version else "?"
    return found


def _resources(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_tool("cuobjdump")), "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"cuobjdump: exit status {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout + done.stderr


def _tool(name: str) -> Path:
    """One of the programs that Triton's wheel brings along."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise ValueError(f"compile report: wanted {name} at {path}, where Triton's wheel has it; it is not there")
    return path
