"""The page of a run: curves, time by phase, tokens, and games before and after, made from its folder."""

from __future__ import annotations

import base64
import html
import importlib.util
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archer_fast.display import clock_text
from archer_fast.loggers import read_rows
from archer_fast.run_folder import RunFolder, read_json, write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHASES = ("rollout", "critic", "actor", "other")
SHARES = ("guess", "question", "repeat", "invalid")
COLOURS = {"rollout": "#4e79a7", "critic": "#f28e2b", "actor": "#59a14f", "other": "#bab0ac"}


@dataclass(slots=True, frozen=True)
class Metrics:
    """The rows of metrics.jsonl, asked by column; a row may lack any key but "iteration"."""

    rows: Sequence[dict[str, float]]

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Games played (or iterations, where no row counts games) against the finite values of `name`."""
        x = "games" if any("games" in row for row in self.rows) else "iteration"
        pairs = [(row[x], row[name]) for row in self.rows if _finite(row.get(name)) and _finite(row.get(x))]
        return [p[0] for p in pairs], [p[1] for p in pairs]

    @property
    def x_label(self) -> str:
        return "games" if any("games" in row for row in self.rows) else "iteration"

    def total(self, name: str) -> float:
        return sum(self.column(name)[1])

    def last(self, name: str) -> float | None:
        values = self.column(name)[1]
        return values[-1] if values else None

    def first(self, name: str) -> float | None:
        values = self.column(name)[1]
        return values[0] if values else None


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


# -- curves ------------------------------------------------------------------------------------------


def draw_curves(metrics: Metrics) -> bytes:
    """All curves as one PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 21.7), layout="constrained")
        panels = figure.subplots(7, 2)
        for panel, draw in zip(panels.flat, _PANELS, strict=True):
            draw(panel, metrics)
            panel.set_xlabel(metrics.x_label)
            panel.grid(alpha=0.25)
            if not panel.has_data():
                panel.text(0.5, 0.5, "nothing yet", transform=panel.transAxes, ha="center", color="grey")
            elif panel.get_legend_handles_labels()[0]:
                panel.legend(frameon=False, fontsize=8)
        out = BytesIO()
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _collapses(metrics: Metrics) -> list[tuple[float, float]]:
    """Spans of x in which the policy counted as collapsed, from the row before."""
    x, collapsed = metrics.column("collapsed")
    return [(before, now) for before, now, flag in zip([0.0, *x], x, collapsed, strict=False) if flag > 0]


def _plot(panel: Axes, metrics: Metrics, name: str, label: str | None = None, **style: Any) -> None:
    x, y = metrics.column(name)
    if x:
        panel.plot(x, y, label=label or name, marker="." if len(x) == 1 else None, **style)


def _draw_return(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("return of a game")
    for first, last in _collapses(metrics):
        panel.axvspan(first, last, color="#e15759", alpha=0.15, lw=0)
    _plot(panel, metrics, "return", "rollouts", color="#4e79a7", alpha=0.45, lw=1)
    x, y = metrics.column("eval_return")
    if x:
        errors = [row.get("eval_return_se", 0.0) for row in metrics.rows if _finite(row.get("eval_return"))]
        errors = [e if math.isfinite(e) else 0.0 for e in errors]
        panel.errorbar(x, y, errors, fmt="o-", ms=4, capsize=3, color="#e15759", label="evaluation ± standard error")
        panel.axhline(y[0], ls="--", lw=1, color="grey", label="start")


def _draw_win_rate(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("games won")
    _plot(panel, metrics, "win_rate", "rollouts", color="#4e79a7", alpha=0.45, lw=1)
    _plot(panel, metrics, "eval_win_rate", "evaluation", color="#e15759", ls="-")
    panel.set_ylim(-0.02, 1.02)


def _draw_shares(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("share of turns")
    for name in SHARES:
        _plot(panel, metrics, name, lw=1.2)
    panel.set_ylim(-0.02, 1.02)


def _draw_lengths(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("length")
    _plot(panel, metrics, "turns", "turns a game", color="#4e79a7")
    _plot(panel, metrics, "action_length", "tokens an action", color="#59a14f")


def _draw_entropy(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("entropy, nats a token")
    _plot(panel, metrics, "entropy", color="#4e79a7")
    panel.set_ylim(bottom=0)


def _draw_kl(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("KL to the start, nats an action")
    _plot(panel, metrics, "kl", "KL to the start", color="#e15759")


def _draw_critic(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("critic: explained variance of its targets")
    _plot(panel, metrics, "explained_variance", "explained variance", color="#f28e2b")
    _, y = metrics.column("explained_variance")
    if y:
        panel.set_ylim(max(-1.0, min(0.0, *y)) - 0.02, 1.02)


def _draw_losses(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("critic loss, spread of advantages")
    _plot(panel, metrics, "critic_loss", "critic loss", color="#f28e2b")
    _plot(panel, metrics, "advantage_std", "advantages' standard deviation", color="#59a14f")


def _draw_time(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("seconds an iteration, by phase")
    rows = [row for row in metrics.rows if any(_finite(row.get(f"seconds_{p}")) for p in PHASES)]
    if rows:
        x = [row.get(metrics.x_label, row["iteration"]) for row in rows]
        stacks = [[_or_zero(row.get(f"seconds_{phase}")) for row in rows] for phase in PHASES]
        panel.stackplot(x, stacks, labels=PHASES, colors=[COLOURS[p] for p in PHASES], alpha=0.85)


def _draw_speed(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("tokens a second, by phase")
    for phase in PHASES:
        _plot(panel, metrics, f"tokens_per_second_{phase}", phase, color=COLOURS[phase])
    panel.set_ylim(bottom=0)


def _draw_staleness(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("age of the replay, optimizer steps of the actor")
    x, low = metrics.column("staleness_p10")
    _, high = metrics.column("staleness_p90")
    if x and len(low) == len(high):
        panel.fill_between(x, low, high, color="#4e79a7", alpha=0.2, lw=0, label="80 % of its turns")
    _plot(panel, metrics, "staleness_p50", "median", color="#4e79a7")


def _draw_sharing(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("tokens of a row a turn, for each token processed")
    _plot(panel, metrics, "deduplication", "games", color="#f28e2b")
    _plot(panel, metrics, "deduplication_actor", "actor's passes", color="#59a14f")
    panel.set_ylim(bottom=0)


def _draw_mismatch(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("KL(sampler || trainer) at equal weights, nats an action")
    _plot(panel, metrics, "mismatch_kl", color="#e15759")


def _draw_tokens(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("tokens so far (millions)")
    for name, label in (("processed_tokens", "processed"), ("useful_tokens", "useful: sampled actions")):
        x, y = metrics.column(name)
        if x:
            panel.plot(x, [total / 1e6 for total in _running(y)], label=label)


_PANELS = (
    _draw_return,
    _draw_win_rate,
    _draw_shares,
    _draw_lengths,
    _draw_entropy,
    _draw_kl,
    _draw_critic,
    _draw_losses,
    _draw_time,
    _draw_speed,
    _draw_tokens,
    _draw_sharing,
    _draw_staleness,
    _draw_mismatch,
)


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
    ]
    shown = [(label, form.format(value)) for label, value, form in tiles if _finite(value)]
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


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _or_zero(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _running(values: Iterable[float]) -> list[float]:
    total, out = 0.0, []
    for value in values:
        total += value
        out.append(total)
    return out


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
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:1rem}
pre{background:var(--soft);border:1px solid var(--line);border-radius:6px;padding:.7rem;overflow:auto;max-height:32rem;
font-size:.85rem;white-space:pre-wrap}
details{margin:.6rem 0}summary{cursor:pointer}
"""
