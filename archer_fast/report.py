"""The page of a run: curves, time by phase, tokens, and games before and after, made from its folder."""

from __future__ import annotations

import base64
import html
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archer_fast.display import clock_text
from archer_fast.loggers import read_rows
from archer_fast.run_curves import COLOURS, PHASES, Metrics, draw_curves, is_finite
from archer_fast.run_folder import RunFolder, read_json, write_bytes, write_text


def build_report(folder: RunFolder) -> list[str]:
    """Write curves.png and report.html from whatever the folder holds now; returns lines that say so."""
    metrics = Metrics(read_rows(folder.metrics))
    said = []
    png = None
    if importlib.util.find_spec("matplotlib") is None:
        said.append("no curves: matplotlib is not installed (pip install 'archer-fast[report]')")
    else:
        png = draw_curves(metrics)
        write_bytes(folder.curves, png)
        said.append(f"curves: {folder.curves}")
    write_text(folder.report, render_page(folder, metrics, png))
    said.append(f"report: {folder.report}")
    return said


# -- page --------------------------------------------------------------------------------------------


def render_page(folder: RunFolder, metrics: Metrics, png: bytes | None) -> str:
    """One self-contained page: nothing on it is fetched from elsewhere, and all text is escaped."""
    title = f"archer_fast: {folder.path.name or folder.path}"
    state = "finished" if folder.summary.exists() else "not finished yet"
    iterations = metrics.last("iteration")
    seen = "no iteration yet" if iterations is None else f"{iterations:g} iterations"
    if png is None:
        curves = "<p>No curves: matplotlib was not installed when this page was made.</p>"
    else:
        curves = f'<img alt="curves" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    sections = [
        f"<h1>{html.escape(title)}</h1><p>{html.escape(seen)}, {state}</p>",
        _tiles(folder, metrics),
        _collapse_note(folder, metrics),
        f"<h2>Curves</h2>{curves}",
        f"<h2>Time by phase</h2>{_time_bar(metrics)}",
        f"<h2>Work by phase</h2>{_work_table(metrics)}",
        f"<h2>Tokens</h2>{_tokens_bar(metrics)}",
        "<h2>Games</h2><div class=pair>"
        + _text_box("before", folder.games_before)
        + _text_box("after", folder.games_after)
        + "</div>",
        _details("Last row of metrics", json.dumps(metrics.rows[-1], indent=2) if metrics.rows else "none yet"),
        _details("Summary", _file_text(folder.summary)),
        _details("Config", _file_text(folder.config)),
    ]
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _tiles(folder: RunFolder, metrics: Metrics) -> str:
    """The few figures that one looks for first; those that are not known yet are left out."""
    summary: dict[str, Any] = read_json(folder.summary) if folder.summary.exists() else {}
    before = summary.get("before_return", metrics.first("eval_return"))
    after = summary.get("best_return", max(metrics.column("eval_return")[1], default=None))
    won = summary.get("best_win_rate", metrics.last("eval_win_rate"))
    seconds = sum(metrics.total(f"seconds_{phase}") for phase in PHASES)
    processed = metrics.total("processed_tokens")
    so_far = "" if summary else " so far"
    tiles = [
        ("return at the start", before, "{:.2f}"),
        (f"best return{so_far}", after, "{:.2f}"),
        (f"gain{so_far}", None if before is None or after is None else after - before, "{:+.2f}"),
        ("games won", won, "{:.0%}"),
        ("games played", metrics.last("games"), "{:,.0f}"),
        ("tokens/s", processed / seconds if seconds and processed else None, "{:,.0f}"),
        ("utilisation", metrics.last("utilisation"), "{:.1%}"),
    ]
    shown = [(label, form.format(value)) for label, value, form in tiles if is_finite(value)]
    if seconds:
        shown.append(("time of training", clock_text(seconds)))
    cells = "".join(f"<div><b>{value}</b><span>{label}</span></div>" for label, value in shown)
    return f"<div class=tiles>{cells}</div>"


def _collapse_note(folder: RunFolder, metrics: Metrics) -> str:
    """When the policy counted as collapsed, and in a finished run what of it and what was done; else nothing."""
    iterations = [f"{row['iteration']:g}" for row in metrics.rows if row.get("collapsed", 0.0) > 0]
    if not iterations:
        return ""
    summary: dict[str, Any] = read_json(folder.summary) if folder.summary.exists() else {}
    said = "".join(f"<li>{html.escape(text)}</li>" for text in summary.get("collapses", []))
    return f"<h2>Collapsed</h2><p>in iterations {', '.join(iterations)}</p><ul>{said}</ul>"


def _time_bar(metrics: Metrics) -> str:
    seconds = {phase: metrics.total(f"seconds_{phase}") for phase in PHASES}
    return _bar([(phase, value, COLOURS[phase], f"{value:.1f} s") for phase, value in seconds.items()])


def _tokens_bar(metrics: Metrics) -> str:
    processed, useful = metrics.total("processed_tokens"), metrics.total("useful_tokens")
    parts = [
        ("useful (sampled actions)", useful, "#59a14f", f"{useful:,.0f}"),
        ("the rest of what was processed", max(0.0, processed - useful), "#bab0ac", f"{processed - useful:,.0f}"),
    ]
    return _bar(parts)


def _work_table(metrics: Metrics) -> str:
    """What each phase of the whole run computed, how fast, and of which share of the devices' peak."""
    lines = []
    for phase in PHASES:
        rows = [row for row in metrics.rows if is_finite(row.get(f"tflop_per_second_{phase}"))]
        seconds = sum(row[f"seconds_{phase}"] for row in rows)
        if not seconds:
            continue
        tflop, share = (
            sum(row.get(f"{name}_{phase}", math.nan) * row[f"seconds_{phase}"] for row in rows)
            for name in ("tflop_per_second", "utilisation")
        )
        used = f"{share / seconds:.1%}" if math.isfinite(share) else "not known"
        lines.append(f"<tr><td>{phase}</td><td>{tflop:,.4g}</td><td>{tflop / seconds:,.4g}</td><td>{used}</td></tr>")
    if not lines:
        return "<p>No FLOPs were counted.</p>"
    head = "".join(f"<th>{name}</th>" for name in ("phase", "TFLOP", "TFLOP/s", "utilisation"))
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _bar(parts: Sequence[tuple[str, float, str, str]]) -> str:
    """One bar divided by share, and its legend."""
    total = sum(value for _, value, _, _ in parts)
    if total <= 0:
        return "<p>Nothing yet.</p>"
    shares = [(name, 100 * value / total, colour, text) for name, value, colour, text in parts if value > 0]
    bar = "".join(f'<i style="width:{share:.2f}%;background:{colour}"></i>' for _, share, colour, _ in shares)
    legend = "".join(
        f'<li><i style="background:{colour}"></i>{html.escape(name)}: {html.escape(text)} ({share:.0f} %)</li>'
        for name, share, colour, text in shares
    )
    return f"<div class=bar>{bar}</div><ul class=legend>{legend}</ul>"


def _text_box(title: str, path: Path) -> str:
    return f"<div><h3>{html.escape(title)}</h3><pre>{html.escape(_file_text(path))}</pre></div>"


def _details(title: str, text: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"


def _file_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else "not there yet"


_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881}
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:.5rem 0}
img{max-width:100%;border-radius:6px}
.tiles{display:flex;flex-wrap:wrap;gap:.6rem}
.tiles div{border:1px solid var(--line);border-radius:6px;padding:.5rem .9rem;min-width:7rem}
.tiles b{display:block;font-size:1.35rem}.tiles span{opacity:.7;font-size:.85rem}
.bar{display:flex;height:1.4rem;border-radius:5px;overflow:hidden}.bar i{display:block}
.legend{list-style:none;padding:0;margin:.4rem 0;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem}
.legend i{display:inline-block;width:.8rem;height:.8rem;border-radius:2px;margin-right:.4rem}
table{border-collapse:collapse}td,th{border-bottom:1px solid var(--line);padding:.2rem .9rem;text-align:right}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:1rem}
pre{background:var(--soft);border:1px solid var(--line);border-radius:6px;padding:.7rem;overflow:auto;max-height:32rem;
font-size:.85rem;white-space:pre-wrap}
details{margin:.6rem 0}summary{cursor:pointer}
"""
