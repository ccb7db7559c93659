"""`archer-fast bench`: the repository's benchmarks, and what the Triton kernels cost on each chip."""

from __future__ import annotations

import datetime
import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Column, Table

from archer_fast.checkout import ROOT, commit
from archer_fast.cli_args import BenchArgs
from archer_fast.compile_report import CHIPS, Row, all_variants, build_report, failures, tool_versions

BENCHMARKS = ROOT / "benchmarks"  # of a checkout; no package has it
_FILES = {
    "kernels": ("bench_ops.py", "bench_scans.py"),
    "buffer": ("bench_replay.py", "bench_bandwidth.py", "bench_targets.py"),
}
_HEADER = ("kernel", "chip", "warps", "registers", "spilled", "shared memory", "tensor core", "occupancy")
_TEXTS = (0, 1, 6)
_EXPLAINED = """Every configuration that a launch can choose, compiled without a GPU; no machine enters the figures, and
no time is measured. Triton compiles a kernel anew where it knows more of the arguments (tensors on 16 bytes, integers
that are multiples of 16): each figure is the worst of these. Registers are a thread's and spilled bytes its stack, as
cuobjdump reads them in the cubin; shared memory is a block's beside the most that the chip gives one, columns are of
tensor memory; the instruction is read in the PTX. Occupancy, the share of a multiprocessor's 64 warps that can live at
once, follows from registers, shared memory and warps (`archer_fast.compile_report.occupancy`). Limits: nothing spills,
memory suffices, one block fits, and half precision products are made on tensor cores."""


def bench(args: BenchArgs) -> None:
    """Print the report or run the benchmarks; SystemExit 1 where a limit is broken or a benchmark fails."""
    if args.compile_report:
        print_compile_report(markdown=args.markdown)
    else:
        run_benchmarks(BENCHMARKS, _FILES[args.what])


def run_benchmarks(folder: Path, names: Sequence[str]) -> None:
    """pytest on these benchmarks of a checkout, as a process of its own."""
    files = [folder / name for name in names]
    absent = [file for file in files if not file.exists()]
    if absent:
        raise ValueError(
            f"bench: the benchmarks are no part of an installed package; wanted {absent[0]}. Clone the repository, run "
            "`make install` and the command there; --compile-report needs no clone"
        )
    missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"bench: {missing[0]!r} is not installed; pip install 'archer-fast[test]'")
    command = [sys.executable, "-m", "pytest", *map(str, files), "--benchmark-only"]
    if subprocess.run(command, cwd=folder.parent, check=False).returncode != 0:
        raise SystemExit(1)


def print_compile_report(*, markdown: bool) -> None:
    """Compile everything, print the table and what breaks a limit."""
    variants = all_variants()
    total = sum(len(variant.capabilities) for variant in variants)
    stderr = Console(stderr=True)
    compiled = build_report(variants, processes=os.cpu_count() or 1)
    rows = list(track(compiled, "kernels", total, console=stderr, transient=True, disable=not stderr.is_terminal))
    versions = ", ".join(f"{tool} {version}" for tool, version in tool_versions().items())
    broken = failures(rows)
    if markdown:
        print(_page(rows, broken, versions))
    else:
        console = Console()
        console.print(_table(rows))
        for line in (f"{summary(rows)}; {versions}", *broken):
            console.print(escape(line), highlight=False, soft_wrap=True)
    if broken:
        raise SystemExit(1)


def summary(rows: Sequence[Row]) -> str:
    """One line about all rows: "80 configurations, 240 compiled, 0 spill, within every limit"."""
    spilling = sum(row.spilled > 0 for row in rows)
    broken = len(failures(rows))
    limits = f"{broken} limits broken" if broken else "within every limit"
    return f"{len({row.name for row in rows})} configurations, {len(rows)} compiled, {spilling} spill, {limits}"


def _cells(row: Row) -> tuple[str, ...]:
    limit = CHIPS[row.capability].shared_per_block >> 10
    memory = f"{row.shared / 1024:.1f} of {limit} KB"
    if row.tensor_memory:
        memory += f", {row.tensor_memory} columns"
    core = row.tensor_core or ("none!" if row.needs_tensor_core else "")
    numbers = (str(row.num_warps), str(row.registers), str(row.spilled))
    return (row.name, f"sm_{row.capability}", *numbers, memory, core, f"{row.occupancy:.0%}")


def _table(rows: Sequence[Row]) -> Table:
    table = Table(*(Column(name, justify="left" if i in _TEXTS else "right") for i, name in enumerate(_HEADER)))
    above = ""
    for row in rows:
        name, *cells = _cells(row)
        table.add_row("" if name == above else escape(name), *cells, style="red" if failures([row]) else None)
        above = name
    return table


def _page(rows: Sequence[Row], broken: Sequence[str], versions: str) -> str:
    """docs/compile_report.md."""
    rules = ["---" if i in _TEXTS else "---:" for i in range(len(_HEADER))]
    facts = {
        "command": "`archer-fast bench kernels --compile-report --markdown`",
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "versions": versions,
        "result": summary(rows),
    }
    lines = ["# Compile report of the Triton kernels", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", *textwrap.wrap(_EXPLAINED, 120), ""]
    lines += [f"- **{line}**" for line in broken] + [""] * bool(broken)
    lines += [f"| {' | '.join(cells)} |" for cells in (_HEADER, rules, *map(_cells, rows))]
    return "\n".join(lines)
