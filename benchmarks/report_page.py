"""A page that benchmarks print and write: where it was measured, then a table for each subject."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
OPS_PEERS = ("liger-kernel", "cut-cross-entropy", "trl", "torchrl")
BUFFER_PEERS = ("torchrl", "tensordict", "cpprb", "transformers", "tokenizers")


class Section(NamedTuple):
    title: str
    note: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    num_text_columns: int  # on the left; numbers follow, right-aligned
    has_remarks: bool = False  # the last column is text again


def table(section: Section) -> str:
    """Markdown that reads as a table in a terminal too."""
    columns = list(zip(section.header, *section.rows, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    last = len(columns) - 1
    is_text = [i < section.num_text_columns or (section.has_remarks and i == last) for i in range(len(columns))]

    def line(cells: Iterable[str]) -> str:
        padded = (c.ljust(w) if text else c.rjust(w) for c, w, text in zip(cells, widths, is_text, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = ("-" * w if text else "-" * (w - 1) + ":" for w, text in zip(widths, is_text, strict=True))
    return "\n".join([line(section.header), line(rule), *map(line, section.rows)])


def page(subject: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    parts = [f"# Benchmarks of the {subject}", "\n".join(f"- {name}: {fact}" for name, fact in facts.items())]
    for section in sections:
        parts += [f"## {section.title}", section.note, table(section)]
    return "\n\n".join(parts) + "\n"


def provenance() -> dict[str, str]:
    """Machine, commit, command, date."""
    return {
        "machine": f"{cpu_model()}, {os.cpu_count()} cores, {memory_gib():.0f} GiB, {platform.system()}",
        "commit": commit(),
        "command": command(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def ops_facts(device: str) -> dict[str, str]:
    return {
        **provenance(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "memory": "freed memory stays with the process (benchmarks/conftest.py), but where extra memory is measured",
        "GPU": torch.cuda.get_device_name() if device == "cuda" else "not measured: this page is of the CPU",
        "peers": versions(OPS_PEERS),
    }


def buffer_facts() -> dict[str, str]:
    return {
        **provenance(),
        "caches": cache_sizes(),
        "memory": "freed batches stay with the process, stores have fresh memory (benchmarks/conftest.py)",
        "versions": f"Python {platform.python_version()}, {versions(('numpy', 'torch'))}",
        "peers": versions(BUFFER_PEERS),
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = " with uncommitted changes" if git("status", "--porcelain") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


def command() -> str:
    """As typed from the root of the repository."""
    program = Path(sys.argv[0]).absolute()
    name = str(program.relative_to(ROOT)) if program.is_relative_to(ROOT) else program.name
    return f"`{shlex.join([name, *sys.argv[1:]])}`"


def cache_sizes() -> str:
    """As the system tells: a virtual machine may show its host's, which others use too."""
    found = []
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((cache / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    return ", ".join(found) or "unknown"


def versions(packages: Iterable[str]) -> str:
    return ", ".join(f"{name} {version(name)}" for name in packages)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
