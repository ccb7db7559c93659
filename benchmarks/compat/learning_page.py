"""A page and a picture of the curves that learning_curve.py wrote.

.venv/bin/python benchmarks/compat/learning_page.py exact0.jsonl shared0.jsonl shared1.jsonl --out docs/compat_learning
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

from report_page import Section, page, provenance

WINDOW = 2  # iterations that a point is the mean of

Row = dict[str, Any]


def smoothed(rows: list[Row], i: int) -> tuple[float, float]:
    """Mean return of the games of `WINDOW` iterations up to row i, and its standard error."""
    last = rows[max(0, i + 1 - WINDOW) : i + 1]
    errors = np.array([row["return_se"] for row in last])
    return float(np.mean([row["return"] for row in last])), float((errors**2).sum() ** 0.5 / len(last))


def section(curves: dict[str, list[Row]], every: int) -> Section:
    """Returns after so many games."""
    most = max(row["games"] for rows in curves.values() for row in rows)
    table = []
    for games in range(0, most + 1, every):
        cells = [f"{games:,}"]
        for rows in curves.values():
            at = [i for i, row in enumerate(rows) if row["games"] == games]
            cells.append("{:.1f} ± {:.1f}".format(*smoothed(rows, at[0])) if at else "")
        table.append(tuple(cells))
    note = f"Mean return of the last {WINDOW} iterations' games ± standard error."
    return Section("Return by games", note, ("games", *curves), table, 0)


def picture(curves: dict[str, list[Row]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for name, rows in curves.items():
        means = [smoothed(rows, i)[0] for i in range(len(rows))]
        axis.plot([row["games"] for row in rows], means, label=name, linestyle="-" if "shared" in name else "--")
    axis.set(xlabel="games", ylabel="return")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("curves", type=Path, nargs="+", help="MODE and seed are read from the names: shared0.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="without suffix: .md and .png are written")
    parser.add_argument("--every", type=int, default=640)
    parser.add_argument("--facts", type=json.loads, default={}, help="JSON, more lines for the head of the page")
    asked = parser.parse_args()
    curves = {
        f"{path.stem[:-1]}, seed {path.stem[-1]}": [json.loads(line) for line in path.read_text().splitlines()]
        for path in asked.curves
    }
    facts = provenance() | {
        "what": "`benchmarks/compat/learning_curve.py`: the original's loop on Twenty Questions with 10 objects, "
        "one start policy, a RoBERTa made on the spot for the encoder of exact mode"
    }
    picture(curves, asked.out.with_suffix(".png"))
    text = page("drop-in: what its two modes learn", facts | asked.facts, [section(curves, asked.every)])
    asked.out.with_suffix(".md").write_text(f"{text}\n![return]({asked.out.name}.png)\n")
    print(text)


if __name__ == "__main__":
    main()
