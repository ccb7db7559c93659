"""comparison.json, report.md and the pictures, from the folders of the runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from archer_fast.compare import page, plots
from archer_fast.compare.figures import Figures, make_figures
from archer_fast.compare.plan import Plan
from archer_fast.compare.records import read_record
from archer_fast.run_folder import write_bytes, write_json, write_text

NO_PICTURES = "no pictures: matplotlib is not installed (pip install 'archer-fast[report]', then --report-only)"


def build_comparison(out: Path, tuning: Mapping[str, str], window: int | None = None) -> tuple[Figures, list[str]]:
    """Write them from whatever the runs have left by now; the figures, and lines that say what was written.

    `window` instead of the plan's: games that a point of a smoothed curve is the mean of.
    """
    plan = Plan.load(out)
    plan = plan if window is None else dataclasses.replace(plan, window=window)
    records = [
        read_record(name, seed, out / name / f"seed-{seed}") for name in plan.algorithms for seed in plan.seed_range()
    ]
    figures = make_figures(plan, records, tuning)
    said = []
    pictures: dict[str, bytes] = {}
    if importlib.util.find_spec("matplotlib") is None:
        said.append(NO_PICTURES)
    else:
        pictures = plots.draw(figures)
    for name, png in pictures.items():
        write_bytes(out / name, png)
        said.append(f"picture: {out / name}")
    write_json(out / "comparison.json", plain(figures))
    write_text(out / "report.md", page.render(figures, list(pictures), notes=[] if pictures else [NO_PICTURES]))
    return figures, [*said, f"figures: {out / 'comparison.json'}", f"report: {out / 'report.md'}"]


def plain(value: Any) -> Any:
    """As JSON has it: six digits of a number, None for NaN and infinity, an object with its properties."""
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value)]
        names += [name for name, member in vars(type(value)).items() if isinstance(member, property)]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, np.ndarray):
        return [plain(number) for number in value.tolist()]
    if isinstance(value, Mapping):
        return {f"{key:g}" if isinstance(key, float) else str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
